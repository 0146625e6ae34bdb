"""Parts that stages are put together from: conditioning on text, cached latents, weights swapped for their EMA."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import AutoTokenizer, PreTrainedTokenizerBase, UMT5EncoderModel

from model.causal_wan import COMPRESSOR_PREFIX, CausalWanModel
from model.weights import CheckpointError, cast_weights, content_hash
from pipeline.bundle import load_library_model, load_mapped, read_json, vae_shape_of
from pipeline.data.clips import FRAMES_AT_ONCE, LatentClips, SpriteClips, StoryClips, write_clips
from pipeline.data.prompts import data_prompts, fixed_prompts
from pipeline.data.text import TextEmbeddings
from pipeline.data.vae_clip import channels_last, encode_frames
from pipeline.text import encode_text, small_text_encoder, sprite_tokenizer
from pipeline.train.parallel import plain_copy
from utils.config import Config, ConfigError, TextPlacement
from utils.distributed import World, barrier
from utils.rng import keyed_generator
from utils.sprites.story import FRAMES_PER_CHUNK

log = logging.getLogger(__name__)

MEMO_BYTES = 2**30  # of remembered prompt embeddings


def need_folder(path: str | None, key: str, part: str) -> Path:
    """The folder that setting `key` names. Raises `ConfigError` where it is unset or not there."""
    if path is None:
        raise ConfigError(f"setting `{key}` is not set: name a folder with {part}")
    if not Path(path).is_dir():
        raise ConfigError(f"setting `{key}` is {path}: there is no such folder")
    return Path(path)


def vae_folder(config: Config) -> Path:
    """`data.vae`. Raises `ConfigError` as `need_folder`, and where no VAE is there."""
    folder = need_folder(config.data.vae, "data.vae", "an AutoencoderKLWan")
    if not (folder / "config.json").is_file():
        raise ConfigError(f"setting `data.vae` is {folder}: no AutoencoderKLWan there")
    return folder


@dataclass
class TextConditioning:
    """Text encoder and tokenizer of a stage, or the embeddings that stand for them.

    Attributes:
        tokenizer, encoder: None where embeddings are `stored`.
        trainable: the encoder is trained along with the DiT; else it is frozen and the last embeddings are remembered.
        device: where embeddings are wanted.
        stored: what `data.text_embeddings` names.
        source: folder that the frozen encoder and tokenizer are from.
    """

    tokenizer: PreTrainedTokenizerBase | None
    encoder: UMT5EncoderModel | None
    text_len: int
    trainable: bool
    device: torch.device
    stored: TextEmbeddings | None = None
    source: Path | None = None
    _memo: dict[str, torch.Tensor] = field(default_factory=dict)
    _fixed: dict[tuple[str, ...], torch.Tensor] = field(default_factory=dict)

    @classmethod
    def load(cls, config: Config, device: torch.device, text_len: int) -> TextConditioning:
        """From `data.text_embeddings`, or `train.text_from`, or fresh: the sprite world's tokenizer and an encoder of
        width `model.text_dim`. `text_len`: tokens that the DiT takes.

        Raises `ConfigError` where these are not there, or stored embeddings lack a prompt that training would ask for.
        """
        model = config.model
        if config.data.text_embeddings is not None:
            stored = TextEmbeddings(config.data.text_embeddings)
            if stored.text_len != text_len:
                raise ConfigError(
                    f"setting `data.text_embeddings` is {stored.folder}: its prompts were cut at {stored.text_len} "
                    f"tokens, the model takes {text_len}; write them again with python -m scripts.prepare_data"
                )
            stored.require(fixed_prompts(config) + data_prompts(config))
            source = None
            if config.train.text_from is not None:
                source = need_folder(config.train.text_from, "train.text_from", "text_encoder and tokenizer")
                for part in ("text_encoder", "tokenizer"):
                    need_folder(str(source / part), "train.text_from", part)
            return cls(None, None, text_len, False, device, stored, source)
        if config.train.text_from is None:
            tokenizer = sprite_tokenizer()
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.seed)
                encoder = small_text_encoder(len(tokenizer), model.text_dim, model.text_layers, model.text_heads)
            return cls(tokenizer, encoder.to(device).train(), text_len, trainable=True, device=device)
        folder = need_folder(config.train.text_from, "train.text_from", "text_encoder and tokenizer")
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        except Exception as error:  # tokenizers raises nothing more special
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ConfigError(f"setting `train.text_from` is {folder}: no tokenizer there ({reason})") from error
        encoder = load_mapped(UMT5EncoderModel, folder / "text_encoder")
        if config.train.text_placement == TextPlacement.device:
            encoder = encoder.float().to(device)
        encoder = encoder.requires_grad_(False).eval()
        return cls(tokenizer, encoder, text_len, False, device, None, folder)

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
            found[prompt] = self._embed(prompt)
        self._memo |= found
        while len(self._memo) * found[prompts[0]].nbytes > MEMO_BYTES:
            del self._memo[next(iter(self._memo))]  # the oldest
        return torch.stack([found[prompt] for prompt in prompts])

    @torch.no_grad()
    def _embed(self, prompt: str) -> torch.Tensor:
        """[text_len, text_dim], zero past the prompt's end."""
        if self.stored is not None:
            embedding = self.stored[prompt].to(self.device, torch.float32)  # [length, text_dim]
            return nn.functional.pad(embedding, (0, 0, 0, self.text_len - len(embedding)))
        return self._run_encoder([prompt])[0]

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
            for part in ("text_encoder", "tokenizer"):
                shutil.copytree(self.source / part, folder / part, dirs_exist_ok=True)
        else:
            log.warning("%s gets no text encoder and tokenizer: train.text_from does not say where they are", folder)


