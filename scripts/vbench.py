"""VBench's dimensions (Huang et al. 2024) of generated videos.

    python -m scripts.vbench output/demo --python ~/vbench/bin/python --dimension temporal_flickering
    python -m scripts.vbench output/suite --python ~/vbench/bin/python --suite --dimension color scene --json

VBench is a package with weights of its own, and wants older versions of others than this project does: give it an
environment (`python -m venv ~/vbench; ~/vbench/bin/pip install vbench==0.1.5`) and name its Python. It fetches the
weights of a dimension to ~/.cache/vbench (VBENCH_CACHE_DIR) when first asked; `temporal_flickering` needs none.

Folders are read as `scripts/evaluate.py` reads them, sub-folders apart; a prompt comes from NAME.json beside NAME.mp4.
With --suite the prompts are those of VBench's own list, and each dimension counts the videos of its prompts only, as in
published tables: all of them, five of each, or the score says little.
"""

import argparse
import json
import logging
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from scripts.generated import find_videos, read_sidecar
from utils.cli import print_rows, run_command
from utils.config import ConfigError

log = logging.getLogger(__name__)

OF_PROMPT = ("overall_consistency", "temporal_style")  # compare a video with its prompt
OF_ANY = ("aesthetic_quality", "background_consistency", "dynamic_degree", "imaging_quality", "motion_smoothness",
          "subject_consistency", "temporal_flickering", *OF_PROMPT)  # fmt: skip
OF_SUITE = ("appearance_style", "color", "human_action", "multiple_objects", "object_class", "scene",
            "spatial_relationship")  # fmt: skip
WORKER = Path(__file__).with_name("vbench_worker.py")
STDERR = 2  # file descriptor


def name_videos(videos: list[Path], suite: bool, prompted: bool) -> dict[str, tuple[Path, str]]:
    """File name as VBench wants it -> video and prompt; logs which are left out for lack of one prompt."""
    named, seen = {}, Counter()
    for video in videos:
        prompt, _ = read_sidecar(video)
        if isinstance(prompt, str) and prompt:
            named[f"{prompt}-{seen[prompt]}.mp4" if suite else video.name] = video, prompt
            seen[prompt] += 1
        elif suite or prompted:
            log.warning("left out: %s: %s", video, "no prompt" if not prompt else "its prompt changes")
        else:
            named[video.name] = video, ""
    return named


def score_folder(videos: list[Path], arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Dimension -> `score` and `videos` (name -> score), or `error`. Raises `ConfigError` where VBench cannot run."""
    named = name_videos(videos, arguments.suite, bool(set(OF_PROMPT) & set(arguments.dimension)))
    if not named:
        raise ConfigError(f"{videos[0].parent}: no video with a prompt; {', '.join(OF_PROMPT)} and --suite need one")
    with tempfile.TemporaryDirectory() as root:
        folder, job, found = (Path(root, name) for name in ("videos", "job.json", "found.json"))
        folder.mkdir()
        for name, (video, _) in named.items():
            (folder / name).symlink_to(video.resolve())
        content = {"folder": str(folder), "results": root, "prompts": {name: text for name, (_, text) in named.items()},
                   "dimensions": arguments.dimension, "suite": arguments.suite, "device": arguments.device}  # fmt: skip
        job.write_text(json.dumps(content), encoding="utf-8")
        scores = run_worker(arguments.python, job, found)
    for score in scores.values():
        if "videos" in score:
            score["videos"] = {named[name][0].name: value for name, value in sorted(score["videos"].items())}
    return scores


def run_worker(python: str, job: Path, found: Path) -> dict[str, dict[str, Any]]:
    """The job's scores. Raises `ConfigError` where there is no VBench, or it dies."""
    command = [python, "-c", WORKER.read_text(encoding="utf-8"), str(job), str(found)]
    try:
        status = subprocess.run(command, stdout=STDERR).returncode  # what VBench prints: stdout is for the table
    except OSError as error:
        raise ConfigError(f"--python is {python}: cannot be run ({error.strerror})") from error
    if not found.exists():
        raise ConfigError(f"VBench died with exit status {status}; what it said stands above")
    result = json.loads(found.read_text(encoding="utf-8"))
    if "missing" in result:
        raise ConfigError(f"{python} has no VBench ({result['missing']}): `pip install vbench==0.1.5` in an "
                          "environment of its own, and name its Python with --python")  # fmt: skip
    return result["scores"]


def run(arguments: argparse.Namespace) -> None:
    suite_only = sorted(set(arguments.dimension) & set(OF_SUITE))
    if suite_only and not arguments.suite:
        raise ConfigError(f"--dimension {' '.join(suite_only)}: defined on VBench's own prompts: generate those and "
                          f"give --suite, or choose from {', '.join(OF_ANY)}")  # fmt: skip
    found = {folder: score_folder(videos, arguments) for folder, videos in find_videos(arguments.path).items()}
    rows = [[folder, *(scores[name].get("score") for name in arguments.dimension)] for folder, scores in found.items()]
    print_rows([["folder", *arguments.dimension], *rows])
    if arguments.json:
        print(json.dumps({"folders": found}))
    failed = {name: score["error"] for scores in found.values() for name, score in scores.items() if "error" in score}
    if failed:
        why = "; ".join(f"{name}: {error}" for name, error in failed.items())
        raise ConfigError(f"not scored: {why}. Weights that cannot be downloaded here belong where VBench looks for "
                          "them (VBENCH_CACHE_DIR); temporal_flickering needs none")  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="an mp4 or a folder of them")
    parser.add_argument("--dimension", nargs="+", choices=OF_ANY + OF_SUITE, default=["temporal_flickering"])
    parser.add_argument("--python", default=sys.executable, help="of the environment that holds VBench")
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument("--suite", action="store_true", help="the prompts are those of VBench's list")
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    arguments = parser.parse_args(argv)
    return run_command(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
