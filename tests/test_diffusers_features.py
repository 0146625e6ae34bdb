"""What diffusers offers for its models works on CausalWanModel."""

import json

import accelerate
import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor, WanTransformerBlock
from peft import LoraConfig
from safetensors.torch import save_file
from test_kv_cache import make, roll
from toy import DIMS, randomize, toy_cache, toy_chunk, toy_config, toy_model, toy_prompt

from model.attention import CausalWanAttnProcessor
from model.causal_wan import CausalWanModel
from model.convert import diffusers_to_wan
from model.kv import TextKV
from pipeline.generate.inputs import Prompts, prompt_noise
from pipeline.generate.rollout import Rollout
from utils.config import SamplerConfig

INPUTS = (toy_chunk(0, frames=6), torch.tensor([500.0]), toy_prompt())


def outputs(model, cache):
    """Flow of a clip, and flows of six chunks with a cache."""
    cache.reset()
    with torch.no_grad():
        clip = model(*INPUTS, clean_hidden_states=toy_chunk(1, frames=6)).sample
    return clip, torch.cat(roll(model, cache, 6)[0])


def assert_alike(model, cache, expected, atol=1e-5):
    for out, wanted in zip(outputs(model, cache), expected, strict=True):
        torch.testing.assert_close(out, wanted, atol=atol, rtol=0)


def test_saved_and_loaded(tmp_path):
    model, cache, _ = make({})
    model.save_pretrained(tmp_path)
    loaded, report = CausalWanModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    private = ("_name_or_path", "_use_default_values")
    before, after = (json.loads(m.to_json_string()) for m in (model, loaded))
    assert {k: v for k, v in before.items() if k not in private} == {k: v for k, v in after.items() if k not in private}
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    assert_alike(loaded.eval(), cache, outputs(model, cache), atol=0)


def test_loads_a_bidirectional_checkpoint(tmp_path):
    wan = WanTransformer3DModel(**DIMS)
    randomize(wan, 0)
    wan.save_pretrained(tmp_path)
    settings = {"text_len": 7, "frames_per_chunk": 6, "compressor": "identity"}
    model = CausalWanModel.from_pretrained(tmp_path, **settings).eval()
    prompt = toy_prompt(length=7)
    with torch.no_grad():
        expected = wan.eval()(INPUTS[0], INPUTS[1], prompt).sample
        torch.testing.assert_close(model(INPUTS[0], INPUTS[1], prompt).sample, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("way", ["folder", "device_map", "sharded", "single_file", "single_file_of_wan", "not_on_meta"])
def test_a_compressor_that_the_weights_lack_is_initialised(way, tmp_path, caplog):
    """Always the same one, on no meta device; the weights that are there are loaded, in either layout."""
    wan = WanTransformer3DModel(**DIMS)
    randomize(wan, 0)
    wan.save_pretrained(tmp_path, max_shard_size="40KB" if way == "sharded" else "1GB")
    settings = {"text_len": 7, "compressor_channels": (6, 8)}
    state = wan.state_dict()
    torch.manual_seed(len(way))
    if way in ("folder", "device_map", "sharded"):
        device_map = {"": "cpu"} if way == "device_map" else None
        model = CausalWanModel.from_pretrained(tmp_path, device_map=device_map, **settings)
    else:
        file = tmp_path / "single.safetensors"
        save_file({diffusers_to_wan(n) if way == "single_file_of_wan" else n: t for n, t in state.items()}, file)
        low_memory = way != "not_on_meta"
        model = CausalWanModel.from_single_file(
            str(file), config=str(tmp_path), low_cpu_mem_usage=low_memory, local_files_only=True, **settings
        )
    assert "has no compressor: pack_compressor is initialised at random (seed 0)" in caplog.text
    own = model.to("cpu").state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in state.items())
    fresh = model.fresh_compressor("these weights")
    assert len(fresh) == 6 and all(torch.equal(own[name], tensor) for name, tensor in fresh.items())


def test_loaded_in_bfloat16(tmp_path):
    model, cache, _ = make({})
    expected = outputs(model, cache)
    model.save_pretrained(tmp_path)
    half = CausalWanModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16).eval()
    assert half.dtype == torch.bfloat16 and half.blocks[0].scale_shift_table.dtype == torch.float32  # as in Wan
    cache.reset()
    flow = half(*(x.bfloat16() for x in (INPUTS[0],)), INPUTS[1], INPUTS[2].bfloat16(),
                clean_hidden_states=toy_chunk(1, frames=6).bfloat16()).sample  # fmt: skip
    assert (flow.float() - expected[0]).square().mean().sqrt() < 0.05 * expected[0].square().mean().sqrt()


