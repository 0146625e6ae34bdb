"""Checkpoints of a training run: written in the background by all ranks, whole or absent, the last few kept.

A checkpoint is a folder `step-N` of `torch.distributed.checkpoint` files (tensors only, sharded as they were), with
`info.json` (what is not a tensor) and `config.yaml` (the resolved settings) beside them. It is written under another
name and renamed once every rank's part is on disk, so a folder of that name is complete whatever was killed when. It
loads on any number of ranks. With several machines, the folder must be on a file system that all of them see.
"""

import json
import logging
import os
import shutil
import warnings
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException

from utils.config import ConfigError
from utils.distributed import World, barrier

log = logging.getLogger(__name__)
# A run of one process has no process group, and needs none.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

_PREFIX, _PARTIAL, _INFO, _CONFIG = "step-", ".partial-", "info.json", "config.yaml"
_WRITTEN_LAST = ".metadata"  # of torch.distributed.checkpoint


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob(f"{_PREFIX}*") if (path / _WRITTEN_LAST).is_file())


def read_info(checkpoint: Path) -> dict[str, Any]:
    """What `Checkpoints.save` was given as `info`. Raises `ConfigError` for a folder that is no checkpoint."""
    try:
        return json.loads((checkpoint / _INFO).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigError(f"checkpoint {checkpoint}: no readable {_INFO} there; name a folder {_PREFIX}N") from error


def read_into(checkpoint: Path, tensors: dict[str, Any]) -> None:
    """Fill `tensors` (nested dicts; shards get their part) from a checkpoint, by name. All ranks call it.

    Raises `ConfigError` where the checkpoint has other tensors.
    """
    try:
        dcp.load(tensors, checkpoint_id=checkpoint)
    except CheckpointException as error:
        raise ConfigError(
            f"checkpoint {checkpoint} is not one of this model and optimizer ({_first_failure(error)}); train with the "
            f"settings in its {_CONFIG}, or choose another train.logdir"
        ) from error


def tensor_shapes(checkpoint: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of every tensor in a checkpoint, by its dotted name."""
    entries = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    return {name: (entry.size, entry.properties.dtype) for name, entry in entries.items()}


def _first_failure(error: CheckpointException) -> str:
    """What went wrong on the first rank that failed, in one line."""
    cause = next(iter(error.failures.values()))[0]
    return str(cause).splitlines()[0]


class Checkpoints:
    """The checkpoints of one run. Every rank makes one, and calls it at the same steps.

    Args:
        folder: where they lie.
        keep: how many complete ones are kept.
        config: the resolved settings as YAML.
    """

    def __init__(self, folder: Path, keep: int, config: str, world: World):
        self.folder, self.keep, self.config, self.world = folder, keep, config, world
        # Ranks coordinate from a background thread, so not through the group that the main thread uses.
        self._group = dist.new_group(backend="gloo") if world.size > 1 else None
        self._pending: tuple[int, Future] | None = None

    def save(self, step: int, tensors: dict[str, Any], info: dict[str, Any]) -> None:
        """Copy `tensors` to the CPU, then write in the background. Waits for the save before it, and raises OSError
        where that failed.

        Args:
            tensors: nested dicts of tensors; one that is whole on every rank is written once.
            info: plain values, written as JSON.
        """
        self.finish()
        partial = self._partial(step)
        if self.world.is_main:
            for left in self.folder.glob(f"{_PARTIAL}*"):  # of a run that was killed
                shutil.rmtree(left)
            partial.mkdir(parents=True)
            (partial / _INFO).write_text(json.dumps(info, indent=2))
            (partial / _CONFIG).write_text(self.config)
        barrier(self.world)
        self._pending = step, dcp.async_save(tensors, checkpoint_id=partial, process_group=self._group)

    def poll(self) -> None:
        """Publish the save under way if it is done; costs nothing, to be called every step."""
        if self._pending is not None and self.world.is_main and self._pending[1].done():
            self.finish()

    def finish(self) -> None:
        """Wait for the save under way, if any, and publish it. Raises OSError where it failed on any rank."""
        if self._pending is None:
            return
        (step, future), self._pending = self._pending, None
        try:
            future.result()
        except CheckpointException as error:
            raise OSError(f"checkpoint of step {step} could not be written: {_first_failure(error)}") from error
        if self.world.is_main:
            os.replace(self._partial(step), self.folder / f"{_PREFIX}{step:08d}")
            log.info("checkpoint of step %d is complete", step)
            for old in list_checkpoints(self.folder)[: -self.keep]:
                gone = self.folder / f"{_PARTIAL}{old.name}"  # half deleted, it must not look like a checkpoint
                os.replace(old, gone)
                shutil.rmtree(gone)

    def _partial(self, step: int) -> Path:
        return self.folder / f"{_PARTIAL}{step:08d}"
