"""From files and the command line to a `Config`: typed defaults, then YAML (and its `base:` files), then `key=value`.

    config = load_config("configs/tiny/demo.yaml", ["cache.top_k=1"])

A YAML may name one or several parents with `base:` (paths relative to the file that names them); later files win.
Unknown keys, wrong types and impossible values raise `ConfigError`, whose message names the key, the value and the way
out.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf._yaml import get_yaml_loader
from omegaconf.errors import OmegaConfBaseException

from utils.choices import CacheKind, CompressedKV, Sharding, SizeUnit, TextPlacement
from utils.config import Config, ConfigError
from utils.foreign_keys import OURS

Section = TypeVar("Section")
MAX_ITEMS = 10_000  # of a list


def _yaml_loader() -> type[yaml.Loader]:
    """OmegaConf's, in which `no`, `off`, `yes` and `on` are words, as in YAML 1.2."""

    class Loader(get_yaml_loader()):
        pass

    words = set("yYnNoO")
    Loader.yaml_implicit_resolvers = {
        first: [item for item in items if first not in words or item[0] != "tag:yaml.org,2002:bool"]
        for first, items in Loader.yaml_implicit_resolvers.items()
    }
    return Loader


def _parse(text: str, origin: str) -> Any:
    try:
        return yaml.load(text, Loader=_LOADER)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{origin}: not valid YAML ({' '.join(str(error).split())[:200]})") from error


_LOADER = _yaml_loader()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _read_yaml(path: Path, seen: tuple[Path, ...] = ()) -> DictConfig:
    """One file merged over the parents it names."""
    path = path.resolve()
    if path in seen:
        raise ConfigError(f"config {path}: `base` goes round in a circle; remove one of the links")
    if not path.is_file():
        raise ConfigError(f"config file {path} does not exist")
    try:
        content = _parse(path.read_text(encoding="utf-8"), f"config {path}")
    except UnicodeDecodeError as error:
        raise ConfigError(f"config {path}: not a text file in UTF-8 ({_first_line(error)})") from error
    if not isinstance(content, dict):
        raise ConfigError(f"config {path}: expected a mapping of settings, found {type(content).__name__}")
    base = content.pop("base", None)
    parents = base if isinstance(base, list) else [] if base is None else [base]
    if not all(isinstance(parent, str) for parent in parents):
        raise ConfigError(f"config {path}: `base` is {base}: expected the path of a config, or a list of them")
    merged = [_read_yaml(path.parent / parent, (*seen, path)) for parent in parents]
    with _told(f"config {path}"):
        return OmegaConf.merge(*merged, OmegaConf.create(content))


