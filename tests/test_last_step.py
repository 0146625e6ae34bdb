"""`sampler.commit=last_step`: what a chunk's last denoising step left is its history, without a pass of its own."""

from types import SimpleNamespace

import pytest
import torch
from test_chunk_context import assert_same_tokens
from test_rollout import SHAPE, STEPS, assert_near, contexts, euler, few_step, generate, sigma_of  # noqa: F401
from test_streaming_vae import small_vae
from toy import randn, toy_cache, toy_config, toy_model, toy_prompt

from model.cache.workspace import PackedWorkspace, Workspace
from model.causal_wan import CausalWanModel
from pipeline.generate.inputs import prompt_noise
from pipeline.generate.vae_stream import StreamingDecoder, encode_small
from utils.choices import CacheKind, Commit, Refresh, SizeUnit
from utils.config import ConfigError

LAST = {"commit": Commit.last_step}
DEEP = {"kind": CacheKind.deep_forcing, "unit": SizeUnit.frames, "sink": 3, "recent": 4, "window": 12, "budget": 9}
CACHES = {
    "default": {},
    "recency-both": {"selection": "recency", "recent": 2, "query_scope": "recent+current"},
    "forward": {"kv": "forward"},
    "identity": {"compressor": "identity"},
    "lr": {"compressor": "lr"},
    "dual-forward": {"compressor": "dual", "kv": "forward"},
    "window": {"kind": CacheKind.window},
    "deep_forcing": DEEP,
    "per_forward": {"refresh": Refresh.per_forward},
    "int8": {"mid_dtype": "int8"},
}
CHUNKS = 6
VAE = small_vae(2)


def model_for(settings):
    return toy_model(compressor=settings.get("compressor", "hr_spatial"))


def decoder_for(settings):
    return StreamingDecoder(VAE) if settings.get("compressor", "") in ("lr", "dual") else None


def by_hand(model, embeds, noise, config, decoder, num_chunks=CHUNKS):
    """The last step's forward gives K, V; one over the clean latents, run beside it, only what is compressed."""
    cache, chunks, batch = toy_cache(model, config), [], len(embeds)
    for index in range(num_chunks):
        context, latents = cache.context(), noise(index, 0, SHAPE)

        def run(latents, level, context=context, **options):
            return model(latents, torch.full((batch,), level), embeds, context=context, **options)

        for step, unshifted in enumerate(STEPS):
            sigma = sigma_of(unshifted / 1000, 5.0)
            low_res = randn(batch, 4, 3, 4, 6, seed=1) if cache.needs_pixels else None  # of no consequence here
            out = run(latents, 1000 * sigma, low_res=low_res)
            x0 = latents - sigma * out.sample
            if step + 1 < len(STEPS):
                following = sigma_of(STEPS[step + 1] / 1000, 5.0)
                latents = (1 - following) * x0 + following * noise(index, step + 1, SHAPE)
        own = out.kv
        if decoder is not None:
            pixels = decoder.decode(x0)
            low_res = encode_small(decoder.vae, pixels, cache.pixel_pool)
        clean = run(x0, 0.0, low_res=low_res).kv
        for layer, (left, other) in enumerate(zip(own.layers, clean.layers, strict=True)):
            clean.layers[layer] = left._replace(mid_key=other.mid_key, mid_value=other.mid_value)
        cache.commit(clean, context)
        chunks.append(x0)
    return torch.cat(chunks, dim=2), cache


