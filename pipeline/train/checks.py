"""What can be found wrong with a training run before any of its models is allocated."""

import shutil
from pathlib import Path

import torch

from pipeline.train.parallel import shard_size
from pipeline.train.stages import METHODS
from utils.config import Config, ConfigError, require
from utils.distributed import World

BYTES_PER_WEIGHT = 16  # in a checkpoint: float32 weight, both moments of AdamW, EMA
GIB = 2**30


def check_run(config: Config, world: World, logdir: Path, save: bool) -> None:
    """All checks. Raises `ConfigError`, in one line, for the first that fails. `logdir`: where checkpoints would go;
    `save`: whether there will be any."""
    require(config, "parallel.sequence", config.parallel.sequence == 1, "must be 1, as only inference makes a video on "
            "several ranks; training has train.sharding")  # fmt: skip
    check_plan(config, world.size)
    check_ranks(config, world)
    METHODS[config.train.stage].check(config)
    if save:
        check_disk(config, logdir)


def check_plan(config: Config, world_size: int) -> None:
    """Ranks, batch and accumulation against the total batch."""
    train = config.train
    require(config, "train.stage", train.stage, f"choose one of {', '.join(METHODS)}")
    METHODS[train.stage]  # an unknown one shows here
    if train.total_batch_size is None:
        return
    if train.phases:
        raise ConfigError("settings `train.total_batch_size` and `train.phases` exclude each other: unset one")
    product = world_size * train.batch_size * train.gradient_accumulation
    require(config, "train.total_batch_size", product == train.total_batch_size, f"{world_size} ranks x batch_size "
            f"{train.batch_size} x gradient_accumulation {train.gradient_accumulation} = {product}; change one of them",
    )  # fmt: skip


def check_ranks(config: Config, world: World) -> None:
    """Ranks must fill the sharding groups."""
    size = shard_size(config, world)
    found = f"{world.size} ranks do not fill groups of {size}; choose a divisor"
    require(config, "train.shard_size", world.size % size == 0, found)


def check_disk(config: Config, logdir: Path) -> None:
    """Room for `train.keep_checkpoints` checkpoints and the one being written."""
    count = config.train.keep_checkpoints + 1
    with torch.device("meta"):
        models = METHODS[config.train.stage].trained(config)
    size = BYTES_PER_WEIGHT * sum(p.numel() for model in models for p in model.parameters())
    folder = logdir / "checkpoints"
    held = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free + held < count * size:
        raise ConfigError(
            f"{count} checkpoints of {size / GIB:.2f} GiB (train.keep_checkpoints={count - 1} and one being written) "
            f"do not fit in {folder}: {(free + held) / GIB:.2f} GiB are free; free some, lower it or move train.logdir"
        )
