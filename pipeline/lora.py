"""LoRA files as diffusers' Wan loader takes them: also peft's own, and `.pt` files with `generator_lora`.

LongLive (arXiv 2509.22622) stores peft's names over Wan2.1's layout behind that key.
"""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from model.convert import strip_prefixes, wan_to_diffusers
from model.weights import PICKLE_SUFFIXES, CheckpointError, read_pickle, read_safetensors

ENTRY = "generator_lora"
_PEFT_FILE, _PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PEFT_PREFIX, _ADAPTER = "base_model.model.", ".default."
_KNOWN_TO_DIFFUSERS = ("transformer.", "diffusion_model.", "lora_unet_")


def read_lora(source: str | Path | dict[str, torch.Tensor]) -> Any:
    """What `load_lora_weights` of diffusers takes; what it knows itself, hub ids among it, is passed on as it is.
    Raises `CheckpointError` for a file without LoRA weights, or with names that no Wan model has."""
    weights, scale = source, 1.0
    if not isinstance(source, dict):
        path = Path(source)
        if (path / _PEFT_FILE).is_file():
            path /= _PEFT_FILE
        if not path.is_file():
            return str(source)
        weights = read_pickle(path) if path.suffix in PICKLE_SUFFIXES else read_safetensors(path)
        weights, scale = weights.get(ENTRY, weights), _peft_scale(path.parent / _PEFT_CONFIG)
    if not weights or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise CheckpointError(f"LoRA {source}: has no entry `{ENTRY}` and is no state dict of LoRA weights")
    if any(name.startswith(_KNOWN_TO_DIFFUSERS) for name in weights):
        return source if isinstance(source, dict) or path.suffix == ".safetensors" else weights
    scales = {name: scale if ".lora_B." in name else 1.0 for name in weights}
    return {_diffusers_name(name, source): value * scales[name] for name, value in weights.items()}


def _peft_scale(config: Path) -> float:
    """By which peft multiplies the product of both matrices, as its file beside the weights says; else 1."""
    if not config.is_file():
        return 1.0
    settings = json.loads(config.read_text(encoding="utf-8"))
    return settings["lora_alpha"] / settings["r"] ** (0.5 if settings.get("use_rslora") else 1.0)


def _diffusers_name(name: str, source: Any) -> str:
    """`base_model.model.model.blocks.0.self_attn.q.lora_A.default.weight` -> `transformer.blocks.0.attn1.to_q...`"""
    plain = strip_prefixes(name.replace(_PEFT_PREFIX, "").replace(_ADAPTER, "."))
    layer, found, rest = plain.partition(".lora_")
    if not found:
        source = "given as a dictionary" if isinstance(source, dict) else source
        raise CheckpointError(f"LoRA {source}: {name} is no LoRA weight")
    with suppress(KeyError):  # diffusers' own names already, or one that the loader will name
        layer = wan_to_diffusers(f"{layer}.weight").removesuffix(".weight")
    return f"transformer.{layer}.lora_{rest}"
