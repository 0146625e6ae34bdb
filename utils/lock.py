"""One run a folder: two that write to the same one would mix what they make."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from utils.config import ConfigError

LOCK = ".lock"


@contextmanager
def locked(folder: Path, setting: str) -> Iterator[None]:
    """Hold `folder` for this process. The system lets go of it when the process ends, however that happens, so a lock
    file that is left behind holds nobody up. Raises `ConfigError`, which names the process that holds it and `setting`,
    where another run is at work."""
    with open(folder / LOCK, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not (folder / LOCK).exists():  # its holder has just left and taken it along
                raise BlockingIOError
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise ConfigError(f"{setting} {folder} is in use by {holder}: wait for it or choose another one") from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            (folder / LOCK).unlink(missing_ok=True)
