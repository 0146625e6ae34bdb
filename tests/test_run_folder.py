"""A training run's folder: one run at a time, stopped by a signal and resumed, and every step logged once."""

import json
import os
import resource
import signal
from contextlib import redirect_stderr
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_trainer import LineStage, micro_files, run_line

from pipeline.train.checkpoints import list_checkpoints
from pipeline.train.flow import TeacherStage
from tests import scale_runs
from tests.scale_runs import arguments, batch_of, finish, stage_overrides, start
from train import main
from utils.cli import INTERRUPTED, TERMINATED, run_command
from utils.lock import locked
from utils.tracking import Tracker

SIGNALS = {signal.SIGINT: INTERRUPTED, signal.SIGTERM: TERMINATED}


def logged(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]


class SignalledStage(LineStage):
    """Signal `number` comes twice in the third step, as under torchrun."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number

    def loss(self, role, batch, step):
        if step == 2:
            os.kill(os.getpid(), self.number)
            os.kill(os.getpid(), self.number)
        return super().loss(role, batch, step)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_saves_a_checkpoint_and_the_run_goes_on_from_it(tmp_path, number, capsys):
    _, whole = run_line(tmp_path / "whole")
    stage = SignalledStage(number)
    status = run_command(lambda: run_line(tmp_path / "cut", stage=stage, save=True, log_every=100) and 0)
    assert status == SIGNALS[number]
    (checkpoint,) = list_checkpoints(tmp_path / "cut" / "checkpoints")
    assert checkpoint.name == "step-00000003" and logged(tmp_path / "cut") == [3]
    assert not (tmp_path / "cut" / "bundle").exists()
    _, resumed = run_line(tmp_path / "cut", save=True)
    assert torch.equal(whole["weight"], resumed["weight"]) and logged(tmp_path / "cut") == [3, 4, 5, 6]


def run_signalled(argv: list[str], rank: int, number: int) -> int:
    """The command line; one of its ranks gets a signal in its second step."""
    loss = TeacherStage.loss

    def signalled(stage, role, batch, step):
        if step == 1 and os.environ["RANK"] == str(rank):
            os.kill(os.getpid(), number)
        return loss(stage, role, batch, step)

    TeacherStage.loss = signalled
    return scale_runs.run(argv)


@pytest.mark.parametrize(("rank", "number"), [(0, signal.SIGINT), (1, signal.SIGTERM)])
def test_a_signal_to_one_of_two_ranks_stops_both_with_a_checkpoint(tmp_path, rank, number):
    scale_runs.write_inputs(tmp_path)
    argv = arguments(tmp_path, tmp_path / "run", *stage_overrides(tmp_path, "teacher"), *batch_of(2))
    assert finish(start(2, run_signalled, argv, rank, number)) == [SIGNALS[number]] * 2
    (checkpoint,) = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert checkpoint.name == "step-00000002" and logged(tmp_path / "run") == [1, 2]


def test_redone_steps_are_logged_once(tmp_path):
    run_line(tmp_path, max_steps=2, save=True)
    with open(tmp_path / "log.jsonl", "a", encoding="utf-8") as file:  # of a run killed after its last checkpoint
        file.write('{"step": 3, "loss": 0}\n{"step": 4, "lo')
    run_line(tmp_path, max_steps=4, save=True)
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4] and records[2]["loss"] > 0


def test_the_last_step_is_logged_however_seldom_that_is_asked_for(tmp_path):
    run_line(tmp_path, max_steps=3, log_every=50)
    assert logged(tmp_path) == [3]


def test_one_run_a_folder(tmp_path, capsys):
    config, run = micro_files(tmp_path), tmp_path / "run"
    run.mkdir()
    with locked(run, "output folder"):
        assert main(["--config_path", str(config), "--logdir", str(run)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: train.logdir {run} is in use by process {os.getpid()}")
    assert not (run / "config.yaml").exists()


def run_on_full_disk(folder: Path, limit: int) -> int:
    """A limit on the size of files stands for the disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    with open(folder / "stderr", "w", encoding="utf-8") as file, redirect_stderr(file):
        return run_command(lambda: run_line(folder / "run", save=True, log_every=50) and 0)


@pytest.mark.parametrize("limit", [2000, 7000])
def test_a_full_disk_is_one_line(tmp_path, limit):
    """There is room for the resolved config, or not even for that."""
    assert finish(start(1, run_on_full_disk, tmp_path, limit)) == [2]
    *progress, error = (tmp_path / "stderr").read_text().splitlines()
    assert error.startswith(f"error: checkpoint of step 6 could not be written to {tmp_path}")
    assert "too large" in error and not any("Traceback" in line for line in progress)


def read_wandb(folder: Path) -> list[dict]:
    """The records of the offline run in `folder`: a log of LevelDB's format, here shorter than one of its blocks."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = (folder / "wandb").glob("offline-run-*/run-*.wandb")
    content, rows = file.read_bytes()[7:], []  # after the header
    assert len(content) < 2**15
    while content:
        length = int.from_bytes(content[4:6], "little")  # after a checksum, before the kind
        record, content = Record.FromString(content[7 : 7 + length]), content[7 + length :]
        if record.WhichOneof("record_type") == "history":
            rows.append({item.nested_key[0]: json.loads(item.value_json) for item in record.history.item})
    return rows


def run_tracked(argv: list[str]) -> int:
    os.environ["WANDB_MODE"] = "offline"
    return scale_runs.run(argv)


def check_tracked(folder: Path, kind: str) -> None:
    """That what was logged is what `log.jsonl` says."""
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert len(records) == 2
    if kind == "wandb":
        rows = {row["_step"]: row for row in read_wandb(folder)}
        found = [(step, rows[step]["loss"], rows[step]["grad_norm"]) for step in sorted(rows)]
    else:
        events = EventAccumulator(str(folder / "tensorboard")).Reload()
        losses, norms = events.Scalars("loss"), events.Scalars("grad_norm")
        found = [(a.step, a.value, b.value) for a, b in zip(losses, norms, strict=True)]
    for record, values in zip(records, found, strict=True):
        assert values == pytest.approx((record["step"], record["loss"], record["grad_norm"]), rel=1e-5)


@pytest.mark.parametrize("kind", ["wandb", "tensorboard"])
def test_trackers_work_offline_on_one_rank_and_on_two(tmp_path, kind):
    scale_runs.write_inputs(tmp_path)
    overrides = [*stage_overrides(tmp_path, "teacher"), f"train.tracker={kind}", "train.max_steps=2"]
    for ranks in (1, 2):
        argv = arguments(tmp_path, tmp_path / f"run{ranks}", *overrides, *batch_of(ranks))
        assert finish(start(ranks, run_tracked, argv)) == [0] * ranks
        check_tracked(tmp_path / f"run{ranks}", kind)


def test_tensorboard_forgets_redone_steps_too(tmp_path):
    for first, value in ((0, 1.0), (1, 2.0)):
        tracker = Tracker(tmp_path, "tensorboard", "test", {}, is_main=True)
        tracker.start(first)
        for step in range(first + 1, 4):
            tracker.log({"loss": value}, step)
        tracker.close()
    scalars = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    assert [(scalar.step, scalar.value) for scalar in scalars] == [(1, 1.0), (2, 2.0), (3, 2.0)]
