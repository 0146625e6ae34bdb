"""Every setting of the project, declared once: typed defaults, then YAML (and its `base:` files), then `key=value`.

    config = load_config("configs/tiny/demo.yaml", ["cache.top_k=1"])

The dataclasses below are the only place where a default stands. A YAML may name one or several parents with `base:`
(paths relative to the file that names them); later files win. Unknown keys, wrong types and impossible values raise
`ConfigError`, whose message names the key, the value and the way out.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException


class ConfigError(ValueError):
    """A setting that cannot be: unknown, of the wrong type, or impossible together with another."""


class Stage(str, Enum):
    vae = "vae"
    teacher = "teacher"
    ar_diffusion = "ar_diffusion"
    consistency = "consistency"
    ode = "ode"
    dmd = "dmd"


class CacheKind(str, Enum):
    pack = "pack"  # sink + selected mid + recent
    full = "full"  # all history, full resolution
    window = "window"  # recent only
    sink = "sink"  # sink + recent


class SizeUnit(str, Enum):
    chunks = "chunks"
    frames = "frames"  # latent frames; must be multiples of the chunk


class Compressor(str, Enum):
    hr_spatial = "hr_spatial"
    identity = "identity"


class Selection(str, Enum):
    recency = "recency"
    query_score = "query_score"


class QueryScope(str, Enum):
    current = "current"
    recent_and_current = "recent+current"


class Refresh(str, Enum):
    per_chunk = "per_chunk"
    per_forward = "per_forward"


class Temporal(str, Enum):
    absolute = "absolute"
    packed = "packed"
    fit = "fit"


class MidSpan(str, Enum):
    source = "source"
    compressed = "compressed"


class Spatial(str, Enum):
    grid = "grid"
    aligned = "aligned"


class OptimizerKind(str, Enum):
    adamw = "adamw"
    muon = "muon"  # the blocks' matrices by Muon, everything else by AdamW


class LossWeighting(str, Enum):
    bell = "bell"  # the schedule's training weight: most at t = 500, none at t = 1000
    none = "none"


class Sharding(str, Enum):
    none = "none"  # every rank holds all weights
    full = "full"  # all ranks share one copy
    hybrid = "hybrid"  # groups of `shard_size` ranks share a copy each


class TextPlacement(str, Enum):
    device = "device"  # on every rank's device, in float32
    cpu = "cpu"  # in the memory of every rank's host, in the dtype it is stored in
    sharded = "sharded"  # in shards on the devices, in the dtype it is stored in


class SamplerKind(str, Enum):
    few_step = "few_step"
    euler = "euler"


@dataclass
class VideoConfig:
    """What is generated, in pixels. The latent size follows from the VAE's strides."""

    height: int = 480
    width: int = 832
    fps: int = 16
    frames_per_chunk: int = 3  # latent frames
    trained_frames: int = 21  # latent frames of a training clip; the range that `fit` positions stay inside


@dataclass
class ModelConfig:
    """The causal DiT: where its weights are, and its shape where none are loaded (diffusers' names)."""

    bundle: str | None = None  # diffusers-style folder: transformer, vae, text_encoder, tokenizer, scheduler
    checkpoint: str | None = None  # overrides the bundle's transformer: folder, .safetensors or .pt
    use_ema: bool = False
    random_init: bool = False  # benchmarks and fresh training: the shape below, random weights
    num_layers: int = 30
    num_attention_heads: int = 12
    attention_head_dim: int = 128
    ffn_dim: int = 8960
    in_channels: int = 16
    text_dim: int = 4096
    text_len: int = 512
    text_layers: int = 2  # of the small text encoder that a teacher trains along
    text_heads: int = 4
    freq_dim: int = 256
    cross_attn_norm: bool = True
    eps: float = 1e-6


@dataclass
class CompressorConfig:
    kind: Compressor = Compressor.hr_spatial
    channels: list[int] = field(default_factory=lambda: [64, 256, 1024])  # one spatial halving each


