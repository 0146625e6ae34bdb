"""Encode clips once, so that the VAE is not in the DiT's training loop. Format: `pipeline/data/clips.py`."""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from tqdm import tqdm

from pipeline.data.clips import SHARD_CLIPS, ClipSource, shard_path
from pipeline.data.shards import META, keep_to_plan, unfinished, write_json, write_tensors
from pipeline.data.vae_clip import encode_moments
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
    keep_to_plan(folder, made_by, world)
    numbers = range(-(-source.count // SHARD_CLIPS))
    mine = unfinished([shard_path(folder, number, ".safetensors") for number in numbers], world)
    batch = max(1, FRAMES_AT_ONCE // len(source.frames(0)))
    for number in tqdm(mine, desc=f"encode {folder.name}", unit="shard", disable=not world.is_main):
        clips = range(number * SHARD_CLIPS, min((number + 1) * SHARD_CLIPS, source.count))
        latents = []
        for start in range(clips.start, clips.stop, batch):
            frames = np.stack([source.frames(i) for i in range(start, min(start + batch, clips.stop))])
            latents.append(encode_frames(vae, frames).half())
        write_json(shard_path(folder, number, ".json"), [source.caption(i) for i in clips])
        write_tensors(shard_path(folder, number, ".safetensors"), {"latents": torch.cat(latents)})
    barrier(world)
    if world.is_main:
        write_json(folder / META, made_by)
    barrier(world)
