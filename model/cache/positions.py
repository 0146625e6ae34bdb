"""Where the history sits in time and on the frame's grid: pure functions of sizes, by the names a config gives them.

Only differences of positions reach attention, so each policy may choose its origin. These choose one in which sink and
recent chunks move as little as possible: keys are rotated once and then turned by the difference (`workspace`).
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from model.rope import grid_positions
from utils.registry import Registry


class Parts(NamedTuple):
    """What is laid out. Counts are in chunks, lengths in latent frames."""

    chunk: int  # index of the current chunk
    frames: int  # of a chunk, B_f
    sink: int
    recent: int
    mid: int  # selected
    span: float  # of a mid chunk where nothing shrinks it
    room: float  # that the trained range leaves to the mid chunks


class Times(NamedTuple):
    """First latent frame of each part; recent chunks end where the current one begins."""

    now: float
    sink: float
    mid: float | None  # None: mid chunks are at their true times
    span: float  # of a mid chunk


POSITIONS: Registry[Callable[[Parts], Times]] = Registry("cache.temporal")
SPATIAL: Registry[Callable[[int, int, bool], torch.Tensor]] = Registry("cache.spatial")  # (size, full size) -> [size]


@POSITIONS.register("absolute")
def absolute(parts: Parts) -> Times:
    """True frame indices (RoPE correction off)."""
    return Times(float(parts.chunk * parts.frames), 0.0, None, float(parts.frames))


@POSITIONS.register("packed")
def packed(parts: Parts) -> Times:
    """Sink, selected mid and recent chunks without gaps (PackForcing, arXiv 2603.25730, figure 2c)."""
    length = parts.frames * (parts.sink + parts.recent) + parts.mid * parts.span
    now = float(length if parts.sink else parts.chunk * parts.frames)
    return Times(now, now - length, now - parts.recent * parts.frames - parts.mid * parts.span, parts.span)


@POSITIONS.register("fit")
def fit(parts: Parts) -> Times:
    """Packed, with mid chunks that shrink so that the whole never exceeds the frames seen in training."""
    span = min(float(parts.frames), parts.room / parts.mid) if parts.mid else float(parts.frames)
    return packed(parts._replace(span=span))


SPATIAL.register("grid")(partial(grid_positions, aligned=False))
SPATIAL.register("aligned")(partial(grid_positions, aligned=True))
