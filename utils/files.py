"""Files that are there whole or not at all, whenever a process is killed; and JSON."""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from utils.config import ConfigError


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` make the file under another name, then give it its own."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    write(partial)
    os.replace(partial, path)


def write_json(path: Path, content: Any) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> dict[str, Any]:
    """Raises `ConfigError` where `path` is not readable as a JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a mapping, found {type(content).__name__}")
    return content


def writable_folder(folder: str | Path, what: str) -> Path:
    """Create `folder` and see that files can be written there. Raises `ConfigError`, which calls it `what`."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return Path(folder)
    except OSError as error:
        raise ConfigError(f"{what} {folder} is not writable ({error.strerror}); choose another one") from error
