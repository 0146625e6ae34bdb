"""Randomness as a function of what it is for: the same key gives the same numbers on any rank, in any order."""

import hashlib

import torch


def keyed_generator(*key: object) -> torch.Generator:
    """CPU generator seeded by a hash of `key` (ints, strings, floats)."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def keyed_randn(shape: tuple[int, ...] | torch.Size, *key: object) -> torch.Tensor:
    """Standard normal float32 CPU tensor of `shape` that depends only on `key`."""
    return torch.randn(shape, generator=keyed_generator(*key))
