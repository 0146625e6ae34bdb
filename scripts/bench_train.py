"""Where the time and memory of a DMD step go.

    python -m scripts.bench_train --config_path configs/tiny/dmd.yaml
    python -m scripts.bench_train --config_path configs/packforcing_dmd_chunkwise_hr_8gpu_sink3_recent2.yaml \\
        model.random_init=true
    torchrun --nproc_per_node=8 -m scripts.bench_train --config_path ... model.random_init=true

The trainer runs the stage as in training, nothing is saved. Every step updates critic and generator; what a step of the
real run costs on average (the generator only every `dmd.critic_updates`-th time) is worked out. The denoising step at
which rollouts stop, random in training, goes through all of them equally often: --repeats times each, after one step to
warm up. Where `dmd.max_rollout_frames` allows for longer rollouts, all have that length.

With `model.random_init` no file is needed but the config: weights are random in the shape that the `model` section
names, both scores likewise (or as `dmd.teacher`/config.json and `dmd.critic`/config.json say, where these exist), and
random prompt embeddings stand for a text encoder. Prints a table, then one line of JSON.

Tokens are those that go through the network in a part: chunks x (steps + commit) less the last commit in the rollout;
cond and uncond for the real score. Memory is the peak of GPU memory during the part, on a CPU that of the process.
"""

import argparse
import json
import logging
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from model.geometry import WAN_PATCH_SIZE
from pipeline.train.dmd import DMDStage
from pipeline.train.trainer import Trainer
from scripts.stand_ins import stand_ins
from utils.cli import check_positive, config_parser, print_rows, run_configured
from utils.config import Config
from utils.distributed import World, rank
from utils.timing import Stopwatch, device_name, peak_memory

ROLES = ("critic", "generator")
# Parts of a role's update, in order; those after `loss` are not inside it.
IN_LOSS = ("text", "rollout", "real_score", "fake_score")
AFTER_LOSS = ("backward", "optimizer")
FORWARDS = "rollout_forwards"  # inside the rollout


@dataclass
class Recorder:
    """In the tracker's place: what the stopwatch measured, step by step."""

    watch: Stopwatch
    steps: list[dict[str, Any]] = field(default_factory=list)

    def start(self, step: int) -> None:
        pass

    def log(self, values: dict[str, float], step: int) -> None:
        watch = self.watch
        self.steps.append({"all": values["seconds"], "seconds": dict(watch.seconds), "tokens": dict(watch.tokens),
                           "peak": dict(watch.peak)})  # fmt: skip
        watch.clear()


