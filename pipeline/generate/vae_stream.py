"""Streamed VAE decoding: a video's latents come in pieces, its pixels go out in pieces, memory stays flat.

`AutoencoderKLWan.decode` carries the last frames of every causal convolution from one latent frame to the next, but
forgets them at the end of the call. Here they live in the stream, so any number of videos can be decoded side by side
with one VAE, and what comes out does not depend on where the latents were cut.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, WanRMS_norm, WanUpsample, unpatchify
from torch import nn

from model.attention import rms_norm
from pipeline.data.vae_clip import denormalise, encode


class _Norm(WanRMS_norm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, ...] -> the same; one kernel on CUDA for seven, and channels last, as the convolutions have it."""
        return rms_norm(x.movedim(1, -1), self.gamma.flatten(), TINY).movedim(-1, 1)


class _Conv(WanCausalConv3d):
    def forward(self, x: torch.Tensor, cache_x: torch.Tensor | None = None) -> torch.Tensor:
        """[B, C, F, H, W]; the convolution fills up height and width itself, without a padded copy."""
        if x.dtype == torch.float32 and x.device.type == "cpu":  # where that is a tenth slower
            return super().forward(x, cache_x)
        width, _, height, _, missing, _ = self._padding
        if missing and cache_x is not None:
            x, missing = torch.cat([cache_x, x], dim=2), missing - cache_x.shape[2]
        if missing:
            x = F.pad(x, (0, 0, 0, 0, missing, 0))
        return F.conv3d(x, self.weight, self.bias, self.stride, (0, height, width))


