"""Wan's 3-D rotary position embedding, by formula from positions.

Angles come from positions in float64 and are cast afterwards, so there is no table and no length limit, and positions
may be negative or fractional. Only position differences reach the attention scores: the current chunk sits at time 0
and its history at negative times.

Shape suffixes: B batch, L tokens, F frames, h/w token rows and columns, H heads, D head dim.
"""

from functools import cached_property, lru_cache

import torch

from model.geometry import ChunkGeometry

THETA = 10000.0
WITHOUT_FLOAT64 = {"mps", "xpu"}  # device types; some Intel GPUs have it, slowly


def rope_dims(head_dim: int) -> tuple[int, int, int]:
    """Channels for (time, height, width): D - 4*(D//6), 2*(D//6), 2*(D//6), as in Wan2.1."""
    spatial = 2 * (head_dim // 6)
    return head_dim - 2 * spatial, spatial, spatial


def precise(device: torch.device) -> torch.dtype:
    """float64, or float32 on devices that do not have it."""
    return torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64


def _angles(positions: torch.Tensor, dim: int) -> torch.Tensor:
    """positions [..., N] -> angles [..., N, dim / 2], as precise as the device is."""
    dtype = precise(positions.device)
    exponents = torch.arange(0, dim, 2, dtype=dtype, device=positions.device) / dim
    return positions.to(dtype)[..., None] * THETA**-exponents


class Rotation:
    """cos and sin of the angles of some tokens, each [B or 1, L, 1, D/2] float32."""

    def __init__(self, cos: torch.Tensor, sin: torch.Tensor):
        self.cos, self.sin = cos, sin

    def __iter__(self):
        """cos and sin [B or 1, L, 1, D] with each value given twice: the table that `WanAttnProcessor` unpacks."""
        return (x.repeat_interleave(2, dim=-1) for x in (self.cos, self.sin))

    @cached_property
    def phase(self) -> torch.Tensor:
        """exp(i * angle), complex64."""
        with torch.inference_mode(False):  # see chunk_rotation
            return torch.complex(self.cos, self.sin)

    def __call__(self, x_BLHD: torch.Tensor) -> torch.Tensor:
        """Rotate interleaved channel pairs; computed in float32, returned in the input's dtype.

        Eagerly one complex product, a single pass over memory where there is nothing to cast; else, and under
        `torch.compile`, which cannot fuse complex numbers, the same in real arithmetic.
        """
        if x_BLHD.is_cuda and x_BLHD.dtype != torch.float32 and not torch.is_grad_enabled():
            return self._in_passes(x_BLHD)
        pairs = x_BLHD.float().unflatten(-1, (-1, 2))  # [B, L, H, D/2, 2]
        if torch.compiler.is_compiling():
            even, odd = pairs.unbind(-1)  # [B, L, H, D/2] each
            rotated = torch.stack((even * self.cos - odd * self.sin, even * self.sin + odd * self.cos), dim=-1)
        else:
            rotated = torch.view_as_real(torch.view_as_complex(pairs) * self.phase)
        return rotated.flatten(-2).type_as(x_BLHD)  # [B, L, H, D]

    def of_parts(self, parts: int, samples: torch.Tensor, index: torch.Tensor) -> "Rotation":
        """Of `parts` equal parts of the tokens those `index` [...] of `samples` [...], [..., L / parts, 1, D/2]."""
        samples = samples if len(self.cos) > 1 else torch.zeros_like(samples)
        return Rotation(*(x.unflatten(1, (parts, -1))[samples, index] for x in (self.cos, self.sin)))

    def _in_passes(self, x_BLHD: torch.Tensor) -> torch.Tensor:
        """Of 16 bits, without float32 copies of all of it."""
        rotated = torch.empty_like(x_BLHD)
        (even, odd), out = (x.unflatten(-1, (-1, 2)).unbind(-1) for x in (x_BLHD, rotated))  # [B, L, H, D/2] each
        torch.addcmul(even * self.cos, odd, self.sin, value=-1, out=out[0])
        torch.addcmul(even * self.sin, odd, self.cos, out=out[1])
        return rotated


def grid_rotation(times: torch.Tensor, rows: torch.Tensor, cols: torch.Tensor, head_dim: int) -> Rotation:
    """Rotation of the tokens of frames at `times` on a grid of `rows` x `cols`, in time-major order.

    Args:
        times: [F] or [B, F] temporal positions in latent frames.
        rows, cols: [h] and [w] spatial positions in patches, on the device where the rotation is wanted.

    Returns:
        `Rotation` for L = F*h*w tokens.
    """
    times = (times if times.ndim == 2 else times[None]).to(rows)  # [B or 1, F]
    dim_t, dim_h, dim_w = rope_dims(head_dim)
    shape = (times.shape[0], times.shape[1], len(rows), len(cols))
    angles = (
        _angles(times, dim_t)[:, :, None, None],
        _angles(rows, dim_h)[None, None, :, None],
        _angles(cols, dim_w)[None, None, None, :],
    )

    def tokens(function):  # [B or 1, L, 1, D/2]; of each axis by itself, as there are few positions and many tokens
        parts = [function(part).float().expand(*shape, -1) for part in angles]
        return torch.cat(parts, dim=-1).flatten(1, 3)[:, :, None]

    return Rotation(tokens(torch.cos), tokens(torch.sin))


def time_part(times: torch.Tensor, head_dim: int) -> Rotation:
    """Rotation of the channels for time alone by `times` [L] or [B, L] latent frames, for `turn_in_time`."""
    angles = _angles(times if times.ndim == 2 else times[None], rope_dims(head_dim)[0])[:, :, None]
    return Rotation(angles.cos().float(), angles.sin().float())


def time_rotation(times: torch.Tensor, head_dim: int) -> Rotation:
    """Rotation that shifts tokens by `times` [L] or [B, L] latent frames and leaves their spatial positions."""
    part, rest = time_part(times, head_dim), (0, sum(rope_dims(head_dim)[1:]) // 2)
    return Rotation(torch.nn.functional.pad(part.cos, rest, value=1.0), torch.nn.functional.pad(part.sin, rest))


@lru_cache(maxsize=64)
def _time_shift(frames: float, head_dim: int, device: torch.device) -> Rotation:
    with torch.inference_mode(False):  # see chunk_rotation
        return time_part(torch.tensor([frames], dtype=precise(device), device=device), head_dim)


def turn_in_time(x_BLHD: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """Tokens, in place, moved by a `time_part`; their spatial positions stay."""
    part = x_BLHD[..., : rope_dims(x_BLHD.shape[-1])[0]]
    part.copy_(rotation(part))
    return x_BLHD


def shift_in_time(x_BLHD: torch.Tensor, frames: float) -> torch.Tensor:
    """Rotated tokens, in place, as if they were `frames` latent frames later."""
    return turn_in_time(x_BLHD, _time_shift(frames, x_BLHD.shape[-1], x_BLHD.device)) if frames else x_BLHD


def grid_positions(size: int, full_size: int, aligned: bool, device: torch.device | str = "cpu") -> torch.Tensor:
    """Positions of `size` tokens along one spatial axis of a frame of `full_size` patches.

    `aligned`: the centre of the patches a token stands for, (i + 0.5) * full_size / size - 0.5; else 0..size-1.
    """
    index = torch.arange(size, dtype=precise(torch.device(device)), device=device)
    return (index + 0.5) * full_size / size - 0.5 if aligned else index


def frame_times(start: float, span: float, frames: int) -> torch.Tensor:
    """Positions of `frames` compressed frames that share `span` latent frames: start + (f + 0.5) * span / n - 0.5."""
    return start + (torch.arange(frames, dtype=torch.float64) + 0.5) * span / frames - 0.5


@lru_cache(maxsize=64)  # in steady state every chunk asks for the same few
def chunk_rotation(geometry: ChunkGeometry, start: float, head_dim: int, device: torch.device) -> Rotation:
    """Rotation of a full-resolution chunk whose first latent frame is at time `start`."""
    with torch.inference_mode(False):  # what is kept must serve a later forward with gradient too
        times = start + torch.arange(geometry.frames, dtype=precise(device), device=device)
        rows, cols = (grid_positions(size, size, aligned=False, device=device) for size in geometry.grid)
        return grid_rotation(times, rows, cols, head_dim)
