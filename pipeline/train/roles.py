"""Models by role: what stages start from, checked against settings and against one another, and made ready."""

from functools import partial
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from model.attention import best_backend
from model.block import CausalWanBlock
from model.causal_wan import CausalWanModel
from model.weights import CheckpointError, cast_weights
from pipeline.bundle import read_json, read_shape, transformer_settings, vae_shape_of
from pipeline.generate.inference import check_cache
from pipeline.load import load_library_model, load_mapped, load_transformer, random_model
from pipeline.sources import need_folder, transformer_source, vae_folder
from pipeline.train.parallel import keeps_attention
from pipeline.train.text import TextConditioning
from utils.choices import Sharding
from utils.config import Config, ConfigError, require

ATTENTION = (  # operators that selective checkpointing keeps the output of
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "flash_attn::_flash_attn_forward",
)


def check_student(config: Config) -> None:
    """Raise `ConfigError` where the settings cannot be those of a few-step student, or those of a model that does
    not fit `data.vae`; reads nothing but config files."""
    train, sampler, video = config.train, config.sampler, config.video
    need = partial(require, config)
    need("train.init_from", train.init_from is None,
         f"stage {train.stage} starts from model.bundle and model.checkpoint; unset it")  # fmt: skip
    need("train.text_from", train.text_from or config.data.text_embeddings,
         "name a folder with text_encoder and tokenizer")  # fmt: skip
    if sampler.kind != "few_step" or sampler.guidance != 1:
        raise ConfigError(
            f"settings `sampler.kind` and `sampler.guidance` are {sampler.kind} and {sampler.guidance}: a "
            "student takes sampler.kind=few_step and sampler.guidance=1"
        )
    need("video.trained_frames", video.trained_frames % video.frames_per_chunk == 0,
         f"must be a multiple of video.frames_per_chunk={video.frames_per_chunk}")  # fmt: skip
    if train.phases:
        raise ConfigError(f"setting `train.phases`: stage {train.stage} has none; use train.batch_size")
    need("sampler.steps", len(set(sampler.steps)) == len(sampler.steps), "a step must not be there twice")
    if not config.model.random_init:
        transformer_source(config)  # raises where none is named
    student = transformer_settings(config)
    vae = vae_shape_of(vae_folder(config))
    need("data.vae", vae.channels == student["in_channels"], f"its latents have {vae.channels} channels, those of the "
         f"student (model.bundle) {student['in_channels']}")  # fmt: skip
    check_cache(config, vae)


def load_text(config: Config, device: torch.device) -> TextConditioning:
    """The frozen text encoder, padding prompts to the length that the student's own settings name."""
    return TextConditioning.load(config, device, transformer_settings(config)["text_len"])


def load_student(
    config: Config, text: TextConditioning, device: torch.device, channels: int | None = None
) -> CausalWanModel:
    """The causal DiT that `model` names, float32, in training mode.

    Raises `ConfigError` where it does not fit the text encoder, or latents of `channels` channels to train on.
    """
    model = prepare(load_transformer(config), config, device).train()
    if model.config.text_dim != text.text_dim:
        raise ConfigError(
            f"setting `model.bundle`: the model expects prompt embeddings {model.config.text_dim} wide, those of "
            f"train.text_from or data.text_embeddings are {text.text_dim} wide"
        )
    if channels not in (None, model.config.in_channels):
        raise ConfigError(
            f"setting `model.bundle`: the model has {model.config.in_channels} latent channels, the training data "
            f"{channels}"
        )
    return model


def load_wan(path: str | None, key: str) -> WanTransformer3DModel:
    """The bidirectional DiT that setting `key` names, as it is stored, its weights still in the files.

    Raises `ConfigError` where the setting is unset, or the folder does not hold exactly such a model's weights.
    """
    folder = need_folder(path, key, "a WanTransformer3DModel")
    try:
        return load_mapped(WanTransformer3DModel, folder)
    except CheckpointError as error:
        raise ConfigError(f"setting `{key}`: {error}") from error


def load_causal(path: str | None, key: str, **settings: Any) -> CausalWanModel:
    """A causal DiT, float32, with the weights of the model in the folder that setting `key` names, bidirectional or
    causal, and `settings` of its own; a compressor of other kind or shape starts fresh. Raises `ConfigError` likewise.
    """
    folder = need_folder(path, key, "a transformer")
    if read_json(folder / "config.json").get("_class_name") != CausalWanModel.__name__:
        return CausalWanModel.from_wan(load_wan(path, key), **settings)
    try:
        return CausalWanModel.from_wan(load_library_model(CausalWanModel, folder, torch.float32), **settings)
    except CheckpointError as error:
        raise ConfigError(f"setting `{key}`: {error}") from error


def load_score(config: Config, role: str, student: CausalWanModel, device: torch.device) -> WanTransformer3DModel:
    """`dmd.teacher`, or `dmd.critic`, which without a folder of its own starts as the teacher: a bidirectional Wan DiT
    of any size, float32; in mixed precision the teacher is in the bfloat16 that autocast would make of it at every
    call, at half the memory. That it sees the student's latents and prompts, the stage's `check` has made sure.

    With `model.random_init` (benchmarks) it needs no weights: they are random, of the shape that a config.json in the
    folder names, or without a folder of the student's.

    Raises `ConfigError`, naming the setting, where there is none.
    """
    path, key, frozen = getattr(config.dmd, role) or config.dmd.teacher, f"dmd.{role}", role == "teacher"
    dtype = torch.bfloat16 if frozen and config.train.mixed_precision == "bf16" else torch.float32
    if config.model.random_init and path is None:
        model = random_model(WanTransformer3DModel, dict(student.config), config.seed)
        return prepare(model, config, device, dtype, trains=not frozen)
    folder = need_folder(path, key, "a WanTransformer3DModel")
    if config.model.random_init and not any(folder.glob("*.safetensors*")):
        model = random_model(WanTransformer3DModel, read_shape(folder / "config.json"), config.seed)
    else:
        model = load_wan(path, key)
    return prepare(model, config, device, dtype, trains=not frozen)


def prepare(model, config: Config, device: torch.device, dtype: torch.dtype = torch.float32, trains: bool = True):
    """In `dtype` but for what Wan needs in float32, on our blocks, with gradient checkpointing where asked for and what
    makes `device` faster; returns it. Whoever runs it moves it there; what the trainer places in shards is cast there,
    group by group, so that the host never holds more than the files."""
    if config.train.sharding == Sharding.none:
        cast_weights(model, dtype, model._keep_in_fp32_modules)
    else:
        model.placed_dtype = dtype
    if not isinstance(model, CausalWanModel):
        CausalWanBlock.adopt(model)
    if device.type != "cpu" and config.train.mixed_precision == "bf16":
        model.set_attention_backend(best_backend(device, trains))
    if config.train.gradient_checkpointing and trains:
        context = {}
        if keeps_attention(config, device) and not config.train.compile:  # of those see `compile_blocks`
            context["context_fn"] = partial(create_selective_checkpoint_contexts, attention_operators())
        model.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False, **context))
    return model


def attention_operators() -> list[torch._ops.OpOverload]:
    """Those of `ATTENTION` that are installed."""
    names = (name.split("::") for name in ATTENTION)
    packets = (getattr(getattr(torch.ops, library), name, None) for library, name in names)
    return [packet.default for packet in packets if packet is not None]
