"""The trainer: a killed run goes on bit for bit, accumulation is a larger batch, broken steps are skipped."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from distill import run_stage
from safetensors.torch import load_file
from tiny import vae
from torch import nn
from torch.distributed.checkpoint.staging import DefaultStager

from pipeline.train.checkpoints import Checkpoints, list_checkpoints, read_into
from pipeline.train.checks import check_plan
from pipeline.train.method import Stage
from pipeline.train.plan import StepPlan
from pipeline.train.state import learning_rate
from pipeline.train.trainer import Trainer, TrainingDivergedError
from train import main
from utils.choices import OptimizerKind
from utils.config import Config, ConfigError
from utils.distributed import World
from utils.rng import keyed_randn
from utils.train_config import OptimizerConfig, PhaseConfig

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")

MICRO = """
seed: 3
video: {height: 32, width: 48, fps: 16, frames_per_chunk: 1, trained_frames: 2}
model: {num_layers: 1, num_attention_heads: 2, attention_head_dim: 12, ffn_dim: 16, text_dim: 8, text_len: 12,
        text_layers: 1, text_heads: 2, freq_dim: 8}
sampler: {kind: euler, num_steps: 2, guidance: 2.0}
train:
  stage: teacher
  max_steps: 8
  phases: [{steps: 3, frames: 1, batch_size: 2}, {steps: 5, frames: 2, batch_size: 2}]
  optimizer: {kind: muon, lr: 0.01, betas: [0.9, 0.99], warmup_steps: 2, decay_steps: 2}
  ema_start_step: 1
  checkpoint_every: 1
  keep_checkpoints: 2
  gradient_checkpointing: false
  sample_every: 0
  threads: 1
