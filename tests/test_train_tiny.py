"""The sprite world's chain from nothing: every stage finds what the one before left, and the last makes a video."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("configs", "model", "pipeline", "utils", "scripts", "prompts", "train.py", "inference_packforcing.py")
SHORT = ("train.max_steps=1", "train.sample_every=0", "train.compile=false")
CLIPS, STORIES = ("data.num_clips=4", "data.num_stills=4"), ("data.stories.count=4",)
CHAIN = {
    "vae vae_cuts teacher ar_diffusion teacher_motion dmd": CLIPS,
    "story_stills": STORIES,
    "story_ar story_compressor": (CLIPS[0], *STORIES),
    "story_dmd": CLIPS,
    "story_memory": STORIES,
}


def run(folder: Path, *command: str, **variables: str) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "RANKS": "1", "MASTER_PORT": "29571", **variables}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_every_stage_goes_on_from_the_one_before(tmp_path):
    for part in PARTS:
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copy(ROOT / part, tmp_path / part)
    for stages, data in CHAIN.items():
        run(tmp_path, "bash", "scripts/train_tiny.sh", *SHORT, *data, STAGES=stages)
    script = (tmp_path / "scripts" / "train_tiny.sh").read_text()
    named = re.findall(r'^(?:single|stories)="(.*)"$', script, re.MULTILINE)
    assert " ".join(named) == " ".join(CHAIN)
    again = run(tmp_path, "bash", "scripts/train_tiny.sh", *SHORT, *CLIPS, STAGES=next(iter(CHAIN)))
    assert again.count("resumed from") == 6
    options = ["--config_path=configs/tiny/demo.yaml", "--data_path=prompts/tiny_demo.txt", "--output_folder=videos"]
    options += ["--seconds=2", "model.bundle=runs/story_memory/bundle"]
    run(tmp_path, sys.executable, "inference_packforcing.py", *options)
    assert len(list((tmp_path / "videos").glob("*.mp4"))) == 2
