"""Checkpoints of a training run: written in the background by all ranks, whole or absent, the last few kept.

A checkpoint is a folder `step-N` of `torch.distributed.checkpoint` files (tensors only, sharded as they were), with
`info.json` (what is not a tensor) and `config.yaml` (the resolved settings) beside them. It is written under another
name and renamed once every rank's part is on disk, so a folder of that name is complete whatever was killed when. It
loads on any number of ranks. With several machines, the folder must be on a file system that all of them see.

Every file's checksum is in `SHA256SUMS` (`sha256sum -c` reads it too), so damage shows before anything is loaded.
Nothing in a checkpoint is run: its index, a pickle, may only hold what describes tensors.
"""

import hashlib
import json
import logging
import pickle
import shutil
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path, PosixPath
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint import metadata as index_types
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse
from torch.serialization import _get_layout

from utils.config import ConfigError
from utils.distributed import World, barrier, from_main
from utils.timing import synchronise

log = logging.getLogger(__name__)
CPU = torch.device("cpu")
# A run of one process has no process group, and needs none.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

_PREFIX, _PARTIAL, _DAMAGED = "step-", ".partial-", "damaged-"
_INFO, _CONFIG, _SUMS = "info.json", "config.yaml", "SHA256SUMS"
_INDEX = ".metadata"  # of torch.distributed.checkpoint, the last of its files
_IN_INDEX = {
    (kind.__module__, kind.__qualname__): kind
    for kind in (
        index_types.Metadata,
        index_types.MetadataIndex,
        index_types.TensorStorageMetadata,
        index_types.ChunkStorageMetadata,
        index_types.TensorProperties,
        index_types.StorageMeta,
        index_types._MEM_FORMAT_ENCODING,
        _StorageInfo,
        _get_layout,
        torch.Size,
        PosixPath,
    )
}  # not BytesStorageMetadata: what such an entry points to, torch unpickles without any restriction


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _IN_INDEX:
            return _IN_INDEX[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"holds {module}.{name}, which has no place in an index of tensors")


class _Reader(FileSystemReader):
    """Reads the index without running what may stand in it."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> index_types.Metadata:
        with open(self.path / _INDEX, "rb") as file:
            index = _IndexUnpickler(file).load()
        if not isinstance(index, index_types.Metadata):
            raise pickle.UnpicklingError("is no index of tensors")
        index.storage_meta = index_types.StorageMeta(load_id=self.load_id)
        return index


class _Writer(FileSystemWriter):
    """Writes checksums too: every rank those of its files, the first one gathers them."""

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner):
        written = super().write_data(plan, planner)
        files = {result.storage_data.relative_path for result in written.value()}
        (self.path / f"{_SUMS}.{plan.storage_data.prefix}").write_text(_checksums(self.path, files))
        return written

    def finish(self, metadata: index_types.Metadata, results: list) -> None:
        super().finish(metadata, results)
        parts = sorted(self.path.glob(f"{_SUMS}.*"))
        own = _checksums(self.path, (_INDEX, _INFO, _CONFIG))
        (self.path / _SUMS).write_text(own + "".join(part.read_text() for part in parts))
        for part in parts:
            part.unlink()


def _checksums(folder: Path, names: Iterable[str]) -> str:
    """Lines as of sha256sum."""

    def line(name: str) -> str:
        with open(folder / name, "rb") as file:
            return f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {name}\n"

    with ThreadPoolExecutor() as pool:
        return "".join(pool.map(line, sorted(names)))


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints, oldest first; whether they are whole, `find_damage` says."""
    return sorted(path for path in folder.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdigit())


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, by file; None where it is whole. One without checksums, of an earlier version,
    is held against its index alone."""
    for name in (_INFO, _CONFIG, _INDEX):
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
    sums = checkpoint / _SUMS
    try:
        for line in sums.read_text().splitlines() if sums.is_file() else ():
            _, _, name = line.partition("  ")
            if not (checkpoint / name).is_file():
                return f"{name} is missing"
            if _checksums(checkpoint, [name]) != f"{line}\n":
                return f"{name} is not what was written (its checksum differs)"
        for part in _Reader(checkpoint).read_metadata().storage_data.values():
            file = checkpoint / part.relative_path
            if not file.is_file() or file.stat().st_size < part.offset + part.length:
                return f"{part.relative_path} is missing or cut off"
    except Exception as error:  # a broken pickle raises nearly anything
        return f"{_INDEX} or {_SUMS} cannot be read: {' '.join(str(error).split()) or type(error).__name__}"
    return None


def newest_whole(folder: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint that is whole, and what is wrong with each that is newer. Raises `ConfigError` where there
    are checkpoints, but none is whole."""
    damaged: dict[Path, str] = {}
    for path in reversed(list_checkpoints(folder)):
        problem = find_damage(path)
        if problem is None:
            return path, damaged
        damaged[path] = problem
    if damaged:
        listed = "; ".join(f"{path.name}: {problem}" for path, problem in damaged.items())
        raise ConfigError(f"no checkpoint in {folder} is whole ({listed}): delete that folder to start from step 0")
    return None, {}


