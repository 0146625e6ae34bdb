"""What stages learn from clips: cached latents of clips of one shot, of stills and of stories, by sample index."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKLWan

from pipeline.bundle import vae_shape_of
from pipeline.data.clips import (
    FRAMES_AT_ONCE,
    WHOLE,
    ClipSource,
    LatentClips,
    SpriteClips,
    StoryClips,
    data_folder,
    place_of,
    vae_mark,
    write_clips,
)
from pipeline.data.vae_clip import channels_last, encode_frames
from pipeline.load import load_library_model
from pipeline.sources import vae_folder
from utils.choices import DataKind
from utils.config import Config, ConfigError, require
from utils.distributed import World, barrier
from utils.rng import keyed_generator
from utils.sprites.story import FRAMES_PER_CHUNK
from utils.sprites.world import MOTIONS


class TrainingClip(NamedTuple):
    """What a stage learns from one sample."""

    latents: torch.Tensor  # [C, F, H, W], normalised
    captions: Sequence[str]  # one of the clip, or one of every chunk
    weights: Sequence[float] | None = None  # of every chunk in the sample's loss, 0 to leave it out; None: all alike


@dataclass
class LatentData:
    """Cached latents: clips of one shot, stills (clips of one frame) for phases of one latent frame, and stories."""

    clips: LatentClips | None
    stills: LatentClips | None
    stories: LatentClips | None
    config: Config

    @classmethod
    def load(cls, config: Config, device: torch.device, world: World) -> "LatentData":
        """Read `data.path`; where `data.kind` is sprites, render and encode what is missing there first."""
        known = config.data.kind != DataKind.prompts
        require(config, "data.kind", known, "this stage learns from clips; use sprites or latents")
        encoder, root = vae_folder(config), data_folder(config)
        sources = {name: source for name, source in sprite_sources(config).items() if len(source)}
        if all(phase.frames > 1 for phase in config.train.phases):
            sources.pop("stills", None)  # no step would show one
        if config.data.kind == DataKind.sprites:
            _encode_missing(sources, root, encoder, device, world)
        else:  # stills are there, or are the first frames of clips
            sources = {name: source for name, source in sources.items() if name == "clips" or (root / name).is_dir()}
        loaded = {name: LatentClips(root / name) for name in sources}
        for name, clips in loaded.items():
            _check_latents(clips, root / name, encoder, config)
        return cls(*map(loaded.get, ("clips", "stills", "stories")), config)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(C, F, H, W) of a clip, else of a story."""
        return (self.stories if self.clips is None else self.clips).shape

    def sample(self, seed: int, index: int, frames: int) -> TrainingClip:
        """The first `frames` latent frames of the clip or story that sample `index` shows. A crop starts at latent
        frame 0, as that one alone stands for a single pixel frame."""
        told = self.config.data.stories
        share = torch.rand((), generator=keyed_generator(seed, "story", index)).item()
        source = self.stills if frames == 1 and self.stills is not None else self.clips
        if self.stories is not None and (source is None or share < told.share):
            source = self.stories
        if frames > source.shape[1]:
            raise ConfigError(f"a training phase wants {frames} latent frames; the clips have {source.shape[1]}")
        clip = place_of(len(source), seed, index)
        latents, record = source[clip][:, :frames], source.records[clip]
        if self.stories is None:
            return TrainingClip(latents, [record["caption"]])
        chunks = frames // self.config.video.frames_per_chunk
        if source is not self.stories:
            return TrainingClip(latents, [record["caption"]] * chunks)
        weights = [1.0 if back else told.first_weight for back in record["returning"][:chunks]]
        return TrainingClip(latents, record["captions"][:chunks], weights)


def sprite_sources(config: Config) -> dict[str, ClipSource]:
    """Folder of `data.path` -> the clips of the sprite world that belong there. Raises `ConfigError`."""
    data, video, told = config.data, config.video, config.data.stories
    require(config, "video.frames_per_chunk", not told.count or video.frames_per_chunk in (1, FRAMES_PER_CHUNK),
            f"stories are cut in chunks of {FRAMES_PER_CHUNK}, or of 1 as stills")  # fmt: skip
    unknown = [motion for motion in data.motions if motion not in MOTIONS]
    require(config, "data.motions", not unknown, f"{unknown} are none of {', '.join(MOTIONS)}")
    motions = tuple(data.motions)
    size, stills = (video.height, video.width), video.frames_per_chunk == 1
    return {
        "clips": SpriteClips(config.seed, data.num_clips, data.clip_frames, *size, motions),
        "stills": SpriteClips(config.seed, data.num_stills, 1, *size, motions),
        "stories": StoryClips(config.seed, told.count, told.chunks, tuple(told.shot_chunks), stills, *size),
    }


def _encode_missing(
    sources: dict[str, ClipSource], root: Path, vae_folder: Path, device: torch.device, world: World
) -> None:
    vae = channels_last(load_library_model(AutoencoderKLWan, vae_folder, torch.float32).to(device))
    for name, source in sources.items():
        encode = _encode_stills if name == "stories" and source.stills else encode_frames
        batch = max(1, FRAMES_AT_ONCE // source.frames)
        mark = vae_mark(vae_folder, root / name)
        write_clips(source, partial(encode, vae), mark, root / name, world, batch)
        barrier(world)  # finished on every rank before one reads it


def _encode_stills(vae: AutoencoderKLWan, frames: np.ndarray) -> torch.Tensor:
    """uint8 [B, F, H, W, 3] -> latents [B, C, F, h, w], every frame encoded alone."""
    latents = encode_frames(vae, frames.reshape(-1, 1, *frames.shape[2:]))  # [B * F, C, 1, h, w]
    return latents.unflatten(0, frames.shape[:2])[:, :, :, 0].transpose(1, 2)


def _check_latents(clips: LatentClips, folder: Path, vae_folder: Path, config: Config) -> None:
    """Raise `ConfigError` where latents are of another VAE than `data.vae`, or of another size than `video`."""
    mark, problem = str(clips.made_by["vae"]), f"the latents in {folder} are of another VAE"
    if len(mark) == WHOLE:
        problem += " (or of this encoder with another decoder: they were marked with all of it; encode them again)"
    require(config, "data.vae", mark == vae_mark(vae_folder, folder), problem)
    stride, video = vae_shape_of(vae_folder).spatial_stride, config.video
    height, width = (stride * size for size in clips.shape[-2:])
    if (height, width) != (video.height, video.width):
        raise ConfigError(
            f"settings `video.height` and `video.width` are {video.height} and {video.width}: the latents in {folder} "
            f"are of {height}x{width} videos"
        )
