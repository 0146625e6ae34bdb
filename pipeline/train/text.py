"""Conditioning on text in training: an encoder, frozen or trained along, or stored embeddings in its place."""

import logging
import shutil
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

from pipeline.data.prompts import data_prompts, fixed_prompts
from pipeline.data.text import TextEmbeddings
from pipeline.load import load_mapped, load_tokenizer
from pipeline.sources import need_folder, part_folder
from pipeline.text import encode_text, small_text_encoder, sprite_tokenizer
from pipeline.train.export import save_exported
from utils.choices import TextPlacement
from utils.config import Config, require

log = logging.getLogger(__name__)

MEMO_BYTES = 2**30  # of remembered prompt embeddings
PARTS = ("text_encoder", "tokenizer")


@dataclass
class TextConditioning:
    """Text encoder and tokenizer of a stage, or the embeddings that stand for them."""

    tokenizer: PreTrainedTokenizerBase | None
    encoder: UMT5EncoderModel | None  # None, and no tokenizer, where embeddings are `stored`
    text_len: int
    trainable: bool  # along with the DiT; else the encoder is frozen and the last embeddings are remembered
    device: torch.device  # where embeddings are wanted
    stored: TextEmbeddings | None = None  # what `data.text_embeddings` names
    source: Path | None = None  # folder that the frozen encoder and tokenizer are from
    _memo: dict[str, torch.Tensor] = field(default_factory=dict)
    _fixed: dict[tuple[str, ...], torch.Tensor] = field(default_factory=dict)
    _coming: dict[str, Future] = field(default_factory=dict)
    _thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))

    @classmethod
    def load(cls, config: Config, device: torch.device, text_len: int) -> "TextConditioning":
        """From `data.text_embeddings`, or `train.text_from`, or fresh: the sprite world's tokenizer and an encoder of
        width `model.text_dim`. `text_len`: tokens that the DiT takes. Raises `ConfigError` where these are not there,
        or stored embeddings lack a prompt that training would ask for."""
        train, model, folder = config.train, config.model, None
        if train.text_from is not None:
            folder = need_folder(train.text_from, "train.text_from", " and ".join(PARTS))
            for part in PARTS:
                need_folder(str(part_folder(folder, part)), "train.text_from", part)
        if config.data.text_embeddings is not None:
            return cls(None, None, text_len, False, device, _stored(config, text_len), folder)
        if folder is None:
            tokenizer = sprite_tokenizer()
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.seed)
                encoder = small_text_encoder(len(tokenizer), model.text_dim, model.text_layers, model.text_heads)
            return cls(tokenizer, encoder.to(device).train(), text_len, True, device)
        tokenizer = load_tokenizer(folder)
        encoder = load_mapped(UMT5EncoderModel, part_folder(folder, "text_encoder"))
        if train.text_placement == TextPlacement.device:
            encoder = encoder.float().to(device)
        return cls(tokenizer, encoder.requires_grad_(False).eval(), text_len, False, device, None, folder)

    @property
    def text_dim(self) -> int:
        return self.encoder.config.d_model if self.stored is None else self.stored.text_dim

    def encode(self, prompts: Sequence[str], fixed: bool = False) -> torch.Tensor:
        """[len(prompts), text_len, text_dim]; with gradient where the encoder is trained. `fixed`: every rank asks for
        the same ones again and again, and they are never forgotten."""
        if self.trainable:
            return encode_text(self.tokenizer, self.encoder, prompts, self.text_len)
        if fixed:
            if (key := tuple(prompts)) not in self._fixed:
                self._fixed[key] = self.encode(prompts)
            return self._fixed[key]
        if isinstance(self.encoder, FSDPModule):  # ranks must call it alike
            return self._run_encoder(prompts)
        found = {prompt: self._memo[prompt] for prompt in prompts if prompt in self._memo}
        for prompt in dict.fromkeys(prompt for prompt in prompts if prompt not in found):
            coming = self._coming.pop(prompt, None)
            found[prompt] = self._embed(prompt) if coming is None else coming.result()
        self._memo |= found
        while len(self._memo) * found[prompts[0]].nbytes > MEMO_BYTES:
            del self._memo[next(iter(self._memo))]  # the oldest
        return torch.stack([found[prompt] for prompt in prompts])

    @property
    def beside(self) -> bool:
        """Whether prompts can be encoded while the device trains: the encoder is frozen and not on it."""
        return self.encoder is not None and not self.trainable and self.encoder.device != self.device

    def ahead(self, prompts: Iterable[str]) -> None:
        """Begin to encode, in a thread, what `encode` will be asked for soon."""
        for prompt in prompts:
            if prompt not in self._memo and prompt not in self._coming:
                self._coming[prompt] = self._thread.submit(self._embed, prompt)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    @torch.no_grad()
    def _embed(self, prompt: str) -> torch.Tensor:
        """[text_len, text_dim], zero past the prompt's end."""
        if self.stored is None:
            return self._run_encoder([prompt])[0]
        embedding = self.stored[prompt].to(self.device, torch.float32)  # [length, text_dim]
        return F.pad(embedding, (0, 0, 0, self.text_len - len(embedding)))

    @torch.no_grad()
    def _run_encoder(self, prompts: Sequence[str]) -> torch.Tensor:
        """[len(prompts), text_len, text_dim]."""
        with torch.autocast(self.encoder.device.type, enabled=False):
            embeddings = encode_text(self.tokenizer, self.encoder, prompts, self.text_len)
        return embeddings.to(self.device, torch.float32)

    def save(self, folder: Path | None) -> None:
        """Text encoder, in bfloat16, and tokenizer to `folder`; as they are where only embeddings were loaded. Without
        a folder: only take part in gathering a sharded encoder."""
        if self.encoder is not None:
            save_exported(self.encoder, folder, "text_encoder")
        if folder is None:
            return
        if self.encoder is not None:
            self.tokenizer.save_pretrained(folder / "tokenizer")
        elif self.source is not None:
            for part in PARTS:
                shutil.copytree(part_folder(self.source, part), folder / part, dirs_exist_ok=True)
        else:
            log.warning("%s gets no text encoder and tokenizer: train.text_from does not say where they are", folder)


def _stored(config: Config, text_len: int) -> TextEmbeddings:
    stored = TextEmbeddings(config.data.text_embeddings)
    found = f"its prompts were cut at {stored.text_len} tokens, the model takes {text_len}"
    require(config, "data.text_embeddings", stored.text_len == text_len,
            f"{found}; write them again with python -m scripts.prepare_data")  # fmt: skip
    stored.require(fixed_prompts(config) + data_prompts(config))
    return stored