@dataclass
class CacheConfig:
    """The three-part KV cache (PackForcing, arXiv 2603.25730, section 3.2) and its baselines."""

    kind: CacheKind = CacheKind.pack
    unit: SizeUnit = SizeUnit.chunks  # of sink and recent
    sink: int = 3
    recent: int = 2
    mid_capacity: int | None = None  # chunks kept in the archive; null: unbounded
    top_k: int = 16  # mid chunks attended
    selection: Selection = Selection.query_score
    query_scope: QueryScope = QueryScope.current
    refresh: Refresh = Refresh.per_chunk
    refresh_interval: int = 1  # chunks that share one selection (per_chunk only)
    query_fraction: float = 0.125  # sampled queries per chunk, at least `min_queries`
    min_queries: int = 32
    temporal: Temporal = Temporal.packed
    mid_span: MidSpan = MidSpan.source
    spatial: Spatial = Spatial.grid
    compressor: CompressorConfig = field(default_factory=CompressorConfig)
    archive_device: str = "cpu"  # where unselected mid chunks wait


@dataclass
class SamplerConfig:
    kind: SamplerKind = SamplerKind.few_step
    steps: list[float] = field(default_factory=lambda: [1000.0, 750.0, 500.0, 250.0])  # few_step, before warping
    warp: bool = True  # few_step: read `steps` through the shifted table
    num_steps: int = 30  # euler
    shift: float = 5.0
    guidance: float = 1.0  # 1: no classifier-free guidance, one branch only
    negative_prompt: str = ""
    context_timestep: float = 0.0  # at which a finished chunk is committed


@dataclass
class InferenceConfig:
    data_path: str | None = None  # one prompt per line
    output_folder: str | None = None
    num_output_frames: int = 21  # latent frames
    num_samples: int = 1  # videos per prompt
    device: str = "auto"  # auto: cuda where there is one
    dtype: str = "auto"  # auto: bfloat16 on cuda, float32 on cpu
    attention_backend: str | None = None  # a name of diffusers' dispatcher; null: its default
    compile: bool = False  # torch.compile of the transformer blocks
    threads: int | None = None  # CPU threads; null: torch's default


@dataclass
class OptimizerConfig:
    kind: OptimizerKind = OptimizerKind.adamw
    lr: float = 2e-6
    betas: list[float] = field(default_factory=lambda: [0.0, 0.999])
    weight_decay: float = 0.01
    warmup_steps: int = 0
    decay_steps: int = 0  # the last steps of the run, over which the rate falls linearly to zero


@dataclass
class PhaseConfig:
    """A stretch of training with its own clip length and batch."""

    steps: int
    frames: int  # latent frames, counted from the clip's start
    batch_size: int  # per rank and micro-step


@dataclass
class TrainConfig:
    stage: Stage | None = None
    logdir: str | None = None
    max_steps: int = 3000
    batch_size: int = 1  # per rank and micro-step
    gradient_accumulation: int = 1
    total_batch_size: int | None = None  # checked against world size x batch_size x gradient_accumulation
    phases: list[PhaseConfig] = field(default_factory=list)  # curriculum in place of batch_size; the last one goes on
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    max_grad_norm: float = 10.0
    ema_decay: float = 0.99
    ema_start_step: int = 200
    mixed_precision: str = "bf16"  # no | bf16
    sharding: Sharding = Sharding.none  # FSDP2; of the frozen models too
    shard_size: int | None = None  # hybrid: ranks that share a copy; null: those of one machine
    gradient_checkpointing: bool = True
    compile: bool = False
    checkpoint_every: int = 250
    keep_checkpoints: int = 2
    log_every: int = 1
    sample_every: int = 0  # steps between fixed-prompt sample videos; 0: never
    sample_prompts: list[str] = field(default_factory=list)
    sample_held_out: int = 0  # further sample prompts: the first captions of the sprite world's held-out split
    sample_frames: int = 21  # latent frames
    sample_long_frames: int = 0  # latent frames of a second, longer set of sample videos; 0: none
    init_from: str | None = None  # transformer folder a teacher or AR model starts from; null: `model`'s shape, random
    text_from: str | None = None  # folder with text_encoder and tokenizer; null: a small one is trained along (teacher)
    text_placement: TextPlacement = TextPlacement.device  # of a frozen text encoder
    shift: float = 5.0  # of the training noise schedule
    loss_weighting: LossWeighting = LossWeighting.bell
    prompt_dropout: float = 0.0  # share of captions replaced by the negative prompt
    context_noise_timestep: float = 0.0  # noise level of the clean context in teacher forcing, 0..1000
    tracker: str | None = None  # null | wandb | tensorboard
    project: str = "packforcing"
    threads: int | None = None


