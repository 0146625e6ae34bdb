"""How good videos are: what can be measured on any of them, and how much of a sprite-world caption is right.

    python -m scripts.evaluate output/demo                 # every video below, a table for each folder
    python -m scripts.evaluate output/demo/000.mp4 --json
    python -m scripts.evaluate --config_path configs/tiny/demo.yaml --captions 16 --seconds 60 cache.top_k=4
    python -m scripts.evaluate --config_path configs/tiny/demo.yaml --pairs unseen --output_folder output/new
    python -m scripts.evaluate --config_path configs/tiny/ar_demo.yaml --teacher \
        bundles/tiny_teacher/transformer sampler.num_steps=16 sampler.guidance=4

With --config_path videos of the first held-out captions are generated (clips from index 1,000,000 on): `seen`
combinations of colour and shape, or the `unseen` ones that no training clip shows. They are made in batches, with fresh
noise, and kept where --output_folder says so. With --teacher a bidirectional DiT is scored on clips of
`video.trained_frames`, made by `sampler`'s Euler steps; text encoder and VAE are the bundle's.

Metrics of any video: `utils/metrics.py`. Captions come from NAME.json beside NAME.mp4; each attribute has two scores:
over the seconds of videos whose caption states it, and over those whose caption leaves it out, where right means "as in
seconds 1 to 4 of the same video". "moving" is whether a sprite is there and does not stand still, whatever its motion
is called. A video whose caption cannot be read still has its metrics. With --json, or --config_path, the last line is
one JSON object.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.cli import answer_typos, run_command

if __name__ == "__main__":  # before the imports below, which take seconds
    answer_typos()

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from tqdm import tqdm

from pipeline.bundle import check_bundle, load_library_model
from pipeline.generate.bidirectional import sample_clip
from pipeline.generate.inference import load_pipeline, resolve_runtime
from pipeline.generate.pipeline import PackForcingPipeline
from pipeline.generate.rollout import NoiseSource, Prompts, prompt_noise
from pipeline.generate.vae_stream import StreamingDecoder
from utils.config import Config, ConfigError
from utils.load_config import load_config
from utils.metrics import METRICS, measure
from utils.sprites.read import MARKED, Mark, accuracy, read_seconds, score
from utils.sprites.world import HELD_OUT_START, caption, parse_caption, sample_spec
from utils.video import PARTIAL_SUFFIX, VideoWriter, frame_rate, read_video, to_uint8

log = logging.getLogger(__name__)
WINDOWS = {"0-5 s": range(0, 5), "10-20 s": range(10, 20), "25-30 s": range(25, 30), "50-60 s": range(50, 60),
           "110-120 s": range(110, 120)}  # fmt: skip
EVERY_SECOND = range(10**6)


@dataclass(frozen=True)
class Verdict:
    """What is found out about one video.

    Attributes:
        marks: of its caption; none where it has none that can be read.
        curves: metric -> its value in every second.
        metrics: metric -> its value.
    """

    marks: list[Mark]
    curves: dict[str, list[float]]
    metrics: dict[str, float]


def judge(frames: np.ndarray, fps: float, prompt: str | None) -> Verdict:
    """Frames uint8 [F, H, W, 3]. Raises ValueError for a prompt that is not a caption of the sprite world."""
    marks = [] if prompt is None else score(read_seconds(frames, fps), parse_caption(prompt))
    series = measure(frames, fps)
    curves = {name: metric.over_time(series) for name, metric in METRICS.items()}
    metrics = {name: float(METRICS[name].summary(curve)) for name, curve in curves.items()}
    return Verdict(marks, {name: curve.round(4).tolist() for name, curve in curves.items()}, metrics)


def find_videos(path: Path) -> dict[str, list[Path]]:
    """Finished videos by folder, relative to `path`, in order of name."""
    if not path.exists():
        raise ConfigError(f"{path} does not exist: name an mp4 or a folder of them")
    if path.is_file():
        return {".": [path]}
    folders: dict[str, list[Path]] = {}
    for video in sorted(path.rglob("*.mp4")):
        if not video.name.endswith(PARTIAL_SUFFIX):
            folders.setdefault(str(video.parent.relative_to(path)), []).append(video)
    if not folders:
        raise ConfigError(f"{path} holds no finished .mp4: generate some with inference_packforcing.py")
    return folders


def read_sidecar(video: Path) -> tuple[str | None, float | None]:
    """Prompt and frames per second from the JSON beside a video, None for what it does not say; logs what is wrong."""
    sidecar = video.with_suffix(".json")
    try:
        record = json.loads(sidecar.read_text(encoding="utf-8"))
        prompt, fps = record["prompt"], record["fps"]
        if isinstance(prompt, str) and isinstance(fps, int | float) and 0 < fps < math.inf:
            return prompt, float(fps)
        reason = f"prompt must be text and fps a positive number, not {prompt!r} and {fps!r}"
    except OSError as error:
        reason = error.strerror
    except (ValueError, KeyError, TypeError) as error:
        reason = f"not a sidecar: {type(error).__name__} {error}"
    log.warning("%s: no caption (%s: %s); metrics only", video, sidecar.name, reason)
    return None, None


def evaluate_video(video: Path) -> Verdict:
    """Raises ValueError where it is no video."""
    prompt, fps = read_sidecar(video)
    frames, fps = read_video(video), fps or frame_rate(video)
    try:
        return judge(frames, fps, prompt)
    except ValueError as error:
        log.warning("%s: caption not scored (%s); metrics only", video, error)
        return judge(frames, fps, None)


def evaluate_folder(videos: list[Path]) -> dict[str, Verdict]:
    """Name -> verdict of the readable ones; logs the others."""
    verdicts = {}
    for video in videos:
        try:
            verdicts[video.name] = evaluate_video(video)
        except (ValueError, OSError) as error:
            log.warning("left out: %s", error)
    return verdicts


def summarise(verdicts: list[Verdict]) -> dict[str, Any]:
    """`videos`; `windows`: window -> "captioned" and "left_out" -> attribute -> share right, windows without a second
    left out; `captioned`: the same over all seconds; `metrics`: means over videos."""
    marks = [mark for verdict in verdicts for mark in verdict.marks]
    seconds = {mark.second for mark in marks}
    return {
        "videos": len(verdicts),
        "windows": {
            name: {"captioned": accuracy(marks, True, window), "left_out": accuracy(marks, False, window)}
            for name, window in WINDOWS.items()
            if seconds & set(window)
        },
        "captioned": accuracy(marks, True, EVERY_SECOND),
        "metrics": {name: float(np.mean([one.metrics[name] for one in verdicts])) for name in METRICS},
    }


def print_table(title: str, summary: dict[str, Any]) -> None:
    windows = summary["windows"]
    print(f"\n{title}: {summary['videos']} video{'s' if summary['videos'] > 1 else ''}")
    if windows:
        print("".join([f"{'':12}"] + [f"{window:>22}" for window in windows]))
        print("".join([f"{'attribute':12}"] + [f"{'captioned':>12}{'left out':>10}" for _ in windows]))
        for name in MARKED:
            cells = (columns[kind].get(name) for columns in windows.values() for kind in ("captioned", "left_out"))
            shown = ("-" if cell is None else f"{cell:.3f}" for cell in cells)
            print(f"{name:12}" + "".join(f"{cell:>{10 if column % 2 else 12}}" for column, cell in enumerate(shown)))
    print("  ".join(f"{name} {value:.3g} {METRICS[name].unit}" for name, value in summary["metrics"].items()))


def print_comparison(folders: dict[str, dict[str, Any]]) -> None:
    """One row per folder: captioned attributes over all seconds, then metrics."""
    names = [name for name in MARKED if any(name in folder["captioned"] for folder in folders.values())]
    width = max(map(len, folders))
    print("\n" + " " * width + "".join(f"{name:>18}" for name in (*names, *METRICS)))
    for folder, summary in folders.items():
        cells = [summary["captioned"].get(name) for name in names] + list(summary["metrics"].values())
        print(f"{folder:{width}}" + "".join(f"{'-' if cell is None else f'{cell:.3f}':>18}" for cell in cells))


def evaluate_path(path: Path, with_json: bool) -> None:
    """Tables of the videos at `path`. Raises `ConfigError` where none can be read."""
    verdicts = {folder: evaluate_folder(videos) for folder, videos in find_videos(path).items()}
    folders = {folder: summarise(list(found.values())) for folder, found in verdicts.items() if found}
    if not folders:
        raise ConfigError(f"{path}: no video there can be read")
    for folder, summary in folders.items():
        print_table(str(path / folder), summary)
    if len(folders) > 1:
        print_comparison(folders)
    if with_json:
        for folder, summary in folders.items():
            summary["per_video"] = {name: summarise([verdict]) for name, verdict in verdicts[folder].items()}
        print(json.dumps({"folders": folders}))


def generate_videos(
    config: Config, prompts: list[str], seconds: float, batch: int, teacher: Path | None
) -> Iterator[np.ndarray]:
    """A video of each prompt, uint8 [F, H, W, 3], `batch` of them at a time; sample i has the noise of number i."""
    check_bundle(config)
    pipe = load_pipeline(config, resolve_runtime(config))
    model = None if teacher is None else load_teacher(teacher, pipe)
    for first in tqdm(range(0, len(prompts), batch), desc="batches"):
        some = prompts[first : first + batch]
        noise = prompt_noise(config.seed, some, list(range(first, first + len(some))))
        if model is not None:
            yield from sample_clips(config, pipe, model, some, noise)
            continue
        stream = pipe.stream(some, seconds=seconds, noise=noise, output_type="pt")
        pieces = [to_frames(chunk.frames) for chunk in tqdm(stream, desc="chunks", leave=False)]
        yield from np.concatenate(pieces, axis=1)


def to_frames(pixels: torch.Tensor) -> np.ndarray:
    """Pixels [B, F, 3, H, W] in 0..1 -> uint8 [B, F, H, W, 3]."""
    return (255 * pixels).round().to(torch.uint8).permute(0, 1, 3, 4, 2).cpu().numpy()


def load_teacher(folder: Path, pipe: PackForcingPipeline) -> WanTransformer3DModel:
    """Raises `ConfigError` where the folder holds none, or one for other latents or texts."""
    teacher = load_library_model(WanTransformer3DModel, folder, pipe.transformer.dtype)
    for name in ("in_channels", "text_dim"):
        theirs, ours = teacher.config[name], pipe.transformer.config[name]
        if theirs != ours:
            raise ConfigError(f"--teacher is {folder}: its {name} is {theirs}, the bundle's is {ours}")
    return teacher.to(pipe.transformer.device)


@torch.no_grad()
def sample_clips(
    config: Config, pipe: PackForcingPipeline, teacher: WanTransformer3DModel, prompts: list[str], noise: NoiseSource
) -> list[np.ndarray]:
    """One clip of the trained length per prompt by a bidirectional DiT: uint8 [F, H, W, 3] each."""
    text_len, stride = pipe.transformer.config.text_len, pipe.vae_shape.spatial_stride

    def embed(text: str) -> torch.Tensor:  # [1, text_len, text_dim], padded as the DiT was trained
        embeds = pipe.encode_prompt(text)
        return F.pad(embeds, (0, 0, 0, text_len - embeds.shape[1]))

    sampler, video = pipe.sampler_config, config.video
    negative = None if sampler.guidance == 1 else embed(sampler.negative_prompt)
    shape = (teacher.config.in_channels, video.trained_frames, video.height // stride, video.width // stride)
    conditioning = Prompts(torch.cat([embed(prompt) for prompt in prompts]), negative)
    latents = sample_clip(teacher, noise(0, 0, shape).to(teacher.device), conditioning, sampler)
    return [to_uint8(clip) for clip in StreamingDecoder(pipe.vae).decode(latents)]


def keep(path: Path, prompt: str, frames: np.ndarray, fps: int) -> None:
    """Write one video with its sidecar."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with VideoWriter(path, fps, *frames.shape[1:3]) as writer:
        writer.append(frames)
    path.with_suffix(".json").write_text(json.dumps({"prompt": prompt, "fps": fps}), encoding="utf-8")


