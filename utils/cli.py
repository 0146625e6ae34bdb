"""The one place where a program's errors become one line and an exit status.

    def main(argv: list[str] | None = None) -> int:
        return run_configured(config_parser(__doc__), argv, run)  # run(config, arguments)

Exit status: 0 done; 2 a mistake of the user's (settings, files, the command line) or of the system (disk full, no
permission); an error's own `exit_status` where it has one; 128 + n after signal n, as shells count.
"""

import argparse
import logging
import math
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress

import yaml
from safetensors import SafetensorError

from utils.config import Config, ConfigError
from utils.load_config import known_settings, load_config

log = logging.getLogger(__name__)

USAGE_ERROR = 2
SAME_SIGNAL = 3.0  # seconds: torchrun passes on the Ctrl-C that its ranks have had from the terminal already
INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM


class Terminated(KeyboardInterrupt):
    """SIGTERM: leaves like Ctrl-C, by way of every `finally`."""


@contextmanager
def noted_signals(what_now: str) -> Iterator[Callable[[], int]]:
    """SIGINT and SIGTERM are only noted in here, and `what_now` is said; yields a function that says which one came, 0:
    none. Asked again later, they take effect at once."""
    first: list[tuple[int, float]] = []

    def note(number: int, frame: object) -> None:
        now = time.monotonic()
        if not first:
            first.append((number, now))
            log.warning("%s: %s", signal.Signals(number).name, what_now)
        elif now - first[0][1] > SAME_SIGNAL:
            raise_signal(number)

    before = {}
    with suppress(ValueError):  # in the main thread only
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, note)
    try:
        yield lambda: first[0][0] if first else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


_asked: list[int] = []  # signals that the command was sent


def raise_signal(number: int) -> None:
    """Leave as `run_command` does after signal `number`."""
    _asked.append(number)
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


def stop_if_asked() -> None:
    """Leave where something, a destructor say, has swallowed the exception of an earlier signal; for long loops."""
    if _asked:
        raise_signal(_asked[0])


def run_command(command: Callable[[], int | None]) -> int:
    """Run a program's body and return its exit status (None counts as 0); errors are printed to stderr in one line.
    Only errors that the user can mend are caught: `ConfigError`, `OSError` (also inside safetensors), YAML errors, too
    little memory, and any error with an `exit_status`. Everything else is a bug and keeps its traceback."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    _asked.clear()
    with suppress(ValueError):  # signals can be handled in the main thread only
        for number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, lambda number, frame: raise_signal(number))
    try:
        return command() or 0
    except BaseException as error:
        if _asked or isinstance(error, KeyboardInterrupt):  # or what that broke on its way, an import for example
            print("stopped; run the same command again to go on", file=sys.stderr)
            return 128 + _asked[0] if _asked else INTERRUPTED
        usual = isinstance(error, (OSError, yaml.YAMLError, SafetensorError)) or _too_large(error)
        status = getattr(error, "exit_status", USAGE_ERROR if usual else None)
        if status is None:
            raise
        print(f"error: {'out of memory: ' * _too_large(error)}{one_line(error)}", file=sys.stderr)
        return status


def config_parser(doc: str | None) -> argparse.ArgumentParser:
    """Of a program that takes `--config_path` and `key=value`s, its docstring as help. Flags whose `dest` is a setting,
    such as `model.checkpoint`, are other names for it; not given (None), they leave the config's value."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config_path", required=True, help="YAML of settings")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, for example cache.top_k=4")
    return parser


def run_configured(
    parser: argparse.ArgumentParser, argv: list[str] | None, run: Callable[[Config, argparse.Namespace], int | None]
) -> int:
    """`run_command` of `run` with the config and arguments that `config_parser` was given."""
    arguments = parser.parse_intermixed_args(argv)
    known = known_settings()
    flags = {name: value for name, value in vars(arguments).items() if name in known and value is not None}
    return run_command(lambda: run(load_config(arguments.config_path, arguments.overrides, flags), arguments))


def check_positive(arguments: argparse.Namespace, *names: str) -> None:
    """Raise `ConfigError` where one of these options, if given, or a number in its list, is not above zero."""
    for name in names:
        given = getattr(arguments, name)
        for value in given if isinstance(given, list) else [given]:
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"--{name} is {value}: must be positive")


def print_rows(rows: Iterable[Sequence[object]]) -> None:
    """A table with its titles as first row: names to the left, cells to the right; None is a dash."""
    shown = [[_cell(cell) for cell in row] for row in rows]
    widths = [2 + max(map(len, column)) for column in zip(*shown, strict=True)]
    for name, *cells in shown:
        print(name.ljust(widths[0]) + "".join(map(str.rjust, cells, widths[1:])))


def _cell(value: object) -> str:
    return "-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def answer_typos() -> None:
    """Leave where `--config_path` or a `key=value` in sys.argv is wrong; for scripts, before their imports. What
    follows a flag may be its value, and is left to the script."""
    before, paths, overrides = "", [], []
    for argument in sys.argv[1:]:
        if before == "--config_path" or argument.startswith("--config_path="):
            paths.append(argument.removeprefix("--config_path="))
        elif not before.startswith("--") and re.match(r"[a-z_]+(\.[a-z_]+)+=", argument):
            overrides.append(argument)
        before = "" if "=" in argument else argument
    if paths and (status := run_command(lambda: load_config(paths[-1], overrides) and 0)):
        sys.exit(status)


def _too_large(error: BaseException) -> bool:
    """Whether memory ran out; torch has an error of its own for that on GPUs, and none on the CPU."""
    known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return known or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


def one_line(error: BaseException) -> str:
    """The message of an error without line breaks; its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__
