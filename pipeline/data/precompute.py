"""Embed prompts once, with the text encoder that training would load, for `data.text_embeddings`."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch

from model.weights import content_hash
from pipeline.bundle import load_text_encoder, transformer_settings
from pipeline.data.text_embeddings import write_embeddings
from utils.config import Config, ConfigError
from utils.distributed import World


def embed_prompts(
    config: Config, prompts: Iterable[str], batch_size: int, device: torch.device, world: World
) -> None:
    """Add what is missing of `prompts` to `data.text_embeddings`, the ranks taking shards in turn.

    The encoder is that of `train.text_from`, else of `model.bundle`; bfloat16 on CUDA, as at inference, else float32.

    Raises `ConfigError` for settings that are not set, or a folder that another encoder filled.
    """
    if config.data.text_embeddings is None:
        raise ConfigError("setting `data.text_embeddings` is not set: name the folder to write embeddings to")
    if batch_size < 1:
        raise ConfigError(f"the batch size is {batch_size}: must be at least 1")
    source = config.train.text_from or config.model.bundle
    if source is None:
        raise ConfigError("setting `train.text_from` is not set: name a folder with text_encoder and tokenizer")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    there = replace(config, model=replace(config.model, bundle=source))
    tokenizer, encoder = load_text_encoder(there, device, dtype)
    encoder_hash = content_hash(Path(source) / "text_encoder") if world.is_main else ""
    text_len = transformer_settings(config)["text_len"]
    folder = Path(config.data.text_embeddings)
    write_embeddings(prompts, tokenizer, encoder, encoder_hash, folder, text_len, batch_size, world)
