"""Sprite world: captioned clips drawn on the fly by a seeded numpy program, with exact ground truth.

A clip is a pure function of (seed, index): `sample_spec` draws what it shows, `caption` says it (or most of it),
`render` draws it. Indices from `HELD_OUT_START` on are held out, and so are the colour and shape pairs in
`HELD_OUT_PAIRS`.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

COLOURS = {
    "red": (230, 50, 50),
    "green": (50, 200, 80),
    "blue": (60, 110, 240),
    "yellow": (240, 215, 60),
    "magenta": (200, 60, 220),
    "white": (240, 240, 240),
}
SHAPES = ("circle", "square", "triangle")
PATTERNS = ("plain", "gradient", "checkerboard", "stripes")
MOTIONS = ("drifts left", "drifts right", "drifts up", "drifts down", "bounces", "circles")
DRIFTS = {"drifts left": (-1, 0), "drifts right": (1, 0), "drifts up": (0, -1), "drifts down": (0, 1)}

HELD_OUT_START = 1_000_000
HELD_OUT_PAIRS = frozenset({("green", "triangle"), ("magenta", "square")})
PAIR_CHOICES = ("any", "seen", "unseen")
MOTION_STREAM = 3  # keeps the draw of a motion apart from the clip's other randomness

_COLOUR, _SHAPE, _MOTION, _PATTERN = map("|".join, (COLOURS, SHAPES, MOTIONS, PATTERNS))
_CAPTION = re.compile(f"a (?:({_COLOUR}) )?({_SHAPE}|shape) ({_MOTION}) over a (?:({_COLOUR}) )?({_PATTERN})")
CHOICES = {"colour": COLOURS, "shape": SHAPES, "motion": MOTIONS, "background": COLOURS, "pattern": PATTERNS}

HEIGHT, WIDTH, FPS = 64, 96, 16
BASE_TONE, SECOND_TONE = 0.40, 0.22
CELL = 8  # px, side of a checkerboard cell and width of a stripe
DIAMETER = (0.34, 0.44)  # of the frame height
SPEED = (14.0, 30.0)  # px/s
ORBIT = (0.22, 0.28)  # radius of "circles", of the frame height
BOUNCE_ANGLE = (25.0, 65.0)  # degrees off the nearest axis

DROP_CLIP, DROP_WORD, EMPTY_CAPTION = 0.25, 0.5, 0.1


@dataclass(frozen=True)
class SpriteSpec:
    """What one clip shows, and which of its words the caption keeps. Lengths are fractions of the frame height
    (`diameter`, `orbit`) or of the free range of the sprite's centre (`start_x`, `start_y`); `speed` is in px/s and
    `angle` in radians, clockwise from the x axis as y points down. Raises ValueError for what is not in `CHOICES`."""

    colour: str
    shape: str
    motion: str
    background: str
    pattern: str
    diameter: float
    speed: float = 0.0
    start_x: float = 0.0
    start_y: float = 0.0
    angle: float = 0.0
    orbit: float = 0.0
    say_colour: bool = True
    say_shape: bool = True
    say_background: bool = True
    say_anything: bool = True

    def __post_init__(self):
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}: expected one of {', '.join(known)}")

    @property
    def pair_held_out(self) -> bool:
        """Whether this colour and shape never occur together in training."""
        return (self.colour, self.shape) in HELD_OUT_PAIRS


@dataclass(frozen=True)
class CaptionFacts:
    """The attributes a caption states; None where it leaves one out."""

    colour: str | None
    shape: str | None
    motion: str | None
    background: str | None
    pattern: str | None


def sample_spec(seed: int, index: int, pairs: str = "any", motions: Sequence[str] = ()) -> SpriteSpec:
    """Draw clip `index` of the world `seed`. Training indices (below `HELD_OUT_START`) never show a held-out pair and
    have an empty caption in a tenth of cases. Held-out indices always have a caption; `pairs` picks which of them to
    draw: "any", "seen" (no held-out pair) or "unseen" (held-out pairs only). With `motions` the motion is one of them,
    in whose choice repeats count; all else is as without.

    Raises ValueError for a negative seed or index, unknown `pairs` or motion, or unseen pairs of a training index.
    """
    if seed < 0 or index < 0:
        raise ValueError(f"seed and index must be >= 0, got seed={seed}, index={index}")
    if pairs not in PAIR_CHOICES:
        raise ValueError(f"pairs={pairs!r} is not one of {', '.join(PAIR_CHOICES)}")
    if unknown := set(motions) - set(MOTIONS):
        raise ValueError(f"motion {sorted(unknown)[0]!r} is not one of {', '.join(MOTIONS)}")
    training = index < HELD_OUT_START
    if training and pairs == "unseen":
        raise ValueError(f"index {index} is a training clip and shows no unseen pair; use an index >= {HELD_OUT_START}")
    rng = np.random.default_rng([seed, index])
    spec = _draw_spec(rng)
    # Redrawing from the same stream keeps the clip a pure function of (seed, index).
    while (spec.pair_held_out and (training or pairs == "seen")) or (not spec.pair_held_out and pairs == "unseen"):
        spec = _draw_spec(rng)
    if motions:
        motion = np.random.default_rng([seed, index, MOTION_STREAM]).integers(len(motions))
        spec = replace(spec, motion=motions[motion])
    if training and rng.random() < EMPTY_CAPTION:
        return replace(spec, say_anything=False)
    return spec


def _draw_spec(rng: np.random.Generator) -> SpriteSpec:
    names = tuple(COLOURS)
    colour, background = rng.choice(len(names), size=2, replace=False)
    drops_words = rng.random() < DROP_CLIP
    says = [not (drops_words and rng.random() < DROP_WORD) for _ in range(3)]
    angle = rng.integers(4) * 90.0 + rng.uniform(*BOUNCE_ANGLE)
    return SpriteSpec(
        colour=names[colour],
        shape=SHAPES[rng.integers(len(SHAPES))],
        motion=MOTIONS[rng.integers(len(MOTIONS))],
        background=names[background],
        pattern=PATTERNS[rng.integers(len(PATTERNS))],
        diameter=rng.uniform(*DIAMETER),
        speed=rng.uniform(*SPEED),
        start_x=rng.random(),
        start_y=rng.random(),
        angle=math.radians(angle),
        orbit=rng.uniform(*ORBIT),
        say_colour=says[0],
        say_shape=says[1],
        say_background=says[2],
    )


def caption(spec: SpriteSpec) -> str:
    """The clip's caption, "a red circle bounces over a blue checkerboard", without the words the spec leaves out."""
    if not spec.say_anything:
        return ""
    sprite = " ".join(([spec.colour] if spec.say_colour else []) + [spec.shape if spec.say_shape else "shape"])
    ground = " ".join(([spec.background] if spec.say_background else []) + [spec.pattern])
    return f"a {sprite} {spec.motion} over a {ground}"


