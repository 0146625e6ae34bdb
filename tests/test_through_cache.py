"""Teacher forcing through the cache: the contexts of inference, one chunk's memory, captions and weights per chunk."""

import gc
import weakref

import pytest
import torch
from distill import CHANNELS, CHUNK, CPU, SIZE, gradients, make_stage, settings
from test_chunk_context import assert_same_tokens, token_rows
from toy import randn

from model.cache.context import ChunkContext
from pipeline.data.latents import TrainingClip
from pipeline.generate.inputs import Prompts
from pipeline.generate.rollout import Rollout
from pipeline.generate.sampler import few_step_timesteps
from pipeline.train.flow import ARDiffusionStage
from pipeline.train.through_cache import loss_shares
from utils.config import ConfigError
from utils.distributed import World

WORDS = ["a red circle", "a blue square", "a green triangle"]
INDICES = [3, 4]
OPTIONS = ["model.bundle=null", "train.loss_weighting=none"]


class Story:
    """Clips of `chunks` chunks, each captioned on its own and weighing what `weights` says."""

    def __init__(self, chunks, weights=None):
        self.chunks, self.weights = chunks, weights
        self.shape = (CHANNELS, chunks * CHUNK, *SIZE)

    def sample(self, seed, index, frames):
        captions = [WORDS[(index + chunk) % len(WORDS)] for chunk in range(self.chunks)]
        return TrainingClip(randn(CHANNELS, frames, *SIZE, seed=index), captions, self.weights)


def make(root, story, *overrides, through_cache=True):
    init = f"train.init_from={root}/bundle/transformer"
    config = settings(root, "ar_diffusion", [*OPTIONS, init, f"train.through_cache={through_cache}", *overrides])
    stage = ARDiffusionStage(config, CPU, World())
    stage.clips.data = story
    return stage


def parts(stage, batch):
    """[(loss, logs)], each backpropagated before the next."""
    found = []
    for loss, logs in stage.losses("generator", batch, 0):
        loss.backward()
        found.append((loss.item(), logs))
    return found


def watch(monkeypatch, wanted):
    """[(chunk, layer, selection, positions), tokens] of every self-attention for which `wanted()`."""
    calls, extend = [], ChunkContext.extend

    def spy(self, layer, selected, key, value, mid):
        keys, values = extend(self, layer, selected, key, value, mid)
        if wanted():
            starts = self.history_starts(), self.mid_starts(selected).tolist()
            calls.append(((self.chunk, layer, selected.tolist(), starts), token_rows(keys, values)))
        return keys, values

    monkeypatch.setattr(ChunkContext, "extend", spy)
    return calls


CACHES = [[], ["cache.refresh=per_forward"], ["cache.selection=recency"], ["cache.kind=sink"]]


@pytest.mark.parametrize(("cache", "pure_noise"), [([], False), *((cache, True) for cache in CACHES)])
def test_a_noisy_chunk_attends_what_it_would_at_inference(root, monkeypatch, cache, pure_noise):
    """Against a rollout that commits the clip's chunks in place of its own: selection and positions, and, of pure
    noise at the sampler's first step, all keys and values too."""
    stage = make(root, Story(7), *cache)
    batch, sampler = stage.batch(0, INDICES), stage.config.sampler
    if pure_noise:
        batch["timestep"][:] = few_step_timesteps(sampler, stage.clips.schedule)[0]
    with monkeypatch.context() as patch:
        in_training = watch(patch, torch.is_grad_enabled)
        parts(stage, batch)

    noise, clean = (batch[name].split(CHUNK, dim=2) for name in ("noise", "latents"))
    step, last = [0], len(sampler.steps) - 1

    def replace(chunk, index, timestep, latents):
        step[0] = index + 1
        return clean[chunk] if index == last else latents

    with monkeypatch.context() as patch:
        calls = watch(patch, lambda: step[0] == 0)
        embeds = [Prompts(stage.text.encode(texts)) for texts in zip(*batch["captions"], strict=True)]
        rollout = Rollout(
            stage.transformer, stage.new_cache(), sampler, embeds[0], lambda chunk, index, shape: noise[chunk],
            on_step_end=replace,
        )  # fmt: skip
        for chunk, _ in rollout.run(7):
            rollout.settle()
            step[0], rollout.prompts = 0, embeds[min(chunk + 1, 6)]
    assert len(calls) == len(in_training) == 7 * 2
    for (where, tokens), (wanted, wanted_tokens) in zip(in_training, calls, strict=True):
        assert where == wanted
        if pure_noise:
            assert_same_tokens(tokens, wanted_tokens)
    if "cache.kind=sink" not in cache:
        assert any(selected[0] for (_, _, selected, _), _ in calls)


