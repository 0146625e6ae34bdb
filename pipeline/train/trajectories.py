"""Sampling trajectories of the AR-diffusion model, stored where a few-step student starts its steps.

Format: `pipeline/data/shards.py`; `points` float16 [n, S, C, F, H, W], the latents at S points of the trajectory,
`latents` float16 [n, C, F, H, W], its end, and the prompts as records. The plan has the S timesteps.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tqdm import tqdm

from model.cache.cache import PackCache
from model.causal_wan import CausalWanModel
from model.schedule import NUM_TIMESTEPS, FlowMatchSchedule
from pipeline.data.shards import Shards, ShardWriter
from pipeline.generate.inputs import Prompts, prompt_noise
from pipeline.generate.rollout import Rollout
from pipeline.generate.sampler import few_step_timesteps
from pipeline.train.prompt_data import PromptData
from pipeline.train.text import TextConditioning
from utils.choices import Commit
from utils.config import Config, ConfigError
from utils.distributed import World

TRAJECTORIES, COMMAND = "trajectories", "python -m scripts.generate_ode_pairs"
_SAME_STEP = 0.01  # timesteps closer than this are the same one


def student_steps(config: Config) -> torch.Tensor:
    """Timesteps of the few-step student, float32 [S]."""
    return torch.tensor(few_step_timesteps(config.sampler, FlowMatchSchedule(config.sampler.shift)))


def grid_points(config: Config) -> list[int]:
    """Which of the `ode.grid_steps` Euler steps start at the student's timesteps. Raises `ConfigError` for a timestep
    that is not on the grid."""
    grid = NUM_TIMESTEPS * FlowMatchSchedule(config.sampler.shift).euler_sigmas(config.ode.grid_steps)[:-1]
    timesteps = student_steps(config).tolist()
    points = places(timesteps, grid.tolist())
    if None in points:
        off = points.index(None)
        raise ConfigError(
            f"setting `sampler.steps`: {config.sampler.steps[off]:g} (timestep {timesteps[off]:.2f}) is not among the "
            f"{config.ode.grid_steps} steps of `ode.grid_steps`; choose a grid that contains it"
        )
    return points


def places(timesteps: Sequence[float], grid: Sequence[float]) -> list[int | None]:
    """Which of `grid` each timestep is; None for one that is not there."""
    return [next((i for i, at in enumerate(grid) if abs(at - timestep) <= _SAME_STEP), None) for timestep in timesteps]


def made_by(config: Config, weights: str, prompts: Sequence[str], frames: int) -> dict:
    """Everything that trajectories are a function of, as JSON. `weights`: hash of the transformer's."""
    ode = config.ode
    return {
        "timesteps": student_steps(config).tolist(),
        "grid_steps": ode.grid_steps,
        "guidance": ode.guidance,
        "shift": config.sampler.shift,
        "negative_prompt": config.sampler.negative_prompt,
        "context_timestep": config.sampler.context_timestep,
        **({} if config.sampler.commit == Commit.forward else {"commit": config.sampler.commit}),
        "cache": json.loads(json.dumps(asdict(config.cache) | {"archive_device": None})),
        "seed": config.seed,
        "trajectories": ode.num_trajectories,
        "shard_size": ode.shard_size,
        "frames": frames,
        "frames_per_chunk": config.video.frames_per_chunk,
        "transformer": weights,
        "prompts": hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
    }


@torch.no_grad()
def sample_trajectories(
    config: Config, model: CausalWanModel, cache: PackCache, text: TextConditioning, prompts: list[str],
    samples: list[int],
) -> dict[str, torch.Tensor]:  # fmt: skip
    """`points` and `latents`, float32, of one batch: the inference rollout, with an empty cache and `ode.grid_steps`
    guided Euler steps. `samples`: a number per prompt that sets its noise apart from that of the same one elsewhere."""
    ode, points = config.ode, grid_points(config)
    sampler = replace(config.sampler, kind="euler", num_steps=ode.grid_steps, guidance=ode.guidance)
    embeds = text.encode([*prompts, sampler.negative_prompt])  # [B + 1, text_len, text_dim]
    seen: dict[int, list[torch.Tensor]] = {point: [] for point in points}  # grid step -> its latents, chunk by chunk

    noise = prompt_noise(config.seed, prompts, samples)

    def after(chunk: int, step: int, timestep: float, latents: torch.Tensor) -> torch.Tensor:
        if step == 0 and 0 in seen:
            seen[0].append(noise(chunk, 0, latents.shape[1:]))
        if step + 1 in seen:
            seen[step + 1].append(latents.cpu())
        return latents

    rollout = Rollout(model, cache, sampler, Prompts(embeds[:-1], embeds[-1:]), noise, on_step_end=after)
    chunks = config.video.trained_frames // config.video.frames_per_chunk
    latents = torch.cat([chunk.cpu() for _, chunk in rollout.run(chunks, commit_last=False)], dim=2)  # [B, C, F, H, W]
    stored = torch.stack([torch.cat(seen[point], dim=2) for point in points], dim=1)  # [B, S, C, F, H, W]
    return {"points": stored, "latents": latents}


def write_trajectories(
    config: Config, model: CausalWanModel, text: TextConditioning, data: PromptData, size: tuple[int, int],
    weights: str, world: World,
) -> None:  # fmt: skip
    """Fill the folder `ode.path`, the ranks taking shards in turn; finished shards are kept. `size`: latent height and
    width; `weights`: hash of the model's. Raises `ConfigError` where the folder's trajectories were made otherwise."""
    ode, folder = config.ode, Path(config.ode.path)
    plan = made_by(config, weights, data.prompts, config.video.trained_frames)
    writer = ShardWriter(folder, TRAJECTORIES, plan, -(-ode.num_trajectories // ode.shard_size), world)
    for number in tqdm(writer.share(), unit="shard", disable=not world.is_main):
        first = number * ode.shard_size
        samples = range(first, min(first + ode.shard_size, ode.num_trajectories))
        parts, prompts = [], [data.prompt(config.seed, index) for index in samples]
        for start in range(0, len(samples), config.train.batch_size):
            some = slice(start, start + config.train.batch_size)
            cache = PackCache.for_model(model, config.cache, *size, config.video.trained_frames)
            parts.append(sample_trajectories(config, model, cache, text, prompts[some], list(samples[some])))
        tensors = {key: torch.cat([part[key] for part in parts]).half() for key in parts[0]}
        writer.write(number, tensors, prompts)


class Trajectories:
    """A finished folder, read from disk as asked for: `timesteps` of the stored points, and how they were made."""

    def __init__(self, folder: str | Path):
        """Raises `ConfigError` for a folder that is absent or unfinished."""
        self._shards = Shards(folder, TRAJECTORIES, COMMAND)
        self.meta = self._shards.plan
        self.timesteps: list[float] = self.meta["timesteps"]

    def __len__(self) -> int:
        return len(self._shards)

    def columns(self, timesteps: Sequence[float]) -> list[int]:
        """Which stored point each timestep is. Raises `ConfigError` for one that was not stored."""
        found = places(timesteps, self.timesteps)
        if None in found:
            have = ", ".join(f"{stored:.2f}" for stored in self.timesteps)
            raise ConfigError(
                f"setting `sampler.steps`: timestep {timesteps[found.index(None)]:.2f} is not stored in "
                f"{self._shards.folder}, which has {have}; write trajectories for these steps with {COMMAND}"
            )
        return found

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, str]:
        """points float32 [S, C, F, H, W], end of the trajectory float32 [C, F, H, W], prompt."""
        stored = self._shards[index]
        return stored["points"].float(), stored["latents"].float(), self._shards.records[index]
