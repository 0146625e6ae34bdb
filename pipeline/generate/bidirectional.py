"""Sampling of a bidirectional DiT: a whole clip at once, as the teacher of distillation sees it."""

from __future__ import annotations

import torch
from diffusers import WanTransformer3DModel

from model.schedule import NUM_TIMESTEPS, FlowMatchSchedule
from pipeline.generate.rollout import Prompts
from utils.config import SamplerConfig


@torch.no_grad()
def sample_clip(
    model: WanTransformer3DModel, noise: torch.Tensor, prompts: Prompts, sampler: SamplerConfig
) -> torch.Tensor:
    """Euler steps of the flow ODE with classifier-free guidance; `sampler.kind` is not read.

    Args:
        noise: standard normal [B, C, F, H, W], float32.
        prompts: conditioning of the B clips.

    Returns:
        Latents [B, C, F, H, W], normalised, float32.

    Raises:
        ValueError: where the sampler guides and `prompts` has no negative embeddings.
    """
    latents, embeds = noise, prompts.branches(sampler.guidance)  # embeds: [B or 2B, n, text_dim]
    branches = len(embeds) // len(noise)
    sigmas = FlowMatchSchedule(sampler.shift).euler_sigmas(sampler.num_steps).tolist()
    for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True):
        timestep = torch.full((len(embeds),), NUM_TIMESTEPS * sigma, device=noise.device)
        repeated = torch.cat([latents] * branches).to(model.dtype)  # [B or 2B, C, F, H, W]
        flow = model(repeated, timestep, embeds.to(model.dtype), return_dict=False)[0].float()
        if branches == 2:
            cond, uncond = flow.chunk(2)
            flow = uncond + sampler.guidance * (cond - uncond)
        latents = latents + (following - sigma) * flow
    return latents
