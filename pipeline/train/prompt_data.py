"""Prompts to train on, and what the latents of a rollout are held against to see a bad run early."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from pipeline.data.clips import place_of
from pipeline.data.latents import LatentData
from pipeline.data.prompts import data_prompts, read_prompts
from utils.config import Config, ConfigError, require
from utils.distributed import World
from utils.sprites.story import draw_length, sample_cut_story
from utils.sprites.world import caption
from utils.train_config import StoryConfig

REFERENCE_CLIPS = 256
_STORIES = 3  # keeps the draw of a step's cuts apart from other randomness
_TINY = 1e-6  # keeps logs of a collapsed rollout finite


def latent_statistics(latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean and deviation of every channel, and motion, of latents [B, C, F, H, W]: float32 [B, C], [B, C], [B].

    Motion is the root mean square difference of successive frames over the clip's deviation times sqrt(2): 0 for a
    still, 1 where frames have nothing to do with one another.
    """
    latents = latents.detach().float()
    mean, std = latents.mean(dim=(2, 3, 4)), latents.std(dim=(2, 3, 4))  # [B, C] each
    steps = latents.diff(dim=2)  # [B, C, F - 1, H, W]
    motion = steps.square().flatten(1).mean(1).sqrt() if steps.numel() else steps.new_zeros(len(latents))
    return mean, std, motion / (2 * std.square().mean(1)).sqrt().clamp_min(_TINY)


@dataclass(frozen=True)
class LatentReference:
    """What latents should look like: averages over clips of mean and deviation [C] and of motion.

    Without clips: mean 0 and deviation 1, as the VAE's own statistics make them, and no motion.
    """

    mean: torch.Tensor
    std: torch.Tensor
    motion: float | None

    @classmethod
    def of_clips(cls, clips: Iterable[torch.Tensor]) -> LatentReference:
        """clips: latents [C, F, H, W] each."""
        measured = [latent_statistics(clip[None]) for clip in clips]  # one by one, for the memory
        mean, std, motion = (torch.cat(values).mean(0) for values in zip(*measured, strict=True))
        return cls(mean, std.clamp_min(_TINY), motion.item())

    @classmethod
    def of_vae(cls, channels: int) -> LatentReference:
        return cls(torch.zeros(channels), torch.ones(channels), None)

    def compare(self, latents: torch.Tensor) -> dict[str, float]:
        """Numbers to log of latents [B, C, F, H, W]: per channel the mean (0 is right, in units of the reference's
        deviation) and the deviation (1 is right), the channels' worst, and motion.
        """
        mean, std, motion = (x.mean(0).cpu() for x in latent_statistics(latents))
        shift, spread = (mean - self.mean) / self.std, std / self.std  # [C] each
        logs = {f"latent_mean/{channel:02d}": value for channel, value in enumerate(shift.tolist())}
        logs |= {f"latent_std/{channel:02d}": value for channel, value in enumerate(spread.tolist())}
        logs |= {"latent_mean_worst": shift.abs().max().item(), "latent_std_least": spread.min().item()}
        logs |= {"latent_std_most": spread.max().item(), "motion": motion.item()}
        if self.motion is not None:
            logs["motion_against_data"] = motion.item() / max(self.motion, _TINY)
        return logs


def _reference_only(config: Config) -> Config:
    """The config with as many clips of the sprite world as the reference takes, where no stage has encoded all yet."""
    data = config.data
    if data.kind != "sprites" or data.path is None or (Path(data.path) / "clips").is_dir():
        return config
    few = {"path": str(Path(data.path) / "reference"), "num_clips": min(data.num_clips, REFERENCE_CLIPS)}
    return replace(config, data=replace(data, **few))


@dataclass(frozen=True)
class Script:
    """What a batch of rollouts is to show; all are cut at the same chunks."""

    prompts: dict[int, list[str]]  # chunk at which a shot begins -> prompt of each sample
    scored: list[str]  # of the last shot, what the scores are told: captions with nothing left out
    chunks: int | None = None  # length of a story; None: a single shot of the rollout's own length


def story_script(config: Config, step: int, key: object, sample_indices: Sequence[int]) -> Script | None:
    """Stories for the share `data.stories.share` of all steps: `data.stories.chunks` chunks, the last shot as long as
    what the scores see, those before it of `shot_chunks` each."""
    told, window = config.data.stories, config.video.trained_frames // config.video.frames_per_chunk
    rng = np.random.default_rng([config.seed, step, _STORIES])
    if rng.random() >= (told.share if told.count else 0.0):
        return None
    lengths: list[int] = []
    while (left := told.chunks - window - sum(lengths)) > 0:
        lengths.append(min(draw_length(rng, told.shot_chunks), left))
    places = [place_of(told.count, key, index) for index in sample_indices]
    shots = [sample_cut_story(config.seed, place, [*lengths, window]).shots for place in places]
    prompts = {now[0].start: [caption(shot.spec) for shot in now] for now in zip(*shots, strict=True)}
    return Script(prompts, [shot[-1].full_caption for shot in shots], told.chunks)


@dataclass(frozen=True)
class PromptData:
    """Training prompts, each once per epoch, and the reference that belongs to them."""

    prompts: list[str]
    reference: LatentReference

    @classmethod
    def load(cls, config: Config, channels: int, device: torch.device, world: World) -> PromptData:
        """From a text file (`data.kind` prompts), or the captions of cached clips, whose latents are the reference.

        Raises `ConfigError` for a file or folder that is not there, or latents of other than `channels` channels.
        """
        if config.data.kind == "prompts":
            require(config, "data.path", config.data.path, "name a file with one prompt per line")
            return cls(read_prompts(config.data.path), LatentReference.of_vae(channels))
        # Single frames have nothing to teach here, and stories need no latents.
        config = replace(config, data=replace(config.data, num_stills=0, stories=StoryConfig()))
        data = LatentData.load(_reference_only(config), device, world)
        if data.shape[0] != channels:
            raise ConfigError(f"setting `data.path`: its latents have {data.shape[0]} channels, the model {channels}")
        reference = LatentReference.of_clips(islice(data.clips, REFERENCE_CLIPS))
        return cls(data_prompts(config), reference)

    def prompt(self, seed: object, index: int) -> str:
        """The prompt of training sample `index`; another `seed`, another order."""
        return self.prompts[place_of(len(self.prompts), seed, index)]

    def script(self, seed: object, sample_indices: Sequence[int]) -> Script:
        """A single shot of each training sample."""
        prompts = [self.prompt(seed, index) for index in sample_indices]
        return Script({0: prompts}, prompts)
