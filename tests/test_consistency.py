"""Consistency distillation against its formula written out by hand, and its target against an EMA kept by hand."""

import pytest
import torch
from distill import CHANNELS, FRAMES, SIZE, gradients, make_stage, run_stage
from toy import randomize

from utils.config import ConfigError
from utils.rng import keyed_generator, keyed_randn

SEED, SHIFT, GRID, GUIDANCE = 5, 3.0, 6, 3.0
INDICES = [1, 7]


@pytest.fixture
def stage(root):
    """With student, teacher and target all different, as they are in the middle of a run."""
    stage = make_stage(root, "consistency")
    randomize(stage.target.transformer, seed=21)
    randomize(stage.transformer, seed=22)
    return stage


def sigma_of(u):
    return SHIFT * u / (1 + (SHIFT - 1) * u)


def forced(model, noisy, sigma, stage, prompt, clean):
    """x0 and flow of one clip [1, C, F, H, W]."""
    flow = model(
        noisy, torch.full((1, FRAMES), 1000 * sigma), stage.text.encode([prompt]), clean_hidden_states=clean
    ).sample
    return noisy - sigma * flow, flow


def loss_by_hand(stage, batch, step, index, place):
    point = int(torch.randint(GRID, (), generator=keyed_generator(SEED, "grid", step, index)))
    here, following = sigma_of(1 - point / GRID), sigma_of(1 - (point + 1) / GRID)
    clean, prompt = batch["latents"][place : place + 1], batch["captions"][place][0]
    noise = keyed_randn((CHANNELS, FRAMES, *SIZE), SEED, "noise", step, index)[None]
    noisy = (1 - here) * clean + here * noise
    x0, _ = forced(stage.transformer, noisy, here, stage, prompt, clean)
    with torch.no_grad():
        _, cond = forced(stage.teacher, noisy, here, stage, prompt, clean)
        _, uncond = forced(stage.teacher, noisy, here, stage, "a green square", clean)
        stepped = noisy + (following - here) * (uncond + GUIDANCE * (cond - uncond))
        target = stepped
        if following > 0:
            target, _ = forced(stage.target.transformer, stepped, following, stage, prompt, clean)
    return (x0 - target).square().mean(), point, (x0 - clean).square().mean().item()


def test_loss_and_its_gradient(stage):
    points = set()
    for step in range(4):
        batch = stage.batch(step, INDICES)
        loss, logs = stage.loss("generator", batch, step)
        loss.backward()
        found = gradients(stage.modules["generator"])
        stage.modules["generator"].zero_grad()
        by_hand = [loss_by_hand(stage, batch, step, index, place) for place, index in enumerate(INDICES)]
        total = sum(value for value, _, _ in by_hand) / 2
        total.backward()
        expected = gradients(stage.modules["generator"])
        stage.modules["generator"].zero_grad()
        assert loss.item() == pytest.approx(total.item(), rel=1e-4)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, atol=1e-4 * value.abs().max().item() + 1e-9, rtol=1e-3)
        assert logs["data_mse"] == pytest.approx(sum(distance for _, _, distance in by_hand) / 2, rel=1e-4)
        points |= {point for _, point, _ in by_hand}
    assert len(points) >= 3
    assert not gradients(stage.teacher) and not gradients(stage.target)


def test_the_last_point_is_the_teachers_own_sample(stage):
    """One step from clean, the target is where the teacher lands."""
    step = next(
        s for s in range(200) if torch.randint(GRID, (), generator=keyed_generator(SEED, "grid", s, 1)) == GRID - 1
    )
    batch = stage.batch(step, [1])
    expected, point, _ = loss_by_hand(stage, batch, step, 1, 0)
    assert point == GRID - 1
    assert stage.loss("generator", batch, step)[0].item() == pytest.approx(expected.item(), rel=1e-4)


def test_all_points_are_drawn_and_one_is_shared_by_all_chunks(stage):
    batch = stage.batch(0, range(300))
    assert batch["point"].shape == (300,)
    counts = torch.bincount(batch["point"], minlength=GRID)
    assert len(counts) == GRID and counts.min() > 20
    assert torch.equal(stage.batch(0, [41])["point"], batch["point"][41:42])


def run(root, logdir, *overrides):
    stage = make_stage(root, "consistency", *overrides)
    return stage, run_stage(stage, logdir)


def test_target_is_the_students_ema_from_the_first_step(root, tmp_path):
    start = {name: p.detach().clone() for name, p in make_stage(root, "consistency").transformer.named_parameters()}
    average = dict(start)
    for steps in (1, 2, 3):  # the run goes on from its checkpoint
        stage, trainer = run(root, tmp_path / "run", f"train.max_steps={steps}")
        student = dict(stage.transformer.named_parameters())
        average = {name: 0.99 * value + 0.01 * student[name].detach() for name, value in average.items()}
        for name, value in stage.target.transformer.named_parameters():
            torch.testing.assert_close(value, average[name], atol=1e-6, rtol=1e-5)
            torch.testing.assert_close(trainer.states["generator"].ema[f"transformer.{name}"], value, atol=0, rtol=0)
        for name, value in stage.teacher.named_parameters():
            assert torch.equal(value, start[name])
    assert max((student[name] - start[name]).abs().max().item() for name in start) > 1e-3


def test_a_resumed_run_is_the_same_run(root, tmp_path):
    whole, _ = run(root, tmp_path / "whole")
    run(root, tmp_path / "parts", "train.max_steps=2")
    rest, _ = run(root, tmp_path / "parts")
    for one, other in ((whole.transformer, rest.transformer), (whole.target, rest.target)):
        for (name, value), (_, same) in zip(one.named_parameters(), other.named_parameters(), strict=True):
            assert torch.equal(value, same), name


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["train.ema_start_step=200"], "`train.ema_start_step` is 200: the EMA is the target"),
        (["model.bundle=null"], "`model.bundle` is not set"),
        (["data.kind=prompts"], "`data.kind` is prompts: this stage learns from clips"),
        (["train.phases=[{steps: 1, frames: 2, batch_size: 1}]"], "`train.phases`: stage consistency has none"),
        (["consistency.grid_steps=1"], "`consistency.grid_steps` is 1: must lie in .2, 1000."),
    ],
)
def test_mistakes_are_named(root, overrides, message):
    with pytest.raises(ConfigError, match=message):
        make_stage(root, "consistency", *overrides)
