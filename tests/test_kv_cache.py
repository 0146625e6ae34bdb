"""PackCache against an oracle that keeps plain lists and starts from scratch at every forward (tests/oracle.py)."""

from types import SimpleNamespace
from weakref import WeakValueDictionary

import pytest
import torch
from oracle import OracleMemory, OracleWan
from toy import LATENT, TRAINED_FRAMES, randn, toy_cache, toy_chunk, toy_config, toy_model, toy_prompt

from model import attention
from model.attention import attend
from model.cache.archive import Archive, _say_once
from model.cache.cache import PackCache
from model.cache.workspace import Workspace
from model.geometry import ChunkGeometry
from model.kv import ChunkKV, LayerKV
from utils.choices import CacheKind, QueryScope, Refresh, SizeUnit
from utils.config import CacheConfig, ConfigError

TOLERANCE = 5e-5  # float32 network against a float64 one; flows are of order 1
STEPS = (900.0, 400.0)

ABSOLUTE, FIT, ALIGNED = {"temporal": "absolute"}, {"temporal": "fit"}, {"spatial": "aligned"}
RECENCY, PER_FORWARD = {"selection": "recency"}, {"refresh": Refresh.per_forward}
BOTH_SCOPES = {"query_scope": QueryScope.recent_and_current}
FULL, WINDOW, SINK = {"kind": CacheKind.full}, {"kind": CacheKind.window}, {"kind": CacheKind.sink}
IDENTITY, FORWARD = {"compressor": "identity"}, {"kv": "forward"}

SETTINGS = {
    "default": {},
    "absolute": ABSOLUTE,
    "aligned": ALIGNED,
    "fit": FIT,
    "absolute-aligned": {**ABSOLUTE, **ALIGNED},
    "fit-aligned-recency": {**FIT, **ALIGNED, **RECENCY},
    "recency": RECENCY,
    "recency-absolute-interval": {**RECENCY, **ABSOLUTE, "refresh_interval": 3},  # always the latest
    "scopes": BOTH_SCOPES,
    "scopes-two-recent": {**BOTH_SCOPES, "recent": 2, "top_k": 1},
    "scopes-no-recent": {**BOTH_SCOPES, "recent": 0},
    "per-forward": PER_FORWARD,
    "per-forward-scopes-absolute": {**PER_FORWARD, **BOTH_SCOPES, **ABSOLUTE},
    "capacity": {"mid_capacity": 3},
    "capacity-absolute": {"mid_capacity": 3, **ABSOLUTE, **PER_FORWARD},
    "interval": {"refresh_interval": 3},
    "interval-capacity": {"refresh_interval": 4, "mid_capacity": 3, "top_k": 1},
    "unbounded": {"mid_capacity": None},
    "all-queries": {"query_fraction": 1.0},
    "no-sink": {"sink": 0},
    "only-mid": {"sink": 0, "recent": 0},
    "only-mid-absolute": {"sink": 0, "recent": 0, **ABSOLUTE},
    "sink-and-mid": {"sink": 2, "recent": 0, "top_k": 1},
    "two-sinks-two-recent": {"sink": 2, "recent": 2, "top_k": 1, **ALIGNED},
    "no-mid": {"top_k": 0},
    "identity": IDENTITY,
    "identity-fit": {**IDENTITY, **FIT},
    "identity-absolute-scopes": {**IDENTITY, **ABSOLUTE, **BOTH_SCOPES},
    "one-stage": {"channels": (6,), **ALIGNED},
    "spatiotemporal": {"compressor": "hr_spatiotemporal"},
    "forward": FORWARD,
    "forward-no-sink-per-forward": {**FORWARD, **PER_FORWARD, "sink": 0, "compressor": "hr_spatiotemporal"},
    "forward-absolute-aligned-scopes": {**FORWARD, **ABSOLUTE, **ALIGNED, **BOTH_SCOPES},
    "spatiotemporal-fit-aligned": {"compressor": "hr_spatiotemporal", **FIT, **ALIGNED},
    "full": FULL,
    "full-absolute": {**FULL, **ABSOLUTE},
    "window": {**WINDOW, "recent": 2},
    "window-absolute": {**WINDOW, **ABSOLUTE, "recent": 2},
    "no-history": {**WINDOW, "recent": 0},
    "sink-kind": {**SINK, "sink": 1, "recent": 2},
    "sink-kind-absolute": {**SINK, **ABSOLUTE, "sink": 2, "recent": 1},
}


