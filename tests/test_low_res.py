"""The compressor's LR branch: a chunk's pixels, averaged, encoded and embedded, against a slow and obvious path."""

import pytest
import torch
from diffusers import AutoencoderKLWan
from oracle import OracleWan
from test_diffusers_features import add_lora
from test_streaming_vae import small_vae
from toy import CHANNELS, LATENT, randn, toy_cache, toy_config, toy_model, toy_prompt

from model.compressor import COMPRESSORS
from model.geometry import ChunkGeometry
from pipeline.data.vae_clip import denormalise, encode_moments
from pipeline.generate.inputs import Prompts
from pipeline.generate.rollout import Rollout
from pipeline.generate.vae_stream import StreamingDecoder, encode_small
from utils.choices import AtSwitch
from utils.config import ConfigError, SamplerConfig

KINDS = [kind for kind in COMPRESSORS if COMPRESSORS[kind].needs_pixels]
CHUNKS = 3


@pytest.fixture(scope="module")
def vae():
    return small_vae(2)


def rollout(vae, kind, frames=3, **settings):
    model = toy_model(compressor=kind, frames_per_chunk=frames)
    cache = toy_cache(model, toy_config(compressor=kind, sink=0, recent=1, **settings))
    decoder = None if vae is None else StreamingDecoder(vae)
    noise = lambda chunk, step, shape: randn(2, *shape, seed=100 * chunk + step)  # noqa: E731
    return Rollout(model, cache, SamplerConfig(shift=3.0), Prompts(toy_prompt(2)), noise, decoder=decoder)


def low_res_by_hand(vae, video, chunk, frames, in_time):
    """Averaged, encoded pixels of a chunk of `video` [1, C, F, H, W] -> [C, f, h, w]. 2 pixels a side are averaged."""
    decoded = vae.decode(denormalise(vae, video)).sample[0].clamp(-1, 1)  # [3, 4F - 3, H, W], in one piece
    of_latent = [[0] * 4 if n == 0 else [4 * n - 3, 4 * n - 2, 4 * n - 1, 4 * n] for n in range(video.shape[2])]
    shown = [decoded[:, i] for n in range(chunk * frames, (chunk + 1) * frames) for i in of_latent[n]]
    if in_time:
        shown = [(a + b) / 2 for a, b in zip(shown[::2], shown[1::2], strict=True)]
    small = [sum(x[:, r::2, c::2] for r in (0, 1) for c in (0, 1)) / 4 for x in shown]
    small = [small[0], *small]
    while len(small) % 4 != 1:
        small = [small[0], *small]
    mean, _ = encode_moments(vae, torch.stack(small, dim=1)[None])
    scale = [torch.tensor(x).view(-1, 1, 1, 1) for x in (vae.config.latents_mean, vae.config.latents_std)]
    return ((mean[0] - scale[0]) / scale[1])[:, 1:]


def tokens_by_hand(oracle, low_res, frames):
    """[C, f, h, w] -> hidden tokens: one patch each, averaged over the frames that share one of the grid's."""
    hidden = oracle.patchify(low_res).unflatten(0, (low_res.shape[1], -1))  # [f, h * w, dim]
    share = len(hidden) / frames
    assert share == int(share)
    return hidden.unflatten(0, (frames, int(share))).mean(1).flatten(0, 1)


