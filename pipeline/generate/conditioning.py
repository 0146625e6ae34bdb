"""What a call conditions its videos on: text that may change from chunk to chunk, and noise.

One text a video at a time; a batch changes part of its texts where any of its schedules does.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch.nn.utils.rnn import pad_sequence

from pipeline.data.schedule import Prompt, read_prompt, text_at, timeline
from pipeline.generate.rollout import NoiseSource, Prompts, prompt_noise
from utils.config import ConfigError, SamplerConfig

if TYPE_CHECKING:
    from pipeline.generate.pipeline import PackForcingPipeline

log = logging.getLogger(__name__)


def prompts_of(prompt: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One a video. Raises `ConfigError` for what is neither text nor schedule."""
    alone = isinstance(prompt, str) or all(isinstance(entry, dict) for entry in prompt)
    prompts = [prompt] if alone else list(prompt)
    return [one if isinstance(one, str) else read_prompt(one, f"prompt {place}") for place, one in enumerate(prompts)]


@dataclass(frozen=True)
class Conditioning:
    """Text of a batch of videos.

    Attributes:
        lines: of every video, chunk -> text from there on.
        parts: chunk -> embeddings of the batch from there on.
    """

    lines: list[dict[int, str]]
    parts: dict[int, Prompts]

    @classmethod
    def of(cls, pipe: PackForcingPipeline, asked: SimpleNamespace, sampler: SamplerConfig) -> Conditioning:
        """Of a call's arguments, everything encoded. Raises `ConfigError` for a schedule that cannot be."""
        place = {"device": pipe._execution_device, "dtype": pipe.transformer.dtype}
        embeds, negative, repeats = asked.prompt_embeds, None, asked.num_videos_per_prompt
        if sampler.guidance != 1:
            negative = _negative(pipe, asked, sampler).to(**place)
        if embeds is not None:
            lines = [{0: f"embeds {number}"} for number in range(len(embeds)) for _ in range(repeats)]
            return cls(lines, {0: Prompts(embeds.repeat_interleave(repeats, 0).to(**place), negative)})
        size, fps = pipe.transformer.config.frames_per_chunk, pipe.video_config.fps
        lines = [timeline(one, pipe.vae_shape, size, fps) for one in prompts_of(asked.prompt) for _ in range(repeats)]
        encoded = {text: pipe.encode_prompt(text)[0] for line in lines for text in line.values()}
        parts = {}
        for start in sorted({start for line in lines for start in line}):
            now = [text_at(line, start) for line in lines]
            embeds = pad_sequence([encoded[text] for text in now], batch_first=True)  # [B, n, text_dim]
            parts[start] = Prompts(embeds.to(**place), negative)
            if start and len(set(now)) == 1:  # a batch of schedules would say too much
                log.info("from %.2f s (chunk %d): %s", pipe.vae_shape.frames(size * start) / fps, start, now[0])
        return cls(lines, parts)

    def noise(self, asked: SimpleNamespace, size: tuple[int, ...]) -> NoiseSource:
        """Noise of every chunk and step: of the call's own source, else of (seed, the chunk's text, sample).

        Raises `ConfigError` for `latents` of another size than the videos', [C, F, H, W].
        """
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


def _negative(pipe: PackForcingPipeline, asked: SimpleNamespace, sampler: SamplerConfig) -> torch.Tensor:
    """Embeddings of what guidance leads away from: [1, n, text_dim], or [B, n, text_dim] where each prompt has its own.

    Raises `ConfigError` where their number is not that of the prompts.
    """
    embeds, texts = asked.negative_prompt_embeds, asked.negative_prompt
    if embeds is None:
        texts = sampler.negative_prompt if texts is None else texts
        texts = [texts] if isinstance(texts, str) else texts
        embeds = pad_sequence([pipe.encode_prompt(text)[0] for text in texts], batch_first=True)
    if len(embeds) == 1:
        return embeds
    prompts = len(prompts_of(asked.prompt) if asked.prompt_embeds is None else asked.prompt_embeds)
    if len(embeds) != prompts:
        raise ConfigError(f"{len(embeds)} negative prompts for {prompts} prompts: give one, or one for each")
    return embeds.repeat_interleave(asked.num_videos_per_prompt, 0)
