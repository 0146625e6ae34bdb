"""Every setting of the project, declared once: here those of models and generation, in `utils/train_config.py` those of
training and its data. The dataclasses are the only place where a default stands; how YAML files and the command line
change them is in `utils/load_config.py`.
"""

from dataclasses import dataclass, field
from operator import attrgetter

from utils.choices import AtSwitch, CacheKind, Commit, CompressedKV, MidSpan, Offload, QueryScope, Refresh, SizeUnit
from utils.interval import within
from utils.train_config import ConsistencyConfig, DataConfig, DMDConfig, ODEConfig, TrainConfig, VAEConfig


class ConfigError(ValueError):
    """A setting that cannot be: unknown, of the wrong type, or impossible together with another."""

    exit_status = 2


@dataclass
class VideoConfig:
    """What is generated, in pixels. The latent size follows from the VAE's strides."""

    height: int = within("[16, 16384]", 480)
    width: int = within("[16, 16384]", 832)
    fps: int = within("[1, 1000]", 16)
    frames_per_chunk: int = within("[1, 1000]", 3)  # latent frames
    trained_frames: int = within("[1, 1e5]", 21)  # latent frames of a training clip; `fit` positions stay inside


@dataclass
class ModelConfig:
    """The causal DiT: where its weights are, and its shape where none are loaded (diffusers' names)."""

    bundle: str | None = None  # diffusers-style folder: transformer, vae, text_encoder, tokenizer, scheduler
    checkpoint: str | None = None  # overrides the bundle's transformer: folder, .safetensors or .pt
    use_ema: bool = False
    lora: list[str] = field(default_factory=list)  # files, each PATH or PATH:SCALE, in any layout of Wan LoRAs
    random_init: bool = False  # benchmarks and fresh training: the shape below, random weights
    num_layers: int = within("[1, 1000]", 30)
    num_attention_heads: int = within("[1, 1000]", 12)
    attention_head_dim: int = within("[2, 1024]", 128)
    ffn_dim: int = within("[1, 1e6]", 8960)
    in_channels: int = within("[1, 4096]", 16)
    text_dim: int = within("[1, 65536]", 4096)
    text_len: int = within("[1, 65536]", 512)
    text_layers: int = within("[1, 100]", 2)  # of the small text encoder that a teacher trains along
    text_heads: int = within("[1, 1000]", 4)
    freq_dim: int = within("[2, 65536]", 256)
    cross_attn_norm: bool = True
    eps: float = within("(0, 1)", 1e-6)


@dataclass
class CompressorConfig:
    kind: str = "hr_spatial"  # model/compressor.py has them all
    channels: list[int] = within("[1, 65536]", [64, 256, 1024])  # one spatial halving each
    kv: CompressedKV = CompressedKV.project  # how hidden tokens become K, V


@dataclass
class CacheConfig:
    """The three-part KV cache (PackForcing, arXiv 2603.25730, section 3.2) and its baselines."""

    kind: CacheKind = CacheKind.pack
    unit: SizeUnit = SizeUnit.chunks  # of sink and recent
    sink: int = within("[0, 1e6]", 3)
    recent: int = within("[0, 1e6]", 2)  # the current chunk not counted; with deep_forcing it is
    # Chunks kept in the archive; auto: what memory holds; null: unbounded.
    mid_capacity: int | str | None = within("[1, 1e9]", "auto")
    top_k: int = within("[0, 1e6]", 16)  # mid chunks attended
    selection: str = "query_score"  # or recency, random; model/cache/selection.py has them all
    selection_seed: int = within("[0, 9e18]", 0)  # of random
    query_scope: QueryScope = QueryScope.current
    window: int | None = within("[1, 1e6]", None)  # deep_forcing: latent frames attended, the current chunk's included
    # deep_forcing: frames' worth kept of a full window; null: its oldest frames slide out.
    budget: int | None = within("[1, 1e6]", None)
    align_mid: bool = True  # deep_forcing: kept tokens move up to the recent frames (packed); false: their true times
    refresh: Refresh = Refresh.per_chunk
    refresh_interval: int = within("[1, 1e6]", 1)  # chunks that share one selection (per_chunk only)
    query_fraction: float = within("(0, 1]", 0.125)  # sampled queries per chunk, at least `min_queries`
    min_queries: int = within("[1, 1e9]", 32)
    temporal: str = "packed"  # or fit, absolute; model/cache/positions.py has them all
    mid_span: MidSpan = MidSpan.source
    spatial: str = "grid"  # or aligned
    compressor: CompressorConfig = field(default_factory=CompressorConfig)
    at_switch: AtSwitch = AtSwitch.keep
    archive_device: str = "cpu"  # where unselected mid chunks wait
    sink_dtype: str | None = None  # bfloat16, fp8 or int8 (a scale per token and head); null: the model's
    mid_dtype: str | None = None  # of the archive and of what is attended of it


@dataclass
class SamplerConfig:
    kind: str = "few_step"  # or euler; pipeline/generate/sampler.py has them all
    steps: list[float] = within("(0, 1000]", [1000.0, 750.0, 500.0, 250.0])  # few_step, before warping
    warp: bool = True  # few_step: read `steps` through the shifted table
    num_steps: int = within("[1, 1000]", 30)  # euler
    shift: float | None = within("(0, 1000]", None)  # null: that of the bundle's scheduler, 5 without one
    guidance: float = within("[0, 1000]", 1.0)  # 1: no classifier-free guidance, one branch only
    negative_prompt: str = ""
    commit: Commit = Commit.forward
    context_timestep: float = within("[0, 1000]", 0.0)  # at which a finished chunk is committed (forward only)


@dataclass
class InferenceConfig:
    data_path: str | None = None  # prompts: text (one per line), .csv, .json or .jsonl
    output_folder: str | None = None
    num_output_frames: int = within("[1, 1e7]", 21)  # latent frames
    num_samples: int = within("[1, 1e6]", 1)  # videos per prompt
    device: str = "auto"  # auto: cuda where there is one
    dtype: str = "auto"  # auto: bfloat16 on cuda and on a CPU with AMX or avx512_bf16, else float32
    attention_backend: str | None = None  # a name of diffusers' dispatcher; null: its default
    compile: bool = False  # torch.compile of the transformer blocks
    offload: Offload = Offload.none  # what waits in host memory, for small GPUs
    vae_tiling: bool = False  # decode in tiles: less memory, and their blended seams
    threads: int | None = within("[1, 1024]", None)  # CPU threads; null: torch's default


@dataclass
class ParallelConfig:
    """Of inference; training has `train.sharding`."""

    sequence: int = within("[1, 1024]", 1)  # ranks that make one video together, each with a part of the heads


@dataclass
class Config:
    """The whole. Sections are documented at their classes."""

    seed: int = within("[0, 9e18]", 0)
    video: VideoConfig = field(default_factory=VideoConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    data: DataConfig = field(default_factory=DataConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    consistency: ConsistencyConfig = field(default_factory=ConsistencyConfig)
    ode: ODEConfig = field(default_factory=ODEConfig)
    dmd: DMDConfig = field(default_factory=DMDConfig)


def require(config: Config, key: str, condition: object, expected: str) -> None:
    """Raise `ConfigError` with a setting's key, its value and what was `expected`, which says the way out, unless
    `condition` holds."""
    if not condition:
        value = attrgetter(key)(config)
        raise ConfigError(f"setting `{key}` is {'not set' if value is None else value}: {expected}")
