"""The DMD stage against its formulas written out by hand, sample by sample."""

import json
import math
import shutil
import threading
from dataclasses import replace

import pytest
import torch
from diffusers import WanTransformer3DModel
from distill import CHANNELS, CPU, FRAMES, SCORE, SIZE, gradients, make_stage, run_stage, settings
from dmd_by_hand import INDICES, drawn, flow_of, generated, generator_gradient, sigma_of, snapped
from safetensors.torch import load_file, save_file
from toy import randn

from pipeline.load import read_scheduler
from pipeline.sources import require_training_files
from pipeline.train.dmd import DMDStage
from pipeline.train.prompt_data import LatentReference
from pipeline.train.text import TextConditioning
from pipeline.train.trainer import Trainer, TrainingDivergedError
from utils.config import ConfigError
from utils.distributed import World
from utils.tracking import Tracker


@pytest.fixture
def stage(root):
    return make_stage(root, "dmd")


@pytest.mark.parametrize("guides_all", [True, False])
def test_generator_loss_and_its_gradient(stage, monkeypatch, guides_all):
    step, batch = 7, stage.batch(7, INDICES)
    if not guides_all:  # one of the two samples only
        above = sum(drawn("generator", step, index)[0] for index in INDICES) / 2
        monkeypatch.setattr(stage, "config", replace(stage.config, dmd=replace(stage.config.dmd, guidance_above=above)))
    loss, logs = stage.loss("generator", batch, step)
    loss.backward()
    found = gradients(stage.modules["generator"])
    stage.modules["generator"].zero_grad()

    x0 = generated(stage, batch, step).latents
    assert x0.shape == (2, CHANNELS, FRAMES, *SIZE) and x0.requires_grad
    by_hand = generator_gradient(stage, batch, step, x0)
    gradient = torch.cat([g for g, _, _ in by_hand])
    assert loss.item() == pytest.approx(0.5 * gradient.square().mean().item(), rel=1e-4)
    (x0 * gradient).sum().div(x0.numel()).backward()
    expected = gradients(stage.modules["generator"])
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], atol=1e-5 * expected[name].abs().max().item(), rtol=1e-3)
    critic, teacher = (sum(errors[i] for errors in by_hand) / 2 for i in (1, 2))
    assert logs["critic_error"] == pytest.approx(critic, rel=1e-4)
    assert logs["critic_lag"] == pytest.approx(critic / teacher, rel=1e-4)
    assert logs["kl_gradient"] == pytest.approx(gradient.abs().mean().item(), rel=1e-4)


def test_critic_loss(stage):
    step, batch = 4, stage.batch(4, INDICES)
    loss, logs = stage.loss("critic", batch, step)
    x0 = generated(stage, batch, step, "critic").latents
    assert not x0.requires_grad
    errors = []
    for place, (prompt, index) in enumerate(zip(batch["script"].scored, INDICES, strict=True)):
        own, (timestep, noise) = x0[place : place + 1], drawn("critic", step, index)
        sigma = snapped(timestep)
        noisy = (1 - sigma) * own + sigma * noise
        errors.append((flow_of(stage.critic, noisy, timestep, stage, prompt) - (noise - own)).square().mean().item())
    assert loss.item() == pytest.approx(sum(errors) / 2, rel=1e-4)


def test_each_role_trains_its_own_weights(stage):
    batch = stage.batch(0, INDICES)
    stage.loss("generator", batch, 0)[0].backward()
    found = gradients(stage.modules["generator"])
    assert found.keys() == dict(stage.modules["generator"].named_parameters()).keys()
    compressor = {name: g for name, g in found.items() if "pack_compressor" in name}
    assert compressor and all(g.abs().max() > 0 for g in compressor.values())
    assert not gradients(stage.critic) and not gradients(stage.teacher)
    stage.modules["generator"].zero_grad()
    stage.loss("critic", batch, 0)[0].backward()
    assert gradients(stage.critic).keys() == dict(stage.critic.named_parameters()).keys()
    assert not gradients(stage.modules["generator"]) and not gradients(stage.teacher)
    assert stage.parts("generator") == {"compressor": stage.transformer.pack_compressor}


def test_a_compressor_that_is_not_trained(root, stage):
    """It has no gradient and keeps its weights; the video, and what the other weights are taught of it, stay."""
    frozen = make_stage(root, "dmd", "dmd.train_compressor=false")
    batch = frozen.batch(0, INDICES)
    loss, logs = frozen.loss("generator", batch, 0)
    expected, _ = stage.loss("generator", batch, 0)
    torch.testing.assert_close(loss, expected, atol=0, rtol=1e-5)
    loss.backward()
    found = gradients(frozen.modules["generator"])
    trained = {n for n, p in frozen.modules["generator"].named_parameters() if p.requires_grad}
    assert found.keys() == trained and not any("pack_compressor" in name for name in trained)
    assert logs["mid_tokens_attended"] > 0 and frozen.parts("generator") == {}



