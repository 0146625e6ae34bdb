"""What each second of a sprite-world video shows, attribute by attribute, and how much of it is right.

    readings = read_seconds(frames, fps)              # uint8 [F, H, W, 3] -> one Reading per whole second
    marks = score(readings, parse_caption(prompt))    # one Mark per second and attribute

No ground truth enters: a reading is of what the frames look like (`look.py`) and how the sprite moves (`motion.py`). To
add an attribute, write a function with `@reader()`; one that a caption states has the name of a field of
`CaptionFacts`.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from utils.registry import Registry
from utils.sprites.look import Look, look
from utils.sprites.motion import STILL, read_motion
from utils.sprites.world import CaptionFacts

REFERENCE_SECONDS = (1, 2, 3, 4)  # what the caption left out must stay as it is here


@dataclass(frozen=True)
class Reading:
    """What one second shows: as it looks, and by `READERS`; `values` lacks what takes more seconds than have passed."""

    second: int
    look: Look
    values: dict[str, Any]


@dataclass(frozen=True)
class Mark:
    """Whether one attribute was right in one second; `said` tells a captioned attribute from a left-out one."""

    second: int
    attribute: str
    said: bool
    right: bool


@dataclass(frozen=True)
class Reader:
    """How one attribute is read and judged."""

    read: Callable[[Sequence[Look], float], Any]  # looks of the last `seconds`, fps -> value; None: no sprite to read
    seconds: int = 1
    expected: Any = None  # what is right whatever the caption; None: what it says, or what `REFERENCE_SECONDS` showed


READERS: Registry[Reader] = Registry("reader")  # in the order of tables


def reader(**options: Any) -> Callable[[Callable], Callable]:
    """Decorator: register a function under its name; `options` as `Reader` has them."""

    def register(function: Callable) -> Callable:
        READERS.register(function.__name__)(Reader(function, **options))
        return function

    return register


@reader(expected=True)
def present(looks: Sequence[Look], fps: float) -> bool:
    return looks[-1].present


@reader()
def colour(looks: Sequence[Look], fps: float) -> str | None:
    return looks[-1].colour if looks[-1].present else None


@reader()
def shape(looks: Sequence[Look], fps: float) -> str | None:
    """ "other" where the outline of the nearest shape fits less than `OUTLINE_IOU`."""
    return looks[-1].shape if looks[-1].present else None


@reader(seconds=2)
def motion(looks: Sequence[Look], fps: float) -> str | None:
    track = np.concatenate([seen.centres for seen in looks])
    return read_motion(track, fps, *looks[-1].size) if looks[-1].present else None


@reader()
def background(looks: Sequence[Look], fps: float) -> str:
    return looks[-1].background


@reader()
def pattern(looks: Sequence[Look], fps: float) -> str:
    return looks[-1].pattern


@reader(seconds=2, expected=True)
def moving(looks: Sequence[Look], fps: float) -> bool:
    """A sprite is there and does not stand still."""
    return motion(looks, fps) not in (None, STILL)


def read_seconds(frames: np.ndarray, fps: float) -> list[Reading]:
    """Read every whole second of a video uint8 [F, H, W, 3]. Raises ValueError for another dtype or shape, or for less
    than a second."""
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(f"frames must be uint8 [frames, height, width, 3], got {frames.dtype} {list(frames.shape)}")
    seconds = int(len(frames) / fps + 1e-6)
    if seconds < 1:
        raise ValueError(f"{len(frames)} frames at {fps} fps are less than one second: nothing to read")
    looks = [look(frames[round(second * fps) : round((second + 1) * fps)]) for second in range(seconds)]
    readings = []
    for second, seen in enumerate(looks):
        found = {name: each for name, each in READERS.items() if second + 1 >= each.seconds}
        values = {name: each.read(looks[second + 1 - each.seconds : second + 1], fps) for name, each in found.items()}
        readings.append(Reading(second, seen, values))
    return readings


def score(readings: Sequence[Reading], facts: CaptionFacts) -> list[Mark]:
    """Judge readings by a caption: by what it says; what it leaves out, by `REFERENCE_SECONDS` of the same video."""
    marks = []
    for name, each in READERS.items():
        said = getattr(facts, name, None) if each.expected is None else each.expected
        expected = _reference(readings, name) if said is None else said
        for reading in readings:
            if name in reading.values:
                right = expected is not None and reading.values[name] == expected
                marks.append(Mark(reading.second, name, said is not None, right))
    return marks


def _reference(readings: Sequence[Reading], name: str) -> Any:
    values = [reading.values.get(name) for reading in readings if reading.second in REFERENCE_SECONDS]
    values = [value for value in values if value is not None]
    return Counter(values).most_common(1)[0][0] if values else None


def accuracy(marks: Sequence[Mark], said: bool, seconds: range | None = None) -> dict[str, float]:
    """Share of right marks per attribute, over the given seconds and kind; attributes without a mark are absent."""
    picked = [mark for mark in marks if mark.said == said and (seconds is None or mark.second in seconds)]
    by_name = {name: [mark.right for mark in picked if mark.attribute == name] for name in READERS}
    return {name: sum(right) / len(right) for name, right in by_name.items() if right}