def evaluate_held_out(arguments: argparse.Namespace) -> None:
    """Generate videos of held-out captions and print what is right in them."""
    for name in ("captions", "seconds", "batch"):
        if getattr(arguments, name) <= 0:
            raise ConfigError(f"--{name} is {getattr(arguments, name)}: must be positive")
    config = load_config(arguments.config_path, arguments.arguments)
    indices = range(HELD_OUT_START, HELD_OUT_START + arguments.captions)
    prompts = [caption(sample_spec(config.seed, index, arguments.pairs)) for index in indices]
    videos = generate_videos(config, prompts, arguments.seconds, arguments.batch, arguments.teacher)
    verdicts, made, start = [], 0, time.perf_counter()
    for number, (prompt, frames) in enumerate(zip(prompts, videos, strict=True)):
        made += len(frames)
        verdicts.append(judge(frames, config.video.fps, prompt))
        if arguments.output_folder:
            keep(arguments.output_folder / f"{number:04d}.mp4", prompt, frames, config.video.fps)
    figures = {"frames_per_second": round(made / (time.perf_counter() - start), 1)}
    summary = summarise(verdicts)
    print_table(f"held-out captions, {arguments.pairs} pairs", summary)
    settings = {"config": arguments.config_path, "overrides": arguments.arguments, "pairs": arguments.pairs}
    print(json.dumps({**settings, **figures, **summary}))


def run(arguments: argparse.Namespace) -> None:
    if arguments.config_path is not None:
        return evaluate_held_out(arguments)
    if not arguments.arguments:
        raise ConfigError("nothing to evaluate: name a video or a folder of them, or give --config_path")
    for path in arguments.arguments:
        evaluate_path(Path(path), arguments.json)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arguments", nargs="*", metavar="PATH or key=value", help="videos or folders; with "
                        "--config_path settings")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    parser.add_argument("--config_path", help="generate videos of held-out captions with this YAML")
    parser.add_argument("--captions", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=5.0, help="length of each video, rounded up to whole chunks")
    parser.add_argument("--pairs", choices=("seen", "unseen"), default="seen", help="colour and shape combinations")
    parser.add_argument("--batch", type=int, default=16, help="videos generated together")
    parser.add_argument("--teacher", type=Path, help="transformer folder of a bidirectional DiT to score in its place")
    parser.add_argument("--output_folder", type=Path, help="keep the videos here")
    arguments = parser.parse_intermixed_args(argv)
    return run_command(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
