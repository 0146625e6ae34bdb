"""What can go wrong in a long video, measured on any frames without a network.

    series = measure(iterate_video("video.mp4"), fps=16)
    scores = {name: metric.value(series) for name, metric in METRICS.items()}

Frames are looked at once, so memory does not grow with their size. To add a metric, write a function of a `Series` and
register it with `@metric(unit)`; all are defined so that the first second of the video is the reference and 0 is best,
but for motion and jump, where a typical value depends on what is shown. `tests/test_video_metrics.py` synthesises the
defect of each.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from utils.registry import Registry

GREY = np.array([0.299, 0.587, 0.114], np.float32)  # Rec. 601 luma
FLOW_HEIGHT = 64  # rows that motion is measured on
FLOW_BLOCK = 8
CORNER_SHARE = 6  # a corner is a sixth of height and width
MIN_TEXTURE = 1.0  # smaller eigenvalue of a block's gradients at which it has a direction, in levels^2
STILL_LEVELS = 0.5  # mean change between frames that counts as none


@dataclass(frozen=True)
class Series:
    """Measurements of F frames; what compares two frames has 0 for the first. Colours are in levels 0..255."""

    fps: float
    colour: np.ndarray  # [F, 6], mean and std of each channel
    luma: np.ndarray  # [F], mean
    detail: np.ndarray  # [F], mean size of the gradient of luma
    noise: np.ndarray  # [F], std of pixel noise (Immerkaer 1996, by the median, so that edges do not count)
    corners: np.ndarray  # [F, 5], colourfulness and contrast of top left, top right, bottom left, bottom right and all
    change: np.ndarray  # [F], mean absolute difference to the frame before
    flow: np.ndarray  # [F, 2], mean motion since the frame before (right, down), in frame heights a second
    speed: np.ndarray  # [F], mean, in frame heights a second

    def seconds(self, values: np.ndarray) -> np.ndarray:
        """Means over whole seconds [S, ...] of values per frame [F, ...]; a shorter video is one second."""
        count = max(1, int(len(values) / self.fps))
        edges = [round(second * self.fps) for second in range(count)] + [len(values)]
        return np.stack([values[start:end].mean(0) for start, end in zip(edges[:-1], edges[1:], strict=True)])


@dataclass(frozen=True)
class Metric:
    """One number per second, and one for the video."""

    unit: str
    over_time: Callable[[Series], np.ndarray]  # -> [S]
    summary: Callable[[np.ndarray], float]  # of these numbers

    def value(self, series: Series) -> float:
        return float(self.summary(self.over_time(series)))


METRICS: Registry[Metric] = Registry("metric")


def metric(unit: str, summary: Callable[[np.ndarray], float] = lambda values: values[-1]):
    """Register a function of a `Series` under its name; the video's number is the last second's unless said."""

    def register(function: Callable[[Series], np.ndarray]) -> Callable[[Series], np.ndarray]:
        METRICS.register(function.__name__)(Metric(unit, function, summary))
        return function

    return register


@metric("levels")
def colour_drift(series: Series) -> np.ndarray:
    """Root mean square change of the channels' mean and std since the first second: tint, brightness, saturation."""
    colour = series.seconds(series.colour)
    return np.sqrt(np.square(colour - colour[0]).mean(1))


@metric("octaves")
def sharpness_drift(series: Series) -> np.ndarray:
    """log2 of detail over that of the first second: -1 where half is left; noise counts as detail."""
    detail = series.seconds(series.detail)
    return np.log2((detail + 1e-3) / (detail[0] + 1e-3))


def _jumps(series: Series) -> np.ndarray:
    """Of every frame: its change over the median change of the frames within half a second."""
    reach, change = max(2, round(series.fps / 2)), series.change
    around = [np.median(change[max(1, i - reach) : i + reach + 1]) for i in range(len(change))]
    return change / np.maximum(around, STILL_LEVELS)


def _starts(series: Series) -> np.ndarray:
    return np.arange(max(1, int(len(series.luma) / series.fps))) * series.fps


@metric("x", np.max)
def jump(series: Series) -> np.ndarray:
    """Largest change from one frame to the next, over the typical change around it: 1 to 2 where motion is smooth."""
    jumps = _jumps(series)
    return np.array([jumps[round(start) : round(start + series.fps)].max() for start in _starts(series)])


@metric("s", np.max)
def jump_time(series: Series) -> np.ndarray:
    """Where in the video the largest jump is, in every second."""
    return np.full(len(_starts(series)), _jumps(series).argmax() / series.fps)


@metric("share")
def corner(series: Series) -> np.ndarray:
    """How much colour and contrast a corner has lost since the first second, beyond what the whole frame has: 0 to 1.
    The worst of the four corners: 1 where it has turned into a plain grey."""
    kept = series.seconds(series.corners)
    kept = (kept + 1.0) / (kept[:1] + 1.0)  # a level more: a plain corner has nothing to lose
    return np.clip(1 - kept[:, :4].min(1) / np.minimum(kept[:, 4], 1.0), 0.0, 1.0)


