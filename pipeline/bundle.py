"""A bundle: one folder with everything that turns a prompt into a video, laid out as diffusers lays out a pipeline.

    transformer/  vae/  text_encoder/  tokenizer/  scheduler/

The tiny bundle and Wan-AI's `Wan2.1-T2V-1.3B-Diffusers` are read by the same code. `model.checkpoint` replaces the
transformer's weights. What can be checked without loading a model is checked first (`check_bundle`).
"""

import inspect
import json
import logging
import math
from collections.abc import Mapping
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, ModelMixin, WanTransformer3DModel
from omegaconf import OmegaConf
from safetensors import SafetensorError
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, UMT5EncoderModel

from model.causal_wan import COMPRESSOR_PREFIX, CausalWanModel
from model.geometry import WAN_PATCH_SIZE
from model.schedule import WAN_SHIFT
from model.weights import CheckpointError, cast_weights, check_weights, load_weights, read_files, read_weights
from pipeline.sources import bundle_folder, require_files, transformer_source
from utils.config import Config, ConfigError, ModelConfig, VideoConfig
from utils.load_config import section

log = logging.getLogger(__name__)

# What the libraries raise for files that hold anything.
_UNREADABLE = (OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, SafetensorError)


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a mapping, found {type(content).__name__}")
    return content


def read_shape(path: Path) -> dict:
    """The config.json of a Wan transformer. Raises `ConfigError` for what cannot be one."""
    stored = read_json(path)
    numbers = {item.name for item in fields(ModelConfig) if item.name in stored}
    section(ModelConfig, str(path), {name: stored[name] for name in numbers})
    if stored.get("patch_size", WAN_PATCH_SIZE) not in (WAN_PATCH_SIZE, list(WAN_PATCH_SIZE)):
        raise ConfigError(f"{path}: patch_size must be {list(WAN_PATCH_SIZE)}")
    return stored


def transformer_settings(config: Config) -> dict:
    """Constructor arguments of the causal DiT.

    The shape is that of the bundle's transformer where it has one, else that of the `model` section; chunk and
    compressor are always the config's.
    """
    model = config.model
    shape_file = None if model.bundle is None else Path(model.bundle) / "transformer" / "config.json"
    settings = {
        "num_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "attention_head_dim": model.attention_head_dim,
        "ffn_dim": model.ffn_dim,
        "in_channels": model.in_channels,
        "out_channels": model.in_channels,
        "text_dim": model.text_dim,
        "text_len": model.text_len,
        "freq_dim": model.freq_dim,
        "cross_attn_norm": model.cross_attn_norm,
        "eps": model.eps,
    }
    if shape_file is not None and shape_file.is_file() and not model.random_init:
        known = inspect.signature(CausalWanModel.__init__).parameters
        stored = {key: value for key, value in read_shape(shape_file).items() if key in known}
        settings |= {key: tuple(value) if isinstance(value, list) else value for key, value in stored.items()}
    return settings | {
        "frames_per_chunk": config.video.frames_per_chunk,
        "compressor": config.cache.compressor.kind,
        "compressor_channels": tuple(config.cache.compressor.channels),
    }


def check_bundle(config: Config) -> None:
    """Everything about the model's files that can be known without loading them.

    Raises `ConfigError`, in one line: what is missing and where to get it, or which sizes do not go together.
    """
    require_files(config)
    for name in ("vae", "text_encoder"):
        check_weights(bundle_folder(config) / name)
    if not config.model.random_init:
        check_weights(transformer_source(config))
    _check_sizes(config)
    _warn_of_untrained_size(config)


def _warn_of_untrained_size(config: Config) -> None:
    """Where the bundle says what it was trained on."""
    index = bundle_folder(config) / "model_index.json"
    trained = read_json(index).get("video") if index.is_file() else None
    for name in ("height", "width", "frames_per_chunk"):
        now, then = getattr(config.video, name), (trained or {}).get(name)
        if then not in (None, now):
            log.warning("video.%s is %d: %s was trained on %d; expect worse videos", name, now, index.parent, then)


@dataclass(frozen=True)
class VAEShape:
    """What a VAE's config says about its latents."""

    channels: int
    temporal_stride: int  # pixel frames per latent frame, after the first
    spatial_stride: int

    def latent_frames(self, frames: int) -> int:
        """Latent frames that hold at least `frames` pixel frames."""
        return 1 + math.ceil((frames - 1) / self.temporal_stride)

    def size(self, video: VideoConfig) -> tuple[int, int]:
        """Latent height and width of `video`. Raises `ConfigError` where patches do not fill it."""
        for name, patch in zip(("height", "width"), WAN_PATCH_SIZE[1:], strict=True):
            size, unit = getattr(video, name), self.spatial_stride * patch
            if size % unit:
                raise ConfigError(f"setting `video.{name}` is {size}: must be a multiple of {unit} px (VAE x patch)")
        return video.height // self.spatial_stride, video.width // self.spatial_stride

    def frames(self, latent_frames: int) -> int:
        """Pixel frames of `latent_frames` latent ones."""
        return 1 + self.temporal_stride * (latent_frames - 1)


