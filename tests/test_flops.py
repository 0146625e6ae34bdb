"""FLOPs by formula against those that torch counts of the networks' operations."""

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model.causal_wan import CausalWanModel
from model.flops import clip_keys, forward_flops
from pipeline.train.throughput import FlopMeter
from tests.toy import DIMS, randn, toy_cache, toy_chunk, toy_config, toy_model, toy_prompt

# Large enough that the time embedding, which the formula leaves out, does not show.
LARGER = DIMS | {"num_attention_heads": 8, "ffn_dim": 256}
LATENT, FRAME = (16, 16), 64
CPU = torch.device("cpu")


def counted(call) -> int:
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # the CPU's fused one is not counted
        call()
    return counter.get_total_flops()


@torch.no_grad()
def test_a_bidirectional_clip():
    model = WanTransformer3DModel(**LARGER).eval()
    meter = FlopMeter([model], CPU)
    latents, text = randn(2, 4, 6, *LATENT, seed=0), toy_prompt(batch=2)
    expected = counted(lambda: model(latents, torch.tensor([500.0, 500.0]), text))
    assert meter.flops == pytest.approx(expected, rel=0.02)
    assert meter.tokens == 2 * 6 * FRAME


@torch.no_grad()
def test_a_chunk_with_history():
    model = toy_model()
    cache, meter = toy_cache(model, toy_config()), FlopMeter([model], CPU)
    for index in range(5):
        context = cache.context()
        meter.flops = 0
        call = lambda context=context, index=index: model(  # noqa: E731
            toy_chunk(index), torch.tensor([500.0]), toy_prompt(), context=context, return_kv=False)
        expected = counted(call)
        cache.commit(model(toy_chunk(index), torch.tensor([0.0]), toy_prompt(), context=context).kv, context)
    assert context.attended_mid_tokens() > 0
    assert meter.flops / 2 == pytest.approx(expected, rel=0.1)  # of the commit too; compression is left out


def test_teacher_forcing_counts_what_the_mask_leaves():
    model = CausalWanModel(**LARGER, text_len=7, frames_per_chunk=3, compressor="identity")
    meter, (clip, text) = FlopMeter([model], CPU), (randn(1, 4, 9, *LATENT, seed=0), toy_prompt())
    with torch.no_grad():
        expected = counted(lambda: model(clip, torch.tensor([500.0]), text, clean_hidden_states=clip))
    once, tokens = meter.flops, 18 * FRAME
    seen = sum(i + 1 for i in range(3)) / 3 * 3 * FRAME
    assert clip_keys(3, 3 * FRAME) == seen
    masked = 4 * tokens * (tokens - seen) * 96 * LARGER["num_layers"]  # torch counts what the mask hides
    assert once == pytest.approx(expected - masked, rel=0.02)
    model(clip, torch.tensor([500.0]), text, clean_hidden_states=clip)
    assert meter.flops == pytest.approx(4 * once)  # and forward and backward


def test_wan_1_3b():
    settings = {"num_layers": 30, "num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960,
                "in_channels": 16, "out_channels": 16, "text_dim": 4096, "patch_size": (1, 2, 2)}  # fmt: skip
    flops = forward_flops(settings, 32760, 32760, 512)
    assert flops["matmul"] == pytest.approx(82.09e12, rel=0.01)  # as torch counts them with fake tensors
    assert flops["attention"] == pytest.approx(200.91e12, rel=0.01)


def test_rates_of_a_step():
    meter = FlopMeter([], CPU)
    meter.flops, meter.tokens, meter.peak = 4e12, 100, 8e12
    logs = meter.step(2.0, ranks=3, steps_left=1800)
    assert logs == {"tflops": 2.0, "tokens_per_s": 150.0, "hours_left": 1.0, "mfu": 0.25}
    assert meter.step(4.0, ranks=3, steps_left=1200)["hours_left"] == 1.0 and meter.flops == 0
