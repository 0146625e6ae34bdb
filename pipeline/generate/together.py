"""One video by several ranks: they start from the same call, and none makes a chunk that another does not."""

import hashlib
from collections.abc import Generator, Iterator
from contextlib import closing
from types import SimpleNamespace
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from PIL.Image import Image

from model.sequence import Ranks

T = TypeVar("T")
_OWN = ("output_type", "return_dict", "callback_on_step_end", "callback_on_step_end_tensor_inputs", "noise")


def given(asked: SimpleNamespace) -> dict[str, str]:
    """What must be the same on every rank of a call's arguments, as texts; a function cannot be compared."""
    return {name: _text(value) for name, value in vars(asked).items() if name not in _OWN}


def _text(value: Any) -> str:
    if isinstance(value, np.ndarray | Image):
        value = torch.from_numpy(np.array(value))
    if isinstance(value, torch.Tensor):
        return f"{list(value.shape)} {hashlib.sha256(value.detach().cpu().float().numpy().tobytes()).hexdigest()[:8]}"
    if isinstance(value, torch.Generator):
        return f"a generator of seed {value.initial_seed()}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_text, value))}]"
    if value is None or isinstance(value, str | int | float | dict):
        return repr(value)
    return type(value).__name__


def in_step(items: Generator[T], ranks: Ranks | None) -> Iterator[T]:
    """`items`, one a chunk, as long as all ranks go on. Raises `PeerError` where another has stopped. In whatever
    thread items are made the ranks' messages have the same order, as these are sent from there too."""
    if ranks is None:
        yield from items
        return
    with closing(items):
        while True:
            ranks.go_on()
            try:
                item = next(items)
            except StopIteration:
                return
            try:
                yield item
            except GeneratorExit:
                if dist.is_initialized():
                    ranks.go_on("it makes no more of it; its own message says why")
                raise
