"""`scripts/evaluate_held_out.py` on a random bundle: both kinds of model, batches, and bad input."""

import json

import numpy as np
import pytest
from diffusers import WanTransformer3DModel
from distill import SCORE

from scripts.evaluate_held_out import main
from tests import tiny
from utils.sprites.read import MARKED
from utils.video import read_video


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    tiny.write_bundle(root / "bundle")
    (root / "config.yaml").write_text(tiny.CONFIG + f"model: {{bundle: {root / 'bundle'}}}\n")
    WanTransformer3DModel(**SCORE, num_layers=1).save_pretrained(root / "teacher")
    return root


def run(world, capsys, *arguments):
    argv = [f"--config_path={world / 'config.yaml'}", "--captions=3", "--seconds=1", *map(str, arguments)]
    code, (out, err) = main(argv), capsys.readouterr()
    return code, json.loads(out.splitlines()[-1]) if code == 0 else err


def test_videos_do_not_depend_on_the_batch(world, capsys, tmp_path):
    code, together = run(world, capsys, "--batch=3", f"--output_folder={tmp_path / 'a'}")
    assert code == 0 and together["videos"] == 3
    _, apart = run(world, capsys, "--batch=2", f"--output_folder={tmp_path / 'b'}")
    assert together["windows"] == apart["windows"]
    assert set(together["windows"]["0-5 s"]["captioned"]) <= set(MARKED)
    for number in range(3):
        a, b = (read_video(tmp_path / folder / f"{number:04d}.mp4").astype(int) for folder in ("a", "b"))
        assert len(a) == 21 and np.abs(a - b).mean() < 0.5  # 3 chunks of 2 latent frames
        assert json.loads((tmp_path / "a" / f"{number:04d}.json").read_text())["fps"] == 16


def test_a_teacher_makes_clips_of_the_trained_length(world, capsys, tmp_path):
    options = ("sampler.num_steps=2", "sampler.guidance=2", f"--output_folder={tmp_path}")
    code, result = run(world, capsys, "--teacher", world / "teacher", *options)
    assert code == 0 and result["videos"] == 3
    assert len(read_video(tmp_path / "0002.mp4")) == 4 * 10 - 3


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--captions=0",), "--captions"),
        (("--teacher", "nowhere"), "nowhere"),
        (("cache.top=1",), "cache.top"),
    ],
)
def test_bad_input_is_named(world, capsys, arguments, word):
    code, error = run(world, capsys, *arguments)
    assert code == 2 and word in error.splitlines()[-1]


def test_a_teacher_for_other_latents_is_refused(world, capsys, tmp_path):
    WanTransformer3DModel(**{**SCORE, "in_channels": 8}, num_layers=1).save_pretrained(tmp_path)
    code, error = run(world, capsys, "--teacher", tmp_path)
    assert code == 2 and "in_channels is 8" in error
