"""The chunk x step loop against loops written out by hand, in sampling and in training."""

import pytest
import torch
from test_chunk_context import assert_same_tokens, token_rows
from toy import CHANNELS, LATENT, randn, toy_cache, toy_config, toy_model, toy_prompt

from model.cache.context import ChunkContext
from pipeline.generate.inputs import Prompts, prompt_noise
from pipeline.generate.rollout import Rollout
from utils.choices import Refresh
from utils.config import SamplerConfig

SHAPE = (CHANNELS, 3, *LATENT)
CHUNKS = 6
STEPS = [1000.0, 750.0, 500.0, 250.0]


def few_step(**settings):
    return SamplerConfig(**{"kind": "few_step", "steps": STEPS, "shift": 5.0, **settings})


def euler(**settings):
    return SamplerConfig(**{"kind": "euler", "num_steps": 3, "shift": 3.0, **settings})


def generate(sampler, texts=("a",), samples=None, seed=0, num_chunks=CHUNKS, config=None, model=None, **options):
    """Latents [B, C, F, H, W] of videos whose embeddings stand for their texts, and the rollout."""
    model = model or toy_model()
    embeds = torch.cat([toy_prompt(seed=ord(text)) for text in texts])
    negative = toy_prompt(seed=900, length=4) if sampler.guidance != 1 else None
    noise = prompt_noise(seed, list(texts), samples or [0] * len(texts))
    cache = toy_cache(model, config or toy_config())
    rollout = Rollout(model, cache, sampler, Prompts(embeds, negative), noise, **options)
    pieces = [latents for _, latents in rollout.run(num_chunks)]
    return torch.cat(pieces, dim=2) if pieces else None, rollout


class ByHand:
    """One video (one branch of guidance) with a cache of its own."""

    def __init__(self, model, prompt, config=None):
        self.model, self.prompt, self.cache = model, prompt, toy_cache(model, config or toy_config())

    def start(self):
        self.context = self.cache.context()

    @torch.no_grad()
    def flow(self, latents, timestep):
        return self.model(latents, torch.tensor([timestep]), self.prompt, context=self.context, return_kv=False).sample

    @torch.no_grad()
    def commit(self, latents, timestep=0.0, noisy=None):
        noisy = latents if noisy is None else noisy
        kv = self.model(
            noisy, torch.tensor([timestep]), self.prompt, context=self.context, clean_hidden_states=latents
        ).kv
        self.cache.commit(kv, self.context)


def sigma_of(u, shift):
    return shift * u / (1 + (shift - 1) * u)


def few_step_by_hand(video, noise, num_chunks=CHUNKS, steps=STEPS, shift=5.0, context_timestep=0.0):
    chunks = []
    for index in range(num_chunks):
        video.start()
        latents = noise(index, 0, SHAPE)
        for step, unshifted in enumerate(steps):
            sigma = sigma_of(unshifted / 1000, shift)
            x0 = latents - sigma * video.flow(latents, 1000 * sigma)
            if step + 1 < len(steps):
                sigma = sigma_of(steps[step + 1] / 1000, shift)
                latents = (1 - sigma) * x0 + sigma * noise(index, step + 1, SHAPE)
        noisy = None
        if context_timestep:  # snapped to the nearest of sigma(1 - i/1000)
            table = [sigma_of(1 - i / 1000, shift) for i in range(1000)]
            sigma = min(table, key=lambda value: abs(1000 * value - context_timestep))
            noisy = (1 - sigma) * x0 + sigma * noise(index, -1, SHAPE)
        video.commit(x0, context_timestep, noisy)
        chunks.append(x0)
    return torch.cat(chunks, dim=2)


def assert_near(value, expected):
    torch.testing.assert_close(value, expected, atol=2e-4, rtol=0)  # rounding grows from chunk to chunk


