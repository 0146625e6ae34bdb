"""Folders of precomputed samples: latents of clips, prompt embeddings, sampling trajectories. One format for all.

A folder holds `plan.json`, written first: format, kind, how many shards, and everything that the samples are a function
of. Beside it lie `shard-00000.safetensors` and so on: tensors whose row i is sample i's, and as metadata a JSON record
for every sample. Where rows differ in length they follow one another, and the tensor `ends` int64 [samples] says where
each of them ends.

Ranks write shards in turn, each whole or not at all; a run that is started again writes those that are missing, and the
folder is finished when none is. Where the plan has no number of shards, more can be added at any time.
"""

import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from utils.config import ConfigError
from utils.distributed import World, barrier, from_main
from utils.files import write_json, write_whole

FORMAT, PLAN = 2, "plan.json"


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.safetensors"


def shard_paths(folder: Path) -> list[Path]:
    """Those that are there, in order."""
    return sorted(folder.glob("shard-*.safetensors"), key=shard_number)


def shard_number(path: Path) -> int:
    return int(path.stem.removeprefix("shard-"))


def read_plan(folder: Path, kind: str, command: str) -> dict[str, Any]:
    """What a folder's samples are a function of. Raises `ConfigError`, naming the `command` that writes such folders,
    where there is no plan, or one of another kind or format."""
    path = folder / PLAN
    if not path.is_file():
        raise ConfigError(f"folder {folder} has no {PLAN}: no {kind} are there; write them with {command}")
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
        found = plan["kind"], plan["format"], plan["shards"]
        if found[2] is not None and not (isinstance(found[2], int) and 0 <= found[2] < 10**9):
            raise ValueError(f"`shards` is {found[2]}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is damaged ({error}): remove the folder and write it again: {command}") from error
    if found[:2] != (kind, FORMAT):
        raise ConfigError(f"folder {folder} holds {found[0]} in format {found[1]}, not {kind} in format {FORMAT}")
    return _Plan(plan)


class _Plan(dict):
    """Raises `ConfigError` for what it lacks."""

    def __missing__(self, key: str) -> Any:
        raise ConfigError(f"{PLAN} of {self['kind']} is damaged, it has no `{key}`: write the folder again")


def read_notes(path: Path) -> dict[str, Any]:
    """A shard's metadata: `records`, one per sample, and what else its writer noted. Raises `ConfigError`."""
    try:
        with safe_open(path, framework="pt") as shard:
            notes, names = json.loads(shard.metadata()["notes"]), list(shard.keys())
            rows = shard.get_slice("ends" if "ends" in names else names[0]).get_shape()[0]
        count = len(notes["records"])
    except (OSError, SafetensorError, LookupError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: not a readable shard ({error}); remove it and write it again") from error
    if rows != count:
        raise ConfigError(f"{path}: {rows} samples but {count} records; remove it and write it again")
    return notes


class ShardWriter:
    """A folder of samples that this process and other ranks fill.

    `made_by`: everything that the samples are a function of; must survive JSON, and the first rank's counts. `shards`:
    how many there will be; None for a folder that is added to.

    Raises `ConfigError` on all ranks where the folder was begun with another plan, naming the first key that differs.
    """

    def __init__(self, folder: Path, kind: str, made_by: Mapping[str, Any], shards: int | None, world: World):
        self.folder, self.world, self.shards = folder, world, shards
        plan = {"format": FORMAT, "kind": kind, "shards": shards, **made_by}
        from_main(lambda: self._keep_to(plan), world)

    def _keep_to(self, plan: dict[str, Any]) -> None:
        """Raise `ConfigError` where that cannot be."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not (self.folder / PLAN).is_file():
                write_json(self.folder / PLAN, plan)
            stored = read_plan(self.folder, plan["kind"], "the same command")
        except OSError as error:
            raise ConfigError(f"folder {self.folder}: cannot be written ({error.strerror})") from error
        for key in (*plan, *stored):
            if stored.get(key) != plan.get(key):
                raise ConfigError(f"folder {self.folder} was made with another `{key}`: remove it or name another one")

    def share(self) -> list[int]:
        """Numbers of the shards that this rank has to write: of the missing ones, every `world.size`-th."""
        missing = [number for number in range(self.shards) if not shard_path(self.folder, number).is_file()]
        barrier(self.world)  # every rank has listed the same missing shards before one is written
        return missing[self.world.rank :: self.world.size]

    def write(self, number: int, tensors: Mapping[str, torch.Tensor], records: Sequence[Any], **notes: Any) -> None:
        metadata = {"notes": json.dumps({"records": records, **notes})}  # ASCII: any text survives
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        write_whole(shard_path(self.folder, number), lambda path: save_file(tensors, path, metadata=metadata))

    def finished(self) -> bool:
        return len(shard_paths(self.folder)) == self.shards


class Shards:
    """The samples of a finished folder: `plan`, what they are a function of, and a JSON value for each as `records`.
    Shards are memory-mapped: a sample is read when it is asked for."""

    def __init__(self, folder: str | Path, kind: str, command: str):
        """Raises `ConfigError`, naming the `command` that writes it, for a folder that is absent, unfinished, of
        another kind or format, or broken."""
        self.folder = Path(folder)
        self.plan = read_plan(self.folder, kind, command)
        self._paths = shard_paths(self.folder)
        missing = (self.plan["shards"] or 0) - len(self._paths)
        if missing > 0:
            total = self.plan["shards"]
            raise ConfigError(f"folder {folder} is not finished: {missing} of {total} shards are missing; "
                              f"start {command} again")  # fmt: skip
        records = [read_notes(path)["records"] for path in self._paths]
        self.records = [record for some in records for record in some]
        self._starts = list(accumulate(map(len, records), initial=0))
        self._open: dict[int, dict[str, torch.Tensor]] = {}

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """The tensors of a sample. Raises IndexError past the last one."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        number = bisect_right(self._starts, index) - 1  # the last shard to begin there: the others are empty
        row = index - self._starts[number]
        if number not in self._open:
            self._open[number] = load_file(self._paths[number])
        tensors = dict(self._open[number])
        ends = tensors.pop("ends", None)
        rows = row if ends is None else slice(ends[row - 1] if row else 0, ends[row])
        return {name: tensor[rows] for name, tensor in tensors.items()}
