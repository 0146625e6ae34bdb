"""Weights of a module in training: swapped for their EMA for a while, and exported as a model of their own."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from model.weights import cast_weights
from pipeline.train.parallel import plain_copy


@contextmanager
def swapped_in(module: nn.Module, weights: Mapping[str, torch.Tensor] | None) -> Iterator[None]:
    """Give the module's parameters other values (its EMA) for the length of the block."""
    swapped = [(p, weights[name]) for name, p in module.named_parameters() if weights and name in weights]
    own = [p.detach().clone() for p, _ in swapped]
    with torch.no_grad():
        for p, value in swapped:
            p.copy_(value)
    try:
        yield
    finally:
        with torch.no_grad():
            for (p, _), value in zip(swapped, own, strict=True):
                p.copy_(value)


def exported(model: nn.Module) -> nn.Module | None:
    """A copy on the CPU with every weight in bfloat16, to be saved; where the model is sharded, all ranks must call it
    and the first one alone gets the copy."""
    copy = plain_copy(model)
    if copy is not None:
        cast_weights(copy, torch.bfloat16, keep_in_fp32=None)
    return copy


def save_exported(model: nn.Module, folder: Path | None, name: str) -> None:
    """`exported(model)` to `folder/name`; a rank without a folder only takes part in gathering shards."""
    copy = exported(model)
    if copy is not None and folder is not None:
        copy.save_pretrained(folder / name)
