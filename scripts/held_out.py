"""Held-out videos of the sprite world: their prompts, and videos of them by the models of a config, many at a time, or
clips by a bidirectional teacher."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from tqdm import tqdm

from pipeline.bundle import check_bundle
from pipeline.data.schedule import Prompt
from pipeline.generate.inference import load_pipeline, resolve_runtime
from pipeline.generate.inputs import NoiseSource, Prompts, prompt_noise
from pipeline.generate.pipeline import PackForcingPipeline
from pipeline.generate.sampler import sample_clip
from pipeline.generate.vae_stream import StreamingDecoder
from pipeline.load import load_library_model
from utils.config import Config, ConfigError
from utils.files import write_json
from utils.sprites.story import FRAMES_PER_CHUNK, Story
from utils.sprites.world import FPS, HELD_OUT_START
from utils.video import to_uint8, write_video


def held_out_stories(config: Config, count: int, draw: Callable[[int, int], Story]) -> list[Story]:
    """The first held-out ones that `draw` makes of (seed, index). Raises `ConfigError` where the config's chunks are
    not those that stories are cut at."""
    size, fps = config.video.frames_per_chunk, config.video.fps
    if (size, fps) != (FRAMES_PER_CHUNK, FPS):
        raise ConfigError(f"--stories are cut at chunks of {FRAMES_PER_CHUNK} latent frames at {FPS} fps: "
                          f"video.frames_per_chunk is {size}, video.fps {fps}")  # fmt: skip
    return [draw(config.seed, HELD_OUT_START + index) for index in range(count)]


class VideoSource:
    """The models of a config, or a bidirectional teacher with their text encoder and VAE. `batch` videos are made
    together, and written, with what they show, to the folder `keep` if there is one. Raises `ConfigError`."""

    def __init__(self, config: Config, batch: int, keep: Path | None = None, teacher: Path | None = None):
        check_bundle(config)
        self.config, self.batch, self.keep = config, batch, keep
        self.pipe: PackForcingPipeline = load_pipeline(config, resolve_runtime(config))
        self.teacher = None if teacher is None else load_teacher(teacher, self.pipe)
        self.made = 0

    def videos(self, prompts: Sequence[Prompt], seconds: float) -> Iterator[np.ndarray]:
        """One of each prompt, uint8 [F, H, W, 3]; prompt i has the noise of sample i."""
        seed, fps = self.config.seed, self.config.video.fps
        for first in tqdm(range(0, len(prompts), self.batch), desc="batches"):
            some = list(prompts[first : first + self.batch])
            samples = list(range(first, first + len(some)))
            if self.teacher is None:
                stream = self.pipe.stream(some, seconds=seconds, seed=seed, samples=samples, output_type="uint8")
                videos = np.concatenate([chunk.frames for chunk in tqdm(stream, desc="chunks", leave=False)], axis=1)
            else:
                videos = sample_clips(self.config, self.pipe, self.teacher, some, prompt_noise(seed, some, samples))
            for prompt, frames in zip(some, videos, strict=True):
                if self.keep is not None:
                    path = self.keep / f"{self.made:04d}.mp4"
                    write_video(path, frames, fps)
                    write_json(path.with_suffix(".json"), {"prompt": prompt, "fps": fps})
                self.made += 1
                yield frames


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
