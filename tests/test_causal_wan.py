"""CausalWanModel's passes against the float64 oracle and against diffusers' bidirectional model."""

import pytest
import torch
from diffusers import WanTransformer3DModel
from oracle import OracleMemory, OracleWan, clip_flow, softmax_attention
from toy import DIMS, TEXT_DIM, randn, randomize, toy_cache, toy_chunk, toy_config, toy_model, toy_prompt

from model.attention import attend, clip_mask
from model.causal_wan import CausalWanModel
from model.kv import TextKV
from utils.choices import CacheKind

TOLERANCE = 5e-5  # float32 network against a float64 one; flows are of order 1


def bidirectional(seed=0):
    wan = WanTransformer3DModel(**DIMS).eval()
    randomize(wan, seed)
    return wan


def levels(batch, frames, per_chunk, seed=5):
    """One timestep per chunk, spread over its frames: [B, F]."""
    return randn(batch, frames // per_chunk, seed=seed).sigmoid().mul(1000).round().repeat_interleave(per_chunk, 1)


@torch.no_grad()
@pytest.mark.parametrize("teacher_forcing", [True, False])
@pytest.mark.parametrize(
    ("chunk", "frames", "latent"),
    [(3, 9, (8, 12)), (1, 4, (8, 12)), (4, 8, (4, 10)), (3, 6, (2, 2)), (2, 4, (16, 16)), (1, 3, (22, 12))],
    # 16x16: 64 tokens a frame, so that every length is a multiple of 128; 22x12: an odd token count
)
def test_whole_clip_passes(chunk, frames, latent, teacher_forcing):
    model = toy_model(frames_per_chunk=chunk)
    oracle, prompt = OracleWan(model), toy_prompt(2)
    noisy = torch.cat([toy_chunk(0, sample, 1, frames, latent) for sample in range(2)])
    clean = torch.cat([toy_chunk(0, sample, 0, frames, latent) for sample in range(2)]) if teacher_forcing else None
    timestep, clean_timestep = levels(2, frames, chunk), levels(2, frames, chunk, seed=6) / 10
    options = {"clean_hidden_states": clean, "clean_timestep": clean_timestep} if teacher_forcing else {}
    flow = model(noisy, timestep, prompt, **options).sample
    for sample in range(2):
        history = (clean[sample], clean_timestep[sample]) if teacher_forcing else ()
        expected = clip_flow(oracle, noisy[sample], timestep[sample], prompt[sample], *history)
        torch.testing.assert_close(flow[sample].double(), expected, atol=TOLERANCE, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize(("chunk", "latent"), [(2, (16, 16)), (1, (16, 16)), (3, (2, 2)), (1, (22, 12))])
def test_cached_pass_at_other_lengths(chunk, latent):
    """Keys that are a multiple of 128 tokens, and not."""
    model = toy_model(frames_per_chunk=chunk)
    config = toy_config(kind=CacheKind.full)
    cache, memory = toy_cache(model, config, latent), OracleMemory(OracleWan(model), config, latent, 21)
    for index in range(4):
        context, noisy, clean = cache.context(), *(toy_chunk(index, 0, kind, chunk, latent) for kind in (1, 0))
        flow = model(noisy, torch.tensor([500.0]), toy_prompt(), context=context).sample
        expected = memory.flow(noisy[0], 500.0, toy_prompt()[0])
        torch.testing.assert_close(flow[0].double(), expected, atol=TOLERANCE, rtol=0)
        cache.commit(model(clean, torch.zeros(1), toy_prompt(), context=context).kv, context)
        memory.commit(clean[0], 0.0, toy_prompt()[0])


@pytest.mark.parametrize("length", [1, 7, 127, 128, 129, 256, 384])
@pytest.mark.parametrize("queries", [1, 128, 130])
def test_attention_call_is_a_softmax(queries, length):
    q, k, v = randn(2, queries, 3, 16, seed=1), randn(2, length, 3, 16, seed=2), randn(2, length, 3, 16, seed=3)
    mask = randn(1, 1, queries, length, seed=4) > 0
    mask[..., 0] = True
    for visible in (None, mask):
        out = attend(q, k, v, None, visible)
        for sample in range(2):
            seen = None if visible is None else visible[0, 0]
            expected = softmax_attention(q[sample].double(), k[sample].double(), v[sample].double(), seen)
            torch.testing.assert_close(out[sample].double(), expected, atol=1e-5, rtol=0)


def test_block_mask_by_hand():
    """Two chunks of one frame of one token: clean 0, clean 1, noisy 0, noisy 1."""
    mask = clip_mask(2, 1, 1, True, torch.device("cpu"))[0, 0].int().tolist()
    assert mask == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 1]]
    plain = clip_mask(4, 1, 2, False, torch.device("cpu"))[0, 0].int().tolist()
    assert plain == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 3, 4])
