"""Every metric sees the defect that it is for, in the size that was synthesised, and not the others'."""

import numpy as np
import pytest

from utils.metrics import METRICS, measure

FPS, SECONDS, SIZE = 8, 6, (64, 96)
FRAMES = FPS * SECONDS


def texture(height=SIZE[0], width=SIZE[1], seed=0):
    """A smooth colourful picture [H, W, 3], float, 40 to 215, periodic."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width][..., None]
    image = sum(
        rng.normal(size=3) * np.sin(2 * np.pi * (a * x / width + b * y / height) + rng.uniform(0, 7, 3))
        for a, b in ((3, 1), (-2, 4), (5, 2), (1, -3), (6, -5))
    )
    return 128 + 87 * image / np.abs(image).max()


def still(frames=FRAMES, seed=0):
    return np.repeat(texture(seed=seed)[None], frames, 0)


def moving(right, down, frames=FRAMES):
    """Whole-frame motion in pixels a frame, by the shift theorem."""
    spectrum = np.fft.fft2(texture(), axes=(0, 1))
    fy, fx = np.fft.fftfreq(SIZE[0])[:, None, None], np.fft.fftfreq(SIZE[1])[None, :, None]
    shifted = (spectrum * np.exp(-2j * np.pi * t * (fx * right + fy * down)) for t in range(frames))
    return np.stack([np.fft.ifft2(one, axes=(0, 1)).real for one in shifted])


def blurred(image):
    for axis in (0, 1):
        image = (np.roll(image, 2, axis) + np.roll(image, 1, axis) + image + np.roll(image, -1, axis)) / 4
    return image


def scores(frames):
    series = measure(np.clip(frames, 0, 255).round().astype(np.uint8), FPS)
    return {name: metric.value(series) for name, metric in METRICS.items()}


CLEAN = scores(still())
QUIET = ("colour_drift", "sharpness_drift", "corner", "motion", "flicker", "noise")


def ramp(last, first=0.0):
    """A value per frame that rises after the first second."""
    return np.concatenate([np.full(FPS, first), np.linspace(first, last, FRAMES - FPS)])[:, None, None, None]


def test_a_still_picture_has_no_defect():
    assert all(abs(CLEAN[name]) < 0.02 for name in QUIET if name != "noise") and CLEAN["noise"] < 0.7
    assert CLEAN["jump"] == 0


def only(found, *expected):
    """Nothing but the expected metrics says that something is wrong."""
    assert all(abs(found[name] - CLEAN[name]) < 0.2 for name in QUIET if name not in expected)


def test_colour_drift_is_the_size_of_a_tint():
    tint = np.array([30.0, 0, -30]) * ramp(1.0)
    found = scores(still() * 0.7 + 30 + tint)
    # Means move by 30 of two channels in three, stds do not, and the last second's mean is just below its end.
    assert found["colour_drift"] == pytest.approx(30 * np.sqrt(2 / 6) * 0.91, rel=0.03)
    only(found, "colour_drift")


def test_sharpness_drift_is_the_detail_lost():
    frames = still()
    frames[3 * FPS :] = blurred(blurred(texture()))
    before, after = (np.hypot(*np.gradient(x @ [0.299, 0.587, 0.114])).mean() for x in (texture(), frames[-1]))
    found = scores(frames)
    assert found["sharpness_drift"] == pytest.approx(np.log2(after / before), abs=0.02) and after < 0.8 * before
    only(found, "sharpness_drift", "colour_drift", "flicker")


def test_a_jump_is_found_where_it_is():
    frames = moving(0.4, 0.0)
    assert scores(frames)["jump"] < 1.3
    frames[30:] = np.roll(frames[30:], 20, axis=2)
    found = scores(frames)
    assert found["jump"] > 4 and found["jump_time"] == pytest.approx(30 / FPS)
    assert METRICS["jump"].over_time(measure(np.clip(frames, 0, 255).astype(np.uint8), FPS)).argmax() == 30 // FPS


@pytest.mark.parametrize(("down", "right"), [(0, 0), (0, -1), (-1, 0), (-1, -1)])
def test_a_corner_that_turns_grey(down, right):
    frames, grey = still(), ramp(1.0)
    rows, columns = (slice(0, size // 5) if at == 0 else slice(-(size // 5), None) for at, size in
                     ((down, SIZE[0]), (right, SIZE[1])))  # fmt: skip
    frames[:, rows, columns] = frames[:, rows, columns] * (1 - grey) + 128 * grey
    assert scores(frames)["corner"] > 0.75
    assert scores(still() * (1 - 0.5 * grey) + 64 * grey)["corner"] < 0.1  # all of the frame alike is not the corner


@pytest.mark.parametrize(("right", "down", "angle"), [(0.6, 0, 0), (0, -0.5, 90), (-0.5, 0, 180), (0.4, 0.4, 315)])
def test_motion_has_its_speed_and_direction(right, down, angle):
    found = scores(moving(right, down))
    # The first frame has no motion.
    expected = np.hypot(right, down) * FPS / SIZE[0] * (1 - 1 / FRAMES)
    assert found["motion"] == pytest.approx(expected, rel=0.1)
    assert abs((found["motion_direction"] - angle + 180) % 360 - 180) < 6
    only(found, "motion", "noise", "corner")


def test_flicker_is_not_a_fade():
    wave = np.where(np.arange(FRAMES) % 2, 3.0, -3.0)[:, None, None, None]
    assert scores(still() + wave)["flicker"] == pytest.approx(12, rel=0.1)
    assert scores(still() + np.linspace(-10, 10, FRAMES)[:, None, None, None])["flicker"] < 0.3


@pytest.mark.parametrize("std", [4.0, 12.0])
def test_noise_is_its_std(std):
    rng = np.random.default_rng(0)
    luma = np.sqrt(0.299**2 + 0.587**2 + 0.114**2)  # of noise that differs between channels
    frames = still() * 0.6 + 50 + rng.normal(0, std, (FRAMES, *SIZE, 3))
    assert scores(frames)["noise"] == pytest.approx(std * luma, rel=0.15)


def test_a_large_video_is_measured_in_the_same_units():
    small = moving(0.5, 0.0, frames=2 * FPS)
    large = small.repeat(4, 1).repeat(4, 2)
    assert scores(large)["motion"] == pytest.approx(scores(small)["motion"], rel=0.05)


def test_no_frames_are_refused():
    with pytest.raises(ValueError, match="no frames"):
        measure([], FPS)
