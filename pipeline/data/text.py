"""Prompt embeddings computed once and stored, so that training needs no text encoder.

Format: `pipeline/data/shards.py`; `embeddings` bfloat16 [sum of lengths, text_dim], each as long as its prompt, `ends`
int64 [prompts], and the prompts as records. More can be added at any time.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

from model.weights import content_hash
from pipeline.bundle import transformer_settings
from pipeline.data.shards import Shards, ShardWriter, shard_number, shard_paths
from pipeline.load import load_text_encoder
from pipeline.sources import part_folder
from pipeline.text import encode_tokens, tokenized
from utils.config import Config, ConfigError, require
from utils.distributed import World, barrier

TEXT, COMMAND = "text", "python -m scripts.prepare_data"
SHARD_PROMPTS = 256  # 0.2 GB of a Wan-sized encoder's


class TextEmbeddings:
    """A folder of embeddings by prompt; an embedding is read when it is asked for.

    Attributes:
        text_len: tokens at which prompts were cut.
        text_dim: width.
    """

    def __init__(self, folder: str | Path):
        """Raises `ConfigError` for a folder that is absent or broken."""
        self.folder = Path(folder)
        self._shards = Shards(folder, TEXT, f"{COMMAND} data.text_embeddings={folder}")
        self.text_len, self.text_dim = self._shards.plan["text_len"], self._shards.plan["text_dim"]
        self._place = {prompt: index for index, prompt in enumerate(self._shards.records)}

    def __len__(self) -> int:
        return len(self._place)

    def missing(self, prompts: Iterable[str]) -> list[str]:
        """Those that have no embedding, each once, in order."""
        return [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._place]

    def require(self, prompts: Iterable[str]) -> None:
        """Raise `ConfigError` naming the first prompt that has no embedding."""
        if missing := self.missing(prompts):
            raise ConfigError(
                f"setting `data.text_embeddings` is {self.folder}: {len(missing)} prompts are not among its "
                f"{len(self)}, the first is {missing[0]!r}; add them with {COMMAND}"
            )

    def __getitem__(self, prompt: str) -> torch.Tensor:
        """bfloat16 [length, text_dim]. Raises `ConfigError` for a prompt that is not there."""
        self.require([prompt])
        return self._shards[self._place[prompt]]["embeddings"]

    def check(self) -> dict[str, Any]:
        """Read everything: count, lengths in tokens, and the prompts whose embedding is not finite."""
        tokens = [len(self[prompt]) for prompt in self._place]
        return {
            "prompts": len(self),
            "tokens_mean": sum(tokens) / max(len(tokens), 1),
            "tokens_max": max(tokens, default=0),
            "not_finite": [prompt for prompt in self._place if not self[prompt].isfinite().all()],
        }


@torch.no_grad()
def encode_trimmed(
    tokenizer: PreTrainedTokenizerBase, encoder: UMT5EncoderModel, prompts: Sequence[str], text_len: int
) -> list[torch.Tensor]:
    """`pipeline.text.encode_text` without its zeros: [length, text_dim] per prompt; pads to the longest only."""
    tokens = tokenized(tokenizer, prompts, text_len, "longest").to(encoder.device)
    hidden = encode_tokens(encoder, tokens.input_ids, tokens.attention_mask)  # [B, longest, text_dim]
    return [row[keep.bool()] for row, keep in zip(hidden, tokens.attention_mask, strict=True)]


class EmbeddingWriter:
    """A folder of embeddings that ranks add to.

    Args:
        encoder_hash: of the encoder's weights; a folder holds embeddings of one encoder.

    Raises `ConfigError` where the folder was made with another encoder or length.
    """

    def __init__(self, folder: Path, encoder_hash: str, text_len: int, text_dim: int, world: World):
        plan = {"encoder": encoder_hash, "text_len": text_len, "text_dim": text_dim}
        self._writer = ShardWriter(folder, TEXT, plan, None, world)
        self._next = 1 + max(map(shard_number, shard_paths(folder)), default=-1)
        self.stored = TextEmbeddings(folder)

    def write(self, number: int, prompts: Sequence[str], rows: Sequence[torch.Tensor]) -> None:
        """Add the embeddings [length, text_dim] of `prompts` as new shard `number`, counted from 0 in every rank."""
        tensors = {
            "embeddings": torch.cat(list(rows)).to("cpu", torch.bfloat16),
            "ends": torch.tensor([len(row) for row in rows]).cumsum(0),
        }
        self._writer.write(self._next + number, tensors, list(prompts))


def write_embeddings(
    prompts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    encoder: UMT5EncoderModel,
    encoder_hash: str,
    folder: Path,
    text_len: int,
    batch_size: int,
    world: World,
) -> None:
    """Add what is missing of `prompts`, the ranks taking shards in turn; `batch_size` prompts are encoded at once.

    Raises `ConfigError` as `EmbeddingWriter` does.
    """
    writer = EmbeddingWriter(folder, encoder_hash, text_len, encoder.config.d_model, world)
    missing = writer.stored.missing(prompts)
    barrier(world)  # every rank has listed the same missing prompts before one is written
    shards = [missing[start : start + SHARD_PROMPTS] for start in range(0, len(missing), SHARD_PROMPTS)]
    mine = range(world.rank, len(shards), world.size)
    for number in tqdm(mine, desc="text", unit="shard", disable=not world.is_main):
        rows = []
        for start in range(0, len(shards[number]), batch_size):
            rows += encode_trimmed(tokenizer, encoder, shards[number][start : start + batch_size], text_len)
        writer.write(number, shards[number], rows)


def embed_prompts(config: Config, prompts: Iterable[str], batch_size: int, device: torch.device, world: World) -> None:
    """Add what is missing of `prompts` to `data.text_embeddings`, the ranks taking shards in turn.

    The encoder is that of `train.text_from`, else of `model.bundle`; bfloat16 on CUDA, as at inference, else float32.

    Raises `ConfigError` for settings that are not set, or a folder that another encoder filled.
    """
    require(config, "data.text_embeddings", config.data.text_embeddings, "name the folder to write embeddings to")
    source = config.train.text_from or config.model.bundle
    require(config, "train.text_from", source, "name a folder with text_encoder and tokenizer")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    there = replace(config, model=replace(config.model, bundle=source))
    tokenizer, encoder = load_text_encoder(there, device, dtype)
    encoder_hash = content_hash(part_folder(Path(source), "text_encoder")) if world.is_main else ""
    text_len = transformer_settings(config)["text_len"]
    folder = Path(config.data.text_embeddings)
    write_embeddings(prompts, tokenizer, encoder, encoder_hash, folder, text_len, batch_size, world)
