"""Train one stage.

    python train.py --config_path configs/tiny/teacher.yaml
    torchrun --nproc_per_node=2 train.py --config_path configs/tiny/teacher.yaml train.max_steps=5000

A run lives in `train.logdir` (or --logdir): resolved config, log.jsonl, checkpoints, samples and, at the end, bundle/.
Started again, it goes on from its last checkpoint; Ctrl-C or SIGTERM saves one at the end of the step. Exit status: 130
or 143 then, of every rank (torchrun's own is 1, and it waits 30 s); 2 a mistake, in one line; 1 training diverged.
"""

import argparse
import logging
import sys
from contextlib import nullcontext
from pathlib import Path

from pipeline.sources import require_training_files
from utils.cli import config_parser, run_configured
from utils.config import Config, ConfigError
from utils.files import writable_folder
from utils.load_config import plain, to_yaml
from utils.tracking import Tracker, check_tracker

log = logging.getLogger(__name__)


def train(config: Config, arguments: argparse.Namespace) -> None:
    """Raises `ConfigError` for what the user can mend, `TrainingDivergedError` where training broke."""
    if arguments.disable_wandb:
        config.train.tracker = None
    if config.train.logdir is None:
        raise ConfigError("no folder for the run: give --logdir or set train.logdir")
    check_tracker(config.train.tracker)
    require_training_files(config)
    logdir = Path(config.train.logdir)
    import torch  # heavy, like what follows: after what can be checked without them

    from pipeline.fit import check_memory
    from pipeline.train.checks import check_run
    from pipeline.train.stages import build_stage
    from pipeline.train.trainer import Trainer
    from utils.distributed import barrier, rank
    from utils.lock import locked

    save = not arguments.no_save
    with rank(config.train.threads) as (device, world):
        check_run(config, world, logdir, save)
        if not arguments.no_estimate:
            check_memory(config, "train", world, device)
        writable_folder(logdir, "train.logdir")
        with locked(logdir, "train.logdir") if world.is_main else nullcontext():
            barrier(world)  # the others go on only once the folder is the first rank's
            if world.is_main:
                (logdir / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
            torch.manual_seed(config.seed)
            if world.is_main:
                log.info("%s: loading models and data", config.train.stage)
            tracker = Tracker(logdir, config.train.tracker, config.train.project, plain(config), world.is_main)
            try:
                stage = build_stage(config, device, world)
                trainer = Trainer(config, stage, world, logdir, tracker, device, save, not arguments.no_visualize)
                if config.train.compile:
                    stage.compile()
                    if world.is_main:
                        log.info("compiling: the first step of each clip length takes minutes")
                trainer.run()
            finally:
                tracker.close()


def main(argv: list[str] | None = None) -> int:
    parser = config_parser(__doc__)
    parser.add_argument("--logdir", dest="train.logdir", help="folder of the run")
    parser.add_argument("--disable-wandb", action="store_true", help="no tracker, whatever train.tracker says")
    parser.add_argument("--no_save", action="store_true", help="write no checkpoint and no bundle")
    parser.add_argument("--no_visualize", action="store_true", help="write no sample videos")
    parser.add_argument("--no_estimate", action="store_true", help="do not ask first whether it fits the GPU")
    return run_configured(parser, argv, train)


if __name__ == "__main__":
    sys.exit(main())
