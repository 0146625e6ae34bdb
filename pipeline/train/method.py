"""What a training stage is to the trainer: modules, samples by index, a loss, and how to show and store the result."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from utils.config import Config
from utils.registry import Registry
from utils.train_config import OptimizerConfig

Weights = dict[str, dict[str, torch.Tensor]]  # role -> parameter name -> value


class Stage(ABC):
    """One training stage."""

    name: str  # for logs and checkpoints
    modules: dict[str, nn.Module]  # role -> what is trained; each role has its own optimizer, EMA and gradient clip
    targets: Mapping[str, nn.Module] = {}  # role -> module like that one, which the trainer keeps at the role's EMA
    frozen: Mapping[str, nn.Module] = {}  # further modules that are run; nothing changes them
    offloaded: Sequence[nn.Module] = ()  # those of them that stay in host memory and come to the device in parts

    @classmethod  # noqa: B027 - a stage may take any settings
    def check(cls, config: Config) -> None:
        """Raise `ConfigError` for settings that the stage cannot be trained with; reads nothing but config files."""

    @classmethod
    @abstractmethod
    def trained(cls, config: Config) -> list[nn.Module]:
        """Models of the size that the stage trains, to be called on the meta device; raises as `check`."""

    def frozen_modules(self) -> list[nn.Module]:
        """What is placed and sharded beside `modules` and `targets`."""
        return list(self.frozen.values())

    def roles(self, step: int) -> tuple[str, ...]:
        """Roles that are updated at a step, in order."""
        return tuple(self.modules)

    def optimizer(self, role: str) -> OptimizerConfig | None:
        """Optimizer settings of a role; None: `train.optimizer`."""
        return None

    def keeps_ema(self, role: str) -> bool:
        """Whether the role's EMA is of any use."""
        return True

    def parts(self, role: str) -> dict[str, nn.Module]:
        """Parts of a role's module whose gradient and update norms are logged on their own."""
        return {}

    @abstractmethod
    def batch(self, step: int, sample_indices: Sequence[int]) -> dict[str, Any]:
        """Samples by global index: a pure function of (seed, step, index)."""

    def role_batch(self, role: str, step: int, sample_indices: Sequence[int]) -> dict[str, Any]:
        """What a role is updated on: `batch`, unless the stage gives each role its own."""
        return self.batch(step, sample_indices)

    def ahead(self, role: str, step: int, sample_indices: Sequence[int]) -> None:  # noqa: B027
        """Begin beside the device's work what a batch that comes soon will need."""

    def close(self) -> None:  # noqa: B027
        """Training ends."""

    @abstractmethod
    def loss(self, role: str, batch: dict[str, Any], step: int) -> tuple[torch.Tensor, dict[str, float]]:
        """Mean over the batch's samples (float32 scalar with gradient), and numbers to log."""

    def losses(self, role: str, batch: dict[str, Any], step: int) -> Iterator[tuple[torch.Tensor, dict[str, float]]]:
        """`loss` in parts that add up, logs too. The trainer backpropagates each before it asks for the next, so that
        memory is that of one part. Ranks that share weights must have equally many."""
        yield self.loss(role, batch, step)

    @abstractmethod
    def sample(self, step: int, folder: Path | None, ema: Weights | None) -> dict[str, float]:
        """Write videos of the fixed prompts to `folder`, from the EMA where there is one; returns numbers to log.
        Without a folder, on a rank that holds shards: take part in what is collective, write nothing."""

    @abstractmethod
    def export(self, folder: Path | None, ema: Weights | None) -> None:
        """Write what later stages and inference load, from the EMA where there is one; without a folder as above."""

    def compile(self) -> None:  # noqa: B027 - a stage may have nothing to compile
        """Compile what is worth it."""


METHODS: Registry[type[Stage]] = Registry("train.stage")  # called with (config, device, world)


def method(name: str) -> Callable[[type[Stage]], type[Stage]]:
    """Decorator: the stage that `train.stage` calls `name`. Its module is to be imported in `stages.py`."""

    def add(kind: type[Stage]) -> type[Stage]:
        kind.name = name
        return METHODS.register(name)(kind)

    return add