def held_out_captions(seed: int, count: int, pairs: str = "any") -> list[str]:
    """Captions of the first `count` held-out clips; `pairs` as `sample_spec` has it."""
    return [caption(sample_spec(seed, HELD_OUT_START + index, pairs)) for index in range(count)]


def parse_caption(text: str) -> CaptionFacts:
    """Read a sprite-world caption back: what it states, None for what it leaves out (all of it when it is empty).
    Raises ValueError for any other text."""
    words = text.lower().strip().rstrip(".").split()
    found = _CAPTION.fullmatch(" ".join(words))
    if words and found is None:
        known = ", ".join((*COLOURS, *SHAPES, *MOTIONS, *PATTERNS))
        usage = f"expected 'a [colour] shape motion over a [colour] pattern' of {known}"
        raise ValueError(f"not a sprite-world caption: {text!r}; {usage}")
    colour, shape, motion, background, pattern = found.groups() if words else [None] * 5
    return CaptionFacts(colour, None if shape == "shape" else shape, motion, background, pattern)


def background_image(background: str, pattern: str, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """The bare background, float32 [height, width, 3] in 0..255."""
    base, second = (np.asarray(COLOURS[background], np.float32) * tone for tone in (BASE_TONE, SECOND_TONE))
    rows, columns = np.arange(height)[:, None], np.arange(width)
    weight = {
        "plain": 0,
        "gradient": rows / max(height - 1, 1),
        "checkerboard": (rows // CELL + columns // CELL) % 2,
        "stripes": columns // CELL % 2,
    }[pattern]
    weight = np.broadcast_to(weight, (height, width)).astype(np.float32)
    return (base + weight[..., None] * (second - base)).astype(np.float32)


def sprite_path(
    spec: SpriteSpec, num_frames: int, height: int = HEIGHT, width: int = WIDTH, fps: float = FPS
) -> np.ndarray:
    """The sprite's centre in every frame, float64 [num_frames, 2] as (x, y) px; drifts are wrapped onto the torus."""
    seconds = np.arange(num_frames) / fps
    radius = spec.diameter * height / 2
    if spec.motion == "circles":
        orbit = spec.orbit * height
        theta = 2 * math.pi * spec.start_x + spec.speed / orbit * seconds
        return np.stack([width / 2 + orbit * np.cos(theta), height / 2 + orbit * np.sin(theta)], axis=1)
    if spec.motion == "bounces":
        axes = ((spec.start_x, math.cos(spec.angle), width), (spec.start_y, math.sin(spec.angle), height))
        return np.stack([_reflect(u, step * spec.speed * seconds, radius, size) for u, step, size in axes], axis=1)
    dx, dy = DRIFTS[spec.motion]
    x = (spec.start_x * width + dx * spec.speed * seconds) % width
    y = (spec.start_y * height + dy * spec.speed * seconds) % height
    return np.stack([x, y], axis=1)


def _reflect(start: float, travelled: np.ndarray, radius: float, size: int) -> np.ndarray:
    """Straight travel folded between two walls, so that the sprite's edge (not its centre) touches them."""
    free = size - 2 * radius
    folded = (start * free + travelled) % (2 * free)
    return radius + np.where(folded > free, 2 * free - folded, folded)


def draw_sprite(frames: np.ndarray, spec: SpriteSpec, fps: float = FPS) -> None:
    """Draw the spec's sprite into float32 frames [num_frames, height, width, 3], in place, wrapping at the borders.
    Only the window around the sprite is touched, which makes this several times cheaper than whole frames."""
    num_frames, height, width, _ = frames.shape
    centre = sprite_path(spec, num_frames, height, width, fps)
    half = spec.diameter * height / 2
    reach = math.ceil(half) + 1
    offsets = np.arange(-reach, reach + 1)
    corner = np.floor(centre).astype(np.int64)  # [F, 2]
    columns, rows = (corner[:, axis, None] + offsets for axis in (0, 1))  # [F, P]
    x = (columns + 0.5 - centre[:, :1]).astype(np.float32)[:, None, :]  # [F, 1, P], pixel centres about the sprite's
    y = (rows + 0.5 - centre[:, 1:]).astype(np.float32)[:, :, None]  # [F, P, 1]
    cover = np.clip(0.5 - outline_distance(spec.shape, x, y, half), 0.0, 1.0)[..., None]  # [F, P, P, 1]
    place = (np.arange(num_frames)[:, None, None], rows[:, :, None] % height, columns[:, None, :] % width)
    under = frames[place]  # [F, P, P, 3]
    frames[place] = under + cover * (np.asarray(COLOURS[spec.colour], np.float32) - under)


def outline_distance(shape: str, x: np.ndarray, y: np.ndarray, half: float) -> np.ndarray:
    """Distance in px to the outline, negative inside; every shape spans the same box of side 2 * half."""
    if shape == "circle":
        return np.sqrt(x * x + y * y) - half
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - half
    # A triangle's sides run from the apex (0, -half) to (+-half, half): normal (2, -1) / sqrt 5.
    return np.maximum((2 * np.abs(x) - y - half) / math.sqrt(5.0), y - half)


def render(spec: SpriteSpec, num_frames: int, height: int = HEIGHT, width: int = WIDTH, fps: float = FPS) -> np.ndarray:
    """Draw the clip, uint8 [num_frames, height, width, 3]. Raises ValueError for sizes that are not positive multiples
    of 16, or a frame count below 1."""
    return render_layers([spec], num_frames, height, width, fps)


def render_layers(
    specs: list[SpriteSpec], num_frames: int, height: int = HEIGHT, width: int = WIDTH, fps: float = FPS
) -> np.ndarray:
    """The first spec's clip, the sprites of the others under its own: uint8 [num_frames, height, width, 3]."""
    if num_frames < 1:
        raise ValueError(f"num_frames must be >= 1, got {num_frames}")
    if height < 16 or width < 16 or height % 16 or width % 16:
        raise ValueError(f"height and width must be positive multiples of 16 px, got {height} x {width}")
    ground = background_image(specs[0].background, specs[0].pattern, height, width)
    frames = np.repeat(ground[None], num_frames, axis=0)
    for spec in reversed(specs):
        draw_sprite(frames, spec, fps)
    return np.round(frames).astype(np.uint8)
