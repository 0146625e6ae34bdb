"""The one trainer. It knows steps, ranks, checkpoints and logs; what is trained, on what and how, is the stage's.

A run is a function of its config alone: sample indices follow from the step, all randomness of a stage from (seed,
purpose, step, sample index), and a checkpoint holds everything else, so a killed run goes on bit for bit. Where weights
are sharded, every rank takes part in samples and export too.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from pipeline.train.checkpoints import Checkpoints, read_info, read_into
from pipeline.train.method import Stage, Weights
from pipeline.train.parallel import keeps_attention, model_config, named_models, prepare_stage, set_gradient_sync
from pipeline.train.plan import StepPlan
from pipeline.train.state import RoleState
from pipeline.train.throughput import FlopMeter
from utils.cli import noted_signals, raise_signal
from utils.config import Config, ConfigError
from utils.distributed import World, average, barrier, largest
from utils.load_config import to_yaml
from utils.timing import part, peak_memory
from utils.tracking import Tracker

log = logging.getLogger(__name__)

MAX_BAD_STEPS = 3
Result = TypeVar("Result")


class TrainingDivergedError(RuntimeError):
    """Loss or gradient was not finite for several steps in a row."""

    exit_status = 1


class Trainer:
    """Runs a stage from its last checkpoint in `logdir`, or from the start; `save`: checkpoints and, at the end, the
    bundle; `visualize`: sample videos."""

    def __init__(
        self, config: Config, stage: Stage, world: World, logdir: Path, tracker: Tracker, device: torch.device,
        save: bool = True, visualize: bool = True,
    ):  # fmt: skip
        self.config, self.stage, self.world, self.logdir, self.tracker = config, stage, world, logdir, tracker
        self.device, self.save, self.visualize = device, save, visualize
        train = config.train
        self.plan = StepPlan(config, world.size)
        self.sharded = prepare_stage(stage, config, world, device)
        self.meter = FlopMeter([*stage.modules.values(), *stage.targets.values(), *stage.frozen_modules()], device)
        self.states = {role: RoleState(stage, role, train) for role in stage.modules}
        self.step = 0
        self.skipped = 0  # steps without an update, over the whole run
        self.bad_in_a_row = dict.fromkeys(stage.modules, 0)  # updates of a role that were left out one after another
        self.checkpoints = Checkpoints(logdir / "checkpoints", train.keep_checkpoints, to_yaml(config), world, device)
        self.saved_step = self._resume()  # of the last checkpoint
        tracker.start(self.step)

    def ema(self) -> Weights | None:
        """EMA weights of the roles, once they exist."""
        weights = {role: state.ema for role, state in self.states.items() if state.ema is not None}
        return weights or None

    def run(self) -> None:
        """Train to `train.max_steps`, then export; after SIGINT or SIGTERM to any rank save a checkpoint and leave.
        Raises `TrainingDivergedError`."""
        what_now = "finishing this step" + ", then saving a checkpoint" * self.save
        with noted_signals(what_now) as asked:
            try:
                signal = self._train(asked)
                if self.save and self.step != self.saved_step:
                    self._save_checkpoint()
            finally:
                self.stage.close()
                self.checkpoints.finish()
        if signal:
            raise_signal(signal)
        if self.save:
            bundle = self.logdir / "bundle"
            self._written_once(lambda folder: self.stage.export(folder, self.ema()), bundle)
            if self.world.is_main:
                log.info("wrote %s", bundle)

    def _train(self, asked: Callable[[], int]) -> int:
        """Steps up to the last, or to a signal, which is returned."""
        train, signal = self.config.train, 0
        with tqdm(
            total=train.max_steps, initial=self.step, desc=self.stage.name, unit="step", disable=not self.world.is_main
        ) as bar:
            while self.step < train.max_steps and not signal:
                start = time.perf_counter()
                logs = self._train_step()
                self.step += 1
                seconds = time.perf_counter() - start
                logs |= {"samples_per_s": self.plan.total(self.step - 1) / seconds, "seconds": seconds}
                logs |= {"samples": self.plan.samples_before(self.step), "peak_gib": peak_memory(self.device) / 2**30}
                logs |= self.meter.step(seconds, self.world.size, train.max_steps - self.step)
                signal = largest(asked(), self.world)
                if self.step % train.log_every == 0 or self.step == train.max_steps or signal:
                    self.tracker.log(logs, self.step)
                bar.update()
                bar.set_postfix_str(
                    f"{logs['samples_per_s']:.1f} samples/s, loss {logs['loss']:.4f}, {logs['peak_gib']:.1f} GiB",
                    refresh=False,
                )
                if not signal:
                    self._periodic()
        return signal

    def _periodic(self) -> None:
        train = self.config.train
        self.checkpoints.poll()
        if self.save and self.step % train.checkpoint_every == 0:
            self._save_checkpoint()
        if self.visualize and train.sample_every and self.step % train.sample_every == 0:
            self.checkpoints.copied()
            folder = self.logdir / "samples" / f"step-{self.step:08d}"
            scores = self._written_once(lambda folder: self.stage.sample(self.step, folder, self.ema()), folder)
            if scores:
                self.tracker.log({f"sample/{key}": value for key, value in scores.items()}, self.step)

    def _written_once(self, write: Callable[[Path | None], Result], folder: Path) -> Result | None:
        """Let the stage write to `folder` on the first rank. Where weights are sharded the others take part without a
        folder, as forwards and gathering are collective."""
        main = self.world.is_main
        result = write(folder if main else None) if main or self.sharded else None
        barrier(self.world)
        return result

    def _train_step(self) -> dict[str, float]:
        """One step of every role that is due; returns the mean logs of micro-steps and ranks."""
        logs: dict[str, float] = {}
        for step in (self.step, self.step + 1):
            for role, micro in product(self.stage.roles(step), range(self.config.train.gradient_accumulation)):
                self.stage.ahead(role, step, self.plan.indices(step, micro, self.world.rank))
        for role in self.stage.roles(self.step):
            with part(role):
                found = self.update_role(role)
            logs |= found
            odd = [name for name, value in found.items() if not math.isfinite(value)]
            self.bad_in_a_row[role] = self.bad_in_a_row[role] + 1 if odd else 0
            if not odd:
                continue
            self.skipped += 1
            log.warning("step %d: %s not finite; no update of the %s", self.step, ", ".join(odd), role)
            if self.bad_in_a_row[role] >= MAX_BAD_STEPS:
                raise TrainingDivergedError(
                    f"step {self.step}: {odd[0]} was not finite at {MAX_BAD_STEPS} updates of the {role} in a row; "
                    f"the last good checkpoint is in {self.checkpoints.folder}"
                )
        return logs | {"skipped_steps": self.skipped}

    def update_role(self, role: str) -> dict[str, float]:
        """Loss, gradient and, where all that is logged of them is finite, the update of a role."""
        state, train = self.states[role], self.config.train
        micros, sums = train.gradient_accumulation, {}
        for micro in range(micros):
            set_gradient_sync(state.module, micro == micros - 1)
            batch = self.stage.role_batch(role, self.step, self.plan.indices(self.step, micro, self.world.rank))
            for loss, logs in self._loss_parts(role, batch):
                with part("backward"):
                    (loss / micros).backward()
                for key, value in ({"loss": loss.item()} | logs).items():
                    sums[key] = sums.get(key, 0.0) + value / micros
        average((g for g in state.gradients() if not isinstance(g, DTensor)), self.world)  # shards are averaged already
        parts = state.gradient_norms()
        norm = state.clip(train.max_grad_norm)
        keys = sorted(sums)
        means = torch.tensor([sums[key] for key in keys], dtype=torch.float64)
        average([means], self.world)
        logs = dict(zip(keys, means.tolist(), strict=True)) | {"grad_norm": norm} | parts
        if all(math.isfinite(value) for value in logs.values()):  # the same on every rank
            self.checkpoints.copied()
            with part("optimizer"):
                logs |= state.update(self.step)
        state.zero_grad()
        prefix = "" if len(self.stage.modules) == 1 else f"{role}/"
        return {"loss": logs["loss"]} | {prefix + key: value for key, value in logs.items()}

    def _loss_parts(self, role: str, batch: dict[str, Any]) -> Iterator[tuple[torch.Tensor, dict[str, float]]]:
        """The stage's, each computed under autocast, which the backward pass between them is not in."""
        parts = self.stage.losses(role, batch, self.step)
        while True:
            with self._autocast(), part("loss"):
                found = next(parts, None)
            if found is None:
                return
            yield found

    def _autocast(self):
        if self.config.train.mixed_precision == "no":
            return nullcontext()
        # Selective checkpointing must see the same operations again: no cast may be there from before.
        cached = not keeps_attention(self.config, self.device)
        return torch.autocast(self.device.type, torch.bfloat16, cache_enabled=cached)

    def _save_checkpoint(self) -> None:
        info = {
            "step": self.step,
            "stage": self.stage.name,
            "samples": self.plan.samples_before(self.step),
            "ranks": self.world.size,
            "skipped": self.skipped,
            "bad_in_a_row": self.bad_in_a_row,
            "roles": {role: state.allocated() for role, state in self.states.items()},
            "models": {
                role: {name: model_config(model) for name, model in named_models(module)}
                for role, module in self.stage.modules.items()
            },
        }
        self.checkpoints.save(self.step, self._tensors(with_rng=True), info)
        self.saved_step = self.step

    def _tensors(self, with_rng: bool) -> dict[str, Any]:
        tensors = {"roles": {role: state.tensors() for role, state in self.states.items()}}
        return tensors | ({"rng": self._rng()} if with_rng else {})

    def _rng(self) -> dict[str, torch.Tensor]:
        """This rank's states of torch's own generators."""
        states = {f"cpu-{self.world.rank}": torch.get_rng_state()}
        if self.device.type == "cuda":
            states[f"cuda-{self.world.rank}"] = torch.cuda.get_rng_state()
        return states

    def _resume(self) -> int | None:
        """Go on from the last checkpoint; returns its step, None where there is none."""
        path = self.checkpoints.newest()
        if path is None:
            return None
        info = read_info(path)
        if info["stage"] != self.stage.name:
            raise ConfigError(
                f"checkpoint {path} is of stage {info['stage']}, not {self.stage.name}: choose another train.logdir"
            )
        for role, state in self.states.items():
            state.allocate(**info["roles"][role])
        same_ranks = info["ranks"] == self.world.size
        tensors = self._tensors(with_rng=same_ranks)
        read_into(path, tensors)
        for name, state in tensors.get("rng", {}).items():
            (torch.cuda.set_rng_state if name.startswith("cuda") else torch.set_rng_state)(state)
        self.step, self.skipped, self.bad_in_a_row = info["step"], info["skipped"], dict(info["bad_in_a_row"])
        elsewhere = info["samples"] - self.plan.samples_before(self.step)
        self.plan = replace(self.plan, taken_elsewhere=elsewhere)
        log.info("resumed from %s", path)
        return self.step
