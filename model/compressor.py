"""Compressors of aged chunks: clean latents -> hidden tokens on a small grid (PackForcing, section 3.3)."""

import torch
import torch.nn.functional as F
from torch import nn

from model.geometry import ChunkGeometry


class HRSpatialCompressor(nn.Module):
    """Strided convolutions in space only; time is kept.

    One Conv3d k(1,3,3) s(1,2,2) with SiLU per entry of `channels`, a 1x1x1 projection to the model's width, and
    average pooling to the grid (B_f, max(1, H // 2^n), max(1, W // 2^n)), n = len(channels). At Wan-1.3B's 480x832 with
    three stages a chunk of 3 frames becomes 3*7*13 = 273 tokens.

    Args:
        in_channels: latent channels.
        channels: output channels of the strided stages.
        dim: width of the DiT.
    """

    def __init__(self, in_channels: int, channels: list[int] | tuple[int, ...], dim: int):
        super().__init__()
        self.spatial_stages = len(channels)
        layers: list[nn.Module] = []
        for width in channels:
            layers += [nn.Conv3d(in_channels, width, (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1)), nn.SiLU()]
            in_channels = width
        self.net = nn.Sequential(*layers, nn.Conv3d(in_channels, dim, 1))

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """latents [B, C, F, H, W] -> hidden tokens [B, F*h'*w', dim], time-major."""
        grid = ChunkGeometry(latents.shape[2], *latents.shape[-2:]).pooled_grid(self.spatial_stages)
        # Autocast would take the convolutions in bfloat16, whose backward oneDNN gets wrong on grids of a few tokens
        # where a CPU has no AMX; in the weights' own dtype they cost nothing beside the DiT.
        with torch.autocast(latents.device.type, enabled=False):
            hidden = self.net(latents.to(self.net[0].weight.dtype))  # [B, dim, F, ~H/2^n, ~W/2^n]
        hidden = F.adaptive_avg_pool3d(hidden, grid)  # [B, dim, F, h', w']
        return hidden.flatten(2).transpose(1, 2)  # [B, F*h'*w', dim]


def compressed_grid(kind: str, geometry: ChunkGeometry, channels: list[int] | tuple[int, ...]) -> tuple[int, int, int]:
    """(frames, h', w') of a chunk after the compressor `kind` (`identity` or `hr_spatial`)."""
    return (geometry.frames, *geometry.grid) if kind == "identity" else geometry.pooled_grid(len(channels))
