"""The benchmarks run on a config alone, and their parts add up."""

import json

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch._subclasses.fake_tensor import FakeTensorMode

from scripts import bench_inference, bench_train, soak
from tests import tiny
from utils import timing
from utils.timing import Stopwatch
from utils.video import read_video

CPU = torch.device("cpu")

CONFIG = """
video: {height: 32, width: 48, frames_per_chunk: 1, trained_frames: 4}
model: {random_init: true, num_layers: 1, num_attention_heads: 2, attention_head_dim: 12, ffn_dim: 16, in_channels: 4,
        text_dim: 16, text_len: 6, freq_dim: 8}
cache: {sink: 1, recent: 1, top_k: 1, compressor: {channels: [4]}}
sampler: {steps: [1000, 500]}
inference: {device: cpu, threads: 1}
train: {batch_size: 2, mixed_precision: "no", threads: 1}
dmd: {critic_updates: 5}
"""


@pytest.fixture
def config(tmp_path):
    (tmp_path / "config.yaml").write_text(CONFIG)
    return f"--config_path={tmp_path / 'config.yaml'}"


def last_line(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_parts_of_a_dmd_step(config, tmp_path, capsys):
    teacher = WanTransformer3DModel(num_layers=2, num_attention_heads=2, attention_head_dim=12, ffn_dim=16,
                                    in_channels=4, out_channels=4, text_dim=16, freq_dim=8)  # fmt: skip
    teacher.save_config(tmp_path / "larger")
    assert bench_train.main([config, "--repeats=1", f"dmd.teacher={tmp_path / 'larger'}"]) == 0
    found = last_line(capsys)
    assert found["timed_steps"] == 2 and found["clip_tokens"] == 4 * 2 * 3 and found["samples_per_rank"] == 2
    sizes = found["parameters"]
    assert sizes["teacher"] == sizes["critic"] == sum(p.numel() for p in teacher.parameters())
    for parts in found["parts"].values():
        inside = sum(parts[part]["seconds"] for part in (*bench_train.IN_LOSS, "other", *bench_train.AFTER_LOSS))
        assert inside == pytest.approx(parts["total"]["seconds"])
        assert all(parts[part]["seconds"] > 0 for part in ("rollout", "fake_score", "backward", "optimizer"))
        assert 0 < parts["rollout_forwards"]["seconds"] < parts["rollout"]["seconds"]
        assert parts["total"]["peak_bytes"] is None and parts["rollout"]["peak_bytes"] > 2**20
    tokens = {
        (role, part): round(row["tokens_per_s"] * row["seconds"])
        for role, parts in found["parts"].items()
        for part, row in parts.items()
        if row["tokens_per_s"]
    }
    clip = 2 * 24
    for role in bench_train.ROLES:
        # Chunks stop at the first and at the second of two steps equally often, then comes the commit, of all but one.
        assert tokens[role, "rollout"] == tokens[role, "rollout_forwards"] == (1.5 + 3 / 4) * clip
        assert tokens[role, "fake_score"] == tokens[role, "backward"] == clip
    assert tokens["generator", "real_score"] == 2 * clip and ("critic", "real_score") not in tokens
    critic, generator = (found["parts"][role]["total"]["seconds"] for role in bench_train.ROLES)
    assert found["seconds_per_step"] == pytest.approx(critic + generator / 5 + found["seconds_outside"])
    assert found["seconds_outside"] > 0


def test_where_weights_are_not_random_they_must_be_there(config, capsys):
    assert bench_train.main([config, "model.random_init=false"]) == 2
    assert "error: setting `" in capsys.readouterr().err
    assert bench_train.main([config, "--repeats=0"]) == 2
    assert "--repeats is 0" in capsys.readouterr().err


def test_parts_of_a_generated_chunk(config, capsys):
    assert bench_inference.main([config, "--chunks=2", "--vae_chunks=0"]) == 0
    found = last_line(capsys)
    seconds = found["seconds_per_chunk"]
    assert 0 < seconds["commit"] < seconds["total"] and found["floor_ratio"] > 1
    assert found["overlap"] is None and found["kv"]["mid"]["tokens"] > 0 and found["peak_bytes"] > 2**20


@pytest.fixture
def short(monkeypatch):
    """Six chunks are enough."""
    monkeypatch.setattr(soak, "SETTLED", 2)
    monkeypatch.setattr(soak, "WINDOW", 2)


def test_a_long_run_costs_at_its_end_what_it_did_at_its_start(config, capsys, short):
    assert soak.main([config, "--chunks=9", "cache.mid_capacity=2"]) == 0
    found = last_line(capsys)
    rows = found["rows"]
    assert [row["chunk"] for row in rows] == [4, 5, 6, 7, 8, 9] and found["attended_bytes_ratio"] == 1
    assert rows[-1]["archive_bytes"] == 2 * rows[0]["archive_bytes"] > 0  # of the most that it may hold
    assert rows[-1]["tensor_bytes"] == rows[-3]["tensor_bytes"] > rows[-1]["attended_bytes"] > 0
    assert all(row["resident_bytes"] > row["tensor_bytes"] for row in rows)


def test_what_is_kept_of_every_chunk_is_seen(config, capsys, short, monkeypatch):
    kept, row_of = [], soak.row_of
    monkeypatch.setattr(soak, "row_of", lambda *found: kept.append(torch.zeros(2**20)) or row_of(*found))
    assert soak.main([config, "--chunks=6"]) == 0
    first, *_, last = last_line(capsys)["rows"]
    assert last["tensor_bytes"] - first["tensor_bytes"] >= 2 * 2**22


def test_a_compilers_stand_in_has_no_bytes():
    before = soak.tensor_bytes()
    with FakeTensorMode():
        standing_in = torch.ones(2**20)
    assert soak.tensor_bytes() < before + standing_in.nbytes


def test_a_long_run_into_a_video(tmp_path, capsys, short):
    world, file = tiny.write_world(tmp_path), tmp_path / "new" / "long.mp4"
    assert soak.main([f"--config_path={world / 'config.yaml'}", "--seconds=3", f"--decode={file}"]) == 0
    found = last_line(capsys)
    assert found["file_bytes"] == file.stat().st_size > 0 and found["chunks"] == 7
    assert len(read_video(file)) == 16 * found["video_seconds"]


def test_a_run_too_short_or_into_no_video_is_one_line(config, capsys):
    wrong = (["--chunks=249"], "249 chunks are too few"), (["--chunks=250", "--decode=a.avi"], "must end in .mp4")
    for arguments, message in wrong:
        assert soak.main([config, *arguments]) == 2
        assert message in capsys.readouterr().err


class Machine:
    """A device whose memory is what the test says, and methods to time."""

    def __init__(self, monkeypatch):
        self.now = self.highest = 0
        monkeypatch.setattr(timing, "peak_memory", lambda device: self.highest)
        monkeypatch.setattr(timing, "reset_peak_memory", lambda device: self.use(self.now, reset=True))

    def use(self, level, reset=False):
        self.now = level
        self.highest = level if reset else max(self.highest, level)

    def spike(self, level):
        before = self.now
        self.use(level)
        self.use(before)


def test_a_peak_belongs_to_the_parts_that_were_running(monkeypatch):
    machine = Machine(monkeypatch)
    watch = Stopwatch(CPU, memory=True)
    machine.spike(100)  # before anything is timed
    with watch.part("outer"):
        machine.spike(10)
        with watch.part("first"):
            machine.spike(30)
        with watch.part("second"):
            machine.spike(20)
    with watch.part("later"):
        machine.use(5)
    assert dict(watch.peak) == {"outer": 30, "outer/first": 30, "outer/second": 20, "later": 5}
    assert watch.seconds["outer"] >= watch.total("first") + watch.total("second")


def test_parts_are_measured_while_a_stopwatch_is_entered():
    layer = torch.nn.Linear(2, 2)

    @timing.timed("call")
    def call():
        with timing.part("inner", tokens=5):
            return layer(torch.ones(3, 2))

    with Stopwatch(CPU) as watch:
        watch.watch_module(layer, "layer", tokens=len)
        call()
        call()
        with pytest.raises(RuntimeError):
            layer(torch.ones(3, 4))
    call()
    assert dict(watch.tokens) == {"call": 0, "call/inner": 10, "call/inner/layer": 6, "layer": 3}
    assert watch.seconds["call"] >= watch.seconds["call/inner"] >= watch.seconds["call/inner/layer"] > 0
    assert watch.total("layer") == watch.seconds["call/inner/layer"] + watch.seconds["layer"]


def test_peak_memory_of_a_cpu_can_start_anew():
    held = torch.ones(2**25)  # 128 MiB
    high = timing.peak_memory(CPU)
    assert high > held.nbytes
    del held
    timing.reset_peak_memory(CPU)
    assert timing.peak_memory(CPU) <= high
