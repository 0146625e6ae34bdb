"""Shape numbers of chunks and token grids. No other file derives a token count."""

from dataclasses import dataclass

from utils.config import ConfigError

WAN_PATCH_SIZE = (1, 2, 2)


@dataclass(frozen=True)
class ChunkGeometry:
    """Sizes of one chunk of latents and of its tokens. Raises `ConfigError` where one is not positive or not a multiple
    of the patch."""

    frames: int  # latent frames per chunk, B_f
    latent_height: int
    latent_width: int
    patch_size: tuple[int, int, int] = WAN_PATCH_SIZE  # time (always 1), height, width

    def __post_init__(self) -> None:
        if self.patch_size[0] != 1:
            raise ConfigError(f"patch size {self.patch_size}: the causal model needs a time patch of 1")
        if self.frames < 1:
            raise ConfigError(f"frames per chunk is {self.frames}: must be at least 1")
        for name, size, patch in (
            ("height", self.latent_height, self.patch_size[1]),
            ("width", self.latent_width, self.patch_size[2]),
        ):
            if size < patch or size % patch:
                raise ConfigError(f"latent {name} is {size}: must be a positive multiple of the patch, {patch}")

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w): tokens of one latent frame."""
        return self.latent_height // self.patch_size[1], self.latent_width // self.patch_size[2]

    @property
    def tokens_per_frame(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def tokens(self) -> int:
        """Tokens of one full-resolution chunk."""
        return self.frames * self.tokens_per_frame

    def pooled_grid(self, spatial_stages: int, halve_time: bool = False) -> tuple[int, int, int]:
        """(frames, h', w') of a compressed chunk after `spatial_stages` halvings of the latent, all rounded down."""
        factor, frames = 2**spatial_stages, max(1, self.frames // 2) if halve_time else self.frames
        return frames, max(1, self.latent_height // factor), max(1, self.latent_width // factor)