def test_few_step_sampling():
    model = toy_model()
    expected = few_step_by_hand(ByHand(model, toy_prompt(seed=ord("a"))), prompt_noise(0, ["a"], [0]))
    video, rollout = generate(few_step())
    assert_near(video, expected)
    assert video.dtype == torch.float32 and not video.requires_grad
    assert rollout.cache.num_chunks == CHUNKS
    assert rollout.mid_tokens_attended == 2 * rollout.cache.mid_tokens
    assert (video[:, :, :3] - video[:, :, 3:6]).abs().max() > 0.1


def test_context_noise():
    """The chunk is committed renoised, and compressed clean."""
    model = toy_model()
    expected = few_step_by_hand(
        ByHand(model, toy_prompt(seed=ord("a"))), prompt_noise(0, ["a"], [0]), context_timestep=100.0
    )
    video, _ = generate(few_step(context_timestep=100.0))
    assert_near(video, expected)
    assert (video - generate(few_step())[0]).abs().max() > 1e-2


def test_unwarped_steps():
    one_step, _ = generate(few_step(steps=[900.0], warp=False), num_chunks=1)
    video = ByHand(toy_model(), toy_prompt(seed=ord("a")))
    video.start()
    noise = prompt_noise(0, ["a"], [0])(0, 0, SHAPE)
    sigma = min((sigma_of(1 - i / 1000, 5.0) for i in range(1000)), key=lambda value: abs(1000 * value - 900))
    assert_near(one_step, noise - sigma * video.flow(noise, 900.0))


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_euler_sampling_with_two_branches_by_hand(guidance):
    """Each branch of guidance keeps a history of its own, and both commit what was generated together."""
    model, noise = toy_model(), prompt_noise(0, ["a"], [0])
    cond, uncond = ByHand(model, toy_prompt(seed=ord("a"))), ByHand(model, toy_prompt(seed=900, length=4))
    sigmas = [sigma_of(u, 3.0) for u in (1, 2 / 3, 1 / 3, 0)]
    chunks = []
    for index in range(CHUNKS):
        cond.start(), uncond.start()
        latents = noise(index, 0, SHAPE)
        for here, following in zip(sigmas[:-1], sigmas[1:], strict=True):
            with_prompt, without = cond.flow(latents, 1000 * here), uncond.flow(latents, 1000 * here)
            latents = latents + (following - here) * (without + guidance * (with_prompt - without))
        cond.commit(latents), uncond.commit(latents)
        chunks.append(latents)
    video, rollout = generate(euler(guidance=guidance))
    assert_near(video, torch.cat(chunks, dim=2))
    assert rollout.cache.layers[0].keys.shape[0] == (1 if guidance == 1 else 2)


@pytest.mark.parametrize("sampler", [few_step(), euler(guidance=2.0)], ids=["few_step", "euler"])
def test_a_video_does_not_depend_on_its_company(sampler):
    together, _ = generate(sampler, "abb", samples=[0, 0, 1])
    for place, (text, sample) in enumerate((("a", 0), ("b", 0), ("b", 1))):
        alone, _ = generate(sampler, text, samples=[sample])
        assert_near(together[place : place + 1], alone)
    assert (together[1] - together[2]).abs().max() > 0.1


def test_same_seed_same_video():
    video, _ = generate(few_step())
    assert torch.equal(video, generate(few_step())[0])
    assert (video - generate(few_step(), seed=1)[0]).abs().max() > 0.1


def test_a_rollout_can_be_continued():
    video, _ = generate(few_step())
    _, rollout = generate(few_step(), num_chunks=2)
    rest = [latents for _, latents in rollout.run(CHUNKS - 2)]
    assert torch.equal(torch.cat(rest, dim=2), video[:, :, 6:])


def test_a_chunk_comes_before_its_commit():
    model = toy_model()
    rollout = Rollout(
        model, toy_cache(model, toy_config()), few_step(), Prompts(toy_prompt()), prompt_noise(0, ["a"], [0])
    )
    chunks = rollout.run(3)
    for expected in range(3):
        index, latents = next(chunks)
        assert index == expected and latents.shape == (1, *SHAPE)
        assert rollout.cache.num_chunks == expected and rollout.index == expected + 1
    rollout.settle()
    assert rollout.cache.num_chunks == rollout.index == 3
    with pytest.raises(StopIteration):
        next(chunks)
    assert rollout.cache.num_chunks == 3


