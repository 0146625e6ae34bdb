"""The models of a bundle, loaded strictly: what does not fit is named, in one line."""

import inspect
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, ModelMixin, WanTransformer3DModel
from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, UMT5EncoderModel

from model.causal_wan import CausalWanModel
from model.fresh_compressor import COMPRESSOR_PREFIX
from model.schedule import WAN_SHIFT
from model.weights import CheckpointError, cast_weights, check_weights, load_weights, read_files, read_weights
from pipeline.bundle import transformer_settings
from pipeline.data.vae_clip import channels_last
from pipeline.sources import bundle_folder, bundle_part, part_folder, transformer_source
from utils.choices import CacheKind
from utils.config import CacheConfig, CompressorConfig, Config, ConfigError, ModelConfig, VideoConfig
from utils.files import read_json
from utils.load_config import first_line, section

log = logging.getLogger(__name__)

# A plain Wan folder says nothing about a cache: attend its first and last chunks, which needs no trained compressor.
UNTRAINED_CACHE = CacheConfig(kind=CacheKind.sink, sink=1, recent=5, compressor=CompressorConfig("identity"))

# What the libraries raise for files that hold anything.
_UNREADABLE = (OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, SafetensorError)


def load_transformer(config: Config) -> CausalWanModel:
    """The causal DiT with the weights of `transformer_source`, memory-mapped on the CPU, in their stored dtype. With
    `model.random_init`: fresh weights, the same for the same `seed`. A checkpoint without compressor gets a fresh one,
    which is logged. Raises `CheckpointError` for weights that do not fit."""
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


def read_parts(
    folder: Path, index: Mapping[str, Any], checkpoint: str | Path | None, use_ema: bool, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Components of a pipeline's folder that diffusers would read as something else, but for those that are given in
    `options`: a chunk-causal transformer, and a scheduler that has our class."""
    found, dtype = {}, options.get("torch_dtype")
    plain = index["transformer"][1] != CausalWanModel.__name__
    if options.get("transformer") is None and (plain or checkpoint is not None):
        settings = {name: options.get(name) or index.get(name) for name in ("cache", "video")}
        cache = UNTRAINED_CACHE if settings["cache"] is None else section(CacheConfig, "cache", settings["cache"])
        video = section(VideoConfig, "video", settings["video"] or {})
        source = ModelConfig(bundle=str(folder), checkpoint=checkpoint and str(checkpoint), use_ema=use_ema)
        transformer = load_transformer(Config(model=source, cache=cache, video=video))
        found["transformer"] = place(transformer, torch.device("cpu"), dtype) if dtype else transformer
    if options.get("scheduler") is None and index["scheduler"][1] != FlowMatchEulerDiscreteScheduler.__name__:
        found["scheduler"] = read_scheduler(folder)
    return found


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
    return channels_last(load_library_model(AutoencoderKLWan, bundle_part(config, "vae"), dtype).to(device))


def load_scheduler(config: Config) -> FlowMatchEulerDiscreteScheduler:
    """The bundle's schedule, with `sampler.shift` in place of its own where that is set."""
    if config.sampler.shift is not None:
        return FlowMatchEulerDiscreteScheduler(shift=config.sampler.shift)
    return read_scheduler(bundle_part(config, "scheduler").parent)


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
    tokenizer = load_tokenizer(folder)  # first: the encoder may take a minute
    return tokenizer, load_library_model(UMT5EncoderModel, part_folder(folder, "text_encoder"), dtype).to(device)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """That of a bundle's folder. Raises `CheckpointError`."""
    folder = part_folder(folder, "tokenizer")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # tokenizers raises nothing more special
        raise CheckpointError(f"{folder}: no tokenizer ({first_line(error)})") from error


def load_library_model(kind: type[ModelMixin] | type[PreTrainedModel], folder: Path, dtype: torch.dtype):
    """`from_pretrained`, but strict: the libraries only warn about parameters that are missing or left over."""
    check_weights(folder)
    try:
        model, report = kind.from_pretrained(folder, dtype=dtype, local_files_only=True, output_loading_info=True)
    except _UNREADABLE as error:
        raise CheckpointError(f"{folder}: not a {kind.__name__} ({first_line(error)})") from error
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
        raise CheckpointError(f"{folder}: not a {kind.__name__} ({first_line(error)})") from error
    tied = getattr(model, "_tied_weights_keys", None) or {}
    tied = {name: weights[source] for name, source in tied.items() if name not in weights and source in weights}
    load_weights(model, weights, folder, tied)
    if isinstance(model, PreTrainedModel):
        model.tie_weights()
    return model.eval()
