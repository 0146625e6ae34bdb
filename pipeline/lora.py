"""LoRA files as diffusers' Wan loader takes them: also those in `.pt` files with `generator_lora`.

LongLive (arXiv 2509.22622) stores peft's own names over Wan2.1's layout behind that key.
"""

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from model.convert import strip_prefixes, wan_to_diffusers
from model.weights import PICKLE_SUFFIXES, CheckpointError, read_pickle

ENTRY = "generator_lora"
_PEFT_PREFIX, _ADAPTER = "base_model.model.", ".default."


def read_lora(source: str | Path | dict[str, torch.Tensor]) -> Any:
    """What `load_lora_weights` of diffusers takes; a path or a dictionary in its own layouts is passed on as it is.

    Raises `CheckpointError` for a `.pt` file without LoRA weights, or with names that no Wan model has.
    """
    if isinstance(source, dict):
        return source
    if Path(source).suffix not in PICKLE_SUFFIXES:
        return str(source)
    content = read_pickle(Path(source))
    weights = content.get(ENTRY, content)
    if not weights or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise CheckpointError(f"LoRA {source}: has no entry `{ENTRY}` and is no state dict of LoRA weights")
    return {_diffusers_name(name, source): value for name, value in weights.items()}


def _diffusers_name(name: str, source: str | Path) -> str:
    """`base_model.model.model.blocks.0.self_attn.q.lora_A.default.weight` -> `transformer.blocks.0.attn1.to_q...`"""
    plain = strip_prefixes(name.replace(_PEFT_PREFIX, "").replace(_ADAPTER, ".").removeprefix("transformer."))
    layer, found, rest = plain.partition(".lora_")
    if not found:
        raise CheckpointError(f"LoRA {source}: {name} is no LoRA weight")
    with suppress(KeyError):  # diffusers' own names already, or one that the loader will name
        layer = wan_to_diffusers(f"{layer}.weight").removesuffix(".weight")
    return f"transformer.{layer}.lora_{rest}"
