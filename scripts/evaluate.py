"""Read sprite-world videos back and say how much of each caption is right, second by second.

    python -m scripts.evaluate outputs/demo            # every NAME.mp4 with its NAME.json
    python -m scripts.evaluate outputs/demo/000-a-red-circle.mp4 --json

Each attribute has two scores: over the seconds of videos whose caption states it, and over those whose caption leaves
it out, where right means "as in seconds 1 to 4 of the same video". "moving" is whether a sprite is there and does not
stand still, whatever its motion is called. With --json the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from utils.sprites.read import MARKED, Mark, accuracy, read_seconds, score
from utils.sprites.world import parse_caption
from utils.video import PARTIAL_SUFFIX, read_video

WINDOWS = {"0-5 s": range(0, 5), "10-20 s": range(10, 20), "25-30 s": range(25, 30), "50-60 s": range(50, 60),
           "110-120 s": range(110, 120)}  # fmt: skip
USAGE_ERROR = 2


class InputError(ValueError):
    """Something on the command line or beside a video that cannot be evaluated."""


def find_videos(path: Path) -> list[Path]:
    """The video, or every finished video of a folder in order of name."""
    if not path.exists():
        raise InputError(f"{path} does not exist: name an mp4 or a folder of them")
    if path.is_file():
        return [path]
    videos = sorted(video for video in path.glob("*.mp4") if not video.name.endswith(PARTIAL_SUFFIX))
    if not videos:
        raise InputError(f"{path} holds no finished .mp4: generate some with inference_packforcing.py")
    return videos


def read_sidecar(video: Path) -> tuple[str, float]:
    """Prompt and frames per second from the JSON beside a video."""
    sidecar = video.with_suffix(".json")
    if not sidecar.is_file():
        raise InputError(f"{video} has no {sidecar.name} beside it, which says its prompt and fps")
    try:
        record = json.loads(sidecar.read_text())
    except json.JSONDecodeError as error:
        raise InputError(f"{sidecar} is not valid JSON ({error.msg}, line {error.lineno})") from error
    missing = [key for key in ("prompt", "fps") if not isinstance(record, dict) or key not in record]
    if missing:
        raise InputError(f"{sidecar} lacks {' and '.join(missing)}; it must hold the keys prompt and fps")
    prompt, fps = record["prompt"], record["fps"]
    if not isinstance(prompt, str) or isinstance(fps, bool) or not isinstance(fps, int | float) or fps <= 0:
        raise InputError(f"{sidecar}: prompt must be text and fps a positive number, got {prompt!r} and {fps!r}")
    return prompt, float(fps)


def evaluate_video(video: Path) -> list[Mark]:
    """All marks of one video; raises InputError naming the file where it cannot be read or judged."""
    prompt, fps = read_sidecar(video)
    try:
        return score(read_seconds(read_video(video), fps), parse_caption(prompt))
    except (ValueError, OSError) as error:
        raise InputError(f"{video}: {error}") from error


def summarise(marks: list[Mark]) -> dict[str, dict[str, dict[str, float]]]:
    """Window -> "captioned" and "left_out" -> attribute -> share right, windows without a second left out."""
    seconds = {mark.second for mark in marks}
    return {
        name: {"captioned": accuracy(marks, True, window), "left_out": accuracy(marks, False, window)}
        for name, window in WINDOWS.items()
        if seconds & set(window)
    }


def print_table(summary: dict[str, dict[str, dict[str, float]]]) -> None:
    cells = [(window, kind) for window in summary for kind in ("captioned", "left_out")]
    print("".join([f"{'':12}"] + [f"{window:>22}" for window in summary]))
    print("".join([f"{'attribute':12}"] + [f"{'captioned':>12}{'left out':>10}" for _ in summary]))
    for name in MARKED:
        row = f"{name:12}"
        for window, kind in cells:
            value = summary[window][kind].get(name)
            row += f"{'-' if value is None else f'{value:.3f}':>{12 if kind == 'captioned' else 10}}"
        print(row)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="an mp4 with its sidecar JSON, or a folder of them")
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    arguments = parser.parse_args()
    try:
        videos = find_videos(arguments.path)
        marks = {video.name: evaluate_video(video) for video in videos}
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE_ERROR
    everything = [mark for video in marks.values() for mark in video]
    summary = summarise(everything)
    print(f"{len(videos)} video{'s' if len(videos) > 1 else ''}, {len(everything)} marks")
    print_table(summary)
    if arguments.json:
        per_video = {name: summarise(video) for name, video in marks.items()}
        print(json.dumps({"videos": len(videos), "windows": summary, "per_video": per_video}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
