"""First lesson of a trainable compressor: what `pooled` gives without training.

A random compressor is of no use to the generator, so that DMD, which reaches it through one chunk or two of a rollout,
hardly moves it. Averages of the DiT's own patch embedding its blocks can read at once (`cache.compressor.kv=forward`),
and convolutions learn to give them in minutes, without a single forward of the DiT.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange

from model.causal_wan import CausalWanModel
from model.compressor import COMPRESSORS, embedded_tokens
from pipeline.train.flow import ClipStage
from pipeline.train.method import method
from pipeline.train.roles import load_student
from pipeline.train.text import TextConditioning
from utils.config import Config, ConfigError, Sharding
from utils.distributed import World


@method("compressor")
class CompressorStage(ClipStage):
    """The compressor of the model that `model` names; the rest of it stays as it is."""

    @classmethod
    def check(cls, config: Config) -> None:
        super().check(config)
        kind, sharding = config.cache.compressor.kind, config.train.sharding
        if not COMPRESSORS[kind].trainable:
            raise ConfigError(f"setting `cache.compressor.kind` is {kind}: it has nothing to train; take hr_spatial")
        if sharding != Sharding.none:
            raise ConfigError(f"setting `train.sharding` is {sharding.value}: the compressor runs alone here and is "
                              "small; set it to none")  # fmt: skip

    def __init__(self, config: Config, device: torch.device, world: World):
        super().__init__(config, device, world)
        self.transformer.requires_grad_(False)
        self.transformer.pack_compressor.requires_grad_(True)

    def start(self, config: Config, text: TextConditioning, device: torch.device, channels: int) -> CausalWanModel:
        return load_student(config, text, device, channels)

    def loss(self, role: str, batch: dict[str, Any], step: int) -> tuple[torch.Tensor, dict[str, float]]:
        """Mean squared distance of the tokens of every chunk from the averages, over these averages' variance."""
        chunks = self.transformer.config.frames_per_chunk
        latents = rearrange(batch["latents"], "b c (g f) h w -> (b g) c f h w", f=chunks)
        compressor = self.transformer.pack_compressor
        grid = compressor.grid(self.transformer.geometry(*latents.shape[-2:]), compressor.channels)
        wanted = embedded_tokens(self.transformer.patch_embedding, latents, grid)  # [B*G, N_c, dim]
        return F.mse_loss(compressor(latents).float(), wanted.float()) / wanted.float().var(0).mean(), {}
