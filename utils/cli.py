"""The one place where a program's errors become one line and an exit status.

    def main(argv: list[str] | None = None) -> int:
        arguments = parse_arguments(argv)
        return run_command(lambda: work(arguments))

Exit status: 0 done; 2 a mistake of the user's (settings, files, the command line) or of the system (disk full, no
permission); an error's own `exit_status` where it has one; 128 + n after signal n, as shells count.
"""

import logging
import signal
import sys
from collections.abc import Callable
from contextlib import suppress

import yaml

USAGE_ERROR = 2
INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM


class Terminated(KeyboardInterrupt):
    """SIGTERM: leaves like Ctrl-C, by way of every `finally`."""


def _terminate(number: int, frame: object) -> None:
    raise Terminated


def run_command(command: Callable[[], int | None]) -> int:
    """Run a program's body and return its exit status (None counts as 0); errors are printed to stderr in one line.

    Only errors that the user can mend are caught: `ConfigError`, `OSError`, YAML errors, and any error with an
    `exit_status`. Everything else is a bug and keeps its traceback.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    with suppress(ValueError):  # signals can be handled in the main thread only
        signal.signal(signal.SIGTERM, _terminate)
    try:
        return command() or 0
    except KeyboardInterrupt as stop:
        print("stopped; run the same command again to go on", file=sys.stderr)
        return TERMINATED if isinstance(stop, Terminated) else INTERRUPTED
    except Exception as error:
        status = getattr(error, "exit_status", USAGE_ERROR if isinstance(error, (OSError, yaml.YAMLError)) else None)
        if status is None:
            raise
        print(f"error: {one_line(error)}", file=sys.stderr)
        return status


def one_line(error: BaseException) -> str:
    """The message of an error without line breaks; its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__
