"""One context per chunk: every step, the commit and the forward with gradient read the same history."""

from dataclasses import replace

import pytest
import torch
from test_kv_cache import ABSOLUTE, BOTH_SCOPES, FIT, FORWARD, IDENTITY, PER_FORWARD, RECENCY, make, roll
from toy import randn, toy_cache, toy_chunk, toy_config, toy_model, toy_prompt

from model.attention import clip_mask
from model.cache.context import ChunkContext
from model.kv import TextKV
from model.rope import Rotation, chunk_rotation, shift_in_time
from utils.choices import CacheKind

SETTINGS = {
    "default": {},
    "absolute-scopes": {**ABSOLUTE, **BOTH_SCOPES},
    "fit-recency": {**FIT, **RECENCY},
    "identity": IDENTITY,
    "two-recent": {"recent": 2, "top_k": 3},
    "no-sink": {"sink": 0, "mid_capacity": 3},
    "full": {"kind": CacheKind.full},
}


def forward(model, cache, context, index, step, kind, **options):
    return model(toy_chunk(index, 0, kind, cache.geometry.frames), torch.tensor([step]), toy_prompt(),
                 context=context, **options)  # fmt: skip


def loss_of(model, cache, context, index, **options):
    return forward(model, cache, context, index, 500.0, 3, return_kv=False, **options).sample.square().mean()


def token_rows(*tensors):
    """Tokens [B, n, heads, D] of several tensors side by side: [n, parts * heads * D]."""
    return torch.cat([tensor.detach()[0].flatten(1) for tensor in tensors], dim=1)


def assert_same_tokens(found, wanted, atol=2e-4, rtol=1e-4):
    """Rows equal but for rounding and order. Each is held against its nearest one: sorted by a value, two rows that
    nearly share it would change places with the rounding."""
    assert len(found) == len(wanted)
    if not len(found):
        return
    nearest = torch.cdist(found, wanted, compute_mode="donot_use_mm_for_euclid_dist").argmin(dim=1)
    assert len(nearest.unique()) == len(found)
    torch.testing.assert_close(found, wanted[nearest], atol=atol, rtol=rtol)


@pytest.fixture
def record(monkeypatch):
    """[(layer, ids, history keys and values)] of every self-attention with a context."""
    calls, extend = [], ChunkContext.extend

    def spy(self, layer, selected, key, value, mid):
        keys, values = extend(self, layer, selected, key, value, mid)
        everything = token_rows(keys, values)
        own = {tuple(row) for row in token_rows(key, value).tolist()}
        history = everything[[tuple(row) not in own for row in everything.tolist()]]
        assert len(history) == keys.shape[1] - key.shape[1]
        calls.append((layer, selected.tolist(), history))
        return keys, values

    monkeypatch.setattr(ChunkContext, "extend", spy)
    return calls


@pytest.mark.parametrize("name", SETTINGS)
def test_every_forward_of_a_chunk_attends_the_same_history(name, record):
    model, cache, _ = make(SETTINGS[name])
    layers, chunks = model.config.num_layers, 8
    for index in range(chunks):
        context = cache.context()
        record.clear()
        with torch.no_grad():
            for kind, step in enumerate((900.0, 700.0), start=1):
                forward(model, cache, context, index, step, kind, return_kv=False)
        loss_of(model, cache, context, index, train_compressor=True)
        loss_of(model, cache, context, index)
        with torch.no_grad():
            kv = forward(model, cache, context, index, 0.0, 0).kv
        first, *others = [record[i : i + layers] for i in range(0, len(record), layers)]
        assert len(others) == 4
        for calls in others:
            for (layer, ids, history), (same_layer, same_ids, same) in zip(first, calls, strict=True):
                assert (layer, ids) == (same_layer, same_ids)
                assert_same_tokens(history, same, atol=2e-6, rtol=0)  # the compressor may run in other batches
        cache.commit(kv, context)


