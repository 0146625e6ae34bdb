"""What is found out about a video, by any metric and by what its prompt says, and tables of it."""

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.data.schedule import Prompt
from utils.cli import print_rows
from utils.metrics import METRICS, measure
from utils.sprites.read import READERS, Mark, accuracy, read_seconds, score
from utils.sprites.recall import CHANCE, LEFT_OUT, RECALLED, RecallMark, recall_table, score_story
from utils.sprites.story import num_chunks, read_story
from utils.sprites.world import parse_caption

WINDOWS = {"0-5 s": range(0, 5), "10-20 s": range(10, 20), "25-30 s": range(25, 30), "50-60 s": range(50, 60),
           "110-120 s": range(110, 120)}  # fmt: skip

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Verdict:
    """What is found out about one video."""

    marks: list[Mark]  # of its caption; none where it has none that can be read
    outline: float | None  # mean IoU of a captioned sprite with a true outline; None where none was read
    recall: list[RecallMark]  # of its returning shots, where its prompt is a story
    curves: dict[str, list[float]]  # metric -> its value in every second
    metrics: dict[str, float]


def judge(frames: np.ndarray, fps: float, prompt: Prompt | None, name: str | None = None) -> Verdict:
    """Frames uint8 [F, H, W, 3]. A prompt of another world than the sprites' costs the marks alone, which is logged of
    the video that has a `name`."""
    marks, recalled, outlines = [], [], []
    try:
        if isinstance(prompt, str):
            facts, readings = parse_caption(prompt), read_seconds(frames, fps)
            marks = score(readings, facts)
            outlines = [reading.look.outline for reading in readings if reading.look.present]
        elif prompt is not None:
            recalled = score_story(frames, read_story(prompt, num_chunks(len(frames))))
    except ValueError as error:
        if name is not None:
            log.warning("%s: caption not scored (%s); metrics only", name, error)
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
        "captioned": accuracy(marks, True),
        "outline": float(np.mean(outlines)) if outlines else None,
        "metrics": {name: float(np.mean([one.metrics[name] for one in verdicts])) for name in METRICS},
        "recall": recall_table([mark for verdict in verdicts for mark in verdict.recall]),
    }


def print_table(title: str, summary: dict[str, Any]) -> None:
    windows = summary["windows"]
    print(f"\n{title}: {summary['videos']} video{'s' if summary['videos'] > 1 else ''}")
    if windows:
        columns = {f"{window} {kind}": found for window, kinds in windows.items() for kind, found in kinds.items()}
        rows = [[name, *(found.get(name) for found in columns.values())] for name in READERS]
        print_rows([["attribute", *columns], *rows])
    if summary["outline"] is not None:
        print(f"IoU with the true outline {summary['outline']:.3f}")
    if summary["recall"]:
        print_recall(summary["recall"])
    print("  ".join(f"{name} {value:.3g} {METRICS[name].unit}" for name, value in summary["metrics"].items()))


def print_comparison(folders: dict[str, dict[str, Any]]) -> None:
    """One row per folder: captioned attributes over all seconds, then metrics."""
    names = [name for name in READERS if any(name in folder["captioned"] for folder in folders.values())]
    rows = [["", *names, *METRICS]]
    for folder, summary in folders.items():
        rows.append([folder, *map(summary["captioned"].get, names), *summary["metrics"].values()])
    print_rows(rows)


def print_recall(table: dict[str, dict[str, dict[str, float]]]) -> None:
    """A row per group of returning shots, then chance; of wrong answers, whose they were."""
    whose = [f"{attribute}/{kind}" for attribute in LEFT_OUT for kind in ("last", "cast", "other")]
    found = {f"{by} {name}": some for by, groups in table.items() for name, some in groups.items()} | {"chance": CHANCE}
    names = ("shots", *RECALLED, *whose)
    print_rows([["returning shots", *names], *([title, *map(some.get, names)] for title, some in found.items())])
