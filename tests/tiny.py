"""A bundle of random models, small enough to generate a video in a second."""

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler

from model.causal_wan import CausalWanModel
from pipeline.generate.pipeline import PackForcingPipeline
from pipeline.text import small_text_encoder, sprite_tokenizer

HEIGHT, WIDTH, TEXT_LEN = 32, 48, 12

CONFIG = f"""
video: {{height: {HEIGHT}, width: {WIDTH}, fps: 16, frames_per_chunk: 2, trained_frames: 10}}
cache: {{sink: 1, recent: 1, top_k: 1, compressor: {{channels: [4, 8]}}}}
sampler: {{steps: [1000, 500], shift: 3.0}}
inference: {{num_output_frames: 4, device: cpu, dtype: float32, threads: 1}}
"""

STORIES = ["video.frames_per_chunk=3", "video.trained_frames=12", "inference.num_output_frames=3"]  # as they are cut


def vae() -> AutoencoderKLWan:
    return AutoencoderKLWan(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        in_channels=12,
        out_channels=12,
        patch_size=2,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )


def transformer(**settings) -> CausalWanModel:
    shape = {
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 16,
        "text_len": TEXT_LEN,
        "freq_dim": 16,
        "ffn_dim": 32,
        "frames_per_chunk": 2,
        "compressor_channels": (4, 8),
    }
    return CausalWanModel(**{**shape, **settings})


def write_bundle(folder: Path, seed: int = 0) -> Path:
    """Write the bundle and return its folder."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = sprite_tokenizer()
        text_encoder = small_text_encoder(len(tokenizer), text_dim=16, num_layers=1, num_heads=2)
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        video = {"height": HEIGHT, "width": WIDTH, "frames_per_chunk": 2}
        pipe = PackForcingPipeline(tokenizer, text_encoder, vae(), scheduler, transformer(), video=video)
        pipe.save_pretrained(folder)
    return folder


def write_world(folder: Path) -> Path:
    """A bundle, and beside it a config that names it."""
    write_bundle(folder / "bundle")
    (folder / "config.yaml").write_text(CONFIG + f"model: {{bundle: {folder / 'bundle'}}}\n")
    return folder
