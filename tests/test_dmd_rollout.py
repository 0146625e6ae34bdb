"""What the DMD stage rolls out: the steps, contexts and windows of inference, and a memory that is in use."""

import pytest
import torch
from distill import CHANNELS, CHUNK, FRAMES, SIZE, make_stage
from dmd_by_hand import INDICES, SEED, STEPS, generated, generator_gradient, sigma_of
from test_chunk_context import assert_same_tokens, token_rows
from toy import randn

from model.cache.cache import PackCache
from model.cache.context import ChunkContext
from pipeline.generate.inputs import Prompts
from pipeline.generate.rollout import Rollout
from utils.config import ConfigError
from utils.load_config import load_config
from utils.rng import keyed_randn
from utils.sprites.world import parse_caption


@pytest.fixture
def stage(root):
    return make_stage(root, "dmd")


def test_every_chunk_stops_at_one_step_of_the_iteration(stage, monkeypatch):
    asked, forward = [], type(stage.transformer).forward

    def spy(self, hidden_states, timestep, *rest, **options):
        asked.append((timestep.tolist(), torch.is_grad_enabled()))
        return forward(self, hidden_states, timestep, *rest, **options)

    monkeypatch.setattr(type(stage.transformer), "forward", spy)
    timesteps = [1000 * sigma_of(step / 1000) for step in STEPS]
    exits = set()
    for step in range(6):
        for role in ("generator", "critic"):
            asked.clear()
            exit_step = stage.exit_step(role, step)
            exits.add(exit_step)
            stage.loss(role, stage.batch(step, INDICES), step)
            expected = ([*timesteps[: exit_step + 1], 0.0] * (FRAMES // CHUNK))[:-1]  # nothing reads the last commit
            assert [times[0] for times, _ in asked] == pytest.approx(expected)
            assert all(times[0] == times[1] for times, _ in asked)  # every sample
            trained = [place % (exit_step + 2) == exit_step and role == "generator" for place in range(len(asked))]
            assert [with_gradient for _, with_gradient in asked] == trained
    assert len(exits) >= 3


@pytest.mark.parametrize("longer", [False, True])
def test_training_attends_what_inference_attends(root, monkeypatch, longer):
    """Keys, values, positions and selection of every chunk, step and layer."""
    stage = make_stage(root, "dmd", *(["dmd.max_rollout_frames=16"] if longer else []))
    step = next(step for step in range(99) if stage.num_chunks("generator", step) == stage.max_chunks)
    calls, extend = [], ChunkContext.extend

    def spy(self, layer, selected, key, value, mid):
        keys, values = extend(self, layer, selected, key, value, mid)
        starts = self.history_starts(), self.mid_starts(selected).tolist()
        calls.append((self.chunk, layer, selected.tolist(), starts, token_rows(keys, values)))
        return keys, values

    monkeypatch.setattr(ChunkContext, "extend", spy)
    batch, exit_step = stage.batch(step, INDICES), stage.exit_step("generator", step)
    video = generated(stage, batch, step)
    in_training, calls[:] = list(calls), []

    config = load_config(root / "dmd.yaml", [f"sampler.steps={STEPS[: exit_step + 1]}"])
    cache = PackCache.for_model(stage.transformer, config.cache, *SIZE, FRAMES)

    def noise(chunk, denoising_step, shape):
        keys = [(SEED, "rollout", "generator", step, index, chunk, denoising_step) for index in INDICES]
        return torch.stack([keyed_randn(shape, *key) for key in keys])

    prompts = Prompts(stage.text.encode(batch["script"].scored))
    rollout = Rollout(stage.transformer, cache, config.sampler, prompts, noise)
    expected = torch.cat([latents for _, latents in rollout.run(stage.max_chunks, commit_last=False)], dim=2)
    frames = FRAMES - CHUNK if longer else FRAMES
    torch.testing.assert_close(video.latents[:, :, -frames:].detach(), expected[:, :, -frames:], atol=1e-4, rtol=1e-4)
    assert len(in_training) == len(calls) == (stage.max_chunks * (exit_step + 2) - 1) * 2
    assert any(selected[0] for _, _, selected, _, _ in calls)
    for (*where, tokens), (*wanted, wanted_tokens) in zip(in_training, calls, strict=True):
        assert where == wanted
        assert_same_tokens(tokens, wanted_tokens)


def test_longer_rollouts_train_their_last_window(root):
    stage = make_stage(root, "dmd", "dmd.max_rollout_frames=16")
    lengths = [stage.num_chunks("generator", step) for step in range(40)]
    assert set(lengths) == {4, 5, 6, 7, 8}
    step = lengths.index(7)
    batch = stage.batch(step, INDICES)
    made = generated(stage, batch, step)
    assert made.latents.shape[2] == FRAMES and made.frozen_frames == CHUNK
    assert made.rollout.cache.num_chunks == 6  # nothing reads the last one
    gradient = torch.autograd.grad(made.latents[:, :, :CHUNK].sum(), stage.transformer.proj_out.weight,
                                   allow_unused=True, retain_graph=True)[0]  # fmt: skip
    assert gradient is None or gradient.abs().max() == 0
    for chunk in range(1, 4):
        part = made.latents[:, :, chunk * CHUNK : (chunk + 1) * CHUNK]
        gradient = torch.autograd.grad(part.sum(), stage.transformer.proj_out.weight, retain_graph=True)[0]
        assert gradient.abs().max() > 0

    by_hand = torch.cat([g for g, _, _ in generator_gradient(stage, batch, step, made.latents)])
    loss, _ = stage.loss("generator", batch, step)
    assert loss.item() == pytest.approx(0.5 * by_hand[:, :, CHUNK:].square().mean().item(), rel=1e-4)


def test_the_first_frame_of_a_later_window_is_an_image_latent(root):
    stage = make_stage(root, "dmd", "dmd.max_rollout_frames=16")
    video = randn(2, CHANNELS, 12, *SIZE, seed=4)
    clip = stage._as_clip(video)
    assert torch.equal(clip[:, :, 1:], video[:, :, -FRAMES + 1 :])
    vae = stage.vae()
    with torch.no_grad():  # the VAE's statistics are mean 0 and deviation 1 here
        last = vae.decode(video[:, :, :5]).sample[:, :, -1:]
        image = vae.encode(last).latent_dist.mode()
    torch.testing.assert_close(clip[:, :, :1], image, atol=1e-4, rtol=1e-4)


def test_a_cache_that_no_rollout_fills_is_refused(root):
    with pytest.raises(ConfigError, match="no chunk of a rollout of 4 chunks attends a compressed one.*cache.top_k=0"):
        make_stage(root, "dmd", "cache.sink=2")
    make_stage(root, "dmd", "cache.sink=2", "dmd.max_rollout_frames=10")
    make_stage(root, "dmd", "cache.sink=2", "cache.top_k=0")


def test_a_memory_that_stays_inert_stops_the_run(root, monkeypatch):
    stage = make_stage(root, "dmd")
    monkeypatch.setattr(PackCache, "archived", range(0))  # nothing ever reaches the archive
    for role in ("critic", "generator"):
        with pytest.raises(ConfigError, match="no chunk of a rollout of 4 chunks attends a compressed one"):
            stage.loss(role, stage.batch(0, INDICES), 0)


@pytest.fixture
def stories(tmp_path):
    clips = ["data.kind=sprites", f"data.path={tmp_path}", "data.num_clips=2", "data.clip_frames=29"]
    return [*clips, "data.stories.count=64"]


def test_stories_are_scored_by_their_last_shot(root, stories, monkeypatch):
    stage = make_stage(root, "dmd", *stories, "data.stories.chunks=7", "data.stories.shot_chunks=[1,2]")
    step = next(step for step in range(9) if len(stage.batch(step, INDICES)["script"].prompts) == 3)
    batch = stage.batch(step, INDICES)
    script = batch["script"]
    assert script.chunks == 7 and max(script.prompts) == 3  # the scores see four chunks
    for said, full in zip(script.prompts[3], script.scored, strict=True):
        assert parse_caption(said).colour is None and parse_caption(full).colour is not None  # a returning shot
        assert parse_caption(said).shape == parse_caption(full).shape
    assert stage.role_batch("generator", step, INDICES)["script"].prompts.keys() == script.prompts.keys()

    asked, forward = [], Rollout._forward
    monkeypatch.setattr(Rollout, "_forward", lambda self, *args, **options: (
        asked.append((self.index, self.embeds)), forward(self, *args, **options))[1])  # fmt: skip
    loss, _ = stage.loss("generator", batch, step)
    for chunk, embeds in asked:
        shot = max(start for start in script.prompts if start <= chunk)
        assert torch.equal(embeds, stage.text.encode(script.prompts[shot]))
    assert {chunk for chunk, _ in asked} == set(range(7))

    made = generated(stage, batch, step)
    assert made.frozen_frames == 1
    for frame, trained in ((0, False), (1, True), (CHUNK, True)):
        gradient = torch.autograd.grad(made.latents[:, :, frame].sum(), stage.transformer.proj_out.weight,
                                       retain_graph=True)[0]  # fmt: skip
        assert bool(gradient.abs().max() > 0) == trained
    by_hand = torch.cat([g for g, _, _ in generator_gradient(stage, batch, step, made.latents)])
    assert loss.item() == pytest.approx(0.5 * by_hand[:, :, 1:].square().mean().item(), rel=1e-4)


def test_a_share_of_the_steps_shows_stories(root, stories):
    stage = make_stage(root, "dmd", *stories, "data.stories.chunks=6", "data.stories.share=0.5")
    told = [stage.batch(step, INDICES)["script"].chunks for step in range(60)]
    assert set(told) == {None, 6} and 20 < told.count(6) < 40
