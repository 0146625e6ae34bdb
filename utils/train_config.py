"""Settings of training and of the data that it reads: sections of `utils.config.Config`."""

from dataclasses import dataclass, field

from utils.choices import (
    DataKind,
    LossWeighting,
    OptimizerKind,
    Precision,
    Reshard,
    Sharding,
    TextPlacement,
    TrackerKind,
)
from utils.interval import within


@dataclass
class OptimizerConfig:
    kind: OptimizerKind = OptimizerKind.adamw
    lr: float = within("[0, 100]", 2e-6)
    betas: list[float] = within("[0, 1)", [0.0, 0.999])
    weight_decay: float = within("[0, 100]", 0.01)
    warmup_steps: int = within("[0, 1e9]", 0)
    decay_steps: int = within("[0, 1e9]", 0)  # the last steps of the run, over which the rate falls linearly to zero


@dataclass
class PhaseConfig:
    """A stretch of training with its own clip length and batch."""

    steps: int = within("[1, 1e9]")
    frames: int = within("[1, 1e5]")  # latent frames, counted from the clip's start
    batch_size: int = within("[1, 1e6]")  # per rank and micro-step


@dataclass
class TrainConfig:
    stage: str | None = None  # pipeline/train/stages.py has them all
    logdir: str | None = None
    max_steps: int = within("[1, 1e9]", 3000)
    batch_size: int = within("[1, 1e6]", 1)  # per rank and micro-step
    gradient_accumulation: int = within("[1, 1e6]", 1)
    total_batch_size: int | None = within("[1, 1e9]", None)  # checked: ranks x batch_size x gradient_accumulation
    phases: list[PhaseConfig] = field(default_factory=list)  # curriculum in place of batch_size; the last one goes on
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    max_grad_norm: float = within("(0, 1e9]", 10.0)
    ema_decay: float = within("[0, 1)", 0.99)
    ema_start_step: int = within("[0, 1e9]", 200)
    mixed_precision: Precision = Precision.bf16
    sharding: Sharding = Sharding.none  # FSDP2; of the frozen models too
    shard_size: int | None = within("[1, 1e6]", None)  # hybrid: ranks that share a copy; null: those of one machine
    reshard: Reshard = Reshard.never  # of the weights that a rollout's forwards gather
    gradient_checkpointing: bool = True
    keep_attention: bool = True  # under checkpointing: its outputs are kept, not computed again (CUDA)
    compile: bool = False
    checkpoint_every: int = within("[1, 1e9]", 250)
    keep_checkpoints: int = within("[1, 1e6]", 2)
    log_every: int = within("[1, 1e9]", 1)
    sample_every: int = within("[0, 1e9]", 0)  # steps between fixed-prompt sample videos; 0: never
    sample_prompts: list[str] = field(default_factory=list)
    sample_held_out: int = within("[0, 1e5]", 0)  # more of them: first captions of the sprite world's held-out split
    sample_frames: int = within("[1, 1e6]", 21)  # latent frames
    sample_long_frames: int = within("[0, 1e6]", 0)  # latent frames of a second, longer set of sample videos; 0: none
    init_from: str | None = None  # folder of the weights that a VAE, teacher or AR model starts from; null: random
    text_from: str | None = None  # folder with text_encoder and tokenizer; null: a small one is trained along (teacher)
    text_placement: TextPlacement = TextPlacement.device  # of a frozen text encoder
    shift: float = within("(0, 1000]", 5.0)  # of the training noise schedule
    loss_weighting: LossWeighting = LossWeighting.bell
    prompt_dropout: float = within("[0, 1]", 0.0)  # share of captions replaced by the negative prompt
    context_noise_timestep: float = within("[0, 1000]", 0.0)  # noise level of the clean context in teacher forcing
    through_cache: bool = False  # ar_diffusion: teacher forcing through `cache`, chunk by chunk, not under a block mask
    tracker: TrackerKind | None = None
    project: str = "packforcing"
    threads: int | None = within("[1, 1024]", None)


@dataclass
class StoryConfig:
    """Stories of the sprite world as training clips (`utils/sprites/story.py`): a caption and a weight a chunk. Where
    `video.frames_per_chunk` is 1 every chunk is a still, encoded alone."""

    count: int = within("[0, 1e7]", 0)
    chunks: int = within("[1, 1e4]", 5)
    shot_chunks: list[int] = within("[1, 1e4]", [1, 1])  # least and most of a shot
    share: float = within("[0, 1]", 1.0)  # of samples that show a story; the others show a clip of one shot
    first_weight: float = within("[0, 1]", 1.0)  # in the loss, of a character's first shot; of the others 1


