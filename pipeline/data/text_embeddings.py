"""Prompt embeddings computed once and stored, so that training needs no text encoder.

A folder holds `plan.json`, which encoder made them, and any number of `text-*.safetensors`: `embeddings` bfloat16
[sum of lengths, text_dim], those of a shard's prompts one after the other, each as long as its prompt; `ends` int64
[prompts], where each of them ends; and the prompts themselves, as JSON, in the file's metadata. A shard is named after
its prompts; more can be added at any time.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

from pipeline.data.shards import PLAN, keep_to_plan, write_tensors
from pipeline.text import encode_tokens
from utils.config import ConfigError
from utils.distributed import World, barrier

SHARD_PROMPTS = 256  # 0.2 GB of a Wan-sized encoder's


class TextEmbeddings:
    """A folder of embeddings by prompt. Shards are memory-mapped: an embedding is read when it is asked for.

    Attributes:
        text_len: tokens at which prompts were cut.
        text_dim: width.
    """

    def __init__(self, folder: str | Path):
        """Raises `ConfigError` for a folder that is absent or broken."""
        self.folder = Path(folder)
        if not (self.folder / PLAN).is_file():
            raise ConfigError(
                f"setting `data.text_embeddings` is {folder}: none there; write them with scripts/precompute_text.py"
            )
        made_by = json.loads((self.folder / PLAN).read_text(encoding="utf-8"))
        self.text_len, self.text_dim = made_by["text_len"], made_by["text_dim"]
        self._place: dict[str, tuple[Path, int]] = {}
        self._shards: dict[Path, list[torch.Tensor]] = {}
        for path in sorted(self.folder.glob("text-*.safetensors")):
            try:
                with safe_open(path, framework="pt") as shard:
                    prompts = json.loads(shard.metadata()["prompts"])
            except (OSError, SafetensorError, KeyError, TypeError) as error:
                raise ConfigError(f"{path}: not a shard of text embeddings ({error}); remove it") from error
            self._place |= {prompt: (path, row) for row, prompt in enumerate(prompts)}

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
                f"{len(self)}, the first is {missing[0]!r}; add them with scripts/precompute_text.py"
            )

    def __getitem__(self, prompt: str) -> torch.Tensor:
        """bfloat16 [length, text_dim]. Raises `ConfigError` for a prompt that is not there."""
        self.require([prompt])
        path, row = self._place[prompt]
        if path not in self._shards:
            tensors = load_file(path)
            bounds = pairwise([0, *tensors["ends"].tolist()])
            self._shards[path] = [tensors["embeddings"][start:end] for start, end in bounds]  # views of the file
        return self._shards[path][row]

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
    tokens = tokenizer(
        list(prompts), padding="longest", max_length=text_len, truncation=True, add_special_tokens=True,
        return_attention_mask=True, return_tensors="pt",
    ).to(encoder.device)  # fmt: skip
    hidden = encode_tokens(encoder, tokens.input_ids, tokens.attention_mask)  # [B, longest, text_dim]
    return [row[keep.bool()] for row, keep in zip(hidden, tokens.attention_mask, strict=True)]


def plan_of(encoder: str, text_len: int, text_dim: int) -> dict[str, Any]:
    """What all embeddings of a folder have in common. `encoder`: hash of the weights."""
    return {"encoder": encoder, "text_len": text_len, "text_dim": text_dim}


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
    """Add what is missing of `prompts`, the ranks taking shards in turn.

    Args:
        encoder_hash: of the encoder's weights; a folder holds embeddings of one encoder. The first rank's counts.
        batch_size: prompts encoded at once.

    Raises `ConfigError` where the folder was made with another encoder or length.
    """
    keep_to_plan(folder, plan_of(encoder_hash, text_len, encoder.config.d_model), world)
    missing = TextEmbeddings(folder).missing(prompts)
    barrier(world)  # every rank has listed the same missing prompts before one is written
    shards = [missing[start : start + SHARD_PROMPTS] for start in range(0, len(missing), SHARD_PROMPTS)]
    for shard in tqdm(shards[world.rank :: world.size], desc="text", unit="shard", disable=not world.is_main):
        rows = []
        for start in range(0, len(shard), batch_size):
            rows += encode_trimmed(tokenizer, encoder, shard[start : start + batch_size], text_len)
        write_shard(folder, shard, rows)


def write_shard(folder: Path, prompts: Sequence[str], rows: Sequence[torch.Tensor]) -> None:
    """Add a shard to a folder that has its plan: the embedding [length, text_dim] of each prompt."""
    tensors = {
        "embeddings": torch.cat(list(rows)).to("cpu", torch.bfloat16),
        "ends": torch.tensor([len(row) for row in rows]).cumsum(0),
    }
    listed = json.dumps(list(prompts), ensure_ascii=False)
    name = f"text-{hashlib.sha256(listed.encode()).hexdigest()[:16]}.safetensors"
    write_tensors(folder / name, tensors, {"prompts": listed})