def test_memory_is_that_of_one_chunk(root):
    """Bytes kept for the backward pass at a time, once the cache is full."""

    def peak(chunks):
        stage, held, most = make(root, Story(chunks), "cache.selection=recency"), [0], [0]

        class Kept:
            def __init__(self, tensor):
                self.tensor, self.bytes = tensor, tensor.nbytes
                held[0] += self.bytes
                most[0] = max(most[0], held[0])

            def __del__(self):
                held[0] -= self.bytes

        batch = stage.batch(0, INDICES)
        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
            parts(stage, batch)
        assert held[0] == 0
        return most[0]

    assert peak(12) == peak(4) > 0


def test_parts_add_up_to_a_mean_over_samples_and_weighted_chunks(root):
    weights = [0.0, 2.0, 0.0, 1.0, 0.0]
    stage = make(root, Story(5, weights))
    batch = stage.batch(0, INDICES)
    found = parts(stage, batch)
    assert len(found) == 2  # chunks that weigh nothing are only committed, and not after the last that does
    both = sum(loss for loss, _ in found)
    alone = [sum(loss for loss, _ in parts(stage, stage.batch(0, [index]))) for index in INDICES]
    assert both == pytest.approx(sum(alone) / 2, rel=1e-5)

    per_chunk = []
    for chunk in (1, 3):
        stage.clips.data.weights = [float(i == chunk) for i in range(5)]
        ((loss, logs),) = parts(stage, stage.batch(0, INDICES))
        assert logs["flow_mse"] == pytest.approx(loss, rel=1e-5)
        per_chunk.append(loss)
    assert both == pytest.approx((2 * per_chunk[0] + per_chunk[1]) / 3, rel=1e-5)
    stage.clips.data.weights = [0.0] * 5
    assert [loss for loss, _ in parts(stage, stage.batch(0, INDICES))] == [0.0]


def test_the_compressor_learns_and_the_history_gets_no_gradient(root):
    stage = make(root, Story(6))
    parts(stage, stage.batch(0, INDICES))
    found = gradients(stage.transformer.pack_compressor)
    assert found and all(value.abs().max() > 0 for value in found.values())


def test_block_mask_gives_every_chunk_its_own_caption(root):
    stage = make(root, Story(3), through_cache=False)
    batch = stage.batch(0, INDICES)

    def flow(captions):
        _, timestep = stage.clips.noisy(batch)
        given = stage.clips.condition(batch | {"captions": captions})
        return stage.transformer(batch["noise"], timestep, **given).sample.split(CHUNK, dim=2)

    texts = batch["captions"]
    mixed = flow(texts)
    changed = flow([[row[0], row[1], "a white square"] for row in texts])
    for chunk in range(2):
        assert torch.equal(mixed[chunk], changed[chunk])
    assert not torch.allclose(mixed[2], changed[2], atol=1e-4)
    same = [[row[0]] * 3 for row in texts]
    one = flow([[row[0]] for row in texts])
    for chunk, expected in zip(flow(same), one, strict=True):
        torch.testing.assert_close(chunk, expected, atol=1e-5, rtol=1e-5)


def test_chunks_weigh_under_the_block_mask_too(root):
    stage = make(root, Story(3, [0.0, 1.0, 0.0]), through_cache=False)
    batch = stage.batch(0, INDICES)
    flow = stage.transformer(*stage.clips.noisy(batch), **stage.clips.condition(batch)).sample
    errors = (flow - (batch["noise"] - batch["latents"])).square().split(CHUNK, dim=2)
    assert stage.loss("generator", batch, 0)[0].item() == pytest.approx(errors[1].mean().item(), rel=1e-5)


def test_shares_are_one_on_average():
    shares = loss_shares([None, [1.0, 3.0, 0.0], [0.0, 0.0, 0.0]], 3)
    assert torch.equal(shares, torch.tensor([[1.0, 1.0, 1.0], [0.75, 2.25, 0.0], [0.0, 0.0, 0.0]]))


def test_other_stages_refuse_it(root):
    with pytest.raises(ConfigError, match="train.through_cache.*stage dmd.*ar_diffusion"):
        make_stage(root, "dmd", "train.through_cache=true")


def test_the_cache_is_gone_with_its_rollout(root, monkeypatch):
    """Without waiting for Python to look for circles, which it does the more rarely the more objects there are."""
    stage = make(root, Story(7), "cache.compressor.kv=forward")
    caches, new_cache = [], stage.new_cache

    def watched(*args):
        cache = new_cache(*args)
        caches.append(weakref.ref(cache))
        return cache

    monkeypatch.setattr(stage, "new_cache", watched)
    gc.collect()
    gc.disable()
    try:
        parts(stage, stage.batch(0, INDICES))
        assert len(caches) == 1 and caches[0]() is None
    finally:
        gc.enable()