@dataclass
class DataConfig:
    kind: str = "sprites"  # sprites: rendered on the fly; latents: a folder of prepared shards; prompts: text alone
    path: str | None = None  # folder of latent shards (written once where kind is sprites), or a file of prompts
    vae: str | None = None  # VAE folder that encodes the clips and decodes the samples
    num_clips: int = 4096
    num_stills: int = 0  # further clips of a single frame: cheap lessons in what things look like
    clip_frames: int = 45  # pixel frames; 4n + 1
    text_embeddings: str | None = None  # folder of stored prompt embeddings, in place of a text encoder in training
    shard_size: int = 64  # videos per file of latents (scripts/prepare_latents.py)
    workers: int = 2  # processes per rank that read videos (scripts/prepare_latents.py); 0: the main one


@dataclass
class VAEConfig:
    """The tiny world's VAE (`AutoencoderKLWan`, 4x in time and 8x in space) and the objective of the `vae` stage."""

    z_dim: int = 16
    encoder_dim: int = 16
    decoder_dim: int = 32
    dim_mult: list[int] = field(default_factory=lambda: [1, 2, 3])
    res_blocks: int = 1
    patch_size: int = 2
    initial_logvar: float = -5.0  # of the posterior; its deviation starts at 0.08
    mse_weight: float = 4.0  # against L1's 1
    kl_weight: float = 2e-4
    max_sprites: int = 3  # on one training clip
    crop_height: int = 32
    crop_width: int = 48
    crop_steps: int = 0  # steps on crops of that size, so that a batch holds more clips; whole frames from then on


@dataclass
class ConsistencyConfig:
    """Causal consistency distillation (stage `consistency`); its target is the EMA, see `train.ema_decay`."""

    grid_steps: int = 48  # Euler steps of the teacher from noise to clean
    guidance: float = 3.0  # of the teacher's step


@dataclass
class ODEConfig:
    """Trajectories of the AR model (`scripts/generate_ode_pairs.py`) and the regression on them (stage `ode`)."""

    path: str | None = None  # folder of trajectory shards
    num_trajectories: int = 1024
    shard_size: int = 16  # trajectories per file
    grid_steps: int = 48  # Euler steps; `sampler.steps` must be among them
    guidance: float = 6.0


@dataclass
class DMDConfig:
    """Distribution-matching distillation (stage `dmd`): both scores and the self-rollout."""

    teacher: str | None = None  # folder of the frozen WanTransformer3DModel, the real score
    critic: str | None = None  # folder that the critic, the fake score, starts from; null: the teacher's
    critic_updates: int = 5  # per update of the generator
    critic_optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=4e-7))
    guidance: float = 3.0  # of the real score: cond + g * (cond - uncond)
    score_shift: float = 5.0  # of the timesteps at which both scores are asked
    min_timestep: float = 20.0
    max_timestep: float = 980.0
    max_rollout_frames: int | None = None  # latent frames; null: video.trained_frames. The loss is on the last of them


@dataclass
class Config:
    """The whole. Sections are documented at their classes."""

    seed: int = 0
    video: VideoConfig = field(default_factory=VideoConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    data: DataConfig = field(default_factory=DataConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    consistency: ConsistencyConfig = field(default_factory=ConsistencyConfig)
    ode: ODEConfig = field(default_factory=ODEConfig)
    dmd: DMDConfig = field(default_factory=DMDConfig)


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
    require(cache.mid_capacity is None or cache.mid_capacity > 0, "cache.mid_capacity", cache.mid_capacity,
            "must be positive, or null for an unbounded archive")  # fmt: skip
    require(0 < cache.query_fraction <= 1, "cache.query_fraction", cache.query_fraction, "must be in (0, 1]")
    require(cache.refresh_interval >= 1, "cache.refresh_interval", cache.refresh_interval, "must be at least 1")
    require(len(cache.compressor.channels) > 0, "cache.compressor.channels", cache.compressor.channels, "needs a stage")
    require(len(sampler.steps) > 0, "sampler.steps", sampler.steps, "needs at least one timestep")
    require(all(0 < step <= 1000 for step in sampler.steps), "sampler.steps", sampler.steps, "must lie in (0, 1000]")
    require(sorted(sampler.steps, reverse=True) == list(sampler.steps), "sampler.steps", sampler.steps,
            "must go down from noise to clean")  # fmt: skip
    require(sampler.num_steps >= 1, "sampler.num_steps", sampler.num_steps, "must be at least 1")
    require(sampler.shift > 0, "sampler.shift", sampler.shift, "must be positive")
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