@contextmanager
def _told(origin: str) -> Iterator[None]:
    """Errors of OmegaConf as `ConfigError`, with where the value is from."""
    try:
        yield
    except (OmegaConfBaseException, ValueError, TypeError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        key = getattr(error, "full_key", None)
        raise ConfigError(f"{origin}: " + (f"setting `{key}`: " if key else "") + _first_line(error)) from error


def _read_overrides(overrides: Sequence[str]) -> DictConfig:
    """`cache.top_k=1` and the like, values in YAML."""
    found = OmegaConf.create()
    for item in overrides:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise ConfigError(f"override `{item}`: expected key=value, for example cache.top_k=1")
        with _told(f"command line, `{item}`"):
            OmegaConf.update(found, key, _parse(value, f"command line, `{item}`"))
    return found


def known_settings(node: Any = None, prefix: str = "") -> list[str]:
    """Keys of all settings and sections, `model.bundle` and the like."""
    node, keys = Config() if node is None else node, []
    for item in fields(node):
        keys.append(prefix + item.name)
        value = getattr(node, item.name)
        if is_dataclass(value):
            keys += known_settings(value, f"{prefix}{item.name}.")
    return keys


def _check_keys(settings: DictConfig, origin: str) -> None:
    known, unknown = known_settings(), []

    def walk(node: DictConfig, prefix: str) -> None:
        for key in node:
            full, child = f"{prefix}{key}", node._get_node(key)
            if full not in known:
                inside = list(child) if isinstance(child, DictConfig) and full == "model_kwargs" else [None]
                unknown.extend(full if name is None else f"{full}.{name}" for name in inside)
            elif any(name.startswith(f"{full}.") for name in known):
                if not isinstance(child, DictConfig) or child._is_none() or child._is_missing():
                    raise ConfigError(f"{origin}: setting `{full}` is {child}: expected a mapping of settings")
                walk(child, f"{full}.")

    walk(settings, "")
    if not unknown:
        return
    hints = [_hint(key, known) for key in unknown]
    table = "; docs/other_configs.md has them all" if OURS.keys() & set(unknown) else ""
    raise ConfigError(f"{origin}: unknown setting {', '.join(hints)}{table}")


def _hint(key: str, known: list[str]) -> str:
    """What a key that is unknown here may mean."""
    if key in OURS:
        return f"`{key}` (here {OURS[key] or 'there is nothing like it'})"
    return f"`{key}`; the nearest known one is `{difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]}`"


def load_config(
    path: str | Path, overrides: Sequence[str] = (), settings: Mapping[str, Any] | None = None
) -> Config:
    """Defaults, then the YAML at `path` with its parents, then dot-list `overrides` such as `cache.top_k=1`, then
    `settings` by such keys.

    Raises `ConfigError` for a missing file, an unknown key (naming the nearest known one), a value of the wrong type or
    an impossible combination.
    """
    merged = OmegaConf.structured(Config)
    sources = {str(path): _read_yaml(Path(path)), "command line": _read_overrides(overrides)}
    for key, value in (settings or {}).items():
        with _told(f"command line, {key}"):
            OmegaConf.update(sources["command line"], key, value)
    for origin, settings in sources.items():
        _check_keys(settings, origin)
    for origin, settings in sources.items():
        with _told(origin):
            merged = OmegaConf.merge(merged, settings)
    with _told("settings"):
        config = OmegaConf.to_object(merged)
    validate(config)
    return config


def section(kind: type[Section], name: str, values: Mapping[str, Any]) -> Section:
    """Settings of one section from plain values, as a bundle stores them. Raises `ConfigError`."""
    with _told(f"settings `{name}`"):
        found = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), dict(values)))
    _check_values(found, f"{name}.")
    return found


def _check_values(node: Any, prefix: str = "") -> None:
    """Numbers against the intervals they were declared with; text must be such that files can be called so."""
    for item in fields(node):
        key, value, interval = prefix + item.name, getattr(node, item.name), item.metadata.get("interval")
        values = value if isinstance(value, list) else [value]
        if len(values) > MAX_ITEMS:
            raise ConfigError(f"setting `{key}` has {len(values)} items: at most {MAX_ITEMS} are allowed")
        for place, one in enumerate(values):
            if is_dataclass(one):
                _check_values(one, f"{key}[{place}]." if value is values else f"{key}.")
            elif isinstance(one, int | float) and interval is not None and one not in interval:
                null = ", or be null" if "None" in str(item.type) else ""
                raise ConfigError(f"setting `{key}` is {value}: must lie in {interval.text}{null}")
            elif isinstance(one, str) and not _is_text(one):
                raise ConfigError(f"setting `{key}` is {one!r}: holds what is no character of a text")


def _is_text(value: str) -> bool:
    try:
        return "\0" not in value and value.encode() is not None
    except UnicodeEncodeError:  # half of a surrogate pair: what the command line makes of bytes that are not UTF-8
        return False


