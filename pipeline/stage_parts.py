"""Parts that stages are put together from: conditioning on text, cached latents, weights swapped for their EMA."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, UMT5EncoderModel

from pipeline.latents import write_latents
from pipeline.sharding import plain_copy
from utils.checkpoint import cast_weights, content_hash
from utils.config import Config, ConfigError
from utils.data import LatentClips, sprite_clips
from utils.distributed import World
from utils.text import encode_text, small_text_encoder, sprite_tokenizer

MEMO_BYTES = 2**30  # of remembered prompt embeddings


def need_folder(path: str | None, key: str, part: str) -> Path:
    """The folder that setting `key` names. Raises `ConfigError` where it is unset or not there."""
    if path is None:
        raise ConfigError(f"setting `{key}` is not set: name a folder with {part}")
    if not Path(path).is_dir():
        raise ConfigError(f"setting `{key}` is {path}: there is no such folder")
    return Path(path)


@dataclass
class TextConditioning:
    """Tokenizer and text encoder of a stage.

    Attributes:
        trainable: the encoder is trained along with the DiT; else it is frozen and the last embeddings are remembered.
        device: where embeddings are wanted.
    """

    tokenizer: PreTrainedTokenizerBase
    encoder: UMT5EncoderModel
    text_len: int
    trainable: bool
    device: torch.device
    _memo: dict[str, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def load(cls, config: Config, device: torch.device) -> TextConditioning:
        """From `train.text_from`, or fresh: the sprite world's tokenizer and an encoder of width `model.text_dim`."""
        model = config.model
        if config.train.text_from is None:
            tokenizer = sprite_tokenizer()
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.seed)
                encoder = small_text_encoder(len(tokenizer), model.text_dim, model.text_layers, model.text_heads)
            return cls(tokenizer, encoder.to(device).train(), model.text_len, True, device)
        folder = need_folder(config.train.text_from, "train.text_from", "text_encoder and tokenizer")
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
            encoder = UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype="auto", local_files_only=True)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"setting `train.text_from` is {folder}: no text encoder there ({reason})") from error
        if not config.train.text_on_cpu:
            encoder = encoder.float().to(device)
        return cls(tokenizer, encoder.requires_grad_(False).eval(), model.text_len, False, device)

    @property
    def text_dim(self) -> int:
        return self.encoder.config.d_model

    def encode(self, prompts: Sequence[str]) -> torch.Tensor:
        """[len(prompts), text_len, text_dim]; with gradient where the encoder is trained."""
        if self.trainable:
            return encode_text(self.tokenizer, self.encoder, prompts, self.text_len)
        found = {prompt: self._memo[prompt] for prompt in prompts if prompt in self._memo}
        for prompt in dict.fromkeys(prompt for prompt in prompts if prompt not in found):
            with torch.no_grad(), torch.autocast(self.encoder.device.type, enabled=False):
                embeds = encode_text(self.tokenizer, self.encoder, [prompt], self.text_len)[0]  # [text_len, text_dim]
                found[prompt] = embeds.to(self.device, torch.float32)
        self._memo |= found
        while len(self._memo) * found[prompts[0]].nbytes > MEMO_BYTES:
            del self._memo[next(iter(self._memo))]  # the oldest
        return torch.stack([found[prompt] for prompt in prompts])


@dataclass
class LatentData:
    """Cached latents: whole clips, and stills (clips of one frame) for phases of one latent frame."""

    clips: LatentClips
    stills: LatentClips | None
    vae_folder: Path

    @classmethod
    def load(cls, config: Config, device: torch.device, world: World) -> LatentData:
        """Read `data.path`; where `data.kind` is sprites, render and encode what is missing there first."""
        data = config.data
        if data.kind == "prompts":
            raise ConfigError("setting `data.kind` is prompts: this stage learns from clips; use sprites or latents")
        vae_folder = need_folder(data.vae, "data.vae", "an AutoencoderKLWan")
        if data.path is None:
            raise ConfigError("setting `data.path` is not set: name the folder of latent shards")
        parts = {"clips": (data.num_clips, data.clip_frames), "stills": (data.num_stills, 1)}
        folders = {name: Path(data.path) / name for name, (count, _) in parts.items() if count}
        if data.kind == "sprites":
            from pipeline.vae_clip import channels_last  # pipeline/vae.py imports this module

            vae = channels_last(AutoencoderKLWan.from_pretrained(vae_folder).eval().to(device))
            vae_hash = content_hash(vae_folder)
            for name, folder in folders.items():
                count, frames = parts[name]
                source = sprite_clips(config.seed, count, frames, config.video.height, config.video.width)
                write_latents(source, vae, vae_hash, folder, world)
        loaded = {name: LatentClips(folder) for name, folder in folders.items()}
        return cls(loaded["clips"], loaded.get("stills"), vae_folder)

    @property
    def frames(self) -> int:
        return self.clips.frames

    @property
    def channels(self) -> int:
        return self.clips.latents.shape[1]

    @property
    def size(self) -> tuple[int, int]:
        """Latent height and width."""
        return tuple(self.clips.latents.shape[-2:])

    def sample(self, seed: int, index: int, frames: int) -> tuple[torch.Tensor, str]:
        """The first `frames` latent frames [C, frames, H, W] of the clip that sample `index` shows, and its caption.

        A crop starts at latent frame 0, as that one alone stands for a single pixel frame.
        """
        source = self.stills if frames == 1 and self.stills is not None else self.clips
        if frames > source.frames:
            raise ConfigError(f"a training phase wants {frames} latent frames; the clips have {source.frames}")
        clip = source.clip_of(seed, index)
        return source.latents[clip, :, :frames], source.captions[clip]


@contextmanager
def swapped_in(module: nn.Module, weights: dict[str, torch.Tensor] | None) -> Iterator[None]:
    """Give the module's parameters other values (its EMA) for the length of the block."""
    if weights is None:
        yield
        return
    own = {name: p.detach().clone() for name, p in module.named_parameters() if name in weights}
    with torch.no_grad():
        for name, p in module.named_parameters():
            if name in weights:
                p.copy_(weights[name])
    try:
        yield
    finally:
        with torch.no_grad():
            for name, p in module.named_parameters():
                if name in own:
                    p.copy_(own[name])


def exported(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> nn.Module | None:
    """A copy on the CPU with every weight in `dtype`, to be saved; where the model is sharded, all ranks must call it
    and the first one alone gets the copy."""
    copy = plain_copy(model)
    if copy is not None:
        cast_weights(copy, dtype, keep_in_fp32=None)
    return copy


def save_exported(model: nn.Module, folder: Path) -> None:
    """`exported(model)` to `folder`, by the rank that gets the copy."""
    copy = exported(model)
    if copy is not None:
        copy.save_pretrained(folder)
