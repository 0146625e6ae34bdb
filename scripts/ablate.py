"""One config with some of its settings varied: videos, measurements, plots and a page to look at, side by side.

    python -m scripts.ablate --config_path configs/tiny/demo.yaml --data_path prompts/tiny.txt --output_folder out \\
        --vary cache.top_k=1,4,16 --vary cache.temporal=packed,fit --seeds 3 --seconds 60
    torchrun --nproc_per_node=8 -m scripts.ablate ...
    python -m scripts.ablate --config_path configs/tiny/demo.yaml --stories 16 --output_folder out --seconds 60 \\
        --vary "cache.kind=pack | cache.kind=window cache.recent=2 | cache.kind=sink cache.recent=1"

Every --vary is an axis of the grid: values of one setting, or, with bars between them, sets of settings that belong
together. Prompts are a file's (--data_path), the first --captions of the held-out sprite world, or so many --stories of
it. Every cell makes every prompt's video with every seed, the same noise in all cells. Ranks share the videos; started
again, what is there is kept.

Writes to --output_folder: videos by cell and seed; results.csv, a row per video: settings, bytes of the cache, speed,
`utils/metrics.py`, and what is read right of sprite-world captions: `said`, in seconds 1 on, `kept`, what the caption
leaves out and must be as in seconds 1 to 4, so only memory can keep it, and `recall`, what returning shots of stories
show as it was; summary.csv, mean and std over seeds of each cell; page.html, all of it with plots and videos, one file.
"""

import argparse
import csv
import itertools
import json
import logging
import math
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from pipeline.bundle import check_bundle
from pipeline.data.prompt_files import read_prompt_items
from pipeline.data.schedule import Prompt, texts
from pipeline.generate.inference import load_pipeline, resolve_runtime
from pipeline.generate.jobs import slug
from pipeline.generate.pipeline import PackForcingPipeline
from scripts.ablate_page import grouped, write_page
from scripts.held_out import held_out_stories
from scripts.judge import judge
from utils.cli import check_positive, config_parser, run_command
from utils.config import Config, ConfigError
from utils.distributed import World, barrier, rank
from utils.files import writable_folder, write_json
from utils.load_config import load_config, plain
from utils.sprites.read import READERS, accuracy
from utils.sprites.recall import LEFT_OUT, RecallMark, recall
from utils.sprites.story import FRAMES_PER_CHUNK, STRIDE, num_chunks, sample_story
from utils.sprites.world import FPS, held_out_captions
from utils.video import write_video

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """One video: prompt number `index` with a seed, in a cell of the grid (settings that differ from the base)."""

    cell: tuple[str, ...]
    config: Config
    seed: int
    index: int
    prompt: Prompt
    seconds: float
    folder: Path

    @property
    def name(self) -> str:
        return " ".join(self.cell) or "base"

    @property
    def video(self) -> Path:
        cell = re.sub(r"[^A-Za-z0-9.,=_-]+", "_", self.name)[:150]
        return self.folder / cell / f"seed{self.seed}" / f"{self.index:04d}_{slug(texts(self.prompt)[0])}.mp4"

    @property
    def made_by(self) -> dict[str, Any]:
        """Everything that the video is a function of."""
        config = {name: plain(self.config)[name] for name in ("model", "cache", "sampler", "video")}
        return {"config": config, "seed": self.seed, "seconds": self.seconds, "prompt": self.prompt}

    def record(self) -> dict[str, Any] | None:
        """What is known of the finished video; None where it is not there, or was made otherwise."""
        try:
            record = json.loads(self.video.with_suffix(".json").read_text(encoding="utf-8"))
            return record if record["made_by"] == self.made_by and self.video.is_file() else None
        except (OSError, ValueError, KeyError, TypeError):
            return None


def axis(text: str) -> list[list[str]]:
    """`key=a,b` -> [["key=a"], ["key=b"]]; `key=a other=1 | key=b` -> [["key=a", "other=1"], ["key=b"]]. Commas inside
    brackets do not separate. Raises `ConfigError`."""
    if "|" in text:
        return [cell.split() for cell in text.split("|")]
    key, equals, values = text.partition("=")
    found = [value for value in re.split(r",(?![^\[{]*[\]}])", values) if value]
    if not equals or not found:
        raise ConfigError(f"--vary {text}: expected key=value,value,...")
    return [[f"{key}={value}"] for value in found]


def plan(arguments: argparse.Namespace) -> list[Task]:
    """Every video of the grid. Raises `ConfigError` for a cell that no run could use, before anything is loaded."""
    check_positive(arguments, "seeds", "seconds", "captions", "stories")
    cells = [tuple(itertools.chain(*cell)) for cell in itertools.product(*map(axis, arguments.vary))]
    configs = [load_config(arguments.config_path, [*arguments.overrides, *cell]) for cell in cells]
    for config in configs:
        check_bundle(config)
    prompts = held_out(arguments, configs[0])
    if arguments.data_path:
        prompts = [item.prompt for item in read_prompt_items(arguments.data_path)]
    folder, first = writable_folder(arguments.output_folder, "--output_folder"), configs[0].seed
    return [
        Task(cell, config, seed, index, prompt, arguments.seconds, folder)
        for cell, config in zip(cells, configs, strict=True)
        for seed in range(first, first + arguments.seeds)
        for index, prompt in enumerate(prompts)
    ]


