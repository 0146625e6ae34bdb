"""The only chunk x step loop: training, sampling during training and inference all run it.

    for index, latents in Rollout(model, cache, sampler, prompts, noise).run(num_chunks):
        ...

A chunk's steps and its commit share one context; nothing is written to the cache before the chunk is finished. It is
yielded first and committed when there is a next one.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import torch

from model.cache.cache import PackCache
from model.cache.context import ChunkContext
from model.causal_wan import CausalWanModel, CausalWanOutput
from model.kv import ChunkKV, TextKV
from model.schedule import FlowMatchSchedule
from pipeline.generate.inputs import NoiseSource, Prompts
from pipeline.generate.sampler import SAMPLERS, check_commit, guided
from pipeline.generate.vae_stream import StreamingDecoder, encode_small
from utils.choices import AtSwitch, Commit
from utils.config import ConfigError, SamplerConfig
from utils.timing import part

# (chunk index, step, timestep, latents that the step has led to) -> latents to go on with
StepCallback = Callable[[int, int, float, torch.Tensor], torch.Tensor]


class _Committed(NamedTuple):
    """What a commit was given, to do it again."""

    latents: torch.Tensor
    low_res: torch.Tensor | None
    timestep: torch.Tensor | None = None


class _Pending(NamedTuple):
    """A chunk that is yielded and not committed yet; `kv`: what its last step left, where that is committed."""

    chunk: _Committed
    context: ChunkContext
    kv: ChunkKV | None


class Rollout:
    """Generation of one batch of videos, chunk by chunk.

    Args:
        model: the causal DiT.
        cache: its history, empty or after earlier chunks. With guidance it holds both branches, each with its own.
        sampler: few-step (predict x0, renoise to the next step) or many-step Euler.
        prompts: conditioning; between chunks `switch` changes it, and assigning to `prompts` leaves the history alone.
        noise: where noise comes from.
        grad_step: training (self-rollout): stop every chunk at this step index and run that step with gradient; the
            compressor is then trained through the mid tokens. None: no gradient, all steps.
        grad_from: with `grad_step`, chunks before this one stop at the same step but have no gradient.
        train_compressor: with `grad_step`; false: mid tokens are as committed, without gradient.
        on_step_end: called after every denoising step.
        device: where the model runs; None: where its weights are.
        decoder: of a video that starts where the cache does; needed where the compressor looks at pixels.
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
        on_step_end: StepCallback | None = None,
        device: torch.device | None = None,
        decoder: StreamingDecoder | None = None,
        train_compressor: bool = True,
    ):
        self.model, self.cache, self.sampler, self.noise = model, cache, sampler, noise
        self.grad_step, self.grad_from, self.train_compressor = grad_step, grad_from, train_compressor
        self.on_step_end = on_step_end
        if grad_step is not None and (sampler.kind != "few_step" or sampler.guidance != 1):
            raise ValueError("a rollout with gradient needs sampler.kind=few_step and sampler.guidance=1")
        check_commit(sampler, cache.config)
        if cache.needs_pixels and decoder is None:
            kind = cache.config.compressor.kind
            raise ConfigError(f"setting `cache.compressor.kind` is {kind}: it looks at pixels; give the VAE's decoder")
        self.decoder = decoder
        self.pixels = None  # of the last chunk [B, 3, 4F, 8H, 8W], in -1..1, where a decoder has seen it
        self.schedule = FlowMatchSchedule(sampler.shift)
        self.device, self._dtype = device or model.device, model.dtype  # looked for in all modules, so once
        self._pending: _Pending | None = None
        self.prompts = prompts
        self.mid_tokens_attended = 0  # most (per layer and sample) that any chunk attended so far
        self.offset = 0  # chunks made before the cache was last emptied
        self._last: deque[_Committed] = deque(maxlen=cache.layout.recent)
        self._left: ChunkKV | None = None  # by the last denoising step, where that is what will be committed
        self.timestep: float | torch.Tensor | None = None  # of the last forward

    @property
    def prompts(self) -> Prompts:
        return self._prompts

    @prompts.setter
    def prompts(self, prompts: Prompts) -> None:
        self.settle()  # under those that it was made with
        self._prompts = prompts
        self.embeds = prompts.branches(self.sampler.guidance)
        self.batch, self.branches = len(prompts.embeds), len(self.embeds) // len(prompts.embeds)
        self.text_kv = TextKV()

    @property
    def steps_per_chunk(self) -> int:
        """Denoising steps of a chunk."""
        return len(self.sampler.steps) if self.sampler.kind == "few_step" else self.sampler.num_steps

    @property
    def forwards_per_chunk(self) -> int:
        """Passes through the model that a chunk takes, its commit included."""
        return self.steps_per_chunk + (self.sampler.commit == Commit.forward)

    @property
    def index(self) -> int:
        """Number of the next chunk."""
        return self.offset + self.cache.num_chunks + (self._pending is not None)

    def switch(self, prompts: Prompts) -> None:
        """Go on with other prompts. What becomes of the history: `cache.at_switch`."""
        self.prompts, mode = prompts, self.cache.config.at_switch
        again = list(self._last)
        if mode == AtSwitch.keep:
            return
        if mode == AtSwitch.recommit:
            again = again[len(again) - self.cache.rewind(len(again)) :]
        else:
            again = again if mode == AtSwitch.restart else []
            self.offset = self.index - len(again)
            self.cache.reset()
        for chunk in again:
            self._commit(chunk, self.cache.context())

    def run(
        self, num_chunks: int, commit_last: bool = True, parts: Mapping[int, Prompts] | None = None
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (chunk index, finished latents [B, C, F, H, W], float32), each before its commit. Without `commit_last`
        the last chunk has none: nothing will read it. `parts`: chunk -> prompts to go on with from there."""
        for number in range(num_chunks):
            self.settle()
            index = self.index
            if index and index in (parts or {}):
                self.switch(parts[index])
            context, self.pixels = self.cache.context(), None
            with part("denoise"):
                latents = self._sample(index, context)
            if commit_last or number < num_chunks - 1:
                if self._left is None and self.sampler.commit == Commit.last_step:
                    raise RuntimeError("a hook left out a layer of the last step: set sampler.commit=forward")
                chunk = _Committed(latents.detach(), self._decode(latents.detach(), context))
                self._pending = _Pending(chunk, context, self._left)
            self._left = None
            yield index, latents
        self.settle()

    def settle(self) -> None:
        """Commit the chunk that `run` yielded last, as it does by itself when asked for more."""
        pending, self._pending = self._pending, None
        if pending is not None:
            with part("commit"):
                self._commit(*pending)
            self._last.append(pending.chunk)

    def _sample(self, index: int, context: ChunkContext) -> torch.Tensor:
        """Denoise the next chunk: [B, C, F, H, W]."""
        self.mid_tokens_attended = max(self.mid_tokens_attended, context.attended_mid_tokens())
        options = {}
        if self.grad_step is not None:
            options = {"stop": self.grad_step, "train": index >= self.grad_from}
        leave = {"return_kv": self.sampler.commit == Commit.last_step, "compress": False}

        def flow(latents, timestep, train):
            self._left = None  # one pass's K, V at a time
            out = self._forward(latents, timestep, context, train, **leave)
            self._left = out.kv
            return self._guided(out.sample)

        if self.on_step_end is not None:
            options["after"] = partial(self.on_step_end, index)
        draw = partial(self._draw, index)
        return SAMPLERS[self.sampler.kind](flow, draw, self.sampler, self.schedule, **options)

    def commit(
        self, latents: torch.Tensor, context: ChunkContext | None = None, timestep: torch.Tensor | None = None
    ) -> None:
        """Make clean latents [B, C, F, H, W] the next chunk of the history: one forward at the context timestep.

        With latents from elsewhere (a given video, a training clip) the rollout goes on from them. `timestep` [B]: in
        place of `sampler.context_timestep`.
        """
        self.give(latents, context, timestep)
        self.settle()

    def give(
        self, latents: torch.Tensor, context: ChunkContext | None = None, timestep: torch.Tensor | None = None
    ) -> None:
        """As `commit`, but done when the next chunk is asked for, as with those that `run` yields."""
        self.settle()
        context = context or self.cache.context()
        self._pending = _Pending(_Committed(latents, self._decode(latents, context), timestep), context, None)

    def _commit(self, chunk: _Committed, context: ChunkContext, kv: ChunkKV | None = None) -> None:
        """`kv`: what the chunk's last step left, in place of a forward over all of its tokens."""
        latents, low_res, timestep = chunk
        noisy, context.may_train = latents, torch.is_grad_enabled() and self.train_compressor
        if timestep is not None or self.sampler.context_timestep > 0:
            timestep = self._per_video(self.sampler.context_timestep if timestep is None else timestep)
            noisy = self.schedule.add_noise(latents, self._draw(self.index, -1), timestep)
        clean = torch.cat([latents] * self.branches).to(self._dtype)
        step_cache = self.model._cache_config  # FirstBlockCache, PAB, ... of diffusers: for the steps of one chunk
        if step_cache is not None:
            self.model.disable_cache()  # what is kept of a chunk is computed, not estimated
        seen = {"clean_hidden_states": clean, "low_res": low_res, "return_sample": False}
        kv = self._forward(noisy, 0.0 if timestep is None else timestep, context, kv=kv, **seen).kv
        if step_cache is not None:
            self.model.enable_cache(step_cache)
        if kv is None:
            raise RuntimeError("a hook left out a layer while a chunk was committed: the cache needs them all")
        self.cache.commit(kv, context)

    def _decode(self, latents: torch.Tensor, context: ChunkContext) -> torch.Tensor | None:
        """Set `pixels` of the chunk that is next to be committed, and return what the compressor needs of them."""
        if self.decoder is None:
            return None
        with part("decode"):
            self.pixels = self.decoder.decode(latents.to(self.device))
        if not (self.cache.needs_pixels and context.will_be_compressed):
            return None
        with part("encode_small"):
            low_res = encode_small(self.decoder.vae, self.pixels, self.cache.pixel_pool)  # [B, C, f, h, w]
        return torch.cat([low_res] * self.branches)

    def _per_video(self, timestep: float | torch.Tensor) -> torch.Tensor:
        """[B], float32."""
        if isinstance(timestep, torch.Tensor):
            return timestep.to(self.device, torch.float32)
        return torch.full((self.batch,), timestep, dtype=torch.float32, device=self.device)

    def _draw(self, chunk: int, step: int) -> torch.Tensor:
        geometry, channels = self.cache.geometry, self.model.config.in_channels
        shape = (channels, geometry.frames, geometry.latent_height, geometry.latent_width)
        return self.noise(chunk, step, shape).to(self.device)

    def flow(
        self, latents: torch.Tensor, timestep: float | torch.Tensor, context: ChunkContext, train: bool = False
    ) -> torch.Tensor:
        """Guided flow [B, C, F, H, W], float32, of latents of that shape at one timestep, or one a video [B]."""
        return self._guided(self._forward(latents, timestep, context, train, return_kv=False).sample)

    def _guided(self, flow: torch.Tensor) -> torch.Tensor:
        """Flow of all branches -> float32 [B, C, F, H, W]."""
        flow = flow.float()
        return flow if self.branches == 1 else guided(*flow.chunk(2), self.sampler.guidance)

    def _forward(
        self, latents: torch.Tensor, timestep: float | torch.Tensor, context: ChunkContext, train: bool = False,
        **options,
    ) -> CausalWanOutput:
        """All branches through the DiT; with `train` with gradient, the compressor's included."""
        repeated = torch.cat([latents] * self.branches).to(self._dtype)  # [B or 2B, C, F, H, W]
        self.timestep = timestep
        step_cache = self.model.cache_context("chunk") if self.model.is_cache_enabled else nullcontext()
        with step_cache, nullcontext() if train else torch.no_grad():
            return self.model(
                repeated,
                self._per_video(timestep).repeat(self.branches),
                self.embeds,
                context=context.ready(len(self.model.blocks), self.device),
                text_kv=None if train else self.text_kv,  # a memo has no gradient
                train_compressor=train and self.train_compressor,
                **options,
            )