def read_info(checkpoint: Path) -> dict[str, Any]:
    """What `Checkpoints.save` was given as `info`. Raises `ConfigError` for a folder that is no checkpoint."""
    try:
        info = json.loads((checkpoint / _INFO).read_text())
        info["step"], info["stage"], info["roles"], info["models"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"checkpoint {checkpoint}: no readable {_INFO} there; name a folder {_PREFIX}N") from error
    return info


def read_into(checkpoint: Path, tensors: dict[str, Any]) -> None:
    """Fill `tensors` (nested dicts; shards get their part) from a checkpoint, by name. All ranks call it. Raises
    `ConfigError` where the checkpoint has other tensors."""
    try:
        dcp.load(tensors, storage_reader=_Reader(checkpoint))
    except CheckpointException as error:
        raise ConfigError(
            f"checkpoint {checkpoint} is not one of this model and optimizer ({_first_failure(error)}); train with the "
            f"settings in its {_CONFIG}, or choose another train.logdir"
        ) from error


def tensor_shapes(checkpoint: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of every tensor in a checkpoint, by its dotted name."""
    entries = _Reader(checkpoint).read_metadata().state_dict_metadata
    return {name: (entry.size, entry.properties.dtype) for name, entry in entries.items()}


def _first_failure(error: CheckpointException) -> str:
    """What went wrong on the first rank that failed, in one line."""
    cause = next(iter(error.failures.values()))[0]
    return str(cause).splitlines()[0]


class Checkpoints:
    """The checkpoints of one run, of which the last `keep` complete ones are kept. Every rank makes one, and calls it
    at the same steps. `config`: the resolved settings as YAML; `device`: of the tensors; those of a GPU are copied to
    pinned memory, which is kept for the next save."""

    def __init__(self, folder: Path, keep: int, config: str, world: World, device: torch.device = CPU):
        self.folder, self.keep, self.config, self.world, self.device = folder, keep, config, world, device
        # Ranks coordinate from a background thread, so not through the group that the main thread uses.
        self._group = dist.new_group(backend="gloo") if world.size > 1 else None
        self._pending: tuple[int, AsyncSaveResponse] | None = None

    @cached_property
    def _stager(self) -> DefaultStager:
        gpu = self.device.type == "cuda"
        return DefaultStager(StagingOptions(gpu, use_shared_memory=False, use_non_blocking_copy=gpu))

    def newest(self) -> Path | None:
        """The checkpoint to go on from. Damaged ones that are newer are named in the log and set aside. Raises
        `ConfigError` where none is whole."""
        return from_main(self._newest, self.world)

    def _newest(self) -> Path | None:
        path, damaged = newest_whole(self.folder)
        for each, problem in damaged.items():
            aside = self._move(each, f"{_DAMAGED}{each.name}")
            log.warning("checkpoint %s is damaged, now %s: %s", each, aside.name, problem)
        if damaged:
            log.warning("going back to %s", path)
        return path

    def _move(self, source: Path, name: str) -> Path:
        """Rename within the folder, in place of what has that name."""
        target = self.folder / name
        if target.exists():
            shutil.rmtree(target)
        return source.rename(target)

    def save(self, step: int, tensors: dict[str, Any], info: dict[str, Any]) -> None:
        """Copy `tensors` (nested dicts; one that is whole on every rank is written once) to the CPU and write them,
        both in the background: they must not change before `copied`. `info` is written as JSON. Waits for the save
        before it, and raises OSError where that failed."""
        self.finish()
        partial = self._partial(step)
        if self.world.is_main:
            try:
                for left in self.folder.glob(f"{_PARTIAL}*"):  # of a run that was killed
                    shutil.rmtree(left)
                partial.mkdir(parents=True)
                (partial / _INFO).write_text(json.dumps(info, indent=2))
                (partial / _CONFIG).write_text(self.config)
            except OSError as error:
                raise self._not_written(step, error) from error
        barrier(self.world)
        synchronise(self.device)  # the copies, on a stream of their own, wait for no kernel
        self._pending = step, dcp.async_save(
            tensors, storage_writer=_Writer(partial), process_group=self._group, async_stager=self._stager
        )

    def copied(self) -> None:
        """Wait until the tensors of the save under way, if any, may change."""
        if self._pending is not None:
            self._pending[1].staging_completion.result()

    def poll(self) -> None:
        """Publish the save under way if it is done; costs nothing, to be called every step."""
        if self._pending is not None and self.world.is_main and self._pending[1].upload_completion.done():
            self.finish()

    def finish(self) -> None:
        """Wait for the save under way, if any, and publish it. Raises OSError where it failed on any rank."""
        if self._pending is None:
            return
        (step, save), self._pending = self._pending, None
        try:
            save.upload_completion.result()
        except (CheckpointException, OSError) as error:
            reason = _first_failure(error) if isinstance(error, CheckpointException) else error
            raise self._not_written(step, reason) from error
        if self.world.is_main:
            self._move(self._partial(step), f"{_PREFIX}{step:08d}")
            log.info("checkpoint of step %d is complete", step)
            for old in list_checkpoints(self.folder)[: -self.keep]:
                shutil.rmtree(self._move(old, f"{_PARTIAL}{old.name}"))  # half deleted, it must not look like one

    def _not_written(self, step: int, reason: object) -> OSError:
        return OSError(f"checkpoint of step {step} could not be written to {self.folder}: {reason}")

    def _partial(self, step: int) -> Path:
        return self.folder / f"{_PARTIAL}{step:08d}"
