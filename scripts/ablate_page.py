"""The page of `scripts/ablate.py`: tables, plots and synchronised videos in one HTML file."""

import base64
import html
import io
from collections.abc import Callable, Iterable
from pathlib import Path
from string import Template
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from utils.metrics import METRICS
from utils.sprites.recall import CHANCE, LEFT_OUT, SINCE, RecallMark, recall_table

COLOURS = matplotlib.colormaps["tab10"]
Video = tuple[dict[str, Any], dict[str, Any]]  # line of results.csv, record
PAGE = Template(Path(__file__).with_suffix(".html").read_text(encoding="utf-8"))


def grouped(items: Iterable[Any], key: Callable[[Any], Any]) -> dict[Any, list[Any]]:
    """Items by `key`, in order of appearance."""
    groups: dict[Any, list[Any]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def picture(figure: plt.Figure) -> str:
    buffer = io.BytesIO()
    figure.tight_layout()
    figure.savefig(buffer, format="png", dpi=90)
    plt.close(figure)
    return f'<img alt="plot" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def finish(axis: plt.Axes, title: str, share: bool = True) -> None:
    """`share`: values are from 0 to 1."""
    axis.set_title(title, fontsize=9)
    axis.tick_params(labelsize=7)
    axis.grid(alpha=0.25)
    axis.legend(fontsize=6)
    if share:
        axis.set_ylim(-0.03, 1.03)


def plot_curves(videos: list[Video]) -> str:
    """Every metric over the seconds: mean over a cell's videos, and the range of its seeds' means."""
    columns, lines = 3, -(-len(METRICS) // 3)
    figure, axes = plt.subplots(lines, columns, figsize=(13, 2.6 * lines))
    for axis, (name, metric) in zip(axes.flat, METRICS.items(), strict=False):
        for number, (cell, some) in enumerate(grouped(videos, lambda video: video[0]["cell"]).items()):
            seeds = grouped(some, lambda video: video[0]["seed"]).values()
            curves = [np.mean([record["curves"][name] for _, record in of_seed], axis=0) for of_seed in seeds]
            means = np.stack(curves)  # [seeds, S]
            seconds, colour = np.arange(means.shape[1]), COLOURS(number % COLOURS.N)
            axis.plot(seconds, means.mean(0), color=colour, label=cell, linewidth=1.2)
            axis.fill_between(seconds, means.min(0), means.max(0), color=colour, alpha=0.15, linewidth=0)
        finish(axis, f"{name} ({metric.unit})", share=False)
    for axis in axes.flat[len(METRICS) :]:
        axis.axis("off")
    return picture(figure)


def plot_pareto(summary: list[dict[str, Any]]) -> str:
    """What is recalled, kept and said right against bytes; nothing where no caption could be read."""
    titles = {"recall": "recalled by returning shots", "kept": "kept though no word says it", "said": "as captioned"}
    kinds = [kind for kind in titles if any(kind in cell for cell in summary)]
    if not kinds:
        return "<p>No captions of the sprite world: nothing to read.</p>"
    figure, axes = plt.subplots(1, len(kinds), figsize=(6 * len(kinds), 3.6), squeeze=False)
    for axis, kind in zip(axes[0], kinds, strict=True):
        for number, cell in enumerate(cell for cell in summary if kind in cell):
            axis.errorbar(cell["bytes"], cell[kind], yerr=cell[f"{kind} std"], fmt="o", label=cell["cell"],
                          color=COLOURS(number % COLOURS.N), capsize=3)  # fmt: skip
        axis.set_xscale("log")
        axis.set_xlabel("bytes attended", fontsize=8)
        finish(axis, titles[kind])
    return picture(figure)


def plot_recall(videos: list[Video]) -> str:
    """Recall of what captions leave out against the chunks since a character was last seen, of every cell's stories."""
    tables = {
        cell: recall_table([RecallMark(**mark) for _, record in some for mark in record["recall"]])
        for cell, some in grouped(videos, lambda video: video[0]["cell"]).items()
    }
    if not any(tables.values()):
        return ""
    buckets = [*map(str, SINCE), f"over {SINCE[-1]}"]
    figure, axes = plt.subplots(1, len(LEFT_OUT), figsize=(6 * len(LEFT_OUT), 3.2))
    for axis, attribute in zip(axes, LEFT_OUT, strict=True):
        axis.axhline(CHANCE[attribute], color="0.5", linestyle=":")
        for number, (cell, found) in enumerate(tables.items()):
            shares = {bucket: some[attribute] for bucket, some in found.get("since", {}).items()}
            places = [buckets.index(bucket) for bucket in shares]
            axis.plot(places, list(shares.values()), "o-", label=cell, color=COLOURS(number % COLOURS.N))
        axis.set_xticks(range(len(buckets)), buckets)
        finish(axis, f"{attribute} recalled, by chunks since last seen (dotted: chance)")
    return picture(figure)


def table(summary: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for cell in summary for name in cell if not name.endswith(" std")))
    lines = ["<tr>" + "".join(f"<th>{html.escape(name)}</th>" for name in names) + "</tr>"]
    for cell in summary:
        shown = (
            f"{cell[name]:.4g} ± {cell[f'{name} std']:.2g}" if f"{name} std" in cell else str(cell.get(name, "-"))
            for name in names
        )
        lines.append("<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in shown) + "</tr>")
    return f"<table>{''.join(lines)}</table>"


def video_rows(folder: Path, videos: list[Video], count: int) -> str:
    """The first seed's videos of the first `count` prompts, a row for each, cells side by side."""
    parts = []
    shown = [row for row, _ in videos if row["seed"] == videos[0][0]["seed"]]
    for prompt, rows in list(grouped(shown, lambda row: row["prompt"]).items())[:count]:
        figures = []
        for row in rows:
            data = base64.b64encode((folder / row["video"]).read_bytes()).decode()
            figures.append(
                f'<figure><video muted loop playsinline preload="auto" src="data:video/mp4;base64,{data}"></video>'
                f"<figcaption>{html.escape(row['cell'])}</figcaption></figure>"
            )
        parts.append(f'<h3>{html.escape(prompt)}</h3><div class="videos">{"".join(figures)}</div>')
    return "\n".join(parts)


def write_page(path: Path, videos: list[Video], summary: list[dict[str, Any]], count: int) -> None:
    """A row's `video` is relative to the page, which holds those of `count` prompts; `summary`: of every cell."""
    page = PAGE.substitute(
        title=html.escape(f"{len(summary)} settings, {len(videos)} videos"),
        videos=video_rows(path.parent, videos, count),
        table=table(summary),
        pareto=plot_pareto(summary),
        recall=plot_recall(videos),
        curves=plot_curves(videos),
    )
    path.write_text(page, encoding="utf-8")