def make(settings, frames_per_chunk=3):
    """(model, cache, oracle) for one of the settings above."""
    config = toy_config(**settings)
    compressor = {"compressor": config.compressor.kind, "compressor_channels": tuple(config.compressor.channels)}
    model = toy_model(frames_per_chunk=frames_per_chunk, **compressor)
    trained = frames_per_chunk * (config.sink + config.recent + 1) + 2 if config.temporal == "fit" else None
    return model, toy_cache(model, config, trained=trained or TRAINED_FRAMES), OracleWan(model)


@torch.no_grad()
def roll(model, cache, num_chunks, batch=1, steps=STEPS):
    """Flows [B, C, F, H, W] of every step of every chunk, and the ids each layer attended: (flows, selections)."""
    flows, selections, frames = [], [], cache.geometry.frames
    prompt, layers = toy_prompt(batch), range(model.config.num_layers)
    for index in range(num_chunks):
        context = cache.context()
        for kind, step in enumerate(steps, start=1):
            noisy = torch.cat([toy_chunk(index, sample, kind, frames) for sample in range(batch)])
            asked = spy_on_selection(context)
            flows.append(model(noisy, torch.full((batch,), step), prompt, context=context, return_kv=False).sample)
            selections.append([asked[layer].tolist() for layer in layers if layer in asked])  # compiled: none
        clean = torch.cat([toy_chunk(index, sample, 0, frames) for sample in range(batch)])
        out = model(clean, torch.zeros(batch), prompt, context=context, return_sample=False)  # as a rollout commits
        cache.commit(out.kv, context)
    return flows, selections


def spy_on_selection(context):
    """Record what `context.select` answers from now on: {layer: [B, k]}."""
    answers, select = {}, type(context).select

    def spy(layer, query):
        answers[layer] = select(context, layer, query)
        return answers[layer]

    context.select = spy
    return answers


def roll_oracle(model, cache, oracle, num_chunks, sample=0, steps=STEPS):
    memory, prompt = OracleMemory(oracle, cache.config, LATENT, cache.trained_frames), toy_prompt(sample + 1)[sample]
    flows, selections, frames = [], [], cache.geometry.frames
    for index in range(num_chunks):
        for kind, step in enumerate(steps, start=1):
            flows.append(memory.flow(toy_chunk(index, sample, kind, frames)[0], step, prompt))
            selections.append([memory.attended[layer] for layer in range(model.config.num_layers)])
        memory.commit(toy_chunk(index, sample, 0, frames)[0], 0.0, prompt)
    return flows, selections, memory


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_attends_what_the_oracle_attends(name):
    model, cache, oracle = make(SETTINGS[name])
    flows, selections = roll(model, cache, 8)
    expected, expected_selections, _ = roll_oracle(model, cache, oracle, 8)
    assert [[ids for [ids] in layers] for layers in selections] == expected_selections
    for index, (flow, wanted) in enumerate(zip(flows, expected, strict=True)):
        error = (flow[0].double() - wanted).abs().max().item()
        assert error < TOLERANCE, f"chunk {index // len(STEPS)}, step {index % len(STEPS)}: {error}"


@torch.no_grad()
@pytest.mark.parametrize("name", ["default", "per-forward-scopes-absolute", "forward", "identity", "full"])
def test_keys_and_values_alone_are_the_same_for_less(name, monkeypatch):
    model, cache, _ = make(SETTINGS[name])
    attended = []
    monkeypatch.setattr(attention, "attend", lambda *a: (attended.append(1), attend(*a))[1])
    for index in range(6):
        found, selections, calls = [], [], []
        for return_sample in (True, False):
            context, given = cache.context(), (toy_chunk(index), torch.zeros(1), toy_prompt())
            attended.clear()
            found.append(model(*given, context=context, return_sample=return_sample))
            selections.append(context.selection)
            calls.append(len(attended))
        whole, alone = found
        assert alone.sample is None and calls[0] - calls[1] == 2  # self- and cross-attention of the last block
        for ours, theirs in zip(alone.kv.layers, whole.kv.layers, strict=True):
            assert all((x is None and y is None) or torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))
        assert all(torch.equal(selections[0][layer], ids) for layer, ids in selections[1].items())
        assert selections[0].keys() == selections[1].keys()
        cache.commit(alone.kv, context)


