"""Samplers: how the noise of a chunk, or of a clip, becomes clean latents. Each is one function of tensors.

Shapes: latents, noise and flow [B, C, F, H, W], float32.
"""

from collections.abc import Callable

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel

from model.schedule import FlowMatchSchedule
from pipeline.generate.inputs import Prompts
from utils.choices import Commit, CompressedKV, Refresh
from utils.config import CacheConfig, ConfigError, SamplerConfig
from utils.registry import Registry

Flow = Callable[[torch.Tensor, float, bool], torch.Tensor]  # (latents, timestep, with gradient) -> guided flow
Draw = Callable[[int], torch.Tensor]  # step -> fresh noise


AfterStep = Callable[[int, float, torch.Tensor], torch.Tensor]  # (step, timestep, latents) -> latents to go on with
SAMPLERS: Registry[Callable[..., torch.Tensor]] = Registry("sampler.kind")


def check_commit(sampler: SamplerConfig, cache: CacheConfig) -> None:
    """Raise `ConfigError` where the last step's K, V cannot take the place of a commit's."""
    if sampler.commit == Commit.forward:
        return
    if sampler.context_timestep > 0:
        raise ConfigError(f"setting `sampler.context_timestep` is {sampler.context_timestep:g}: must be 0 with "
                          "sampler.commit=last_step, which commits nothing at a timestep of its own")  # fmt: skip
    if cache.compressor.kv == CompressedKV.forward and cache.refresh == Refresh.per_forward:
        raise ConfigError("setting `sampler.commit` is last_step: what a compressed chunk attends is then not selected "
                          "anew; set cache.refresh=per_chunk or cache.compressor.kv=project")  # fmt: skip


def unchanged(step: int, timestep: float, latents: torch.Tensor) -> torch.Tensor:
    return latents


def guided(cond: torch.Tensor, uncond: torch.Tensor, scale: float) -> torch.Tensor:
    """Classifier-free guidance as Wan does it: uncond + scale * (cond - uncond)."""
    return uncond + scale * (cond - uncond)


def few_step_timesteps(sampler: SamplerConfig, schedule: FlowMatchSchedule) -> list[float]:
    """`sampler.steps`, read through the shifted table where `sampler.warp` says so."""
    steps = torch.as_tensor(sampler.steps, dtype=torch.float32)
    return (schedule.warp(sampler.steps) if sampler.warp else steps).tolist()


@SAMPLERS.register("few_step")
def few_step(
    flow: Flow,
    draw: Draw,
    sampler: SamplerConfig,
    schedule: FlowMatchSchedule,
    after: AfterStep = unchanged,
    stop: int | None = None,
    train: bool = False,
) -> torch.Tensor:
    """Predict x0, renoise to the next step with fresh noise (Self-Forcing, arXiv 2506.08009). `stop`: the step after
    which x0 is returned, with `train` the only one with gradient; None: the last one."""
    steps = few_step_timesteps(sampler, schedule)
    last = len(steps) - 1 if stop is None else stop
    latents = draw(0)
    for step, timestep in enumerate(steps[: last + 1]):
        at = torch.full((len(latents),), timestep, device=latents.device)
        x0 = schedule.flow_to_x0(flow(latents, timestep, train and step == last), latents, at)
        if step == last:
            return after(step, timestep, x0)
        following = torch.full_like(at, steps[step + 1])
        latents = after(step, timestep, schedule.add_noise(x0, draw(step + 1), following))


@SAMPLERS.register("euler")
def euler(
    flow: Flow, draw: Draw, sampler: SamplerConfig, schedule: FlowMatchSchedule, after: AfterStep = unchanged
) -> torch.Tensor:
    """Euler steps of the flow ODE from sigma 1 to 0."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=schedule.shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 0, sampler.num_steps + 1)[:-1].tolist())
    latents = draw(0)
    for step, timestep in enumerate(scheduler.timesteps):
        latents = scheduler.step(flow(latents, timestep.item(), False), timestep, latents, return_dict=False)[0]
        latents = after(step, timestep.item(), latents)
    return latents


@torch.no_grad()
def sample_clip(
    model: WanTransformer3DModel, noise: torch.Tensor, prompts: Prompts, sampler: SamplerConfig
) -> torch.Tensor:
    """A whole clip at once by a bidirectional DiT, as the teacher of distillation sees it: Euler steps of the flow ODE
    with classifier-free guidance, whatever `sampler.kind`; noise -> normalised latents. Raises ValueError where the
    sampler guides and `prompts` has no negative embeddings."""
    embeds = prompts.branches(sampler.guidance)  # [B or 2B, n, text_dim]
    branches = len(embeds) // len(noise)

    def flow(latents: torch.Tensor, timestep: float, train: bool) -> torch.Tensor:
        repeated = torch.cat([latents] * branches).to(model.dtype)  # [B or 2B, C, F, H, W]
        at = torch.full((len(embeds),), timestep, device=noise.device)
        flow = model(repeated, at, embeds.to(model.dtype), return_dict=False)[0].float()
        return flow if branches == 1 else guided(*flow.chunk(2), sampler.guidance)

    return euler(flow, lambda step: noise, sampler, FlowMatchSchedule(sampler.shift))