@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_only_the_frozen_teacher_is_in_bfloat16(root, mixed_precision):
    stage = make_stage(root, "dmd", f"train.mixed_precision='{mixed_precision}'")
    dtypes = {
        name: {p.dtype for part in ("to_q", "ffn") for key, p in model.blocks.named_parameters() if part in key}
        for name, model in (("teacher", stage.teacher), ("critic", stage.critic), ("student", stage.transformer))
    }
    frozen = torch.bfloat16 if mixed_precision == "bf16" else torch.float32
    assert dtypes == {"teacher": {frozen}, "critic": {torch.float32}, "student": {torch.float32}}
    assert stage.teacher.condition_embedder.time_embedder.linear_1.weight.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed_precision == "bf16"):
        _, logs = stage.loss("generator", stage.batch(0, INDICES), 0)
    reference = make_stage(root, "dmd")
    _, expected = reference.loss("generator", reference.batch(0, INDICES), 0)
    assert logs["teacher_error"] == pytest.approx(expected["teacher_error"], rel=0.02)


def test_gradient_survives_bf16(root):
    """Weights are cast for the steps without gradient first; the step with gradient must not reuse those casts."""
    stage = make_stage(root, "dmd", "train.mixed_precision=bf16")
    step = next(step for step in range(99) if stage.exit_step("generator", step) == 3)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = stage.loss("generator", stage.batch(step, INDICES), step)
    loss.backward()
    found = gradients(stage.modules["generator"])
    assert found.keys() == dict(stage.modules["generator"].named_parameters()).keys()
    assert all(g.isfinite().all() and g.abs().max() > 0 for g in found.values())


def test_prompts_are_encoded_beside_the_steps(root, monkeypatch):
    encode, monitor = TextConditioning._run_encoder, Tracker(root, None, "", {}, False)

    def run(beside):
        here = []

        def noted(text, prompts):
            if threading.current_thread() is threading.main_thread():
                here.extend(prompts)
            return encode(text, prompts)

        monkeypatch.setattr(TextConditioning, "beside", beside)
        monkeypatch.setattr(TextConditioning, "_run_encoder", noted)
        stage = make_stage(root, "dmd")
        trainer = Trainer(stage.config, stage, World(), root, monitor, CPU, save=False, visualize=False)
        losses = []
        for trainer.step in range(2):
            losses.append(trainer._train_step()["loss"])
        stage.close()
        return losses, here, stage.text

    losses, here, text = run(beside=True)
    assert here == ["a green square"]  # the negative prompt, at the generator's first update
    assert len(text._coming) <= 4  # of the step that did not come
    expected, here, _ = run(beside=False)
    assert losses == expected and len(here) > 2


def test_score_timesteps(stage):
    many = list(range(400))
    x0 = torch.zeros(len(many), CHANNELS, 1, 2, 2)
    timestep, noise, noisy = stage._score_input("critic", x0, {"indices": many}, 9)
    assert timestep.shape == (400,) and timestep.min() >= 20 and timestep.max() <= 980
    assert (timestep == 980).float().mean() < 0.1 and timestep.unique().numel() > 250
    assert timestep.median() == pytest.approx(1000 * sigma_of(0.5), abs=60)
    again = stage._score_input("critic", x0[:1], {"indices": [17]}, 9)
    assert again[0] == timestep[17] and torch.equal(again[1][0], noise[17])
    assert stage._score_input("generator", x0[:1], {"indices": [17]}, 9)[0] != timestep[17]


def test_roles_and_their_settings(root):
    stage = make_stage(root, "dmd", "dmd.critic_updates=5")
    roles = [stage.roles(step) for step in range(20)]
    assert all("critic" in due for due in roles)
    assert sum("generator" in due for due in roles) == 4 and roles[4] == ("critic", "generator")
    assert stage.optimizer("critic").lr == 2e-3 and stage.optimizer("generator") is None
    assert stage.keeps_ema("generator") and not stage.keeps_ema("critic")
    assert sum(p.numel() for p in stage.teacher.parameters()) > sum(p.numel() for p in stage.critic.parameters())


# --- the rollout ---


# --- the same numbers wherever and however often ---


def test_a_samples_loss_does_not_depend_on_its_company(stage):
    for role in ("generator", "critic"):
        together, _ = stage.loss(role, stage.batch(2, INDICES), 2)
        alone = [stage.loss(role, stage.batch(2, [index]), 2)[0].item() for index in INDICES]
        assert together.item() == pytest.approx(sum(alone) / 2, rel=1e-5)
        assert stage.loss(role, stage.batch(2, INDICES), 2)[0].item() == together.item()
        assert abs(alone[0] - alone[1]) > 1e-4
        assert stage.loss(role, stage.batch(3, INDICES), 3)[0].item() != pytest.approx(together.item(), rel=1e-3)


