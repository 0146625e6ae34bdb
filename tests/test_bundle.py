"""Bundle folders: round trip, strictness, and what is found out before any model is loaded."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.convert import diffusers_to_wan
from model.weights import CheckpointError
from pipeline.bundle import check_bundle, transformer_settings, vae_shape_of, write_model_index
from pipeline.generate.pipeline import PackForcingPipeline
from pipeline.load import load_text_encoder, load_transformer, load_vae, place
from tests import tiny
from utils.config import ConfigError
from utils.load_config import load_config

CPU = torch.device("cpu")
SHIPPED = Path(__file__).parent.parent / "bundles"


@pytest.fixture
def bundle(bundle, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(bundle, tmp_path / "bundle")


@pytest.fixture
def configure(bundle, tmp_path):
    (tmp_path / "config.yaml").write_text(tiny.CONFIG)
    return lambda *overrides: load_config(tmp_path / "config.yaml", [f"model.bundle={bundle}", *overrides])


def edit(path, **changes):
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def weights_of(bundle):
    return load_file(bundle / "transformer" / "diffusion_pytorch_model.safetensors")


def test_round_trip(configure, bundle):
    config = configure()
    check_bundle(config)
    parts = {"transformer", "vae", "text_encoder", "tokenizer", "scheduler"}
    assert {path.name for path in bundle.iterdir()} == parts | {"model_index.json"}
    model = load_transformer(config)
    expected = weights_of(bundle)
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in expected.items())
    assert load_vae(config, CPU, torch.float32).config.z_dim == 4
    tokenizer, encoder = load_text_encoder(config, CPU, torch.float32)
    assert tokenizer.decode(tokenizer("a red circle").input_ids) == "a red circle </s>"
    assert encoder.config.d_model == 16


@pytest.mark.parametrize(("name", "config"), [("tiny", "demo"), ("tiny_ar", "ar_demo")])
def test_shipped_bundles_are_what_their_configs_say(name, config):
    pipe = PackForcingPipeline.from_pretrained(SHIPPED / name)
    config = load_config(f"configs/tiny/{config}.yaml", [f"model.bundle={SHIPPED / name}", "model.checkpoint=null"])
    assert (pipe.cache_config, pipe.video_config, pipe.sampler_config) == (config.cache, config.video, config.sampler)
    check_bundle(config)
    expected = weights_of(SHIPPED / name)
    for model in (pipe.transformer, load_transformer(config)):
        state = model.state_dict()
        assert state.keys() <= expected.keys() and all(torch.equal(state[key], expected[key]) for key in state)
    assert load_vae(config, CPU, torch.float32).config.z_dim == pipe.vae.config.z_dim
    assert sum(file.stat().st_size for file in (SHIPPED / name).rglob("*")) < 24e6


def test_parts_of_another_bundle(bundle, tmp_path):
    part = tmp_path / "part"
    shutil.copytree(bundle / "transformer", part / "transformer")
    write_model_index(part, load_config("configs/tiny/demo.yaml", ["cache.top_k=3"]), "../bundle")
    pipe = PackForcingPipeline.from_pretrained(part)
    assert pipe.cache_config.top_k == 3 and pipe.vae.config.z_dim == 4
    (bundle / "tokenizer" / "tokenizer_config.json").unlink()
    with pytest.raises(ConfigError, match="part has no tokenizer/tokenizer_config.json"):
        check_bundle(load_config("configs/tiny/demo.yaml", [f"model.bundle={part}"]))


def test_the_shape_is_the_bundles_and_the_chunk_is_the_configs(configure):
    settings = transformer_settings(configure("video.frames_per_chunk=1", "inference.num_output_frames=4"))
    assert (settings["num_layers"], settings["text_len"], settings["frames_per_chunk"]) == (2, 12, 1)


def test_shape_from_the_config_where_the_bundle_has_no_transformer(configure, bundle, tmp_path):
    (bundle / "transformer").rename(tmp_path / "elsewhere")
    shape = [f"model.{key}={value}" for key, value in {
        "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "text_dim": 16,
        "text_len": 12, "freq_dim": 16, "ffn_dim": 32, "checkpoint": tmp_path / "elsewhere",
    }.items()]  # fmt: skip
    config = configure(*shape)
    check_bundle(config)
    assert len(load_transformer(config).blocks) == 2


def test_pt_checkpoint_of_the_seed_replaces_the_transformer(configure, bundle, tmp_path):
    doubled = {name: 2 * tensor for name, tensor in weights_of(bundle).items()}
    raw = {f"model.{diffusers_to_wan(name)}": tensor for name, tensor in doubled.items()}
    torch.save({"generator_ema": raw}, tmp_path / "model.pt")
    config = configure(f"model.checkpoint={tmp_path / 'model.pt'}", "model.use_ema=true")
    loaded = load_transformer(config).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in doubled.items())


def test_a_missing_compressor_is_initialised_and_said_so(configure, bundle, tmp_path, caplog):
    kept = {name: tensor for name, tensor in weights_of(bundle).items() if not name.startswith("pack_compressor.")}
    save_file(kept, tmp_path / "x.safetensors")
    config = configure(f"model.checkpoint={tmp_path / 'x.safetensors'}")
    torch.manual_seed(1)
    first = load_transformer(config)
    assert "has no compressor: pack_compressor is initialised at random (seed 0)" in caplog.text
    torch.manual_seed(2)
    second = load_transformer(config)
    for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
        assert a.device == CPU and torch.equal(a, b), name  # by the config's seed, not the global state
    assert first.pack_compressor.net[0].weight.std() > 0


def test_half_a_compressor_is_an_error(configure, bundle, tmp_path):
    weights = weights_of(bundle)
    del weights["pack_compressor.net.0.bias"]
    save_file(weights, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="missing pack_compressor.net.0.bias"):
        load_transformer(configure(f"model.checkpoint={tmp_path / 'x.safetensors'}"))


def test_an_unused_compressor_is_left_out_and_said_so(configure, caplog):
    caplog.set_level(logging.INFO)
    assert load_transformer(configure("cache.compressor.kind=identity")).pack_compressor is None
    assert "its compressor (6 tensors) is not used" in caplog.text


def test_random_init_depends_on_the_seed_alone(configure):
    shape = ["model.random_init=true", "model.num_layers=1", "model.num_attention_heads=2", "model.ffn_dim=8"]
    a, b, c = (load_transformer(configure(*shape, f"seed={seed}")).proj_out.weight for seed in (3, 3, 4))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_place_keeps_what_wan_needs_in_float32(configure):
    model = place(load_transformer(configure()), CPU, torch.bfloat16)
    assert model.dtype == model.proj_out.weight.dtype == torch.bfloat16
    assert model.scale_shift_table.dtype == torch.float32


def test_vae_shape(bundle):
    edit(bundle / "vae" / "config.json", scale_factor_spatial=None)  # left out by older configs
    shape = vae_shape_of(bundle / "vae")
    assert (shape.channels, shape.temporal_stride, shape.spatial_stride) == (4, 4, 8)
    assert shape.frames(1) == 1 and shape.frames(21) == 81
    assert [shape.latent_frames(frames) for frames in (1, 2, 5, 6, 81)] == [1, 2, 2, 3, 21]


@pytest.mark.parametrize("name", ["vae", "text_encoder", "tokenizer"])
def test_missing_part_says_where_to_get_it(configure, bundle, tmp_path, name):
    (bundle / name).rename(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=f"has no {name}/.*hf download Wan-AI/Wan2.1-T2V-1.3B-Diffusers"):
        check_bundle(configure())


def test_missing_bundle_and_checkpoint(configure, tmp_path):
    with pytest.raises(ConfigError, match="does not exist.*hf download"):
        check_bundle(configure(f"model.bundle={tmp_path / 'none'}"))
    with pytest.raises(ConfigError, match="`model.bundle` is not set"):
        check_bundle(configure("model.bundle=null"))
    with pytest.raises(ConfigError, match="hf download zhuhz22/Causal-Forcing chunkwise/causal_ode.pt"):
        check_bundle(configure(f"model.checkpoint={tmp_path / 'causal_ode.pt'}"))
    with pytest.raises(ConfigError, match="other.pt does not exist"):
        check_bundle(configure(f"model.checkpoint={tmp_path / 'other.pt'}"))


def test_missing_transformer(configure, bundle, tmp_path):
    (bundle / "transformer").rename(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="no transformer/ .*--checkpoint_path.*hf download"):
        check_bundle(configure())


@pytest.mark.parametrize(
    "part, change, message",
    [
        ("vae", {"z_dim": 1, "latents_mean": [0], "latents_std": [1]}, "the VAE has 1 latent channels, .* 4"),
        ("text_encoder", {"d_model": 4096}, "the text encoder is 4096 wide, the transformer expects 16"),
        ("vae", {"scale_factor_spatial": 16}, "`video.width` is 48: must be a multiple of 32"),
    ],
)
def test_sizes_that_do_not_go_together(configure, bundle, part, change, message):
    edit(bundle / part / "config.json", **change)
    with pytest.raises(ConfigError, match=message):
        check_bundle(configure())


@pytest.mark.parametrize(
    "part, load", [("vae", load_vae), ("text_encoder", load_text_encoder)], ids=["vae", "text_encoder"]
)
def test_library_models_load_strictly(configure, bundle, part, load):
    file = next((bundle / part).glob("*.safetensors"))
    weights = load_file(file)
    name = sorted(weights)[0]
    tensor = weights.pop(name)
    save_file({**weights, "bogus": tensor}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="does not fit .*: 1 missing_keys, first"):
        load(configure(), CPU, torch.float32)
    file.write_bytes(b"no")
    with pytest.raises(CheckpointError, match=f"{part}/.*: not a "):
        load(configure(), CPU, torch.float32)
