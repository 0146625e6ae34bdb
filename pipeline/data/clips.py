"""Training clips as latents: sources to encode, and finished shards read back by sample index.

A shard folder holds `clips-00000.safetensors` (`latents` float16 [N, C, F, H, W], normalised to mean 0 and std 1 by
the VAE's own statistics; N may differ and may be 0) with `clips-00000.json` (their captions) beside each, and
`meta.json`, written last: what made them. `pipeline/data/latents.py` writes them for rendered clips,
`pipeline/data/video_latents.py` for a folder of videos, which leaves a `report-00000.json` beside each too.
"""

import json
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from pipeline.data.shards import META
from utils.config import ConfigError
from utils.rng import keyed_generator
from utils.sprites.world import caption, render, sample_spec

SHARD_CLIPS = 256


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


def read_captions(folder: Path) -> list[list[str]]:
    """Captions of every shard of a finished folder. Raises `ConfigError` where it is absent, unfinished or broken."""
    if not (folder / META).is_file():
        raise ConfigError(f"data folder {folder} has no {META}: no finished set of latent shards is there")
    shards = sorted(folder.glob("clips-*.safetensors"))
    if not shards:
        raise ConfigError(f"data folder {folder} holds no clips-*.safetensors")
    try:
        return [json.loads(shard.with_suffix(".json").read_text(encoding="utf-8")) for shard in shards]
    except (OSError, ValueError) as error:
        raise ConfigError(f"data folder {folder}: the captions of a shard are not readable ({error})") from error


class LatentClips:
    """A shard folder. The shards are memory-mapped: a clip is read from disk when it is asked for.

    Attributes:
        shape: (C, F, H, W) of every clip.
        captions: N texts.
    """

    def __init__(self, folder: str | Path):
        """Raises `ConfigError` for a folder that is absent, unfinished, empty or inconsistent."""
        folder = Path(folder)
        captions = read_captions(folder)
        self._shards = []
        for path, texts in zip(sorted(folder.glob("clips-*.safetensors")), captions, strict=True):
            try:
                latents = load_file(path)["latents"]  # [N, C, F, H, W]
            except (OSError, KeyError, SafetensorError) as error:
                raise ConfigError(f"data folder {folder}: {path.name} is not a shard of latents ({error})") from error
            if len(texts) != len(latents):
                raise ConfigError(f"data folder {folder}: {path.name}: {len(latents)} clips but {len(texts)} captions")
            self._shards.append(latents)
        shapes = sorted({tuple(shard.shape[1:]) for shard in self._shards})
        if len(shapes) > 1:
            raise ConfigError(f"data folder {folder}: clips of shape {shapes[0]} and of {shapes[1]}; write it afresh")
        self.shape: tuple[int, int, int, int] = shapes[0]
        self.captions = [text for texts in captions for text in texts]
        self._ends = list(accumulate(len(shard) for shard in self._shards))
        if not self.captions:
            raise ConfigError(f"data folder {folder} holds no clips: all its shards are empty")

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, clip: int) -> torch.Tensor:
        """float16 [C, F, H, W]. Raises IndexError past the last clip."""
        if not 0 <= clip < len(self):
            raise IndexError(f"clip {clip} of {len(self)}")
        number = bisect_right(self._ends, clip)
        return self._shards[number][clip - self._ends[number]]  # from the shard's end, so that empty ones do not matter

    @property
    def frames(self) -> int:
        return self.shape[1]

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
