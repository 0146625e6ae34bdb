"""`PackForcingPipeline` as diffusers' users call it: loading, saving, calling, streaming, offloading, LoRA."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    FasterCacheConfig,
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    LayerSkipConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
    UniPCMultistepScheduler,
    WanTransformer3DModel,
)
from diffusers.hooks import apply_layer_skip
from peft import LoraConfig
from safetensors.torch import save_file

from model.cache.cache import PackCache
from model.convert import diffusers_to_wan
from model.weights import CheckpointError
from pipeline.generate.chunks import NotFiniteError
from pipeline.generate.inference import Runtime, load_pipeline, resolve_runtime
from pipeline.generate.inputs import Prompts, prompt_noise
from pipeline.generate.pipeline import PackForcingPipeline
from pipeline.generate.rollout import Rollout
from pipeline.generate.vae_stream import StreamingDecoder
from tests import tiny
from utils.config import ConfigError
from utils.load_config import load_config

PROMPT, OTHER = "a red circle bounces over a blue plain", "a green shape circles over a gradient"
CACHE = {"sink": 1, "recent": 1, "top_k": 1, "compressor": {"channels": [4, 8]}}
SAMPLER = {"steps": [1000.0, 500.0]}
VIDEO = {"height": tiny.HEIGHT, "width": tiny.WIDTH, "trained_frames": 10, "frames_per_chunk": 2}


@pytest.fixture
def pipe(bundle):
    pipe = PackForcingPipeline.from_pretrained(bundle, cache=CACHE, sampler=SAMPLER, video=VIDEO)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def same(one, other):
    return np.array_equal(np.asarray(one), np.asarray(other))


def test_a_call_is_the_rollout_decoded(pipe):
    frames = pipe(PROMPT, num_frames=13, seed=3).frames
    assert frames.shape == (1, 13, tiny.HEIGHT, tiny.WIDTH, 3) and frames.std() > 0.01
    cache = PackCache.for_model(pipe.transformer, pipe.cache_config, 4, 6, 10)
    prompts = Prompts(pipe.encode_prompt(PROMPT))
    rollout = Rollout(pipe.transformer, cache, pipe.sampler_config, prompts, prompt_noise(3, [PROMPT], [0]))
    latents = torch.cat([latents for _, latents in rollout.run(2)], dim=2)
    expected = StreamingDecoder(pipe.vae).decode(latents)[0].permute(1, 2, 3, 0) / 2 + 0.5
    assert np.abs(frames[0] - expected.numpy()).max() < 1e-6


def test_streaming_gives_the_same_frames_and_a_report(pipe):
    chunks = list(pipe.stream(PROMPT, num_frames=25, seed=1))
    assert [chunk.index for chunk in chunks] == [0, 1, 2, 3]
    assert same(np.concatenate([chunk.frames for chunk in chunks], 1), pipe(PROMPT, num_frames=25, seed=1).frames)
    assert chunks[-1].report["mid"]["tokens"] == 2 and chunks[-1].report["sink"]["tokens"] == 12


def test_videos_of_a_batch_are_those_made_alone(pipe):
    both = pipe([PROMPT, OTHER], num_frames=13, num_videos_per_prompt=2).frames
    assert len(both) == 4 and not same(both[0], both[1])
    assert np.abs(both[0] - pipe(PROMPT, num_frames=13).frames[0]).max() < 1e-5
    assert np.abs(both[2] - pipe(OTHER, num_frames=13).frames[0]).max() < 1e-5


def test_length_counts_frames_or_seconds(pipe):
    assert pipe(PROMPT, num_frames=7).frames.shape[1] == 7  # of the 13 that two chunks hold
    assert pipe(PROMPT, seconds=1).frames.shape[1] == 21  # whole chunks: 16 frames need 5 latent ones, that is 3 chunks
    assert pipe(PROMPT).frames.shape[1] == 37  # as many as in training


def test_output_types(pipe):
    wanted = pipe(PROMPT, num_frames=5).frames
    tensor = pipe(PROMPT, num_frames=5, output_type="pt").frames.permute(0, 1, 3, 4, 2)
    assert np.abs(tensor.numpy() - wanted).max() < 1e-6
    images = pipe(PROMPT, num_frames=5, output_type="pil").frames
    assert np.abs(np.stack([np.asarray(image) for image in images[0]]) / 255 - wanted[0]).max() < 0.51 / 255
    assert pipe(PROMPT, num_frames=5, output_type="latent", return_dict=False)[0].shape == (1, 4, 2, 4, 6)


def test_noise_of_ones_own(pipe):
    by_generator = [pipe(PROMPT, num_frames=13, generator=torch.Generator().manual_seed(i)).frames for i in (0, 0, 1)]
    assert same(by_generator[0], by_generator[1]) and not same(by_generator[0], by_generator[2])
    latents = torch.randn(1, 4, 4, 4, 6)
    given = [pipe(PROMPT, num_frames=13, latents=x).frames for x in (latents, latents.clone(), -latents)]
    assert same(given[0], given[1]) and not same(given[0], given[2])
    with pytest.raises(ConfigError, match=r"latents are .*: these videos need \[1, 4, 4, 4, 6\]"):
        pipe(PROMPT, num_frames=13, latents=latents[:, :, :3])


def test_prompt_embeds_stand_for_a_prompt(pipe):
    noise = prompt_noise(0, [PROMPT], [0])
    embeds = pipe.encode_prompt(PROMPT)
    assert same(pipe(prompt_embeds=embeds, num_frames=13, noise=noise).frames, pipe(PROMPT, num_frames=13).frames)


def test_guidance_and_many_steps(bundle):
    many = PackForcingPipeline.from_pretrained(bundle, cache=CACHE, sampler={"kind": "euler"}, video=VIDEO)
    options = {"num_frames": 5, "num_inference_steps": 3}
    plain = many(PROMPT, **options).frames
    assert same(many(PROMPT, guidance_scale=1, **options).frames, plain)
    guided = many(PROMPT, guidance_scale=5, negative_prompt=OTHER, **options).frames
    assert not same(guided, plain)
    negative = many.encode_prompt(OTHER)
    assert same(many(PROMPT, guidance_scale=5, negative_prompt_embeds=negative, **options).frames, guided)
    assert same(many(PROMPT, guidance_scale=0, **options).frames, plain)  # off, as in diffusers
    two = many([PROMPT, OTHER], negative_prompt=["", OTHER], guidance_scale=5, num_videos_per_prompt=2, **options)
    assert np.abs(two.frames[0] - many(PROMPT, guidance_scale=5, **options).frames[0]).max() < 1e-5
    alone = many(OTHER, negative_prompt=OTHER, guidance_scale=5, **options).frames[0]
    assert np.abs(two.frames[2] - alone).max() < 1e-5
    with pytest.raises(ConfigError, match="2 negative prompts for 1 prompts"):
        many(PROMPT, negative_prompt=["", OTHER], guidance_scale=5, **options)


def test_cache_settings_of_one_call(pipe):
    kept = pipe(PROMPT, num_frames=41).frames
    assert not same(pipe(PROMPT, num_frames=41, cache={"kind": "window"}).frames, kept)
    assert same(pipe(PROMPT, num_frames=41).frames, kept)


def test_callback_sees_every_step_and_may_change_latents(pipe):
    seen = []

    def callback(pipeline, step, timestep, tensors):
        assert pipeline is pipe and set(tensors) == {"latents", "prompt_embeds"}
        seen.append((step, round(timestep)))
        return {"latents": torch.zeros_like(tensors["latents"])}

    latents = pipe(
        PROMPT, num_frames=13, output_type="latent", callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
    ).frames  # fmt: skip
    assert seen == [(0, 1000), (1, 750), (2, 1000), (3, 750)] and not latents.any()


def test_callback_may_change_the_prompt(pipe):
    def callback(pipeline, step, timestep, tensors):
        return {"prompt_embeds": pipe.encode_prompt(OTHER)} if step == 1 else {}

    changed = pipe(PROMPT, num_frames=13, callback_on_step_end=callback).frames
    plain = pipe(PROMPT, num_frames=13).frames
    assert not same(changed, plain) and np.abs(changed[:, :5] - plain[:, :5]).max() < 1e-6


STEP_CACHES = {
    "first_block": lambda pipe: FirstBlockCacheConfig(threshold=1.0),
    "mag": lambda pipe: MagCacheConfig(num_inference_steps=4, mag_ratios=[1.0] * 4, retention_ratio=0.1),
    "taylor_seer": lambda pipe: TaylorSeerCacheConfig(2, 1, cache_identifiers=["blocks.*attn1"]),
    "pyramid": lambda pipe: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: pipe.current_timestep
    ),
    "faster": lambda pipe: FasterCacheConfig(
        is_guidance_distilled=True, spatial_attention_timestep_skip_range=(-1, 901),
        current_timestep_callback=lambda: pipe.current_timestep,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STEP_CACHES)
def test_step_caches_of_diffusers_leave_out_steps_but_no_commit(bundle, name):
    pipe = PackForcingPipeline.from_pretrained(
        bundle, cache=CACHE, sampler={"kind": "euler", "num_steps": 4}, video=VIDEO
    )
    options = {"prompt": PROMPT, "num_frames": 13, "output_type": "latent"}
    plain = pipe(**options).frames
    pipe.transformer.enable_cache(STEP_CACHES[name](pipe))
    with pytest.raises(ZeroDivisionError):  # what is remembered of this one must not reach the next video
        pipe(OTHER, num_frames=13, callback_on_step_end=lambda *_: 1 / 0)
    latents = pipe(**options).frames
    assert 1e-5 < (latents - plain).abs().max() < 0.5
    stream = pipe.stream(**options)
    first = next(stream).latents
    assert same(first, latents[:, :, :2])
    pipe.transformer.disable_cache()
    prompts, noise = Prompts(pipe.encode_prompt(PROMPT)), prompt_noise(0, [PROMPT], [0])
    rollout = Rollout(pipe.transformer, pipe.make_cache(32, 48), pipe.sampler_config, prompts, noise)
    rollout.commit(first)
    assert same(next(stream).latents, next(rollout.run(1))[1].detach())


def test_a_layer_left_out_of_a_commit_is_an_error(pipe):
    apply_layer_skip(pipe.transformer, LayerSkipConfig(indices=[0], fqn="blocks"))
    with pytest.raises(RuntimeError, match="a hook left out a layer while a chunk was committed"):
        pipe(PROMPT, num_frames=13)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_inference_steps": 7}, "num_inference_steps is 7"),
        ({"height": 40}, "height and width are 40"),
        ({"num_frames": 5, "seconds": 2}, "num_frames and seconds"),
        ({"seconds": float("nan")}, "seconds is nan"),
        ({"num_videos_per_prompt": 1.5}, "num_videos_per_prompt is 1.5: must be a positive whole number"),
        ({"negative_prompt_embeds": torch.zeros(1, 2, 7)}, "negative_prompt_embeds is .1, 2, 7.: must be .*, 16"),
        ({"output_type": "gif"}, "output_type is gif: expected one of pil"),
        ({"cache": {"top": 1}}, "settings .cache.: .* Did you mean: 'top_k'"),
        ({"prompt_embeds": torch.zeros(1, 2, 16)}, "prompt and prompt_embeds"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "noise"),
    ],
)
def test_bad_arguments_are_named(pipe, options, message):
    with pytest.raises(ConfigError, match=message):
        pipe(PROMPT, **options)


def test_saved_and_loaded_it_makes_the_same_video(pipe, tmp_path):
    wanted = pipe(PROMPT, num_frames=13).frames
    pipe.save_pretrained(tmp_path)
    assert same(PackForcingPipeline.from_pretrained(tmp_path)(PROMPT, num_frames=13).frames, wanted)
    assert same(PackForcingPipeline.from_pipe(pipe)(PROMPT, num_frames=13).frames, wanted)


def test_the_schedule_is_the_schedulers_unless_a_setting_says_otherwise(pipe, bundle, tmp_path):
    shutil.copytree(bundle, tmp_path / "other")
    path = tmp_path / "other" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"shift": 9.0}))
    settings = {"cache": CACHE, "video": VIDEO}
    wanted = pipe(PROMPT, num_frames=13).frames
    other = PackForcingPipeline.from_pretrained(tmp_path / "other", sampler=SAMPLER, **settings)
    assert not same(other(PROMPT, num_frames=13).frames, wanted)
    again = PackForcingPipeline.from_pretrained(tmp_path / "other", sampler=SAMPLER | {"shift": 3.0}, **settings)
    assert same(again(PROMPT, num_frames=13).frames, wanted)
    pipe.scheduler = UniPCMultistepScheduler(flow_shift=3.0)
    assert same(pipe(PROMPT, num_frames=13).frames, wanted)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    with pytest.raises(ConfigError, match="use_dynamic_shifting"):
        pipe(PROMPT, num_frames=13)


def test_a_folder_of_plain_wan_is_read_as_a_causal_model(pipe, bundle, tmp_path):
    pipe.save_pretrained(tmp_path)
    known = {"num_layers", "num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "text_dim",
             "freq_dim", "ffn_dim"}  # fmt: skip
    wan = WanTransformer3DModel(**{key: pipe.transformer.config[key] for key in known})
    wan.load_state_dict({k: v for k, v in pipe.transformer.state_dict().items() if "pack_compressor" not in k})
    shutil.rmtree(tmp_path / "transformer")
    wan.save_pretrained(tmp_path / "transformer")
    index = json.loads((tmp_path / "model_index.json").read_text(encoding="utf-8"))
    index |= {"_class_name": "WanPipeline", "transformer": ["diffusers", "WanTransformer3DModel"]}
    index |= {"scheduler": ["diffusers", "UniPCMultistepScheduler"]}
    for name in ("cache", "sampler", "video"):
        del index[name]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(
        json.dumps({"_class_name": "UniPCMultistepScheduler", "flow_shift": 3.0})
    )
    plain = PackForcingPipeline.from_pretrained(tmp_path)
    assert plain.transformer.pack_compressor is None and plain.sampler_config.shift == 3.0
    assert plain(PROMPT, num_frames=13, height=32, width=48).frames.std() > 0.001
    wanted = pipe(PROMPT, num_frames=13).frames
    names = {name: f"model.{diffusers_to_wan(name)}" for name in pipe.transformer.state_dict()}
    other = {names[name]: tensor + 1 for name, tensor in pipe.transformer.state_dict().items()}
    averaged = {names[name]: tensor for name, tensor in pipe.transformer.state_dict().items()}
    torch.save({"generator": other, "generator_ema": averaged}, tmp_path / "model.pt")
    settings = {"cache": CACHE, "sampler": SAMPLER, "video": VIDEO}
    distilled = PackForcingPipeline.from_pretrained(tmp_path, tmp_path / "model.pt", use_ema=True, **settings)
    own = distilled.transformer.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in pipe.transformer.state_dict().items())
    distilled = PackForcingPipeline.from_pretrained(bundle, tmp_path / "model.pt", use_ema=True, **settings)
    assert np.abs(distilled(PROMPT, num_frames=13).frames - wanted).max() < 1e-5
    with pytest.raises(CheckpointError, match="does not exist"):
        PackForcingPipeline.from_pretrained(tmp_path, tmp_path / "none.pt")


def test_tiled_decoding_is_the_librarys(pipe):
    latents = torch.randn(1, 4, 3, 8, 10)
    vae: AutoencoderKLWan = pipe.vae
    vae.enable_tiling(tile_sample_min_height=32, tile_sample_min_width=48, tile_sample_stride_height=16,
                      tile_sample_stride_width=32)  # fmt: skip
    decoder = StreamingDecoder(vae)
    pieces = [decoder.decode(piece) for piece in latents.split([1, 2], dim=2)]
    with torch.no_grad():
        expected = vae.decode(latents).sample
    assert (torch.cat(pieces, dim=2) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("to", ["memory", "disk"])
def test_offloaded_by_groups_it_makes_the_same_video(pipe, bundle, tmp_path, to):
    wanted = pipe(PROMPT, num_frames=13).frames
    other = PackForcingPipeline.from_pretrained(bundle, cache=CACHE, sampler=SAMPLER, video=VIDEO)
    path = str(tmp_path) if to == "disk" else None
    other.enable_group_offload(torch.device("cpu"), offload_type="leaf_level", offload_to_disk_path=path)
    assert np.abs(other(PROMPT, num_frames=13).frames - wanted).max() < 1e-5


@pytest.mark.parametrize("offload", ["model", "group"])
def test_offloaded_by_a_setting_it_makes_the_same_video(tmp_path, offload):
    world, frames = tiny.write_world(tmp_path), []
    for settings in ([], [f"inference.offload={offload}"]):
        config = load_config(world / "config.yaml", settings)
        pipe = load_pipeline(config, resolve_runtime(config))
        hooked = hasattr(pipe.vae, "_hf_hook") or hasattr(pipe.transformer.blocks[0].ffn.net[2], "_diffusers_hook")
        assert hooked == bool(settings) and not pipe.vae.use_tiling
        pipe.encode_ahead([PROMPT])
        pipe.register_modules(text_encoder=None)
        frames.append(pipe(PROMPT, num_frames=13).frames)
    assert np.abs(frames[1] - frames[0]).max() < 1e-5
    config = load_config(world / "config.yaml", ["inference.vae_tiling=true"])
    assert load_pipeline(config, resolve_runtime(config)).vae.use_tiling


def test_not_finite_is_an_error_that_names_the_part(pipe):
    with torch.no_grad():
        pipe.transformer.proj_out.weight.fill_(float("nan"))
    with pytest.raises(NotFiniteError, match="chunk 0: its latents are NaN .* transformer's weights"):
        pipe(PROMPT, num_frames=13)


def lora_weights(pipe):
    """Weights of an adapter over the transformer's attention, by diffusers' names."""
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    pipe.transformer.add_adapter(config, "made")
    state = {k: v.clone() for k, v in pipe.transformer.state_dict().items() if "lora_" in k}
    pipe.transformer.delete_adapters("made")
    return {name.replace(".made.", "."): value for name, value in state.items()}


@pytest.mark.parametrize("layout", ["diffusers", "wan", "bare_wan", "longlive", "peft"])
def test_lora_of_every_layout_changes_the_video_alike(pipe, tmp_path, layout):
    plain = pipe(PROMPT, num_frames=5).frames
    weights = lora_weights(pipe)
    source = {f"transformer.{name}": value for name, value in weights.items()}
    if layout == "bare_wan":
        source = {diffusers_to_wan(f"{name.split('.lora_')[0]}.weight").removesuffix("weight") + "lora_" +
                  name.split(".lora_")[1]: value for name, value in weights.items()}  # fmt: skip
    elif layout == "peft":
        halved = {f"base_model.model.{name}": value * 0.5 ** name.count("lora_B") for name, value in weights.items()}
        save_file(halved, tmp_path / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
        source = tmp_path
    elif layout != "diffusers":

        def wan(name):
            layer, _, rest = name.partition(".lora_")
            return f"{diffusers_to_wan(layer + '.weight').removesuffix('.weight')}.lora_{rest}"

        source = {f"diffusion_model.{wan(name)}": value for name, value in weights.items()}
    if layout == "longlive":
        names = {name: name.replace("diffusion_model.", "base_model.model.model.").replace(".weight", ".default.weight")
                 for name in source}  # fmt: skip
        torch.save({"generator_lora": {names[k]: v for k, v in source.items()}}, tmp_path / "lora.pt")
        source = tmp_path / "lora.pt"
    pipe.load_lora_weights(source, adapter_name="style")
    own = {name: value for name, value in pipe.transformer.state_dict().items() if ".lora_" in name}
    assert len(own) == len(weights)
    for name, value in weights.items():
        assert torch.equal(own[name.removesuffix("weight") + "style.weight"], value)
    styled = pipe(PROMPT, num_frames=5).frames
    assert not same(styled, plain)
    pipe.set_adapters("style", 0.0)
    assert np.abs(pipe(PROMPT, num_frames=5).frames - plain).max() < 1e-5
    pipe.set_adapters("style", 1.0)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert np.abs(pipe(PROMPT, num_frames=5).frames - styled).max() < 1e-4


def test_what_is_no_lora_is_named(pipe, tmp_path):
    torch.save({"generator": 1}, tmp_path / "lora.pt")
    save_file({"head.weight": torch.zeros(1)}, tmp_path / "lora.safetensors")
    for name, message in (("lora.pt", "no entry `generator_lora`"), ("lora.safetensors", "head.weight is no LoRA")):
        with pytest.raises(CheckpointError, match=message):
            pipe.load_lora_weights(tmp_path / name)


def test_loras_of_a_config_are_fused(pipe, bundle, tmp_path):
    own = pipe.transformer.state_dict()
    weights = lora_weights(pipe)
    save_file({f"transformer.{name}": value for name, value in weights.items()}, tmp_path / "style.safetensors")
    (tmp_path / "tiny.yaml").write_text(tiny.CONFIG, encoding="utf-8")
    entries = f"model.lora=[{tmp_path}/style.safetensors,{tmp_path}/style.safetensors:0.5]"
    config = load_config(str(tmp_path / "tiny.yaml"), [f"model.bundle={bundle}", entries])
    fused = load_pipeline(config, Runtime(torch.device("cpu"), torch.float32)).transformer.state_dict()
    assert fused.keys() == own.keys()
    for layer in ("blocks.0.attn1.to_q", "blocks.1.attn2.to_v"):
        update = weights[f"{layer}.lora_B.weight"] @ weights[f"{layer}.lora_A.weight"]
        torch.testing.assert_close(fused[f"{layer}.weight"], own[f"{layer}.weight"] + 1.5 * update)
