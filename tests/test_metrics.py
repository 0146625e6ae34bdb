"""The readers against ground truth: raw renders, degraded ones, and videos that go wrong in known ways."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from utils.sprites.look import look
from utils.sprites.read import READERS, accuracy, read_seconds, score
from utils.sprites.world import (
    COLOURS,
    DRIFTS,
    FPS,
    HELD_OUT_START,
    MOTIONS,
    CaptionFacts,
    SpriteSpec,
    background_image,
    draw_sprite,
    outline_distance,
    render,
    sample_spec,
)

FLOOR = 0.99


def truth(spec: SpriteSpec) -> CaptionFacts:
    return CaptionFacts(spec.colour, spec.shape, spec.motion, spec.background, spec.pattern)


def rates(videos: list[tuple[SpriteSpec, np.ndarray]]) -> dict[str, float]:
    right, total = Counter(), Counter()
    for spec, frames in videos:
        for mark in score(read_seconds(frames, FPS), truth(spec)):
            total[mark.attribute] += 1
            right[mark.attribute] += mark.right
    return {name: right[name] / total[name] for name in total}


def degrade(frames: np.ndarray, seed: int) -> np.ndarray:
    """Blur of one pixel, noise of 10 levels and a tint: worse than a VAE is allowed to be."""
    rng = np.random.default_rng(seed)
    weights = np.exp(-(np.arange(-3, 4) ** 2) / 2.0)
    weights /= weights.sum()
    soft = frames.astype(np.float64)
    for axis in (1, 2):
        soft = sum(weight * np.roll(soft, shift, axis) for weight, shift in zip(weights, range(-3, 4), strict=True))
    soft += rng.normal(0, 10, soft.shape) + rng.normal(0, 6, (1, 1, 1, 3))
    return np.clip(soft, 0, 255).astype(np.uint8)


def motions(frames: np.ndarray) -> list[str | None]:
    return [reading.values.get("motion") for reading in read_seconds(frames, FPS)]


def test_raw_renders_are_read_right():
    specs = [sample_spec(5, HELD_OUT_START + index) for index in range(200)]
    result = rates([(spec, render(spec, 4 * FPS)) for spec in specs])
    assert set(result) == set(READERS)
    assert min(result.values()) >= FLOOR, result


def drawn(distance, half=13.0):
    """A second of a red sprite of any outline (distance of x, y, half side) on a blue ground, here and there."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:64, :96] + 0.5
    frames = np.repeat(background_image("blue", "checkerboard")[None], FPS, 0)
    for frame, (right, down) in zip(frames, rng.uniform(20, 44, (FPS, 2)), strict=True):
        cover = np.clip(0.5 - distance(x - right, y - down, half), 0, 1)[..., None]
        frame += cover * (np.array(COLOURS["red"]) - frame)
    return np.round(frames).astype(np.uint8)


def pin_cushion(depth):
    def distance(x, y, half):
        hollow = (depth * half * np.clip(1 - (other / half) ** 2, 0, 1) for other in (y, x))
        return np.maximum(*(np.abs(along) + inwards for along, inwards in zip((x, y), hollow, strict=True))) - half

    return distance


def rounded(radius):
    def distance(x, y, half):
        out = [np.abs(along) - half * (1 - radius) for along in (x, y)]
        return np.hypot(*np.maximum(out, 0)) + np.minimum(np.maximum(*out), 0) - half * radius

    return distance


def with_hole(shape, radius):
    return lambda x, y, half: np.maximum(outline_distance(shape, x, y, half), radius * half - np.hypot(x, y))


def diamond(power):  # a circle on its way to one
    return lambda x, y, half: (np.abs(x) ** power + np.abs(y) ** power) ** (1 / power) - half


