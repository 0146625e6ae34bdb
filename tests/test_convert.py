"""Wan2.1 <-> diffusers parameter names."""

from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors import safe_open

from model.convert import diffusers_to_wan, is_wan_layout, strip_prefixes, wan_to_diffusers

COMPRESSOR = [f"pack_compressor.net.{i}.{kind}" for i in (0, 2, 4, 6) for kind in ("weight", "bias")]


@pytest.fixture(scope="module")
def diffusers_names():
    with torch.device("meta"):
        model = WanTransformer3DModel(num_layers=12, num_attention_heads=2, attention_head_dim=12, ffn_dim=8)
    return list(model.state_dict())


def test_covers_the_diffusers_model_and_is_bijective(diffusers_names):
    wan = [diffusers_to_wan(name) for name in diffusers_names]
    assert len(set(wan)) == len(diffusers_names)
    assert [wan_to_diffusers(name) for name in wan] == diffusers_names


def test_agrees_with_diffusers_own_converter(diffusers_names):
    wan = {diffusers_to_wan(name): torch.empty(0) for name in diffusers_names}
    ours = {wan_to_diffusers(name) for name in wan}
    assert set(convert_wan_transformer_to_diffusers(dict(wan))) == ours


def test_covers_recorded_wan_weights():
    with safe_open(Path(__file__).parent / "data" / "golden" / "wan_weights.safetensors", "pt") as file:
        wan = list(file.keys())
    assert len(wan) == 96 and is_wan_layout(wan)
    assert [diffusers_to_wan(wan_to_diffusers(name)) for name in wan] == wan


@pytest.mark.parametrize("name", COMPRESSOR)
def test_compressor_keeps_its_name(name):
    assert wan_to_diffusers(name) == diffusers_to_wan(name) == name


@pytest.mark.parametrize(
    "name", ["blocks.0.self_attn.k_img.weight", "blocks.x.modulation", "blocks.0.norm1.weight", "lm_head.weight", ""]
)
def test_names_of_something_else_raise(name):
    with pytest.raises(KeyError):
        wan_to_diffusers(name)


def test_the_two_layouts_do_not_accept_each_other(diffusers_names):
    shared = {"patch_embedding.weight", "patch_embedding.bias"}
    for name in set(diffusers_names) - shared:
        with pytest.raises(KeyError):
            wan_to_diffusers(name)


def test_layout_detection(diffusers_names):
    assert not is_wan_layout(diffusers_names)
    assert not is_wan_layout(COMPRESSOR)
    assert is_wan_layout(diffusers_to_wan(name) for name in diffusers_names)


@pytest.mark.parametrize(
    "prefixed",
    [
        "model.blocks.0.modulation",
        "model._fsdp_wrapped_module.blocks.0._fsdp_wrapped_module._checkpoint_wrapped_module.modulation",
        "generator.model._orig_mod.blocks.0.modulation",
        "module.model.blocks.0._orig_mod.modulation",
        "model.diffusion_model.blocks.0.modulation",
        "blocks.0.modulation",
    ],
)
def test_prefixes_are_stripped(prefixed):
    assert strip_prefixes(prefixed) == "blocks.0.modulation"