def test_whatever_comes_next_finds_the_chunk_committed():
    expected, _ = generate(few_step(), num_chunks=3)
    _, rollout = generate(few_step(), num_chunks=0)
    first = next(rollout.run(2))[1]
    second = next(rollout.run(2))[1]  # another run
    torch.testing.assert_close(torch.cat([first, second], dim=2), expected[:, :, :6], atol=0, rtol=0)
    with torch.no_grad():
        rollout.commit(expected[:, :, 6:])  # given latents
    assert rollout.cache.num_chunks == 3
    next(rollout.run(1))
    rollout.switch(rollout.prompts)
    assert rollout.cache.num_chunks == 4


def test_a_last_chunk_that_nothing_reads_has_no_commit():
    _, rollout = generate(few_step(), num_chunks=0)
    assert len(list(rollout.run(3, commit_last=False))) == 3 and rollout.cache.num_chunks == 2


def test_noise_depends_on_its_key_alone():
    draw = prompt_noise(3, ["a", "b", "a"], [0, 0, 1])
    noise = draw(5, 1, (2, 3))
    assert noise.shape == (3, 2, 3)
    assert torch.equal(prompt_noise(3, ["b"], [0])(5, 1, (2, 3)), noise[1:2])
    others = [prompt_noise(4, ["a"], [0])(5, 1, (2, 3)), prompt_noise(3, ["a "], [0])(5, 1, (2, 3)), draw(4, 1, (2, 3)),
              draw(5, 2, (2, 3)), draw(1, 5, (2, 3)), noise[1:], noise[2:]]  # fmt: skip
    assert all((noise[0] - other[0]).abs().max() > 1e-3 for other in others)
    many = prompt_noise(0, ["a"], [0])(0, 0, (200, 200))
    assert abs(many.mean()) < 0.02 and abs(many.std() - 1) < 0.02


def test_guidance_needs_a_negative_prompt():
    with pytest.raises(ValueError, match=r"sampler.guidance is 3.0: needs embeddings of sampler.negative_prompt"):
        Prompts(toy_prompt()).branches(3.0)


# --- training ---


@pytest.fixture
def contexts(monkeypatch):
    """[(layer, ids, positions, keys and values)] of every attention, in order of its call."""
    calls, extend = [], ChunkContext.extend

    def spy(self, layer, selected, key, value, mid):
        keys, values = extend(self, layer, selected, key, value, mid)
        positions = self.history_starts(), self.mid_starts(selected).tolist()
        calls.append((layer, selected.tolist(), positions, token_rows(keys, values)))
        return keys, values

    monkeypatch.setattr(ChunkContext, "extend", spy)
    return calls


@pytest.mark.parametrize("step", [0, 2])
@pytest.mark.parametrize(
    "settings",
    [{}, {"selection": "recency", "top_k": 1}, {"compressor": "identity"}, {"refresh": Refresh.per_forward}],
    ids=str,
)
def test_training_sees_the_context_of_inference(contexts, step, settings):
    """A self-rollout that stops at step k is sampling with the first k + 1 steps, context for context."""
    model = toy_model(compressor=settings.get("compressor", "hr_spatial"))
    expected, _ = generate(few_step(steps=STEPS[: step + 1]), model=model, config=toy_config(**settings))
    at_inference = list(contexts)
    contexts.clear()
    video, rollout = generate(few_step(), model=model, config=toy_config(**settings), grad_step=step)
    assert_near(video.detach(), expected)
    assert len(contexts) == len(at_inference) == CHUNKS * (step + 2) * 2
    for (layer, ids, positions, tokens), wanted in zip(contexts, at_inference, strict=True):
        assert (layer, ids, positions) == wanted[:3]
        assert_same_tokens(tokens, wanted[3], rtol=0)
    assert rollout.mid_tokens_attended > 0


