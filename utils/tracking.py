"""Where a run's numbers go: JSON lines in its folder, wandb (offline too: WANDB_MODE=offline), tensorboard."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from utils.config import ConfigError
from utils.files import write_whole

LOG = "log.jsonl"


def check_tracker(kind: str | None) -> None:
    """Raises `ConfigError` where the tracker's package is missing."""
    if kind is not None and find_spec(kind) is None:
        raise ConfigError(f"setting `train.tracker` is {kind}: its package is not installed (pip install {kind})")


class Tracker:
    """Writes scalar records of a run, between `start` and `close`; on ranks other than the first it writes nothing.
    `kind`: None, "wandb" or "tensorboard"; wandb's run is named like the folder, and has `config`, plain values. Raises
    `ConfigError` where wandb does not take them or knows no user."""

    def __init__(self, folder: Path, kind: str | None, project: str, config: dict[str, Any], is_main: bool):
        self.folder, self.kind, self.is_main = folder, kind, is_main
        self._file = self._wandb = self._tensorboard = None
        if kind != "wandb" or not is_main:
            return
        import wandb

        try:
            self._wandb = wandb.init(project=project, name=folder.name, id=folder.name, resume="allow",
                                     dir=str(folder), config=config)  # fmt: skip
        except wandb.errors.Error as error:
            raise ConfigError(f"setting `train.tracker` is wandb: {error}") from error

    def start(self, step: int) -> None:
        """Begin after `step`: records of later steps, which will be done again, are dropped."""
        if not self.is_main:
            return
        _rewind(self.folder / LOG, step)
        self._file = open(self.folder / LOG, "a", buffering=1, encoding="utf-8")  # noqa: SIM115 - as long as the run
        if self.kind == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(self.folder / "tensorboard"), purge_step=step + 1)

    def log(self, values: dict[str, float], step: int) -> None:
        if self._file is not None:
            rounded = {key: float(f"{value:.6g}") for key, value in values.items()}
            self._file.write(json.dumps({"step": step, **rounded}) + "\n")
        if self._wandb is not None:
            self._wandb.log(values, step=step)
        if self._tensorboard is not None:
            for key, value in values.items():
                self._tensorboard.add_scalar(key, value, step)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._wandb is not None:
            self._wandb.finish()
        if self._tensorboard is not None:
            self._tensorboard.close()


def _rewind(path: Path, step: int) -> None:
    """Keep the records up to `step`, and no line that a killed run left unfinished."""
    if not path.is_file():
        return
    lines, kept = path.read_text(encoding="utf-8").splitlines(keepends=True), []
    for line in lines:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    if kept != lines:
        write_whole(path, lambda partial: partial.write_text("".join(kept), encoding="utf-8"))
