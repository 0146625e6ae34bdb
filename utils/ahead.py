"""A generator run one item ahead of who reads it, in a thread of its own."""

from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from typing import TypeVar

import torch

T, U = TypeVar("T"), TypeVar("U")
_END = object()


def ahead(items: Generator[T]) -> Iterator[T]:
    """Yield `items`; while one is used, the next is made. Never more than one waits. An error in `items` is raised here
    as it is. Closing this generator waits for the item in the making and closes `items`. What PyTorch keeps by thread
    (autocast, gradient mode) is that of a new thread, but for the CUDA device."""
    device = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with ThreadPoolExecutor(1, "ahead", torch.cuda.set_device if device else None, device) as thread:
        try:
            coming = thread.submit(next, items, _END)
            while (item := coming.result()) is not _END:
                coming = thread.submit(next, items, _END)
                yield item
        finally:
            thread.submit(items.close).result()


def used_beside(items: Generator[T], use: Callable[[T], U], overlap: bool) -> Iterator[tuple[T, U]]:
    """Yield (item, use(item)); with `overlap` the next item is made meanwhile, and on CUDA `use` has a stream of its
    own. What it gives is whole when it is yielded."""
    stream = torch.cuda.Stream() if overlap and torch.cuda.is_initialized() else None
    with closing(ahead(_recorded(items)) if overlap else _recorded(items)) as made:
        for item, done in made:
            with nullcontext() if stream is None else torch.cuda.stream(stream):
                if stream is not None:
                    stream.wait_event(done)
                used = use(item)
            if stream is not None:
                stream.synchronize()  # before which nobody lets go of the item, so that the allocator keeps it
            yield item, used


def _recorded(items: Generator[T]) -> Iterator[tuple[T, torch.cuda.Event | None]]:
    with closing(items):
        for item in items:
            done = torch.cuda.Event() if torch.cuda.is_initialized() else None
            if done is not None:
                done.record()
            yield item, done
