"""A bundle: one folder with everything that turns a prompt into a video, laid out as diffusers lays out a pipeline.

    transformer/  vae/  text_encoder/  tokenizer/  scheduler/  model_index.json

Parts that several bundles share lie in one of them, which the others' model_index.json names as `_base`.

The tiny bundle and Wan-AI's `Wan2.1-T2V-1.3B-Diffusers` are read by the same code. `model.checkpoint` replaces the
transformer's weights. What can be checked without loading a model is checked first (`check_bundle`).
"""

import inspect
import logging
import math
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any

import diffusers
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler
from transformers import UMT5EncoderModel

from model.causal_wan import CausalWanModel
from model.geometry import WAN_PATCH_SIZE
from model.weights import check_weights
from pipeline.sources import INDEX, bundle_folder, bundle_part, part_folder, require_files, transformer_source
from pipeline.vae_shape import VAEShape
from utils.config import Config, ConfigError, ModelConfig
from utils.files import read_json, write_json
from utils.load_config import plain, section

log = logging.getLogger(__name__)


def read_shape(path: Path) -> dict:
    """The config.json of a Wan transformer. Raises `ConfigError` for what cannot be one."""
    stored = read_json(path)
    numbers = {item.name for item in fields(ModelConfig) if item.name in stored}
    section(ModelConfig, str(path), {name: stored[name] for name in numbers})
    if stored.get("patch_size", WAN_PATCH_SIZE) not in (WAN_PATCH_SIZE, list(WAN_PATCH_SIZE)):
        raise ConfigError(f"{path}: patch_size must be {list(WAN_PATCH_SIZE)}")
    return stored


def transformer_settings(config: Config) -> dict:
    """Constructor arguments of the causal DiT: shape of the bundle's transformer where it has one, else of the `model`
    section; chunk and compressor are always the config's."""
    model, known = config.model, inspect.signature(CausalWanModel.__init__).parameters
    shape_file = None if model.bundle is None else Path(model.bundle) / "transformer" / "config.json"
    settings = {name: value for name, value in vars(model).items() if name in known}
    settings["out_channels"] = model.in_channels
    if shape_file is not None and shape_file.is_file() and not model.random_init:
        stored = {key: value for key, value in read_shape(shape_file).items() if key in known}
        settings |= {key: tuple(value) if isinstance(value, list) else value for key, value in stored.items()}
    return settings | {
        "frames_per_chunk": config.video.frames_per_chunk,
        "compressor": config.cache.compressor.kind,
        "compressor_channels": tuple(config.cache.compressor.channels),
    }


def check_bundle(config: Config) -> None:
    """Raise `ConfigError` for what is wrong with the model's files and can be known without loading them: what is
    missing and where to get it, or which sizes do not go together."""
    require_files(config)
    for name in ("vae", "text_encoder"):
        check_weights(bundle_part(config, name))
    if not config.model.random_init:
        check_weights(transformer_source(config))
    _check_sizes(config)
    _warn_of_untrained_size(config)


def _warn_of_untrained_size(config: Config) -> None:
    """Where the bundle says what it was trained on."""
    index = bundle_folder(config) / INDEX
    trained = read_json(index).get("video") if index.is_file() else None
    for name in ("height", "width", "frames_per_chunk"):
        now, then = getattr(config.video, name), (trained or {}).get(name)
        if then not in (None, now):
            log.warning("video.%s is %d: %s was trained on %d; expect worse videos", name, now, index.parent, then)


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
    shape, vae = transformer_settings(config), vae_shape_of(bundle_part(config, "vae"))
    text_dim = read_json(bundle_part(config, "text_encoder") / "config.json").get("d_model")
    apart = "model.bundle and model.checkpoint do not belong together"
    if vae.channels != shape["in_channels"]:
        found = f"the VAE has {vae.channels} latent channels, the transformer {shape['in_channels']}"
        raise ConfigError(f"{found}; {apart}")
    if text_dim != shape["text_dim"]:
        found = f"the text encoder is {text_dim} wide, the transformer expects {shape['text_dim']}"
        raise ConfigError(f"{found}; {apart}")
    vae.size(config.video)


def pipeline_settings(config: Config) -> dict[str, Any]:
    """What a `PackForcingPipeline` takes of a config: plain values of the sections `cache`, `sampler` and `video`."""
    return {name: value for name, value in plain(config).items() if name in ("cache", "sampler", "video")}


def write_model_index(folder: Path, config: Config, base: str | None = None) -> None:
    """`model_index.json` for `PackForcingPipeline.from_pretrained`; parts that the folder lacks are at `base`."""
    index = {} if base is None else {"_base": base}
    write_json(folder / INDEX, index)
    tokenizer = read_json(part_folder(folder, "tokenizer") / "tokenizer_config.json").get("tokenizer_class")
    index |= {
        "_class_name": "PackForcingPipeline",
        "_diffusers_version": diffusers.__version__,
        "tokenizer": ["transformers", tokenizer],
        "text_encoder": ["transformers", UMT5EncoderModel.__name__],
        "vae": ["diffusers", AutoencoderKLWan.__name__],
        "scheduler": ["diffusers", FlowMatchEulerDiscreteScheduler.__name__],
        "transformer": [CausalWanModel.__module__, CausalWanModel.__name__],
    }
    index |= pipeline_settings(config)
    write_json(folder / INDEX, index)