@pytest.mark.parametrize("frames", [1, 4])
@pytest.mark.parametrize("settings", [{"top_k": 3}, {"top_k": 3, **ABSOLUTE, **BOTH_SCOPES}, FIT], ids=str)
def test_other_chunk_sizes(frames, settings):
    model, cache, oracle = make(settings, frames)
    flows, _ = roll(model, cache, 8)
    expected, _, _ = roll_oracle(model, cache, oracle, 8)
    torch.testing.assert_close(torch.cat(flows).double(), torch.stack(expected), atol=TOLERANCE, rtol=0)


def test_the_settings_above_do_differ():
    """Otherwise agreement with the oracle would say little."""
    distinct = ("default", "absolute", "aligned", "fit", "recency", "no-sink", "only-mid", "no-mid", "identity",
                "forward", "full", "window", "no-history", "sink-kind")  # fmt: skip
    last = {}
    for name in distinct:
        model, cache, _ = make({**SETTINGS[name], "channels": (6, 8)})
        last[name] = roll(model, cache, 8)[0][-2]
    for i, first in enumerate(distinct):
        for second in distinct[i + 1 :]:
            assert (last[first] - last[second]).abs().max() > 1e-2, (first, second)


def test_sizes_in_frames():
    in_frames = make({"unit": SizeUnit.frames, "sink": 3, "recent": 6})
    in_chunks = make({"sink": 1, "recent": 2})
    for flow, wanted in zip(roll(*in_frames[:2], 7)[0], roll(*in_chunks[:2], 7)[0], strict=True):
        assert torch.equal(flow, wanted)


@pytest.mark.parametrize("settings", [{}, ABSOLUTE, PER_FORWARD, {"mid_capacity": 3}], ids=str)
def test_batch_of_two_is_two_batches_of_one(settings):
    model, cache, oracle = make(settings)
    flows, selections = roll(model, cache, 9, batch=2)
    for sample in range(2):
        expected, chosen, _ = roll_oracle(model, cache, oracle, 9, sample)
        assert [[layer[sample] for layer in layers] for layers in selections] == chosen
        torch.testing.assert_close(
            torch.stack([flow[sample] for flow in flows]).double(), torch.stack(expected), atol=TOLERANCE, rtol=0
        )
    assert any(layer[0] != layer[1] for layers in selections for layer in layers), "the samples chose alike"


def test_full_history_equals_one_teacher_forced_pass():
    model, cache, _ = make({**FULL, **ABSOLUTE})
    chunks, levels = 6, (900.0, 100.0, 500.0, 750.0, 300.0, 650.0)
    flows = []
    with torch.no_grad():
        for index, level in enumerate(levels):
            context, step = cache.context(), torch.tensor([level])
            noisy = toy_chunk(index, kind=1)
            flows.append(model(noisy, step, toy_prompt(), context=context, return_kv=False).sample)
            cache.commit(model(toy_chunk(index), torch.zeros(1), toy_prompt(), context=context).kv, context)
        noisy = torch.cat([toy_chunk(index, kind=1) for index in range(chunks)], dim=2)
        clean = torch.cat([toy_chunk(index) for index in range(chunks)], dim=2)
        per_frame = torch.tensor([levels]).repeat_interleave(3, dim=1)
        whole = model(noisy, per_frame, toy_prompt(), clean_hidden_states=clean).sample
    torch.testing.assert_close(torch.cat(flows, dim=2), whole, atol=2e-5, rtol=0)


@pytest.mark.parametrize("scope", list(QueryScope))
@pytest.mark.parametrize("spatial", ["grid", "aligned"])
def test_mean_key_scores_equal_every_pair_summed(scope, spatial):
    model, cache, oracle = make({"query_scope": scope, "spatial": spatial, "recent": 2})
    roll(model, cache, 8)
    _, _, memory = roll_oracle(model, cache, oracle, 8)
    query = randn(1, cache.geometry.tokens, 4, 12, seed=7)
    for layer in range(model.config.num_layers):
        scores = cache.context().scores(layer, query)
        expected = memory.scores(layer, query[0].double())
        assert list(expected) == list(cache.context().archived) and len(expected) == 5
        torch.testing.assert_close(scores[0].double(), torch.tensor(list(expected.values()), dtype=torch.float64),
                                   atol=1e-5, rtol=0)  # fmt: skip
        assert scores.std() > 1e-2


