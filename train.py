"""Train one stage.

    python train.py --config_path configs/tiny/teacher.yaml
    torchrun --nproc_per_node=2 train.py --config_path configs/tiny/teacher.yaml train.max_steps=5000

A run lives in `train.logdir` (or --logdir): resolved config, log.jsonl, checkpoints, samples and, at the end, bundle/.
Started again, it goes on from its last checkpoint.
"""

import argparse
import logging
import sys
from pathlib import Path

import torch
from omegaconf import OmegaConf

from pipeline.train.checks import check_run
from pipeline.train.method import build_stage
from pipeline.train.trainer import Trainer, TrainingDivergedError
from utils.config import Config, ConfigError
from utils.distributed import World, rank
from utils.load_config import load_config, to_yaml
from utils.tracking import Tracker

USAGE_ERROR, DIVERGED = 2, 1


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config_path", required=True, help="YAML of the stage")
    parser.add_argument("--logdir", help="folder of the run; overrides train.logdir")
    parser.add_argument("--disable-wandb", action="store_true", help="no tracker, whatever train.tracker says")
    parser.add_argument("--no_save", action="store_true", help="write no checkpoint and no bundle")
    parser.add_argument("--no_visualize", action="store_true", help="write no sample videos")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, for example train.max_steps=100")
    return parser.parse_intermixed_args(arguments)


def find_logdir(config: Config) -> Path:
    """The run's folder. Raises `ConfigError` where none is named."""
    if config.train.logdir is None:
        raise ConfigError("no folder for the run: give --logdir or set train.logdir")
    return Path(config.train.logdir)


def prepare_logdir(logdir: Path, config: Config, world: World) -> None:
    """Create the run's folder and put the resolved config there. Raises `ConfigError` where that cannot be."""
    if world.is_main:
        try:
            logdir.mkdir(parents=True, exist_ok=True)
            (logdir / "config.yaml").write_text(to_yaml(config))
        except OSError as error:
            raise ConfigError(f"setting `train.logdir` is {logdir}: cannot be written ({error.strerror})") from error


def train(arguments: argparse.Namespace) -> None:
    """Raises `ConfigError` for what the user can mend, `TrainingDivergedError` where training broke."""
    config = load_config(arguments.config_path, arguments.overrides)
    if arguments.logdir is not None:
        config.train.logdir = arguments.logdir
    if arguments.disable_wandb:
        config.train.tracker = None
    with rank() as (device, world):
        logdir, save = find_logdir(config), not arguments.no_save
        check_run(config, world, logdir, save)
        prepare_logdir(logdir, config, world)
        if config.train.threads is not None:
            torch.set_num_threads(config.train.threads)
        torch.manual_seed(config.seed)
        stage = build_stage(config, device, world)
        settings = OmegaConf.to_container(OmegaConf.create(to_yaml(config)))
        tracker = Tracker(logdir, config.train.tracker, config.train.project, settings, world.is_main)
        trainer = Trainer(config, stage, world, logdir, tracker, device, save, not arguments.no_visualize)
        if config.train.compile:
            stage.compile()
        try:
            trainer.run()
        finally:
            tracker.close()


def main(arguments: list[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    try:
        train(parse_arguments(arguments))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE_ERROR
    except TrainingDivergedError as error:
        print(f"error: {error}", file=sys.stderr)
        return DIVERGED
    return 0


if __name__ == "__main__":
    sys.exit(main())
