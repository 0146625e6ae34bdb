"""Stories: videos of several shots whose characters come back, so that only memory can tell what they look like.

A cast of three characters, one of each shape, each with a colour, a size and a ground (colour and pattern) of its own,
takes turns in shots that are cut at chunk boundaries. A character's first shot is captioned in full; its later ones
leave out the colour of the sprite and of the ground ("a circle drifts left over a checkerboard").

    story = sample_story(seed=0, index=3, chunks=5)
    frames, captions = render_story(story), story.captions
    marks = score_story(frames, story)  # utils/sprites/recall.py
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from utils.sprites.world import (
    BOUNCE_ANGLE,
    COLOURS,
    DIAMETER,
    FPS,
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
    parse_caption,
    render,
)

STREAM = 1  # keeps a story's randomness apart from that of the clip of the same index
RETURN_STREAM = 2
FRAMES_PER_CHUNK, STRIDE = 3, 4  # latent frames of a chunk, pixel frames of a latent one after the first


@dataclass(frozen=True)
class Shot:
    """One shot; its place and length are in chunks."""

    spec: SpriteSpec  # what it shows; a returning shot's leaves its colours unsaid
    start: int
    chunks: int
    returning: bool  # whether its character was seen before
    since: int = 0  # chunks between its character's last shot and this one
    between: int = 0  # shots between the two

    @property
    def full_caption(self) -> str:
        """With what a returning shot's caption leaves out."""
        return caption(replace(self.spec, say_colour=True, say_background=True))

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
    def schedule(self) -> list[dict[str, float | str]]:
        """Its captions as a prompt that changes with the shots (`pipeline/data/schedule.py`)."""
        return [{"at": shot.frames.start / FPS, "prompt": caption(shot.spec)} for shot in self.shots]

    @property
    def returning(self) -> list[bool]:
        """Per chunk, whether it belongs to a returning shot."""
        return [shot.returning for shot in self.shots for _ in range(shot.chunks)]


def first_frame(chunk: int) -> int:
    """Pixel frame at which a chunk begins: the first latent frame of a video stands for a single one."""
    return 0 if chunk == 0 else 1 + STRIDE * (FRAMES_PER_CHUNK * chunk - 1)


