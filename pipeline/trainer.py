"""The one trainer. It knows steps, ranks, checkpoints and logs; what is trained, on what and how, is the stage's.

A run is a function of its config alone: sample indices follow from the step, all randomness of a stage from (seed,
purpose, step, sample index), and a checkpoint holds everything else, so a killed run goes on bit for bit.
"""

import logging
import math
import resource
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from pipeline.checkpoints import list_checkpoints, load_checkpoint, save_checkpoint
from pipeline.optimizer import RoleState
from pipeline.stage import Stage, Weights
from utils.config import Config, ConfigError
from utils.config import Stage as StageName
from utils.distributed import World, average, barrier, gather_objects
from utils.tracking import Tracker

log = logging.getLogger(__name__)

MAX_BAD_STEPS = 3
_KIB_PER_GIB = 2**20


class TrainingDivergedError(RuntimeError):
    """Loss or gradient was not finite for several steps in a row."""


@dataclass(frozen=True)
class StepPlan:
    """How many samples every step takes: per rank and micro-step `batch_size(step)`, ranks x accumulation of them."""

    config: Config
    world_size: int

    def phase_of(self, step: int) -> tuple[int, int]:
        """(index of the curriculum's phase, steps before it); the last phase has no end."""
        phases, start = self.config.train.phases, 0
        for i, phase in enumerate(phases[:-1]):
            if step < start + phase.steps:
                return i, start
            start += phase.steps
        return len(phases) - 1, start

    def batch_size(self, step: int) -> int:
        train = self.config.train
        return train.phases[self.phase_of(step)[0]].batch_size if train.phases else train.batch_size

    def total(self, step: int) -> int:
        return self.batch_size(step) * self.world_size * self.config.train.gradient_accumulation

    def samples_before(self, step: int) -> int:
        """Samples that all ranks took in steps 0 .. step-1."""
        if not self.config.train.phases:
            return step * self.total(0)
        current, start = self.phase_of(step)
        done = sum(p.steps * p.batch_size for p in self.config.train.phases[:current])
        done += (step - start) * self.batch_size(step)
        return done * self.world_size * self.config.train.gradient_accumulation

    def indices(self, step: int, micro: int, rank: int) -> range:
        """Global sample indices of one rank's micro-batch."""
        size = self.batch_size(step)
        first = self.samples_before(step) + (micro * self.world_size + rank) * size
        return range(first, first + size)


def check_plan(config: Config, world_size: int) -> None:
    """Raise `ConfigError` where sizes do not go together; needs no model and no data."""
    train = config.train
    if train.stage is None:
        raise ConfigError(f"setting `train.stage` is not set: choose one of {', '.join(StageName)}")
    if train.total_batch_size is None:
        return
    if train.phases:
        raise ConfigError("settings `train.total_batch_size` and `train.phases` exclude each other: unset one")
    product = world_size * train.batch_size * train.gradient_accumulation
    if product != train.total_batch_size:
        raise ConfigError(
            f"setting `train.total_batch_size` is {train.total_batch_size}, but {world_size} ranks x batch_size "
            f"{train.batch_size} x gradient_accumulation {train.gradient_accumulation} = {product}: change one of them"
        )


