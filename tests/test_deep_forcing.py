"""Deep Forcing on the cache against an oracle that keeps lists of tokens (tests/oracle.py)."""

from pathlib import Path

import pytest
import torch
from oracle import OracleDeepForcing, OracleWan
from test_kv_cache import STEPS, TOLERANCE, attended, random_kv
from toy import TRAINED_FRAMES, toy_cache, toy_chunk, toy_config, toy_model, toy_prompt

from model.cache.cache import CACHES
from model.geometry import ChunkGeometry
from utils.choices import CacheKind, SizeUnit
from utils.load_config import load_config

LATENT = (4, 6)  # 6 tokens a frame
FULL = {"kind": CacheKind.deep_forcing, "unit": SizeUnit.frames, "window": 12, "sink": 4, "recent": 4, "top_k": 0}
SETTINGS = {
    "sink-only": FULL,
    "v-sink": {**FULL, "window": 6, "sink": 1},
    "participative": {**FULL, "budget": 10},
    "own-times": {**FULL, "budget": 10, "align_mid": False},
    "absolute": {**FULL, "budget": 10, "temporal": "absolute"},
    "no-sink": {**FULL, "budget": 6, "sink": 0},
    "no-room": {**FULL, "budget": 8},  # for mid tokens
}


def make(settings, frames):
    model = toy_model(frames_per_chunk=frames, compressor="identity")
    return model, toy_cache(model, toy_config("identity", **settings), LATENT)


def chunk(index, kind=0, frames=3, sample=0):
    return toy_chunk(index, sample, kind, frames, LATENT)


@torch.no_grad()
def flows(model, cache, chunks, batch=1):
    frames, found = cache.geometry.frames, []
    for index in range(chunks):
        context = cache.context()
        for kind, step in enumerate(STEPS, start=1):
            noisy = torch.cat([chunk(index, kind, frames, sample) for sample in range(batch)])
            at = torch.full((batch,), step)
            found.append(model(noisy, at, toy_prompt(batch), context=context, return_kv=False).sample)
        clean = torch.cat([chunk(index, 0, frames, sample) for sample in range(batch)])
        cache.commit(model(clean, torch.zeros(batch), toy_prompt(batch), context=context).kv, context)
    return torch.stack(found, dim=1)


@torch.no_grad()
def expected_flows(model, cache, chunks, sample=0):
    memory = OracleDeepForcing(OracleWan(model), cache.config, LATENT, TRAINED_FRAMES)
    prompt, frames, found, dropped = toy_prompt(sample + 1)[sample], cache.geometry.frames, [], set()
    for index in range(chunks):
        for kind, step in enumerate(STEPS, start=1):
            found.append(memory.flow(chunk(index, kind, frames, sample)[0], step, prompt))
        attended = set(memory.attended[0])
        assert not dropped & attended, "a token came back"
        dropped |= {tuple(token[:3]) for part in memory.held.get(0, ()) for token in part} - attended
        memory.commit(chunk(index, 0, frames, sample)[0], 0.0, prompt)
    return torch.stack(found), dropped


OTHER_SIZES = [(name, frames) for name in ("sink-only", "participative") for frames in (1, 4)]


@pytest.mark.parametrize(("name", "frames"), [*((name, 3) for name in SETTINGS), *OTHER_SIZES])
def test_attends_what_the_oracle_attends(name, frames):
    model, cache = make(SETTINGS[name], frames)
    chunks = 7 if frames > 1 else 16
    wanted, dropped = expected_flows(model, cache, chunks)
    found = flows(model, cache, chunks)[0].double()
    torch.testing.assert_close(found, wanted, atol=TOLERANCE, rtol=0)
    assert dropped, "nothing was ever dropped"


def test_samples_choose_for_themselves():
    model, cache = make(SETTINGS["participative"], 3)
    found = flows(model, cache, 7, batch=2)
    for sample in range(2):
        wanted, _ = expected_flows(model, cache, 7, sample)
        torch.testing.assert_close(found[sample].double(), wanted, atol=TOLERANCE, rtol=0)
    times = cache.layers[0].times
    assert not torch.equal(times[0], times[1]), "the samples chose alike"