def test_a_clip_of_one_chunk_is_the_bidirectional_model(frames):
    wan = bidirectional()
    model = CausalWanModel.from_wan(wan, text_len=7, frames_per_chunk=frames, compressor="identity").eval()
    noisy, step = toy_chunk(0, frames=frames), torch.tensor([500.0])
    prompt = toy_prompt(length=7)
    expected = wan(noisy, step, prompt).sample
    torch.testing.assert_close(model(noisy, step, prompt).sample, expected, atol=2e-5, rtol=0)
    first_chunk = model(noisy, step, prompt, context=toy_cache(model, toy_config(compressor="identity")).context())
    torch.testing.assert_close(first_chunk.sample, expected, atol=2e-5, rtol=0)


def test_parameter_names_are_diffusers_own():
    wan = bidirectional()
    names = {name: tensor.shape for name, tensor in wan.state_dict().items()}
    model = CausalWanModel.from_wan(wan, compressor_channels=(6, 8))
    own = {name: tensor.shape for name, tensor in model.state_dict().items()}
    extra = {name for name in own if name.startswith("pack_compressor.net.")}
    assert len(extra) == 6 and {name: own[name] for name in own.keys() - extra} == names
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in wan.state_dict().items())
    settings = {name: value for name, value in wan.config.items() if not name.startswith("_")}
    assert settings.items() <= dict(model.config).items()


@torch.no_grad()
def test_a_timestep_per_sample_is_one_per_frame():
    model = toy_model()
    noisy, prompt = torch.cat([toy_chunk(0, sample, frames=6) for sample in range(2)]), toy_prompt(2)
    step = torch.tensor([500.0, 80.0])
    per_frame = step[:, None].expand(2, 6)
    torch.testing.assert_close(model(noisy, step, prompt).sample, model(noisy, per_frame, prompt).sample,
                               atol=1e-5, rtol=0)  # fmt: skip
    clean = {"clean_hidden_states": noisy.flip(0)}
    by_default = model(noisy, step, prompt, **clean).sample
    zeros = model(noisy, per_frame, prompt, **clean, clean_timestep=torch.zeros(2)).sample
    torch.testing.assert_close(by_default, zeros, atol=1e-5, rtol=0)
    context = toy_cache(model, toy_config()).context()
    chunk = noisy[:, :, :3]
    flows = [model(chunk, t, prompt, context=context).sample for t in (step, per_frame[:, :3])]
    torch.testing.assert_close(*flows, atol=1e-5, rtol=0)


@torch.no_grad()
def test_prompts_are_padded_with_zeros():
    model, noisy, step = toy_model(), toy_chunk(0), torch.tensor([500.0])
    prompt = toy_prompt(length=4)
    padded = torch.cat((prompt, torch.zeros(1, 3, TEXT_DIM)), dim=1)
    assert torch.equal(model(noisy, step, prompt).sample, model(noisy, step, padded).sample)
    assert (model(noisy, step, prompt).sample - model(noisy, step, prompt[:, :3]).sample).abs().max() > 1e-3


