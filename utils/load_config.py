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
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf._yaml import get_yaml_loader
from omegaconf.errors import OmegaConfBaseException

from utils.choices import CacheKind, CompressedKV, Sharding, SizeUnit, TextPlacement
from utils.config import Config, ConfigError, require
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


def first_line(error: BaseException) -> str:
    """Of an error's message; its type where there is none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


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
        raise ConfigError(f"config {path}: not a text file in UTF-8 ({first_line(error)})") from error
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
        raise ConfigError(f"{origin}: " + (f"setting `{key}`: " if key else "") + first_line(error)) from error


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


def load_config(path: str | Path, overrides: Sequence[str] = (), settings: Mapping[str, Any] | None = None) -> Config:
    """Defaults, then the YAML at `path` with its parents, then dot-list `overrides` such as `cache.top_k=1`, then
    `settings` by such keys. Raises `ConfigError` for a missing file, an unknown key (naming the nearest known one), a
    value of the wrong type or an impossible combination."""
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
            elif isinstance(one, str) and ("\0" in one or not is_text(one)):
                raise ConfigError(f"setting `{key}` is {one!r}: holds what is no character of a text")


def is_text(value: Any) -> bool:
    """Whether it is a string that UTF-8 has. Half of a surrogate pair is none: so come bytes of the command line that
    are not UTF-8."""
    return isinstance(value, str) and value.encode("utf-8", "replace").decode() == value


def validate(config: Config) -> None:
    """Raise `ConfigError` for values that no run could use; needs no model and no file."""
    _check_values(config)
    need, dmd, longest = partial(require, config), config.dmd, config.dmd.max_rollout_frames
    video, cache, sampler, train, data = config.video, config.cache, config.sampler, config.train, config.data
    chunk, window, told, vae = video.frames_per_chunk, video.trained_frames, data.stories, config.vae
    multiple = f"must be a multiple of video.frames_per_chunk={chunk}"
    for name in ("height", "width"):
        size, crop = getattr(video, name), getattr(vae, f"crop_{name}")
        need(f"video.{name}", size % 16 == 0, "must be a positive multiple of 16 pixels")
        need(f"vae.crop_{name}", not vae.crop_steps or (crop <= size and crop % 16 == 0),
             f"must be a multiple of 16, at most {size}")  # fmt: skip
        need(f"video.{name}", train.stage != "vae" or size % (4 * vae.patch_size) == 0,
             f"must be a multiple of {4 * vae.patch_size} px, 4 x vae.patch_size")  # fmt: skip
    for name in ("sink", "recent"):
        in_chunks = cache.unit == SizeUnit.chunks or cache.kind == CacheKind.deep_forcing
        need(f"cache.{name}", in_chunks or getattr(cache, name) % chunk == 0, f"as frames it {multiple}")
    need("cache.temporal", cache.kind != CacheKind.deep_forcing or cache.temporal != "fit",
         "with cache.kind=deep_forcing it must be packed or absolute")  # fmt: skip
    need("cache.mid_capacity", cache.mid_capacity == "auto" or not isinstance(cache.mid_capacity, str),
         "must be a number of chunks, auto, or null for an unbounded archive")  # fmt: skip
    need("cache.compressor.channels", cache.compressor.channels, "needs a stage")
    need("cache.compressor.kv", cache.compressor.kind != "identity" or cache.compressor.kv == CompressedKV.project,
         "kind=identity has its K, V already; choose another kind, or kv=project")  # fmt: skip
    need("sampler.steps", sampler.steps, "needs at least one timestep")
    need("sampler.steps", sorted(sampler.steps, reverse=True) == sampler.steps, "must go down from noise to clean")
    need("inference.num_output_frames", config.inference.num_output_frames % chunk == 0, multiple)
    unsharded = train.sharding == Sharding.none
    need("train.text_placement", not unsharded or train.text_placement != TextPlacement.sharded,
         "needs train.sharding=full or hybrid")  # fmt: skip
    need("train.shard_size", train.shard_size is None or train.sharding == Sharding.hybrid,
         f"only train.sharding=hybrid reads it, not {train.sharding}; unset it")  # fmt: skip
    need("train.sharding", unsharded or train.stage != "vae",
         "the VAE is not run by its forward, which sharding needs; set it to none")  # fmt: skip
    need("train.optimizer.betas", len(train.optimizer.betas) == 2, "must be two numbers")
    need("dmd.critic_optimizer.betas", len(dmd.critic_optimizer.betas) == 2, "must be two numbers")
    need("data.clip_frames", data.clip_frames % 4 == 1, "must be 4n + 1 (the VAE's causal stride)")
    need("data.stories.shot_chunks", len(told.shot_chunks) == 2 and told.shot_chunks == sorted(told.shot_chunks),
         "must be [least, most]")  # fmt: skip
    need("data.stories.count", not told.count or data.kind == "sprites", "needs data.kind=sprites")
    need("data.num_clips", data.num_clips or told.count or data.kind != "sprites", "needs clips, or data.stories.count")
    need("vae.dim_mult", len(vae.dim_mult) == 3, "must be three, as it halves twice")
    last = dmd.max_timestep
    need("dmd.min_timestep", dmd.min_timestep <= last, f"must be at most dmd.max_timestep={last}")
    need("dmd.max_rollout_frames", longest is None or (longest >= window and longest % chunk == 0),
         f"must be null, or at least video.trained_frames={window} and a multiple of video.frames_per_chunk={chunk}",
    )  # fmt: skip


def plain(config: Config) -> dict[str, Any]:
    """The resolved config as plain values, for JSON."""
    return OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)


def to_yaml(config: Config) -> str:
    """The resolved config as YAML, to lie beside every output."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))
