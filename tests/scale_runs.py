"""Training runs of toy stages on one or two ranks, for tests/test_scale.py.

Ranks are forked from one server that has imported everything already, so a rank starts in a fraction of a second.
"""

import json
import multiprocessing
import os
import socket
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from torch.distributed.tensor import DTensor

import train
from model.weights import content_hash
from pipeline.data.shards import ShardWriter
from pipeline.load import random_model
from pipeline.train.flow import ARDiffusionStage
from pipeline.train.parallel import whole
from pipeline.train.state import RoleState
from pipeline.train.trainer import Trainer
from tests import tiny
from utils import distributed
from utils.distributed import World
from utils.rng import keyed_randn
from utils.sprites.world import caption, sample_spec

CLIPS, FRAMES = 8, 4  # latent frames
LATENT = (4, FRAMES, tiny.HEIGHT // 8, tiny.WIDTH // 8)  # [C, F, H, W]
# The seed: from some starts a key bias's gradient is a sum that cancels, which float32 knows to 1e-5 of itself at best.
CONFIG = """
seed: 3
video: {{height: {height}, width: {width}, frames_per_chunk: 2, trained_frames: {frames}}}
model: {{num_layers: 2, num_attention_heads: 2, attention_head_dim: 12, ffn_dim: 32, text_dim: 16,
        text_len: {text_len}, text_layers: 1, text_heads: 2, freq_dim: 16}}
cache: {{sink: 1, recent: 1, top_k: 1, compressor: {{channels: [4, 8]}}}}
sampler: {{steps: [1000, 500], shift: 3.0}}
inference: {{num_output_frames: {frames}}}
train:
  max_steps: 5
  total_batch_size: 4
  mixed_precision: "no"
  loss_weighting: none
  optimizer: {{lr: 1.0e-3, betas: [0.9, 0.999]}}
  max_grad_norm: 0.5
  ema_start_step: 1
  ema_decay: 0.5
  checkpoint_every: 100
  sample_frames: {frames}
  threads: 1
data: {{kind: latents, path: {root}/latents, vae: {root}/bundle/vae, clip_frames: {pixel_frames}}}
"""


def write_inputs(folder: Path) -> None:
    """A tiny bundle with random latents and the config all toy runs share."""
    tiny.write_bundle(folder / "bundle")
    shape = dict(tiny.transformer().config)
    for seed, score in enumerate(("teacher", "critic"), 1):  # unlike each other, or their difference is all rounding
        random_model(WanTransformer3DModel, shape, seed).save_pretrained(folder / score)
    clips = folder / "latents" / "clips"
    latents = torch.stack([keyed_randn(LATENT, "clip", i) for i in range(CLIPS)]).half()
    writer = ShardWriter(clips, "clips", {"vae": content_hash(folder / "bundle" / "vae")}, 1, World())
    writer.write(0, {"latents": latents}, [{"caption": caption(sample_spec(0, i))} for i in range(CLIPS)])
    sizes = {"height": tiny.HEIGHT, "width": tiny.WIDTH, "frames": FRAMES, "pixel_frames": 4 * FRAMES - 3}
    (folder / "config.yaml").write_text(CONFIG.format(root=folder, text_len=tiny.TEXT_LEN, **sizes))


def stage_overrides(folder: Path, stage: str) -> list[str]:
    """What a toy run of a stage needs beyond the shared config."""
    bundle = [f"model.bundle={folder / 'bundle'}", f"train.text_from={folder / 'bundle'}"]
    more = {
        "teacher": [],
        "ar_diffusion": [],
        "consistency": [*bundle, "train.ema_start_step=0"],
        "dmd": [
            *bundle,
            "video.trained_frames=8",  # four chunks: the last attends a compressed one
            f"dmd.teacher={folder / 'teacher'}",
            f"dmd.critic={folder / 'critic'}",
            "dmd.critic_updates=2",
            "dmd.critic_optimizer.lr=5e-4",
            "train.optimizer.lr=1.5e-3",  # two updates only
        ],
    }
    if stage == "forward":  # compressed chunks pass through the sharded blocks, with gradient
        return [*stage_overrides(folder, "dmd"), "cache.compressor.kv=forward"]
    return [f"train.stage={stage}", *more[stage]]


def batch_of(ranks: int, accumulation: int = 1) -> list[str]:
    """Overrides that make a step's four samples out of `ranks` ranks and `accumulation` micro-steps."""
    return [f"train.batch_size={4 // ranks // accumulation}", f"train.gradient_accumulation={accumulation}"]


def arguments(folder: Path, logdir: Path, *overrides: str) -> list[str]:
    return ["--config_path", str(folder / "config.yaml"), "--logdir", str(logdir), *overrides]


def start(ranks: int, target, *args) -> list[BaseProcess]:
    """Run `target(*args)` in `ranks` processes that look as if torchrun had started them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.scale_runs", "pipeline.train.dmd", "pipeline.train.consistency"])
    processes = [context.Process(target=_rank, args=(rank, ranks, port, target, args)) for rank in range(ranks)]
    for process in processes:
        process.start()
    return processes


def finish(processes: list[BaseProcess], timeout: float = 900.0) -> list[int | None]:
    """Exit codes, once all have ended."""
    for process in processes:
        process.join(timeout)
    return [process.exitcode for process in processes]


def _rank(rank: int, ranks: int, port: int, target, args) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
    raise SystemExit(target(*args) or 0)


def run(argv: list[str]) -> int:
    """The command line, in this process."""
    return train.main([*argv, "--no_visualize"])


def run_visual(argv: list[str]) -> int:
    """The command line with its sample videos."""
    return train.main(argv)


def run_broken(argv: list[str], rank: int, steps: tuple[int, ...]) -> int:
    """The command line, with a loss that is not finite on one rank at some steps."""
    loss = ARDiffusionStage.loss

    def broken(stage, role, batch, step):
        value, logs = loss(stage, role, batch, step)
        bad = step in steps and os.environ["RANK"] == str(rank)
        return (value * float("nan") if bad else value), logs

    ARDiffusionStage.loss = broken
    return run(argv)


def placed(argv: list[str], output: Path) -> int:
    """Write to `output` which parameters of the stage, by role and name, are shards, and train nothing."""

    def describe(trainer: Trainer) -> None:
        modules = {**trainer.stage.modules, **trainer.stage.frozen}
        shards = {
            f"{role}:{name}": isinstance(p, DTensor)
            for role, module in modules.items()
            for name, p in module.named_parameters()
        }
        if trainer.world.is_main:
            output.write_text(json.dumps(shards), encoding="utf-8")

    Trainer.run = describe
    return run(argv)


def recorded(argvs: dict[str, list[str]], folder: Path) -> None:
    """Run each command line and write `folder/NAME.pt`.

    `gradients`: per update, those before the clip by parameter name; `logs`: per step; `moved`: per role
    how far a weight at most was from its start at the role's last update. All runs share one process group.
    """
    world = distributed.join_world(torch.device("cpu"))
    clip, leave, log = RoleState.clip, distributed.leave_world, train.Tracker.log
    distributed.leave_world = lambda world: None
    for name, argv in argvs.items():
        record, starts = {"gradients": [], "logs": [], "moved": {}}, {}

        def clip_and_record(state, max_norm, record=record, starts=starts):
            named = {key: p for key, p in state.module.named_parameters() if p.grad is not None}
            record["gradients"].append({key: whole(p.grad).clone() for key, p in named.items()})
            weights = {key: whole(p.detach()).clone() for key, p in named.items()}
            first = starts.setdefault(id(state), weights)
            record["moved"][id(state)] = max((weights[key] - first[key]).abs().max().item() for key in weights)
            return clip(state, max_norm)

        def log_and_record(tracker, values, step, record=record):
            record["logs"].append(dict(values))
            log(tracker, values, step)

        RoleState.clip, train.Tracker.log = clip_and_record, log_and_record
        code = run(argv)
        if code:
            raise SystemExit(f"run {name} ended with {code}")
        if world.is_main:
            torch.save(record, folder / f"{name}.pt")
    RoleState.clip, distributed.leave_world, train.Tracker.log = clip, leave, log
    leave(world)
