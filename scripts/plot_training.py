"""Training curves as a picture, from the `log.jsonl` of one or several runs.

    python -m scripts.plot_training runs/dmd
    python -m scripts.plot_training runs/teacher_motion runs/consistency runs/dmd --output docs/training.png

A row per run: losses; gradient norms; what tells a bad run early, where the stage logs it; readings of the sample
videos, where their prompts are sprite-world captions. Faint: as logged; strong: a running median.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from utils.cli import run_command
from utils.config import ConfigError

COLOURS = matplotlib.colormaps["tab20"]
SMOOTHING = 1 / 25  # of a run's records, under one running median
Curves = dict[str, tuple[np.ndarray, np.ndarray]]  # name -> steps, values

# Title -> (last part of a key's name is one of these, or begins with one that ends in an underscore; logarithmic axis).
PANELS: dict[str, tuple[tuple[str, ...], bool]] = {
    "loss": (("loss", "data_mse", "flow_mse_high", "flow_mse_low"), True),
    "gradient and update norms": (("grad_norm", "grad_norm_", "update_norm_"), True),
    "rollouts against data": (("critic_lag", "kl_gradient", "motion_against_data", "latent_std_least",
                               "latent_std_most"), False),
    "sample videos read right": (("sample/",), False),
}  # fmt: skip


def read_log(run: Path) -> Curves:
    """Every number in a run's log by name. Raises `ConfigError`, naming the file."""
    path = run / "log.jsonl"
    if not path.is_file():
        raise ConfigError(f"{path} does not exist: name the folder of a training run")
    points: dict[str, dict[int, float]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
            step = int(record.pop("step"))
        except (ValueError, KeyError, AttributeError) as error:
            raise ConfigError(f"{path}, line {number}: not a record of a training step") from error
        for key, value in record.items():
            points.setdefault(key, {})[step] = value  # a resumed run repeats steps: the last one counts
    return {key: (np.array(sorted(of)), np.array([of[step] for step in sorted(of)])) for key, of in points.items()}


def choose(curves: Curves, names: tuple[str, ...]) -> Curves:
    """The curves that belong to a panel."""
    found = {}
    for key, curve in curves.items():
        for name in names:
            last = key.rsplit("/", 1)[-1]
            inside = key.startswith(name) if name.endswith("/") else last == name
            if inside or (name.endswith("_") and last.startswith(name)):
                found[key] = curve
    # With a loss of its own for every role, the bare one repeats one of them.
    roles = {key for key in found if key.endswith("/loss")}
    return {key: curve for key, curve in found.items() if not (key == "loss" and roles)}


def running_median(values: np.ndarray) -> np.ndarray:
    """Median over a centred window, shorter at both ends."""
    half = max(1, round(len(values) * SMOOTHING / 2))
    return np.array([np.median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))])


def draw(axis: plt.Axes, title: str, curves: Curves, logarithmic: bool) -> None:
    axis.set_title(title, fontsize=9)
    sparse = title == "sample videos read right"
    for index, (key, (steps, values)) in enumerate(sorted(curves.items())):
        finite = np.isfinite(values) & ((values > 0) | (not logarithmic))
        steps, values, colour = steps[finite], values[finite], COLOURS(index % COLOURS.N)
        label = key.removeprefix("sample/")
        if sparse:
            axis.plot(steps, values, "o-", color=colour, label=label, markersize=3, linewidth=1)
        else:
            axis.plot(steps, values, color=colour, alpha=0.2, linewidth=0.6)
            axis.plot(steps, running_median(values), color=colour, label=label, linewidth=1.3)
    if logarithmic:
        axis.set_yscale("log")
    if sparse:
        axis.set_ylim(-0.03, 1.03)
    axis.set_xlabel("step", fontsize=8)
    axis.tick_params(labelsize=7)
    axis.grid(alpha=0.25)
    axis.legend(fontsize=6, ncols=math.ceil(len(curves) / 7))


def plot(runs: list[Path], output: Path) -> None:
    """Write the picture and print where. Raises `ConfigError`."""
    logs = {run: read_log(run) for run in runs}
    chosen = {run: {title: choose(logs[run], names) for title, (names, _) in PANELS.items()} for run in runs}
    titles = [title for title in PANELS if any(chosen[run][title] for run in runs)]
    if not titles:
        raise ConfigError(f"{', '.join(map(str, runs))}: nothing logged yet that could be plotted")
    figure, axes = plt.subplots(len(runs), len(titles), figsize=(4.2 * len(titles), 3.0 * len(runs)), squeeze=False)
    for row, run in zip(axes, runs, strict=True):
        row[0].set_ylabel(run.name, fontsize=10, fontweight="bold")
        for axis, title in zip(row, titles, strict=True):
            if chosen[run][title]:
                draw(axis, title, chosen[run][title], PANELS[title][1])
            else:
                axis.axis("off")
    figure.tight_layout()
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=80)
    plt.close(figure)
    print(output)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a training run")
    parser.add_argument("--output", type=Path, help="picture to write; by default training.png in the first run")
    options = parser.parse_args(arguments)
    return run_command(lambda: plot(options.runs, options.output or options.runs[0] / "training.png"))


if __name__ == "__main__":
    sys.exit(main())
