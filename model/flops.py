"""FLOPs of a Wan DiT by formula, from its settings: what training logs count and estimates are checked against.

A multiplication and an addition are two. A backward pass costs twice its forward; recomputation under activation
checkpointing is not counted, as usual for MFU. Norms, modulation and the time embedding are left out.
"""

from collections.abc import Mapping
from math import prod
from typing import Any

import torch

# Dense bfloat16 FLOP/s of a device whose name holds the key, from the makers' data sheets.
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "4090": 165e12}


def device_peak(device: torch.device) -> float | None:
    """FLOP/s of a device; None where it is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for key, peak in PEAK.items() if key in name), None)


def forward_flops(config: Mapping[str, Any], tokens: int, keys: float, text_tokens: int) -> dict[str, float]:
    """Of one sample: `matmul` and `attention`.

    Args:
        config: `num_layers`, `num_attention_heads` and so on, as diffusers names them.
        tokens: of the sample that go through the network.
        keys: that each of them attends, on average.
        text_tokens: of the prompt, padding included.
    """
    dim = config["num_attention_heads"] * config["attention_head_dim"]
    layer = tokens * (12 * dim**2 + 4 * dim * config["ffn_dim"]) + text_tokens * 4 * dim**2
    patch = prod(config["patch_size"]) * (config["in_channels"] + (config["out_channels"] or config["in_channels"]))
    ends = 2 * tokens * dim * patch + 2 * text_tokens * dim * (config["text_dim"] + dim)
    attention = 4 * tokens * dim * (keys + text_tokens)
    return {"matmul": config["num_layers"] * layer + ends, "attention": config["num_layers"] * attention}


def clip_keys(chunks: int, chunk_tokens: int) -> float:
    """Keys that a token attends on average in a chunk-causal clip: clean chunks up to its own, or, of the noisy half in
    teacher forcing, clean chunks before its own and that one."""
    return (chunks + 1) / 2 * chunk_tokens
