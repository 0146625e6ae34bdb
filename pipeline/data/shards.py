"""Folders of shards that several ranks fill in turn, and that a later run completes.

`plan.json`, written first, says what the shards are made from. A shard is there whole or not at all. `meta.json`,
written last, says that none is missing.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from utils.config import ConfigError
from utils.distributed import World, barrier, from_main

PLAN, META = "plan.json", "meta.json"


def write_json(path: Path, content: Any) -> None:
    """Write the file whole, or not at all."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
    os.replace(partial, path)


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file whole, or not at all."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata=metadata)
    os.replace(partial, path)


def keep_to_plan(folder: Path, plan: dict[str, Any], world: World) -> None:
    """Create `folder` with this plan, or see that it was begun with the same one; `plan` must survive JSON.

    The first rank's plan counts. Raises `ConfigError` on all ranks, naming the first key that differs.
    """
    problem = from_main(_compare_plan(folder, plan) if world.is_main else None, world)
    if problem is not None:
        raise ConfigError(problem)


def _compare_plan(folder: Path, plan: dict[str, Any]) -> str | None:
    """What is wrong, if anything is."""
    path = folder / PLAN
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.is_file():
            write_json(path, plan)
            return None
    except OSError as error:
        return f"folder {folder}: cannot be written ({error.strerror})"
    stored = json.loads(path.read_text(encoding="utf-8"))
    if stored == plan:
        return None
    changed = next(key for key in (*plan, *stored) if stored.get(key) != plan.get(key))
    return f"folder {folder} holds shards that were made with another `{changed}`: remove it or name another one"


def unfinished(paths: Sequence[Path], world: World) -> list[int]:
    """Numbers of the shards that this rank has to write: of those that are not there, every `world.size`-th."""
    missing = [number for number, path in enumerate(paths) if not path.is_file()]
    barrier(world)  # every rank has listed the same missing shards before one is written
    return missing[world.rank :: world.size]
