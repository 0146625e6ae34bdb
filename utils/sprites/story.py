"""Stories: videos of several shots whose characters come back, so that only memory can tell what they look like.

A cast of three characters, one of each shape, each with a colour, a size and a ground (colour and pattern) of its own,
takes turns in shots that are cut at chunk boundaries. A character's first shot is captioned in full; its later ones
leave out the colour of the sprite and of the ground ("a circle drifts left over a checkerboard").

    story = sample_story(seed=0, index=3, chunks=5)
    frames, captions = render_story(story), story.captions
    marks = score_story(frames, story)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from utils.sprites.read import look
from utils.sprites.world import (
    BOUNCE_ANGLE,
    COLOURS,
    DIAMETER,
    HEIGHT,
    HELD_OUT_START,
    MOTIONS,
    ORBIT,
    PATTERNS,
    SHAPES,
    SPEED,
    WIDTH,
    SpriteSpec,
    caption,
    render,
)

STREAM = 1  # keeps a story's randomness apart from that of the clip of the same index
RECALLED = ("colour", "background", "pattern", "shape", "size")
LEFT_OUT = ("colour", "background")  # by the captions of later shots
SIZE_TOLERANCE = 0.06  # of the diameter
# What a guess would score: colours by chance among six, or among those that the story has shown.
CHANCE = {"colour": 1 / len(COLOURS), "background": 1 / len(COLOURS)}
FRAMES_PER_CHUNK, STRIDE = 3, 4  # latent frames of a chunk, pixel frames of a latent one after the first


@dataclass(frozen=True)
class Shot:
    """One shot.

    Attributes:
        spec: what it shows; a returning shot's leaves its colours unsaid.
        start, chunks: place and length in chunks.
        returning: whether its character was seen before.
        since: chunks between its character's last shot and this one; 0 for a first shot.
        between: shots between the two.
    """

    spec: SpriteSpec
    start: int
    chunks: int
    returning: bool
    since: int = 0
    between: int = 0

    @property
    def frames(self) -> range:
        """Its pixel frames in the video."""
        return range(first_frame(self.start), first_frame(self.start + self.chunks))


@dataclass(frozen=True)
class Story:
    shots: tuple[Shot, ...]

    @property
    def captions(self) -> list[str]:
        """One a chunk."""
        return [caption(shot.spec) for shot in self.shots for _ in range(shot.chunks)]

    @property
    def returning(self) -> list[bool]:
        """Per chunk, whether it belongs to a returning shot."""
        return [shot.returning for shot in self.shots for _ in range(shot.chunks)]


@dataclass(frozen=True)
class RecallMark:
    """Whether an attribute of a returning shot was right, and if not, whose it was."""

    attribute: str
    right: bool
    since: int
    between: int
    confused: str = ""  # "last": the shot before had it; "cast": another character; "other": nobody


def first_frame(chunk: int) -> int:
    """Pixel frame at which a chunk begins: the first latent frame of a video stands for a single one."""
    return 0 if chunk == 0 else 1 + STRIDE * (FRAMES_PER_CHUNK * chunk - 1)


def sample_story(seed: int, index: int, chunks: int, shot_chunks: Sequence[int] = (1, 1)) -> Story:
    """Story `index` of the world `seed`: a pure function of its arguments; held out from `HELD_OUT_START` on.

    Args:
        chunks: length of the whole.
        shot_chunks: (least, most) chunks of a shot; the last is cut where the story ends.
    """
    rng = np.random.default_rng([seed, index, STREAM])
    cast = _draw_cast(rng)
    while index < HELD_OUT_START and any(spec.pair_held_out for spec in cast):
        cast = _draw_cast(rng)
    shots: list[Shot] = []
    last_seen: dict[int, tuple[int, int]] = {}  # character -> (chunk after its last shot, number of that shot)
    who, start = int(rng.integers(len(cast))), 0
    while start < chunks:
        length = min(int(rng.integers(shot_chunks[0], shot_chunks[1] + 1)), chunks - start)
        spec = _draw_shot(rng, cast[who])
        if who in last_seen:
            end, number = last_seen[who]
            spec = replace(spec, say_colour=False, say_background=False)
            shots.append(Shot(spec, start, length, True, start - end, len(shots) - number - 1))
        else:
            shots.append(Shot(spec, start, length, False))
        start += length
        last_seen[who] = start, len(shots) - 1
        who = int(rng.choice([other for other in range(len(cast)) if other != who]))
    return Story(tuple(shots))


def _draw_cast(rng: np.random.Generator) -> list[SpriteSpec]:
    """Three characters, no colour shared by two sprites or by two grounds."""
    names = tuple(COLOURS)
    colours = [names[i] for i in rng.permutation(len(names))[: len(SHAPES)]]
    grounds = [names[i] for i in rng.permutation(len(names))[: len(SHAPES)]]
    while any(colour == ground for colour, ground in zip(colours, grounds, strict=True)):
        grounds = [names[i] for i in rng.permutation(len(names))[: len(SHAPES)]]
    return [
        SpriteSpec(
            colour=colour, shape=shape, motion=MOTIONS[0], background=ground,
            pattern=PATTERNS[rng.integers(len(PATTERNS))], diameter=rng.uniform(*DIAMETER), speed=0.0, start_x=0.0,
            start_y=0.0, angle=0.0, orbit=0.0,
        )
        for shape, colour, ground in zip(SHAPES, colours, grounds, strict=True)
    ]  # fmt: skip


def _draw_shot(rng: np.random.Generator, character: SpriteSpec) -> SpriteSpec:
    """The character with a motion, place and speed of this shot."""
    return replace(
        character,
        motion=MOTIONS[rng.integers(len(MOTIONS))],
        speed=rng.uniform(*SPEED),
        start_x=rng.random(),
        start_y=rng.random(),
        angle=math.radians(rng.integers(4) * 90.0 + rng.uniform(*BOUNCE_ANGLE)),
        orbit=rng.uniform(*ORBIT),
    )


def render_story(story: Story, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """uint8 [frames, height, width, 3]."""
    return np.concatenate([render(shot.spec, len(shot.frames), height, width) for shot in story.shots])


def render_stills(story: Story, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """One frame a chunk, that in its middle: uint8 [chunks, height, width, 3]."""
    middle, apart = STRIDE * FRAMES_PER_CHUNK // 2, STRIDE * FRAMES_PER_CHUNK
    shots = [render(shot.spec, apart * shot.chunks, height, width)[middle::apart] for shot in story.shots]
    return np.concatenate(shots)


def score_story(frames: np.ndarray, story: Story) -> list[RecallMark]:
    """Read every returning shot of a video uint8 [F, H, W, 3] that was made from the story's captions."""
    marks = []
    for number, shot in enumerate(story.shots):
        if not shot.returning or shot.frames.stop > len(frames):
            continue
        seen = look(frames[shot.frames.start : shot.frames.stop])
        for attribute in RECALLED:
            if attribute == "size":
                wanted = shot.spec.diameter * frames.shape[1]
                right = seen.present and abs(seen.diameter / wanted - 1) < SIZE_TOLERANCE
                marks.append(RecallMark(attribute, bool(right), shot.since, shot.between))
                continue
            found, wanted = getattr(seen, attribute), getattr(shot.spec, attribute)
            needs_sprite = attribute in ("colour", "shape")
            right = found == wanted and (seen.present or not needs_sprite)
            confused = "" if right else _whose(found, attribute, story, number)
            marks.append(RecallMark(attribute, right, shot.since, shot.between, confused))
    return marks


def _whose(found: str, attribute: str, story: Story, number: int) -> str:
    if found == getattr(story.shots[number - 1].spec, attribute):
        return "last"
    return "cast" if any(found == getattr(shot.spec, attribute) for shot in story.shots[:number]) else "other"


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
