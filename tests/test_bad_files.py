"""Files of a model, of data and of checkpoints that are not what they should be: one line that names the file."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import CONFIG

from model.weights import CheckpointError, check_weights, load_weights, read_weights
from pipeline.bundle import check_bundle, transformer_settings
from pipeline.data.clips import LatentClips
from pipeline.data.shards import ShardWriter
from pipeline.load import load_text_encoder, load_transformer, load_vae
from pipeline.train.checkpoints import read_info
from utils.config import ConfigError
from utils.distributed import World
from utils.load_config import load_config

CPU, VAE, DIT = torch.device("cpu"), "vae/config.json", "transformer/config.json"


@pytest.fixture
def bundle(bundle, tmp_path):
    return shutil.copytree(bundle, tmp_path / "bundle")


def config_of(bundle: Path):
    (bundle.parent / "config.yaml").write_text(CONFIG)
    return load_config(bundle.parent / "config.yaml", [f"model.bundle={bundle}"])


def change_json(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")


def refused(work, *expected: str) -> None:
    with pytest.raises(ConfigError) as raised:
        work()
    message = str(raised.value)
    assert "\n" not in message and all(part in message for part in expected), message


@pytest.mark.parametrize(
    ("file", "values", "expected"),
    [
        (VAE, {"latents_mean": [0.0] * 3}, "latents_mean is not a list of 4"),
        (VAE, {"latents_std": [0.0, 1.0, float("nan"), 1.0]}, "latents_std is not a list of 4"),
        (VAE, {"latents_mean": "none"}, "latents_mean is not a list"),
        (VAE, {"z_dim": "many"}, "z_dim"),
        (VAE, {"z_dim": -4}, "z_dim"),
        (VAE, {"scale_factor_spatial": 0}, "scale_factor_spatial"),
        (DIT, {"num_layers": "two"}, "num_layers"),
        (DIT, {"num_layers": -1}, "num_layers` is -1: must lie in"),
        (DIT, {"in_channels": 10**9}, "in_channels` is 1000000000: must lie in"),
        (DIT, {"eps": float("nan")}, "eps` is nan: must lie in"),
        (DIT, {"ffn_dim": None}, "ffn_dim"),
        (DIT, {"patch_size": [1, 4, 4]}, "patch_size must be [1, 2, 2]"),
        ("text_encoder/config.json", {"d_model": "wide"}, "text encoder is wide wide"),
    ],
)
def test_a_model_of_impossible_shape_is_refused_before_it_is_loaded(bundle, file, values, expected):
    check_bundle(config_of(bundle))
    change_json(bundle / file, **values)
    refused(lambda: check_bundle(config_of(bundle)), expected)


@pytest.mark.parametrize("text", ["", "[1, 2]", "{", "5", "\ufeff{}", "[" * 100_000])
@pytest.mark.parametrize("file", [VAE, DIT])
def test_broken_json_is_refused(bundle, file, text):
    (bundle / file).write_text(text)
    refused(lambda: check_bundle(config_of(bundle)), file)


def rewrite(file: Path, dtype: torch.dtype) -> str:
    """Give one weight of `file` another dtype; returns its name."""
    weights = load_file(file)
    name = sorted(weights)[0]
    weights[name] = weights[name].to(dtype)
    save_file(weights, file, metadata={"format": "pt"})
    return name


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_weights_that_are_no_floating_point_numbers_are_refused(bundle, part, dtype):
    (file,) = (bundle / part).glob("*.safetensors")
    name = rewrite(file, dtype)
    refused(lambda: check_bundle(config_of(bundle)), str(file), name, "floating-point")
    load = {"transformer": lambda config: load_transformer(config),
            "vae": lambda config: load_vae(config, CPU, torch.float32),
            "text_encoder": lambda config: load_text_encoder(config, CPU, torch.float32)}[part]  # fmt: skip
    refused(lambda: load(config_of(bundle)), name)


def test_whole_numbers_in_a_pickled_checkpoint_are_refused(bundle, tmp_path):
    model = load_transformer(config_of(bundle))
    weights = {name: x.clone() for name, x in model.state_dict().items()}
    weights["proj_out.bias"] = weights["proj_out.bias"].to(torch.int32)
    torch.save({"generator": weights}, tmp_path / "x.pt")
    refused(lambda: load_weights(model, read_weights(tmp_path / "x.pt"), "x.pt"), "whole or complex", "proj_out.bias")


@pytest.mark.parametrize("damage", [lambda b: b[:-100], lambda b: b"", lambda b: b"\xff" * 8 + b[8:], lambda b: b[:5]])
def test_damaged_weights_are_refused_by_their_header(bundle, damage):
    (file,) = (bundle / "transformer").glob("*.safetensors")
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(CheckpointError, match="not a safetensors file, or cut short"):
        check_weights(bundle / "transformer")


@pytest.mark.parametrize("values", [{"dim_mult": "x"}, {"base_dim": 0}, {"temperal_downsample": 5}])
def test_a_vae_that_cannot_be_built_is_refused(bundle, values):
    change_json(bundle / VAE, **values)
    refused(lambda: load_vae(config_of(bundle), CPU, torch.float32), str(bundle / "vae"))


@pytest.mark.parametrize("text", ["{}", "[]", "{", '{"model": {"type": "x"}}'])
def test_a_tokenizer_that_cannot_be_read_is_refused(bundle, text):
    (bundle / "tokenizer" / "tokenizer.json").write_text(text)
    refused(lambda: load_text_encoder(config_of(bundle), CPU, torch.float32), str(bundle / "tokenizer"))


def test_training_reads_shapes_as_inference_does(bundle):
    change_json(bundle / DIT, num_attention_heads=0)
    refused(lambda: transformer_settings(config_of(bundle)), "num_attention_heads` is 0: must lie in")


@pytest.mark.parametrize("change", [{"shards": "two"}, {"shards": -1}, {"shards": 1.5}, {"kind": 5}, {"format": None}])
def test_a_broken_plan_is_refused(tmp_path, change):
    writer = ShardWriter(tmp_path, "clips", {"vae": "x"}, 1, World())
    writer.write(0, {"latents": torch.zeros(1, 2)}, [{"caption": "c"}])
    assert LatentClips(tmp_path).captions == ["c"]
    change_json(tmp_path / "plan.json", **change)
    refused(lambda: LatentClips(tmp_path), str(tmp_path))


@pytest.mark.parametrize("records", [["c"], [{}], [5], "c", 5, None])
def test_broken_records_are_refused(tmp_path, records):
    writer = ShardWriter(tmp_path, "clips", {}, 1, World())
    writer.write(0, {"latents": torch.zeros(1, 2)}, records)
    refused(lambda: LatentClips(tmp_path), str(tmp_path))


def test_a_plan_that_lacks_what_is_asked_for_says_so(tmp_path):
    ShardWriter(tmp_path, "clips", {}, 1, World()).write(0, {"latents": torch.zeros(1, 2)}, [{"caption": "c"}])
    refused(lambda: LatentClips(tmp_path).made_by["vae"], "has no `vae`")


@pytest.mark.parametrize("text", ["[]", "{}", "5", "{", '{"step": 1, "stage": "dmd"}'])
def test_broken_info_of_a_checkpoint_is_refused(tmp_path, text):
    (tmp_path / "info.json").write_text(text)
    refused(lambda: read_info(tmp_path), str(tmp_path), "info.json")
