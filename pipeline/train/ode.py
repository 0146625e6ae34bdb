"""Causal ODE regression: a few-step initialisation from stored trajectories (Causal Forcing, arXiv 2602.02214).

The student sees the AR-diffusion model's trajectory where one of its own steps starts, a step of its own for every
chunk, teacher-forced on the trajectory's end, and must name that end in one step.
"""

from collections.abc import Sequence
from typing import Any

import torch

from model.schedule import FlowMatchSchedule
from pipeline.data.clips import place_of
from pipeline.sources import need_folder
from pipeline.train.flow import mean_where
from pipeline.train.generator import GeneratorStage
from pipeline.train.method import method
from pipeline.train.roles import check_student, load_student, load_text
from pipeline.train.trajectories import Trajectories, student_steps
from utils.config import Config, require
from utils.distributed import World
from utils.rng import keyed_generator


@method("ode")
class ODEStage(GeneratorStage):
    """Student on the trajectories in `ode.path`."""

    @classmethod
    def check(cls, config: Config) -> None:
        super().check(config)
        check_student(config)

    def __init__(self, config: Config, device: torch.device, world: World):
        self.trajectories = Trajectories(need_folder(config.ode.path, "ode.path", "trajectories"))
        self.steps = student_steps(config)  # [S]
        self.columns = self.trajectories.columns(self.steps.tolist())
        chunk = self.trajectories.meta["frames_per_chunk"]
        require(config, "video.frames_per_chunk", config.video.frames_per_chunk == chunk,
                f"the trajectories in {config.ode.path} were made with chunks of {chunk}")  # fmt: skip
        _, latents, _ = self.trajectories[0]
        text = load_text(config, device)
        student = load_student(config, text, device, latents.shape[0])
        super().__init__(config, device, student, text, (latents.shape[0], *latents.shape[2:]))
        self.schedule = FlowMatchSchedule(config.sampler.shift)

    def batch(self, step: int, sample_indices: Sequence[int]) -> dict[str, Any]:
        """`noisy` and `latents` [B, C, F, H, W], `pick` [B, G]: which of the student's steps a chunk is at, prompts."""
        seed, chunk = self.config.seed, self.config.video.frames_per_chunk
        noisy, latents, picks, prompts = [], [], [], []
        for index in sample_indices:
            points, end, prompt = self.trajectories[place_of(len(self.trajectories), seed, index)]
            groups = end.shape[1] // chunk
            pick = torch.randint(len(self.steps), (groups,), generator=keyed_generator(seed, "step", step, index))
            columns = torch.tensor(self.columns)[pick].repeat_interleave(chunk)  # [F]
            noisy.append(points[columns, :, torch.arange(end.shape[1])].transpose(0, 1))  # [C, F, H, W]
            latents.append(end)
            picks.append(pick)
            prompts.append(prompt)
        return {
            "noisy": torch.stack(noisy).to(self.device),
            "latents": torch.stack(latents).to(self.device),
            "pick": torch.stack(picks).to(self.device),
            "prompts": prompts,
        }

    def loss(self, role: str, batch: dict[str, Any], step: int) -> tuple[torch.Tensor, dict[str, float]]:
        """Mean squared error of x0 against the trajectory's end; logged for every step of the student."""
        noisy, latents, pick = batch["noisy"], batch["latents"], batch["pick"]
        chunk = self.config.video.frames_per_chunk
        timestep = self.steps.to(self.device)[pick].repeat_interleave(chunk, dim=1)  # [B, F]
        embeds = self.text.encode(batch["prompts"])  # [B, text_len, text_dim]
        flow = self.transformer(noisy, timestep, embeds, clean_hidden_states=latents).sample.float()
        x0 = self.schedule.flow_to_x0(flow, noisy, timestep)  # [B, C, F, H, W]
        errors = (x0 - latents).square().unflatten(2, (-1, chunk)).mean(dim=(1, 3, 4, 5))  # [B, G]
        steps = enumerate(self.steps.tolist())
        return errors.mean(), {f"mse_{value:.0f}": mean_where(errors, pick == step) for step, value in steps}