def training_gradients(model, checkpointing=False, **options):
    model.zero_grad()
    model.enable_gradient_checkpointing() if checkpointing else model.disable_gradient_checkpointing()
    video, _ = generate(few_step(), "ab", model=model, grad_step=1, **options)
    weights = randn(*video.shape, seed=9)
    (video * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_gradients_reach_generator_and_compressor():
    model = toy_model()
    found = training_gradients(model)
    assert found.keys() == dict(model.named_parameters()).keys()
    assert all(gradient.abs().max() > 0 for gradient in found.values())
    recomputed = training_gradients(model, checkpointing=True)
    for name, gradient in found.items():
        torch.testing.assert_close(recomputed[name], gradient, atol=1e-4, rtol=1e-4)


def test_gradients_are_those_of_each_chunks_last_step():
    """History is detached: gradients are the sum over chunks of one forward's, from a recorded start and history."""
    model = toy_model()
    found = training_gradients(model, config=toy_config(compressor="identity"))
    model.zero_grad()
    embeds = torch.cat([toy_prompt(seed=ord(text)) for text in "ab"])
    starts, noise = {}, prompt_noise(0, ["a", "b"], [0, 0])
    generate(few_step(), "ab", model=model, config=toy_config(compressor="identity"), grad_step=1,
             on_step_end=lambda chunk, step, at, latents: starts.setdefault((chunk, step), latents))  # fmt: skip
    cache, total = toy_cache(model, toy_config(compressor="identity")), 0
    weights = randn(2, CHANNELS, 3 * CHUNKS, *LATENT, seed=9)
    first, second = (sigma_of(step / 1000, 5.0) for step in STEPS[:2])
    for index in range(CHUNKS):
        context = cache.context()

        def flow(sigma, latents, context=context):
            return model(latents, torch.full((2,), 1000 * sigma), embeds, context=context, return_kv=False).sample

        with torch.no_grad():
            flow(first, noise(index, 0, SHAPE))  # fixes the selection
        x0 = starts[index, 0] - second * flow(second, starts[index, 0])
        total = total + (x0 * weights[:, :, 3 * index : 3 * index + 3]).sum()
        with torch.no_grad():
            cache.commit(model(x0, torch.zeros(2), embeds, context=context).kv, context)
    total.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, atol=2e-3, rtol=2e-3)
    assert found.keys() == {name for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_gradient_may_begin_at_a_later_chunk():
    model = toy_model()
    whole, _ = generate(few_step(), model=model, grad_step=1)
    late, _ = generate(few_step(), model=model, grad_step=1, grad_from=4)
    assert_near(late.detach(), whole.detach())
    first_chunks = late[:, :, :12].sum()
    gradient = torch.autograd.grad(first_chunks, model.proj_out.weight, allow_unused=True, retain_graph=True)[0]
    assert gradient is None or gradient.abs().max() == 0
    assert torch.autograd.grad(late[:, :, 12:].sum(), model.proj_out.weight)[0].abs().max() > 0


@pytest.mark.parametrize("sampler", [euler(), few_step(guidance=2.0)], ids=["euler", "guided"])
def test_training_is_few_step_without_guidance(sampler):
    with pytest.raises(ValueError, match="needs sampler.kind=few_step and sampler.guidance=1"):
        generate(sampler, grad_step=0)


@pytest.mark.parametrize("trains", [True, False])
def test_histories_are_kept_only_where_a_gradient_may_come(trains):
    """Those of compressed chunks that pass through the blocks; a rollout of the critic has none."""
    with torch.set_grad_enabled(trains):
        _, rollout = generate(few_step(), model=toy_model().train(), config=toy_config(kv="forward"),
                              grad_step=0, grad_from=0 if trains else CHUNKS)  # fmt: skip
    assert bool(rollout.cache.frames) is trains


@pytest.mark.parametrize(("kind", "kept"), [("identity", 0), ("hr_spatial", 1)])
def test_latents_wait_in_the_archive_only_for_a_trained_compressor(kind, kept):
    _, rollout = generate(few_step(), model=toy_model(compressor=kind), config=toy_config(compressor=kind))
    assert len(rollout.cache.archive.seen(torch.tensor([0]), torch.device("cpu"))) == kept