@torch.no_grad()
@pytest.mark.parametrize(("kind", "frames"), [(kind, frames) for kind in KINDS for frames in (3, 4)])
def test_committed_keys_and_values(vae, kind, frames):
    """All archived chunks, the first of the video among them, of the second of two videos."""
    run, video = rollout(vae, kind, frames), randn(2, CHANNELS, CHUNKS * frames, *LATENT, seed=4)
    oracle, in_time = OracleWan(run.model), COMPRESSORS[kind].halves_time
    for chunk in video.split(frames, dim=2):
        run.commit(chunk)
    for chunk in range(CHUNKS - 1):
        low_res = low_res_by_hand(vae, video[1:], chunk, frames, in_time)
        hidden = tokens_by_hand(oracle, low_res, max(1, frames // 2) if in_time else frames)
        if kind.startswith("dual"):
            hidden = hidden + oracle.compress(video[1, :, chunk * frames : (chunk + 1) * frames])
        for layer in range(run.model.config.num_layers):
            where = torch.tensor([0, 1]), torch.tensor([chunk] * 2), hidden.device
            stored = (run.cache.archive.gather(layer, part, *where) for part in (0, 1))
            for own, expected in zip(stored, oracle.keys_values(layer, hidden), strict=True):
                torch.testing.assert_close(own.restored()[1].double(), expected, atol=5e-4, rtol=0)
    assert run.pixels.shape == (2, 3, 4 * frames, 64, 96)


def test_wan_at_480p():
    """16 frames of 832x480, averaged 2x4x4, are 2 latent frames of 15x26 and 7x13 patches each."""
    with torch.device("meta"):
        vae, geometry = AutoencoderKLWan(), ChunkGeometry(4, 60, 104)
        pixels = torch.empty(1, 3, 16, 480, 832)
    for kind, pool, frames in (("lr", (2, 4, 4), 2), ("dual", (2, 4, 4), 2), ("lr_spatial", (1, 4, 4), 4)):
        assert COMPRESSORS[kind].pool(geometry, [128, 512, 2048]) == pool
        assert encode_small(vae, pixels, pool).shape == (1, 16, frames, 15, 26)
        assert COMPRESSORS[kind].grid(geometry, [128, 512, 2048]) == (frames, 7, 13)


@pytest.mark.parametrize("latent", [(2, 2), (4, 6), (6, 10)])
def test_small_pictures_keep_a_patch(vae, latent):
    """However many halvings: the pooled picture has at least one patch."""
    geometry = ChunkGeometry(2, *latent)
    pixels = torch.rand(1, 3, 8, *(8 * size for size in latent))
    low_res = encode_small(vae, pixels, COMPRESSORS["lr"].pool(geometry, [4, 4, 4]))
    assert low_res.shape[2] == 1 and min(low_res.shape[-2:]) >= 2


@torch.no_grad()
def test_with_guidance_both_branches_see_the_pixels(vae):
    run = rollout(vae, "dual")
    run.sampler = SamplerConfig(shift=3.0, guidance=2.0, steps=[1000.0])
    run.prompts = Prompts(toy_prompt(2), toy_prompt(1, seed=7))
    for _, latents in run.run(3):
        assert latents.shape[0] == 2
    _, (_, low_res) = run.cache.context().archived_latents()
    assert low_res.shape[:2] == (4, 2) and torch.equal(*low_res.chunk(2))


@torch.no_grad()
@pytest.mark.parametrize("kv", ["project", "forward"])
def test_lora_and_layerwise_casting(vae, kv):
    run, video = rollout(vae, "dual", kv=kv), randn(2, CHANNELS, 9, *LATENT, seed=4)

    def last_keys():
        run.cache.reset()
        run.decoder = StreamingDecoder(vae)
        for chunk in video.split(3, dim=2):
            run.commit(chunk)
        where = torch.tensor([0, 1]), torch.tensor([1, 1]), torch.device("cpu")
        return run.cache.archive.gather(1, 0, *where).restored()

    plain = last_keys()
    add_lora(run.model)
    assert (last_keys() - plain).abs().max() > 1e-2
    run.model.disable_adapters()
    torch.testing.assert_close(last_keys(), plain, atol=1e-5, rtol=0)
    run.model.delete_adapters("style")
    run.model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert 0 < (last_keys() - plain).square().mean().sqrt() < 0.3 * plain.square().mean().sqrt()


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_committed_again_is_not_decoded_again(vae, kind, monkeypatch):
    """At a switch of prompts: pixels are those of the chunk's own time, and the decoder goes on where it was."""
    run, video = rollout(vae, kind, at_switch=AtSwitch.recommit), randn(2, CHANNELS, 9, *LATENT, seed=4)
    decoded, decode = [], StreamingDecoder.decode
    monkeypatch.setattr(StreamingDecoder, "decode", lambda self, x: (decoded.append(x), decode(self, x))[1])
    for chunk in video.split(3, dim=2):
        run.commit(chunk)
    where = torch.tensor([0, 1]), torch.tensor([2, 2]), torch.device("cpu")
    before = [run.cache.archive.gather(1, part, *where).restored() for part in (0, 1)]
    keys = run.cache.layers[1].keys.clone()
    run.switch(Prompts(toy_prompt(2, seed=7)))
    assert len(decoded) == 3 and run.index == 3 and not torch.equal(run.cache.layers[1].keys, keys)
    after = [run.cache.archive.gather(1, part, *where).restored() for part in (0, 1)]
    torch.testing.assert_close(after, before, atol=1e-6, rtol=0)  # of pixels and latents, not of the prompt
    _, latents = next(run.run(2))
    shown = run.pixels
    whole = decode(StreamingDecoder(vae), torch.cat([video, latents], dim=2))
    torch.testing.assert_close(shown, whole[:, :, -shown.shape[2] :], atol=1e-5, rtol=0)


def test_no_decoder_is_an_error():
    with pytest.raises(ConfigError, match="cache.compressor.kind` is lr: it looks at pixels"):
        rollout(None, "lr")
    rollout(None, "lr", top_k=0)  # nothing is compressed


def test_the_model_says_what_is_missing():
    model = toy_model(compressor="lr", frames_per_chunk=2)
    context = toy_cache(model, toy_config(compressor="lr", sink=0)).context()
    with pytest.raises(ValueError, match="give low_res"):
        model(randn(1, CHANNELS, 2, *LATENT, seed=1), torch.zeros(1), toy_prompt(), context=context)


def test_it_runs_on_any_model(vae):
    """Of kinds without weights the cache alone decides; those with weights are the model's."""
    model = toy_model(compressor="identity")
    run = rollout(vae, "lr")
    Rollout(model, toy_cache(model, run.cache.config), run.sampler, run.prompts, run.noise, decoder=run.decoder)
    with pytest.raises(ValueError, match="cache.compressor is.*dual.*the model was built with.*identity"):
        toy_cache(model, toy_config(compressor="dual"))
