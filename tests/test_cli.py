"""Errors and signals of a program: one line, one exit status."""

import os
import signal

import pytest

from utils.cli import run_command, stop_if_asked
from utils.config import ConfigError


@pytest.fixture(autouse=True)
def handlers():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("error, status", [(ConfigError("bad\nthing"), 2), (OSError(28, "No space left"), 2)])
def test_an_error_is_one_line(error, status, capsys):
    def work():
        raise error

    assert run_command(work) == status
    assert capsys.readouterr().err.count("\n") == 1


def test_a_bug_keeps_its_traceback():
    with pytest.raises(RuntimeError):
        run_command(lambda: (_ for _ in ()).throw(RuntimeError("bug")))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("broken", [None, RecursionError, ImportError])
def test_a_signal_ends_the_command_whatever_it_broke(number, broken, capsys):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    def work():
        try:
            os.kill(os.getpid(), number)
        except KeyboardInterrupt:
            if broken is None:
                raise
            raise broken("an import that was cut short") from None

    assert run_command(work) == 128 + number
    assert "run the same command again" in capsys.readouterr().err
    assert run_command(lambda: 0) == 0  # forgotten
    signal.signal(signal.SIGINT, before)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_that_was_swallowed_ends_the_next_step():
    class Careless:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)  # what is raised in a destructor goes nowhere

    steps = []

    def work():
        for step in range(3):
            stop_if_asked()
            steps.append(step)
            Careless()

    assert run_command(work) == 128 + signal.SIGTERM and steps == [0]
