"""Encode a data set's clips once, so that the VAE is not in the DiT's training loop. Format: `utils/data.py`."""

import json
import os
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import save_file
from tqdm import tqdm

from pipeline.vae_clip import encode_moments
from utils.config import ConfigError
from utils.data import META, SHARD_CLIPS, ClipSource, shard_path
from utils.distributed import World, barrier

FRAMES_AT_ONCE = 384  # bounds the encoder's memory


def normalise(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """Latents [B, C, F, H, W] as the VAE encodes them -> float32 with mean 0 and std 1 per channel."""
    mean, std = (
        torch.tensor(values, device=latents.device).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return (latents.float() - mean) / std


@torch.no_grad()
def encode_frames(vae: AutoencoderKLWan, frames: np.ndarray) -> torch.Tensor:
    """uint8 [B, F, H, W, 3] -> normalised latents float32 [B, C, 1 + (F-1)/4, H/8, W/8] (the posterior's mean)."""
    video = torch.from_numpy(frames).permute(0, 4, 1, 2, 3).float().div(127.5).sub(1.0)  # [B, 3, F, H, W]
    with torch.autocast("cpu", torch.bfloat16, enabled=video.device.type == "cpu"):
        mean, _ = encode_moments(vae, video.to(vae.device))  # [B, C, f, h, w]
    return normalise(vae, mean)


def write_latents(source: ClipSource, vae: AutoencoderKLWan, vae_hash: str, folder: Path, world: World) -> None:
    """Encode every clip of `source` into `folder`, the ranks taking shards in turn; finished shards are kept.

    Raises `ConfigError` where the folder holds clips of another source or VAE (`vae_hash` tells which).
    """
    made_by = {"source": source.name, "clips": source.count, "vae": vae_hash}
    plan = folder / "plan.json"
    if world.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        if plan.is_file() and json.loads(plan.read_text()) != made_by:
            raise ConfigError(f"data folder {folder} holds latents of other clips or of another VAE: remove it")
        _write(plan, json.dumps(made_by))
    shards = range(-(-source.count // SHARD_CLIPS))
    missing = [n for n in shards if not shard_path(folder, n, ".safetensors").is_file()]
    barrier(world)  # every rank has listed the same missing shards before one is written
    batch = max(1, FRAMES_AT_ONCE // len(source.frames(0)))
    for number in tqdm(
        missing[world.rank :: world.size], desc=f"encode {folder.name}", unit="shard", disable=not world.is_main
    ):
        clips = range(number * SHARD_CLIPS, min((number + 1) * SHARD_CLIPS, source.count))
        latents = []
        for start in range(clips.start, clips.stop, batch):
            frames = np.stack([source.frames(i) for i in range(start, min(start + batch, clips.stop))])
            latents.append(encode_frames(vae, frames).half())
        _write(shard_path(folder, number, ".json"), json.dumps([source.caption(i) for i in clips]))
        path = shard_path(folder, number, ".safetensors")
        partial = path.with_suffix(".partial")
        save_file({"latents": torch.cat(latents).contiguous()}, partial)
        os.replace(partial, path)
    barrier(world)
    if world.is_main:
        _write(folder / META, json.dumps(made_by))
    barrier(world)


def _write(path: Path, text: str) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    os.replace(partial, path)
