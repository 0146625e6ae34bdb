"""Images and videos that a call goes on from."""

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.data.vae_clip import encode_frames
from pipeline.generate.pipeline import PackForcingPipeline
from tests import tiny
from utils.config import ConfigError

PROMPT = "a red circle bounces over a blue plain"


@pytest.fixture(scope="module")
def pipe(bundle):  # two latent frames a chunk: 5 pixel frames, then 8 a chunk
    video = {"height": tiny.HEIGHT, "width": tiny.WIDTH, "trained_frames": 10, "frames_per_chunk": 2}
    pipe = PackForcingPipeline.from_pretrained(bundle, video=video)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def clip(frames, seed=0):
    """Float [F, H, W, 3] in 0..1."""
    return np.random.default_rng(seed).random((frames, tiny.HEIGHT, tiny.WIDTH, 3), np.float32)


def latents(pipe, **options):
    return pipe(PROMPT, output_type="latent", **options).frames


def encoded(pipe, frames):
    return encode_frames(pipe.vae, (frames * 255).round().astype(np.uint8)[None], whole=False)


@pytest.mark.parametrize(("frames", "kept"), [(13, slice(0, 13)), (16, slice(3, 16)), (5, slice(0, 5))])
def test_a_video_goes_on_from_its_last_whole_chunks(pipe, frames, kept):
    given = (clip(frames) * 255).round() / 255
    made = latents(pipe, video=given, num_frames=29)
    expected = encoded(pipe, given[kept])
    torch.testing.assert_close(made[:, :, : expected.shape[2]], expected, atol=1e-4, rtol=0)
    assert made.shape[2] == 8
    other = latents(pipe, video=1 - given, num_frames=29)
    assert (made[:, :, -2:] - other[:, :, -2:]).abs().max() > 1e-3, "what follows does not see what was given"


def test_what_follows_is_a_rollout_that_was_committed_to(pipe):
    given = clip(13)
    rollout = pipe.rollout(PROMPT, num_frames=29)
    for part in latents(pipe, video=given, num_frames=29)[:, :, :4].split(2, dim=2):
        rollout.commit(part)
    expected = torch.cat([part for _, part in rollout.run(2)], dim=2)
    assert torch.equal(latents(pipe, video=given, num_frames=29)[:, :, 4:], expected)


def test_an_image_is_held_for_a_chunk(pipe):
    picture = (clip(1)[0] * 255).round().astype(np.uint8)
    made = latents(pipe, image=Image.fromarray(picture), num_frames=13)
    expected = encoded(pipe, np.repeat(picture[None] / 255, 5, axis=0))
    torch.testing.assert_close(made[:, :, :2], expected, atol=1e-4, rtol=0)
    frames = pipe(PROMPT, image=Image.fromarray(picture), num_frames=13).frames
    assert frames.shape == (1, 13, tiny.HEIGHT, tiny.WIDTH, 3)


def test_each_prompt_has_its_video(pipe):
    both = np.stack([clip(5), clip(5, seed=1)])
    made = pipe([PROMPT, "a green shape"], video=both, num_frames=13, output_type="latent").frames
    alone = pipe("a green shape", video=both[1], num_frames=13, output_type="latent").frames
    torch.testing.assert_close(made[1:], alone, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"video": clip(29), "num_frames": 29}, "the given frames fill 4 chunks: ask for .* more than 4"),
        ({"video": np.stack([clip(5)] * 3), "num_frames": 13}, "3 given videos for 1: give one"),
        ({"video": clip(5), "image": clip(1)[0]}, "image and video are both given"),
        ({"video": "clip.mp4"}, "video is of type str: expected images or frames"),
        ({"video": (clip(5) * 255).astype(np.uint8)}, "video has values from .* to 2.*: expected frames as floats"),
    ],
)
def test_bad_conditions_are_named(pipe, options, message):
    with pytest.raises(ConfigError, match=message):
        pipe(PROMPT, **options)