@torch.no_grad()
def test_text_is_projected_once():
    model, noisy, step, memo = toy_model(), toy_chunk(0), torch.tensor([500.0]), TextKV()
    calls = []
    for block in model.blocks:
        block.attn2.to_k.register_forward_hook(lambda *_: calls.append(1))
    first = model(noisy, step, toy_prompt(), text_kv=memo).sample
    again = model(noisy, step, toy_prompt(), text_kv=memo).sample
    assert len(calls) == len(model.blocks)
    assert torch.equal(first, again) and torch.equal(first, model(noisy, step, toy_prompt()).sample)


def test_a_text_memo_is_left_alone_while_gradients_are_on():
    model, memo = toy_model(), TextKV()
    model.enable_gradient_checkpointing()
    for _ in range(2):
        model.zero_grad()
        model(toy_chunk(0), torch.tensor([500.0]), toy_prompt(), text_kv=memo).sample.square().mean().backward()
        assert model.blocks[0].attn2.to_k.weight.grad.abs().max() > 0
    assert 0 not in memo


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_states": toy_chunk(0, frames=4)}, "4 latent frames do not fit chunks of 3"),
        ({"encoder_hidden_states": toy_prompt(length=8)}, "prompt embeddings have 8 tokens: text_len is 7"),
        ({"encoder_hidden_states_image": torch.zeros(1, 2, 3)}, "text-to-video only"),
        ({"timestep": torch.zeros(1, 2)}, r"timestep has 2 columns: give \[B\], or \[B, F\] with 3 frames"),
        ({"clean_hidden_states": toy_chunk(0, frames=6)}, "clean_hidden_states are .* of hidden_states"),
        ({"hidden_states": toy_chunk(0, latent=(7, 12))}, "latent height is 7: must be a positive multiple"),
    ],
    ids=lambda value: None if isinstance(value, str) else next(iter(value)),
)
def test_bad_input_is_named(changes, words):
    inputs = {"hidden_states": toy_chunk(0), "timestep": torch.zeros(1), "encoder_hidden_states": toy_prompt()}
    with pytest.raises(ValueError, match=words):
        toy_model()(**{**inputs, **changes})


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"image_dim": 8}, "text-to-video only"), ({"added_kv_proj_dim": 8}, "text-to-video only"),
     ({"compressor": "magic"}, "compressor.kind` is magic: expected one of identity, hr_spatial")],
)  # fmt: skip
def test_impossible_models(settings, words):
    with pytest.raises(ValueError, match=words):
        toy_model(**settings)


def test_tuple_output():
    model = toy_model()
    context = toy_cache(model, toy_config(sink=0)).context()
    inputs = (toy_chunk(0), torch.zeros(1), toy_prompt())
    (sample,) = model(*inputs, return_dict=False, context=context)
    output = model(*inputs, context=context)
    assert torch.equal(sample, output.sample) and torch.equal(sample, output[0])
    kv = output.kv
    assert len(kv.layers) == len(model.blocks) and torch.equal(kv.latents, inputs[0])
    layer = kv.layers[0]
    assert layer.key.shape == layer.value.shape == (1, 72, 4, 12) and layer.query is None
    assert layer.mid_key.shape == layer.mid_value.shape == (1, 18, 4, 12)
    assert model(*inputs).kv is None
    assert model(*inputs, context=context, return_kv=False).kv is None


@torch.no_grad()
def test_bfloat16_is_near_float32():
    model, half = toy_model(), toy_model().to(torch.bfloat16)
    cache, half_cache = (toy_cache(m, toy_config()) for m in (model, half))
    for index in range(6):
        flows = []
        for m, c in ((model, cache), (half, half_cache)):
            noisy, clean, prompt = (x.to(m.dtype) for x in (toy_chunk(index, kind=1), toy_chunk(index), toy_prompt()))
            context = c.context()
            flows.append(m(noisy, torch.tensor([500.0]), prompt, context=context, return_kv=False).sample)
            c.commit(m(clean, torch.zeros(1), prompt, context=context).kv, context)
        assert flows[1].dtype == torch.bfloat16
        assert (flows[0] - flows[1].float()).square().mean().sqrt() < 0.05 * flows[0].square().mean().sqrt()
    assert half_cache.layers[0].keys.dtype == torch.bfloat16
