"""Prompt embeddings computed once and stored, so that training needs no text encoder.

Format: `pipeline/data/shards.py`; `embeddings` bfloat16 [sum of lengths, text_dim], each as long as its prompt, `ends`
int64 [prompts], and the prompts as records. More can be added at any time.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
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
    tokenizer: PreTrainedTokenizerBase, encoder: UMT5EncoderModel, prompts: Sequence[str], text_len: int,
    batch_size: int,
) -> list[torch.Tensor]:  # fmt: skip
    """`pipeline.text.encode_text` without its zeros: [length, text_dim] per prompt. `batch_size` at once are padded to
    the longest only."""
    rows = []
    for start in range(0, len(prompts), batch_size):
        tokens = tokenized(tokenizer, prompts[start : start + batch_size], text_len, "longest").to(encoder.device)
        hidden = encode_tokens(encoder, tokens.input_ids, tokens.attention_mask)  # [B, longest, text_dim]
        rows += [row[keep.bool()] for row, keep in zip(hidden, tokens.attention_mask, strict=True)]
    return rows


def write_embeddings(
    prompts: Iterable[str], encode: Callable[[list[str]], Sequence[torch.Tensor]], encoder_hash: str, folder: Path,
    text_len: int, text_dim: int, world: World,
) -> None:  # fmt: skip
    """Add what is missing of `prompts` to a folder, the ranks taking shards in turn.

    `encode`: prompts -> an embedding [length, text_dim] of each; `encoder_hash`: of the weights behind it, as a folder
    holds embeddings of one encoder. Raises `ConfigError` where the folder was made with another encoder or length.
    """
    plan = {"encoder": encoder_hash, "text_len": text_len, "text_dim": text_dim}
    writer = ShardWriter(folder, TEXT, plan, None, world)
    first = 1 + max(map(shard_number, shard_paths(folder)), default=-1)
    missing = TextEmbeddings(folder).missing(prompts)
    barrier(world)  # every rank has listed the same missing prompts before one is written
    shards = [missing[start : start + SHARD_PROMPTS] for start in range(0, len(missing), SHARD_PROMPTS)]
    mine = range(world.rank, len(shards), world.size)
    for number in tqdm(mine, desc="text", unit="shard", disable=not world.is_main):
        rows = encode(shards[number])
        tensors = {
            "embeddings": torch.cat(list(rows)).to("cpu", torch.bfloat16),
            "ends": torch.tensor([len(row) for row in rows]).cumsum(0),
        }
        writer.write(first + number, tensors, shards[number])


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
    text_len, folder = transformer_settings(config)["text_len"], Path(config.data.text_embeddings)
    encode = partial(encode_trimmed, tokenizer, encoder, text_len=text_len, batch_size=batch_size)
    write_embeddings(prompts, encode, encoder_hash, folder, text_len, encoder.config.d_model, world)
