"""What a training stage is to the trainer: modules, samples by index, a loss, and how to show and store the result."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from utils.config import Config
from utils.config import Stage as StageName
from utils.distributed import World

Weights = dict[str, dict[str, torch.Tensor]]  # role -> parameter name -> value


class Stage(ABC):
    """One training stage.

    Attributes:
        name: for logs and checkpoints.
        modules: role -> trainable module; each role has its own optimizer, EMA and gradient clip.
    """

    name: str
    modules: dict[str, nn.Module]

    def roles(self, step: int) -> tuple[str, ...]:
        """Roles that are updated at a step, in order."""
        return tuple(self.modules)

    @abstractmethod
    def batch(self, step: int, sample_indices: Sequence[int]) -> dict[str, Any]:
        """Samples by global index: a pure function of (seed, step, index)."""

    @abstractmethod
    def loss(self, role: str, batch: dict[str, Any], step: int) -> tuple[torch.Tensor, dict[str, float]]:
        """Mean over the batch's samples (float32 scalar with gradient), and numbers to log."""

    @abstractmethod
    def sample(self, step: int, folder: Path, ema: Weights | None) -> dict[str, float]:
        """Write videos of the fixed prompts to `folder`, from the EMA where there is one; returns numbers to log."""

    @abstractmethod
    def export(self, folder: Path, ema: Weights | None) -> None:
        """Write what later stages and inference load, from the EMA where there is one."""

    def compile(self) -> None:  # noqa: B027 - a stage may have nothing to compile
        """Compile what is worth it."""


def build_stage(config: Config, device: torch.device, world: World) -> Stage:
    """The stage that `train.stage` names. Loads models and data; raises `ConfigError` for what is missing."""
    if config.train.stage == StageName.vae:
        from pipeline.vae import VAEStage

        return VAEStage(config, device, world)
    if config.train.stage == StageName.teacher:
        from pipeline.diffusion import TeacherStage

        return TeacherStage(config, device, world)
    from pipeline.diffusion import ARDiffusionStage

    return ARDiffusionStage(config, device, world)