def vae_shape(config: Config) -> VAEShape:
    """Read from the bundle, without loading the VAE. Raises `ConfigError`."""
    return vae_shape_of(bundle_folder(config) / "vae")


def vae_shape_of(folder: Path) -> VAEShape:
    """What the config in a VAE's folder says. Raises `ConfigError`."""
    stored = read_json(folder / "config.json")
    defaults = inspect.signature(AutoencoderKLWan.__init__).parameters  # older configs leave out what has a default
    names = ("z_dim", "scale_factor_temporal", "scale_factor_spatial")
    shape = VAEShape(*(stored.get(name, defaults[name].default) for name in names))
    if not all(isinstance(number, int) and 0 < number < 2**16 for number in astuple(shape)):
        raise ConfigError(f"{folder / 'config.json'}: {', '.join(names)} are {astuple(shape)}, not positive numbers")
    for name in ("latents_mean", "latents_std"):
        values = stored.get(name, defaults[name].default)
        finite = isinstance(values, list | tuple) and all(
            isinstance(value, int | float) and math.isfinite(value) for value in values
        )
        if not finite or len(values) != shape.channels:
            raise ConfigError(f"{folder / 'config.json'}: {name} is not a list of {shape.channels} (z_dim) numbers")
    return shape


def _check_sizes(config: Config) -> None:
    shape, vae = transformer_settings(config), vae_shape(config)
    if vae.channels != shape["in_channels"]:
        raise ConfigError(f"the VAE has {vae.channels} latent channels, the transformer {shape['in_channels']}; "
                          "model.bundle and model.checkpoint do not belong together")  # fmt: skip
    text_dim = read_json(bundle_folder(config) / "text_encoder" / "config.json").get("d_model")
    if text_dim != shape["text_dim"]:
        raise ConfigError(f"the text encoder is {text_dim} wide, the transformer expects {shape['text_dim']}; "
                          "model.bundle and model.checkpoint do not belong together")  # fmt: skip
    vae.size(config.video)


def load_transformer(config: Config) -> CausalWanModel:
    """The causal DiT with the weights of `transformer_source`, memory-mapped on the CPU, in their stored dtype.

    With `model.random_init`: fresh weights, the same for the same `seed`. A checkpoint without compressor gets a fresh
    one, which is logged. Raises `CheckpointError` for weights that do not fit.
    """
    settings = transformer_settings(config)
    if config.model.random_init:
        return random_model(CausalWanModel, settings, config.seed).eval()
    source = transformer_source(config)
    weights = read_weights(source, config.model.use_ema)
    with init_empty_weights(include_buffers=False):
        model = CausalWanModel(**settings)
    stored = [name for name in weights if name.startswith(COMPRESSOR_PREFIX)]
    if model.pack_compressor is None and stored:
        log.info("%s: its compressor (%d tensors) is not used with cache.compressor.kind=%s",
                 source, len(stored), config.cache.compressor.kind)  # fmt: skip
        weights = {name: tensor for name, tensor in weights.items() if name not in stored}
    fresh = {} if stored else model.fresh_compressor(source, config.seed)
    load_weights(model, weights, source, fresh)
    return model.eval()


def random_model(kind: type[WanTransformer3DModel], settings: dict, seed: int) -> WanTransformer3DModel:
    """Random weights, the same for the same `seed`; of `settings`, what the class does not know is left out."""
    known = inspect.signature(kind.__init__).parameters
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(**{key: value for key, value in settings.items() if key in known})


def place(model: ModelMixin, device: torch.device, dtype: torch.dtype) -> ModelMixin:
    """Cast as diffusers does on loading (what Wan needs in float32 stays so) and move to `device`; returns `model`."""
    cast_weights(model, dtype, model._keep_in_fp32_modules)
    return model.to(device)


def load_vae(config: Config, device: torch.device, dtype: torch.dtype) -> AutoencoderKLWan:
    """The bundle's VAE. Raises `CheckpointError` for weights that do not fit."""
    vae = load_library_model(AutoencoderKLWan, bundle_folder(config) / "vae", dtype).to(device)
    if device.type == "cpu":  # in bfloat16 1.7 times as fast; in float32 it makes no odds
        for module in vae.modules():
            if isinstance(module, nn.Conv3d):
                module.to(memory_format=torch.channels_last_3d)
    return vae