@metric("heights/s", np.mean)
def motion(series: Series) -> np.ndarray:
    """Mean speed over the frame."""
    return series.seconds(series.speed)


@metric("degrees", lambda values: math.degrees(np.angle(np.exp(1j * np.radians(values)).sum())) % 360)
def motion_direction(series: Series) -> np.ndarray:
    """Where the frame's content moves on the whole: 0 right, 90 up."""
    right, down = series.seconds(series.flow).T
    return np.degrees(np.arctan2(-down, right)) % 360


@metric("levels", np.mean)
def flicker(series: Series) -> np.ndarray:
    """Brightness that goes up and down: root mean square second difference of mean luma; a steady fade has none."""
    second = np.zeros_like(series.luma)
    second[1:-1] = np.diff(series.luma, 2)
    return np.sqrt(series.seconds(np.square(second)))


@metric("levels", np.mean)
def noise(series: Series) -> np.ndarray:
    """Std of pixel noise."""
    return series.seconds(series.noise)


def measure(frames: Iterable[np.ndarray], fps: float) -> Series:
    """Look at every frame [H, W, 3] uint8 once. Raises ValueError where there are none."""
    rows, before, small_before = [], None, None
    for frame in frames:
        pixels = frame.astype(np.float32)
        luma = pixels @ GREY  # [H, W]
        small = _shrink(luma)
        flow, speed, change = np.zeros(2), 0.0, 0.0
        if before is not None:
            change = np.abs(luma - before).mean()
            flow, speed = _flow(small_before, small)
        down, right = np.gradient(luma)
        rows.append((
            np.concatenate([pixels.mean((0, 1)), pixels.std((0, 1))]), luma.mean(), np.hypot(down, right).mean(),
            _noise(luma), _corners(pixels, luma), change, flow * fps, speed * fps,
        ))  # fmt: skip
        before, small_before = luma, small
    if not rows:
        raise ValueError("no frames to measure")
    return Series(fps, *(np.stack(column) for column in zip(*rows, strict=True)))


def _shrink(luma: np.ndarray) -> np.ndarray:
    """Rows brought down to about `FLOW_HEIGHT` by averaging, so that motion is a pixel or two a frame."""
    step = max(1, len(luma) // FLOW_HEIGHT)
    height, width = (size // step * step for size in luma.shape)
    return luma[:height, :width].reshape(height // step, step, width // step, step).mean((1, 3))


def _blur(image: np.ndarray) -> np.ndarray:
    """[1, 2, 1] / 4 along both axes, twice."""
    for _ in range(2):
        for axis in (0, 1):
            image = (np.roll(image, 1, axis) + 2 * image + np.roll(image, -1, axis)) / 4
    return image


def _flow(before: np.ndarray, now: np.ndarray) -> tuple[np.ndarray, float]:
    """Mean motion (right, down) and mean speed in frame heights a frame, by blocks (Lucas and Kanade 1981). Blocks
    without texture say nothing; the mean is over those with texture."""
    before, now = _blur(before), _blur(now)
    down, right = np.gradient((before + now) / 2)
    step = now - before
    height, width = (size // FLOW_BLOCK * FLOW_BLOCK for size in now.shape)

    def sums(product: np.ndarray) -> np.ndarray:  # [H, W] -> [blocks], means over each, borders left out
        blocks = product[:height, :width].reshape(height // FLOW_BLOCK, FLOW_BLOCK, width // FLOW_BLOCK, FLOW_BLOCK)
        return blocks.mean((1, 3))[1:-1, 1:-1].ravel()

    xx, xy, yy = sums(right * right), sums(right * down), sums(down * down)
    xt, yt = sums(right * step), sums(down * step)
    smaller = (xx + yy) / 2 - np.sqrt(np.square(xx - yy) / 4 + np.square(xy))
    textured = smaller > MIN_TEXTURE
    if not textured.any():
        return np.zeros(2), 0.0
    xx, xy, yy, xt, yt = (values[textured] for values in (xx, xy, yy, xt, yt))
    determinant = xx * yy - np.square(xy)
    flow = np.stack([xy * yt - yy * xt, xy * xt - xx * yt], 1) / determinant[:, None] / len(now)  # [blocks, 2]
    return flow.mean(0), np.linalg.norm(flow, axis=1).mean()


def _noise(luma: np.ndarray) -> float:
    if min(luma.shape) < 3:
        return 0.0
    rows = luma[:-2] - 2 * luma[1:-1] + luma[2:]
    both = rows[:, :-2] - 2 * rows[:, 1:-1] + rows[:, 2:]  # noise of std 1 has std 6 here
    return float(np.median(np.abs(both)) / (0.6745 * 6))


def _corners(pixels: np.ndarray, luma: np.ndarray) -> np.ndarray:
    height, width = (max(2, size // CORNER_SHARE) for size in luma.shape)
    top, bottom, left, right = slice(height), slice(-height, None), slice(width), slice(-width, None)
    parts = ((top, left), (top, right), (bottom, left), (bottom, right), (slice(None), slice(None)))
    return np.array([np.ptp(pixels[part], axis=-1).mean() + luma[part].std() for part in parts])
