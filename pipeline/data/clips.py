"""Clips of captioned video as latents: encoded once, so that the VAE is not in the DiT's training loop, and read back.

Format: `pipeline/data/shards.py`; `latents` float16 [N, C, F, H, W], normalised to mean 0 and std 1 by the VAE's own
statistics, and as a record `caption` with whatever else the source knows. A shard also notes `skipped`: clip -> why it
could not be used. The plan's `vae` says what encoded them (`vae_mark`).
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from tqdm import tqdm

from model.weights import content_hash, read_files
from pipeline.data.shards import PLAN, Shards, ShardWriter, read_notes, read_plan, shard_path
from utils.config import Config, ConfigError, require
from utils.distributed import World
from utils.files import read_json
from utils.rng import keyed_generator
from utils.sprites.story import first_frame, render_stills, render_story, sample_story
from utils.sprites.world import caption, render, sample_spec

CLIPS, COMMAND = "clips", "python -m scripts.prepare_data"
SHARD_CLIPS = 256
WHOLE = 64  # characters of a whole VAE's hash
FRAMES_AT_ONCE = 384  # bounds the encoder's memory


def data_folder(config: Config) -> Path:
    """`data.path`, where latents are. Raises `ConfigError` where it is not set."""
    require(config, "data.path", config.data.path, "name the folder of latent shards")
    return Path(config.data.path)


def encoder_mark(vae: Path) -> str:
    """Names what latents of the VAE in a folder are a function of, its encoder and statistics, by their SHA-256: with
    another decoder it is the same."""
    settings, weights = read_json(vae / "config.json"), read_files(vae)
    statistics = [settings.get(name) for name in ("latents_mean", "latents_std", "patch_size")]
    digest = hashlib.sha256(json.dumps(statistics).encode())
    for name in sorted(name for name in weights if name.startswith(("encoder.", "quant_conv."))):
        tensor = weights[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return f"encoder {digest.hexdigest()}"


def vae_mark(vae: Path, folder: Path) -> str:
    """What the plan of `folder` calls the VAE in the folder `vae` where the latents are of that: `encoder_mark`, but
    its whole hash in folders that were written with it. Raises `ConfigError` for a damaged plan."""
    written = str(read_plan(folder, CLIPS, COMMAND).get("vae")) if (folder / PLAN).is_file() else "None"
    is_whole = len(written) == WHOLE and written == content_hash(vae)
    return written if is_whole else encoder_mark(vae)


class ClipSource(Protocol):
    """A data set of captioned clips."""

    made_by: dict[str, Any]  # everything that the clips are a function of, as JSON

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[np.ndarray | str, dict[str, Any]]:
        """Frames uint8 [F, H, W, 3], or why there are none; record with `caption` and, if clips have names, `clip`."""
        ...


@dataclass(frozen=True)
class SpriteClips:
    """The first `count` training clips of the sprite world, rendered when asked for."""

    seed: int
    count: int
    frames: int
    height: int
    width: int
    motions: tuple[str, ...] = ()

    @property
    def made_by(self) -> dict[str, Any]:
        motions = f" motions={','.join(self.motions)}" if self.motions else ""
        return {"source": f"sprites seed={self.seed} frames={self.frames} size={self.height}x{self.width}{motions}"}

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[np.ndarray, dict[str, Any]]:
        spec = sample_spec(self.seed, index, motions=self.motions)
        return render(spec, self.frames, self.height, self.width), {"caption": caption(spec)}


@dataclass(frozen=True)
class StoryClips:
    """The first `count` training stories; a record has `captions` and `returning`, both one a chunk."""

    seed: int
    count: int
    chunks: int
    shot_chunks: tuple[int, int]
    stills: bool
    height: int
    width: int

    @property
    def made_by(self) -> dict[str, Any]:
        kind = "stills" if self.stills else "stories"
        shots = "-".join(map(str, self.shot_chunks))
        size = f"{self.height}x{self.width}"
        return {"source": f"{kind} seed={self.seed} chunks={self.chunks} shots={shots} size={size}"}

    @property
    def frames(self) -> int:
        """Pixel frames of a story."""
        return self.chunks if self.stills else first_frame(self.chunks)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[np.ndarray, dict[str, Any]]:
        story = sample_story(self.seed, index, self.chunks, self.shot_chunks)
        frames = (render_stills if self.stills else render_story)(story, self.height, self.width)
        captions = story.captions
        return frames, {"caption": captions[0], "captions": captions, "returning": story.returning}


def write_clips(
    source: ClipSource,
    encode: Callable[[np.ndarray], torch.Tensor],
    vae: str,
    folder: Path,
    world: World,
    batch: int = 1,
    shard_size: int = SHARD_CLIPS,
    workers: int = 0,
) -> dict[str, str]:
    """Encode the clips of `source` into `folder`, the ranks taking shards in turn; finished shards are kept.

    `encode`: uint8 [B, F, H, W, 3] -> normalised latents [B, C, f, h, w], `batch` clips at once; `vae`: its `vae_mark`;
    `workers`: processes per rank that read clips, 0: this one. Returns clip -> why it was left out, of all ranks'
    shards, to the rank that ends last; to the others nothing. Raises `ConfigError` where `folder` holds latents of
    another source or VAE, or no clip was usable.
    """
    count = len(source)
    plan = {**source.made_by, "clips": count, "shard_size": shard_size, "vae": vae}
    writer = ShardWriter(folder, CLIPS, plan, -(-count // shard_size), world)
    mine = {number: range(count)[number * shard_size :][:shard_size] for number in writer.share()}
    order = [index for members in mine.values() for index in members]
    loader = iter(DataLoader(source, batch_size=None, sampler=order, num_workers=workers, collate_fn=lambda clip: clip))
    bar = tqdm(total=len(order), desc=f"encode {folder.name}", unit="clip", disable=not world.is_main)
    for number, members in mine.items():
        kept, skipped = [], {}
        for start in range(0, len(members), batch):
            some = list(islice(loader, len(members[start : start + batch])))
            skipped |= {record["clip"]: frames for frames, record in some if isinstance(frames, str)}
            usable = [(frames, record) for frames, record in some if not isinstance(frames, str)]
            encoded = encode(np.stack([frames for frames, _ in usable])).half().cpu() if usable else []
            for row, (_, record) in zip(encoded, usable, strict=True):
                if row.isfinite().all():
                    kept.append((row, record))
                else:
                    skipped[record.get("clip", record["caption"])] = "its latents are not finite"
            bar.update(len(some))
        latents = torch.stack([row for row, _ in kept]) if kept else torch.empty(0)
        writer.write(number, {"latents": latents}, [record for _, record in kept], skipped=skipped)
    bar.close()
    if not writer.finished():  # no barrier, which would time out: the rank that ends last reports
        return {}
    notes = [read_notes(shard_path(folder, number)) for number in range(writer.shards)]
    skipped = {clip: reason for some in notes for clip, reason in some["skipped"].items()}
    if not any(some["records"] for some in notes):
        listed = "; ".join(f"{clip}: {reason}" for clip, reason in skipped.items())
        raise ConfigError(f"folder {folder}: none of {count} clips is usable; remove it when they are mended: {listed}")
    return skipped


class LatentClips:
    """A finished folder of N latents of `shape` (C, F, H, W). A record has the clip's caption and what else the source
    said; `made_by` what the clips are a function of, `vae` being the VAE's mark."""

    def __init__(self, folder: str | Path):
        """Raises `ConfigError` for a folder that is absent, unfinished, empty or inconsistent."""
        self._shards = Shards(folder, CLIPS, COMMAND)
        self.records, self.made_by = self._shards.records, self._shards.plan
        if not self.records:
            raise ConfigError(f"data folder {folder} holds no clips: all its shards are empty")
        try:
            self.captions = [record["caption"] for record in self.records]
        except (KeyError, TypeError) as error:
            raise ConfigError(f"data folder {folder}: a record has no caption; write it again: {COMMAND}") from error
        self.shape: tuple[int, int, int, int] = tuple(self[0].shape)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, clip: int) -> torch.Tensor:
        """float16 [C, F, H, W]. Raises IndexError past the last clip."""
        return self._shards[clip]["latents"]


