"""What can be found wrong with a training run before any of its models is allocated."""

import inspect
import shutil
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from torch import nn

from model.causal_wan import CausalWanModel
from model.compressor import COMPRESSORS
from model.geometry import WAN_PATCH_SIZE
from pipeline.bundle import read_json, transformer_settings, vae_shape_of
from pipeline.train.parallel import shard_size
from pipeline.train.stage_parts import need_folder
from pipeline.train.stages import METHODS
from pipeline.train.vae import build_vae
from utils.config import Config, ConfigError
from utils.distributed import World

BYTES_PER_WEIGHT = 16  # in a checkpoint: float32 weight, both moments of AdamW, EMA
DISTILLED = ("consistency", "ode", "dmd")
WAN_SETTINGS = inspect.signature(WanTransformer3DModel.__init__).parameters
GIB = 2**30


def check_run(config: Config, world: World, logdir: Path, save: bool) -> None:
    """All checks. Raises `ConfigError`, in one line, for the first that fails.

    `logdir`: where checkpoints would go; `save`: whether there will be any.
    """
    check_plan(config, world.size)
    check_ranks(config, world)
    check_shapes(config)
    if config.train.stage in DISTILLED:
        check_models(config)
    if save:
        check_disk(config, logdir)


def check_plan(config: Config, world_size: int) -> None:
    """Ranks, batch and accumulation against the total batch; the sampler's steps against the schedule."""
    train, sampler = config.train, config.sampler
    if train.stage is None:
        raise ConfigError(f"setting `train.stage` is not set: choose one of {', '.join(METHODS)}")
    METHODS[train.stage]  # an unknown one shows here
    repeated = len(set(sampler.steps)) < len(sampler.steps)
    if train.stage in DISTILLED and sampler.kind == "few_step" and repeated:
        raise ConfigError(f"setting `sampler.steps` is {sampler.steps}: a step must not be there twice")
    if train.total_batch_size is None:
        return
    if train.phases:
        raise ConfigError("settings `train.total_batch_size` and `train.phases` exclude each other: unset one")
    product = world_size * train.batch_size * train.gradient_accumulation
    if product != train.total_batch_size:
        raise ConfigError(
            f"setting `train.total_batch_size` is {train.total_batch_size}, but {world_size} ranks x batch_size "
            f"{train.batch_size} x gradient_accumulation {train.gradient_accumulation} = {product}: change one of them"
        )


def check_ranks(config: Config, world: World) -> None:
    """Ranks must fill the sharding groups."""
    size = shard_size(config, world)
    if world.size % size:
        raise ConfigError(
            f"setting `train.shard_size`: {world.size} ranks do not fill groups of {size}; choose a divisor"
        )


def check_shapes(config: Config) -> None:
    """Video size and clip length against the VAE's strides, the patch and the chunk; the DiT's heads."""
    video, model = config.video, config.model
    if config.train.stage == "vae":
        return
    COMPRESSORS[config.cache.compressor.kind]  # an unknown one shows here
    if model.attention_head_dim % 2:
        raise ConfigError(f"setting `model.attention_head_dim` is {model.attention_head_dim}: must be even (rotary)")
    vae = vae_shape_of(need_folder(config.data.vae, "data.vae", "an AutoencoderKLWan"))
    for name, size, patch in zip(("height", "width"), (video.height, video.width), WAN_PATCH_SIZE[1:], strict=True):
        unit = vae.spatial_stride * patch
        if size % unit:
            raise ConfigError(f"setting `video.{name}` is {size}: must be a multiple of {unit} px (VAE stride x patch)")
    if config.train.stage != "teacher":
        clip, whole = vae.latent_frames(config.data.clip_frames), not config.train.phases
        rendered = config.data.kind == "sprites" and config.train.stage != "dmd"
        if rendered and whole and clip % video.frames_per_chunk:
            raise ConfigError(
                f"setting `data.clip_frames` is {config.data.clip_frames}, {clip} latent frames: these must be "
                f"a multiple of video.frames_per_chunk={video.frames_per_chunk}"
            )
        for i, phase in enumerate(config.train.phases):
            if phase.frames % video.frames_per_chunk:
                raise ConfigError(
                    f"setting `train.phases[{i}].frames` is {phase.frames}: must be a multiple of "
                    f"video.frames_per_chunk={video.frames_per_chunk}"
                )


def check_models(config: Config) -> None:
    """That student, VAE and scores of a distillation stage are of one world; reads nothing but their config files."""
    model, student = config.model, transformer_settings(config)
    vae = vae_shape_of(need_folder(config.data.vae, "data.vae", "an AutoencoderKLWan"))
    if vae.channels != student["in_channels"]:
        raise ConfigError(
            f"setting `data.vae` is {config.data.vae}: its latents have {vae.channels} channels, those of the student "
            f"(model.bundle) {student['in_channels']}"
        )
    if config.train.stage != "dmd":
        return
    for key, path in (("dmd.teacher", config.dmd.teacher), ("dmd.critic", config.dmd.critic)):
        if path is None and (model.random_init or key == "dmd.critic"):
            continue  # a random one of the student's shape; the teacher's
        settings = read_json(need_folder(path, key, "a WanTransformer3DModel") / "config.json")
        for name in ("in_channels", "text_dim"):
            own = settings.get(name, WAN_SETTINGS[name].default)
            if own != student[name]:
                raise ConfigError(
                    f"setting `{key}` is {path}: its {name} is {own}, the student's (model.bundle) is {student[name]}"
                )


def check_disk(config: Config, logdir: Path) -> None:
    """Room for `train.keep_checkpoints` checkpoints and the one being written."""
    count = config.train.keep_checkpoints + 1
    models = trained_models(config)
    size = BYTES_PER_WEIGHT * sum(p.numel() for model in models for p in model.parameters())
    folder = logdir / "checkpoints"
    held = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free + held < count * size:
        raise ConfigError(
            f"{count} checkpoints of {size / GIB:.2f} GiB (train.keep_checkpoints={count - 1} and one being written) "
            f"do not fit in {folder}: {(free + held) / GIB:.2f} GiB are free; free some, lower it or move train.logdir"
        )


def trained_models(config: Config) -> list[nn.Module]:
    """The models that the stage would train, on the meta device: shapes from config files, no weights.

    Raises `ConfigError` for files that are not there.
    """
    stage = config.train.stage
    with torch.device("meta"):
        if stage == "vae":
            return [build_vae(config.vae)]
        if stage in DISTILLED:
            student = CausalWanModel(**transformer_settings(config))
            if stage != "dmd":
                return [student]
            key = "dmd.critic" if config.dmd.critic is not None else "dmd.teacher"
            folder = need_folder(config.dmd.critic or config.dmd.teacher, key, "a WanTransformer3DModel")
            return [student, WanTransformer3DModel.from_config(read_json(folder / "config.json"))]
        if config.train.init_from is not None:
            folder = need_folder(config.train.init_from, "train.init_from", "a transformer")
            return [WanTransformer3DModel.from_config(read_json(folder / "config.json"))]
        channels = vae_shape_of(need_folder(config.data.vae, "data.vae", "an AutoencoderKLWan")).channels
        settings = transformer_settings(config) | {"in_channels": channels, "out_channels": channels}
        if stage == "teacher":
            settings = {name: settings[name] for name in settings if name in WAN_SETTINGS}
            return [WanTransformer3DModel(**settings)]
        return [CausalWanModel(**settings)]