class _Upsample(WanUpsample):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, C, 2H, 2W] of the same dtype; it takes values as they are."""
        return nn.Upsample.forward(self, x)


LEAN = {WanRMS_norm: _Norm, WanCausalConv3d: _Conv, WanUpsample: _Upsample}
TINY = 1e-24  # all zeros stay so


def lean(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """The VAE, in place, with the same numbers in a third of the passes over memory."""
    for module in vae.modules():
        module.__class__ = LEAN.get(type(module), type(module))
    return vae


class StreamingDecoder:
    """Decodes one video (or a batch of equal length) piece by piece; in tiles where `vae.enable_tiling()` was called.

    Args:
        vae: the VAE, shared; nothing is written to it but who computes its norms, convolutions and upsampling.
    """

    def __init__(self, vae: AutoencoderKLWan):
        self.vae = lean(vae)
        self._tiles: dict[tuple[int, int], _Features] = {}

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """The next latents of the video [B, C, F, H, W], F >= 1, normalised, on the device where the VAE runs, to its
        next pixels [B, 3, 4F, 8H, 8W] in -1..1 (4F - 3 frames at the start of the video; a VAE of strides 4 and 8).
        Raises ValueError where the latents do not have the VAE's channels."""
        vae = self.vae
        if latents.shape[1] != vae.config.z_dim:
            raise ValueError(f"latents have {latents.shape[1]} channels, the VAE has {vae.config.z_dim}")
        if hasattr(vae, "_hf_hook"):  # offloaded as a whole: the hook waits for a `forward` that is not called here
            vae._hf_hook.pre_forward(vae)
        latents = denormalise(vae, latents)
        video = self._tiled(latents) if _exceeds_tile(vae, latents) else self._decode((0, 0), latents)
        if vae.config.patch_size is not None:
            video = unpatchify(video, patch_size=vae.config.patch_size)  # [B, 3, 4F, 8H, 8W]
        return video.clamp(-1.0, 1.0)

    def by_frame(self, latents: torch.Tensor) -> Iterator[torch.Tensor]:
        """`decode` of one latent frame [B, C, 1, H, W] after the other: pixels of all of a video may not fit a GPU."""
        yield from map(self.decode, latents.split(1, dim=2))

    def _decode(self, place: tuple[int, int], latents: torch.Tensor) -> torch.Tensor:
        """One tile's next latents [B, C, F, h, w] -> [B, 3 * p * p, 4F, 8h / p, 8w / p]."""
        vae, state = self.vae, self._tiles.setdefault(place, _Features.of(self.vae))
        hidden, pieces = vae.post_quant_conv(latents), []
        for frame in hidden.split(1, dim=2):  # as the library does, for its memory
            pieces.append(vae.decoder(frame, feat_cache=state.last, feat_idx=[0], first_chunk=not state.started))
            state.started = True
        return torch.cat(pieces, dim=2)

    def _tiled(self, latents: torch.Tensor) -> torch.Tensor:
        """`AutoencoderKLWan.tiled_decode` of the next latents, every tile with features of its own."""
        vae, height, width = self.vae, *latents.shape[-2:]
        stride, patch = vae.spatial_compression_ratio, vae.config.patch_size or 1
        sizes = [vae.tile_sample_min_height // stride, vae.tile_sample_min_width // stride]
        steps = [vae.tile_sample_stride_height // stride, vae.tile_sample_stride_width // stride]
        keep = [step * stride // patch for step in steps]
        blend = [size * stride // patch - kept for size, kept in zip(sizes, keep, strict=True)]
        above, rows = [], []
        for top in range(0, height, steps[0]):
            tiles = [
                self._decode((top, left), latents[..., top : top + sizes[0], left : left + sizes[1]])
                for left in range(0, width, steps[1])
            ]
            row = []
            for place, tile in enumerate(tiles):
                if above:
                    tile = vae.blend_v(above[place], tile, blend[0])
                if place:
                    tile = vae.blend_h(tiles[place - 1], tile, blend[1])
                row.append(tile[..., : keep[0], : keep[1]])
            rows.append(torch.cat(row, dim=-1))
            above = tiles
        return torch.cat(rows, dim=-2)[..., : height * stride // patch, : width * stride // patch]


@torch.no_grad()
def encode_small(vae: AutoencoderKLWan, pixels: torch.Tensor, pool: tuple[int, int, int]) -> torch.Tensor:
    """What the compressor's LR branch sees of a chunk: its pixels, averaged and encoded.

    Args:
        pixels: [B, 3, 4F, H, W] in -1..1 (4F - 3 frames at the start of a video).
        pool: pixels averaged in (time, height, width).

    Returns:
        [B, C, ceil(F / time), H / (8 height), W / (8 width)], normalised.
    """
    # A chunk is encoded alone, but the VAE makes 1 + n latents of 1 + 4n frames, the first of a single frame. So copies
    # of the first frame fill the chunk up in front, and the first latent is dropped: those kept are of four frames
    # each, as in the middle of a video, and do not depend on where the chunk stands in it.
    stride = vae.config.scale_factor_temporal
    small = F.avg_pool3d(filled(pixels.float(), -pixels.shape[2] % stride), pool)
    small = filled(small, 1 + -small.shape[2] % stride)
    return encode(vae, small)[:, :, 1:]


def filled(video: torch.Tensor, missing: int) -> torch.Tensor:
    """`missing` copies of the first frame in front of video [B, C, F, H, W]."""
    return torch.cat([video[:, :, :1].expand(-1, -1, missing, -1, -1), video], dim=2)


@dataclass
class _Features:
    """Last frames seen by each convolution of the decoder, kept by its blocks."""

    last: list
    started: bool = False

    @classmethod
    def of(cls, vae: AutoencoderKLWan) -> "_Features":
        return cls([None] * sum(isinstance(module, WanCausalConv3d) for module in vae.decoder.modules()))


def _exceeds_tile(vae: AutoencoderKLWan, latents: torch.Tensor) -> bool:
    height, width = (size * vae.spatial_compression_ratio for size in latents.shape[-2:])
    return vae.use_tiling and (height > vae.tile_sample_min_height or width > vae.tile_sample_min_width)