@pytest.mark.parametrize("teacher_forcing", [True, False])
def test_gradient_checkpointing_of_whole_clips(teacher_forcing):
    model, _, _ = make({})
    options = {"clean_hidden_states": toy_chunk(1, frames=6)} if teacher_forcing else {}
    found = []
    for checkpointing in (False, True):
        model.zero_grad()
        model.enable_gradient_checkpointing() if checkpointing else model.disable_gradient_checkpointing()
        model(*INPUTS, **options).sample.square().mean().backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and len(found[0]) > 50
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-6, rtol=1e-5)


def add_lora(model):
    model.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]), "style")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def test_lora_changes_the_output_and_can_be_switched_off():
    model, cache, _ = make({})
    expected = outputs(model, cache)
    add_lora(model)
    for out, wanted in zip(outputs(model, cache), expected, strict=True):
        assert (out - wanted).abs().max() > 1e-2
    model.disable_adapters()
    assert_alike(model, cache, expected)
    model.enable_adapters()
    with torch.no_grad():
        plain = model(*INPUTS).sample
        none = model(*INPUTS, attention_kwargs={"scale": 0.0}).sample
        model.disable_adapters()
        torch.testing.assert_close(none, model(*INPUTS).sample, atol=1e-5, rtol=0)
    assert (plain - none).abs().max() > 1e-2


def test_lora_is_saved_and_loaded(tmp_path):
    model, cache, _ = make({})
    add_lora(model)
    expected = outputs(model, cache)
    model.save_lora_adapter(tmp_path, adapter_name="style")
    fresh, _, _ = make({})
    fresh.load_lora_adapter(tmp_path, adapter_name="other", prefix=None, use_safetensors=True)
    assert_alike(fresh, cache, expected)