class Trainer:
    """Runs a stage from its last checkpoint in `logdir`, or from the start.

    Args:
        config: settings; `train` and `seed` are read here.
        stage: what is trained.
        world: this process's place among the ranks.
        logdir: the run's folder.
        tracker: where numbers go.
        save: write checkpoints and exports.
        visualize: write sample videos.
    """

    def __init__(
        self,
        config: Config,
        stage: Stage,
        world: World,
        logdir: Path,
        tracker: Tracker,
        device: torch.device,
        save: bool = True,
        visualize: bool = True,
    ):
        self.config, self.stage, self.world, self.logdir, self.tracker = config, stage, world, logdir, tracker
        self.device, self.save, self.visualize = device, save, visualize
        train = config.train
        self.plan = StepPlan(config, world.size)
        self.states = {
            role: RoleState(
                module,
                stage.optimizer(role) or train.optimizer,
                train.max_steps,
                train.ema_decay,
                train.ema_start_step if stage.keeps_ema(role) else None,
                stage.targets.get(role),
                stage.parts(role),
            )
            for role, module in stage.modules.items()
        }
        self.step = 0
        self.skipped = 0  # steps without an update, over the whole run
        self.bad_in_a_row = 0
        self._resume()

    @property
    def _checkpoints(self) -> Path:
        return self.logdir / "checkpoints"

    def ema(self) -> Weights | None:
        """EMA weights of the roles, once they exist."""
        weights = {role: state.ema for role, state in self.states.items() if state.ema is not None}
        return weights or None

    def run(self) -> None:
        """Train to `train.max_steps`, then export. Raises `TrainingDivergedError`."""
        train = self.config.train
        with tqdm(
            total=train.max_steps, initial=self.step, desc=self.stage.name, unit="step", disable=not self.world.is_main
        ) as bar:
            while self.step < train.max_steps:
                start = time.perf_counter()
                logs = self._train_step()
                self.step += 1
                seconds = time.perf_counter() - start
                logs |= {"samples_per_s": self.plan.total(self.step - 1) / seconds, "seconds": seconds}
                logs |= {"samples": self.plan.samples_before(self.step), "peak_gib": _peak_memory(self.device)}
                if self.step % train.log_every == 0:
                    self.tracker.log(logs, self.step)
                bar.update()
                bar.set_postfix_str(
                    f"{logs['samples_per_s']:.1f} samples/s, loss {logs['loss']:.4f}, {logs['peak_gib']:.1f} GiB",
                    refresh=False,
                )
                self._periodic()
        if self.save and self.step % train.checkpoint_every:
            self._save_checkpoint()
        if self.save and self.world.is_main:
            self.stage.export(self.logdir / "bundle", self.ema())
        barrier(self.world)

    def _periodic(self) -> None:
        train = self.config.train
        if self.save and self.step % train.checkpoint_every == 0:
            self._save_checkpoint()
        if self.visualize and train.sample_every and self.step % train.sample_every == 0:
            if self.world.is_main:
                scores = self.stage.sample(self.step, self.logdir / "samples" / f"step-{self.step:08d}", self.ema())
                if scores:
                    self.tracker.log({f"sample/{key}": value for key, value in scores.items()}, self.step)
            barrier(self.world)

    def _train_step(self) -> dict[str, float]:
        """One step of every role that is due; returns the mean logs of micro-steps and ranks."""
        logs: dict[str, float] = {}
        for role in self.stage.roles(self.step):
            logs |= self._update_role(role)
        if not all(math.isfinite(value) for value in logs.values()):
            self.bad_in_a_row += 1
            self.skipped += 1
            log.warning("step %d: loss or gradient is not finite; no update", self.step)
            if self.bad_in_a_row >= MAX_BAD_STEPS:
                raise TrainingDivergedError(
                    f"step {self.step}: loss or gradient was not finite {MAX_BAD_STEPS} times in a row; "
                    f"the last good checkpoint is in {self._checkpoints}"
                )
        else:
            self.bad_in_a_row = 0
        return logs | {"skipped_steps": self.skipped}

    def _update_role(self, role: str) -> dict[str, float]:
        state, train = self.states[role], self.config.train
        micros, sums = train.gradient_accumulation, {}
        for micro in range(micros):
            batch = self.stage.batch(self.step, self.plan.indices(self.step, micro, self.world.rank))
            with self._autocast():
                loss, logs = self.stage.loss(role, batch, self.step)
            (loss / micros).backward()
            for key, value in ({"loss": loss.item()} | logs).items():
                sums[key] = sums.get(key, 0.0) + value / micros
        average(state.gradients(), self.world)
        parts = state.gradient_norms()
        norm = torch.nn.utils.clip_grad_norm_(state.parameters, train.max_grad_norm).item()
        keys = sorted(sums)
        means = torch.tensor([sums[key] for key in keys], dtype=torch.float64)
        average([means], self.world)
        logs = dict(zip(keys, means.tolist(), strict=True)) | {"grad_norm": norm} | parts
        if math.isfinite(norm) and math.isfinite(logs["loss"]):
            logs |= state.update(self.step)
        state.zero_grad()
        prefix = "" if len(self.stage.modules) == 1 else f"{role}/"
        return {"loss": logs["loss"]} | {prefix + key: value for key, value in logs.items()}

    def _autocast(self):
        if self.config.train.mixed_precision == "no":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def _save_checkpoint(self) -> None:
        rng = gather_objects(torch.get_rng_state(), self.world)
        if self.world.is_main:
            state: dict[str, Any] = {
                "step": self.step,
                "samples": self.plan.samples_before(self.step),
                "skipped": self.skipped,
                "bad_in_a_row": self.bad_in_a_row,
                "rng": rng,
                "roles": {role: role_state.state_dict() for role, role_state in self.states.items()},
            }
            info = {"stage": self.stage.name, "samples": state["samples"], "ranks": self.world.size}
            save_checkpoint(self._checkpoints, self.step, state, info, self.config.train.keep_checkpoints)
        barrier(self.world)

    def _resume(self) -> None:
        found = list_checkpoints(self._checkpoints)
        if not found:
            return
        state = load_checkpoint(found[-1], self.stage.name)
        for role, role_state in self.states.items():
            role_state.load_state_dict(state["roles"][role])
        self.step, self.skipped, self.bad_in_a_row = state["step"], state["skipped"], state["bad_in_a_row"]
        if len(state["rng"]) == self.world.size:
            torch.set_rng_state(state["rng"][self.world.rank])
        log.info("resumed from %s", found[-1])


def _peak_memory(device: torch.device) -> float:
    """Largest memory so far in GiB: of the accelerator, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (_KIB_PER_GIB if sys.platform != "darwin" else 2**30)
