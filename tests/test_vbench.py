"""`scripts/vbench.py`: what it asks of VBench, by a package of the same interface, and of the real one
where VBENCH_PYTHON names the Python of its environment."""

import json
import os
import subprocess

import numpy as np
import pytest

from scripts.vbench import OF_ANY, OF_SUITE, main
from utils.video import read_video, write_video

FAKE = """
import json, os


class VBench:  # of vbench 0.1.5
    def __init__(self, device, full_info_dir, output_path):
        self.device, self.full_info_dir, self.output_path = device, full_info_dir, output_path

    def evaluate(self, videos_path, name, prompt_list=[], dimension_list=None, local=False, read_frame=False,
                 mode="vbench_standard", **kwargs):
        print("VBench prints to stdout")
        if dimension_list == ["motion_smoothness"]:
            raise FileNotFoundError("amt-s.pth")
        if mode == "vbench_standard":
            prompts = [entry["prompt_en"] for entry in json.load(open(self.full_info_dir))]
            names = [f"{prompt}-{i}.mp4" for prompt in prompts for i in range(5)]
        else:
            names = list(prompt_list)
            assert mode == "custom_input" and set(names) == set(os.listdir(videos_path))
        paths = [os.path.join(videos_path, name) for name in names]
        each = [{"video_path": path, "video_results": os.path.getsize(path)} for path in paths if os.path.exists(path)]
        score = sum(one["video_results"] for one in each) / max(1, len(each))
        with open(f"{self.output_path}/{name}_eval_results.json", "w") as file:
            json.dump({dimension: [score, each] for dimension in dimension_list}, file)
"""


@pytest.fixture
def fake(tmp_path_factory, monkeypatch):
    package = tmp_path_factory.mktemp("site") / "vbench"
    package.mkdir()
    package.joinpath("__init__.py").write_text(FAKE)
    package.parent.joinpath("torch.py").write_text("device = str\nclass cuda:\n    is_available = bool\n")
    package.joinpath("VBench_full_info.json").write_text(json.dumps([{"prompt_en": "a cat", "dimension": ["color"]}]))
    monkeypatch.setenv("PYTHONPATH", str(package.parent))


@pytest.fixture
def videos(tmp_path):
    """Sizes 1, 2, ... bytes; what they show."""
    prompts = ["a cat", "a dog", "a cat", [{"at": 0, "prompt": "a cat"}, {"at": 1, "prompt": "a dog"}]]
    for number, prompt in enumerate(prompts):
        path = tmp_path / f"{number:03d}.mp4"
        path.write_text("x" * (number + 1))
        path.with_suffix(".json").write_text(json.dumps({"prompt": prompt, "fps": 16}))
    tmp_path.joinpath("004.7.partial.mp4").write_text("growing")
    return tmp_path


def scores(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])["folders"]["."]


def test_every_finished_video_is_scored(videos, capfd, fake):
    assert main([str(videos), "--json"]) == 0
    expected = {"score": 2.5, "videos": {f"00{number}.mp4": number + 1 for number in range(4)}}
    out, err = capfd.readouterr()
    assert json.loads(out.splitlines()[-1])["folders"]["."] == {"temporal_flickering": expected}
    assert out.splitlines()[1].split() == [".", "2.500"] and "VBench prints" in err


def test_what_is_held_against_its_prompt_needs_one(videos, capfd, caplog, fake):
    assert main([str(videos), "--dimension", "overall_consistency", "--json"]) == 0
    assert list(scores(capfd)["overall_consistency"]["videos"]) == ["000.mp4", "001.mp4", "002.mp4"]
    assert "003.mp4: its prompt changes" in caplog.text


def test_the_suite_counts_videos_of_its_prompts(videos, capfd, fake):
    assert main([str(videos), "--suite", "--dimension", "color", "--json"]) == 0
    assert scores(capfd)["color"] == {"score": 2.0, "videos": {"000.mp4": 1, "002.mp4": 3}}
    videos.joinpath("000.json").unlink()
    videos.joinpath("002.json").unlink()
    assert main([str(videos), "--suite", "--dimension", "color"]) == 2
    assert "none of these videos" in capfd.readouterr().err.splitlines()[-1]


def test_one_dimension_without_weights_costs_no_other(videos, capfd, fake):
    assert main([str(videos), "--json", "--dimension", "motion_smoothness", "dynamic_degree"]) == 2
    out, err = capfd.readouterr()
    assert json.loads(out.splitlines()[-1])["folders"]["."]["dynamic_degree"]["score"] == 2.5
    assert "motion_smoothness: FileNotFoundError: amt-s.pth" in err.splitlines()[-1]


def test_what_is_missing_is_named(videos, capfd, fake, monkeypatch, tmp_path_factory):
    assert main([str(videos), "--dimension", "scene"]) == 2
    assert "--suite" in capfd.readouterr().err
    assert main([str(videos), "--python", "nowhere"]) == 2
    assert "--python is nowhere" in capfd.readouterr().err
    broken = tmp_path_factory.mktemp("broken")
    broken.joinpath("torch.py").write_text("raise ImportError('numpy 1')")
    monkeypatch.setenv("PYTHONPATH", str(broken))
    assert main([str(videos)]) == 2
    assert "has no VBench (ImportError: numpy 1): `pip install" in capfd.readouterr().err


@pytest.mark.skipif("VBENCH_PYTHON" not in os.environ, reason="VBENCH_PYTHON names no Python that has VBench")
def test_the_real_one(tmp_path, capfd):
    python = os.environ["VBENCH_PYTHON"]
    frames = np.random.default_rng(0).integers(0, 256, (5, 32, 48, 3)).astype(np.uint8)
    write_video(tmp_path / "000.mp4", frames, 16)
    assert main([str(tmp_path), "--python", python, "--json"]) == 0
    score = scores(capfd)["temporal_flickering"]["score"]
    shown = read_video(tmp_path / "000.mp4").astype(float)
    assert abs(score - (1 - np.abs(np.diff(shown, axis=0)).mean() / 255)) < 0.01
    known = "import json, vbench; print(json.dumps(vbench.VBench('cpu', '', '.').build_full_dimension_list()))"
    out = subprocess.run([python, "-c", known], capture_output=True, text=True, cwd=tmp_path, check=True).stdout
    assert set(json.loads(out.splitlines()[-1])) == {*OF_ANY, *OF_SUITE}
