"""From files and the command line to a `Config`: typed defaults, then YAML (and its `base:` files), then `key=value`.

    config = load_config("configs/tiny/demo.yaml", ["cache.top_k=1"])

A YAML may name one or several parents with `base:` (paths relative to the file that names them); later files win.
Unknown keys, wrong types and impossible values raise `ConfigError`, whose message names the key, the value and the way
out.
"""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from utils.config import Config, ConfigError, Sharding, SizeUnit, Stage, TextPlacement

Section = TypeVar("Section")


def _read_yaml(path: Path, seen: tuple[Path, ...] = ()) -> DictConfig:
    """One file merged over the parents it names."""
    path = path.resolve()
    if path in seen:
        raise ConfigError(f"config {path}: `base` goes round in a circle; remove one of the links")
    if not path.is_file():
        raise ConfigError(f"config file {path} does not exist")
    try:
        own = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ConfigError(f"config {path}: not valid YAML ({str(error).splitlines()[0]})") from error
    if not isinstance(own, DictConfig):
        raise ConfigError(f"config {path}: expected a mapping of settings, found {type(own).__name__}")
    base = own.pop("base", None)
    parents = [] if base is None else list(base) if isinstance(base, ListConfig) else [base]
    merged = [_read_yaml(path.parent / parent, (*seen, path)) for parent in parents]
    return OmegaConf.merge(*merged, own) if merged else own


def _known_keys(node: Any, prefix: str = "") -> list[str]:
    keys = []
    for item in fields(node):
        keys.append(prefix + item.name)
        value = getattr(node, item.name)
        if is_dataclass(value):
            keys += _known_keys(value, f"{prefix}{item.name}.")
    return keys


