"""Training clips as latents: sources to encode, and finished shards read back by sample index.

A shard folder holds `clips-00000.safetensors` (`latents` float16 [N, C, F, H, W], normalised to mean 0 and std 1 by
the VAE's own statistics) with `clips-00000.json` (their captions) beside each, and `meta.json`, written last: what
made them. `pipeline/latents.py` writes them.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from utils.config import ConfigError
from utils.rng import keyed_generator
from utils.sprite_world import caption, render, sample_spec

SHARD_CLIPS = 256
META = "meta.json"


@dataclass(frozen=True)
class ClipSource:
    """Clips 0 .. count-1 of a captioned data set: `frames(i)` uint8 [F, H, W, 3], `caption(i)` text."""

    name: str  # tells one source from another in `meta.json`
    count: int
    frames: Callable[[int], np.ndarray]
    caption: Callable[[int], str]


def sprite_clips(seed: int, count: int, num_frames: int, height: int, width: int) -> ClipSource:
    """The first `count` training clips of the sprite world, rendered when asked for."""
    return ClipSource(
        name=f"sprites seed={seed} frames={num_frames} size={height}x{width}",
        count=count,
        frames=lambda index: render(sample_spec(seed, index), num_frames, height, width),
        caption=lambda index: caption(sample_spec(seed, index)),
    )


def shard_path(folder: Path, number: int, suffix: str) -> Path:
    return folder / f"clips-{number:05d}{suffix}"


class LatentClips:
    """A shard folder in memory.

    Attributes:
        latents: float16 [N, C, F, H, W].
        captions: N texts.
    """

    def __init__(self, folder: str | Path):
        """Raises `ConfigError` for a folder that is absent, unfinished or inconsistent."""
        folder = Path(folder)
        if not (folder / META).is_file():
            raise ConfigError(f"data folder {folder} has no {META}: no finished set of latent shards is there")
        shards = sorted(folder.glob("clips-*.safetensors"))
        if not shards:
            raise ConfigError(f"data folder {folder} holds no clips-*.safetensors")
        self.latents = torch.cat([load_file(shard)["latents"] for shard in shards])  # [N, C, F, H, W]
        self.captions = [text for shard in shards for text in json.loads(shard.with_suffix(".json").read_text())]
        if len(self.captions) != len(self.latents):
            raise ConfigError(f"data folder {folder}: {len(self.latents)} clips but {len(self.captions)} captions")

    def __len__(self) -> int:
        return len(self.latents)

    @property
    def frames(self) -> int:
        return self.latents.shape[2]

    def clip_of(self, seed: int, sample_index: int) -> int:
        """Which clip training sample `sample_index` shows: every clip once per epoch, in an order of its own."""
        return place_of(len(self), seed, sample_index)


def place_of(count: int, seed: int, sample_index: int) -> int:
    """Which of `count` items training sample `sample_index` is: each once per epoch, every epoch in its own order."""
    epoch, place = divmod(sample_index, count)
    return int(_order(count, seed, epoch)[place])


@lru_cache(maxsize=4)
def _order(count: int, seed: int, epoch: int) -> torch.Tensor:
    return torch.randperm(count, generator=keyed_generator(seed, "epoch", epoch))
