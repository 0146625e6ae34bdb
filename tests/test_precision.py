"""Sink and mid in fewer bits: how far off, and that nothing else of them is kept."""

import pytest
import torch
from test_chunk_context import loss_of
from test_kv_cache import attended, held_bytes, make, random_kv, roll
from toy import randn, toy_config

from model.cache.archive import copied_in_runs
from model.cache.cache import PackCache
from model.cache.precision import keep
from model.geometry import ChunkGeometry

# largest error of a channel, in parts of the token's and head's largest; what a token and head of 64 channels takes
FORMATS = {"bfloat16": (2**-8, 128), "fp8": (2**-4, 64 + 4), "int8": (0.5 / 127, 64 + 4)}


@pytest.mark.parametrize("name", FORMATS)
def test_error_and_bytes_of_each_format(name):
    bound, size = FORMATS[name]
    x = randn(2, 9, 3, 64, seed=1) * torch.logspace(-3, 3, 9)[:, None, None]
    x[0, 0, 0] = 0
    kept = keep(x, name)
    error = (kept.restored() - x).abs() / x.abs().amax(-1, keepdim=True).clamp_min(1e-9)
    assert bound / 10 < error.max() <= bound * 1.001 and kept.nbytes == 2 * 9 * 3 * size
    assert kept.restored().dtype == torch.float32 and keep(x.bfloat16(), name).restored().dtype == torch.bfloat16


@torch.no_grad()
@pytest.mark.parametrize("part", ["sink_dtype", "mid_dtype"])
def test_flows_stay_near_those_of_full_precision(part):
    settings = {"sink": 1, "recent": 2, "top_k": 2, "selection": "recency"}  # or another choice could be made
    plain, cache, _ = make(settings)
    expected = torch.stack(roll(plain, cache, 7)[0])
    errors = {}
    for name in FORMATS:
        model, cache, _ = make({**settings, part: name})
        difference = torch.stack(roll(model, cache, 7)[0]) - expected
        errors[name] = (difference.square().mean() / expected.square().mean()).sqrt()
    print(part, {name: f"{error:.1e}" for name, error in errors.items()})
    assert 1e-6 < errors["int8"] < 2e-2 and 1e-6 < errors["bfloat16"] < 1e-2 and errors["int8"] < errors["fp8"] < 6e-2


@torch.no_grad()
@pytest.mark.parametrize("name", FORMATS)
def test_no_other_copy_is_kept(name):
    geometry, heads, dim, layers = ChunkGeometry(3, 16, 24), 2, 64, 12
    config = toy_config(channels=(3, 6), sink=3, recent=1, top_k=4, sink_dtype=name, mid_dtype=name, mid_capacity=6)
    cache = PackCache(config, geometry, head_dim=dim, trained_frames=21)
    kvs = [random_kv(geometry, heads, dim, cache.mid_tokens, index, layers=layers) for index in range(3)]
    for index in range(16):
        attended(cache, kvs[index % 3])
    report, archive, cache.archive = cache.report(), cache.archive, None
    small, full = FORMATS[name][1] * heads * 2 * layers, dim * 4 * heads * 2 * layers  # bytes of a token
    assert report["sink"]["bytes"] == 3 * geometry.tokens * small
    assert report["mid"]["bytes"] == 4 * cache.mid_tokens * small
    assert report["recent"]["bytes"] == geometry.tokens * full
    one_layer = 5 * geometry.tokens + 4 * cache.mid_tokens  # restored, shared by all of them
    kept = report["sink"]["bytes"] + report["mid"]["bytes"] + 2 * report["recent"]["bytes"]
    assert kept <= held_bytes(cache) - one_layer * full // layers <= 1.02 * kept
    assert held_bytes(archive._kv) == 7 * cache.mid_tokens * small


@pytest.mark.parametrize("name", [None, "int8"])
def test_runs_of_rows_are_copied_as_they_are_gathered(name):
    kept, rows = keep(randn(2, 9, 3, 2, 8, seed=4), name), torch.tensor([[0, 1, 2, 5, 8], [3, 4, 8, 0, 1]])
    samples = torch.arange(2).repeat_interleave(5)
    found = copied_in_runs(kept, samples.tolist(), rows.flatten().tolist(), torch.device("cpu"))
    wanted = kept[samples, rows.flatten()]
    assert torch.equal(found.restored(), wanted.restored()) and found.codes.dtype == kept.codes.dtype


def test_training_attends_what_inference_does():
    model, cache, _ = make({"sink": 1, "recent": 1, "sink_dtype": "int8", "mid_dtype": "int8"})
    roll(model, cache, 5)
    context = cache.context()
    with torch.no_grad():
        expected = loss_of(model, cache, context, 5)
    loss = loss_of(model, cache, context, 5)
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected, atol=1e-5, rtol=0)