def test_selection_is_kept_for_refresh_interval_chunks():
    model, cache, _ = make({"refresh_interval": 3})
    _, selections = roll(model, cache, 14)
    per_chunk = selections[:: len(STEPS)]
    # chunks 0..3 attend all there is; from chunk 4 on two are archived, and one choice serves three chunks
    full = [layers for layers in per_chunk if len(layers[0][0]) == 2]
    groups = [full[i : i + 3] for i in range(0, len(full), 3)]
    assert all(layers == group[0] for group in groups for layers in group)
    assert len({str(group[0]) for group in groups}) > 1, "the choice never changed"


def test_per_forward_selects_again_and_per_chunk_does_not():
    def changes(settings):
        model, cache, _ = make(settings)
        _, selections = roll(model, cache, 10, steps=(900.0, 600.0, 300.0))
        return sum(selections[i : i + 3] != [selections[i]] * 3 for i in range(0, len(selections), 3))

    assert changes(PER_FORWARD) > 0
    assert changes({}) == 0


def test_capacity_drops_the_oldest_first():
    model, cache, _ = make({"mid_capacity": 3, "recent": 2})
    seen = []
    for _ in range(9):
        roll(model, cache, 1)
        seen.append(list(cache.archived))
    assert seen == [[], [], [], [1], [1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 5], [4, 5, 6]]


def random_kv(geometry, heads, dim, mid_tokens, index, layers=1):
    def draw(tokens, part):
        return randn(1, tokens, heads, dim, seed=10 * index + part)

    layer = LayerKV(*(draw(geometry.tokens, part) for part in range(3)), *(draw(mid_tokens, part) for part in (3, 4)))
    return ChunkKV([layer] * layers, torch.zeros(1, 1, geometry.frames, geometry.latent_height, geometry.latent_width))


def attended(cache, kv):
    """Tokens of history that each layer attends for the next chunk, which is then committed."""
    context = cache.context()
    tokens = set()
    for index, layer in enumerate(kv.layers):
        keys, values = context.extend(index, context.select(index, layer.query), layer.key, layer.value, None)
        assert keys.shape == values.shape
        tokens.add(keys.shape[1] - layer.key.shape[1])
    report = cache.report()
    cache.commit(kv, context)
    return tokens.pop(), report


@torch.no_grad()
@pytest.mark.parametrize("settings", [ABSOLUTE, {"mid_capacity": 6, **FIT}], ids=str)
def test_two_thousand_chunks_take_constant_room(settings):
    geometry = ChunkGeometry(1, 2, 4)
    config = toy_config(channels=(3,), sink=2, recent=2, top_k=3, **settings)
    cache = PackCache(config, geometry, head_dim=6, trained_frames=12)
    tokens, room, chunks = [], [], [random_kv(geometry, 1, 6, cache.mid_tokens, index) for index in range(7)]
    for index in range(2000):
        count, report = attended(cache, chunks[index % len(chunks)])
        tokens.append(count)
        layer = cache.layers[0]
        room.append((layer.keys.untyped_storage().nbytes(), layer.values.untyped_storage().nbytes()))
        assert count == sum(report[part]["tokens"] for part in ("sink", "mid", "recent"))
        if "mid_capacity" in settings:
            assert report["archive"]["tokens"] <= 6 * cache.mid_tokens
    full = geometry.tokens
    assert tokens[:5] == [0, full, 2 * full, 3 * full, 4 * full]
    steady = 4 * full + 3 * cache.mid_tokens
    assert set(tokens[7:]) == {steady}
    assert len(set(room[7:])) == 1 and room[-1][0] == (steady + full) * 6 * 4


@torch.no_grad()
def test_cached_tokens_at_the_seeds_setting():
    """Sink 3, recent 2, top-k 16 at 480x832."""
    geometry = ChunkGeometry(3, 60, 104)
    cache = PackCache(CacheConfig(selection="recency"), geometry, head_dim=6, trained_frames=21)
    assert (geometry.tokens_per_frame, cache.mid_tokens) == (1560, 273)
    kv = random_kv(geometry, 1, 6, 273, index=0)
    kv.layers = [LayerKV(*(part.bfloat16() for part in layer)) for layer in kv.layers]
    counts = [attended(cache, kv) for _ in range(24)]
    tokens, report = counts[-1]
    assert tokens == 27768
    parts = {part: report[part]["tokens"] for part in ("sink", "mid", "recent")}
    assert parts == {"sink": 3 * 4680, "mid": 16 * 273, "recent": 2 * 4680}
    token = 2 * 6 * 2  # K and V of one layer, one head of 6 channels, bf16
    assert sum(report[part]["bytes"] for part in parts) == 27768 * token


