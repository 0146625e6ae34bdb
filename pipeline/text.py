"""Prompts to embeddings, as Wan does it, and the sprite world's own tokenizer and text encoder.

One function (`encode_text`) serves training, sampling and inference, for the tiny encoder and for UMT5-XXL alike.
"""

import logging
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BatchEncoding, PreTrainedTokenizerBase, PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from utils.sprites.world import COLOURS, MOTIONS, PATTERNS, SHAPES

log = logging.getLogger(__name__)

PAD, EOS, UNKNOWN = "<pad>", "</s>", "<unk>"
SMALL_VOCABULARY = 100  # words that fit a warning


def encode_text(
    tokenizer: PreTrainedTokenizerBase,
    text_encoder: UMT5EncoderModel,
    prompts: Sequence[str],
    text_len: int,
    device: torch.device | None = None,
) -> torch.Tensor:
    """Prompt embeddings as Wan wants them, [len(prompts), text_len, text_dim], on the encoder's device and in its
    dtype: the encoder sees no padding, and past a prompt's end they are zero. Longer prompts are cut. Runs with
    gradient where it is enabled."""
    tokens = tokenized(tokenizer, prompts, text_len, "max_length")
    tokens = tokens.to(device or text_encoder.device)  # an offloaded encoder runs elsewhere than it lies
    return encode_tokens(text_encoder, tokens.input_ids, tokens.attention_mask)


@torch.no_grad()
def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    text_encoder: UMT5EncoderModel,
    prompt: str,
    text_len: int,
    device: torch.device | None = None,
) -> torch.Tensor:
    """[1, n, text_dim], n <= text_len: without the zero padding, which the model puts back. One prompt at a time: in a
    batch the numbers, and so the video, would depend on the other prompts."""
    warn_of_unknown_words(tokenizer, prompt)
    tokens = len(tokenizer(prompt).input_ids)
    if tokens > text_len:
        log.warning("prompt `%s...` has %d tokens: the model reads the first %d", prompt[:40], tokens, text_len)
    padded = encode_text(tokenizer, text_encoder, [prompt], text_len, device)  # [1, text_len, text_dim]
    return padded[:, : max(1, min(tokens, text_len))].clone()


def warn_of_unknown_words(tokenizer: PreTrainedTokenizerBase, prompt: str) -> None:
    """A small vocabulary reads every word that it lacks as the same one."""
    unknown = tokenizer.unk_token_id
    lacking = [word for word in prompt.split() if unknown in tokenizer(word, add_special_tokens=False).input_ids]
    if lacking:
        words = sorted(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens))
        known = f"; it knows {', '.join(words)}" if len(words) < SMALL_VOCABULARY else ""
        log.warning("prompt `%s`: the text encoder does not know %s%s", prompt, ", ".join(lacking), known)


def tokenized(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], text_len: int, padding: str) -> BatchEncoding:
    """input_ids and attention_mask [B, n], n <= text_len, where prompts are cut; `padding` as the tokenizer has it."""
    options = {"truncation": True, "return_attention_mask": True, "return_tensors": "pt"}
    return tokenizer(list(prompts), padding=padding, max_length=text_len, **options)


def encode_tokens(text_encoder: UMT5EncoderModel, input_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """input_ids, mask [B, text_len] -> embeddings [B, text_len, text_dim], zero where `mask` is."""
    hidden = text_encoder(input_ids, attention_mask=mask).last_hidden_state  # [B, text_len, text_dim]
    return hidden * mask[..., None].to(hidden.dtype)


def sprite_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level tokenizer over the words of sprite-world captions; other words are `<unk>`, the end is `</s>`."""
    phrases = [*COLOURS, *SHAPES, "shape", *MOTIONS, *PATTERNS, "a", "over"]
    words = sorted({word for phrase in phrases for word in phrase.split()})
    vocabulary = {token: i for i, token in enumerate((PAD, EOS, UNKNOWN, *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS}", special_tokens=[(EOS, vocabulary[EOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, unk_token=UNKNOWN, padding_side="right"
    )


def small_text_encoder(vocab_size: int, text_dim: int, num_layers: int, num_heads: int) -> UMT5EncoderModel:
    """A fresh UMT5 encoder of width `text_dim`, which the heads must divide."""
    config = UMT5Config(
        vocab_size=vocab_size,
        d_model=text_dim,
        d_kv=text_dim // num_heads,
        d_ff=2 * text_dim,
        num_layers=num_layers,
        num_heads=num_heads,
        relative_attention_num_buckets=16,
        relative_attention_max_distance=32,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
    )
    return UMT5EncoderModel(config)