def held_out(arguments: argparse.Namespace, config: Config) -> list[Prompt]:
    """The first captions, or stories, of the held-out sprite world."""
    if not arguments.stories:
        return held_out_captions(config.seed, arguments.captions)
    chunks = num_chunks(math.ceil(arguments.seconds * FPS) + FRAMES_PER_CHUNK * STRIDE - 1)
    draw = partial(sample_story, chunks=chunks, shot_chunks=arguments.shot_chunks)
    return [story.schedule for story in held_out_stories(config, arguments.stories, draw)]


def pipelines(tasks: list[Task]) -> Iterator[tuple[Task, PackForcingPipeline]]:
    """Each task with its models; these are loaded anew only where a setting changes that they depend on."""
    loaded, pipe = None, None
    for task in tasks:
        settings = plain(task.config)
        settings["cache"] = settings["cache"]["compressor"]  # all else of the cache can change from call to call
        if settings != loaded:
            loaded, pipe = settings, load_pipeline(task.config, resolve_runtime(task.config))
        yield task, pipe


def make(task: Task, pipe: PackForcingPipeline) -> None:
    """Write the video, then its record."""
    fps, start, pieces = task.config.video.fps, time.perf_counter(), []
    options = {"seconds": task.seconds, "seed": task.seed, "cache": task.config.cache, "output_type": "uint8"}
    for chunk in pipe.stream(task.prompt, **options):
        pieces.append(chunk.frames[0])
        report = chunk.report
    frames = np.concatenate(pieces)  # [F, H, W, 3]
    speed = len(frames) / (time.perf_counter() - start)
    write_video(task.video, frames, fps)
    verdict = judge(frames, fps, task.prompt)
    said, kept = (accuracy(verdict.marks, captioned) for captioned in (True, False))
    write_json(task.video.with_suffix(".json"), {
        "prompt": task.prompt, "fps": fps, "made_by": task.made_by,
        "bytes": sum(report[part]["bytes"] for part in ("sink", "mid", "recent")),
        "bytes_in_all": sum(part["bytes"] for part in report.values()),
        "frames_per_second": round(speed, 2), "metrics": verdict.metrics, "curves": verdict.curves,
        "said": said, "kept": kept, "recall": [asdict(mark) for mark in verdict.recall],
    })  # fmt: skip


def row(task: Task, record: dict[str, Any]) -> dict[str, Any]:
    """A line of results.csv."""
    cells = {"cell": task.name, **dict(setting.split("=", 1) for setting in task.cell)}
    cells |= {"seed": task.seed, "prompt": "; ".join(texts(task.prompt))}
    cells |= {"video": str(task.video.relative_to(task.folder))}
    cells |= {name: record[name] for name in ("bytes", "bytes_in_all", "frames_per_second")} | record["metrics"]
    for kind in ("said", "kept"):
        found = record[kind]
        cells |= {f"{kind}/{name}": found[name] for name in READERS if name in found}
        if found:
            cells[kind] = float(np.mean(list(found.values())))
    found = recall([RecallMark(**mark) for mark in record["recall"]])
    cells |= {f"recall/{name}": value for name, value in found.items()}
    if found:
        cells["recall"] = float(np.mean([found[name] for name in LEFT_OUT]))
    return cells


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per cell and number: mean over prompts and seeds, and std over the seeds' means (of one seed: 0)."""
    names = dict.fromkeys(name for row in rows for name, value in row.items() if isinstance(value, int | float))
    table = []
    for cell, of_cell in grouped(rows, lambda row: row["cell"]).items():
        found: dict[str, Any] = {"cell": cell, "videos": len(of_cell)}
        for name in names:
            seeds = grouped((row for row in of_cell if name in row), lambda row: row["seed"])
            if seeds and name != "seed":
                means = [np.mean([row[name] for row in some]) for some in seeds.values()]
                found |= {name: float(np.mean(means)), f"{name} std": float(np.std(means))}
        table.append(found)
    return table


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def work(tasks: list[Task], world: World, page_videos: int) -> None:
    """Make this rank's share of what is missing; the rank that ends last writes tables and page."""
    missing = [task for task in tasks if task.record() is None]
    barrier(world)  # every rank has listed the same videos before one is made
    log.info("%d videos, %d of them finished", len(tasks), len(tasks) - len(missing))
    mine = missing[world.rank :: world.size]
    for task, pipe in tqdm(pipelines(mine), total=len(mine), unit="video", disable=not world.is_main):
        make(task, pipe)
    records = [task.record() for task in tasks]
    if None in records:  # another rank is still at work
        return
    rows = [row(task, record) for task, record in zip(tasks, records, strict=True)]
    folder, summary = tasks[0].folder, summarise(rows)
    write_csv(folder / "results.csv", rows)
    write_csv(folder / "summary.csv", summary)
    write_page(folder / "page.html", list(zip(rows, records, strict=True)), summary, page_videos)
    log.info("%s", folder / "page.html")


def run(arguments: argparse.Namespace) -> None:
    tasks = plan(arguments)
    with rank() as (_, world):
        work(tasks, world, arguments.page_videos)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = config_parser(__doc__)
    parser.add_argument("--output_folder", required=True)
    parser.add_argument("--vary", action="append", default=[], metavar="KEY=A,B", help="an axis of the grid")
    parser.add_argument("--data_path", help="file of prompts")
    parser.add_argument("--captions", type=int, default=4, help="without --data_path: so many held-out captions")
    parser.add_argument("--stories", type=int, help="so many held-out stories in place of captions")
    parser.add_argument("--shot_chunks", type=int, nargs=2, default=[1, 4], help="least and most chunks of a shot")
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds, from the config's on")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of each video, rounded up to whole chunks")
    parser.add_argument("--page_videos", type=int, default=2, help="prompts whose videos go into the page")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    return run_command(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