def place_of(count: int, seed: int, sample_index: int) -> int:
    """Which of `count` items training sample `sample_index` is: each once per epoch, every epoch in its own order."""
    epoch, place = divmod(sample_index, count)
    return int(_order(count, seed, epoch)[place])


@lru_cache(maxsize=4)
def _order(count: int, seed: int, epoch: int) -> torch.Tensor:
    return torch.randperm(count, generator=keyed_generator(seed, "epoch", epoch))


def check_clips(folder: Path) -> dict[str, Any]:
    """Read every shard and say what is there, as JSON: `problems` (texts; none in a finished and sound folder), counts
    of shards, clips asked for and made, their shape, mean and std per channel over all clips, `captions` statistics,
    and `skipped`: clip -> reason. Raises `ConfigError` where nothing was ever written."""
    plan = read_plan(folder, CLIPS, COMMAND)
    problems, shapes, captions, skipped = [], Counter(), Counter(), {}
    moments = []  # of every clip: mean and mean square per channel [2, C]
    for number in tqdm(range(plan["shards"]), desc=f"check {folder.name}", unit="shard"):
        path = shard_path(folder, number)
        if not path.is_file():
            problems.append(f"{path.name} is missing: start the same command again without --check")
            continue
        try:
            notes = read_notes(path)
        except ConfigError as error:
            problems.append(str(error))
            continue
        skipped |= notes["skipped"]
        for record, row in zip(notes["records"], load_file(path)["latents"], strict=True):
            captions[record["caption"]] += 1
            shapes[tuple(row.shape)] += 1
            clip = row.double()  # [C, F, H, W]
            if clip.isfinite().all():
                moments.append(torch.stack((clip.mean((1, 2, 3)), clip.square().mean((1, 2, 3)))))
            else:
                problems.append(f"{path.name}: {record.get('clip', record['caption'])} has NaN or infinite latents")
    if len(shapes) > 1:
        problems.append("clips differ in shape: " + ", ".join(map(str, shapes)))
    if not captions:
        problems.append("no clips are there")
    found = {"folder": str(folder), "problems": problems, "clips": captions.total(), "asked_for": plan["clips"],
             "shards": plan["shards"], "shape": list(next(iter(shapes), ()))}  # fmt: skip
    if moments:
        mean, square = torch.stack(moments).mean(0)  # [C] each
        found |= {"mean": mean.tolist(), "std": (square - mean.square()).clamp_min(0).sqrt().tolist()}
    words = [len(text.split()) for text in captions.elements()] or [0]
    lengths = {"words_min": min(words), "words_mean": sum(words) / len(words), "words_max": max(words)}
    return found | {"captions": {"different": len(captions), **lengths}, "skipped": skipped}