def num_chunks(frames: int) -> int:
    """Whole chunks that so many frames hold."""
    return (1 + (frames - 1) // STRIDE) // FRAMES_PER_CHUNK


def sample_story(seed: int, index: int, chunks: int, shot_chunks: Sequence[int] = (1, 1)) -> Story:
    """Story `index` of the world `seed`, `chunks` long: a pure function of its arguments; held out from
    `HELD_OUT_START` on. `shot_chunks`: (least, most) of a shot; the last is cut where the story ends."""
    return _tell(seed, index, lambda rng, start: min(draw_length(rng, shot_chunks), chunks - start))


def sample_cut_story(seed: int, index: int, lengths: Sequence[int]) -> Story:
    """Story `index` of the world `seed` in shots of these lengths; of three and more, the last is a returning one."""
    left = iter([*lengths, 0])
    return _tell(seed, index, lambda rng, start: next(left), last=len(lengths) - 1)


def draw_length(rng: np.random.Generator, shot_chunks: Sequence[int]) -> int:
    """Chunks of a shot."""
    return int(rng.integers(shot_chunks[0], shot_chunks[1] + 1))


def _tell(
    seed: int, index: int, next_length: Callable[[np.random.Generator, int], int], last: int | None = None
) -> Story:
    """Shots of the lengths that `next_length` names, until it names none; shot `last` shows who was seen, if it can."""
    rng = np.random.default_rng([seed, index, STREAM])
    cast, shots, start = _draw_cast(rng, index), [], 0
    who = int(rng.integers(len(cast)))
    while length := next_length(rng, start):
        shots.append(_next_shot(shots, _draw_shot(rng, cast[who]), length))
        start += length
        others = [other for other in range(len(cast)) if other != who]
        if len(shots) == last:
            seen = {shot.spec.shape for shot in shots}
            others = [other for other in others if cast[other].shape in seen] or others
        who = int(rng.choice(others))
    return Story(tuple(shots))


def sample_return(
    seed: int, index: int, since: int, between: int | None = None, shot_chunks: int = 1, opening: int = 0
) -> Story:
    """A story whose last shot brings a character back after `since` chunks of the two others, cut into `between` shots,
    as evenly as can be (None: two, or more so that none is longer than 16 chunks). The character's own two shots have
    `shot_chunks` each; `opening` chunks of another one come before them, so that the sink does not hold it.

    Each of the three comes from a cast drawn anew, so two may share a colour or a ground, which `sample_story`'s never
    do: all evaluations of returns are on these stories, so it stays."""
    rng = np.random.default_rng([seed, index, RETURN_STREAM])
    cast = [_draw_cast(rng, index)[place] for place in rng.permutation(len(SHAPES))]
    between = min(since, max(2, -(-since // 16))) if between is None else between
    cuts = [since * place // between for place in range(between + 1)]
    lengths = [shot_chunks, *(end - start for start, end in zip(cuts[:-1], cuts[1:], strict=True)), shot_chunks]
    shots: list[Shot] = []
    if opening:
        shots.append(_next_shot(shots, _draw_shot(rng, cast[1]), opening))
    for place, length in enumerate(lengths):
        who = 0 if place in (0, between + 1) else 1 + place % 2
        shots.append(_next_shot(shots, _draw_shot(rng, cast[who]), length))
    return Story(tuple(shots))


def read_story(schedule: Sequence[dict[str, float | str]], chunks: int) -> Story:
    """The story that a schedule of captions tells in a video of so many chunks; sizes, speeds and places are not in it.
    Raises ValueError where a caption is none of the sprite world's, or lacks what no earlier shot has said."""
    frames = [entry["at"] * FPS - first_frame(1) for entry in schedule[1:]]
    starts, shots = [0, *(round(1 + since / (STRIDE * FRAMES_PER_CHUNK)) for since in frames)], []
    ends = [min(start, chunks) for start in (*starts[1:], chunks)]
    for entry, start, end in zip(schedule, starts, ends, strict=True):
        facts = vars(parse_caption(entry["prompt"]))
        seen = next((vars(shot.spec) for shot in shots if shot.spec.shape == facts["shape"]), {})
        facts = {name: seen.get(name) if value is None else value for name, value in facts.items()}
        if None in facts.values():
            raise ValueError(f"`{entry['prompt']}` leaves out what no shot before it has said")
        spec = SpriteSpec(**facts, diameter=math.nan)
        if end > start:
            shots.append(_next_shot(shots, spec, end - start))
    return Story(tuple(shots))


def _next_shot(shots: list[Shot], spec: SpriteSpec, length: int) -> Shot:
    """The shot that shows `spec` after `shots`; where these show its character, its colours stay unsaid."""
    start = sum(shot.chunks for shot in shots)
    for between, shot in enumerate(reversed(shots)):
        if shot.spec.shape == spec.shape:
            spec = replace(spec, say_colour=False, say_background=False)
            return Shot(spec, start, length, True, start - shot.start - shot.chunks, between)
    return Shot(spec, start, length, False)


def _draw_cast(rng: np.random.Generator, index: int) -> list[SpriteSpec]:
    """Three characters, no colour shared by two sprites or by two grounds; training stories show no held-out pair."""
    names = tuple(COLOURS)
    while True:
        colours, grounds = ([names[i] for i in rng.permutation(len(names))[: len(SHAPES)]] for _ in range(2))
        while any(colour == ground for colour, ground in zip(colours, grounds, strict=True)):
            grounds = [names[i] for i in rng.permutation(len(names))[: len(SHAPES)]]
        cast = [
            SpriteSpec(colour, shape, MOTIONS[0], ground, PATTERNS[rng.integers(len(PATTERNS))], rng.uniform(*DIAMETER))
            for shape, colour, ground in zip(SHAPES, colours, grounds, strict=True)
        ]
        if index >= HELD_OUT_START or not any(spec.pair_held_out for spec in cast):
            return cast


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
