"""How good videos are: what can be measured on any of them, and how much of a sprite-world caption is right.

    python -m scripts.evaluate output/demo                 # every video below, a table for each folder
    python -m scripts.evaluate output/demo/000.mp4 --json
    python -m scripts.evaluate --config_path configs/tiny/demo.yaml --captions 16 --seconds 60 cache.top_k=4
    python -m scripts.evaluate --config_path configs/tiny/demo.yaml --pairs unseen --output_folder output/new
    python -m scripts.evaluate --config_path configs/tiny/demo.yaml --stories 64 --chunks 16 --shot_chunks 1 4
    python -m scripts.evaluate --config_path configs/tiny/demo.yaml --stories 64 --since 1 4 16 64
    python -m scripts.evaluate --config_path configs/tiny/ar_demo.yaml --teacher \
        bundles/tiny_teacher/transformer sampler.num_steps=16 sampler.guidance=4

With --config_path videos of the first held-out captions (clips from index 1,000,000 on) are made, in batches, and kept
in --output_folder: `seen` combinations of colour and shape, or the `unseen` ones that no training clip shows. With
--teacher a bidirectional DiT makes clips of `video.trained_frames`, by `sampler`'s Euler steps.

With --stories they are held-out stories (`utils/sprites/story.py`), and the table says how much of what their captions
leave out is recalled, by chunks since a character was last seen and by shots between. With --since each brings a
character back after exactly so many chunks of the other two, cut into --between shots.

Metrics of any video: `utils/metrics.py`. Captions come from NAME.json beside NAME.mp4; each attribute has two scores:
over the seconds of videos whose caption states it, and over those whose caption leaves it out, where right means "as in
seconds 1 to 4 of the same video". "moving": a sprite is there and does not stand still. With --json, or --config_path,
the last line is one JSON object.
"""

import argparse
import json
import logging
import sys
import time
from functools import partial
from pathlib import Path

from scripts.generated import find_videos, read_sidecar
from scripts.held_out import VideoSource, held_out_stories
from scripts.judge import Verdict, judge, print_comparison, print_recall, print_table, summarise
from utils.cli import check_positive, run_command
from utils.config import Config, ConfigError
from utils.load_config import load_config
from utils.sprites.recall import CHANCE, RECALLED, recall, recall_table, score_story
from utils.sprites.story import Story, sample_return, sample_story
from utils.sprites.world import FPS, held_out_captions
from utils.video import frame_rate, read_video

log = logging.getLogger(__name__)


def evaluate_folder(videos: list[Path]) -> dict[str, Verdict]:
    """Name -> verdict of the readable ones; logs the others."""
    verdicts = {}
    for video in videos:
        try:
            prompt, fps = read_sidecar(video)
            verdicts[video.name] = judge(read_video(video), fps or frame_rate(video), prompt, str(video))
        except (ValueError, OSError) as error:
            log.warning("left out: %s", error)
    return verdicts


def evaluate_path(path: Path, with_json: bool) -> None:
    """Tables of the videos at `path`. Raises `ConfigError` where none can be read."""
    verdicts = {folder: evaluate_folder(videos) for folder, videos in find_videos(path).items()}
    folders = {folder: summarise(list(found.values())) for folder, found in verdicts.items() if found}
    if not folders:
        raise ConfigError(f"{path}: no video there can be read")
    for folder, summary in folders.items():
        print_table(str(path / folder), summary)
    if len(folders) > 1:
        print_comparison(folders)
    if with_json:
        for folder, summary in folders.items():
            summary["per_video"] = {name: summarise([verdict]) for name, verdict in verdicts[folder].items()}
        print(json.dumps({"folders": folders}))


def evaluate_held_out(arguments: argparse.Namespace) -> None:
    """Generate videos of held-out captions and print what is right in them."""
    config = load_config(arguments.config_path, arguments.arguments)
    prompts = held_out_captions(config.seed, arguments.captions, arguments.pairs)
    source = VideoSource(config, arguments.batch, arguments.output_folder, arguments.teacher)
    verdicts, made, start = [], 0, time.perf_counter()
    for prompt, frames in zip(prompts, source.videos(prompts, arguments.seconds), strict=True):
        made += len(frames)
        verdicts.append(judge(frames, config.video.fps, prompt))
    figures = {"frames_per_second": round(made / (time.perf_counter() - start), 1)}
    summary = summarise(verdicts)
    print_table(f"held-out captions, {arguments.pairs} pairs", summary)
    settings = {"config": arguments.config_path, "overrides": arguments.arguments, "pairs": arguments.pairs}
    print(json.dumps({**settings, **figures, **summary}))


