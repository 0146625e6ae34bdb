"""First lesson of a trainable compressor: what `pooled` gives without training.

A random compressor is of no use to the generator, so that DMD, which reaches it through one chunk or two of a rollout,
hardly moves it. Averages of the DiT's own patch embedding its blocks can read at once (`cache.compressor.kv=forward`),
and convolutions learn to give them in minutes, without a single forward of the DiT.

The second lesson (`train.through_cache`) is memory itself: with compressed chunks the generator, which stays as it is,
is to say what it says with the same chunks at full resolution.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange

from model.compressor import COMPRESSORS, embedded_tokens
from pipeline.generate.sampler import few_step_timesteps
from pipeline.train.flow import ClipStage
from pipeline.train.method import method
from utils.choices import CompressedKV, Sharding
from utils.config import Config, require
from utils.distributed import World
from utils.rng import keyed_generator


@method("compressor")
class CompressorStage(ClipStage):
    """The compressor of the model that `model` names; the rest of it stays as it is."""

    from_student = True

    @classmethod
    def check(cls, config: Config) -> None:
        super().check(config)
        kind = COMPRESSORS[config.cache.compressor.kind]
        require(config, "cache.compressor.kind", kind.trainable, "it has nothing to train; take hr_spatial")
        require(config, "train.sharding", config.train.sharding == Sharding.none,
                "the compressor runs alone here and is small; set it to none")  # fmt: skip

    def __init__(self, config: Config, device: torch.device, world: World):
        super().__init__(config, device, world)
        self.transformer.requires_grad_(False)
        self.transformer.pack_compressor.requires_grad_(True)

    def loss(self, role: str, batch: dict[str, Any], step: int) -> tuple[torch.Tensor, dict[str, float]]:
        """Mean squared distance of the tokens of every chunk from the averages, over these averages' variance."""
        chunks = self.transformer.config.frames_per_chunk
        latents = rearrange(batch["latents"], "b c (g f) h w -> (b g) c f h w", f=chunks)
        compressor = self.transformer.pack_compressor
        grid = compressor.grid(self.transformer.geometry(*latents.shape[-2:]), compressor.channels)
        wanted = embedded_tokens(self.transformer.patch_embedding, latents, grid)  # [B*G, N_c, dim]
        return F.mse_loss(compressor(latents).float(), wanted.float()) / wanted.float().var(0).mean(), {}

    def losses(self, role: str, batch: dict[str, Any], step: int) -> Iterator[tuple[torch.Tensor, dict[str, float]]]:
        """The first lesson whole; of the second (`train.through_cache`) a part a chunk: mean squared distance of the
        flow from that against the same cache at full resolution."""
        if not self.config.train.through_cache:
            yield self.loss(role, batch, step)
            return
        cache, chunks = self.config.cache, batch["shares"].shape[1]
        wanted = [chunk for chunk in batch["wanted"] if chunk > cache.sink + cache.recent] or [chunks - 1]
        whole = replace(cache, compressor=replace(cache.compressor, kind="identity", kv=CompressedKV.project))
        batch = batch | {"timestep": self.sampled_timesteps(batch)}
        taught, given = self.through_cache(batch, wanted), self.through_cache(batch, wanted, whole)
        for chunk, flow in taught:
            with torch.no_grad():
                _, target = next(given)
            errors = (flow - target).square().mean((1, 2, 3, 4))  # [B]
            yield (errors * batch["shares"][:, chunk]).sum() / batch["shares"].numel(), {}

    def sampled_timesteps(self, batch: dict[str, Any]) -> torch.Tensor:
        """[B, G] of the steps that a few-step generator takes; what was drawn from the whole table for another."""
        drawn, sampler = batch["timestep"], self.config.sampler
        if sampler.kind != "few_step":
            return drawn
        steps = torch.tensor(few_step_timesteps(sampler, self.clips.schedule)).to(drawn)
        picks = [keyed_generator(self.config.seed, "step", batch["step"], index) for index in batch["indices"]]
        return steps[torch.stack([torch.randint(len(steps), drawn.shape[1:], generator=draw) for draw in picks])]
