"""What is found out about a video, by any metric and by what its prompt says, and tables of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.data.schedule import Prompt
from utils.metrics import METRICS, measure
from utils.sprites.read import MARKED, Mark, accuracy, read_seconds, score
from utils.sprites.story import (
    CHANCE,
    LEFT_OUT,
    RECALLED,
    RecallMark,
    num_chunks,
    read_story,
    recall_table,
    score_story,
)
from utils.sprites.world import parse_caption

WINDOWS = {"0-5 s": range(0, 5), "10-20 s": range(10, 20), "25-30 s": range(25, 30), "50-60 s": range(50, 60),
           "110-120 s": range(110, 120)}  # fmt: skip
EVERY_SECOND = range(10**6)


@dataclass(frozen=True)
class Verdict:
    """What is found out about one video.

    Attributes:
        marks: of its caption; none where it has none that can be read.
        outline: mean IoU of a captioned sprite with a true outline; None where none was read.
        recall: of its returning shots, where its prompt is a story.
        curves: metric -> its value in every second.
        metrics: metric -> its value.
    """

    marks: list[Mark]
    outline: float | None
    recall: list[RecallMark]
    curves: dict[str, list[float]]
    metrics: dict[str, float]


def judge(frames: np.ndarray, fps: float, prompt: Prompt | None) -> Verdict:
    """Frames uint8 [F, H, W, 3]. Raises ValueError for a prompt that is no caption or story of the sprite world."""
    marks, recalled, outlines = [], [], []
    if isinstance(prompt, str):
        readings = read_seconds(frames, fps)
        marks = score(readings, parse_caption(prompt))
        outlines = [reading.outline for reading in readings if reading.present]
    elif prompt is not None:
        recalled = score_story(frames, read_story(prompt, num_chunks(len(frames))))
    series = measure(frames, fps)
    curves = {name: metric.over_time(series) for name, metric in METRICS.items()}
    metrics = {name: float(METRICS[name].summary(curve)) for name, curve in curves.items()}
    outline = float(np.mean(outlines)) if outlines else None
    return Verdict(marks, outline, recalled, {name: curve.round(4).tolist() for name, curve in curves.items()}, metrics)


def summarise(verdicts: list[Verdict]) -> dict[str, Any]:
    """`videos`; `windows`: window -> "captioned" and "left_out" -> attribute -> share right, windows without a second
    left out; `captioned`: the same over all seconds; `outline`, `metrics`: means over videos; of stories `recall`."""
    outlines = [verdict.outline for verdict in verdicts if verdict.outline is not None]
    marks = [mark for verdict in verdicts for mark in verdict.marks]
    seconds = {mark.second for mark in marks}
    return {
        "videos": len(verdicts),
        "windows": {
            name: {"captioned": accuracy(marks, True, window), "left_out": accuracy(marks, False, window)}
            for name, window in WINDOWS.items()
            if seconds & set(window)
        },
        "captioned": accuracy(marks, True, EVERY_SECOND),
        "outline": float(np.mean(outlines)) if outlines else None,
        "metrics": {name: float(np.mean([one.metrics[name] for one in verdicts])) for name in METRICS},
        "recall": recall_table([mark for verdict in verdicts for mark in verdict.recall]),
    }


def print_table(title: str, summary: dict[str, Any]) -> None:
    windows = summary["windows"]
    print(f"\n{title}: {summary['videos']} video{'s' if summary['videos'] > 1 else ''}")
    if windows:
        print("".join([f"{'':12}"] + [f"{window:>22}" for window in windows]))
        print("".join([f"{'attribute':12}"] + [f"{'captioned':>12}{'left out':>10}" for _ in windows]))
        for name in MARKED:
            cells = (columns[kind].get(name) for columns in windows.values() for kind in ("captioned", "left_out"))
            shown = ("-" if cell is None else f"{cell:.3f}" for cell in cells)
            print(f"{name:12}" + "".join(f"{cell:>{10 if column % 2 else 12}}" for column, cell in enumerate(shown)))
    if summary["outline"] is not None:
        print(f"IoU with the true outline {summary['outline']:.3f}")
    if summary["recall"]:
        print_recall(summary["recall"])
    print("  ".join(f"{name} {value:.3g} {METRICS[name].unit}" for name, value in summary["metrics"].items()))


def print_comparison(folders: dict[str, dict[str, Any]]) -> None:
    """One row per folder: captioned attributes over all seconds, then metrics."""
    names = [name for name in MARKED if any(name in folder["captioned"] for folder in folders.values())]
    width = max(map(len, folders))
    print("\n" + " " * width + "".join(f"{name:>18}" for name in (*names, *METRICS)))
    for folder, summary in folders.items():
        cells = [summary["captioned"].get(name) for name in names] + list(summary["metrics"].values())
        print(f"{folder:{width}}" + "".join(f"{'-' if cell is None else f'{cell:.3f}':>18}" for cell in cells))


def print_recall(table: dict[str, dict[str, dict[str, float]]]) -> None:
    """A row per group of returning shots, then chance; of wrong answers, whose they were."""
    whose = [f"{attribute}/{kind}" for attribute in LEFT_OUT for kind in ("last", "cast", "other")]
    print(f"{'returning shots':22}{'shots':>6}" + "".join(f"{name:>18}" for name in (*RECALLED, *whose)))
    rows = {f"{by} {name}": found for by, some in table.items() for name, found in some.items()}
    for title, found in {**rows, "chance": CHANCE}.items():
        cells = (f"{found[name]:.3f}" if name in found else "-" for name in (*RECALLED, *whose))
        print(f"{title:22}{found.get('shots', ''):>6}" + "".join(f"{cell:>18}" for cell in cells))