def tokens_of(hidden_states: torch.Tensor, *_, **__) -> int:
    """Tokens of latents [B, C, F, H, W]."""
    batch, _, *size = hidden_states.shape
    frames, height, width = (extent // patch for extent, patch in zip(size, WAN_PATCH_SIZE, strict=True))
    return batch * frames * height * width


class BenchStage(DMDStage):
    """The stage, with the step at which rollouts stop going round and every rollout of full length."""

    def exit_step(self, role: str, step: int) -> int:
        exits = len(self.config.sampler.steps)
        return (exits - 1 - step) % exits  # the longest to warm up

    def num_chunks(self, role: str, step: int) -> int:
        return self.max_chunks


def summary(steps: list[dict[str, Any]], role: str, clip_tokens: int) -> dict[str, dict[str, float | None]]:
    """Means over steps of a role's parts: seconds, tokens per second (None: no network), peak bytes."""

    def found(step: dict[str, Any], kind: str, part: str) -> list[float]:
        """Of all parts of the role with this last name."""
        paths = (name.split("/") for name in step[kind])
        return [step[kind]["/".join(path)] for path in paths if path[0] == role and path[-1] == part]

    def average(kind: str, part: str) -> float:
        return mean(sum(found(step, kind, part)) for step in steps)

    tokens = {part: average("tokens", part) for part in (*IN_LOSS, FORWARDS)}
    tokens |= {"rollout": tokens[FORWARDS], "backward": clip_tokens, "total": clip_tokens}
    seconds = {part: average("seconds", part) for part in (*IN_LOSS, FORWARDS, *AFTER_LOSS)}
    loss = average("seconds", "loss")
    seconds["other"] = loss - sum(seconds[part] for part in IN_LOSS)
    seconds["total"] = loss + sum(seconds[part] for part in AFTER_LOSS)
    return {
        part: {
            "seconds": value,
            "tokens_per_s": tokens[part] / value if tokens.get(part) and value else None,
            "peak_bytes": max((peak for step in steps for peak in found(step, "peak", part)), default=0) or None,
        }
        for part, value in seconds.items()
    }


def bench(config: Config, repeats: int, device: torch.device, world: World, folder: Path) -> dict[str, Any]:
    """Train for 1 + repeats x (number of sampler steps) steps; see the module's docstring."""
    exits = len(config.sampler.steps)
    updates = config.dmd.critic_updates
    config = replace(
        config,
        # The EMA from the first step on: most of a run has it.
        train=replace(config.train, stage="dmd", max_steps=1 + repeats * exits, ema_start_step=0, log_every=1,
                      sample_every=0),
        dmd=replace(config.dmd, critic_updates=1),
    )  # fmt: skip
    stage = BenchStage(config, device, world)
    with Stopwatch(device, memory=True) as watch:
        recorder = Recorder(watch)
        for model, name in ((stage.transformer, FORWARDS), (stage.teacher, "real_score"), (stage.critic, "fake_score")):
            watch.watch_module(model, name, tokens_of)
        trainer = Trainer(config, stage, world, folder, recorder, device, save=False, visualize=False)
        if config.train.compile:
            stage.compile()
        watch.clear()
        trainer.run()
    steps = recorder.steps[1:]
    train, (_, height, width) = config.train, stage.latent_shape
    clip = torch.empty(1, 1, config.video.trained_frames, height, width, device="meta")
    samples = train.batch_size * train.gradient_accumulation
    parts = {role: summary(steps, role, samples * tokens_of(clip)) for role in ROLES}
    critic, generator = (parts[role]["total"]["seconds"] for role in ROLES)
    outside = mean(step["all"] for step in steps) - critic - generator
    step_seconds = critic + generator / updates + outside
    return {
        "device": device_name(device),
        "ranks": world.size,
        "mixed_precision": train.mixed_precision,
        "samples_per_rank": samples,
        "clip_tokens": tokens_of(clip),
        "parameters": {name: sum(p.numel() for p in model.parameters()) for name, model in
                       (("generator", stage.transformer), ("critic", stage.critic), ("teacher", stage.teacher))},
        "timed_steps": len(steps),
        "critic_updates": updates,
        "parts": parts,
        "seconds_outside": outside,  # batch, gradient average and clip, logs
        "seconds_per_step": step_seconds,
        "tokens_per_s": samples * tokens_of(clip) * world.size / step_seconds,
        "peak_bytes": max((max(step["peak"].values(), default=0) for step in steps), default=peak_memory(device)),
    }  # fmt: skip


def print_table(result: dict[str, Any]) -> None:
    titles = [title for role in ROLES for title in (f"{role} s", "share", "tokens/s", "peak GB")]
    rows = [["part", *titles]]
    for part in (*IN_LOSS[:2], FORWARDS, *IN_LOSS[2:], "other", *AFTER_LOSS, "total"):
        rows.append([part])
        for role in ROLES:
            row, total = result["parts"][role][part], result["parts"][role]["total"]["seconds"]
            rate, peak = row["tokens_per_s"], row["peak_bytes"]
            rows[-1] += [f"{row['seconds']:.4f}", f"{row['seconds'] / total:.1%}"]
            rows[-1] += [rate and round(rate), peak and f"{peak / 1e9:.2f}"]
    print()
    print_rows(rows)
    print(
        f"\n{result['device']}, {result['ranks']} ranks x {result['samples_per_rank']} clips of "
        f"{result['clip_tokens']} tokens, {result['mixed_precision']}: {result['seconds_per_step']:.3f} s per step "
        f"(generator every {result['critic_updates']}), {result['tokens_per_s']:.0f} tokens/s, "
        f"peak {result['peak_bytes'] / 1e9:.2f} GB\n"
    )


def run(config: Config, arguments: argparse.Namespace) -> None:
    check_positive(arguments, "repeats")
    with rank(config.train.threads) as (device, world), tempfile.TemporaryDirectory() as folder:
        if config.model.random_init:
            config = stand_ins(config, Path(folder))
        result = bench(config, arguments.repeats, device, world, Path(folder) / "run")
    if world.is_main:
        print_table(result)
        print(json.dumps({"config": arguments.config_path, "overrides": arguments.overrides, **result}))


def main(argv: list[str] | None = None) -> int:
    parser = config_parser(__doc__)
    parser.add_argument("--repeats", type=int, default=2, help="timed steps per step of the sampler")
    logging.basicConfig(level=logging.WARNING)
    return run_configured(parser, argv, run)


if __name__ == "__main__":
    sys.exit(main())
