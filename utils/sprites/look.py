"""What frames of the sprite world show, by plain image analysis.

No ground truth enters: backgrounds are told apart by fitting every known one to the frame, sprites by what stands out
from it, shapes by laying true outlines on the mean mask. Everything is done on the torus, so a sprite that crosses a
border stays one sprite.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from utils.sprites.motion import OTHER
from utils.sprites.world import CELL, COLOURS, PATTERNS, SHAPES, background_image, outline_distance

ERROR_CAP = 60.0  # RGB distance at which a pixel counts as "not background at all"
AREA_RANGE = (0.025, 0.30)  # of height^2; a small triangle covers 0.058, a large square 0.19
WINDOW = 0.56  # side of the window a sprite must fit in, of the height
MIN_INSIDE = 0.80  # of the mask inside that window: one blob, not two
PRESENT_SHARE = 0.75  # of a second's frames that must show a sprite
AREA_TO_BOX = {"circle": 4 / math.pi, "square": 1.0, "triangle": 2.0}  # area of a shape -> square of its box's side
OUTLINE_SCALES = np.linspace(0.94, 1.1, 9)
APEX_SHIFTS = (0.0, 0.25, 0.5, 0.75)  # px that a blunt apex moves a triangle's centre of mass down
FINE = 3  # steps a pixel that outlines are compared at
# Intersection over union with its true outline that a shape must reach, just below what the VAE leaves of true ones.
OUTLINE_IOU = {"circle": 0.94, "square": 0.94, "triangle": 0.90}


@dataclass(frozen=True)
class Look:
    """What some frames of `size` (height, width) show, taken together; `diameter` of the sprite in px, `centres` [F, 2]
    as (x, y) px, `outline` its IoU with that of the nearest shape."""

    size: tuple[int, int]
    present: bool
    colour: str
    shape: str
    background: str
    pattern: str
    diameter: float
    outline: float
    centres: np.ndarray  # nan in frames without a sprite


def look(frames: np.ndarray) -> Look:
    """Everything that can be told of frames uint8 [F, H, W, 3] on their own, without their order."""
    pixels = frames.astype(np.float32)
    background, pattern, ground = _read_background(pixels)
    colour = _read_colour(pixels, ground)
    cover = _coverage(pixels, ground, np.asarray(COLOURS[colour], np.float32))  # [F, H, W]
    centres, windows = _locate(cover)
    shown = ~np.isnan(centres[:, 0])
    present = bool(shown.mean() >= PRESENT_SHARE)
    shape, outline = _read_shape(windows[shown]) if shown.any() else (SHAPES[0], 0.0)
    area = windows[shown].sum(axis=(1, 2)).mean() if shown.any() else 0.0
    diameter = float(math.sqrt(area * AREA_TO_BOX[shape]))
    shape = shape if outline >= OUTLINE_IOU[shape] else OTHER
    return Look(frames.shape[1:3], present, colour, shape, background, pattern, diameter, outline, centres)


@lru_cache(maxsize=4)
def _grounds(height: int, width: int) -> tuple[tuple[tuple[str, str], ...], np.ndarray]:
    """Every background as (names, float32 [N, H, W, 3]), periodic ones also shifted by one cell."""
    names, images = [], []
    for colour in COLOURS:
        for pattern in PATTERNS:
            image = background_image(colour, pattern, height, width)
            variants = [image, np.roll(image, CELL, axis=1)] if pattern in ("checkerboard", "stripes") else [image]
            names += [(colour, pattern)] * len(variants)
            images += variants
    return tuple(names), np.stack(images)


def _read_background(pixels: np.ndarray) -> tuple[str, str, np.ndarray]:
    """The background that explains most of a second; the error of a pixel is capped, so a sprite costs little."""
    names, images = _grounds(*pixels.shape[1:3])
    some = pixels[:: max(1, len(pixels) // 4), 1::2, 1::2]  # a quarter of the pixels of four frames tells enough
    cost = np.zeros(len(names))
    for frame in some:
        difference = images[:, 1::2, 1::2] - frame
        distance = np.sqrt(np.einsum("nhwc,nhwc->nhw", difference, difference))
        cost += np.minimum(distance, ERROR_CAP).mean(axis=(1, 2))
    best = int(cost.argmin())
    return (*names[best], images[best])


def _read_colour(pixels: np.ndarray, ground: np.ndarray) -> str:
    """The sprite colour nearest to most of the pixels that are nearer to a sprite colour than to their background."""
    palette = np.asarray(list(COLOURS.values()), np.float32)  # [6, 3]
    away = np.square(pixels - ground).sum(axis=-1)  # [F, H, W]
    bright = pixels[away > (ERROR_CAP / 2) ** 2]  # [P, 3]
    near = away[away > (ERROR_CAP / 2) ** 2]
    distance = np.square(bright[:, None] - palette).sum(axis=-1)  # [P, 6]
    nearest = distance.argmin(axis=1)
    votes = np.bincount(nearest[distance.min(axis=1) < near], minlength=len(palette))
    return tuple(COLOURS)[int(votes.argmax())]


def _coverage(pixels: np.ndarray, ground: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """How far each pixel has gone from its background to the sprite's colour, 0..1, [F, H, W]."""
    way = colour - ground  # [H, W, 3]
    return np.clip(((pixels - ground) * way).sum(axis=-1) / np.square(way).sum(axis=-1), 0.0, 1.0)


