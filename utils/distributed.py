"""Ranks of a run started by torchrun; one process without it is rank 0 of 1.

    torchrun --nproc_per_node=2 train.py --config_path ...
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from utils.config import ConfigError


@dataclass(frozen=True)
class World:
    """This process's place among `size` processes."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def join_world(device: torch.device) -> World:
    """Join the process group that torchrun describes. Raises `ConfigError` where its variables are incomplete."""
    if "WORLD_SIZE" not in os.environ:
        return World()
    try:
        world = World(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    except (KeyError, ValueError) as error:
        raise ConfigError(f"WORLD_SIZE is set but RANK is not usable ({error}); start with torchrun") from error
    if world.size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return world


def leave_world(world: World) -> None:
    if world.size > 1 and dist.is_initialized():
        dist.destroy_process_group()


def average(tensors: Iterable[torch.Tensor], world: World) -> None:
    """Replace every tensor, in place, by its mean over the ranks; one message for all of them."""
    tensors = list(tensors)
    if world.size == 1 or not tensors:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])  # [sum of sizes]
    dist.all_reduce(flat)
    flat /= world.size
    for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))


def gather_objects(item: object, world: World) -> list:
    """`item` of every rank, in order of rank."""
    if world.size == 1:
        return [item]
    items = [None] * world.size
    dist.all_gather_object(items, item)
    return items


def from_main(item: object, world: World) -> object:
    """The first rank's `item`, on every rank."""
    if world.size == 1:
        return item
    items = [item]
    dist.broadcast_object_list(items)
    return items[0]


def barrier(world: World) -> None:
    if world.size > 1:
        dist.barrier()
