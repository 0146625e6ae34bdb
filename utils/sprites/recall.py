"""What returning shots of a story recall of their characters, and by how long these were away."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from utils.sprites.look import look
from utils.sprites.story import Story
from utils.sprites.world import COLOURS, DIAMETER

RECALLED = ("colour", "background", "pattern", "shape", "size")
LEFT_OUT = ("colour", "background")  # by the captions of later shots
SIZE_TOLERANCE = 0.06  # of the diameter
SINCE = (1, 4, 16, 64)  # chunks since a character was last seen: upper ends of the buckets of `recall_table`


@dataclass(frozen=True)
class RecallMark:
    """Whether an attribute of a returning shot was right, and if not, whose it was."""

    attribute: str
    right: bool
    since: int
    between: int
    confused: str = ""  # "last": the shot before had it; "cast": another character; "other": nobody


def score_story(frames: np.ndarray, story: Story, returning: bool = True) -> list[RecallMark]:
    """Read every returning shot, or every first one, of a video uint8 [F, H, W, 3] made from the story's captions.
    Size, which no caption says, must be that of the character's first shot in the same video."""
    marks, sizes = [], {}
    for number, shot in enumerate(story.shots):
        if shot.frames.stop > len(frames):
            break
        if shot.returning != returning and shot.returning:
            continue
        seen = look(frames[shot.frames.start : shot.frames.stop])
        size = sizes.setdefault(shot.spec.shape, seen.diameter if seen.present else 0.0)
        if shot.returning != returning:
            continue
        for attribute in RECALLED:
            if attribute == "size":
                right = seen.present and abs(seen.diameter - size) < SIZE_TOLERANCE * size
                marks.append(RecallMark(attribute, bool(right), shot.since, shot.between))
                continue
            found, wanted = getattr(seen, attribute), getattr(shot.spec, attribute)
            needs_sprite = attribute in ("colour", "shape")
            right = found == wanted and (seen.present or not needs_sprite)
            confused = "" if right else _whose(found, attribute, story, number)
            marks.append(RecallMark(attribute, right, shot.since, shot.between, confused))
    return marks


def _whose(found: str, attribute: str, story: Story, number: int) -> str:
    if number and found == getattr(story.shots[number - 1].spec, attribute):
        return "last"
    return "cast" if any(found == getattr(shot.spec, attribute) for shot in story.shots[:number]) else "other"


def _size_chance() -> float:
    """Share of random sizes that pass for another random one."""
    drawn = np.linspace(*DIAMETER, 500)
    return float((np.abs(drawn[:, None] / drawn - 1) < SIZE_TOLERANCE).mean())


# What looks drawn anew would score. A caption says pattern and shape. Whoever takes any of the cast's has a third.
CHANCE = {"colour": 1 / len(COLOURS), "background": 1 / len(COLOURS), "size": _size_chance()}


def recall(marks: Sequence[RecallMark]) -> dict[str, float]:
    """Share of returning shots with an attribute right, and of the wrong ones whose it was instead."""
    found = {}
    for attribute in RECALLED:
        of = [mark for mark in marks if mark.attribute == attribute]
        if of:
            found[attribute] = sum(mark.right for mark in of) / len(of)
        if of and attribute in LEFT_OUT:
            for kind in ("last", "cast", "other"):
                found[f"{attribute}/{kind}"] = sum(mark.confused == kind for mark in of) / len(of)
    return found


def recall_table(marks: Sequence[RecallMark]) -> dict[str, dict[str, dict[str, float]]]:
    """`recall` and the number of returning `shots`: "all" (under ""), by chunks "since" the character was last seen
    (upper ends of the buckets), by shots "between". Empty without marks."""
    if not marks:
        return {}

    def bucket(mark: RecallMark) -> str:
        return next((str(end) for end in SINCE if mark.since <= end), f"over {SINCE[-1]}")

    by_since = groupby(sorted(marks, key=lambda mark: mark.since), bucket)
    by_between = groupby(sorted(marks, key=lambda mark: mark.between), lambda mark: str(mark.between))
    groups = {"all": {"": marks}, "since": {name: list(some) for name, some in by_since}}
    groups["between"] = {name: list(some) for name, some in by_between}
    return {
        by: {name: {"shots": len(some) // len(RECALLED)} | recall(some) for name, some in group.items()}
        for by, group in groups.items()
    }