def test_report_counts_bytes_of_all_layers_and_videos():
    model, cache, _ = make({})
    assert cache.report()["sink"] == {"tokens": 0, "bytes": 0}
    roll(model, cache, 6, batch=2)
    report, small = cache.report(), cache.mid_tokens
    token = 2 * 2 * 2 * 4 * 12 * 4  # K and V, 2 videos, 2 layers, 4 heads of 12, float32
    assert {name: part["tokens"] for name, part in report.items()} == {
        "sink": 72, "recent": 72, "mid": 2 * small, "archive": 4 * small}  # fmt: skip
    assert all(part["bytes"] == part["tokens"] * token for part in report.values())


@pytest.mark.parametrize(
    ("settings", "frames", "words"),
    [
        ({"unit": SizeUnit.frames, "sink": 4}, 3, "cache.sink is 4 frames: must be a multiple of the chunk, 3"),
        ({"unit": SizeUnit.frames, "sink": 3, "recent": 5}, 3, "cache.recent is 5 frames"),
        ({"sink": 4, "recent": 2, **FIT}, 3, "cache.temporal=fit: sink 4 .* 21 latent frames of the 21 trained"),
        ({"sink": 4, "recent": 3, **SINK, **FIT}, 3, "cache.temporal=fit"),
    ],
    ids=str,
)
def test_impossible_sizes(settings, frames, words):
    with pytest.raises(ValueError, match=words):
        toy_cache(toy_model(frames_per_chunk=frames), toy_config(**settings))


@pytest.mark.parametrize(
    ("setting", "known"),
    [({"selection": "best"}, "recency, query_score, random"), ({"temporal": "packd"}, "absolute, packed, fit"),
     ({"spatial": "x"}, "grid, aligned"), ({"mid_dtype": "fp4"}, "bfloat16, fp8, int8")],
)  # fmt: skip
def test_an_unknown_choice_lists_the_known_ones(setting, known):
    with pytest.raises(ConfigError, match=f"is {next(iter(setting.values()))}: expected one of {known}"):
        toy_cache(toy_model(), toy_config(**setting))


@torch.no_grad()
def test_the_device_holds_what_is_attended_and_the_current_chunk():
    """Once the cache is full, beside the archive: K, V of sink, recent, mid and current, and at most 2 % more."""
    geometry = ChunkGeometry(3, 16, 24)
    cache = PackCache(toy_config(channels=(3, 6), sink=3, recent=2, top_k=4), geometry, head_dim=24, trained_frames=21)
    kvs = [random_kv(geometry, 4, 24, cache.mid_tokens, index, layers=2) for index in range(3)]
    for index in range(14):
        attended(cache, kvs[index % 3])
    archive, cache.archive = cache.archive, None
    tokens = 6 * geometry.tokens + 4 * cache.mid_tokens
    assert tokens * 2 * 2 * 4 * 24 * 4 <= held_bytes(cache) <= 1.02 * tokens * 2 * 2 * 4 * 24 * 4
    assert held_bytes(archive._means) < 0.01 * held_bytes(cache)