DEFECTS = {
    "pin-cushion": (pin_cushion(0.2), pin_cushion(0.0), "square"),
    "rounded square": (rounded(0.6), rounded(0.0), "square"),
    "square with a hole": (with_hole("square", 0.35), with_hole("square", 0.0), "square"),
    "circle with a hole": (with_hole("circle", 0.35), with_hole("circle", 0.0), "circle"),
    "circle with corners": (diamond(1.5), diamond(2.0), "circle"),
    "triangle with a hole": (with_hole("triangle", 0.3), with_hole("triangle", 0.0), "triangle"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_shape_out_of_true_is_none(defect):
    wrong, right, shape = DEFECTS[defect]
    assert look(drawn(right)).shape == shape and look(drawn(right)).outline > 0.98
    seen = look(drawn(wrong))
    assert seen.present and seen.colour == "red" and seen.shape == "other" and 0.75 < seen.outline < 0.94


def test_blurred_noisy_renders_are_read_right():
    specs = [sample_spec(6, HELD_OUT_START + index) for index in range(30)]
    result = rates([(spec, degrade(render(spec, 3 * FPS), index)) for index, spec in enumerate(specs)])
    assert min(result.values()) >= 0.97, result


@pytest.mark.parametrize("size", [(32, 48), (96, 160)])
def test_other_frame_sizes(size):
    # Speeds are in px/s whatever the size: motions of small frames are over too soon, of large ones too short to tell.
    specs = [sample_spec(7, HELD_OUT_START + index) for index in range(12)]
    result = rates([(spec, render(spec, 2 * FPS, *size)) for spec in specs])
    assert min(value for name, value in result.items() if name != "motion") >= 0.95, result


@pytest.mark.parametrize("motion", DRIFTS)
def test_sprite_on_the_border_is_one_sprite(motion):
    spec = replace(sample_spec(0, 2), motion=motion, speed=30.0, start_x=0.0, start_y=0.0)
    readings = read_seconds(render(spec, 4 * FPS), FPS)
    assert all(mark.right for mark in score(readings, truth(spec)))


@pytest.mark.parametrize("motion", MOTIONS)
def test_motion_is_read_from_the_second_second_on(motion):
    spec = replace(sample_spec(0, 2), motion=motion)
    assert motions(render(spec, 3 * FPS)) == [None, motion, motion]


def test_a_standing_sprite_is_still():
    frames = np.repeat(render(sample_spec(0, 2), 1), 3 * FPS, axis=0)
    assert motions(frames) == [None, "still", "still"]


def test_a_circle_run_backwards_is_no_circle():
    spec = replace(sample_spec(0, 2), motion="circles", speed=28.0)
    backwards = render(spec, 3 * FPS)[::-1]
    assert "circles" not in motions(backwards)


def test_no_sprite_and_two_sprites_are_not_present():
    spec = replace(sample_spec(0, 2), motion="drifts left", start_x=0.25, start_y=0.5)
    ground = background_image(spec.background, spec.pattern)
    bare = np.repeat(ground[None], FPS, axis=0)
    assert not read_seconds(bare.round().astype(np.uint8), FPS)[0].values["present"]
    two = bare.copy()
    draw_sprite(two, spec)
    assert read_seconds(two.round().astype(np.uint8), FPS)[0].values["present"]
    draw_sprite(two, replace(spec, start_x=0.75))
    seen = {"colour": None, "shape": None, "background": spec.background, "pattern": spec.pattern}
    assert read_seconds(two.round().astype(np.uint8), FPS)[0].values == {"present": False, **seen}


def test_a_colour_that_changes_is_wrong_from_then_on():
    spec = replace(sample_spec(0, 2), colour="red", background="blue")
    other = replace(spec, colour="yellow", background="green")
    frames = np.concatenate([render(spec, 8 * FPS)[: 6 * FPS], render(other, 8 * FPS)[6 * FPS :]])
    readings = read_seconds(frames, FPS)
    captioned = score(readings, truth(spec))
    left_out = score(readings, replace(truth(spec), colour=None, background=None))
    for marks, said in ((captioned, True), (left_out, False)):
        early, late = accuracy(marks, said, range(0, 6)), accuracy(marks, said, range(6, 8))
        assert early["colour"] == early["background"] == 1.0
        assert late["colour"] == late["background"] == 0.0
    assert accuracy(left_out, True, range(6, 8))["shape"] == 1.0
    assert "colour" not in accuracy(left_out, True, range(6, 8))


def test_the_wrong_caption_is_marked_wrong():
    spec = replace(sample_spec(0, 2), motion="drifts up")
    readings = read_seconds(render(spec, 3 * FPS), FPS)
    wrong = CaptionFacts("white", "circle", "circles", "white", "gradient")
    assert (spec.colour, spec.shape, spec.background, spec.pattern) == ("red", "square", "magenta", "plain")
    marks = score(readings, wrong)
    assert accuracy(marks, True, range(3)) == dict.fromkeys(READERS, 0.0) | {"present": 1.0, "moving": 1.0}


def test_a_sprite_that_stands_still_is_present_but_not_moving():
    spec = replace(sample_spec(0, 2), motion="drifts up")
    frames = np.repeat(render(spec, 1), 3 * FPS, axis=0)
    result = accuracy(score(read_seconds(frames, FPS), truth(spec)), True, range(3))
    assert (result["present"], result["moving"], result["motion"]) == (1.0, 0.0, 0.0)


def test_frames_that_cannot_be_read_are_refused():
    with pytest.raises(ValueError, match="less than one second"):
        read_seconds(render(sample_spec(0, 2), 8), FPS)
    with pytest.raises(ValueError, match="uint8"):
        read_seconds(np.zeros((16, 64, 96, 3), np.float32), FPS)
