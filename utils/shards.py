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
from utils.distributed import World, barrier

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

    Raises `ConfigError` naming the first key that differs. Only the first rank looks; call `unfinished` next, which
    waits for it.
    """
    if not world.is_main:
        return
    path = folder / PLAN
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.is_file():
            write_json(path, plan)
            return
    except OSError as error:
        raise ConfigError(f"folder {folder}: cannot be written ({error.strerror})") from error
    stored = json.loads(path.read_text(encoding="utf-8"))
    if stored != plan:
        changed = next(key for key in (*plan, *stored) if stored.get(key) != plan.get(key))
        raise ConfigError(
            f"folder {folder} holds shards that were made with another `{changed}`: remove it or name another one"
        )


def unfinished(paths: Sequence[Path], world: World) -> list[int]:
    """Numbers of the shards that this rank has to write: of those that are not there, every `world.size`-th."""
    barrier(world)  # the plan has been checked
    missing = [number for number, path in enumerate(paths) if not path.is_file()]
    barrier(world)  # every rank has listed the same missing shards before one is written
    return missing[world.rank :: world.size]
