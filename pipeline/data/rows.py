"""Files of rows: CSV with a header, JSON lists, JSON lines, and text of a row a line. Needs no heavy import."""

import csv
import json
from pathlib import Path
from typing import Any

from utils.config import ConfigError

_BINARY_MARKS = (b"\xff\xfe", b"\xfe\xff")


def read_rows(path: Path, what: str, column: str | None = None) -> list[tuple[str, Any]]:
    """(where it stands, row) in order, blank lines left out; of a CSV file, which must have `column`, empty cells are
    None, and a line that is no JSON is the error that says so. `what`: the file, for error messages. Raises
    `ConfigError` for a file that cannot be read as a whole."""
    text, suffix = _read_text(path, what), path.suffix.lower()
    if suffix == ".csv":
        reader = csv.DictReader(text.splitlines())
        if column is not None and column not in (reader.fieldnames or ()):
            raise ConfigError(f"{what}: has no column `{column}`; its first line must name the columns")
        try:
            rows = [(f"line {reader.line_num}", row) for row in reader]
            return [(where, {key: value or None for key, value in row.items()}) for where, row in rows]
        except csv.Error as error:
            raise ConfigError(f"{what}: not CSV ({error})") from error
    if suffix == ".json":
        content = _parse(text)
        if isinstance(content, ValueError):
            raise ConfigError(f"{what}: {content}")
        if not isinstance(content, list):
            raise ConfigError(f"{what}: holds a {type(content).__name__}, expected a list of rows")
        return [(f"item {number}", row) for number, row in enumerate(content, 1)]
    lines = [(f"line {number}", line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    return [(where, _parse(line)) for where, line in lines] if suffix == ".jsonl" else lines


def _read_text(path: Path, what: str) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{what}: cannot be read ({error.strerror})") from error
    if content.startswith(_BINARY_MARKS) or b"\0" in content:
        raise ConfigError(f"{what}: is binary or UTF-16, not readable as UTF-8; save it as UTF-8 text")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{what}: not readable as UTF-8 text ({error})") from error


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        return ValueError(f"not JSON ({error.msg}, line {error.lineno})")