def trained(root, logdir, *overrides):
    """State of every role and what was logged after a run."""
    stage = make_stage(root, "dmd", *overrides)
    trainer = run_stage(stage, logdir)
    return {role: dict(module.state_dict()) for role, module in stage.modules.items()}, trainer


def assert_same(states, others, tolerance):
    for role, state in states.items():
        for name, value in state.items():
            error = (value - others[role][name]).abs().max().item()
            assert error <= tolerance * max(1.0, value.abs().max().item()), (role, name, error)


def test_accumulation_is_a_larger_batch(root, tmp_path):
    """At a learning rate that moves weights by more than 1e-3 in four steps, two of them the generator's."""
    before = {role: dict(m.state_dict()) for role, m in make_stage(root, "dmd").modules.items()}
    whole, trainer = trained(root, tmp_path / "whole")
    split, _ = trained(root, tmp_path / "split", "train.batch_size=1", "train.gradient_accumulation=2")
    assert_same(whole, split, 1e-5)
    for role, state in whole.items():
        moved = max((state[name] - before[role][name]).abs().max().item() for name in state)
        assert moved > 1e-3, role
    assert trainer.states["critic"].ema is None and trainer.states["generator"].ema is not None


def test_a_resumed_run_is_the_same_run(root, tmp_path):
    whole, _ = trained(root, tmp_path / "whole")
    trained(root, tmp_path / "parts", "train.max_steps=3")
    rest, _ = trained(root, tmp_path / "parts")
    assert_same(whole, rest, 0.0)


def test_what_is_logged(root, tmp_path):
    trained(root, tmp_path / "run", "train.max_steps=2")
    first, second = map(json.loads, (tmp_path / "run" / "log.jsonl").read_text().splitlines())
    for key in ("loss", "grad_norm", "mid_tokens_attended", "exit_step", "latent_mean/00", "latent_std/03", "motion",
                "latent_mean_worst", "latent_std_least", "latent_std_most", "motion_against_data", "lr"):  # fmt: skip
        assert f"critic/{key}" in first, key
        assert f"generator/{key}" in second, key
    assert not any(key.startswith("generator/") for key in first)
    for key in ("grad_norm_compressor", "update_norm_compressor", "critic_lag", "kl_gradient"):
        assert second[f"generator/{key}"] > 0
    assert second["generator/mid_tokens_attended"] == 2  # one chunk of 2 frames, a token each
    assert second["generator/lr"] == 1e-3 and second["critic/lr"] == 2e-3


def test_exported_bundle_generates(root, tmp_path):
    stage = make_stage(root, "dmd", "sampler.shift=4", "train.shift=3")
    stage.export(tmp_path / "bundle", None)
    assert read_scheduler(tmp_path / "bundle").config.shift == 4  # that of the rollouts
    student = make_stage(root, "dmd", f"model.bundle={tmp_path}/bundle", f"train.text_from={tmp_path}/bundle",
                         f"data.vae={tmp_path}/bundle/vae")  # fmt: skip
    for name, value in student.transformer.state_dict().items():
        torch.testing.assert_close(value, stage.transformer.state_dict()[name], atol=0, rtol=1e-2)  # bfloat16
    scores = make_stage(root, "dmd", "train.sample_held_out=1", "train.sample_frames=4",
                        "train.sample_long_frames=8").sample(0, tmp_path / "samples", None)  # fmt: skip
    assert "present" in scores and "long/present" in scores
    assert (tmp_path / "samples" / "000.mp4").is_file() and (tmp_path / "samples" / "long" / "000.mp4").is_file()


# --- mistakes ---


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["dmd.teacher=null"], "`dmd.teacher` is not set"),
        (["dmd.teacher=/nowhere"], "`dmd.teacher` is /nowhere: there is no such folder"),
        (["sampler.kind=euler"], "`sampler.kind` and `sampler.guidance` are euler"),
        (["sampler.guidance=2"], "`sampler.kind` and `sampler.guidance` are few_step and 2"),
        (["train.init_from=somewhere"], "`train.init_from` is somewhere: stage dmd starts from model.bundle"),
        (["train.text_from=null"], "`train.text_from` is not set"),
        (["video.trained_frames=9"], "`video.trained_frames` is 9: must be a multiple of video.frames_per_chunk=2"),
        (["dmd.max_rollout_frames=6"], "`dmd.max_rollout_frames` is 6: must be null, or at least"),
        (["data.kind=prompts", "data.path=null"], "`data.path` is not set: name a file with one prompt per line"),
        (["dmd.min_timestep=990"], "`dmd.min_timestep` is 990"),
        (["cache.unit=frames", "cache.sink=3"], "`cache.sink` is 3: as frames it must be a multiple"),
    ],
)
def test_mistakes_are_named(root, overrides, message):
    with pytest.raises(ConfigError, match=message):
        make_stage(root, "dmd", *overrides)