def load_scheduler(config: Config) -> FlowMatchEulerDiscreteScheduler:
    """The bundle's schedule, with `sampler.shift` in place of its own where that is set."""
    if config.sampler.shift is not None:
        return FlowMatchEulerDiscreteScheduler(shift=config.sampler.shift)
    return read_scheduler(bundle_folder(config))


def read_scheduler(folder: Path) -> FlowMatchEulerDiscreteScheduler:
    """The schedule of a folder: its flow shift, Wan's where it has none."""
    path = folder / "scheduler" / "scheduler_config.json"
    return FlowMatchEulerDiscreteScheduler(shift=flow_shift(read_json(path) if path.is_file() else {}))


def flow_shift(settings: Mapping[str, Any]) -> float:
    """Of a scheduler's settings, by either of diffusers' names. Raises `ConfigError` where it depends on the size."""
    if settings.get("use_dynamic_shifting"):
        raise ConfigError("the scheduler has use_dynamic_shifting, a shift for every size: set sampler.shift")
    return settings.get("shift", settings.get("flow_shift", WAN_SHIFT))


def load_text_encoder(
    config: Config, device: torch.device, dtype: torch.dtype
) -> tuple[PreTrainedTokenizerBase, UMT5EncoderModel]:
    """The bundle's tokenizer and text encoder. Raises `CheckpointError` for files that do not fit."""
    folder = bundle_folder(config)
    tokenizer = load_tokenizer(folder)
    return tokenizer, load_library_model(UMT5EncoderModel, folder / "text_encoder", dtype).to(device)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """That of a bundle's folder. Raises `CheckpointError`."""
    try:
        return AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    except Exception as error:  # tokenizers raises nothing more special
        raise CheckpointError(f"{folder / 'tokenizer'}: no tokenizer ({_first_line(error)})") from error


def load_library_model(kind: type[ModelMixin] | type[PreTrainedModel], folder: Path, dtype: torch.dtype):
    """`from_pretrained`, but strict: the libraries only warn about parameters that are missing or left over."""
    check_weights(folder)
    try:
        model, report = kind.from_pretrained(folder, dtype=dtype, local_files_only=True, output_loading_info=True)
    except _UNREADABLE as error:
        raise CheckpointError(f"{folder}: not a {kind.__name__} ({_first_line(error)})") from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, report[problem])):
            raise CheckpointError(f"{folder} does not fit {kind.__name__}: {len(names)} {problem}, first {names[0]}")
    return model.eval()


def load_mapped(kind: type[ModelMixin] | type[PreTrainedModel], folder: Path):
    """The model in `folder`, strictly, in the dtype it is stored in. Its weights stay in the files, memory-mapped: all
    processes of a machine share them. Raises `CheckpointError`."""
    check_weights(folder)
    weights = read_weights(folder) if issubclass(kind, ModelMixin) else read_files(folder)
    try:
        with init_empty_weights(include_buffers=False):
            if issubclass(kind, ModelMixin):
                model = kind.from_config(kind.load_config(folder, local_files_only=True))
            else:
                model = kind(kind.config_class.from_pretrained(folder, local_files_only=True))
    except _UNREADABLE as error:
        raise CheckpointError(f"{folder}: not a {kind.__name__} ({_first_line(error)})") from error
    tied = getattr(model, "_tied_weights_keys", None) or {}
    tied = {name: weights[source] for name, source in tied.items() if name not in weights and source in weights}
    load_weights(model, weights, folder, tied)
    if isinstance(model, PreTrainedModel):
        model.tie_weights()
    return model.eval()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def pipeline_settings(config: Config) -> dict[str, Any]:
    """What a `PackForcingPipeline` takes of a config: plain values of the sections `cache`, `sampler` and `video`."""
    values = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    return {name: values[name] for name in ("cache", "sampler", "video")}


def write_model_index(folder: Path, config: Config) -> None:
    """`model_index.json` of a folder that holds all parts, so that `PackForcingPipeline.from_pretrained` reads it."""
    tokenizer = read_json(folder / "tokenizer" / "tokenizer_config.json").get("tokenizer_class")
    index = {
        "_class_name": "PackForcingPipeline",
        "_diffusers_version": diffusers.__version__,
        "tokenizer": ["transformers", tokenizer],
        "text_encoder": ["transformers", UMT5EncoderModel.__name__],
        "vae": ["diffusers", AutoencoderKLWan.__name__],
        "scheduler": ["diffusers", FlowMatchEulerDiscreteScheduler.__name__],
        "transformer": [CausalWanModel.__module__, CausalWanModel.__name__],
    }
    index |= pipeline_settings(config)
    (folder / "model_index.json").write_text(json.dumps(index, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