def held_bytes(value, seen=None):
    """Bytes of the distinct storages behind an object."""
    seen = {} if seen is None else seen
    if isinstance(value, torch.Tensor):
        seen[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    elif isinstance(value, dict | list | tuple | WeakValueDictionary):
        for item in list(value.values()) if hasattr(value, "values") else value:
            held_bytes(item, seen)
    elif hasattr(value, "__dict__") and id(value) not in seen:
        seen[id(value)] = 0
        held_bytes(vars(value), seen)
    return sum(seen.values())


@torch.no_grad()
def test_an_automatic_capacity_is_what_memory_holds(monkeypatch, caplog):
    cache, geometry = None, ChunkGeometry(3, 4, 6)
    for memory, capacity in ((10**12, 1024), (4 * 10 * 2 * 2 * 3 * 6 * 4 * 4, 10)):
        monkeypatch.setattr("psutil.virtual_memory", lambda memory=memory: SimpleNamespace(total=memory))
        cache = PackCache(toy_config(channels=(3, 6)), geometry, head_dim=6, trained_frames=21)
        assert cache.mid_tokens == 3
        kv = random_kv(geometry, 4, 6, cache.mid_tokens, 0, layers=2)
        _say_once.cache_clear()
        with caplog.at_level("INFO"):
            for _ in range(20):
                attended(cache, kv)
        assert cache.archive.capacity == capacity and f"the last {capacity} compressed chunks" in caplog.text
    assert list(cache.archived) == list(range(9, 19)) and cache.archive.rows == 11


def test_fit_needs_no_room_without_mid():
    cache = toy_cache(toy_model(), toy_config(sink=4, recent=2, **SINK, **FIT))
    assert cache.fit_room == 0


def test_compressor_must_be_the_models():
    with pytest.raises(ValueError, match="hr_spatial.*identity"):
        toy_cache(toy_model(compressor="identity"), toy_config())
    with pytest.raises(ValueError, match="cache.compressor.*6, 9.*6, 8"):
        toy_cache(toy_model(), toy_config(channels=(6, 9)))
    toy_cache(toy_model(), toy_config(compressor="identity"))  # needs no parameters


def test_a_capacity_that_makes_selection_idle_is_warned_about(recwarn):
    model = toy_model()
    toy_cache(model, toy_config(mid_capacity=3))
    toy_cache(model, toy_config())
    assert not recwarn.list
    with pytest.warns(UserWarning, match="cache.mid_capacity=2 .* no effect"):
        toy_cache(model, toy_config(mid_capacity=2))


@torch.no_grad()
@pytest.mark.parametrize("mid_dtype", [None, "int8"])
@pytest.mark.parametrize("settings", [{}, ABSOLUTE, RECENCY, {"refresh_interval": 3}], ids=str)
def test_only_changed_mid_chunks_are_copied(settings, mid_dtype, monkeypatch):
    """V of chunks that were not attended before, K of those and of what has another time, which 8 bits keep apart."""
    model, cache, oracle = make({"top_k": 3, "mid_dtype": mid_dtype, **settings})
    copied, gather = [], Archive.gather
    monkeypatch.setattr(Archive, "gather", lambda self, layer, part, samples, *rest: (
        copied.append((part, len(samples))), gather(self, layer, part, samples, *rest))[1])  # fmt: skip
    roll(model, cache, 6)
    moved, all_of_them, before = 0, 0, None
    for _ in range(8):
        copied.clear()
        _, selections = roll(model, cache, 1)
        after = [set(chunks[0]) for chunks in selections[-1]]
        if before is not None:
            new = sum(len(now - then) for now, then in zip(after, before, strict=True))
            assert sum(count for part, count in copied if part == 1) == new
            keys = sum(count for part, count in copied if part == 0)
            assert keys == new if mid_dtype or "temporal" in settings else new <= keys
            moved, all_of_them = moved + new + keys, all_of_them + 2 * sum(map(len, after))
        before = after
    assert moved < 0.8 * all_of_them


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {**ABSOLUTE, **BOTH_SCOPES}, FULL, {**SINK, "recent": 2}], ids=str)
def test_what_a_commits_forward_placed_is_not_written_again(settings, monkeypatch):
    stored, store = [], Workspace._store
    monkeypatch.setattr(Workspace, "_store", lambda self, slot, *kv: (stored.append(slot), store(self, slot, *kv)))
    model, cache, _ = make(settings)
    flows, _ = roll(model, cache, 7)
    assert stored == [0] * model.config.num_layers  # of the first chunk, which attends itself alone
    monkeypatch.setattr(Workspace, "_has", lambda *_: False)
    again, _ = roll(model, other := make(settings)[1], 7)
    assert len(stored) == 8 * model.config.num_layers and all(map(torch.equal, flows, again))
    for ours, theirs in zip(cache.layers, other.layers, strict=True):
        for chunk in (*cache.layout.held(7)[0], *cache.layout.held(7)[1]):
            pairs = zip(ours._slot(ours_slot := cache.layout.slot(chunk)), theirs._slot(ours_slot), strict=True)
            assert all(torch.equal(*pair) for pair in pairs)


@torch.no_grad()
def test_a_forward_after_that_of_the_commit_is_not_what_is_kept():
    (model, cache, _), (_, other, _) = make({}), make({})
    for index in range(5):
        for one in (cache, other):
            context, clean = one.context(), toy_chunk(index)
            kv = model(clean, torch.zeros(1), toy_prompt(), context=context).kv
            if one is cache:
                model(toy_chunk(index, kind=1), torch.tensor([500.0]), toy_prompt(), context=context)
            one.commit(kv, context)
    flows = [roll(model, one, 1)[0] for one in (cache, other)]
    assert all(map(torch.equal, *flows))
