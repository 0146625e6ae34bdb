"""Small models and inputs that the tests share."""

import torch

from model.cache.cache import PackCache
from model.causal_wan import CausalWanModel
from utils.choices import CompressedKV
from utils.config import CacheConfig, CompressorConfig

CHANNELS, TEXT_DIM, LATENT = 4, 16, (8, 12)
TRAINED_FRAMES = 21

DIMS = {
    "num_attention_heads": 4,
    "attention_head_dim": 12,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "text_dim": TEXT_DIM,
    "freq_dim": 32,
    "ffn_dim": 64,
    "num_layers": 2,
}


def randomize(module: torch.nn.Module, seed: int) -> None:
    """Weights large enough that every part of the network shows in its output, unlike the usual initialisation."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(1.3 + 0.3 * noise)
            elif parameter.ndim == 1:
                parameter.copy_(0.2 * noise)
            elif "scale_shift_table" in name:
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)


def toy_model(seed: int = 0, **settings) -> CausalWanModel:
    defaults = {"text_len": 7, "frames_per_chunk": 3, "compressor": "hr_spatial", "compressor_channels": (6, 8)}
    model = CausalWanModel(**{**DIMS, **defaults, **settings}).eval()
    randomize(model, seed)
    return model


def toy_config(compressor: str = "hr_spatial", channels=(6, 8), kv: str = "project", **settings) -> CacheConfig:
    """Few enough sampled queries that sampling matters."""
    defaults = {"sink": 1, "recent": 1, "top_k": 2, "min_queries": 5}
    kind = CompressorConfig(kind=compressor, channels=list(channels), kv=CompressedKV(kv))
    return CacheConfig(compressor=kind, **{**defaults, **settings})


def toy_cache(model: CausalWanModel, config: CacheConfig, latent=LATENT, trained=TRAINED_FRAMES) -> PackCache:
    return PackCache.for_model(model, config, *latent, trained_frames=trained)


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def toy_prompt(batch: int = 1, length: int = 5, seed: int = 100) -> torch.Tensor:
    return torch.stack([randn(length, TEXT_DIM, seed=seed + i) for i in range(batch)])


def toy_chunk(index: int, sample: int = 0, kind: int = 0, frames: int = 3, latent=LATENT) -> torch.Tensor:
    """Latents [1, C, frames, H, W] that depend only on (index, sample, kind)."""
    return randn(1, CHANNELS, frames, *latent, seed=1000 * index + 10 * sample + kind)