data: {clip_frames: 5, num_clips: 4, num_stills: 6}
"""


class LineStage(Stage):
    """Fits a line to keyed samples; the loss of listed steps is not finite."""

    name = "line"

    def __init__(self, broken=()):
        torch.manual_seed(0)
        self.modules = {"generator": nn.Linear(3, 1)}
        self.broken = broken

    @classmethod
    def trained(cls, config):
        return [nn.Linear(3, 1)]

    def batch(self, step, sample_indices):
        inputs = torch.stack([keyed_randn((3,), "input", index) for index in sample_indices])
        return {"inputs": inputs, "targets": inputs.sum(1, keepdim=True)}

    def loss(self, role, batch, step):
        error = self.modules["generator"](batch["inputs"]) - batch["targets"]
        loss = error.square().mean()
        return (loss * float("nan") if step in self.broken else loss), {"error": error.abs().mean().item()}

    def sample(self, step, folder, ema):
        return {}

    def export(self, folder, ema):
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(self.modules["generator"].state_dict(), folder / "line.pt")


def line_config(**train) -> Config:
    config = Config()
    settings = {"max_steps": 6, "batch_size": 2, "mixed_precision": "no", "checkpoint_every": 100, "ema_start_step": 0}
    for key, value in (settings | train).items():
        setattr(config.train, key, value)
    config.train.optimizer = OptimizerConfig(lr=0.05, betas=[0.9, 0.99])
    return config


def run_line(folder: Path, broken=(), save=False, stage=None, **train) -> tuple[Trainer, dict[str, torch.Tensor]]:
    stage = stage or LineStage(broken)
    trainer = run_stage(stage, folder, save, line_config(**train))
    return trainer, {key: value.clone() for key, value in stage.modules["generator"].state_dict().items()}


def test_two_micro_batches_of_one_equal_a_batch_of_two(tmp_path):
    start = LineStage().modules["generator"].weight.detach().clone()
    _, whole = run_line(tmp_path / "whole", batch_size=2)
    _, parts = run_line(tmp_path / "parts", batch_size=1, gradient_accumulation=2)
    assert (whole["weight"] - start).abs().max() > 0.05
    for name in whole:
        assert torch.allclose(whole[name], parts[name], atol=1e-6)


def test_a_broken_step_is_skipped_and_counted(tmp_path):
    trainer, weights = run_line(tmp_path / "a", broken=(2, 4))
    assert trainer.skipped == 2 and all(torch.isfinite(value).all() for value in weights.values())
    records = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    assert [record["skipped_steps"] for record in records] == [0, 0, 1, 1, 2, 2]
    _, after_one = run_line(tmp_path / "b", broken=(1,), max_steps=2)
    _, one = run_line(tmp_path / "c", max_steps=1)
    assert torch.equal(after_one["weight"], one["weight"])  # the broken step left the weights alone


def test_three_broken_steps_in_a_row_stop_the_run_and_keep_the_last_good_checkpoint(tmp_path):
    with pytest.raises(TrainingDivergedError, match="3 updates of the generator in a row"):
        run_line(tmp_path, broken=(2, 3, 4), save=True, checkpoint_every=2)
    kept = list_checkpoints(tmp_path / "checkpoints")
    assert [path.name for path in kept][0] == "step-00000002"
    stored = {f"roles.generator.module.{name}": torch.full_like(value, torch.nan) for name, value in
              LineStage().modules["generator"].state_dict().items()}  # fmt: skip
    read_into(kept[-1], stored)
    assert all(torch.isfinite(value).all() for value in stored.values())


def test_a_resumed_run_equals_one_that_was_never_stopped(tmp_path):
    _, whole = run_line(tmp_path / "whole", max_steps=6)
    run_line(tmp_path / "parts", max_steps=3, save=True)
    trainer, parts = run_line(tmp_path / "parts", max_steps=6, save=True)
    assert trainer.step == 6 and torch.equal(whole["weight"], parts["weight"])


def test_checkpoints_are_whole_or_absent_and_the_last_are_kept(tmp_path):
    (tmp_path / ".partial-00000001").mkdir()
    (tmp_path / "step-00000002").mkdir()  # no state in it: not a checkpoint
    checkpoints, value = Checkpoints(tmp_path, 2, "", World()), torch.zeros(3)
    for step in (3, 4, 5):
        checkpoints.save(step, {"value": value}, {"step": step})
        checkpoints.copied()
        value.fill_(step)  # training goes on while the copy is written
    checkpoints.finish()
    read_into(tmp_path / "step-00000005", {"value": value})
    assert value.tolist() == [4.0, 4.0, 4.0]
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000004", "step-00000005"]
    assert not list(tmp_path.glob(".partial-*"))


def test_weights_change_only_after_they_were_copied_for_a_checkpoint(tmp_path, monkeypatch):
    whole = DefaultStager._stage

    def slowly(self, *arguments, **options):
        time.sleep(0.1)  # longer than a step
        return whole(self, *arguments, **options)

    monkeypatch.setattr(DefaultStager, "_stage", slowly)
    run_line(tmp_path / "all", save=True, max_steps=3, checkpoint_every=1, keep_checkpoints=3)
    for step in (1, 2):
        _, weights = run_line(tmp_path / str(step), max_steps=step)
        found = {"roles": {"generator": {"module": {name: torch.empty_like(x) for name, x in weights.items()}}}}
        read_into(list_checkpoints(tmp_path / "all" / "checkpoints")[step - 1], found)
        for name, value in found["roles"]["generator"]["module"].items():
            assert torch.equal(value, weights[name])


def test_sample_indices_do_not_depend_on_how_ranks_and_micro_steps_share_them():
    config = line_config(gradient_accumulation=2)
    config.train.phases = [PhaseConfig(2, 1, 3), PhaseConfig(4, 2, 1)]
    plan = StepPlan(config, world_size=2)
    taken = [i for step in range(5) for micro in (0, 1) for rank in (0, 1) for i in plan.indices(step, micro, rank)]
    assert taken == list(range(2 * 12 + 3 * 4))
    assert plan.samples_before(5) == len(taken)


class TwoRoleStage(LineStage):
    """A second role is due at every third step; what it logs beside its loss is not finite at the listed ones."""

    def __init__(self, broken=()):
        super().__init__(broken)
        self.modules["student"] = nn.Linear(3, 1)

    def roles(self, step):
        return ("generator", "student") if step % 3 == 2 else ("generator",)

    def loss(self, role, batch, step):
        error = self.modules[role](batch["inputs"]) - batch["targets"]
        bad = role == "student" and step in self.broken
        return error.square().mean(), {"seen": float("nan") if bad else 1.0}


def test_bad_updates_of_a_role_that_is_seldom_due_stop_the_run(tmp_path):
    stage = TwoRoleStage(broken=(5, 8, 11))
    start = {name: p.detach().clone() for name, p in stage.modules["student"].named_parameters()}
    with pytest.raises(TrainingDivergedError, match="step 11: student/seen .* 3 updates of the student in a row"):
        run_line(tmp_path / "stopped", stage=stage, max_steps=20)
    moved = {name: (p - start[name]).abs().max().item() for name, p in stage.modules["student"].named_parameters()}
    assert all(value > 0 for value in moved.values())  # by step 2
    run_line(tmp_path / "other", stage=TwoRoleStage(broken=(2, 5, 11)), max_steps=20)  # never three in a row


def test_learning_rate_warms_up_and_falls_to_zero():
    config = OptimizerConfig(lr=1.0, warmup_steps=4, decay_steps=5)
    rates = [learning_rate(config, step, max_steps=20) for step in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[15] == 1.0
    assert rates[16:] == pytest.approx([0.8, 0.6, 0.4, 0.2])


def test_muon_takes_the_matrices_of_the_blocks_only():
    from pipeline.train.state import build_optimizers

    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(4, 4)]), "head": nn.Linear(4, 2)})
    adamw, muon = build_optimizers(model, OptimizerConfig(kind=OptimizerKind.muon, betas=[0.9, 0.99]))
    chosen = [p for group in muon.param_groups for p in group["params"]]
    assert len(chosen) == 1 and chosen[0] is model["blocks"][0].weight
    assert sum(len(group["params"]) for group in adamw.param_groups) == 3


def test_the_total_batch_is_checked():
    config = line_config(total_batch_size=64)
    config.train.stage = "teacher"
    with pytest.raises(ConfigError, match=r"total_batch_size.* is 64.*8 ranks x batch_size 2 .* = 16"):
        check_plan(config, world_size=8)
    check_plan(config, world_size=32)


def micro_files(folder: Path) -> Path:
    torch.manual_seed(0)
    vae().save_pretrained(folder / "vae")
    path = folder / "micro.yaml"
    text = MICRO.replace("num_stills: 6}", f"num_stills: 6, path: {folder / 'latents'}, vae: {folder / 'vae'}}}")
    path.write_text(text)
    return path


def bundle_weights(logdir: Path) -> dict[str, torch.Tensor]:
    files = sorted((logdir / "bundle").rglob("*.safetensors"))
    assert len(files) >= 2
    return {f"{file.parent.name}/{key}": value for file in files for key, value in load_file(file).items()}


def test_a_run_killed_twice_ends_with_the_same_bits(tmp_path):
    config = micro_files(tmp_path)
    assert main(["--config_path", str(config), "--logdir", str(tmp_path / "whole")]) == 0
    command = [sys.executable, str(ROOT / "train.py"), "--config_path", str(config), "--logdir", str(tmp_path / "cut")]
    checkpoints = tmp_path / "cut" / "checkpoints"
    for after in (2, 5):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, env=environment)
        deadline = time.monotonic() + 900
        while not any(path.name >= f"step-{after:08d}" for path in list_checkpoints(checkpoints)):
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert main(["--config_path", str(config), "--logdir", str(tmp_path / "cut")]) == 0
    whole, cut = bundle_weights(tmp_path / "whole"), bundle_weights(tmp_path / "cut")
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.max_stepz=3"], "train.max_steps"),
        (["train.total_batch_size=5", "train.phases=[]"], "train.total_batch_size"),
        (["data.vae=/nowhere/vae"], "/nowhere/vae"),
        (["train.text_from=/nowhere/text"], "/nowhere/text"),
        (["train.stage=null"], "train.stage"),
        (["model.text_heads=3"], "`model.text_heads` is 3: must divide model.text_dim=8"),
        (["data.num_clips=0"], "`data.num_clips` is 0"),
        (["sampler.kind=nope"], "`sampler.kind` is nope: expected one of"),
        (["train.stage=ar_diffusion", "train.phases=[]", "data.clip_frames=9", "cache.spatial=no"], "cache.spatial"),
        (["train.stage=vae", "vae.dim_mult=[1, 1]"], "`vae.dim_mult` is [1, 1]"),
        (["train.stage=vae", "vae.patch_size=3"], "must be a multiple of 12 px"),
        (["train.tracker=wandb", "train.project=a/b"], "`train.tracker` is wandb: Invalid project name 'a/b'"),
        (["train.stage=dmdd"], "`train.stage` is dmdd: expected one of"),
        (["train.phases=[{steps: 1, frames: 9, batch_size: 1}]"], "9 latent frames"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(tmp_path, capsys, overrides, message):
    config = micro_files(tmp_path)
    assert main(["--config_path", str(config), "--logdir", str(tmp_path / "run"), *overrides]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and message in lines[0]


def test_a_missing_config_is_one_line_and_exit_code_2(capsys):
    assert main(["--config_path", "nowhere.yaml", "--logdir", "nowhere"]) == 2
    assert "nowhere.yaml does not exist" in capsys.readouterr().err
