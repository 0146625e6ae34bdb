"""The sprite world: determinism, splits, captions, and that what is drawn is what the spec says."""

from dataclasses import replace

import numpy as np
import pytest

from utils.sprites.world import (
    BASE_TONE,
    CHOICES,
    COLOURS,
    DRIFTS,
    HELD_OUT_PAIRS,
    HELD_OUT_START,
    MOTIONS,
    PATTERNS,
    SHAPES,
    background_image,
    caption,
    parse_caption,
    render,
    sample_spec,
    sprite_path,
)

TRAINING = [sample_spec(3, index) for index in range(3000)]
HELD_OUT = [sample_spec(3, HELD_OUT_START + index) for index in range(1500)]


def test_clip_is_a_pure_function_of_seed_and_index():
    for index in (0, 7, HELD_OUT_START + 7):
        assert sample_spec(3, index) == sample_spec(3, index)
        assert np.array_equal(render(sample_spec(3, index), 5), render(sample_spec(3, index), 5))
    assert len({sample_spec(3, index) for index in range(50)}) == 50
    assert sample_spec(3, 0) != sample_spec(4, 0)


def test_longer_clip_starts_like_a_shorter_one():
    spec = sample_spec(0, 11)
    assert np.array_equal(render(spec, 40)[:9], render(spec, 9))


def test_training_never_shows_a_held_out_pair():
    assert not any(spec.pair_held_out for spec in TRAINING)
    seen = {(spec.colour, spec.shape) for spec in TRAINING}
    assert seen == {(colour, shape) for colour in COLOURS for shape in SHAPES} - HELD_OUT_PAIRS


def test_held_out_clips_show_pairs_as_asked():
    assert any(spec.pair_held_out for spec in HELD_OUT)
    indices = range(HELD_OUT_START, HELD_OUT_START + 200)
    assert not any(sample_spec(3, index, pairs="seen").pair_held_out for index in indices)
    assert all(sample_spec(3, index, pairs="unseen").pair_held_out for index in indices)
    with pytest.raises(ValueError, match="training clip"):
        sample_spec(3, 0, pairs="unseen")
    with pytest.raises(ValueError, match="sometimes"):
        sample_spec(3, 0, pairs="sometimes")


def test_attributes_cover_everything_and_colours_differ():
    assert {spec.motion for spec in TRAINING} == set(MOTIONS)
    assert {spec.pattern for spec in TRAINING} == set(PATTERNS)
    assert all(spec.colour != spec.background for spec in TRAINING)
    assert all(0.34 <= spec.diameter <= 0.44 and 14 <= spec.speed <= 30 for spec in TRAINING)


def test_words_are_dropped_as_often_as_promised():
    empty = np.mean([caption(spec) == "" for spec in TRAINING])
    assert 0.08 < empty < 0.12
    assert all(caption(spec) for spec in HELD_OUT)
    # A quarter of clips drop each word with probability one half.
    for word in ("say_colour", "say_shape", "say_background"):
        assert 0.10 < np.mean([not getattr(spec, word) for spec in TRAINING]) < 0.15
    whole = np.mean([spec.say_colour and spec.say_shape and spec.say_background for spec in TRAINING])
    assert 0.75 < whole < 0.81  # 3/4 + 1/4 * 1/8


def test_caption_round_trip():
    for spec in TRAINING + HELD_OUT:
        facts = parse_caption(caption(spec))
        said = spec.say_anything
        assert facts.colour == (spec.colour if said and spec.say_colour else None)
        assert facts.shape == (spec.shape if said and spec.say_shape else None)
        assert facts.background == (spec.background if said and spec.say_background else None)
        assert facts.motion == (spec.motion if said else None)
        assert facts.pattern == (spec.pattern if said else None)


