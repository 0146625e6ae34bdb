"""How many latents a VAE makes of pixels, in time and space. Needs no heavy import."""

import math
from dataclasses import dataclass

from model.geometry import WAN_PATCH_SIZE
from utils.config import ConfigError, VideoConfig


@dataclass(frozen=True)
class VAEShape:
    """What a VAE's config says about its latents."""

    channels: int
    temporal_stride: int  # pixel frames per latent frame, after the first
    spatial_stride: int

    def latent_frames(self, frames: int) -> int:
        """Latent frames that hold at least `frames` pixel frames."""
        return 1 + math.ceil((frames - 1) / self.temporal_stride)

    def size(self, video: VideoConfig) -> tuple[int, int]:
        """Latent height and width of `video`. Raises `ConfigError` where patches do not fill it."""
        for name, patch in zip(("height", "width"), WAN_PATCH_SIZE[1:], strict=True):
            size, unit = getattr(video, name), self.spatial_stride * patch
            if size % unit:
                raise ConfigError(f"setting `video.{name}` is {size}: must be a multiple of {unit} px (VAE x patch)")
        return video.height // self.spatial_stride, video.width // self.spatial_stride

    def frames(self, latent_frames: int) -> int:
        """Pixel frames of `latent_frames` latent ones."""
        return 1 + self.temporal_stride * (latent_frames - 1)