@torch.no_grad()
@pytest.mark.parametrize("name", CACHES)
def test_by_hand(name):
    settings = CACHES[name]
    model, texts = model_for(settings), ["a", "b"]
    embeds = torch.cat([toy_prompt(seed=ord(text)) for text in texts])
    config, noise = toy_config(**settings), prompt_noise(0, texts, [0, 0])
    expected, cache = by_hand(model, embeds, noise, config, decoder_for(settings))
    video, rollout = generate(few_step(**LAST), texts, config=config, model=model, decoder=decoder_for(settings))
    assert_near(video, expected)
    other, _ = generate(few_step(), texts, config=config, model=model, decoder=decoder_for(settings))
    assert (video - other).abs().max() > 1e-2
    for ours, theirs in zip(rollout.cache.layers, cache.layers, strict=True):
        if isinstance(ours, PackedWorkspace):  # shared, and filled by the last forward
            continue
        if isinstance(ours, Workspace):  # mid chunks lie behind, those of the last forward
            end = ours.slots * ours.tokens
            ours, theirs = (SimpleNamespace(keys=x.keys[:, :end], values=x.values[:, :end]) for x in (ours, theirs))
        assert_near(ours.keys, theirs.keys)
        assert_near(ours.values, theirs.values)
    if cache.archive is not None:
        chosen = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1] * 2), torch.device("cpu")
        for layer, part in ((0, 0), (0, 1), (1, 0), (1, 1)):
            ours, theirs = (c.archive.gather(layer, part, *chosen).restored() for c in (rollout.cache, cache))
            tolerance = 0.05 if name == "int8" else 2e-4  # a code may round the other way
            torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0)


@pytest.fixture
def passes(monkeypatch):
    """Timesteps of the passes over a chunk's own tokens."""
    found, forward = [], CausalWanModel.forward

    def spy(self, latents, timestep, *args, **options):
        if options.get("kv") is None:
            found.append(round(timestep[0].item()))
        return forward(self, latents, timestep, *args, **options)

    monkeypatch.setattr(CausalWanModel, "forward", spy)
    return found


@pytest.mark.parametrize("sampler", [few_step, euler])
def test_a_pass_less_and_the_same_video_each_time(passes, sampler):
    video, rollout = generate(sampler(**LAST))
    assert len(passes) == CHUNKS * rollout.forwards_per_chunk == CHUNKS * rollout.steps_per_chunk and 0 not in passes
    assert torch.equal(video, generate(sampler(**LAST))[0])
    passes.clear()
    _, rollout = generate(sampler())
    assert len(passes) == CHUNKS * rollout.forwards_per_chunk and passes.count(0) == CHUNKS


def test_guidance_commits_both_branches_and_company_does_not_matter():
    sampler = euler(guidance=2.0, **LAST)
    together, rollout = generate(sampler, "ab")
    assert rollout.cache.layers[0].keys.shape[0] == 4
    assert_near(together[1:], generate(sampler, "b")[0])


@pytest.mark.parametrize("settings", [{}, {"compressor": "identity"}, {"kv": "forward"}], ids=str)
def test_training_sees_the_context_of_inference(contexts, settings):  # noqa: F811
    model = model_for(settings)
    expected, _ = generate(few_step(steps=STEPS[:2], **LAST), model=model, config=toy_config(**settings))
    at_inference = list(contexts)
    contexts.clear()
    video, _ = generate(few_step(**LAST), model=model.train(), config=toy_config(**settings), grad_step=1)
    assert_near(video.detach(), expected)
    assert len(contexts) == len(at_inference) == CHUNKS * 2 * 2
    for (*where, tokens), (*wanted, wanted_tokens) in zip(contexts, at_inference, strict=True):
        assert where == wanted
        assert_same_tokens(tokens, wanted_tokens, rtol=0)
    video.square().sum().backward()
    compressor = model.pack_compressor
    assert compressor is None or compressor.net[0].weight.grad.abs().max() > 0


def test_given_latents_are_committed_by_a_pass(passes):
    _, rollout = generate(few_step(**LAST), num_chunks=1)
    passes.clear()
    with torch.no_grad():
        rollout.commit(randn(1, *SHAPE, seed=3))
    assert passes == [0] and rollout.cache.num_chunks == 2


@pytest.mark.parametrize(
    ("sampler", "cache", "words"),
    [
        ({"context_timestep": 100.0}, {}, "`sampler.context_timestep` is 100: must be 0"),
        ({}, {"kv": "forward", "refresh": Refresh.per_forward}, "set cache.refresh=per_chunk"),
    ],
)
def test_what_it_cannot_do(sampler, cache, words):
    with pytest.raises(ConfigError, match=words) as raised:
        generate(few_step(**LAST, **sampler), config=toy_config(**cache))
    assert "\n" not in str(raised.value)
