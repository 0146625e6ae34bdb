"""The project's own code at full width on a fake GPU: no mismatch of devices or dtypes, no more memory than before."""

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from pipeline import fit
from tests.estimates import CONFIGS, STORED
from utils.config import Config, ConfigError
from utils.distributed import World
from utils.fakecuda.count import _covered

RECIPE = "configs/packforcing_dmd_chunkwise_hr_8gpu_sink3_recent2.yaml"
FIRST = ["configs/causal_ode_chunkwise_64gpu.yaml", "configs/tiny/dmd.yaml"]
ALLOWED = 1.05  # of what is stored; where less is needed, write it down: python -m tests.estimates --write

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None and torch.version.cuda is None, reason="no g++")


def output(*command: str) -> dict:
    """What a program says in its last line, as JSON."""
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_memory_moves_in_sectors():
    pairs = torch.zeros(6, 16, 2, dtype=torch.bfloat16)
    assert _covered(pairs) == _covered(pairs.transpose(0, 1)) == 6 * 16 * 2 * 2
    assert _covered(pairs[..., 0]) == _covered(pairs)  # every second number
    assert _covered(torch.zeros(4, 1, 64, dtype=torch.bfloat16)[..., ::64]) == 4 * 32
    assert _covered(torch.zeros(5, 1).expand(5, 7)) == 5 * 4


def test_every_shipped_config_is_written_down():
    missing = {*CONFIGS} - json.loads(STORED.read_text()).keys()
    assert not missing, f"python -m tests.estimates --write {' '.join(sorted(missing))}"


@needs_compiler
@pytest.mark.parametrize("paths", [FIRST, pytest.param(sorted({*CONFIGS} - {*FIRST}), marks=pytest.mark.slow)])
def test_every_shipped_config_runs_in_the_memory_it_had(paths):
    stored = json.loads(STORED.read_text())
    for path, found in output("tests.estimates", *paths).items():
        before = stored[path]
        assert found.keys() == before.keys(), path
        assert {part: size for part, size in found.items() if size > ALLOWED * before[part]} == {}, path


@needs_compiler
@pytest.mark.slow
def test_depth_extends_along_a_line():
    command = ["scripts.estimate", "--config_path", "configs/causal_ode_chunkwise_64gpu.yaml", "--world=8"]
    line, exact = output(*command), output(*command, "--exact")
    assert line["memory_gib"] == pytest.approx(exact["memory_gib"], rel=0.01)
    (ours,), (theirs,) = line["phases"], exact["phases"]
    for key in ("tflop", "elementwise_tb", "seconds"):
        assert ours[key] == pytest.approx(theirs[key], rel=0.005)


@needs_compiler
def test_of_training_samples_a_chunk_is_counted_and_a_frame_of_pixels():
    command = ["scripts.estimate", "--config_path", "configs/tiny/dmd.yaml", "--part=sample"]
    chunk, decoded = output(*command, "train.sample_long_frames=300")["phases"]
    assert (chunk["phase"], decoded["phase"]) == ("chunk", "latent frame decoded")
    assert chunk["moved"].keys() >= {"commit", "denoise", "cache"} and decoded["parts_gib"]["vae"] < 0.02  # of 1 frame


@needs_compiler
@pytest.mark.slow
def test_of_two_ranks_that_make_a_video_each_holds_half_of_the_cache():
    command = ["scripts.estimate", "--config_path", "configs/tiny/demo.yaml", "--part=infer"]
    alone, together = (output(*command, f"parallel.sequence={ranks}")["phases"][0] for ranks in (1, 2))
    assert together["parts_gib"]["cache"] == pytest.approx(alone["parts_gib"]["cache"] / 2, rel=0.05)
    assert together["flops"]["attention"]["denoise"] == pytest.approx(alone["flops"]["attention"]["denoise"] / 2)
    assert together["comm"]["all_to_all_single, waited for"][0] > 0 and not alone["comm"]


@needs_compiler
@pytest.mark.slow
def test_weights_that_wait_in_host_memory_are_counted():
    command = ["scripts.estimate", "--config_path", "configs/tiny/demo.yaml", "--part=infer"]
    whole, model, group = (output(*command, f"inference.offload={kind}") for kind in ("none", "model", "group"))
    weights = [[row["parts_gib"]["weights"] for row in found["phases"]] for found in (whole, model, group)]
    assert weights[0][0] == weights[0][1] == weights[1][0] > 3 * weights[2][0]  # a chunk: the VAE is there still
    assert weights[0][1] > weights[1][1] > weights[2][1]  # pixels
    for found, copies in ((whole, None), (model, 1), (group, 5)):  # of the transformer: at every forward
        assert found["phases"][0]["comm"].get("host to device", [None])[0] == copies


def test_a_run_that_does_not_fit_is_refused(monkeypatch):
    device, gib = torch.device("cuda", 0), 2**30
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=24 * gib))
    found = {"memory_gib": 31.7, "fits": False, "phases": [{"memory_gib": 31.7, "parts_gib": {"cache": 5.57}}]}
    monkeypatch.setattr(fit, "estimated", lambda *_: found)
    with pytest.raises(ConfigError, match="31.7 GiB a rank.*cache 5.6.*24.0 GiB.*train.sharding"):
        fit.check_memory(Config(), "train", World(), device)
    found["fits"] = True
    fit.check_memory(Config(), "train", World(), device)
    monkeypatch.setattr(fit, "estimated", lambda *_: None)  # an estimate that failed stops nothing
    fit.check_memory(Config(), "train", World(), device)


def test_an_estimate_that_fails_is_a_warning(monkeypatch, caplog):
    monkeypatch.setattr(fit.sys, "executable", "false")
    assert fit.estimated(Config(), "train", World(), 80.0) is None
    assert "memory was not estimated" in caplog.text