def state(cache):
    """Every tensor that the cache holds but for its workspaces, and of those the values of the history, as bytes."""
    seen, found = set(), {}

    def walk(value, path):
        if isinstance(value, torch.Tensor):
            found[path] = value.detach().numpy().tobytes()
        elif isinstance(value, dict):
            for key, item in value.items():
                walk(item, f"{path}[{key}]")
        elif isinstance(value, list | tuple):
            for i, item in enumerate(value):
                walk(item, f"{path}[{i}]")
        elif hasattr(value, "__dict__") and id(value) not in seen:
            seen.add(id(value))
            scratch = {"buffers", "starts", "_placed", "mid_for", "mid_places", "_mid_at", "_held", "_own"}
            walk({key: item for key, item in vars(value).items() if key not in scratch}, path)
        else:
            found[path] = repr(value)

    walk(cache, "cache")
    sink, recent = cache.layout.held(cache.num_chunks)
    for number, layer in enumerate(cache.layers):
        for chunk in [*sink, *recent]:
            held = layer.hold(chunk, cache.layout.slot(chunk))
            found[f"values of {chunk} in layer {number}"] = held.value.numpy().tobytes()
    return found


def history_keys(cache):
    """Keys of the history, turned back to time 0."""
    sink, recent = cache.layout.held(cache.num_chunks)
    held = [layer.hold(c, cache.layout.slot(c)) for layer in cache.layers for c in [*sink, *recent]]
    return [shift_in_time(one.key.clone(), -one.start) for one in held]


@pytest.mark.parametrize("settings", [{}, {**IDENTITY, **ABSOLUTE, **BOTH_SCOPES}], ids=str)
def test_nothing_is_written_before_the_commit(settings):
    model, cache, _ = make(settings)
    for index in range(7):
        before, keys, context = state(cache), history_keys(cache), cache.context()
        with torch.no_grad():
            for kind in (1, 2):
                forward(model, cache, context, index, 700.0, kind)
        loss_of(model, cache, context, index, train_compressor=True).backward()
        with torch.no_grad():
            kv = forward(model, cache, context, index, 0.0, 0).kv
        assert state(cache) == before
        torch.testing.assert_close(history_keys(cache), keys, atol=1e-5, rtol=0)
        cache.commit(kv, context)
        assert state(cache) != before


@torch.no_grad()
def test_forwards_that_are_thrown_away_leave_no_trace():
    plain_model, plain, _ = make({})
    expected, _ = roll(plain_model, plain, 8)
    model, cache, _ = make({})
    flows = []
    for index in range(8):
        context = cache.context()
        for kind, step in enumerate((900.0, 400.0), start=1):
            other = cache.context()  # of the same chunk, with another first forward and so another selection
            for junk in (5, 6, 7):
                forward(model, cache, other, index, 950.0, junk)
            flows.append(forward(model, cache, context, index, step, kind, return_kv=False).sample)
        cache.commit(forward(model, cache, context, index, 0.0, 0).kv, context)
    for flow, wanted in zip(flows, expected, strict=True):  # mid chunks lie in another order: rounding
        torch.testing.assert_close(flow, wanted, atol=1e-5, rtol=0)


