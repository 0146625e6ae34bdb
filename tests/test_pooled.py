"""The `pooled` compressor, and the stage that teaches a trainable one to give the same."""

import pytest
import torch
from distill import CHANNELS, CHUNK, CPU, SIZE, make_stage, settings
from toy import randn

from model.cache.cache import PackCache
from model.causal_wan import CausalWanModel
from pipeline.generate.rollout import Prompts, Rollout
from pipeline.load import load_transformer
from pipeline.train.trainer import Trainer
from utils.config import ConfigError
from utils.distributed import World
from utils.load_config import load_config
from utils.tracking import Tracker


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
    seen, compress = [], CausalWanModel._compress
    monkeypatch.setattr(CausalWanModel, "_compress", lambda self, *args: seen.append(compress(self, *args)) or seen[-1])
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
    tracker = Tracker(tmp_path, None, "test", {}, is_main=True)
    Trainer(stage.config, stage, World(), tmp_path, tracker, CPU, save=False, visualize=False).run()
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
