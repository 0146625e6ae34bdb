"""Where a run's numbers go: JSON lines in its folder, and wandb or tensorboard (by accelerate)."""

import json
import logging
from pathlib import Path
from typing import Any

from accelerate.tracking import TensorBoardTracker, WandBTracker
from accelerate.utils import is_tensorboard_available, is_wandb_available

from utils.config import ConfigError

log = logging.getLogger(__name__)


class Tracker:
    """Writes scalar records; on ranks other than the first it writes nothing.

    Args:
        folder: the run's folder; `log.jsonl` in it is appended to.
        kind: None, "wandb" or "tensorboard".
        project: the tracker's project name; the run is named like the folder.
        config: the resolved settings, as plain containers.

    Raises `ConfigError` where the tracker's package is missing.
    """

    def __init__(self, folder: Path, kind: str | None, project: str, config: dict[str, Any], is_main: bool):
        self._file = None
        self._tracker = None
        if not is_main:
            return
        available = {"wandb": is_wandb_available, "tensorboard": is_tensorboard_available}
        if kind is not None and not available[kind]():
            raise ConfigError(f"setting `train.tracker` is {kind}: its package is not installed (pip install {kind})")
        self._file = open(folder / "log.jsonl", "a", buffering=1)  # noqa: SIM115 - lives as long as the run
        if kind == "wandb":
            self._tracker = WandBTracker(project, name=folder.name, dir=str(folder), resume="allow", id=folder.name)
        elif kind == "tensorboard":
            self._tracker = TensorBoardTracker(project, logging_dir=str(folder / "tensorboard"))
        if self._tracker is not None:
            self._tracker.start()
            if kind == "wandb":
                self._tracker.store_init_configuration(config)

    def log(self, values: dict[str, float], step: int) -> None:
        if self._file is not None:
            rounded = {key: float(f"{value:.6g}") for key, value in values.items()}
            self._file.write(json.dumps({"step": step, **rounded}) + "\n")
        if self._tracker is not None:
            self._tracker.log(values, step=step)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._tracker is not None:
            self._tracker.finish()
