"""Where time and memory go: seconds, tokens and peak memory per named part of a run.

    with Stopwatch(device) as watch:  # elsewhere, in what runs: `with part("commit"):`
        run()
    print(watch.seconds)
"""

import resource
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import wraps
from pathlib import Path

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc(5), clear_refs: VmHWM becomes the current resident size


def synchronise(device: torch.device) -> None:
    """Wait for what the device has been given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu x {torch.get_num_threads()}"


def peak_memory(device: torch.device) -> int:
    """Peak bytes since the last `reset_peak_memory`: of the GPU's allocator, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if _STATUS.is_file():
        line = next(line for line in _STATUS.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM"))
        return 1024 * int(line.split()[1])  # kB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reset_peak_memory(device: torch.device) -> None:
    """Start a new peak. A CPU whose system cannot do that goes on with the peak of the whole process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif _CLEAR.is_file():
        _CLEAR.write_text(_RESET_PEAK, encoding="utf-8")


class Stopwatch:
    """Seconds and tokens of every part of what runs while it is entered, summed over its calls, and with `memory` the
    most bytes (`peak`) during one of them. The code names its parts with `part` and `timed`; `watch_module` adds those
    of a module. A part inside another is called `outer/inner` and counts in both."""

    def __init__(self, device: torch.device, memory: bool = False):
        self.device, self.memory = device, memory
        self._by_thread = threading.local()
        self._hooks: list[RemovableHandle] = []
        self.clear()

    @property
    def _running(self) -> list["_Part"]:
        """Of this thread, outermost first."""
        return self._by_thread.__dict__.setdefault("parts", [])

    def clear(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.tokens: dict[str, int] = defaultdict(int)
        self.peak: dict[str, int] = defaultdict(int)

    def total(self, last: str) -> float:
        """Seconds of all parts with this last name, wherever they are."""
        return sum(seconds for name, seconds in self.seconds.items() if name.rsplit("/", 1)[-1] == last)

    @contextmanager
    def part(self, name: str, tokens: int = 0) -> Iterator[None]:
        self._begin(name, tokens)
        try:
            yield
        finally:
            self._end()

    def watch_module(self, module: nn.Module, name: str, tokens: Callable[..., int] | None = None) -> None:
        """Time every forward of `module` as part `name`; `tokens` counts them from the call's arguments."""

        def before(module, args, kwargs):
            self._begin(name, 0 if tokens is None else tokens(*args, **kwargs))

        self._hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
        self._hooks.append(module.register_forward_hook(lambda *_: self._end(), always_call=True))

    def _begin(self, name: str, tokens: int) -> None:
        synchronise(self.device)
        self._new_peak()
        path = f"{self._running[-1].name}/{name}" if self._running else name
        self.tokens[path] += tokens
        self._running.append(_Part(path, time.perf_counter()))

    def _end(self) -> None:
        synchronise(self.device)
        self._new_peak()
        ended = self._running.pop()
        self.seconds[ended.name] += time.perf_counter() - ended.start
        if self.memory:
            self.peak[ended.name] = max(self.peak[ended.name], ended.peak)

    def _new_peak(self) -> None:
        """Every part that is running has seen the memory so far; what comes next is a peak of its own."""
        if self.memory:
            reached = peak_memory(self.device)
            for running in self._running:
                running.peak = max(running.peak, reached)
            reset_peak_memory(self.device)

    def __enter__(self) -> "Stopwatch":
        global _active
        _active = self
        return self

    def __exit__(self, *_) -> None:
        global _active
        _active = None
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()


@dataclass
class _Part:
    name: str
    start: float
    peak: int = 0


_active: Stopwatch | None = None


def part(name: str, tokens: int = 0) -> AbstractContextManager[None]:
    """What is inside is a part of the run, measured while a `Stopwatch` is entered."""
    return nullcontext() if _active is None else _active.part(name, tokens)


def timed(name: str) -> Callable[[Callable], Callable]:
    """Decorator: every call is a part of the run."""

    def decorate(function: Callable) -> Callable:
        @wraps(function)
        def call(*args, **kwargs):
            with part(name):
                return function(*args, **kwargs)

        return call

    return decorate
