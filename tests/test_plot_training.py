"""Training curves: what is drawn, that resumed runs are read right, and bad input."""

import json

import numpy as np
import pytest

from scripts.plot_training import PANELS, choose, main, read_log


def write_run(folder, records):
    folder.mkdir()
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


@pytest.fixture
def dmd(tmp_path):
    steps = [
        {"step": s, "loss": 2.0 / s, "critic/loss": 1.0 / s, "generator/loss": 2.0 / s, "critic/grad_norm": 0.5,
         "generator/grad_norm_compressor": 0.1, "generator/critic_lag": 0.9, "seconds": 1.0}
        for s in range(1, 30)
    ]  # fmt: skip
    return write_run(tmp_path / "dmd", [*steps, {"step": 20, "sample/colour": 1.0, "sample/long/colour": 0.5}])


def test_panels_take_the_curves_that_belong_to_them(dmd):
    curves = read_log(dmd)
    drawn = {title: set(choose(curves, names)) for title, (names, _) in PANELS.items()}
    assert drawn == {
        "loss": {"critic/loss", "generator/loss"},
        "gradient and update norms": {"critic/grad_norm", "generator/grad_norm_compressor"},
        "rollouts against data": {"generator/critic_lag"},
        "sample videos read right": {"sample/colour", "sample/long/colour"},
    }


def test_steps_that_a_resumed_run_repeats_count_once(tmp_path):
    run = write_run(tmp_path / "run", [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 9.0}, {"step": 2, "loss": 3.0}])
    steps, values = read_log(run)["loss"]
    assert np.array_equal(steps, [1, 2]) and np.array_equal(values, [1.0, 3.0])


def test_runs_are_drawn_one_below_the_other(dmd, tmp_path):
    teacher = write_run(tmp_path / "teacher", [{"step": s, "loss": 1.0, "grad_norm": float("nan")} for s in (1, 2)])
    assert main([str(teacher), str(dmd), "--output", str(tmp_path / "sub" / "both.png")]) == 0
    assert main([str(dmd)]) == 0
    both, one = (tmp_path / name for name in ("sub/both.png", "dmd/training.png"))
    assert both.read_bytes()[:4] == one.read_bytes()[:4] == b"\x89PNG"
    assert both.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("records", "word"), [(None, "does not exist"), ("{", "line 1"), ('{"loss": 1}', "line 1"), ("", "nothing logged")]
)
def test_bad_runs_are_named(tmp_path, capsys, records, word):
    run = tmp_path / "run"
    if records is not None:
        run.mkdir()
        (run / "log.jsonl").write_text(records)
    assert main([str(run)]) == 2
    error = capsys.readouterr().err
    assert word in error and str(run) in error and len(error.splitlines()) == 1
