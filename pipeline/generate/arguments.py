"""The arguments of a call of `PackForcingPipeline`: whether they fit each other and the model, and what they mean."""

import logging
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch

from pipeline.data.schedule import prompts_of
from pipeline.generate.chunks import OUTPUT_TYPES
from pipeline.generate.inputs import Prompts
from pipeline.generate.rollout import Rollout, StepCallback
from utils.config import ConfigError, SamplerConfig, VideoConfig

log = logging.getLogger(__name__)

CALLBACK_INPUTS = ["latents", "prompt_embeds", "negative_prompt_embeds"]
EITHER = (("prompt", "prompt_embeds"), ("num_frames", "seconds"), ("seed", "generator"), ("image", "video"))


def check_arguments(asked: SimpleNamespace, video: VideoConfig, unit: int, text_len: int, text_dim: int) -> None:
    """Raise `ConfigError` for what cannot be; `unit`: pixels of a token's side."""
    height, width = asked.height or video.height, asked.width or video.width
    if height % unit or width % unit:
        raise ConfigError(f"height and width are {height} and {width}: must be multiples of {unit} px")
    if (height, width) != (video.height, video.width):
        trained = f"{video.height}x{video.width}"
        log.warning("the model was trained on %s, not on %dx%d: expect worse videos", trained, height, width)
    for first, second in EITHER:
        if getattr(asked, first) is not None and getattr(asked, second) is not None:
            raise ConfigError(f"{first} and {second} are both given: leave one out")
    if asked.prompt is None and asked.prompt_embeds is None:
        raise ConfigError("neither prompt nor prompt_embeds is given")
    for name in ("num_frames", "seconds", "num_videos_per_prompt", "num_inference_steps"):
        value = getattr(asked, name)
        whole = isinstance(value, int) or name == "seconds"
        if value is not None and not (whole and 0 < value < math.inf):
            raise ConfigError(f"{name} is {value}: must be a positive {'number' if whole else 'whole number'}")
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        value = getattr(asked, name)
        if value is not None and (value.ndim != 3 or value.shape[1] > text_len or value.shape[2] != text_dim):
            raise ConfigError(f"{name} is {list(value.shape)}: must be [videos, at most {text_len}, {text_dim}]")
    if asked.output_type not in OUTPUT_TYPES:
        raise ConfigError(f"output_type is {asked.output_type}: expected one of {', '.join(OUTPUT_TYPES)}")
    if asked.samples is not None and asked.prompt is not None:
        videos = len(prompts_of(asked.prompt)) * asked.num_videos_per_prompt
        if len(asked.samples) != videos:
            raise ConfigError(f"samples has {len(asked.samples)} numbers: give one for each of the {videos} videos")
    for name in asked.callback_on_step_end_tensor_inputs:
        if name not in CALLBACK_INPUTS:
            raise ConfigError(f"callback_on_step_end_tensor_inputs has {name}: expected some of {CALLBACK_INPUTS}")


def sampler_of(asked: SimpleNamespace, sampler: SamplerConfig) -> SamplerConfig:
    """The pipeline's sampler, with what the call changes. Raises `ConfigError`."""
    steps = asked.num_inference_steps
    if steps is not None and sampler.kind == "few_step" and steps != len(sampler.steps):
        raise ConfigError(
            f"num_inference_steps is {steps}: this model was distilled for the {len(sampler.steps)} steps "
            f"{sampler.steps}; leave it out, or load the pipeline with sampler={{'kind': 'euler'}}"
        )
    guidance = None if asked.guidance_scale is None else max(1.0, asked.guidance_scale)
    changes = {"num_steps": steps, "guidance": guidance}
    return replace(sampler, **{key: value for key, value in changes.items() if value is not None})


def step_callback(pipe: Any, rollout: Rollout, asked: SimpleNamespace) -> StepCallback:
    """`callback_on_step_end` as a rollout calls its own."""

    def call(chunk: int, step: int, timestep: float, latents: torch.Tensor) -> torch.Tensor:
        prompts = rollout.prompts
        tensors = {"latents": latents, "prompt_embeds": prompts.embeds, "negative_prompt_embeds": prompts.negative}
        wanted = {name: tensors[name] for name in asked.callback_on_step_end_tensor_inputs}
        changed = asked.callback_on_step_end(pipe, chunk * rollout.steps_per_chunk + step, timestep, wanted) or {}
        if changed.keys() - {"latents"}:
            tensors |= changed
            rollout.prompts = Prompts(tensors["prompt_embeds"], tensors["negative_prompt_embeds"])
        return changed.get("latents", latents)

    return call
