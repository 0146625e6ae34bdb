"""A folder of captioned videos as latent shards that the stages train on. Format: `pipeline/data/clips.py`.

Beside every shard lies `report-00000.json`: which videos are in it, and why others are not.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import astuple
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from pipeline.data.clips import shard_path
from pipeline.data.latents import normalise
from pipeline.data.shards import META, PLAN, keep_to_plan, unfinished, write_json, write_tensors
from pipeline.data.videos import CaptionedVideo, read_clip
from utils.config import Config, ConfigError
from utils.distributed import World


def report_path(folder: Path, number: int) -> Path:
    return folder / f"report-{number:05d}.json"


class _Clips(Dataset):
    """(number of the video, its frames uint8 [F, H, W, 3], or the reason why there are none)."""

    def __init__(self, config: Config, videos: list[CaptionedVideo], root: Path):
        self.config, self.videos, self.root = config, videos, root

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: int) -> tuple[int, np.ndarray | str]:
        clip, video = self.videos[index], self.config.video
        if not clip.caption:
            return index, "no caption"
        try:
            frames = read_clip(
                self.root / clip.name, self.config.data.clip_frames, video.fps, video.height, video.width, clip.start
            )
        except ValueError as error:
            return index, str(error)
        return index, frames


@torch.no_grad()
def encode_video(vae: AutoencoderKLWan, frames: torch.Tensor) -> torch.Tensor:
    """uint8 [F, H, W, 3] -> normalised latents float16 [C, 1 + (F-1)/4, H/8, W/8], on the CPU.

    By the library's own path, a few frames at a time: the memory of a pass over a whole clip at 480x832 is out of
    proportion to what it saves.
    """
    video = frames.to(vae.device).permute(3, 0, 1, 2)[None].float().div(127.5).sub(1.0)  # [1, 3, F, H, W]
    latents = vae.encode(video).latent_dist.mode()  # [1, C, f, h, w]
    return normalise(vae, latents)[0].half().cpu()


def _no_clips(config: Config, vae: AutoencoderKLWan) -> torch.Tensor:
    """A shard's latents where it has none: [0, C, F, H, W], float16."""
    video, stride = config.video, vae.config.scale_factor_spatial
    frames = 1 + (config.data.clip_frames - 1) // vae.config.scale_factor_temporal
    size = vae.config.z_dim, frames, video.height // stride, video.width // stride
    return torch.empty(0, *size, dtype=torch.float16)


def plan_of(config: Config, videos: list[CaptionedVideo], vae_hash: str) -> dict:
    """Everything that the shards are a function of."""
    listed = json.dumps([astuple(video) for video in videos])
    return {
        "captioned_videos": hashlib.sha256(listed.encode()).hexdigest(),
        "videos": len(videos),
        "shard_size": config.data.shard_size,
        "vae": vae_hash,
        "frames": config.data.clip_frames,
        "height": config.video.height,
        "width": config.video.width,
        "fps": config.video.fps,
    }