def draw_stories(arguments: argparse.Namespace, config: Config) -> list[list[Story]]:
    """Held-out stories, in lists of equal length. Raises `ConfigError`."""
    (least, most), between = arguments.shot_chunks, arguments.between
    if least > most or (between or 1) > min(arguments.since or [1]):
        raise ConfigError(f"--shot_chunks {least} {most}, --between {between}: expected the least length first, and no "
                          "more shots between than chunks")  # fmt: skip
    draws = [partial(sample_story, chunks=arguments.chunks, shot_chunks=(least, most))]
    if arguments.since:
        options = {"between": between, "shot_chunks": least, "opening": arguments.opening}
        draws = [partial(sample_return, since=since, **options) for since in arguments.since]
    return [held_out_stories(config, arguments.stories, draw) for draw in draws]


def evaluate_stories(arguments: argparse.Namespace) -> None:
    """Generate held-out stories and print what their returning shots recall."""
    config = load_config(arguments.config_path, arguments.arguments)
    drawn = draw_stories(arguments, config)
    source = VideoSource(config, arguments.batch, arguments.output_folder)
    returning, first, start = [], [], time.perf_counter()
    for stories in drawn:
        videos = source.videos([story.schedule for story in stories], stories[0].shots[-1].frames.stop / FPS)
        for story, frames in zip(stories, videos, strict=True):
            marks = score_story(frames, story)
            returning += marks[-len(RECALLED) :] if arguments.since else marks  # the last shot is what was asked for
            first += score_story(frames, story, returning=False)
    minutes = (time.perf_counter() - start) / 60
    table = recall_table(returning)
    print_recall(table | {"first shots": {"": recall(first)}})
    print(json.dumps({
        "config": arguments.config_path, "overrides": arguments.arguments, "stories": source.made,
        "stories_per_minute": round(source.made / minutes, 2), "recall": table, "first": recall(first),
        "chance": CHANCE,
    }))  # fmt: skip


def run(arguments: argparse.Namespace) -> None:
    check_positive(arguments, "captions", "seconds", "batch", "chunks", "stories", "between", "shot_chunks", "since")
    if arguments.config_path is not None:
        return evaluate_held_out(arguments) if arguments.stories is None else evaluate_stories(arguments)
    if not arguments.arguments:
        raise ConfigError("nothing to evaluate: name a video or a folder of them, or give --config_path")
    for path in arguments.arguments:
        evaluate_path(Path(path), arguments.json)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arguments", nargs="*", metavar="PATH or key=value", help="videos or folders; with "
                        "--config_path settings")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    parser.add_argument("--config_path", help="generate videos of held-out captions with this YAML")
    parser.add_argument("--captions", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=5.0, help="length of each video, rounded up to whole chunks")
    parser.add_argument("--pairs", choices=("seen", "unseen"), default="seen", help="colour and shape combinations")
    parser.add_argument("--stories", type=int, help="so many stories in place of captions")
    parser.add_argument("--chunks", type=int, default=16, help="length of each story")
    parser.add_argument("--shot_chunks", type=int, nargs=2, default=[1, 4], help="least and most chunks of a shot")
    parser.add_argument("--since", type=int, nargs="+", help="chunks before a story's first character comes back")
    parser.add_argument("--between", type=int, help="shots that these are cut into; default: two, or more")
    parser.add_argument("--opening", type=int, default=2, help="chunks of another character before those of --since, "
                        "which the sink holds in place of the one that comes back")  # fmt: skip
    parser.add_argument("--batch", type=int, default=16, help="videos generated together")
    parser.add_argument("--teacher", type=Path, help="transformer folder of a bidirectional DiT to score in its place")
    parser.add_argument("--output_folder", type=Path, help="keep the videos here")
    arguments = parser.parse_intermixed_args(argv)
    return run_command(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
