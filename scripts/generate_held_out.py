"""Videos of given prompts by the models of a config, many at a time, or clips by a bidirectional teacher."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from tqdm import tqdm

from pipeline.bundle import check_bundle
from pipeline.data.schedule import Prompt
from pipeline.generate.bidirectional import sample_clip
from pipeline.generate.inference import load_pipeline, resolve_runtime
from pipeline.generate.pipeline import PackForcingPipeline
from pipeline.generate.rollout import NoiseSource, Prompts, prompt_noise
from pipeline.generate.vae_stream import StreamingDecoder
from pipeline.load import load_library_model
from utils.config import Config, ConfigError
from utils.sprites.story import FRAMES_PER_CHUNK
from utils.sprites.world import FPS
from utils.video import to_uint8


def open_pipeline(config: Config) -> PackForcingPipeline:
    """Raises `ConfigError`."""
    check_bundle(config)
    return load_pipeline(config, resolve_runtime(config))


def check_chunks(config: Config) -> None:
    """Raise `ConfigError` where the chunks are not those that stories are cut at."""
    size, fps = config.video.frames_per_chunk, config.video.fps
    if (size, fps) != (FRAMES_PER_CHUNK, FPS):
        raise ConfigError(f"--stories are cut at chunks of {FRAMES_PER_CHUNK} latent frames at {FPS} fps: "
                          f"video.frames_per_chunk is {size}, video.fps {fps}")  # fmt: skip


def generate_videos(
    config: Config, pipe: PackForcingPipeline, prompts: list[Prompt], seconds: float, batch: int,
    teacher: Path | None = None,
) -> Iterator[np.ndarray]:
    """A video of each prompt, uint8 [F, H, W, 3], `batch` of them at a time; prompt i has the noise of sample i."""
    model = None if teacher is None else load_teacher(teacher, pipe)
    for first in tqdm(range(0, len(prompts), batch), desc="batches"):
        some = prompts[first : first + batch]
        samples = list(range(first, first + len(some)))
        if model is not None:
            yield from sample_clips(config, pipe, model, some, prompt_noise(config.seed, some, samples))
            continue
        stream = pipe.stream(some, seconds=seconds, seed=config.seed, samples=samples, output_type="uint8")
        pieces = [chunk.frames for chunk in tqdm(stream, desc="chunks", leave=False)]
        yield from np.concatenate(pieces, axis=1)


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
