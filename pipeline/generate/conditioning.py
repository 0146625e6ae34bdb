"""What a call conditions its videos on, and the noise that they start from.

A condition is a function, registered under the name of the argument that it reads; it adds to a `Conditioning` what
that argument means for every chunk. One text a video at a time; a batch changes its texts where a schedule of it does.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch.nn.utils.rnn import pad_sequence

from pipeline.data.schedule import prompts_of, text_at, timeline
from pipeline.generate.inputs import NoiseSource, Prompts, prompt_noise
from pipeline.generate.vae_stream import filled
from pipeline.vae_shape import VAEShape
from utils.config import ConfigError, SamplerConfig
from utils.registry import Registry

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Encoders:
    """What turns a call's arguments into tensors."""

    text: Callable[[str], torch.Tensor]  # prompt -> [1, n, text_dim]
    pixels: Callable[[Any], torch.Tensor]  # images or frames for a `VideoProcessor` -> [B, 3, F, H, W] in -1..1
    latents: Callable[[torch.Tensor], torch.Tensor]  # pixels -> normalised [B, C, F', H', W']
    vae_shape: VAEShape
    frames_per_chunk: int  # latent ones
    fps: float
    place: dict[str, Any]  # device and dtype of the transformer


class Conditioning:
    """A batch of videos: its texts, and chunks that are given. Of the call's arguments, `asked`, those in `CONDITIONS`
    are read, and those in `asked.conditions`. Raises `ConfigError` for a condition that cannot be."""

    def __init__(self, asked: SimpleNamespace, encoders: Encoders, sampler: SamplerConfig):
        self.asked, self.encoders = asked, encoders
        self.negative = None if sampler.guidance == 1 else self._negative(sampler).to(**encoders.place)
        self.lines: list[dict[int, str]] = []  # of every video, chunk -> text from there on
        self.parts: dict[int, Prompts] = {}  # chunk -> embeddings of the batch from there on
        self.given: list[torch.Tensor] = []  # latents [B, C, F, H, W] of the first chunks: committed, not generated
        found = {name: getattr(asked, name, None) for name in CONDITIONS} | (asked.conditions or {})
        for name, value in found.items():
            if value is not None:
                CONDITIONS[name](self, value)

    def _negative(self, sampler: SamplerConfig) -> torch.Tensor:
        """Embeddings of what guidance leads away from: [1, n, text_dim], or [B, n, text_dim], one for each prompt."""
        asked, embeds, texts = self.asked, self.asked.negative_prompt_embeds, self.asked.negative_prompt
        if embeds is None:
            texts = sampler.negative_prompt if texts is None else texts
            texts = [texts] if isinstance(texts, str) else texts
            embeds = pad_sequence([self.encoders.text(text)[0] for text in texts], batch_first=True)
        if len(embeds) == 1:
            return embeds
        prompts = len(prompts_of(asked.prompt) if asked.prompt_embeds is None else asked.prompt_embeds)
        if len(embeds) != prompts:
            raise ConfigError(f"{len(embeds)} negative prompts for {prompts} prompts: give one, or one for each")
        return embeds.repeat_interleave(asked.num_videos_per_prompt, 0)

    def noise(self, size: tuple[int, ...]) -> NoiseSource:
        """Noise of every chunk and step: of the call's own source, else of (seed, the chunk's text, sample). Raises
        `ConfigError` for `latents` of another size than the videos', [C, F, H, W]."""
        asked = self.asked
        if asked.noise is not None:
            noise = asked.noise
        elif asked.generator is not None:

            def noise(chunk: int, step: int, shape: tuple[int, ...]) -> torch.Tensor:
                return randn_tensor((len(self.lines), *shape), generator=asked.generator, dtype=torch.float32)

        else:
            counted = [self.lines[:place].count(line) for place, line in enumerate(self.lines)]
            samples = counted if asked.samples is None else asked.samples

            def noise(chunk: int, step: int, shape: tuple[int, ...]) -> torch.Tensor:
                now = [text_at(line, chunk) for line in self.lines]
                return prompt_noise(asked.seed or 0, now, samples)(chunk, step, shape)

        if asked.latents is None:
            return noise
        latents, needed = asked.latents, [len(self.lines), *size]
        if list(latents.shape) != needed:
            raise ConfigError(f"latents are {list(latents.shape)}: these videos need {needed}")

        def given(chunk: int, step: int, shape: tuple[int, ...]) -> torch.Tensor:
            piece = latents[:, :, chunk * shape[1] : (chunk + 1) * shape[1]].float()
            return piece if step == 0 else noise(chunk, step, shape).to(piece)

        return given