def validate(config: Config) -> None:
    """Raise `ConfigError` for values that no run could use; needs no model and no file."""

    def require(condition: bool, key: str, value: Any, expected: str) -> None:
        if not condition:
            raise ConfigError(f"setting `{key}` is {value}: {expected}")

    _check_values(config)
    video, cache, sampler, train, data = config.video, config.cache, config.sampler, config.train, config.data
    chunk, multiple = video.frames_per_chunk, f"must be a multiple of video.frames_per_chunk={video.frames_per_chunk}"
    for name in ("height", "width"):
        value = getattr(video, name)
        require(value % 16 == 0, f"video.{name}", value, "must be a positive multiple of 16 pixels")
    for name in ("sink", "recent"):
        value = getattr(cache, name)
        in_chunks = cache.unit == SizeUnit.chunks or cache.kind == CacheKind.deep_forcing
        require(in_chunks or value % chunk == 0, f"cache.{name}", f"{value} frames", multiple)
    capacity = cache.mid_capacity
    require(capacity == "auto" or not isinstance(capacity, str), "cache.mid_capacity", capacity,
            "must be a number of chunks, auto, or null for an unbounded archive")  # fmt: skip
    require(len(cache.compressor.channels) > 0, "cache.compressor.channels", cache.compressor.channels, "needs a stage")
    require(cache.compressor.kind != "identity" or cache.compressor.kv == CompressedKV.project, "cache.compressor.kv",
            cache.compressor.kv, "kind=identity has its K, V already; choose another kind, or kv=project")  # fmt: skip
    require(len(sampler.steps) > 0, "sampler.steps", sampler.steps, "needs at least one timestep")
    require(sorted(sampler.steps, reverse=True) == list(sampler.steps), "sampler.steps", sampler.steps,
            "must go down from noise to clean")  # fmt: skip
    frames = config.inference.num_output_frames
    require(frames % chunk == 0, "inference.num_output_frames", frames, multiple)
    require(train.sharding != Sharding.none or train.text_placement != TextPlacement.sharded, "train.text_placement",
            "sharded", "needs train.sharding=full or hybrid")  # fmt: skip
    require(train.shard_size is None or train.sharding == Sharding.hybrid, "train.shard_size", train.shard_size,
            f"only train.sharding=hybrid reads it, not {train.sharding.value}; unset it")  # fmt: skip
    require(train.sharding == Sharding.none or train.stage != "vae", "train.sharding", train.sharding.value,
            "the VAE is not run by its forward, which sharding needs; set it to none")  # fmt: skip
    optimizers = {"train.optimizer": train.optimizer, "dmd.critic_optimizer": config.dmd.critic_optimizer}
    for name, optimizer in optimizers.items():
        require(len(optimizer.betas) == 2, f"{name}.betas", optimizer.betas, "must be two numbers")
    require(data.clip_frames % 4 == 1, "data.clip_frames", data.clip_frames, "must be 4n + 1 (the VAE's causal stride)")
    stories = data.stories
    require(len(stories.shot_chunks) == 2 and stories.shot_chunks[0] <= stories.shot_chunks[1],
            "data.stories.shot_chunks", stories.shot_chunks, "must be [least, most]")  # fmt: skip
    require(not stories.count or data.kind == "sprites", "data.stories.count", stories.count, "needs data.kind=sprites")
    require(data.num_clips or stories.count or data.kind != "sprites", "data.num_clips", 0,
            "needs clips, or data.stories.count")  # fmt: skip
    for name, largest in (("crop_height", video.height), ("crop_width", video.width)):
        value = getattr(config.vae, name)
        fits = value <= largest and value % 16 == 0
        require(fits or not config.vae.crop_steps, f"vae.{name}", value, f"must be a multiple of 16, at most {largest}")
    require(len(config.vae.dim_mult) == 3, "vae.dim_mult", config.vae.dim_mult, "must be three, as it halves twice")
    for name in ("height", "width"):
        value, unit = getattr(video, name), 4 * config.vae.patch_size
        require(train.stage != "vae" or value % unit == 0, f"video.{name}", value, f"must be a multiple of {unit} px, "
                "4 x vae.patch_size")  # fmt: skip
    dmd, longest, window = config.dmd, config.dmd.max_rollout_frames, video.trained_frames
    require(dmd.min_timestep <= dmd.max_timestep, "dmd.min_timestep", dmd.min_timestep,
            f"must be at most dmd.max_timestep={dmd.max_timestep}")  # fmt: skip
    require(longest is None or (longest >= window and longest % chunk == 0), "dmd.max_rollout_frames", longest,
            f"must be null, or at least video.trained_frames={window} and a multiple of video.frames_per_chunk={chunk}",
    )  # fmt: skip


def to_yaml(config: Config) -> str:
    """The resolved config as YAML, to lie beside every output."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))
