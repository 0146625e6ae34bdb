"""Ranks of a run started by torchrun; one process without it is rank 0 of 1.

    torchrun --nproc_per_node=2 train.py --config_path ...
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from utils.config import ConfigError

Item = TypeVar("Item")


@dataclass(frozen=True)
class World:
    """This process's place among `size` processes, `local_size` of them on this machine."""

    rank: int = 0
    size: int = 1
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def described_world() -> World:
    """What torchrun describes, before anything is joined. Raises `ConfigError` as `join_world` does."""
    if "WORLD_SIZE" not in os.environ:
        return World()
    try:
        int(os.environ["LOCAL_RANK"])
        return World(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")))
    except (KeyError, ValueError) as error:
        raise ConfigError(f"WORLD_SIZE is set but not all of torchrun's variables ({error}); use torchrun") from error


def join_world(device: torch.device, timeout: timedelta | None = None) -> World:
    """Join the process group that torchrun describes; on CUDA every rank takes the GPU of its local rank. `timeout`:
    how long a rank may wait for another; None: torch's default. Raises `ConfigError` where torchrun's variables are
    incomplete, or ranks outnumber this machine's GPUs."""
    world = described_world()
    if "WORLD_SIZE" in os.environ and device.type == "cuda":
        local_rank = int(os.environ["LOCAL_RANK"])
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(f"rank {world.rank} has no GPU: {world.local_size} ranks on this machine, "
                              f"{torch.cuda.device_count()} GPUs; lower --nproc_per_node")  # fmt: skip
        torch.cuda.set_device(local_rank)
    if world.size > 1 and not dist.is_initialized():
        # gloo beside NCCL: numbers to log, checkpoints and object messages are on the CPU.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timeout)
    return world


def leave_world(world: World) -> None:
    if world.size > 1 and dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def rank(threads: int | None = None) -> Iterator[tuple[torch.device, World]]:
    """This process as one of a program's ranks: its device, a GPU where there is one, and its place. `threads`: of the
    CPU; None: torch's default. Raises `ConfigError` as `join_world` does."""
    if threads is not None:
        torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    world = join_world(device)
    try:
        yield torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" else device, world
    finally:
        leave_world(world)


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


def largest(value: int, world: World) -> int:
    """The largest of the ranks' values."""
    if world.size == 1:
        return value
    held = torch.tensor(value)
    dist.all_reduce(held, dist.ReduceOp.MAX)
    return int(held)


def from_main(make: Callable[[], Item], world: World) -> Item:
    """What `make` gives on the first rank, on every rank; the `ConfigError` that it raises there likewise."""
    if world.size == 1:
        return make()
    found = [None, None]
    if world.is_main:
        try:
            found[0] = make()
        except ConfigError as error:
            found[1] = str(error)
    dist.broadcast_object_list(found)
    if found[1] is not None:
        raise ConfigError(found[1])
    return found[0]


def from_all(item: object, world: World) -> list:
    """Every rank's `item`, on every rank."""
    if world.size == 1:
        return [item]
    items = [None] * world.size
    dist.all_gather_object(items, item)
    return items


def barrier(world: World) -> None:
    if world.size > 1:
        dist.barrier()
