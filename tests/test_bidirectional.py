"""Sampling of a bidirectional DiT against a flow whose end point is known."""

import pytest
import torch

from model.schedule import NUM_TIMESTEPS
from pipeline.generate.inputs import Prompts
from pipeline.generate.sampler import sample_clip
from utils.config import SamplerConfig


class StraightFlow:
    """Knows where every prompt leads: flow = (x - embedding) / sigma."""

    dtype = torch.float32

    def __init__(self):
        self.sizes = []

    def __call__(self, noisy, timestep, embeds, return_dict):
        self.sizes.append(len(noisy))
        goal = embeds[:, 0, 0].view(-1, 1, 1, 1, 1)  # [B, 1, 1, 1, 1]
        return ((noisy - goal) / (timestep / NUM_TIMESTEPS).view(-1, 1, 1, 1, 1),)


NOISE = torch.randn(2, 4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
EMBEDS, NEGATIVE = torch.tensor([2.0, -1.0]).view(2, 1, 1), torch.full((1, 1, 1), 0.5)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 7])
def test_straight_flows_are_followed_to_their_guided_end(guidance, steps):
    model = StraightFlow()
    sampler = SamplerConfig(num_steps=steps, shift=3.0, guidance=guidance)
    clips = sample_clip(model, NOISE, Prompts(EMBEDS, NEGATIVE), sampler)
    expected = NEGATIVE + guidance * (EMBEDS - NEGATIVE)
    torch.testing.assert_close(clips, expected.view(2, 1, 1, 1, 1).expand_as(NOISE), atol=1e-5, rtol=1e-5)
    assert model.sizes == [2 if guidance == 1 else 4] * steps


def test_guidance_without_a_negative_prompt_is_refused():
    with pytest.raises(ValueError, match="negative"):
        sample_clip(StraightFlow(), NOISE, Prompts(EMBEDS), SamplerConfig(guidance=3.0))
