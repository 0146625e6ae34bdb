"""Compressors of aged chunks: clean latents -> hidden tokens on a small grid (PackForcing, section 3.3).

Two branches: HR, trained convolutions on the latents; LR, training-free: decoded pixels, averaged and encoded by the
frozen VAE, through the DiT's own patch embedding. A kind has one of them, or both, added. Ours
is `pooled`, training-free too, which averages after the patch embedding and needs no VAE.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from model.geometry import ChunkGeometry
from utils.registry import Registry


class Compressor(nn.Module):
    """A way to compress a chunk."""

    trainable = False  # has the HR branch, whose weights are the model's `pack_compressor`
    needs_pixels = False  # has the LR branch
    pools_tokens = False  # averages the chunk's own patch embedding
    halves_time = False  # two latent frames become one compressed frame

    @classmethod
    def makes_tokens(cls) -> bool:
        """Whether there are hidden tokens, from which K, V are to be made."""
        return cls.trainable or cls.needs_pixels or cls.pools_tokens

    @classmethod
    def grid(cls, geometry: ChunkGeometry, channels: Sequence[int]) -> tuple[int, int, int]:
        """(frames, h', w') of a compressed chunk: every entry of `channels` halves the latents in space."""
        return geometry.pooled_grid(len(channels), cls.halves_time)

    @classmethod
    def pool(cls, geometry: ChunkGeometry, channels: Sequence[int]) -> tuple[int, int, int]:
        """Pixels (time, height, width) that the LR branch averages, so that its patches are the grid's; never so many
        that a frame would have none."""
        halved = 2 ** len(channels)
        sizes = zip(geometry.patch_size[1:], geometry.grid, strict=True)
        return 2 if cls.halves_time else 1, *(min(max(1, halved // patch), size) for patch, size in sizes)


COMPRESSORS: Registry[type[Compressor]] = Registry("cache.compressor.kind")


@COMPRESSORS.register("identity")
class Identity(Compressor):
    """Full-resolution K, V, as they are."""

    @classmethod
    def grid(cls, geometry: ChunkGeometry, channels: Sequence[int]) -> tuple[int, int, int]:
        return (geometry.frames, *geometry.grid)


@COMPRESSORS.register("hr_spatial")
class HRSpatial(Compressor):
    """Strided convolutions in space only; time is kept.

    One Conv3d k(1,3,3) s(1,2,2) with SiLU per entry of `channels`, a 1x1x1 projection to the model's width, and
    average pooling to the grid. At Wan-1.3B's 480x832 with three stages 3 frames become 3*7*13 = 273 tokens. `channels`
    are the widths of the strided stages, `dim` that of the DiT.
    """

    trainable = True
    kernel, padding = (1, 3, 3), (0, 1, 1)

    def __init__(self, in_channels: int, channels: Sequence[int], dim: int):
        super().__init__()
        self.channels = tuple(channels)
        stages = [(in_channels * 2, (2, 1, 1))] if self.halves_time else []
        layers: list[nn.Module] = []
        for width, stride in [*stages, *((width, (1, 2, 2)) for width in channels)]:
            layers += [nn.Conv3d(in_channels, width, self.kernel, stride, self.padding), nn.SiLU()]
            in_channels = width
        self.net = nn.Sequential(*layers, nn.Conv3d(in_channels, dim, 1))

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """latents [B, C, F, H, W] -> hidden tokens [B, f*h'*w', dim], time-major."""
        grid = self.grid(ChunkGeometry(latents.shape[2], *latents.shape[-2:]), self.channels)
        # Autocast would take the convolutions in bfloat16, whose backward oneDNN gets wrong on grids of a few tokens
        # where a CPU has no AMX; in the weights' own dtype they cost nothing beside the DiT.
        with torch.autocast(latents.device.type, enabled=False):
            hidden = self.net(latents.to(self.net[0].weight.dtype))  # [B, dim, ~f, ~H/2^n, ~W/2^n]
        return _tokens(hidden, grid)  # [B, f*h'*w', dim]


@COMPRESSORS.register("hr_spatiotemporal")
class HRSpatiotemporal(HRSpatial):
    """The paper's (figure 2d): a stage of stride 2 in time, of twice the latent channels, before those in space, all of
    kernel 3. 4 frames at 480x832 become 2*7*13 = 182 tokens, 3 frames 1*7*13."""

    halves_time = True
    kernel, padding = (3, 3, 3), (1, 1, 1)


@COMPRESSORS.register("lr")
class LR(Compressor):
    """The LR branch alone: runs on any generator. At 480x832 pixels are averaged 2x4x4, as in the paper."""

    needs_pixels = halves_time = True


@COMPRESSORS.register("lr_spatial")
class LRSpatial(LR):
    """`lr` with every frame kept."""

    halves_time = False


@COMPRESSORS.register("pooled")
class Pooled(Compressor):
    """The DiT's patch embedding of the latents, averaged to the grid: runs on any generator, without a VAE."""

    pools_tokens = True


@COMPRESSORS.register("dual")
class Dual(HRSpatiotemporal):
    """The paper's two branches: `hr_spatiotemporal` + `lr`."""

    needs_pixels = True


@COMPRESSORS.register("dual_spatial")
class DualSpatial(HRSpatial):
    """`hr_spatial` + `lr_spatial`."""

    needs_pixels = True


def embedded_tokens(patch_embedding: nn.Module, latents: torch.Tensor, grid: tuple[int, int, int]) -> torch.Tensor:
    """`pooled`, or of averaged pixels the LR branch: latents [B, C, f, h, w] -> hidden tokens of the grid
    [B, f*h'*w', dim], without gradient."""
    return _tokens(patch_embedding(latents.to(patch_embedding.weight.dtype)), grid).detach()


def _tokens(hidden: torch.Tensor, grid: tuple[int, int, int]) -> torch.Tensor:
    """Features [B, dim, F, H, W] -> tokens of the grid [B, f*h*w, dim], time-major."""
    return F.adaptive_avg_pool3d(hidden, grid).flatten(2).transpose(1, 2)