def test_caption_wording():
    full = "a red circle bounces over a blue checkerboard"
    facts = parse_caption(full)
    assert (facts.colour, facts.shape, facts.motion) == ("red", "circle", "bounces")
    assert (facts.background, facts.pattern) == ("blue", "checkerboard")
    facts = parse_caption("A shape drifts left over a stripes.")
    assert (facts.colour, facts.shape, facts.motion, facts.background) == (None, None, "drifts left", None)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("a purple circle bounces over a blue plain", "purple"),
        ("a red circle jumps over a blue plain", "jumps"),
        ("a red circle bounces over a blue plain today", "today"),
        ("a red circle bounces", "over a .colour. pattern"),
    ],
)
def test_other_captions_are_refused_by_name(text, word):
    with pytest.raises(ValueError, match=word):
        parse_caption(text)


def test_sprite_and_background_have_their_colours():
    for spec in TRAINING[:40]:
        frame = render(spec, 1)[0]
        x, y = sprite_path(spec, 1)[0].astype(int)
        assert np.array_equal(frame[y, x], COLOURS[spec.colour])
        far = ((y + 32) % 64, (x + 48) % 96)
        expected = background_image(spec.background, spec.pattern)[far]
        assert np.abs(frame[far] - expected).max() <= 0.5


def test_plain_background_is_the_dimmed_colour():
    image = background_image("red", "plain", 32, 48)
    assert np.allclose(image, np.asarray(COLOURS["red"]) * BASE_TONE)


@pytest.mark.parametrize("motion", DRIFTS)
def test_drifts_wrap_on_the_torus_at_constant_speed(motion):
    spec = replace(TRAINING[0], motion=motion, speed=20.0)
    path = sprite_path(spec, 161, fps=16)
    size = np.array([96, 64])
    assert (path >= 0).all() and (path < size).all()
    steps = (np.diff(path, axis=0) + size / 2) % size - size / 2
    assert np.allclose(steps, np.array(DRIFTS[motion]) * 20.0 / 16)


def test_bounces_stay_inside_and_keep_their_speed():
    for spec in TRAINING[:60]:
        path = sprite_path(replace(spec, motion="bounces"), 400, fps=16)
        radius = spec.diameter * 32
        assert (path >= radius - 1e-6).all() and (path <= np.array([96, 64]) - radius + 1e-6).all()
        velocity = np.abs(np.diff(path, axis=0)) * 16
        off_axis = np.degrees(np.arctan2(np.median(velocity[:, 1]), np.median(velocity[:, 0])))
        assert 24.9 < off_axis < 65.1
        assert np.median(np.linalg.norm(velocity, axis=1)) == pytest.approx(spec.speed)


def test_circles_run_clockwise_around_the_centre():
    spec = replace(TRAINING[0], motion="circles")
    path = sprite_path(spec, 33, fps=16) - np.array([48, 32])
    assert np.allclose(np.linalg.norm(path, axis=1), spec.orbit * 64)
    cross = path[:-1, 0] * path[1:, 1] - path[:-1, 1] * path[1:, 0]
    assert (cross > 0).all()  # y points down


@pytest.mark.parametrize("name", CHOICES)
def test_what_is_unknown_is_not_drawn(name):
    with pytest.raises(ValueError, match=f"{name} is 'hexagon': expected one of {next(iter(CHOICES[name]))}"):
        replace(TRAINING[0], **{name: "hexagon"})


def test_sizes_that_cannot_be_drawn_are_refused():
    with pytest.raises(ValueError, match="multiples of 16"):
        render(TRAINING[0], 5, height=60)
    with pytest.raises(ValueError, match="num_frames"):
        render(TRAINING[0], 0)
    assert render(TRAINING[0], 2, height=96, width=160).shape == (2, 96, 160, 3)


def test_motions_of_choice_leave_all_else_alone():
    motions = ("circles", "circles", "drifts up")
    chosen = [sample_spec(3, index, motions=motions) for index in range(600)]
    share = sum(spec.motion == "circles" for spec in chosen) / len(chosen)
    assert {spec.motion for spec in chosen} == set(motions) and 0.6 < share < 0.73
    assert all(replace(spec, motion=as_ever.motion) == as_ever
               for spec, as_ever in zip(chosen, (sample_spec(3, index) for index in range(600)), strict=True))
    with pytest.raises(ValueError, match="'hops' is not one of drifts left"):
        sample_spec(3, 0, motions=("hops",))
