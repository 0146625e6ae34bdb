"""What a rollout is given: the conditioning of its videos, and their noise."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from utils.rng import keyed_randn

# (chunk index, step, shape [C, F, H, W]) -> standard normal noise [B, C, F, H, W]
NoiseSource = Callable[[int, int, tuple[int, ...]], torch.Tensor]


def prompt_noise(seed: int, prompts: list[str], samples: list[int]) -> NoiseSource:
    """Noise of a batch of videos that depends only on (seed, prompt text, sample number, chunk index, step)."""

    def draw(chunk: int, step: int, shape: tuple[int, ...]) -> torch.Tensor:
        keys = zip(prompts, samples, strict=True)
        return torch.stack([keyed_randn(shape, seed, prompt, sample, chunk, step) for prompt, sample in keys])

    return draw


@dataclass
class Prompts:
    """Conditioning of a batch of videos."""

    embeds: torch.Tensor  # [B, n, text_dim]
    negative: torch.Tensor | None = None  # [B or 1, n, text_dim], needed where the sampler guides

    def branches(self, guidance: float) -> torch.Tensor:
        """[B, n, text_dim], or [2B, n, text_dim] with the negative branch last. ValueError where that is missing."""
        if guidance == 1:
            return self.embeds
        if self.negative is None:
            raise ValueError(f"sampler.guidance is {guidance}: needs embeddings of sampler.negative_prompt")
        length = max(self.embeds.shape[1], self.negative.shape[1])
        both = (self.embeds, self.negative.expand(len(self.embeds), -1, -1))
        return torch.cat([pad(x, (0, 0, 0, length - x.shape[1])) for x in both])