@torch.no_grad()
def test_history_is_rotated_once_per_chunk(monkeypatch):
    model, cache, _ = make({**BOTH_SCOPES, "recent": 2})
    roll(model, cache, 7)
    rotated, call = [], Rotation.__call__
    monkeypatch.setattr(Rotation, "__call__", lambda self, x: rotated.append(x.shape[1]) or call(self, x))
    context, tokens = cache.context(), cache.geometry.tokens
    counts = []
    for kind in (1, 2, 3):
        forward(model, cache, context, 7, 500.0, kind, return_kv=False)
        counts.append(sum(count for count in rotated if count >= tokens // 2))
        rotated.clear()
    own = 2 * tokens * model.config.num_layers  # queries and keys
    assert counts[0] > own and counts[1:] == [own, own]


def test_a_context_serves_its_own_chunk_only():
    model, cache, _ = make({})
    roll(model, cache, 3)
    stale, other = cache.context(), cache.context()
    with torch.no_grad():
        kv = forward(model, cache, stale, 3, 0.0, 0).kv
    cache.commit(kv, stale)
    for context in (stale, other):
        with pytest.raises(RuntimeError, match="context of chunk 3 .* new context for every chunk"):
            cache.commit(kv, context)
        for grad in (True, False):
            with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match="context of chunk 3"):
                forward(model, cache, context, 3, 500.0, 1)
    cache.reset()
    assert cache.num_chunks == 0 and not cache.archived
    first = cache.context()
    cache.reset()
    with torch.no_grad(), pytest.raises(RuntimeError, match="another video"):
        forward(model, cache, first, 0, 500.0, 1)


@torch.no_grad()
def test_reset_forgets_everything():
    model, cache, _ = make({})
    expected, _ = roll(model, cache, 6)
    cache.reset()
    again, _ = roll(model, cache, 6)
    assert all(torch.equal(flow, wanted) for flow, wanted in zip(again, expected, strict=True))


@torch.no_grad()
def test_latents_must_be_those_the_cache_is_for():
    model = toy_model()
    cache = toy_cache(model, toy_config())
    roll(model, cache, 2, batch=2)
    step, context = torch.tensor([500.0]), cache.context()
    with pytest.raises(ValueError, match="batch is 1: the cache holds 2 videos"):
        model(toy_chunk(2), step, toy_prompt(), context=context)
    with pytest.raises(ValueError, match="latent_height=12.*the cache was made for"):
        model(toy_chunk(2, latent=(12, 8)), step, toy_prompt(), context=context)
    with pytest.raises(ValueError, match="6 latent frames do not fit chunks of 3"):
        model(toy_chunk(2, frames=6), step, toy_prompt(), context=context)


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {**ABSOLUTE, "recent": 2}], ids=str)
def test_a_cached_step_compiles_whole_and_once(settings):
    """No break; nothing new compiled after a chunk's choosing step, its others, and its commit (last block apart)."""
    model, cache, _ = make(settings)
    expected, _ = roll(model, cache, 10, steps=(900.0, 400.0))
    graphs, text_kv = [], TextKV()

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    blocks = [block.forward for block in model.blocks]
    whole = [torch.compile(forward, backend=backend, fullgraph=True) for forward in blocks]
    cache.reset()
    for index in range(10):
        context = cache.context()
        for kind, step in enumerate((900.0, 400.0), start=1):
            for block, eager, compiled in zip(model.blocks, blocks, whole, strict=True):
                block.forward = compiled if index > 5 else eager
            flow = forward(model, cache, context, index, step, kind, return_kv=False, text_kv=text_kv).sample
            torch.testing.assert_close(flow, expected[2 * index + kind - 1], atol=1e-5, rtol=0)
        cache.commit(forward(model, cache, context, index, 0.0, 0, return_sample=False).kv, context)
    assert len(graphs) == 3 + cache.context().chooses, "a block or a chunk was compiled anew"


# --- gradients ---


def gradients(model, cache, num_chunks, checkpointing, **options):
    """Gradients of the sum of every chunk's loss, with one backward after all chunks are committed."""
    model.zero_grad(set_to_none=True)
    model.enable_gradient_checkpointing() if checkpointing else model.disable_gradient_checkpointing()
    cache.reset()
    losses = []
    for index in range(num_chunks):
        context = cache.context()
        with torch.no_grad():
            forward(model, cache, context, index, 900.0, 1, return_kv=False)
        losses.append(loss_of(model, cache, context, index, **options))
        with torch.no_grad():
            cache.commit(forward(model, cache, context, index, 0.0, 0).kv, context)
    sum(losses).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("train_compressor", [True, False])
@pytest.mark.parametrize("settings", [{}, PER_FORWARD, {**IDENTITY, **ABSOLUTE}, {"mid_capacity": 3, **FIT}, FORWARD],
                         ids=str)  # fmt: skip
def test_gradient_checkpointing_changes_no_gradient(settings, train_compressor):
    """Blocks are recomputed after every chunk was committed, when the cache has long moved on."""
    model, cache, _ = make(settings)
    model.train()
    plain = gradients(model, cache, 6, False, train_compressor=train_compressor)
    recomputed = gradients(model, cache, 6, True, train_compressor=train_compressor)
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(gradient, recomputed[name], atol=1e-6, rtol=1e-5)
    through_compressor = any("pack_compressor" in name for name in plain)
    assert through_compressor == (train_compressor and settings.get("compressor") != "identity")


