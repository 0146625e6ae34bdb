"""Causal consistency distillation: a few-step initialisation from the AR-diffusion model (Causal Forcing, 2602.02214).

On a grid of Euler steps from noise to clean, the teacher, which is the AR-diffusion model with guidance, takes one step
from a noised clip; the student's x0 at the point before must be what its own EMA says at the point after. Everything
is teacher-forced on the clean clip, and all chunks of a clip share one grid point.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from model.causal_wan import CausalWanModel
from model.schedule import NUM_TIMESTEPS
from pipeline.generate.sampler import guided
from pipeline.train.flow import HIGH_NOISE, ClipStage, mean_where
from pipeline.train.generator import Generator
from pipeline.train.method import method
from pipeline.train.roles import check_student
from utils.config import Config, require
from utils.distributed import World
from utils.rng import keyed_generator


@method("consistency")
class ConsistencyStage(ClipStage):
    """Student, its EMA as target, and the frozen AR-diffusion teacher; all start as the model that `model` names."""

    from_student = True

    @classmethod
    def check(cls, config: Config) -> None:
        super().check(config)
        check_student(config)
        require(config, "train.ema_start_step", config.train.ema_start_step == 0,
                "the EMA is the target of consistency distillation from the first step on; set it to 0")  # fmt: skip

    def __init__(self, config: Config, device: torch.device, world: World):
        super().__init__(config, device, world)
        self.sigmas = self.clips.schedule.euler_sigmas(config.consistency.grid_steps).to(device)  # 1 to 0
        self.teacher, target = (_frozen_copy(self.transformer, device) for _ in range(2))
        self.target = Generator(target)
        self.targets, self.frozen = {"generator": self.target}, {"teacher": self.teacher}

    def batch(self, step: int, sample_indices: Sequence[int]) -> dict[str, Any]:
        """As for AR diffusion, with the grid point [B] that a sample's chunks share in place of their timesteps."""
        batch = super().batch(step, sample_indices)
        draws = (keyed_generator(self.config.seed, "grid", step, index) for index in sample_indices)
        points = [torch.randint(self.config.consistency.grid_steps, (), generator=draw) for draw in draws]
        del batch["timestep"]
        return batch | {"point": torch.stack(points).to(self.device)}

    def loss(self, role: str, batch: dict[str, Any], step: int) -> tuple[torch.Tensor, dict[str, float]]:
        """Mean squared distance of the student's x0 from its target's; logs its distance from the data's too."""
        latents, point = batch["latents"], batch["point"]  # [B, C, F, H, W], [B]
        sigma, following = self.sigmas[point], self.sigmas[point + 1]  # [B] each
        given = self.clips.condition(batch)
        noisy = (1 - _wide(sigma)) * latents + _wide(sigma) * batch["noise"]  # [B, C, F, H, W]
        x0 = _x0(self.transformer, noisy, sigma, given)
        with torch.no_grad():
            stepped = noisy + _wide(following - sigma) * self._teacher_flow(noisy, sigma, given)
            target = _x0(self.target.transformer, stepped, following, given)
        errors = (x0 - target).square().flatten(1).mean(1)  # [B]
        distance = (x0.detach() - latents).square().flatten(1).mean(1)  # [B]
        high = NUM_TIMESTEPS * sigma > HIGH_NOISE
        return errors.mean(), {
            "data_mse": distance.mean().item(),
            "data_mse_high": mean_where(distance, high),
            "data_mse_low": mean_where(distance, ~high),
        }

    def _teacher_flow(self, noisy: torch.Tensor, sigma: torch.Tensor, given: dict[str, torch.Tensor]) -> torch.Tensor:
        """Guided flow [B, C, F, H, W] of the AR-diffusion model."""
        guidance, embeds = self.config.consistency.guidance, given["encoder_hidden_states"]
        if guidance == 1:
            return _flow(self.teacher, noisy, sigma, given)
        negative = self.text.encode([self.config.sampler.negative_prompt], fixed=True).expand_as(embeds)
        twice = {name: torch.cat((value, value)) for name, value in given.items()}
        twice["encoder_hidden_states"] = torch.cat((embeds, negative))
        flow = _flow(self.teacher, torch.cat((noisy, noisy)), torch.cat((sigma, sigma)), twice)
        return guided(*flow.chunk(2), guidance)


def _flow(model: nn.Module, noisy: torch.Tensor, sigma: torch.Tensor, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """Teacher-forced flow of noisy clips [B, C, F, H, W] at one sigma [B] each, float32."""
    timestep = (NUM_TIMESTEPS * sigma)[:, None].expand(-1, noisy.shape[2])  # [B, F]
    return model(noisy, timestep, **given).sample.float()


def _x0(model: nn.Module, noisy: torch.Tensor, sigma: torch.Tensor, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """x0 [B, C, F, H, W]; at sigma 0 that is `noisy` itself."""
    return noisy - _wide(sigma) * _flow(model, noisy, sigma, given)


def _wide(sigma: torch.Tensor) -> torch.Tensor:
    """[B] -> [B, 1, 1, 1, 1]."""
    return sigma[:, None, None, None, None]


def _frozen_copy(model: CausalWanModel, device: torch.device) -> nn.Module:
    """With weights of its own, which it gets when it is moved to a GPU: until then the host needs no second copy."""
    moves = device.type != model.device.type
    weights = {id(p): nn.Parameter(p.data, False) for p in model.parameters()} if moves else {}
    return copy.deepcopy(model, weights).requires_grad_(False).eval()