def test_lora_trains_through_the_cache():
    model, cache, _ = make({})
    roll(model, cache, 5)
    add_lora(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trained and len(trained) < len(list(model.parameters())) / 2
    optimizer = torch.optim.SGD(trained, lr=0.02)
    context, losses = cache.context(), []
    for _ in range(5):
        flow = model(toy_chunk(5), torch.tensor([500.0]), toy_prompt(), context=context, return_kv=False).sample
        losses.append(flow.square().mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]


def test_compiled_blocks():
    """Traced and differentiable, but not lowered to machine code, which takes half a minute."""
    model, cache, _ = make({})
    expected = outputs(model, cache)
    torch._dynamo.reset()
    model.compile_repeated_blocks(backend="aot_eager")
    assert_alike(model, cache, expected)


@pytest.mark.slow
def test_compiled_as_a_whole():
    """In all three uses; no chunk after the first few compiles anything anew, and no layer after the first."""
    model, cache, _ = make({})
    expected = outputs(model, cache)
    torch._dynamo.reset()
    model.compile(backend="eager")
    counts = torch._dynamo.utils.counters["stats"]
    with torch.no_grad():
        torch.testing.assert_close(model(*INPUTS).sample, CausalWanModel.forward(model, *INPUTS).sample)
    assert_alike(model, cache, expected)
    before = counts["unique_graphs"]
    roll(model, cache, 6)
    assert counts["unique_graphs"] == before


@pytest.mark.slow
def test_compiled_as_a_whole_without_a_break():
    """All forwards of a chunk, from the first one on, which chooses and fills the prompts' memo."""
    model, cache, _ = make({})

    def run(chunks):
        cache.reset()
        found, text_kv = [], TextKV()
        for index in range(chunks):
            context = cache.context()
            for kind, step in enumerate((900.0, 400.0, 0.0)):
                ready = context.ready(len(model.blocks), torch.device("cpu"))
                inputs = toy_chunk(index, kind), torch.tensor([step]), toy_prompt()
                out = model(*inputs, context=ready, return_kv=kind == 2, text_kv=text_kv)
                found.append(out.sample)
            cache.commit(out.kv, context)
        return found

    with torch.no_grad():
        expected = run(9)
        torch._dynamo.reset()
        model.compile(backend="eager", fullgraph=True)
        torch.testing.assert_close(run(9), expected, atol=1e-5, rtol=0)
        counts = torch._dynamo.utils.counters["stats"]
        before = counts["unique_graphs"]
        torch.testing.assert_close(run(9), expected, atol=1e-5, rtol=0)
    assert counts["unique_graphs"] == before


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"kv": "forward"}, {"mid_dtype": "int8"}], ids=["forward", "int8"])
def test_compiled_blocks_serve_every_layer_and_video(settings):
    """Nothing is compiled anew once every part of the cache is filled: for a chunk, a second video, or more layers."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    frames, compiled = torch._dynamo.utils.counters["frames"], []
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):  # or the count would stay where it is
        for layers in (2, 4):
            model = toy_model(num_layers=layers)
            model.compile_repeated_blocks(dynamic=True, backend="eager")  # as `inference.compile` does
            cache = toy_cache(model, toy_config(**settings))
            for video in range(2):
                cache.reset()
                noise, prompts = prompt_noise(0, [""], [video]), Prompts(toy_prompt(seed=video))
                rollout = Rollout(model, cache, SamplerConfig(steps=[1000.0, 500.0]), prompts, noise)
                compiled += [frames["total"] for _ in rollout.run(5)]
    assert 0 < compiled[2] == compiled[-1], compiled


@pytest.mark.slow
@pytest.mark.parametrize("part", ["blocks", "whole"])
def test_compiled_by_inductor(part):
    model, cache, _ = make({})
    expected = outputs(model, cache)
    torch._dynamo.reset()
    model.compile_repeated_blocks() if part == "blocks" else model.compile()
    assert_alike(model, cache, expected, atol=5e-5)


@pytest.mark.slow
@pytest.mark.parametrize("use", ["clip", "chunk"])
def test_compiled_by_inductor_with_gradient(use):
    """The whole model: teacher forcing, and a chunk behind a history as in DMD."""
    gradients = []
    for compiled in (False, True):
        model, cache, _ = make({})
        roll(model, cache, 2)
        if compiled:
            torch._dynamo.reset()
            model.compile()
        if use == "clip":
            out = model(*INPUTS, clean_hidden_states=toy_chunk(1, frames=6))
        else:
            out = model(toy_chunk(2), torch.tensor([500.0]), toy_prompt(), context=cache.context())
        out.sample.square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 50
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, atol=1e-6 + 1e-4 * expected.abs().max(), rtol=0)


def test_layerwise_casting():
    """Weights stored in 8 bits, computed in float32; norms, embeddings and modulation tables stay as they are."""
    model, cache, _ = make({})
    expected = outputs(model, cache)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert model.blocks[0].attn1.to_q.weight.dtype == torch.float8_e4m3fn
    assert model.blocks[0].attn1.norm_q.weight.dtype == torch.float32
    assert {weight.dtype for weight in model.pack_compressor.parameters()} == {torch.float32}
    for out, wanted in zip(outputs(model, cache), expected, strict=True):
        assert 0 < (out - wanted).square().mean().sqrt() < 0.3 * wanted.square().mean().sqrt()


def test_offloaded_by_module():
    """accelerate's sequential offload: every module's weights are on the device only while it runs."""
    model, cache, _ = make({})
    expected = outputs(model, cache)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.blocks[0].attn1.to_q.weight.device.type == "meta"
    assert_alike(model, cache, expected)


def test_offloaded_as_a_whole():
    model, cache, _ = make({})
    expected = outputs(model, cache)
    model, hook = accelerate.cpu_offload_with_hook(model, execution_device=torch.device("cpu"))
    assert_alike(model, cache, expected, atol=0)
    hook.offload()


def test_attention_backend_by_name(diffusers_backend):
    model, cache, _ = make({})
    expected = outputs(model, cache)
    model.set_attention_backend("_native_math")
    assert_alike(model, cache, expected)


class CountingProcessor(CausalWanAttnProcessor):
    calls = 0

    def __call__(self, *arguments, **settings):
        self.calls += 1
        return super().__call__(*arguments, **settings)


def test_attention_goes_through_the_processors_that_are_set():
    model, cache, _ = make({})
    expected = outputs(model, cache)
    processor, forwards = CountingProcessor(), []
    model.set_attn_processor(processor)
    model.register_forward_hook(lambda *a: forwards.append(a[2].get("return_sample", True)), with_kwargs=True)
    assert_alike(model, cache, expected, atol=0)
    kv_only = forwards.count(False)  # commits, without cross-attention in the last layer
    assert processor.calls == 2 * 2 * len(forwards) - kv_only > 2 * 2 * kv_only > 0  # two layers, self and cross
    model.set_attn_processor(WanAttnProcessor())  # diffusers' own: serves clips
    with torch.no_grad():
        clip = model(*INPUTS, clean_hidden_states=toy_chunk(1, frames=6)).sample
    torch.testing.assert_close(clip, expected[0], atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="processor WanAttnProcessor cannot read a chunk's history"):
        roll(model, cache, 6)


def test_every_block_is_built_once(monkeypatch):
    built, construct = [], WanTransformerBlock.__init__
    monkeypatch.setattr(WanTransformerBlock, "__init__", lambda *a, **k: (built.append(1), construct(*a, **k))[1])
    assert len(make({})[0].blocks) == len(built) == 2
