"""The only chunk x step loop: training, sampling during training and inference all run it.

    for index, latents in Rollout(model, cache, sampler, prompts, noise).run(num_chunks):
        ...

A chunk's steps and its commit share one context; nothing is written to the cache before the chunk is finished.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from model.block import TextKV
from model.cache.cache import PackCache
from model.cache.context import ChunkContext
from model.causal_wan import CausalWanModel, CausalWanOutput
from model.schedule import FlowMatchSchedule
from utils.config import SamplerConfig, SamplerKind
from utils.rng import keyed_randn

# (chunk index, step, shape [C, F, H, W]) -> standard normal noise [B, C, F, H, W]
NoiseSource = Callable[[int, int, tuple[int, ...]], torch.Tensor]
# (chunk index, step, latents [B, C, F, H, W] that the step starts from)
StepObserver = Callable[[int, int, torch.Tensor], None]


def prompt_noise(seed: int, prompts: list[str], samples: list[int]) -> NoiseSource:
    """Noise of a batch of videos that depends only on (seed, prompt text, sample number, chunk index, step)."""

    def draw(chunk: int, step: int, shape: tuple[int, ...]) -> torch.Tensor:
        keys = zip(prompts, samples, strict=True)
        return torch.stack([keyed_randn(shape, seed, prompt, sample, chunk, step) for prompt, sample in keys])

    return draw


@dataclass
class Prompts:
    """Conditioning of a batch of videos.

    Args:
        embeds: [B, n, text_dim].
        negative: [B or 1, n, text_dim], needed where the sampler guides.
    """

    embeds: torch.Tensor
    negative: torch.Tensor | None = None

    def branches(self, guidance: float) -> torch.Tensor:
        """[B, n, text_dim], or [2B, n, text_dim] with the negative branch last. ValueError where that is missing."""
        if guidance == 1:
            return self.embeds
        if self.negative is None:
            raise ValueError(f"sampler.guidance is {guidance}: needs embeddings of sampler.negative_prompt")
        length = max(self.embeds.shape[1], self.negative.shape[1])
        both = (self.embeds, self.negative.expand(len(self.embeds), -1, -1))
        return torch.cat([torch.nn.functional.pad(x, (0, 0, 0, length - x.shape[1])) for x in both])


class Rollout:
    """Generation of one batch of videos, chunk by chunk.

    Args:
        model: the causal DiT.
        cache: its history, empty or after earlier chunks. With guidance it holds both branches, each with its own.
        sampler: few-step (predict x0, renoise to the next step) or many-step Euler.
        prompts: conditioning.
        noise: where noise comes from.
        grad_step: training (self-rollout): stop every chunk at this step index and run that step with gradient; the
            compressor is then trained through the mid tokens. None: no gradient, all steps.
        grad_from: with `grad_step`, chunks before this one stop at the same step but have no gradient.
        observe: called before every denoising step.

    Attributes:
        mid_tokens_attended: largest number of mid tokens (per layer and sample) any chunk attended so far.
    """

    def __init__(
        self,
        model: CausalWanModel,
        cache: PackCache,
        sampler: SamplerConfig,
        prompts: Prompts,
        noise: NoiseSource,
        grad_step: int | None = None,
        grad_from: int = 0,
        observe: StepObserver | None = None,
    ):
        self.model, self.cache, self.sampler, self.noise = model, cache, sampler, noise
        self.grad_step, self.grad_from, self.observe = grad_step, grad_from, observe
        if grad_step is not None and (sampler.kind != SamplerKind.few_step or sampler.guidance != 1):
            raise ValueError("a rollout with gradient needs sampler.kind=few_step and sampler.guidance=1")
        self.schedule = FlowMatchSchedule(sampler.shift)
        self.embeds = prompts.branches(sampler.guidance)
        self.batch, self.branches = len(prompts.embeds), len(self.embeds) // len(prompts.embeds)
        self.text_kv = TextKV()
        self.mid_tokens_attended = 0

    @property
    def steps(self) -> torch.Tensor:
        """Timesteps of the few-step sampler, float32 [S]."""
        steps = self.sampler.steps
        return self.schedule.warp(steps) if self.sampler.warp else torch.tensor(steps, dtype=torch.float32)

    def run(self, num_chunks: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (chunk index, finished latents [B, C, F, H, W], float32), each after its commit."""
        for _ in range(num_chunks):
            index, context = self.cache.num_chunks, self.cache.context()
            self.mid_tokens_attended = max(self.mid_tokens_attended, context.attended_mid_tokens())
            sample = self._few_step if self.sampler.kind == SamplerKind.few_step else self._euler
            latents = sample(index, context)
            self._commit(latents.detach(), index, context)
            yield index, latents

    @property
    def _device(self) -> torch.device:
        return self.model.device

    def _draw(self, chunk: int, step: int) -> torch.Tensor:
        geometry, channels = self.cache.geometry, self.model.config.in_channels
        shape = (channels, geometry.frames, geometry.latent_height, geometry.latent_width)
        return self.noise(chunk, step, shape).to(self._device)

    def _observe(self, index: int, step: int, latents: torch.Tensor) -> None:
        if self.observe is not None:
            self.observe(index, step, latents)

    def _flow(self, latents: torch.Tensor, timestep: float, context: ChunkContext, train: bool = False) -> torch.Tensor:
        """Guided flow [B, C, F, H, W], float32."""
        out = self._forward(latents, timestep, context, train=train, return_kv=False)
        flow = out.sample.float()
        if self.branches == 1:
            return flow
        cond, uncond = flow.chunk(2)
        return uncond + self.sampler.guidance * (cond - uncond)

    def _forward(
        self, latents: torch.Tensor, timestep: float, context: ChunkContext, train: bool = False, **options
    ) -> CausalWanOutput:
        """All branches through the DiT; with `train` with gradient, the compressor's included."""
        repeated = torch.cat([latents] * self.branches).to(self.model.dtype)  # [B or 2B, C, F, H, W]
        with nullcontext() if train else torch.no_grad():
            return self.model(
                repeated,
                torch.full((len(repeated),), timestep, dtype=torch.float32, device=self._device),
                self.embeds,
                context=context,
                text_kv=None if train else self.text_kv,  # a memo has no gradient
                train_compressor=train,
                **options,
            )

    def _few_step(self, index: int, context: ChunkContext) -> torch.Tensor:
        """Predict x0, renoise to the next step with fresh noise (Self-Forcing, arXiv 2506.08009)."""
        steps = self.steps.tolist()
        last = len(steps) - 1 if self.grad_step is None else self.grad_step
        latents = self._draw(index, 0)  # [B, C, F, H, W]
        for step in range(last + 1):
            timestep = torch.full((self.batch,), steps[step], device=self._device)
            train = self.grad_step is not None and step == last and index >= self.grad_from
            self._observe(index, step, latents)
            flow = self._flow(latents, steps[step], context, train)
            x0 = self.schedule.flow_to_x0(flow, latents, timestep)
            if step < last:
                following = torch.full_like(timestep, steps[step + 1])
                latents = self.schedule.add_noise(x0, self._draw(index, step + 1), following)
        return x0

    def _euler(self, index: int, context: ChunkContext) -> torch.Tensor:
        """Euler steps of the flow ODE from sigma 1 to 0."""
        sigmas = self.schedule.euler_sigmas(self.sampler.num_steps).tolist()
        latents = self._draw(index, 0)
        for step, (sigma, following) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
            self._observe(index, step, latents)
            flow = self._flow(latents, 1000 * sigma, context)
            latents = latents + (following - sigma) * flow
        return latents

    def _commit(self, latents: torch.Tensor, index: int, context: ChunkContext) -> None:
        """One forward at the context timestep on the clean latents; its K, V enter the cache."""
        timestep, noisy = self.sampler.context_timestep, latents
        if timestep > 0:
            step = torch.full((self.batch,), timestep, device=self._device)
            noisy = self.schedule.add_noise(latents, self._draw(index, -1), step)
        clean = torch.cat([latents] * self.branches).to(self.model.dtype)
        out = self._forward(noisy, timestep, context, clean_hidden_states=clean)
        self.cache.commit(out.kv, context)