CONDITIONS: Registry[Callable[[Conditioning, Any], None]] = Registry("conditions")


@CONDITIONS.register("prompt")
def prompt(call: Conditioning, value: Any) -> None:
    """Texts and schedules of texts, a video each."""
    encoders, repeats = call.encoders, call.asked.num_videos_per_prompt
    shape, size, fps = encoders.vae_shape, encoders.frames_per_chunk, encoders.fps
    call.lines = [timeline(one, shape, size, fps) for one in prompts_of(value) for _ in range(repeats)]
    encoded = {text: encoders.text(text)[0] for line in call.lines for text in line.values()}
    for start in sorted({start for line in call.lines for start in line}):
        now = [text_at(line, start) for line in call.lines]
        embeds = pad_sequence([encoded[text] for text in now], batch_first=True)  # [B, n, text_dim]
        call.parts[start] = Prompts(embeds.to(**encoders.place), call.negative)
        if start and len(set(now)) == 1:  # a batch of schedules would say too much
            log.info("from %.2f s (chunk %d): %s", shape.frames(size * start) / fps, start, now[0])


@CONDITIONS.register("prompt_embeds")
def prompt_embeds(call: Conditioning, value: torch.Tensor) -> None:
    """Embeddings [prompts, n, text_dim] in place of texts."""
    repeats = call.asked.num_videos_per_prompt
    call.lines = [{0: f"embeds {number}"} for number in range(len(value)) for _ in range(repeats)]
    call.parts[0] = Prompts(value.repeat_interleave(repeats, 0).to(**call.encoders.place), call.negative)


@CONDITIONS.register("image")
def image(call: Conditioning, value: Any) -> None:
    """The first frame: held for one chunk."""
    video(call, value if isinstance(value, list) else [value])


@CONDITIONS.register("video")
def video(call: Conditioning, value: Any) -> None:
    """Frames to go on from: as many of the last ones as fill whole chunks; less than a chunk is filled up in front with
    copies of its first frame."""
    encoders, shape, size = call.encoders, call.encoders.vae_shape, call.encoders.frames_per_chunk
    try:
        pixels = encoders.pixels(value)  # [1 or B, 3, F, H, W]
    except (ValueError, TypeError) as error:
        raise ConfigError(f"video is of type {type(value).__name__}: expected images or frames as floats in 0..1 "
                          f"({error})") from error  # fmt: skip
    if pixels.min() < -1.01 or pixels.max() > 1.01:  # 0..255 would be taken for very bright
        found = f"video has values from {(pixels.min() + 1) / 2:g} to {(pixels.max() + 1) / 2:g}"
        raise ConfigError(f"{found}: expected frames as floats in 0..1; divide uint8 frames by 255")
    chunks = max(1, (1 + (pixels.shape[2] - 1) // shape.temporal_stride) // size)
    missing = max(0, shape.frames(size) - pixels.shape[2])
    pixels = filled(pixels, missing)[:, :, -shape.frames(chunks * size) :]
    if len(call.lines) % len(pixels):
        raise ConfigError(f"{len(pixels)} given videos for {len(call.lines)}: give one, or one for each prompt")
    latents = encoders.latents(pixels).repeat_interleave(len(call.lines) // len(pixels), 0)
    call.given = list(latents.split(size, dim=2))
