"""Checkpoints of a training run: whole or absent, the last few kept."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from utils.config import ConfigError

_PREFIX, _PARTIAL, _STATE, _INFO = "step-", ".partial-", "state.pt", "info.json"


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], info: dict[str, Any], keep: int) -> Path:
    """Write `folder/step-N` by way of a temporary folder and a rename, then drop all but the last `keep`.

    `state` holds tensors and plain containers; `info` is what a person wants to read (JSON).
    """
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{_PARTIAL}{step:08d}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    with open(partial / _STATE, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    (partial / _INFO).write_text(json.dumps({"step": step, **info}, indent=2))
    final = folder / f"{_PREFIX}{step:08d}"
    if final.exists():  # a re-run that reached the same step again
        shutil.rmtree(final)
    os.replace(partial, final)
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    for left in folder.glob(f"{_PARTIAL}*"):
        shutil.rmtree(left)
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob(f"{_PREFIX}*") if (path / _STATE).is_file())


def load_checkpoint(path: Path, stage: str) -> dict[str, Any]:
    """The state in `path`, on the CPU. Raises `ConfigError` where it is of another stage."""
    info = json.loads((path / _INFO).read_text())
    if info["stage"] != stage:
        raise ConfigError(f"checkpoint {path} is of stage {info['stage']}, not {stage}: choose another train.logdir")
    return torch.load(path / _STATE, map_location="cpu", weights_only=True)
