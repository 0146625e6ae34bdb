"""Sampling of a bidirectional DiT: a whole clip at once, as the teacher of distillation sees it."""

import torch
from diffusers import WanTransformer3DModel

from model.schedule import FlowMatchSchedule
from pipeline.generate.inputs import Prompts
from pipeline.generate.sampler import euler, guided
from utils.config import SamplerConfig


@torch.no_grad()
def sample_clip(
    model: WanTransformer3DModel, noise: torch.Tensor, prompts: Prompts, sampler: SamplerConfig
) -> torch.Tensor:
    """Euler steps of the flow ODE with classifier-free guidance, whatever `sampler.kind`: noise -> normalised latents,
    both float32 [B, C, F, H, W]. Raises ValueError where the sampler guides and `prompts` has no negative embeddings.
    """
    embeds = prompts.branches(sampler.guidance)  # [B or 2B, n, text_dim]
    branches = len(embeds) // len(noise)

    def flow(latents: torch.Tensor, timestep: float, train: bool) -> torch.Tensor:
        repeated = torch.cat([latents] * branches).to(model.dtype)  # [B or 2B, C, F, H, W]
        at = torch.full((len(embeds),), timestep, device=noise.device)
        flow = model(repeated, at, embeds.to(model.dtype), return_dict=False)[0].float()
        return flow if branches == 1 else guided(*flow.chunk(2), sampler.guidance)

    return euler(flow, lambda step: noise, sampler, FlowMatchSchedule(sampler.shift))
