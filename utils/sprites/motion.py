"""Which sprite-world motion a track of positions shows, by least-squares fits of the paths that exist there.

Straight lines, lines folded at walls, and uniform circles are all linear in their unknowns once the kinks or the
angular speed are fixed, so each family is a table of basis functions and one projection.
"""

import math
from functools import lru_cache

import numpy as np

from utils.sprites.world import BOUNCE_ANGLE, DRIFTS, HEIGHT

STILL, OTHER = "still", "other"
STILL_SPAN = 5.0  # px at the default height, over two seconds; the slowest sprite covers 28
STRAIGHT_ERROR = 0.8  # px at the default height: a line this good needs no other explanation
KINK_GAIN = 0.6  # a bent path must leave this much less error than a straight one, or it is noise on a line
LARGEST_ERROR = 4.0  # px at the default height, root mean square: beyond it no path fits
MIN_SHARE = 0.7  # of the frames that must show a sprite
MIN_KINK_GAP = 0.6  # s between two reflections on one axis
ANGULAR_SPEEDS = np.linspace(0.55, 2.6, 42)  # rad/s, clockwise on screen
ORBIT_RANGE = (0.14, 0.42)  # of the height


def read_motion(track: np.ndarray, fps: float, height: int, width: int) -> str:
    """Name the motion of a track [F, 2], (x, y) px on the torus, nan where no sprite was seen: one of the sprite
    world's motions, "still", or "other" (no path fits, or too few frames show a sprite)."""
    seen = ~np.isnan(track[:, 0])
    if seen.mean() < MIN_SHARE:
        return OTHER
    unit = height / HEIGHT
    size = np.array([width, height], float)
    points, times = track[seen], np.flatnonzero(seen) / fps
    steps = (np.diff(points, axis=0) + size / 2) % size - size / 2
    path = np.concatenate([np.zeros((1, 2)), np.cumsum(steps, axis=0)])  # [N, 2], unwrapped
    if np.ptp(path, axis=0).max() < STILL_SPAN * unit:
        return STILL

    path = path - path.mean(axis=0)
    power = np.square(path).sum(axis=0)  # [2]
    folds = _folds(tuple(times.tolist()))  # [K, N], centred, unit norm; the first one is the straight line
    gained = np.square(folds @ path)  # [K, 2]
    straight = _rms(power.sum() - gained[0].sum(), len(path))
    bent = _rms(power.sum() - gained.max(axis=0).sum(), len(path))
    round_ = _circle_error(path, times, height)
    best = min(bent, round_)
    if straight < STRAIGHT_ERROR * unit or best > KINK_GAIN * straight:
        if straight > LARGEST_ERROR * unit:
            return OTHER
        return _straight_name(folds[0] @ path)
    if best > LARGEST_ERROR * unit:
        return OTHER
    return "circles" if round_ < bent else "bounces"


def _rms(energy: float, count: int) -> float:
    return math.sqrt(max(energy, 0.0) / count)


def _straight_name(velocity: np.ndarray) -> str:
    """A drift where the line lies along an axis, a bounce between two walls where it is clearly oblique."""
    off_axis = math.degrees(math.atan2(np.abs(velocity).min(), np.abs(velocity).max()))
    if off_axis > BOUNCE_ANGLE[0] / 2:
        return "bounces"
    return max(DRIFTS, key=lambda name: float(np.dot(DRIFTS[name], velocity)))


@lru_cache(maxsize=64)
def _folds(times: tuple[float, ...]) -> np.ndarray:
    """Straight travel, and travel reversed at one or two instants, as centred rows of unit norm, [K, N]."""
    seconds = np.asarray(times)
    kinks = [()] + [(first,) for first in seconds[2:-2]]
    kinks += [(first, second) for first in seconds[1:-1] for second in seconds[1:-1] if second - first > MIN_KINK_GAP]
    rows = []
    for instants in kinks:
        travelled = seconds.copy()
        for instant in instants:
            travelled = np.where(seconds > instant, 2 * np.interp(instant, seconds, travelled) - travelled, travelled)
        rows.append(travelled - travelled.mean())
    table = np.stack(rows)
    return table / np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-9)


def _circle_error(path: np.ndarray, times: np.ndarray, height: int) -> float:
    """Root mean square error in px of the best uniform clockwise circle of a possible radius; inf if there is none."""
    turning = np.exp(1j * ANGULAR_SPEEDS[:, None] * times)  # [K, N]; y points down, so growing angles run clockwise
    turning = turning - turning.mean(axis=1, keepdims=True)
    norm = np.square(np.abs(turning)).sum(axis=1)
    position = path[:, 0] + 1j * path[:, 1]
    radius = turning.conj() @ position / norm  # [K] complex
    error = np.square(np.abs(position)).sum() - np.square(np.abs(radius)) * norm
    possible = (np.abs(radius) > ORBIT_RANGE[0] * height) & (np.abs(radius) < ORBIT_RANGE[1] * height)
    return _rms(error[possible].min(), len(path)) if possible.any() else math.inf
