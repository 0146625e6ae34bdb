"""`scripts/ablate.py`: the grid, what it resumes, its tables and its page."""

import csv
import json
import re

import numpy as np
import pytest

from scripts import ablate
from scripts.ablate import axis, main, summarise
from tests import tiny
from utils.config import ConfigError
from utils.distributed import World
from utils.video import read_video


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tiny.write_world(tmp_path_factory.mktemp("world"))
    (root / "prompts.txt").write_text("a red circle bounces over a blue plain\na purple cat\n")
    assert main(arguments(root, root / "out")) == 0
    return root


def arguments(world, out, *more):
    return [
        f"--config_path={world / 'config.yaml'}", f"--data_path={world / 'prompts.txt'}", f"--output_folder={out}",
        "--vary=cache.top_k=0,1", "--vary=cache.kind=pack cache.sink=1 | cache.kind=window", "--seeds=2", "--seconds=1",
        *more,
    ]  # fmt: skip


def results(folder):
    with (folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_axes():
    assert axis("a.b=1,2") == [["a.b=1"], ["a.b=2"]]
    assert axis("steps=[1,2],[3]") == [["steps=[1,2]"], ["steps=[3]"]]
    assert axis("a=1 b=2 | a=3") == [["a=1", "b=2"], ["a=3"]]
    for bad in ("a", "a=", "=1,2"[:1]):
        with pytest.raises(ConfigError, match="--vary"):
            axis(bad)


def test_every_cell_makes_every_video(world):
    rows = results(world / "out")
    assert len(rows) == 4 * 2 * 2 and len({row["video"] for row in rows}) == 16
    assert [row["cache.kind"] for row in rows[:8]] == ["pack"] * 4 + ["window"] * 4
    assert {row["seed"] for row in rows} == {"0", "1"}
    for row in rows:
        assert (row["said"] == "") == (row["prompt"] == "a purple cat") and float(row["noise"]) >= 0
    pack, window = (next(row for row in rows if row["cell"].endswith(kind)) for kind in ("sink=1", "kind=window"))
    assert int(pack["bytes"]) > int(window["bytes"]) > 0
    one, other = (read_video(world / "out" / row["video"]) for row in (rows[0], rows[2]))
    assert one.shape == other.shape and np.abs(one.astype(int) - other).mean() > 1  # seeds differ
    assert json.loads((world / "out" / rows[0]["video"]).with_suffix(".json").read_text())["curves"]["noise"]


def test_mean_and_spread_are_over_seeds():
    values = {(0, "a"): 1.0, (0, "b"): 3.0, (1, "a"): 5.0, (1, "b"): 5.0}
    rows = [{"cell": "x", "seed": seed, "prompt": prompt, "v": value} for (seed, prompt), value in values.items()]
    (cell,) = summarise([*rows, {"cell": "x", "seed": 1, "prompt": "c"}])
    assert cell == {"cell": "x", "videos": 5, "v": 3.5, "v std": 1.5}


def test_what_is_there_is_kept(world, capsys, monkeypatch):
    out = world / "out"
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.mp4")}
    lost, damaged, *_ = sorted(times)
    lost.unlink()
    damaged.with_suffix(".json").write_text("{")
    assert main(arguments(world, out)) == 0
    assert {path for path, at in times.items() if path.stat().st_mtime_ns != at} == {lost, damaged}
    monkeypatch.setattr(ablate, "load_pipeline", None)  # nothing is loaded where nothing is missing
    assert main(arguments(world, out)) == 0


def test_the_page_needs_nothing_from_outside(world):
    page = (world / "out" / "page.html").read_text()
    assert len(re.findall(r'<video [^>]*src="data:video/mp4;base64,', page)) == 2 * 4  # prompts, cells; the first seed
    assert len(re.findall(r'<img [^>]*src="data:image/png;base64,', page)) == 2
    assert not re.search(r"""(src|href)=["'](?!data:)""", page) and "http" not in re.sub(r"base64,[^\"]*", "", page)
    assert page.count("<tr>") == 1 + 4 and "±" in page


def test_ranks_share_the_videos(world, tmp_path, monkeypatch):
    monkeypatch.setattr(ablate, "barrier", lambda world: None)  # one rank after the other, in this process
    tasks = ablate.plan(ablate.parse_arguments(arguments(world, tmp_path, "--seconds=1")))[:3]
    ablate.work(tasks, World(0, 2), page_videos=1)
    assert [task.record() is not None for task in tasks] == [True, False, True]
    assert not (tmp_path / "page.html").exists()
    ablate.work(tasks, World(0, 1), page_videos=1)
    assert (tmp_path / "page.html").is_file() and len(results(tmp_path)) == 3


def test_recall_of_stories(world, tmp_path):
    settings = [*tiny.STORIES, "--seconds=2.5", "--shot_chunks", "1", "1"]
    argv = [f"--config_path={world / 'config.yaml'}", f"--output_folder={tmp_path}", "--vary=cache.top_k=0,1"]
    assert main([*argv, *settings, "--stories=2"]) == 0
    rows = results(tmp_path)
    assert len(rows) == 4 and all(0 <= float(row["recall"]) <= 1 for row in rows)
    record = json.loads((tmp_path / rows[0]["video"]).with_suffix(".json").read_text())
    assert len(record["prompt"]) > 2 and {mark["attribute"] for mark in record["recall"]} >= {"colour", "size"}
    page = (tmp_path / "page.html").read_text()
    assert len(re.findall(r'<img [^>]*src="data:image/png;base64,', page)) == 3


@pytest.mark.parametrize(
    ("more", "word"),
    [
        (["--vary=cache.top=1,2"], "cache.top"),
        (["--vary=cache.sink=1,-2"], "cache.sink"),
        (["--seeds=0"], "--seeds"),
        (["--seconds=inf"], "--seconds"),
        (["--data_path=nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_line(world, tmp_path, capsys, more, word):
    assert main(arguments(world, tmp_path, *more)) == 2
    assert word in capsys.readouterr().err.splitlines()[-1]
