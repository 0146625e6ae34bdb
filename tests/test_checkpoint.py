"""Reading Wan weights from every form they come in, and refusing what does not fit."""

import json
import pickle

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file

from model.convert import diffusers_to_wan
from model.weights import CheckpointError, cast_weights, content_hash, load_weights, read_weights, weight_files

SETTINGS = {
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 8,
    "freq_dim": 8,
    "ffn_dim": 16,
}


def build(meta=False):
    with init_empty_weights(include_buffers=False) if meta else torch.device("cpu"):
        return WanTransformer3DModel(**SETTINGS)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build()


@pytest.fixture(scope="module")
def weights(model):
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("rope.")}


def in_wan_layout(weights, prefix="", scale=1.0):
    return {prefix + diffusers_to_wan(name): scale * tensor for name, tensor in weights.items()}


def assert_same(read, expected):
    assert read.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(read[name], tensor), name


def test_diffusers_folder(model, weights, tmp_path):
    model.save_pretrained(tmp_path / "transformer")
    assert_same(read_weights(tmp_path / "transformer"), weights)
    assert_same(read_weights(tmp_path), weights)  # the folder above it: a pipeline or a bundle


def test_sharded_diffusers_folder(model, weights, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(weight_files(tmp_path)) > 1
    assert_same(read_weights(tmp_path), weights)
    assert_same(read_weights(tmp_path / "diffusion_pytorch_model.safetensors.index.json"), weights)


def test_original_folder(weights, tmp_path):
    save_file(in_wan_layout(weights), tmp_path / "diffusion_pytorch_model.safetensors")
    assert_same(read_weights(tmp_path), weights)


def test_single_file(weights, tmp_path):
    save_file(in_wan_layout(weights), tmp_path / "wan.safetensors")
    assert_same(read_weights(tmp_path / "wan.safetensors"), weights)


@pytest.mark.parametrize("prefix", ["model.", "model._fsdp_wrapped_module."])
@pytest.mark.parametrize("compressor", [False, True])
def test_pt_file(weights, tmp_path, prefix, compressor):
    raw, averaged = in_wan_layout(weights, prefix), in_wan_layout(weights, prefix, scale=2.0)
    expected = dict(weights)
    if compressor:
        raw[f"{prefix}pack_compressor.net.0.weight"] = torch.ones(3)
        expected["pack_compressor.net.0.weight"] = torch.ones(3)
    torch.save({"generator": raw, "generator_ema": averaged, "step": 7}, tmp_path / "model.pt")
    assert_same(read_weights(tmp_path / "model.pt"), expected)
    doubled = {name: 2 * tensor for name, tensor in weights.items()}
    assert_same(read_weights(tmp_path / "model.pt", use_ema=True), doubled)


def test_pt_file_with_model_entry_or_bare(weights, tmp_path):
    torch.save({"model": in_wan_layout(weights)}, tmp_path / "model.pt")
    assert_same(read_weights(tmp_path / "model.pt"), weights)
    torch.save(weights, tmp_path / "bare.pt")
    assert_same(read_weights(tmp_path / "bare.pt"), weights)


def test_loads_into_a_model_on_the_meta_device(model, weights, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = build(meta=True)
    load_weights(loaded, read_weights(tmp_path), tmp_path)
    assert all(parameter.device.type == "cpu" for parameter in loaded.parameters())
    assert_same(loaded.state_dict(), model.state_dict())


def test_every_misfit_is_named(model, weights):
    wrong = dict(weights)
    for layer in (0, 1):
        for name in ("to_q", "to_k", "to_v"):
            del wrong[f"blocks.{layer}.attn1.{name}.bias"]
    wrong["lm_head.weight"] = torch.zeros(1)
    wrong["proj_out.bias"] = torch.zeros(3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError) as error:
        load_weights(model, wrong, "x.pt")
    message = str(error.value)
    assert "x.pt does not fit the WanTransformer3DModel" in message
    assert "missing blocks.0.attn1.to_q.bias, " in message and "and 2 more" in message
    assert "unexpected lm_head.weight" in message
    assert "misshapen proj_out.bias [3] instead of [16]" in message
    assert "\n" not in message
    assert_same(model.state_dict(), before)  # nothing was loaded by half


def test_bogus_names_in_wan_layout_are_unexpected(model, weights, tmp_path):
    save_file({**in_wan_layout(weights), "blocks.0.self_attn.bogus": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="unexpected blocks.0.self_attn.bogus"):
        load_weights(model, read_weights(tmp_path / "x.safetensors"), "x")


def test_weights_of_something_else(model):
    with pytest.raises(CheckpointError, match="is not one of a WanTransformer3DModel.*encoder.weight"):
        load_weights(model, {"encoder.weight": torch.zeros(1)}, "x")


def write_bytes(path):
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n" * 9)


class Payload:
    def __reduce__(self):
        return print, ("this must never run",)


@pytest.mark.parametrize(
    "name, write, message",
    [
        ("absent.pt", lambda path: None, "does not exist"),
        ("folder", lambda path: path.mkdir(), "holds no weights"),
        ("video.mp4", write_bytes, "unknown kind of file `.mp4`"),
        ("x.safetensors", write_bytes, "not a safetensors file, or cut short"),
        ("x.pt", write_bytes, "not a PyTorch checkpoint, or cut short"),
        ("old.pt", lambda path: path.write_bytes(pickle.dumps({})), "not a PyTorch checkpoint"),
        ("list.pt", lambda path: torch.save([1], path), "holds a list"),
        ("code.pt", lambda path: torch.save({"generator": Payload()}, path), "could run code"),
        ("other.pt", lambda path: torch.save({"optimizer": {}}, path), "no `generator` or `model`, only optimizer"),
        ("ema.pt", lambda path: torch.save({"generator_ema": {}}, path), "--use_ema reads the averaged"),
        ("empty.pt", lambda path: torch.save({}, path), "only nothing"),
        ("m.safetensors.index.json", lambda path: path.write_text("{}"), "no `weight_map`"),
        (
            "n.safetensors.index.json",
            lambda path: path.write_text(json.dumps({"weight_map": {"a": "a.safetensors"}})),
            "a.safetensors of its 1 files are not there",
        ),
    ],
)
def test_wrong_files(tmp_path, name, write, message, capsys):
    write(tmp_path / name)
    with pytest.raises(CheckpointError, match=message) as error:
        read_weights(tmp_path / name)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
    assert "must never run" not in capsys.readouterr().out


def test_ema_of_a_file_without_one(weights, tmp_path):
    torch.save({"generator": weights}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="no `generator_ema`, only generator"):
        read_weights(tmp_path / "x.pt", use_ema=True)
    save_file(weights, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="--use_ema needs a .pt"):
        read_weights(tmp_path / "x.safetensors", use_ema=True)


def test_ambiguous_folder(weights, tmp_path):
    for name in "ab":
        save_file(weights, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match=r"several weight files \(a.safetensors, b.safetensors\)"):
        read_weights(tmp_path)


def test_names_that_collide_without_their_prefixes(tmp_path):
    torch.save({"model.a": torch.zeros(1), "a": torch.zeros(1)}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="two parameters are called a"):
        read_weights(tmp_path / "x.pt")


def test_cast_keeps_what_wan_needs_in_float32(weights):
    model = build()
    cast_weights(model, torch.bfloat16, model._keep_in_fp32_modules)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert dtypes["blocks.0.attn1.to_q.weight"] == dtypes["proj_out.weight"] == torch.bfloat16
    assert dtypes["blocks.0.scale_shift_table"] == dtypes["blocks.1.norm2.weight"] == torch.float32
    assert dtypes["condition_embedder.time_embedder.linear_1.weight"] == torch.float32


def test_content_hash(weights, tmp_path):
    save_file(weights, tmp_path / "a.safetensors")
    (tmp_path / "b").mkdir()
    save_file(weights, tmp_path / "b" / "diffusion_pytorch_model.safetensors")
    assert content_hash(tmp_path / "a.safetensors") == content_hash(tmp_path / "b")
    save_file({**weights, "proj_out.bias": weights["proj_out.bias"] + 1}, tmp_path / "c.safetensors")
    assert content_hash(tmp_path / "c.safetensors") != content_hash(tmp_path / "b")
