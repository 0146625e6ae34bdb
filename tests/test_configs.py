"""Every YAML in configs/ and every prompt file in prompts/ is good, and the seed's config says what the seed's says."""

from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel

from model.causal_wan import CausalWanModel
from pipeline.bundle import transformer_settings
from pipeline.data.prompts import read_prompts
from utils.load_config import load_config
from utils.sprites.world import parse_caption

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
SEED_CONFIG = ROOT / "configs" / "packforcing_dmd_chunkwise_hr_8gpu_sink3_recent2.yaml"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_config_loads(path):
    load_config(path)


def test_seed_config():
    config = load_config(SEED_CONFIG)
    assert (config.video.height, config.video.width, config.video.frames_per_chunk) == (480, 832, 3)
    cache = config.cache
    assert (cache.sink, cache.recent, cache.mid_capacity, cache.top_k) == (3, 2, 16, 16)
    assert cache.selection == "recency" and cache.compressor.channels == [64, 256, 1024]
    assert config.sampler.steps == [1000, 750, 500, 250] and config.sampler.warp and config.sampler.shift == 5


def test_seed_config_is_wan_1_3b():
    config = load_config(SEED_CONFIG, ["model.bundle=null"])
    with torch.device("meta"):
        ours = CausalWanModel(**transformer_settings(config))
        wan = WanTransformer3DModel(
            num_attention_heads=12, attention_head_dim=128, in_channels=16, out_channels=16, text_dim=4096,
            freq_dim=256, ffn_dim=8960, num_layers=30,
        )  # fmt: skip
    shapes = {name: parameter.shape for name, parameter in wan.named_parameters()}
    extra = {name: p.shape for name, p in ours.named_parameters() if not name.startswith("pack_compressor.")}
    assert extra == shapes
    assert sum(shape.numel() for shape in shapes.values()) == 1_418_996_800
    assert ours.pack_compressor.net[6].weight.shape == (1536, 1024, 1, 1, 1)


@pytest.mark.parametrize("name", ["tiny.txt", "tiny_demo.txt"])
def test_tiny_prompts_are_sprite_world_captions(name):
    prompts = read_prompts(ROOT / "prompts" / name)
    assert len(set(prompts)) == len(prompts) >= 2
    for prompt in prompts:
        parse_caption(prompt)


def test_demo_prompts_are_a_dozen():
    assert len(set(read_prompts(ROOT / "prompts" / "demos.txt"))) == 12