def _check_keys(settings: DictConfig, origin: str) -> None:
    known = _known_keys(Config())

    def walk(node: DictConfig, prefix: str) -> None:
        for key in node:
            full = f"{prefix}{key}"
            if full not in known:
                near = difflib.get_close_matches(full, known, n=1, cutoff=0.0)[0]
                raise ConfigError(f"{origin}: unknown setting `{full}`; the nearest known one is `{near}`")
            child = node._get_node(key)
            if isinstance(child, DictConfig) and not child._is_none() and any(k.startswith(f"{full}.") for k in known):
                walk(child, f"{full}.")

    walk(settings, "")


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Defaults, then the YAML at `path` with its parents, then dot-list `overrides` such as `cache.top_k=1`.

    Returns a `Config` instance. Raises `ConfigError` for a missing file, an unknown key (naming the nearest known
    one), a value of the wrong type or an impossible combination.
    """
    overrides = overrides or []
    for item in overrides:
        if "=" not in item:
            raise ConfigError(f"override `{item}`: expected key=value, for example cache.top_k=1")
    from_file = _read_yaml(Path(path))
    from_line = OmegaConf.from_dotlist(overrides)
    _check_keys(from_file, str(path))
    _check_keys(from_line, "command line")
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), from_file, from_line))
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        key = getattr(error, "full_key", None) or "?"
        raise ConfigError(f"{path}: setting `{key}`: {reason}") from error
    validate(config)
    return config


def section(kind: type[Section], name: str, values: Mapping[str, Any]) -> Section:
    """Settings of one section from plain values, as a bundle stores them. Raises `ConfigError`."""
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), dict(values)))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "?"
        raise ConfigError(f"setting `{name}.{key}`: {str(error).splitlines()[0]}") from error


def validate(config: Config) -> None:
    """Raise `ConfigError` for values that no run could use; needs no model and no file."""

    def require(condition: bool, key: str, value: Any, expected: str) -> None:
        if not condition:
            raise ConfigError(f"setting `{key}` is {value}: {expected}")

    video, cache, sampler, train, data = config.video, config.cache, config.sampler, config.train, config.data
    for name in ("height", "width"):
        value = getattr(video, name)
        require(value > 0 and value % 16 == 0, f"video.{name}", value, "must be a positive multiple of 16 pixels")
    for name in ("fps", "frames_per_chunk", "trained_frames"):
        require(getattr(video, name) > 0, f"video.{name}", getattr(video, name), "must be positive")
    for name in ("sink", "recent", "top_k"):
        require(getattr(cache, name) >= 0, f"cache.{name}", getattr(cache, name), "must not be negative")
    if cache.unit == SizeUnit.frames:
        for name in ("sink", "recent"):
            value = getattr(cache, name)
            require(
                value % video.frames_per_chunk == 0,
                f"cache.{name}",
                f"{value} frames",
                f"must be a multiple of video.frames_per_chunk={video.frames_per_chunk}",
            )
    capacity = cache.mid_capacity
    require(capacity in (None, "auto") or (isinstance(capacity, int) and capacity > 0), "cache.mid_capacity", capacity,
            "must be a positive number of chunks, auto, or null for an unbounded archive")  # fmt: skip
    require(0 < cache.query_fraction <= 1, "cache.query_fraction", cache.query_fraction, "must be in (0, 1]")
    require(cache.refresh_interval >= 1, "cache.refresh_interval", cache.refresh_interval, "must be at least 1")
    require(len(cache.compressor.channels) > 0, "cache.compressor.channels", cache.compressor.channels, "needs a stage")
    require(len(sampler.steps) > 0, "sampler.steps", sampler.steps, "needs at least one timestep")
    require(all(0 < step <= 1000 for step in sampler.steps), "sampler.steps", sampler.steps, "must lie in (0, 1000]")
    require(sorted(sampler.steps, reverse=True) == list(sampler.steps), "sampler.steps", sampler.steps,
            "must go down from noise to clean")  # fmt: skip
    require(sampler.num_steps >= 1, "sampler.num_steps", sampler.num_steps, "must be at least 1")
    require(sampler.shift is None or sampler.shift > 0, "sampler.shift", sampler.shift, "must be positive")
    require(0 <= sampler.context_timestep <= 1000, "sampler.context_timestep", sampler.context_timestep,
            "must lie in [0, 1000]")  # fmt: skip
    inference = config.inference
    require(inference.num_output_frames > 0, "inference.num_output_frames", inference.num_output_frames,
            "must be positive")  # fmt: skip
    require(
        inference.num_output_frames % video.frames_per_chunk == 0,
        "inference.num_output_frames",
        inference.num_output_frames,
        f"must be a multiple of video.frames_per_chunk={video.frames_per_chunk}",
    )
    require(inference.num_samples > 0, "inference.num_samples", inference.num_samples, "must be positive")
    require(train.max_steps > 0, "train.max_steps", train.max_steps, "must be positive")
    require(train.batch_size > 0, "train.batch_size", train.batch_size, "must be positive")
    require(train.gradient_accumulation > 0, "train.gradient_accumulation", train.gradient_accumulation,
            "must be positive")  # fmt: skip
    require(train.sharding != Sharding.none or train.text_placement != TextPlacement.sharded, "train.text_placement",
            "sharded", "needs train.sharding=full or hybrid")  # fmt: skip
    require(train.shard_size is None or train.sharding == Sharding.hybrid, "train.shard_size", train.shard_size,
            f"only train.sharding=hybrid reads it, not {train.sharding.value}; unset it")  # fmt: skip
    require(train.sharding == Sharding.none or train.stage != Stage.vae, "train.sharding", train.sharding.value,
            "the VAE is not run by its forward, which sharding needs; set it to none")  # fmt: skip
    for name in ("checkpoint_every", "keep_checkpoints", "log_every"):
        require(getattr(train, name) >= 1, f"train.{name}", getattr(train, name), "must be at least 1")
    for i, phase in enumerate(train.phases):
        for name in ("steps", "frames", "batch_size"):
            value = getattr(phase, name)
            require(value > 0, f"train.phases[{i}].{name}", value, "must be positive")
    require(len(train.optimizer.betas) == 2 and all(0 <= beta < 1 for beta in train.optimizer.betas),
            "train.optimizer.betas", train.optimizer.betas, "must be two numbers in [0, 1)")  # fmt: skip
    require(0 <= train.ema_decay < 1, "train.ema_decay", train.ema_decay, "must lie in [0, 1)")
    require(0 <= train.prompt_dropout <= 1, "train.prompt_dropout", train.prompt_dropout, "must lie in [0, 1]")
    require(0 <= train.context_noise_timestep <= 1000, "train.context_noise_timestep", train.context_noise_timestep,
            "must lie in [0, 1000]")  # fmt: skip
    require(train.mixed_precision in ("no", "bf16"), "train.mixed_precision", train.mixed_precision,
            "must be no or bf16")  # fmt: skip
    require(train.tracker in (None, "wandb", "tensorboard"), "train.tracker", train.tracker,
            "must be null, wandb or tensorboard")  # fmt: skip
    require(data.kind in ("sprites", "latents", "prompts"), "data.kind", data.kind,
            "must be sprites, latents or prompts")  # fmt: skip
    require(data.clip_frames % 4 == 1, "data.clip_frames", data.clip_frames, "must be 4n + 1 (the VAE's causal stride)")
    stories = data.stories
    require(len(stories.shot_chunks) == 2 and 1 <= stories.shot_chunks[0] <= stories.shot_chunks[1],
            "data.stories.shot_chunks", stories.shot_chunks, "must be [least, most], at least 1")  # fmt: skip
    for name in ("share", "first_weight"):
        value = getattr(stories, name)
        require(0 <= value <= 1, f"data.stories.{name}", value, "must lie in [0, 1]")
    require(stories.count >= 0, "data.stories.count", stories.count, "must not be negative")
    require(stories.chunks >= 1, "data.stories.chunks", stories.chunks, "must be at least 1")
    require(not stories.count or data.kind == "sprites", "data.stories.count", stories.count, "needs data.kind=sprites")
    require(data.shard_size >= 1, "data.shard_size", data.shard_size, "must be at least 1")
    require(data.workers >= 0, "data.workers", data.workers, "must not be negative")
    for name, largest in (("crop_height", video.height), ("crop_width", video.width)):
        value = getattr(config.vae, name)
        fits = 0 < value <= largest and value % 16 == 0
        require(fits or not config.vae.crop_steps, f"vae.{name}", value, f"must be a multiple of 16, at most {largest}")
    require(config.vae.max_sprites >= 1, "vae.max_sprites", config.vae.max_sprites, "must be at least 1")
    _validate_distillation(config, require)


def _validate_distillation(config: Config, require: Callable[[bool, str, Any, str], None]) -> None:
    ode, dmd, chunk = config.ode, config.dmd, config.video.frames_per_chunk
    require(config.consistency.grid_steps >= 2, "consistency.grid_steps", config.consistency.grid_steps,
            "must be at least 2")  # fmt: skip
    for name in ("num_trajectories", "shard_size", "grid_steps"):
        require(getattr(ode, name) >= 1, f"ode.{name}", getattr(ode, name), "must be at least 1")
    require(dmd.critic_updates >= 1, "dmd.critic_updates", dmd.critic_updates, "must be at least 1")
    require(dmd.score_shift > 0, "dmd.score_shift", dmd.score_shift, "must be positive")
    require(0 < dmd.min_timestep <= dmd.max_timestep <= 1000, "dmd.min_timestep", dmd.min_timestep,
            f"0 < dmd.min_timestep <= dmd.max_timestep={dmd.max_timestep} <= 1000 must hold")  # fmt: skip
    longest, window = dmd.max_rollout_frames, config.video.trained_frames
    require(
        longest is None or (longest >= window and longest % chunk == 0),
        "dmd.max_rollout_frames",
        longest,
        f"must be null, or at least video.trained_frames={window} and a multiple of video.frames_per_chunk={chunk}",
    )


def to_yaml(config: Config) -> str:
    """The resolved config as YAML, to lie beside every output."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))
