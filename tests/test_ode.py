"""Trajectories and the regression on them against loops and formulas written out by hand."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distill import CHANNELS, CHUNK, CPU, FRAMES, SIZE, gradients, make_stage, settings

from model.cache.cache import PackCache
from pipeline.data.shards import shard_path
from pipeline.generate.inputs import Prompts, prompt_noise
from pipeline.generate.rollout import Rollout
from pipeline.train.prompt_data import PromptData
from pipeline.train.roles import load_student, load_text
from pipeline.train.trajectories import Trajectories, grid_points, sample_trajectories
from scripts.generate_ode_pairs import main
from utils.config import ConfigError, SamplerConfig
from utils.distributed import World
from utils.rng import keyed_generator

SEED, SHIFT, GRID, GUIDANCE = 5, 3.0, 8, 6.0
POINTS = [0, 2, 4, 6]  # where 1000, 750, 500 and 250 lie on a grid of 8


def sigma_of(u):
    return SHIFT * u / (1 + (SHIFT - 1) * u)


TIMESTEPS = [1000 * sigma_of(1 - point / GRID) for point in POINTS]


@pytest.fixture(scope="module")
def root(root):
    """The world, with its trajectories written by the command."""
    assert generate(root) == 0
    return root


def generate(root, *overrides):
    settings(root, "ode")
    return main(["--config_path", str(root / "ode.yaml"), *overrides])


def test_trajectory_of_the_first_chunk(root):
    """Euler steps with guidance, by hand."""
    config = settings(root, "ode")
    text = load_text(config, CPU)
    model = load_student(config, text, CPU).eval()
    points, latents, prompt = Trajectories(root / "pairs")[3]
    assert points.shape == (4, CHANNELS, FRAMES, *SIZE) and latents.shape == (CHANNELS, FRAMES, *SIZE)
    assert prompt == PromptData.load(config, CHANNELS, CPU, World()).prompt(SEED, 3)
    context = PackCache.for_model(model, config.cache, *SIZE, FRAMES).context()
    x = prompt_noise(SEED, [prompt], [3])(0, 0, (CHANNELS, CHUNK, *SIZE))
    stored = []
    for step in range(GRID):
        if step in POINTS:
            stored.append(x)
        here, following = sigma_of(1 - step / GRID), sigma_of(1 - (step + 1) / GRID)
        with torch.no_grad():
            cond, uncond = (
                model(x, torch.tensor([1000 * here]), text.encode([words]), context=context, return_kv=False).sample
                for words in (prompt, "a green square")
            )
        x = x + (following - here) * (uncond + GUIDANCE * (cond - uncond))
    for point, expected in zip(points, stored, strict=True):
        torch.testing.assert_close(point[:, :CHUNK], expected[0], atol=5e-3, rtol=2e-3)  # float16 on disk
    torch.testing.assert_close(latents[:, :CHUNK], x[0], atol=5e-3, rtol=2e-3)


def test_trajectories_end_in_the_video_of_inference(root):
    config = settings(root, "ode")
    text, sampler = load_text(config, CPU), SamplerConfig(
        kind="euler", num_steps=GRID, guidance=GUIDANCE, shift=SHIFT, negative_prompt="a green square"
    )  # fmt: skip
    model = load_student(config, text, CPU).eval()
    stored = Trajectories(root / "pairs")
    for index in (0, 4):
        points, latents, prompt = stored[index]
        embeds = text.encode([prompt, "a green square"])
        cache = PackCache.for_model(model, config.cache, *SIZE, FRAMES)
        rollout = Rollout(model, cache, sampler, Prompts(embeds[:1], embeds[1:]), prompt_noise(SEED, [prompt], [index]))
        video = torch.cat([chunk for _, chunk in rollout.run(FRAMES // CHUNK)], dim=2)
        torch.testing.assert_close(latents, video[0], atol=5e-3, rtol=2e-3)
        noise = torch.cat(
            [prompt_noise(SEED, [prompt], [index])(c, 0, (CHANNELS, CHUNK, *SIZE)) for c in range(4)], dim=2
        )
        torch.testing.assert_close(points[0], noise[0], atol=5e-3, rtol=2e-3)


def test_what_was_stored(root):
    stored = Trajectories(root / "pairs")
    assert len(stored) == 5 and stored.timesteps == pytest.approx(TIMESTEPS)
    assert [path.name for path in sorted((root / "pairs").iterdir())] == [
        "plan.json", *(f"shard-0000{i}.safetensors" for i in range(3))
    ]  # fmt: skip
    assert stored.columns([TIMESTEPS[2], TIMESTEPS[0]]) == [2, 0]
    ends = torch.stack([stored[i][1] for i in range(5)])
    assert all((ends[i] - ends[j]).abs().max() > 0.1 for i in range(5) for j in range(i))


def test_generation_resumes(root, tmp_path):
    pairs = tmp_path / "pairs"
    assert generate(root, f"ode.path={pairs}") == 0
    before = {path.name: path.read_bytes() for path in pairs.iterdir()}
    times = {path.name: path.stat().st_mtime_ns for path in pairs.glob("*.safetensors")}
    shard_path(pairs, 1).unlink()
    with pytest.raises(ConfigError, match="is not finished: 1 of 3 shards are missing"):
        Trajectories(pairs)
    assert generate(root, f"ode.path={pairs}") == 0
    assert {path.name: path.read_bytes() for path in pairs.iterdir()} == before
    kept = [name for name, time in times.items() if (pairs / name).stat().st_mtime_ns == time]
    assert sorted(kept) == ["shard-00000.safetensors", "shard-00002.safetensors"]


def test_trajectories_do_not_depend_on_their_batch(root, tmp_path):
    assert generate(root, f"ode.path={tmp_path}/pairs", "train.batch_size=1", "ode.shard_size=5") == 0
    one, other = Trajectories(root / "pairs"), Trajectories(tmp_path / "pairs")
    for index in range(5):
        for value, same in zip(one[index], other[index], strict=True):
            assert value == same if isinstance(value, str) else (value - same).abs().max() < 5e-3


def test_other_settings_do_not_mix(root, capsys):
    assert generate(root, "ode.guidance=5") == 2
    assert "was made with another `guidance`: remove it" in capsys.readouterr().err


def test_steps_of_the_student_must_be_on_the_grid(root, capsys):
    config = settings(root, "ode")
    assert grid_points(config) == POINTS
    config.ode.grid_steps = 48
    assert grid_points(config) == [0, 12, 24, 36]
    assert generate(root, "sampler.steps=[1000,600]", f"ode.path={root}/other") == 2
    error = capsys.readouterr().err
    assert "`sampler.steps`: 600 (timestep 818.18) is not among the 8 steps of `ode.grid_steps`" in error
    assert not (root / "other").exists()


def test_sampling_needs_no_files(root):
    """`sample_trajectories` alone: points lie on the way from noise to the end."""
    config = settings(root, "ode")
    text = load_text(config, CPU)
    model = load_student(config, text, CPU).eval()
    cache = PackCache.for_model(model, config.cache, *SIZE, FRAMES)
    made = sample_trajectories(config, model, cache, text, ["a red circle", "a red circle"], [0, 1])
    assert made["points"].shape == (2, 4, CHANNELS, FRAMES, *SIZE)
    gaps = (made["points"] - made["latents"][:, None]).square().mean(dim=(0, 2, 3, 4, 5))
    assert torch.equal(gaps.sort(descending=True).values, gaps)
    assert (made["latents"][0] - made["latents"][1]).abs().max() > 0.1


# --- the regression ---


def test_loss_and_its_gradient(root):
    stage, indices, step = make_stage(root, "ode"), [0, 6], 3
    batch = stage.batch(step, indices)
    loss, logs = stage.loss("generator", batch, step)
    loss.backward()
    found = gradients(stage.modules["generator"])
    stage.modules["generator"].zero_grad()

    total, of_step = 0, {pick: [] for pick in range(4)}
    for place, index in enumerate(indices):
        clip = next(i for i in range(5) if torch.equal(stage.trajectories[i][1], batch["latents"][place]))
        points, end, prompt = stage.trajectories[clip]
        picks = torch.randint(4, (FRAMES // CHUNK,), generator=keyed_generator(SEED, "step", step, index)).tolist()
        frames = [pick for pick in picks for _ in range(CHUNK)]
        noisy = torch.stack([points[pick, :, frame] for frame, pick in enumerate(frames)], dim=1)[None]
        times = torch.tensor([[TIMESTEPS[pick] for pick in frames]])
        flow = stage.transformer(noisy, times, stage.text.encode([prompt]), clean_hidden_states=end[None]).sample
        errors = (noisy - times[:, None, :, None, None] / 1000 * flow - end).square()
        total = total + errors.mean() / 2
        for chunk, pick in enumerate(picks):
            of_step[pick].append(errors[:, :, chunk * CHUNK : (chunk + 1) * CHUNK].mean().item())
    total.backward()
    assert loss.item() == pytest.approx(total.item(), rel=1e-4)
    for name, value in gradients(stage.modules["generator"]).items():
        torch.testing.assert_close(found[name], value, atol=1e-4 * value.abs().max().item() + 1e-9, rtol=1e-3)
    for pick, errors in of_step.items():
        if errors:
            assert logs[f"mse_{TIMESTEPS[pick]:.0f}"] == pytest.approx(sum(errors) / len(errors), rel=1e-4)


def test_every_chunk_draws_its_own_step(root):
    stage = make_stage(root, "ode")
    picks = stage.batch(0, range(60))["pick"]
    assert picks.shape == (60, 4) and torch.bincount(picks.flatten(), minlength=4).min() > 30
    assert (picks != picks[:, :1]).any(dim=1).sum() > 40
    assert torch.equal(stage.batch(0, [17])["pick"][0], picks[17])


def test_a_student_of_fewer_steps(root):
    stage = make_stage(root, "ode", "sampler.steps=[1000,500]")
    assert stage.columns == [0, 2]
    batch = stage.batch(0, [0])
    clip = next(i for i in range(5) if torch.equal(stage.trajectories[i][1], batch["latents"][0]))
    points = stage.trajectories[clip][0][[0, 2]]
    for chunk, pick in enumerate(batch["pick"][0].tolist()):
        frames = slice(chunk * CHUNK, (chunk + 1) * CHUNK)
        assert torch.equal(batch["noisy"][0, :, frames], points[pick, :, frames])


@pytest.mark.parametrize(
    "overrides, message",
    [
        (
            ["sampler.steps=[1000,600]"],
            "818.18 is not stored in .*, which has 1000.00, 900.00, 750.00, 500.00",
        ),
        (["ode.path=/nowhere"], "`ode.path` is /nowhere: there is no such folder"),
        (["video.frames_per_chunk=4"], "were made with chunks of 2"),
        (["sampler.kind=euler"], "`sampler.kind` and `sampler.guidance` are euler"),
    ],
)
def test_mistakes_are_named(root, overrides, message):
    with pytest.raises(ConfigError, match=message):
        make_stage(root, "ode", *overrides)


@pytest.mark.slow
def test_two_ranks_write_the_same_trajectories(root, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               "-m", "scripts.generate_ode_pairs", "--config_path", str(root / "ode.yaml"),
               f"ode.path={tmp_path}/pairs"]  # fmt: skip
    settings(root, "ode")
    subprocess.run(command, check=True, cwd=Path(__file__).resolve().parents[1], timeout=300)
    one, other = Trajectories(root / "pairs"), Trajectories(tmp_path / "pairs")
    assert other.meta == one.meta
    for index in range(5):
        for value, same in zip(one[index], other[index], strict=True):
            assert value == same if isinstance(value, str) else (value - same).abs().max() < 5e-3