class TrainingClip(NamedTuple):
    """What a stage learns from one sample.

    Attributes:
        latents: [C, F, H, W], normalised.
        captions: one of the clip, or one of every chunk.
        weights: of every chunk in the sample's loss, 0 to leave it out; None: all alike.
    """

    latents: torch.Tensor
    captions: Sequence[str]
    weights: Sequence[float] | None = None


@dataclass
class LatentData:
    """Cached latents: clips of one shot, stills (clips of one frame) for phases of one latent frame, and stories."""

    clips: LatentClips | None
    stills: LatentClips | None
    stories: LatentClips | None
    vae_folder: Path
    config: Config

    @classmethod
    def load(cls, config: Config, device: torch.device, world: World) -> LatentData:
        """Read `data.path`; where `data.kind` is sprites, render and encode what is missing there first."""
        data, video = config.data, config.video
        if data.kind == "prompts":
            raise ConfigError("setting `data.kind` is prompts: this stage learns from clips; use sprites or latents")
        encoder = vae_folder(config)
        if data.path is None:
            raise ConfigError("setting `data.path` is not set: name the folder of latent shards")
        size, told = (video.height, video.width), data.stories
        if told.count and video.frames_per_chunk not in (1, FRAMES_PER_CHUNK):
            found = f"setting `video.frames_per_chunk` is {video.frames_per_chunk}"
            raise ConfigError(f"{found}: stories are cut in chunks of {FRAMES_PER_CHUNK}, or of 1 as stills")
        sources = {
            "clips": SpriteClips(config.seed, data.num_clips, data.clip_frames, *size),
            "stills": SpriteClips(config.seed, data.num_stills, 1, *size),
            "stories": StoryClips(
                config.seed, told.count, told.chunks, tuple(told.shot_chunks), video.frames_per_chunk == 1, *size
            ),
        }
        folders = {name: Path(data.path) / name for name, source in sources.items() if len(source)}
        if all(phase.frames > 1 for phase in config.train.phases):
            folders.pop("stills", None)  # no step would show one
        if data.kind == "latents":  # stills are there, or are the first frames of clips
            folders = {name: folder for name, folder in folders.items() if name == "clips" or folder.is_dir()}
        if data.kind == "sprites":
            vae = channels_last(load_library_model(AutoencoderKLWan, encoder, torch.float32).to(device))
            vae_hash = content_hash(encoder)
            for name, folder in folders.items():
                source = sources[name]
                one_by_one = name == "stories" and source.stills
                encode = partial(_encode_stills if one_by_one else encode_frames, vae)
                write_clips(source, encode, vae_hash, folder, world, batch=max(1, FRAMES_AT_ONCE // source.frames))
                barrier(world)  # finished on every rank before one reads it
        loaded = {name: LatentClips(folder) for name, folder in folders.items()}
        for name, folder in folders.items():
            _check_latents(loaded[name], folder, encoder, config)
        return cls(*(loaded.get(name) for name in sources), encoder, config)

    @property
    def _any(self) -> LatentClips:
        return self.stories if self.clips is None else self.clips

    @property
    def frames(self) -> int:
        return self._any.frames

    @property
    def channels(self) -> int:
        return self._any.shape[0]

    @property
    def size(self) -> tuple[int, int]:
        """Latent height and width."""
        return self._any.shape[-2:]

    def sample(self, seed: int, index: int, frames: int) -> TrainingClip:
        """The first `frames` latent frames of the clip or story that sample `index` shows.

        A crop starts at latent frame 0, as that one alone stands for a single pixel frame.
        """
        told = self.config.data.stories
        share = torch.rand((), generator=keyed_generator(seed, "story", index)).item()
        source = self.stills if frames == 1 and self.stills is not None else self.clips
        if self.stories is not None and (source is None or share < told.share):
            source = self.stories
        if frames > source.frames:
            raise ConfigError(f"a training phase wants {frames} latent frames; the clips have {source.frames}")
        clip = source.clip_of(seed, index)
        latents, record = source[clip][:, :frames], source.records[clip]
        if self.stories is None:
            return TrainingClip(latents, [record["caption"]])
        chunks = frames // self.config.video.frames_per_chunk
        if source is not self.stories:
            return TrainingClip(latents, [record["caption"]] * chunks)
        weights = [1.0 if back else told.first_weight for back in record["returning"][:chunks]]
        return TrainingClip(latents, record["captions"][:chunks], weights)


def _encode_stills(vae: AutoencoderKLWan, frames: np.ndarray) -> torch.Tensor:
    """uint8 [B, F, H, W, 3] -> latents [B, C, F, h, w], every frame encoded alone."""
    latents = encode_frames(vae, frames.reshape(-1, 1, *frames.shape[2:]))  # [B * F, C, 1, h, w]
    return latents.unflatten(0, frames.shape[:2])[:, :, :, 0].transpose(1, 2)


def _check_latents(clips: LatentClips, folder: Path, vae_folder: Path, config: Config) -> None:
    """Raise `ConfigError` where latents are of another VAE than `data.vae`, or of another size than `video`."""
    if clips.made_by["vae"] != content_hash(vae_folder):
        raise ConfigError(f"setting `data.vae` is {vae_folder}: the latents in {folder} are of another VAE")
    stride, video = vae_shape_of(vae_folder).spatial_stride, config.video
    height, width = (stride * size for size in clips.shape[-2:])
    if (height, width) != (video.height, video.width):
        raise ConfigError(
            f"settings `video.height` and `video.width` are {video.height} and {video.width}: the latents in {folder} "
            f"are of {height}x{width} videos"
        )


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


def save_exported(model: nn.Module, folder: Path | None, name: str) -> None:
    """`exported(model)` to `folder/name`; a rank without a folder only takes part in gathering shards."""
    copy = exported(model)
    if copy is not None and folder is not None:
        copy.save_pretrained(folder / name)


def load_wan(path: str | None, key: str) -> WanTransformer3DModel:
    """The bidirectional DiT that setting `key` names, as it is stored, its weights still in the files.

    Raises `ConfigError` where the setting is unset, or the folder does not hold exactly such a model's weights.
    """
    folder = need_folder(path, key, "a WanTransformer3DModel")
    try:
        return load_mapped(WanTransformer3DModel, folder)
    except CheckpointError as error:
        raise ConfigError(f"setting `{key}`: {error}") from error


def load_causal(path: str | None, key: str, **settings: Any) -> CausalWanModel:
    """A causal DiT, float32, with the weights of the model in the folder that setting `key` names, bidirectional or
    causal, and `settings` of its own; a compressor of other kind or shape starts fresh. Raises `ConfigError` likewise.
    """
    folder = need_folder(path, key, "a transformer")
    if read_json(folder / "config.json").get("_class_name") != CausalWanModel.__name__:
        return CausalWanModel.from_wan(load_wan(path, key), **settings)
    try:
        source = load_library_model(CausalWanModel, folder, torch.float32)
    except CheckpointError as error:
        raise ConfigError(f"setting `{key}`: {error}") from error
    model = CausalWanModel(**{**{k: v for k, v in source.config.items() if not k.startswith("_")}, **settings})
    own, state = model.state_dict(), source.state_dict()
    shapes, stored = ({k: v.shape for k, v in x.items() if k.startswith(COMPRESSOR_PREFIX)} for x in (own, state))
    model.load_state_dict(own | {k: v for k, v in state.items() if k not in stored or shapes == stored})
    return model
