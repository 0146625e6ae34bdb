"""Prompt files: plain text, CSV, JSON and JSON lines. Needs no heavy import, so that a mistake shows at once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.data.rows import read_rows
from pipeline.data.schedule import Prompt, check_keys, number, read_prompt
from utils.config import ConfigError
from utils.load_config import is_text


@dataclass(frozen=True)
class PromptItem:
    """A prompt and what its own line sets; None: as the config says."""

    prompt: Prompt
    seed: int | None = None
    seconds: float | None = None
    negative_prompt: str | None = None


FIELDS = tuple(PromptItem.__dataclass_fields__)


def read_prompt_items(path: str | Path) -> list[PromptItem]:
    """The prompts of a file: a line each, blank ones skipped; or, by its ending, rows of a `.csv`, objects or strings
    of a `.json` list, lines of a `.jsonl`, with the keys `prompt` and, optional, `seed`, `seconds`, `negative_prompt`.
    In the JSON forms `prompt` may be a schedule (`pipeline/data/schedule.py`).

    Raises `ConfigError` where there is none, or naming the row that cannot be used.
    """
    path, what = Path(path), f"prompt file {path}"
    if not path.is_file():
        raise ConfigError(f"{what} does not exist; it holds one prompt per line")
    items = [_item(row, f"{what}, {where}") for where, row in read_rows(path, what, "prompt")]
    if not items:
        raise ConfigError(f"{what} is empty; it holds one prompt per line")
    return items


def _item(row: Any, where: str) -> PromptItem:
    if isinstance(row, str):
        row = {"prompt": row}
    if isinstance(row, ValueError):
        raise ConfigError(f"{where}: {row}")
    if not isinstance(row, dict):
        raise ConfigError(f"{where}: expected a prompt or an object with one, found {type(row).__name__}")
    check_keys(row, FIELDS, where)
    prompt = read_prompt(row.get("prompt"), where)
    negative = row.get("negative_prompt")
    if negative is not None and not is_text(negative):
        raise ConfigError(f"{where}: `negative_prompt` is {negative!r}, expected text")
    seed, seconds = (None if row.get(name) is None else number(row[name], name, where) for name in ("seed", "seconds"))
    if seed is not None and seed != int(seed):
        raise ConfigError(f"{where}: `seed` is {row['seed']!r}, expected a whole number")
    if seconds is not None and seconds <= 0:
        raise ConfigError(f"{where}: `seconds` is {row['seconds']!r}, expected a positive number")
    return PromptItem(prompt, None if seed is None else int(seed), seconds, negative)