@dataclass
class DataConfig:
    kind: DataKind = DataKind.sprites
    path: str | None = None  # folder of latent shards (written once where kind is sprites), or a file of prompts
    vae: str | None = None  # VAE folder that encodes the clips and decodes the samples
    num_clips: int = within("[0, 1e7]", 4096)
    num_stills: int = within("[0, 1e7]", 0)  # further clips of a single frame: cheap lessons in what things look like
    clip_frames: int = within("[1, 1e6]", 45)  # pixel frames; 4n + 1
    motions: list[str] = field(default_factory=list)  # of sprite clips, drawn from these, repeats count; []: of all
    stories: StoryConfig = field(default_factory=StoryConfig)
    text_embeddings: str | None = None  # folder of stored prompt embeddings, in place of a text encoder in training
    shard_size: int = within("[1, 1e6]", 64)  # videos per file of latents (scripts/prepare_data.py)
    workers: int = within("[0, 256]", 2)  # processes per rank that read videos (prepare_data); 0: the main one


@dataclass
class VAEConfig:
    """The tiny world's VAE (`AutoencoderKLWan`, 4x in time and 8x in space) and the objective of the `vae` stage."""

    z_dim: int = within("[1, 1024]", 16)
    encoder_dim: int = within("[1, 4096]", 16)
    decoder_dim: int = within("[1, 4096]", 32)
    dim_mult: list[int] = within("[1, 64]", [1, 2, 3])
    res_blocks: int = within("[1, 100]", 1)
    patch_size: int = within("[1, 16]", 2)
    initial_logvar: float = within("[-30, 20]", -5.0)  # of the posterior; its deviation starts at 0.08
    mse_weight: float = within("[0, 1e6]", 4.0)  # against L1's 1
    kl_weight: float = within("[0, 1e6]", 2e-4)
    max_sprites: int = within("[1, 100]", 3)  # on one training clip
    crop_height: int = within("[16, 16384]", 32)
    crop_width: int = within("[16, 16384]", 48)
    crop_steps: int = within("[0, 1e9]", 0)  # first steps, on crops of that size, so that a batch holds more clips
    cuts: float = within("[0, 1]", 0.0)  # share of the training clips that cut to other shots
    train_encoder: bool = True  # false: latents, and what has been trained on them, stay as they are
    latent_noise: float = within("[0, 10]", 0.0)  # most noise that the decoder learns to see through, of a latent's std
    change_weight: float = within("[0, 1e6]", 0.0)  # of the L1 error of what changes from frame to frame


@dataclass
class ConsistencyConfig:
    """Causal consistency distillation (stage `consistency`); its target is the EMA, see `train.ema_decay`."""

    grid_steps: int = within("[2, 1000]", 48)  # Euler steps of the teacher from noise to clean
    guidance: float = within("[0, 1000]", 3.0)  # of the teacher's step


@dataclass
class ODEConfig:
    """Trajectories of the AR model (`scripts/generate_ode_pairs.py`) and the regression on them (stage `ode`)."""

    path: str | None = None  # folder of trajectory shards
    num_trajectories: int = within("[1, 1e9]", 1024)
    shard_size: int = within("[1, 1e6]", 16)  # trajectories per file
    grid_steps: int = within("[1, 1000]", 48)  # Euler steps; `sampler.steps` must be among them
    guidance: float = within("[0, 1000]", 6.0)


@dataclass
class DMDConfig:
    """Distribution-matching distillation (stage `dmd`): both scores and the self-rollout."""

    teacher: str | None = None  # folder of the frozen WanTransformer3DModel, the real score
    offload_teacher: bool = False  # in host memory, one block at a time on the GPU; needs train.sharding=none
    critic: str | None = None  # folder that the critic, the fake score, starts from; null: the teacher's
    critic_updates: int = within("[1, 1e6]", 5)  # per update of the generator
    train_compressor: bool = True  # by the generator's loss; false: it stays as it started
    critic_optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=4e-7))
    guidance: float = within("[0, 1000]", 3.0)  # of the real score: cond + g * (cond - uncond)
    guidance_above: float = within("[0, 1000]", 0.0)  # timestep; below it the real score is cond
    score_shift: float = within("(0, 1000]", 5.0)  # of the timesteps at which both scores are asked
    min_timestep: float = within("(0, 1000]", 20.0)
    max_timestep: float = within("(0, 1000]", 980.0)
    max_rollout_frames: int | None = within("[1, 1e6]", None)  # null: video.trained_frames, where the loss is