@torch.no_grad()
def test_forwards_that_are_thrown_away_leave_no_trace():
    model, cache = make(SETTINGS["participative"], 3)
    expected = flows(model, cache, 6)
    cache.reset()
    found = []
    for index in range(6):
        for junk in (5, 6):
            model(chunk(index, junk), torch.tensor([900.0]), toy_prompt(), context=cache.context())
        context = cache.context()
        for kind, step in enumerate(STEPS, start=1):
            out = model(chunk(index, kind), torch.tensor([step]), toy_prompt(), context=context, return_kv=False)
            found.append(out.sample)
        cache.commit(model(chunk(index), torch.zeros(1), toy_prompt(), context=context).kv, context)
    assert torch.equal(torch.stack(found, dim=1), expected)


def test_recomputed_blocks_attend_what_they_did():
    model, cache = make(SETTINGS["participative"], 3)
    model.train()

    def gradient(checkpointing):
        model.zero_grad(set_to_none=True)
        model.enable_gradient_checkpointing() if checkpointing else model.disable_gradient_checkpointing()
        cache.reset()
        losses = []
        for index in range(6):
            context = cache.context()
            out = model(chunk(index, 1), torch.tensor([500.0]), toy_prompt(), context=context, return_kv=False)
            losses.append(out.sample.square().mean())
            with torch.no_grad():
                cache.commit(model(chunk(index), torch.zeros(1), toy_prompt(), context=context).kv, context)
        sum(losses).backward()
        return model.blocks[0].attn1.to_q.weight.grad

    torch.testing.assert_close(gradient(True), gradient(False), atol=1e-6, rtol=1e-5)


def test_bytes_never_exceed_the_window():
    model, cache = make(SETTINGS["participative"], 3)
    for index in range(9):
        flows_so_far = cache.report()
        tokens = sum(part["tokens"] for part in flows_so_far.values())
        assert tokens <= (12 - 3) * 6 and flows_so_far["sink"]["tokens"] <= 4 * 6
        context = cache.context()
        with torch.no_grad():
            cache.commit(model(chunk(index), torch.zeros(1), toy_prompt(), context=context).kv, context)
    assert cache.report()["mid"]["tokens"] == 2 * 6


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "full"),  # latent frames of sink, mid and recent that chunk 12 attends, and how far back the first one is
    [("deepforcing_chunkwise_sinkonly", (12, 0, 6, 18)), ("deepforcing_chunkwise_sinkmid", (10, 2, 4, 16)),
     ("infinite_forcing", (1, 0, 2, 3)), ("longlive", (3, 0, 6, 36)), ("rolling", (0, 0, 18, 18))],
)  # fmt: skip
def test_presets_attend_what_their_methods_do(name, full):
    config = load_config(Path(__file__).parent.parent / "configs" / f"{name}.yaml").cache
    cache = CACHES[config.kind](config, ChunkGeometry(3, *LATENT), head_dim=6, trained_frames=21)
    kv = random_kv(cache.geometry, 1, 6, 0, 0)
    for _ in range(12):
        attended(cache, kv)
    report, times = cache.report(), cache.context().times
    counts = [report[part]["tokens"] // 6 for part in ("sink", "mid", "recent")]
    first = times.sink if counts[0] else times.now - counts[2]
    assert (*counts, times.now - first) == full
    assert cache.context().history_tokens() == attended(cache, kv)[0] == sum(counts) * 6


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"temporal": "fit"}, "packed or absolute"), ({"sink_dtype": "int8"}, "sink_dtype is int8"),
     ({"unit": SizeUnit.chunks}, "unit is chunks"), ({"window": None}, "window is None: must be at least 7"),
     ({"budget": 7}, "budget is 7: .* from 8, .* to cache.window=12"), ({"budget": 13}, "budget is 13")],
)  # fmt: skip
def test_settings_without_meaning(settings, words):
    with pytest.raises(ValueError, match=words):
        make({**FULL, **settings}, 3)
