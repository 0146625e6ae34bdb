"""Prompt files: plain text, CSV, JSON and JSON lines. Needs no heavy import, so that a mistake shows at once."""

import csv
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.data.schedule import Prompt, check_keys, is_text, number, read_prompt
from utils.config import ConfigError

_BINARY_MARKS = (b"\xff\xfe", b"\xfe\xff")


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
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"prompt file {path} does not exist; it holds one prompt per line")
    text = _read_text(path)
    readers = {".csv": _csv_rows, ".json": _json_rows, ".jsonl": _json_lines}
    read = readers.get(path.suffix.lower(), _lines)
    items = [_item(row, f"prompt file {path}, {where}") for where, row in read(text, path)]
    if not items:
        raise ConfigError(f"prompt file {path} is empty; it holds one prompt per line")
    return items


def _read_text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"prompt file {path}: cannot be read ({error.strerror})") from error
    if content.startswith(_BINARY_MARKS) or b"\0" in content:
        raise ConfigError(f"prompt file {path}: is binary or UTF-16, not readable as UTF-8; save it as UTF-8 text")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"prompt file {path}: not readable as UTF-8 text ({error})") from error


def _lines(text: str, path: Path) -> Iterable[tuple[str, Any]]:
    return [(f"line {number}", line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]


def _csv_rows(text: str, path: Path) -> Iterable[tuple[str, Any]]:
    rows = csv.DictReader(text.splitlines())
    if "prompt" not in (rows.fieldnames or ()):
        raise ConfigError(f"prompt file {path}: has no column `prompt`; its first line must name the columns")
    try:
        return [(f"row {number}", {key: value for key, value in row.items() if value not in (None, "")})
                for number, row in enumerate(rows, 1)]  # fmt: skip
    except csv.Error as error:
        raise ConfigError(f"prompt file {path}: not CSV ({error})") from error


def _json_rows(text: str, path: Path) -> Iterable[tuple[str, Any]]:
    content = _parse(text, f"prompt file {path}")
    if not isinstance(content, list):
        raise ConfigError(f"prompt file {path}: holds a {type(content).__name__}, expected a list of prompts")
    return [(f"item {number}", item) for number, item in enumerate(content, 1)]


def _json_lines(text: str, path: Path) -> Iterable[tuple[str, Any]]:
    return [(where, _parse(line, f"prompt file {path}, {where}")) for where, line in _lines(text, path)]


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}: not JSON ({error.msg}, line {error.lineno})") from error


def _item(row: Any, where: str) -> PromptItem:
    if isinstance(row, str):
        row = {"prompt": row}
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
