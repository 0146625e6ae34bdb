"""Where time and memory go: seconds, tokens and peak memory per named part of a run."""

import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

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
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return 1024 * int(line.split()[1])  # kB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reset_peak_memory(device: torch.device) -> None:
    """Start a new peak. A CPU whose system cannot do that goes on with the peak of the whole process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif _CLEAR.is_file():
        _CLEAR.write_text(_RESET_PEAK)


class Stopwatch:
    """Seconds and, where asked for, peak memory and tokens per named part; a part inside another counts in both.

    As a context manager it puts back, on leaving, every method that it wrapped.

    Attributes:
        seconds, tokens: part -> sum over its calls.
        peak: part -> largest number of bytes during one of its calls; empty without `memory`.
        scope: put in front of the names of parts that end now, for parts that occur in several places.
    """

    def __init__(self, device: torch.device, memory: bool = False):
        self.device, self.memory, self.scope = device, memory, ""
        self._restore: list[Callable[[], None]] = []
        self._running: list[int] = []  # peaks of the parts that are running, outermost first
        self.clear()

    def clear(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.tokens: dict[str, int] = defaultdict(int)
        self.peak: dict[str, int] = defaultdict(int)

    @contextmanager
    def part(self, name: str, tokens: int = 0) -> Iterator[None]:
        synchronise(self.device)
        self._new_peak()
        self._running.append(0)
        start = time.perf_counter()
        try:
            yield
        finally:
            synchronise(self.device)
            name = self.scope + name
            self.seconds[name] += time.perf_counter() - start
            self.tokens[name] += tokens
            self._new_peak()
            peak = self._running.pop()
            if self.memory:
                self.peak[name] = max(self.peak[name], peak)

    def _new_peak(self) -> None:
        """Every part that is running has seen the memory so far; what comes next is a peak of its own."""
        if self.memory:
            reached = peak_memory(self.device)
            self._running = [max(peak, reached) for peak in self._running]
            reset_peak_memory(self.device)

    def wrap(self, owner: object, method: str, name: str, tokens: Callable[..., int] | None = None) -> None:
        """Time every call of `owner.method` as part `name`; `tokens` counts them from the call's arguments."""
        original, own = getattr(owner, method), method in vars(owner)

        def timed(*args, **kwargs):
            with self.part(name, 0 if tokens is None else tokens(*args, **kwargs)):
                return original(*args, **kwargs)

        setattr(owner, method, timed)
        self._restore.append(lambda: setattr(owner, method, original) if own else delattr(owner, method))

    def __enter__(self) -> "Stopwatch":
        return self

    def __exit__(self, *_) -> None:
        for restore in reversed(self._restore):
            restore()
        self._restore.clear()