def test_scores_must_see_the_students_latents_and_prompts(root, tmp_path):
    for change, message in (({"in_channels": 6}, "6 latent channels"), ({"text_dim": 8}, "embeddings 8 wide")):
        WanTransformer3DModel(**{**SCORE, **change}, num_layers=1).save_pretrained(tmp_path / message)
        with pytest.raises(ConfigError, match=message):
            make_stage(root, "dmd", f"dmd.critic='{tmp_path / message}'")


def test_a_score_that_lacks_weights_is_refused(root, tmp_path):
    shutil.copytree(root / "teacher", tmp_path, dirs_exist_ok=True)
    (file,) = tmp_path.glob("*.safetensors")
    save_file({name: x for name, x in load_file(file).items() if not name.startswith("blocks.1.")}, file)
    with pytest.raises(ConfigError, match="`dmd.teacher`: .*missing blocks.1"):
        make_stage(root, "dmd", f"dmd.teacher={tmp_path}")


def test_a_teacher_of_nans_stops_the_run_and_moves_nothing(root, tmp_path):
    """The gradient that it gives becomes 0, so neither loss nor norm shows it."""
    stage = make_stage(root, "dmd", "train.max_steps=20", "dmd.critic_updates=2")
    with torch.no_grad():
        stage.teacher.proj_out.weight.fill_(float("nan"))
    before = {name: p.detach().clone() for name, p in stage.modules["generator"].named_parameters()}
    with pytest.raises(TrainingDivergedError, match="generator/.* 3 updates of the generator in a row"):
        run_stage(stage, tmp_path, save=False)
    assert all(torch.equal(p, before[name]) for name, p in stage.modules["generator"].named_parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dmd.teacher": "/nowhere"}, "`dmd.teacher` is /nowhere"),
        ({"dmd.critic": "OTHER"}, "`dmd.critic` is .*: its in_channels is 6"),
        ({"model.checkpoint": "/nowhere.pt"}, "checkpoint /nowhere.pt does not exist"),
        ({"data.kind": "prompts", "data.path": "/nowhere.txt"}, "`data.path` is /nowhere.txt"),
        ({"data.vae": "OTHER_VAE"}, "`data.vae` is .*: its latents have 7 channels"),
    ],
)
def test_what_a_run_lacks_is_found_before_anything_is_loaded(root, tmp_path, change, message):
    WanTransformer3DModel(**{**SCORE, "in_channels": 6}, num_layers=1).save_pretrained(tmp_path / "score")
    (tmp_path / "vae").mkdir()
    statistics = {"latents_mean": [0] * 7, "latents_std": [1] * 7}
    (tmp_path / "vae" / "config.json").write_text(json.dumps({"z_dim": 7, **statistics}))
    places = {"OTHER": tmp_path / "score", "OTHER_VAE": tmp_path / "vae"}
    config = settings(root, "dmd", [f"{key}={places.get(value, value)}" for key, value in change.items()])
    with pytest.raises(ConfigError, match=message):
        require_training_files(config)
        DMDStage.check(config)
    require_training_files(settings(root, "dmd"))
    DMDStage.check(settings(root, "dmd"))


# --- what a rollout is held against ---


def test_latent_reference():
    clips = randn(64, 3, 9, 8, 8, seed=2)
    still = LatentReference.of_clips(clips[:, :, :1].expand(-1, -1, 9, -1, -1))
    assert still.motion == pytest.approx(0, abs=1e-6)
    free = LatentReference.of_clips(clips * torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1, 1) + 0.5)
    assert free.motion == pytest.approx(1, abs=0.05)
    torch.testing.assert_close(free.std, torch.tensor([1.0, 2.0, 3.0]), atol=0.05, rtol=0)
    torch.testing.assert_close(free.mean, torch.full((3,), 0.5), atol=0.05, rtol=0)
    logs = LatentReference.of_vae(3).compare(clips * 2 + torch.tensor([0.0, 0.0, 1.0]).view(1, 3, 1, 1, 1))
    assert logs["latent_mean/02"] == pytest.approx(1, abs=0.1) and logs["latent_mean_worst"] == logs["latent_mean/02"]
    assert logs["latent_std_least"] == pytest.approx(2, abs=0.1) and logs["motion"] == pytest.approx(1, abs=0.05)
    assert "motion_against_data" not in logs
    collapsed = free.compare(torch.zeros(1, 3, 9, 8, 8))
    assert all(math.isfinite(value) for value in collapsed.values())
    assert collapsed["latent_std_most"] == 0 and collapsed["motion"] == 0
