"""One video by two ranks is the video of one (sequence parallelism over attention heads), on gloo."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from inference_packforcing import main
from pipeline.generate.inference import Runtime, load_model
from pipeline.generate.jobs import what_was_made
from pipeline.generate.together import given
from pipeline.train.checks import check_run
from tests import scale_runs, sequence_runs, tiny
from utils.config import Config, ConfigError, ParallelConfig
from utils.distributed import World
from utils.load_config import plain

EXACT = 1e-4
FORWARDS = ("clip", "batch", "frame_times", "teacher_forcing", "texts", "mesh", "gradients")
VIDEOS = (*sequence_runs.caches(), "guidance", "last_step", "noisy_commit", "switch_keep", "switch_recommit",
          "switch_restart", "broadcast")  # fmt: skip
SAID = {
    "heads": "ConfigError: 3 attention heads cannot be shared out evenly over 2 ranks a video .* one of 1, 3,",
    "tokens": "ConfigError: 4 attention heads and 9 tokens a chunk cannot be shared out evenly over 2 ranks",
    "ring": "ConfigError: ring_degree is 2: must be 1",
    "degree": "ConfigError: 2 ranks do not fill groups of 3 .*nproc_per_node=3",
    "again": "RuntimeError: parallelism is on already",
    "first_block": "ConfigError: FirstBlockCacheConfig",
    "cache": "RuntimeError: the cache was made before parallelism",
}


@pytest.fixture(scope="module")
def ranks(bundle, tmp_path_factory):
    """What each of two ranks found."""
    folder = tmp_path_factory.mktemp("sequence")
    assert scale_runs.finish(scale_runs.start(2, sequence_runs.compare, bundle, folder)) == [0, 0]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", FORWARDS)
def test_a_forward_is_that_of_one_rank(ranks, name):
    assert max(found["forward"][name] for found in ranks) < EXACT


@pytest.mark.parametrize("name", VIDEOS)
def test_a_video_is_that_of_one_rank(ranks, name):
    assert max(found["videos"][name] for found in ranks) < EXACT


@pytest.mark.parametrize("name", sequence_runs.caches())
def test_each_rank_holds_its_heads_and_selects_the_same(ranks, name):
    for found in ranks:
        assert found["heads"][name] == [4, 2] and found["chosen"][name]


@pytest.mark.parametrize("name", SAID)
def test_what_cannot_be_is_said_by_every_rank(ranks, name):
    for found in ranks:
        assert re.match(SAID[name], found["says"][name]), found["says"][name]


def test_ranks_start_together_and_none_waits_for_one_that_stopped(ranks):
    first, second = (found["pipeline"] for found in ranks)
    same = "ConfigError: the ranks of a video were given different seed: 0 on rank 0, 1 on rank 1; give all the same"
    assert first["seed"] == second["seed"] == same
    assert second["size"].startswith("ConfigError") and first["size"].startswith("PeerError: rank 1 of this video fail")
    assert second["stop"] == "1 chunks" and first["stop"].startswith("PeerError: rank 1 of this video stopped")
    assert first["after"] == second["after"] == "4 chunks"


@pytest.mark.slow
def test_compiled_blocks_of_two_ranks(tmp_path):
    assert scale_runs.finish(scale_runs.start(2, sequence_runs.compiled, tmp_path)) == [0, 0]
    for rank in range(2):
        found = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert found["difference"] < EXACT and not found["breaks"]


def test_the_command_line_makes_the_videos_of_one_rank_and_survives_a_full_disk(tmp_path):
    """Frames of two ranks may differ from one rank's by a grey level: pixels within 1e-4 of each other, in -1..1, are
    rounded to 0..255."""
    frames = [tmp_path / name for name in ("one", "two")]
    for folder, count in zip(frames, (1, 2), strict=True):
        (folder / "videos").mkdir(parents=True)
        argv = ["--config_path", "configs/tiny/demo.yaml", "--prompt", "a red circle bounces over a blue plain",
                "--prompt", "a green square drifts left over a plain", "--num_output_frames", "12", "--output_folder",
                str(folder / "videos"), "inference.dtype=float32", "inference.threads=1", f"parallel.sequence={count}",
                "inference.device=cpu"]  # fmt: skip
        breaks = None if count == 1 else 2
        codes = scale_runs.finish(scale_runs.start(count, sequence_runs.run, argv, folder, breaks))
        assert codes == ([0] if count == 1 else [1, 1])
    broken, whole = sorted(path.stem for path in frames[0].glob("*.npy"))
    assert [path.stem for path in (frames[1] / "videos").glob("*.json")] == [whole]
    one, two = (np.load(folder / f"{whole}.npy").astype(int) for folder in frames)
    assert one.shape == two.shape and np.abs(one - two).max() <= 1
    sidecars = [json.loads((folder / "videos" / f"{whole}.json").read_text()) for folder in frames]
    assert sidecars[1]["cache"]["mid"]["bytes"] * 2 == sidecars[0]["cache"]["mid"]["bytes"]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["parallel.sequence=2"], "1 here, must be a multiple of it; start with torchrun --nproc_per_node=2"),
        (["parallel.sequence=3"], "2 attention heads and 12 tokens a chunk .* over 3 ranks .* use one of 1, 2,"),
        (["parallel.sequence=0"], "must lie in"),
    ],
)
def test_too_few_ranks_or_heads_are_told_in_one_line(bundle, tmp_path, capsys, overrides, said):
    tiny.write_world(tmp_path)
    argv = ["--config_path", str(tmp_path / "config.yaml"), "--prompt", "a", "--output_folder", str(tmp_path / "out")]
    assert main([*argv, *overrides]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(said, error), error


def test_a_finished_video_is_finished_whatever_the_number_of_ranks():
    made = [what_was_made("a", 0, plain(Config(parallel=ParallelConfig(sequence=ranks))), {}) for ranks in (1, 2)]
    assert made[0] == made[1]


def test_pixels_that_ranks_are_given_are_compared():
    frames = [np.full((4, 4, 3), level, np.uint8) for level in (1, 2)]
    for kind in (np.array, Image.fromarray, torch.from_numpy):
        one, other, again = (given(SimpleNamespace(image=[kind(frames[level])])) for level in (0, 1, 0))
        assert one == again != other


def test_training_refuses(tmp_path):
    with pytest.raises(ConfigError, match="parallel.sequence.*train.sharding"):
        check_run(Config(parallel=ParallelConfig(sequence=2)), World(), tmp_path, False)


def test_a_program_without_ranks_refuses():
    with pytest.raises(ConfigError, match="`parallel.sequence` is 2: no process group .* inference_packforcing.py"):
        load_model(Config(parallel=ParallelConfig(sequence=2)), Runtime(torch.device("cpu"), torch.float32))