@pytest.mark.parametrize("settings", [{}, FORWARD], ids=str)
def test_compressor_gradients_are_those_of_the_attended_chunks(settings):
    """By difference quotients: history is detached, all but the compressor's part in the selected mid chunks."""
    model, cache, _ = make({**RECENCY, "top_k": 1, **settings})
    model.train()
    roll(model, cache, 5)
    parameter = model.pack_compressor.net[4].bias
    context = cache.context()
    loss = loss_of(model, cache, context, 5, train_compressor=True)
    assert loss.item() == pytest.approx(loss_of(model, cache, context, 5).item(), rel=1e-5)  # as it was committed
    loss.backward()
    direction = randn(*parameter.shape, seed=3)

    def shifted(scale):
        with torch.no_grad():
            parameter.add_(scale * direction)
            value = loss_of(model, cache, context, 5, train_compressor=True).item()
            parameter.sub_(scale * direction)
        return value

    slope = (shifted(1e-2) - shifted(-1e-2)) / 2e-2
    assert slope == pytest.approx((parameter.grad * direction).sum().item(), rel=2e-2)
    assert abs(slope) > 1e-4


def test_blocks_may_be_given_a_copy_of_their_memory():
    """As FSDP gives them of every dataclass among their inputs."""
    model, cache, _ = make(FORWARD)
    model.train()
    roll(model, cache, 5)
    losses = [loss_of(model, cache, cache.context(), 5, train_compressor=True).item()]
    for block in model.blocks:
        block.register_forward_pre_hook(lambda module, inputs: (*inputs[:-1], replace(inputs[-1])))
    losses.append(loss_of(model, cache, cache.context(), 5, train_compressor=True).item())
    assert losses[0] == losses[1]


def test_in_eval_mode_nothing_is_kept_to_compress_again():
    model, cache, _ = make(FORWARD)
    roll(model, cache, 4)
    assert not cache.frames
    with pytest.raises(RuntimeError, match="committed in eval mode"):
        loss_of(model, cache, cache.context(), 4, train_compressor=True)


@pytest.mark.parametrize("trained", ["blocks.0.attn1.to_q", "blocks.1.attn1.to_q", "proj_out"])
def test_a_later_forward_does_not_disturb_the_backward_of_an_earlier_one(trained):
    """With few trained weights keys need no gradient, yet what attention saved of them must stay as it was."""
    model, cache, _ = make({})
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(trained))
    roll(model, cache, 5)
    context = cache.context()
    loss = loss_of(model, cache, context, 5)
    (gradient,) = torch.autograd.grad(loss, model.get_submodule(trained).weight, retain_graph=True)
    with torch.no_grad():
        cache.commit(forward(model, cache, context, 5, 0.0, 0).kv, context)
    roll(model, cache, 3)
    loss.backward()
    assert torch.equal(model.get_submodule(trained).weight.grad, gradient)


def test_training_may_follow_inference_mode():
    """What is memoised by shape (rotations, masks) must not stay an inference tensor."""
    chunk_rotation.cache_clear()
    clip_mask.cache_clear()
    model, cache, _ = make({})
    clip = toy_chunk(0, frames=6)

    def run():
        cached = forward(model, cache, cache.context(), 0, 500.0, 1).sample
        return cached.mean() + model(clip, torch.tensor([500.0]), toy_prompt()).sample.mean()

    with torch.inference_mode():
        run()
    run().backward()
    assert model.blocks[0].attn1.to_q.weight.grad.abs().max() > 0


@pytest.mark.parametrize("selection", ["recency", "random"])
def test_a_choice_without_queries_trains_on_what_it_attends(selection):
    model, cache, _ = make({"selection": selection, "refresh_interval": 3})
    for index in range(8):
        context = cache.context()
        assert len(context.archived_latents()[0]) <= 2 * model.config.num_layers
        loss_of(model, cache, context, index, train_compressor=True).backward()
        with torch.no_grad():
            cache.commit(forward(model, cache, context, index, 0.0, 0).kv, context)
    assert model.pack_compressor.net[0].weight.grad.abs().max() > 0