def _locate(cover: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centres of mass (x, y) on the torus, [F, 2], nan without a sprite, and soft masks about them, [F, P, P]. The
    window's middle pixel is the one the centre lies in; the centre's fraction is left to the outline fit."""
    num_frames, height, width = cover.shape
    mask = np.where(cover > 0.5, cover, 0.0)
    area = mask.sum(axis=(1, 2))
    half = math.ceil(WINDOW * height / 2)
    offsets = np.arange(-half, half + 1)
    # Where the window is taller than the frame it would see the sprite's other end twice.
    rows_once = np.abs(offsets) < height / 2
    rough = np.stack([_circular_mean(mask.sum(axis=1), width), _circular_mean(mask.sum(axis=2), height)], axis=1)
    centres = rough
    for _ in range(2):  # the second pass is free of whatever lay outside the first window
        middle = np.floor(np.nan_to_num(centres)).astype(int)
        columns = (middle[:, :1] + offsets) % width
        rows = (middle[:, 1:] + offsets) % height
        frame = np.arange(num_frames)[:, None, None]
        windows = cover[frame, rows[:, :, None], columns[:, None, :]] * rows_once[None, :, None]  # [F, P, P]
        hard = np.where(windows > 0.5, windows, 0.0)
        inside = hard.sum(axis=(1, 2))
        weight = np.maximum(inside, 1e-6)
        shift = np.stack([(hard.sum(axis=1) * offsets).sum(axis=1), (hard.sum(axis=2) * offsets).sum(axis=1)], axis=1)
        centres = middle + 0.5 + shift / weight[:, None]
    low, high = (share * height**2 for share in AREA_RANGE)
    good = (inside >= low) & (inside <= high) & (inside >= MIN_INSIDE * area)
    wrapped = centres % np.array([width, height])
    return np.where(good[:, None], wrapped, np.nan), windows


def _circular_mean(profile: np.ndarray, size: int) -> np.ndarray:
    """Mean position of mass on a circle of `size` pixels, from profiles [F, size]; nan for no mass."""
    angle = 2 * math.pi * (np.arange(size) + 0.5) / size
    total = (profile * np.exp(1j * angle)).sum(axis=1)
    mean = np.angle(total) % (2 * math.pi) * size / (2 * math.pi)
    return np.where(np.abs(total) > 1e-6, mean, np.nan)


def _read_shape(windows: np.ndarray) -> tuple[str, float]:
    """The shape whose outline fits the soft masks [F, P, P] best, and their intersection over union."""
    mask = _mean_mask(windows) > 0.5  # [Q, Q]
    reach = mask.shape[0] // FINE / 2
    fine = np.linspace(-reach, reach, len(mask))
    area = max(int(mask.sum()), 1)
    x, y = fine - (mask.sum(axis=0) * fine).sum() / area, fine - (mask.sum(axis=1) * fine).sum() / area

    def overlap(shape: str, scale: float, down: float) -> float:
        half = scale * math.sqrt(area / FINE**2 * AREA_TO_BOX[shape]) / 2
        low = half / 3 + down if shape == "triangle" else 0.0  # of the box's middle, seen from the centre of mass
        inside = outline_distance(shape, x, y[:, None] + low, half) < 0
        return float((inside & mask).sum() / (inside | mask).sum())

    shape = max(SHAPES, key=lambda shape: overlap(shape, 1.0, 0.0))
    downs = APEX_SHIFTS if shape == "triangle" else (0.0,)
    return shape, max(overlap(shape, scale, down) for scale in OUTLINE_SCALES for down in downs)


def _mean_mask(windows: np.ndarray) -> np.ndarray:
    """Soft masks [F, P, P] laid on one another by their centres of mass, on a grid `FINE` times finer: mean [Q, Q].
    What flickers averages out, and where it crosses one half is the outline, to a fraction of a pixel."""
    half = windows.shape[1] // 2
    offsets, fine = np.arange(-half, half + 1), np.linspace(-half, half, 2 * half * FINE + 1)
    hard = np.where(windows > 0.5, windows, 0.0)
    area = np.maximum(hard.sum(axis=(1, 2)), 1e-6)
    right, down = ((hard.sum(axis=axis) * offsets).sum(axis=1) / area for axis in (1, 2))  # [F] each
    # Linear interpolation, as weights [F, Q, P] of the samples on either side.
    columns, rows = (np.maximum(0.0, 1 - np.abs(fine[:, None] + at[:, None, None] - offsets)) for at in (right, down))
    return (rows @ windows @ columns.transpose(0, 2, 1)).mean(axis=0)
