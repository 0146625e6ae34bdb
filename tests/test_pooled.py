"""The `pooled` compressor, and the stage that teaches a trainable one to give the same."""

from dataclasses import replace

import pytest
import torch
from distill import CHANNELS, CHUNK, SIZE, gradients, make_stage, run_stage, settings
from test_through_cache import INDICES, WORDS, Story
from toy import randn

from model import compressing
from model.cache.cache import PackCache
from model.causal_wan import CausalWanModel
from pipeline.generate.inputs import Prompts
from pipeline.generate.rollout import Rollout
from pipeline.generate.sampler import few_step_timesteps
from pipeline.load import load_transformer
from utils.config import ConfigError
from utils.load_config import load_config


def averages(model: CausalWanModel, latents: torch.Tensor) -> torch.Tensor:
    """One token a frame, by hand: the mean of all patches' embeddings. [B, F, dim]."""
    kernel, bias = model.patch_embedding.weight, model.patch_embedding.bias  # [dim, C, 1, 2, 2]
    rows, cols = range(0, SIZE[0], 2), range(0, SIZE[1], 2)
    patches = [latents[..., r : r + 2, c : c + 2] for r in rows for c in cols]  # [B, C, F, 2, 2] each
    return torch.stack([torch.einsum("bcfij,dcij->bfd", patch, kernel[:, :, 0]) + bias for patch in patches]).mean(0)


@torch.no_grad()
def test_what_the_blocks_are_given(root, monkeypatch):
    settings(root, "dmd")
    config = load_config(root / "dmd.yaml", ["cache.compressor.kind=pooled", "cache.compressor.channels=[4,8]"])
    model = load_transformer(config).eval()
    assert model.pack_compressor is None
    seen, compress = [], compressing.compress
    monkeypatch.setattr(compressing, "compress", lambda *args: seen.append(compress(*args)) or seen[-1])
    cache = PackCache.for_model(model, config.cache, *SIZE, config.video.trained_frames)
    prompts = Prompts(randn(2, 4, 16, seed=3))
    rollout = Rollout(model, cache, config.sampler, prompts, lambda chunk, step, shape: randn(2, *shape, seed=step))
    chunks = [latents for _, latents in rollout.run(4)]
    assert cache.archive is not None and rollout.mid_tokens_attended == CHUNK * cache.mid_grid[1] * cache.mid_grid[2]
    for tokens, latents in zip(seen, chunks[1:], strict=True):  # the first chunk is sink
        expected = averages(model, latents)
        got = tokens.unflatten(1, (CHUNK, -1)).mean(2)  # cells of the grid are of equal size
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_a_compressor_learns_the_averages(root, tmp_path):
    overrides = ["train.max_steps=40", "train.optimizer.lr=0.01", f"train.logdir={tmp_path}"]
    stage = make_stage(root, "compressor", *overrides)
    before = {name: p.clone() for name, p in stage.transformer.named_parameters()}
    batch = stage.batch(0, [0, 1])
    first, _ = stage.loss("generator", batch, 0)
    run_stage(stage, tmp_path, save=False)
    last, _ = stage.loss("generator", batch, 0)
    assert last.item() < 0.5 * first.item()
    for name, p in stage.transformer.named_parameters():
        assert torch.equal(p, before[name]) != name.startswith("pack_compressor."), name

    compressor = stage.transformer.pack_compressor
    latents = batch["latents"].unflatten(2, (-1, CHUNK)).transpose(1, 2).flatten(0, 1)
    assert latents.shape[1:] == (CHANNELS, CHUNK, *SIZE)
    wanted = averages(stage.transformer, latents)
    distance = (compressor(latents) - wanted).square().mean() / wanted.flatten(0, 1).var(0).mean()
    assert distance.item() < 2 * last.item()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("cache.compressor.kind=lr", "`cache.compressor.kind` is lr: it has nothing to train"),
        ("train.sharding=full", "`train.sharding` is full"),
    ],
)
def test_mistakes_are_named(root, override, message):
    with pytest.raises(ConfigError, match=message):
        make_stage(root, "compressor", override)


def test_the_second_lesson_is_what_full_resolution_says(root):
    """Loss and gradient of returning chunks against two rollouts by hand; only the compressor has a gradient."""
    stage = make_stage(root, "compressor", "train.through_cache=true", "cache.compressor.kv=forward")
    config, stage.clips.data = stage.config, Story(5, weights=[0.0, 0.0, 0.0, 1.0, 3.0])
    batch = stage.batch(3, INDICES)
    found = [loss.item() for loss, _ in stage.losses("generator", batch, 3) if loss.backward() is None]
    model, noise = stage.transformer, {}
    steps = stage.sampled_timesteps(batch)
    assert set(steps.flatten().tolist()) <= set(few_step_timesteps(config.sampler, stage.clips.schedule))
    got = gradients(stage.modules["generator"])
    assert got and all("pack_compressor." in name for name in got) and all(g.abs().max() > 0 for g in got.values())

    flows = []
    for kind, kv in (("identity", "project"), ("hr_spatial", "forward")):
        cache = replace(config.cache, compressor=replace(config.cache.compressor, kind=kind, kv=kv))
        cache = PackCache.for_model(model, cache, *SIZE, config.video.trained_frames)
        rollout = Rollout(model, cache, config.sampler, Prompts(stage.text.encode(WORDS[:2])), lambda *_: noise)
        for chunk, clean in enumerate(batch["latents"].split(CHUNK, 2)):
            pure, t = batch["noise"].split(CHUNK, 2)[chunk], steps[:, chunk]
            rollout.prompts = Prompts(stage.text.encode([captions[chunk] for captions in batch["captions"]]))
            context = cache.context()
            if context.chooses:
                rollout.flow(pure, few_step_timesteps(config.sampler, stage.clips.schedule)[0], context)
            noisy = stage.clips.schedule.add_noise(clean, pure, t[:, None].expand(-1, CHUNK))
            flows.append(rollout.flow(noisy, t, context))
            rollout.commit(clean, context)
    by_hand = [(whole - small).square().mean().item() for whole, small in zip(flows[:5], flows[5:], strict=True)]
    assert found == pytest.approx([0.25 * by_hand[3], 0.75 * by_hand[4]], rel=1e-4)
