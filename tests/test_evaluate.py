"""`scripts/evaluate.py` on folders of videos, and on those of a random bundle: both kinds of model, bad input."""

import json
from dataclasses import replace

import numpy as np
import pytest
from diffusers import WanTransformer3DModel
from distill import SCORE

from scripts.evaluate import main
from tests import tiny
from utils import video
from utils.metrics import METRICS
from utils.sprites.read import READERS
from utils.sprites.world import FPS, HELD_OUT_START, caption, render, sample_spec
from utils.video import read_video

SPEC = sample_spec(0, HELD_OUT_START)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tiny.write_world(tmp_path_factory.mktemp("world"))
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
    assert together["windows"] == apart["windows"] and set(together["metrics"]) == set(METRICS)
    assert set(together["windows"]["0-5 s"]["captioned"]) <= set(READERS)
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
        (("--stories=0",), "--stories is 0"),
        (("--stories=2",), "video.frames_per_chunk is 2"),
        (("--stories=2", *tiny.STORIES, "--shot_chunks", "2", "1"), "--shot_chunks 2 1"),
        (("--stories=2", *tiny.STORIES, "--since=2", "--between=3"), "--between 3"),
    ],
)
def test_bad_input_is_named(world, capsys, arguments, word):
    code, error = run(world, capsys, *arguments)
    assert code == 2 and word in error.splitlines()[-1]


def test_a_teacher_for_other_latents_is_refused(world, capsys, tmp_path):
    WanTransformer3DModel(**{**SCORE, "in_channels": 8}, num_layers=1).save_pretrained(tmp_path)
    code, error = run(world, capsys, "--teacher", tmp_path)
    assert code == 2 and "in_channels is 8" in error


def test_stories_are_made_and_their_recall_is_told(world, capsys, tmp_path):
    options = ["--stories=3", *tiny.STORIES]
    code, result = run(world, capsys, *options, "--since", 1, 2, f"--output_folder={tmp_path}")
    assert code == 0 and result["stories"] == 6 and result["stories_per_minute"] > 0
    assert {name: found["shots"] for name, found in result["recall"]["since"].items()} == {"1": 3, "4": 3}
    assert set(result["chance"]) < set(result["first"]) < set(result["recall"]["all"][""])
    assert [len(read_video(tmp_path / f"000{number}.mp4")) for number in (0, 5)] == [57, 69]
    assert main([str(tmp_path), "--json"]) == 0  # the sidecars tell the stories
    again = json.loads(capsys.readouterr().out.splitlines()[-1])["folders"]["."]
    assert again["recall"]["since"]["1"]["shots"] == 3 and again["videos"] == 6
    code, result = run(world, capsys, *options, "--chunks=4", "--shot_chunks", 1, 1)
    assert code == 0 and result["stories"] == 3


# Videos that are there


def write_video(folder, name, spec=SPEC, seconds=1, **sidecar):
    path = folder / f"{name}.mp4"
    video.write_video(path, render(spec, seconds * FPS), FPS)
    path.with_suffix(".json").write_text(json.dumps({"prompt": caption(spec), "fps": FPS} | sidecar))
    return path


def test_a_folder_of_videos(tmp_path, capsys):
    write_video(tmp_path, "000", replace(SPEC, say_colour=False), 5)
    wrong = "a red circle bounces over a white stripes"
    write_video(tmp_path, "001", replace(SPEC, say_colour=True), 5, prompt=wrong)
    assert main([str(tmp_path), "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])["folders"]["."]
    assert result["videos"] == 2 and set(result["windows"]) == {"0-5 s"}
    first = result["per_video"]["000.mp4"]["windows"]["0-5 s"]
    assert first["left_out"] == {"colour": 1.0}
    assert set(first["captioned"].values()) == {1.0} and "colour" not in first["captioned"]
    second = result["per_video"]["001.mp4"]["windows"]["0-5 s"]["captioned"]
    expected = {"shape": "circle", "motion": "bounces", "background": "white", "pattern": "stripes"}
    assert {name: second[name] == 1.0 for name in expected} == {n: getattr(SPEC, n) == v for n, v in expected.items()}


def test_sub_folders_are_compared(tmp_path, capsys):
    tmp_path.joinpath("a").mkdir()
    write_video(tmp_path / "a" / "deep", "000")
    other = "square" if SPEC.shape != "square" else "circle"
    write_video(tmp_path / "b", "000", prompt=caption(replace(SPEC, shape=other, say_shape=True)))
    assert main([str(tmp_path), "--json"]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    folders = json.loads(last)["folders"]
    assert list(folders) == ["a/deep", "b"]
    assert folders["a/deep"]["captioned"]["shape"] > folders["b"]["captioned"]["shape"]
    header, *rows = table[-3:]
    assert header.split()[-1] == "noise" and [row.split()[0] for row in rows] == ["a/deep", "b"]


ODD = {
    "none": (None, "no caption"),
    "broken": ("{", "no caption"),
    "binary": ("\udcff", "no caption"),
    "no fps": ('{"prompt": "a red circle bounces over a blue plain"}', "fps"),
    "another world": ('{"prompt": "a purple cat", "fps": 16}', "purple"),
    "list": ("[1]", "no caption"),
    "fps": ('{"prompt": "", "fps": NaN}', "positive"),
}


@pytest.mark.parametrize("odd", ODD)
def test_an_odd_caption_costs_the_caption_only(tmp_path, capsys, caplog, odd):
    path = write_video(tmp_path, "000")
    write_video(tmp_path, "001")
    text, word = ODD[odd]
    path.with_suffix(".json").unlink()
    if text is not None:
        path.with_suffix(".json").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert main([str(tmp_path), "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])["folders"]["."]
    assert result["videos"] == 2 and result["windows"] and not result["per_video"]["000.mp4"]["windows"]
    assert result["per_video"]["000.mp4"]["metrics"]["noise"] >= 0
    assert [word in record.getMessage() for record in caplog.records] == [True]


def test_what_cannot_be_read_is_left_out_or_named(tmp_path, capsys, caplog):
    (tmp_path / "000.mp4").write_text("no video")
    assert main([str(tmp_path)]) == 2
    assert "no video there can be read" in capsys.readouterr().err and "000.mp4" in caplog.text
    write_video(tmp_path, "001")
    assert main([str(tmp_path)]) == 0


@pytest.mark.parametrize(("name", "word"), [("nowhere", "does not exist"), ("", "no finished .mp4")])
def test_what_is_missing_is_named(tmp_path, capsys, name, word):
    assert main([str(tmp_path / name)]) == 2
    assert word in capsys.readouterr().err


def test_nothing_to_evaluate(capsys):
    assert main([]) == 2 and "nothing to evaluate" in capsys.readouterr().err