def write_video_latents(
    config: Config,
    videos: list[CaptionedVideo],
    root: Path,
    vae: AutoencoderKLWan,
    vae_hash: str,
    folder: Path,
    world: World,
) -> None:
    """Encode `data.clip_frames` frames of every video, the ranks taking shards in turn; finished shards are kept.

    A video that cannot be used is left out and named in the shard's report.

    Args:
        root: folder that the videos' names are relative to.
        vae_hash: of the VAE's weights.

    Raises `ConfigError` where `folder` holds latents made otherwise.
    """
    plan = plan_of(config, videos, vae_hash)
    keep_to_plan(folder, plan, world)
    size = config.data.shard_size
    numbers = range(-(-len(videos) // size))
    paths = [shard_path(folder, number, ".safetensors") for number in numbers]
    members = [range(number * size, min((number + 1) * size, len(videos))) for number in numbers]
    mine = unfinished(paths, world)
    loader = DataLoader(
        _Clips(config, videos, root),
        batch_size=None,
        sampler=[index for number in mine for index in members[number]],
        num_workers=config.data.workers,
    )
    clips, bar = iter(loader), tqdm(total=len(loader), desc="encode", unit="video", disable=not world.is_main)
    for number in mine:
        latents, captions, used, skipped = [], [], [], {}
        for index, frames in islice(clips, len(members[number])):
            bar.update()
            encoded = None if isinstance(frames, str) else encode_video(vae, frames)
            if encoded is None or not encoded.isfinite().all():
                skipped[videos[index].label] = frames if encoded is None else "its latents are not finite"
                continue
            latents.append(encoded)
            captions.append(videos[index].caption)
            used.append(videos[index].label)
        write_json(shard_path(folder, number, ".json"), captions)
        write_json(report_path(folder, number), {"used": used, "skipped": skipped})
        write_tensors(paths[number], {"latents": torch.stack(latents) if latents else _no_clips(config, vae)})
    bar.close()
    if all(path.is_file() for path in paths):  # the rank that ends last; no barrier, which would time out
        write_json(folder / META, plan)


def check_video_latents(folder: Path) -> dict[str, Any]:
    """Read every shard and say what is there.

    Returns:
        JSON: `problems` (texts; none in a finished and sound folder), counts of videos, shards and clips, their shape,
        mean and deviation per channel over all clips, `captions` statistics, and `skipped`: video -> reason.

    Raises `ConfigError` where nothing was ever written.
    """
    if not (folder / PLAN).is_file():
        raise ConfigError(f"data folder {folder} has no {PLAN}: scripts/prepare_latents.py has written nothing there")
    plan = json.loads((folder / PLAN).read_text(encoding="utf-8"))
    expected = -(-plan["videos"] // plan["shard_size"])
    problems, shapes, captions, skipped = [], Counter(), [], {}
    moments = []  # of every clip: mean and mean square per channel [2, C]
    for number in tqdm(range(expected), desc=f"check {folder.name}", unit="shard"):
        path = shard_path(folder, number, ".safetensors")
        if not path.is_file():
            problems.append(f"{path.name} is missing")
            continue
        try:
            latents = load_file(path)["latents"]  # [N, C, F, H, W]
            texts = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            report = json.loads(report_path(folder, number).read_text(encoding="utf-8"))
        except (OSError, KeyError, ValueError, SafetensorError) as error:
            problems.append(f"{path.name}: not readable ({error})")
            continue
        skipped |= report["skipped"]
        captions += texts
        shapes[tuple(latents.shape[1:])] += len(latents)
        if not len(latents) == len(texts) == len(report["used"]):
            problems.append(f"{path.name}: {len(latents)} clips, {len(texts)} captions, {len(report['used'])} videos")
        for row, name in zip(latents, report["used"], strict=False):
            clip = row.double()  # [C, F, H, W]
            if not clip.isfinite().all():
                problems.append(f"{path.name}: {name} has NaN or infinite latents")
                continue
            moments.append(torch.stack((clip.mean((1, 2, 3)), clip.square().mean((1, 2, 3)))))
    if len(shapes) > 1:
        problems.append("shards differ in shape: " + ", ".join(map(str, shapes)))
    if not (folder / META).is_file():
        problems.append("not finished: run it again without --check")
    elif not captions:
        problems.append("no clips: every video was skipped")
    statistics = {}
    if moments:
        mean, square = torch.stack(moments).mean(0)  # [C] each
        statistics = {"mean": mean.tolist(), "std": (square - mean.square()).clamp_min(0).sqrt().tolist()}
    return {
        "folder": str(folder),
        "problems": problems,
        "videos": plan["videos"],
        "shards": expected,
        "clips": sum(shapes.values()),
        "shape": list(next(iter(shapes), ())),
        **statistics,
        "captions": _caption_statistics(captions),
        "skipped": skipped,
    }


def _caption_statistics(captions: list[str]) -> dict[str, float]:
    words = [len(caption.split()) for caption in captions]
    return {
        "different": len(set(captions)),
        "empty": words.count(0),
        "words_min": min(words, default=0),
        "words_mean": sum(words) / max(len(words), 1),
        "words_max": max(words, default=0),
    }
