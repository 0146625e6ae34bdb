"""`PackForcingPipeline`: prompts in, long videos out, as diffusers' pipelines are called.

    pipe = PackForcingPipeline.from_pretrained("bundles/tiny")
    frames = pipe("a red circle bounces over a blue checkerboard", seconds=30, seed=0).frames[0]

    for chunk in pipe.stream("a red circle bounces over a blue checkerboard", seconds=120, cache={"top_k": 4}):
        show(chunk.frames, chunk.report)

Everything that generates goes through `stream`: the command line, evaluation, samples in training and benchmarks.
"""

import inspect
import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.loaders import WanLoraLoaderMixin
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
from diffusers.video_processor import VideoProcessor
from huggingface_hub import snapshot_download
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

from model.cache.cache import PackCache
from model.causal_wan import CausalWanModel
from pipeline.bundle import VAEShape, flow_shift, load_transformer, place, read_scheduler
from pipeline.data.schedule import Prompt
from pipeline.generate.conditioning import Conditioning, prompts_of
from pipeline.generate.rollout import NoiseSource, Prompts, Rollout, StepCallback
from pipeline.generate.vae_stream import StreamingDecoder
from pipeline.lora import read_lora
from pipeline.text import encode_prompt
from utils.config import (
    CacheConfig,
    CacheKind,
    CompressorConfig,
    Config,
    ConfigError,
    ModelConfig,
    SamplerConfig,
    VideoConfig,
)
from utils.load_config import section
from utils.video import to_uint8

# A plain Wan folder says nothing about a cache: attend its first and last chunks, which needs no trained compressor.
UNTRAINED_CACHE = CacheConfig(kind=CacheKind.sink, sink=1, recent=5, compressor=CompressorConfig("identity"))
log = logging.getLogger(__name__)
OUTPUT_TYPES = ("pil", "np", "pt", "uint8", "latent")


class NotFiniteError(RuntimeError):
    """A chunk of NaN or infinite numbers."""

    exit_status = 1


@dataclass(frozen=True)
class Chunk:
    """What `stream` yields.

    Attributes:
        index: number of the chunk.
        frames: its pixel frames, as `output_type` says: [B, F, H, W, 3] in 0..1 ("np"), [B, F, 3, H, W] in 0..1 ("pt"),
            uint8 [B, F, H, W, 3] ("uint8"), B lists of images ("pil"); latents [B, C, F, H, W] ("latent").
        latents: [B, C, F, H, W], normalised, float32.
        report: tokens and bytes of each part of the cache for the next chunk (`PackCache.report`).
    """

    index: int
    frames: Any
    latents: torch.Tensor
    report: dict[str, dict[str, int]]


class PackForcingPipeline(DiffusionPipeline, WanLoraLoaderMixin):
    """Chunk-causal text-to-video generation with a bounded KV cache (PackForcing, arXiv 2603.25730).

    Args:
        tokenizer, text_encoder, vae, transformer: of Wan2.1 or of the same classes.
        scheduler: its `shift` is that of the sampling schedule, unless `sampler` has one.
        cache, sampler, video: settings by name, as in the sections of the same names in a YAML config; what is left
            out keeps its default. They are saved with the pipeline.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds"]

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text_encoder: UMT5EncoderModel,
        vae: AutoencoderKLWan,
        scheduler: FlowMatchEulerDiscreteScheduler,
        transformer: CausalWanModel,
        cache: dict[str, Any] | None = None,
        sampler: dict[str, Any] | None = None,
        video: dict[str, Any] | None = None,
    ):
        super().__init__()
        self.register_modules(
            tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, scheduler=scheduler, transformer=transformer
        )
        self.register_to_config(
            cache=cache if cache is not None else asdict(UNTRAINED_CACHE), sampler=sampler or {}, video=video or {}
        )
        stride = VAEShape(vae.config.z_dim, vae.config.scale_factor_temporal, vae.config.scale_factor_spatial)
        self.vae_shape, self._encoded, self._rollout = stride, {}, None
        self.video_processor = VideoProcessor(vae_scale_factor=stride.spatial_stride)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        checkpoint: str | Path | None = None,
        use_ema: bool = False,
        **options: Any,
    ) -> "PackForcingPipeline":
        """From a bundle, or a diffusers folder of Wan2.1 (whose transformer is read as a chunk-causal one).

        `checkpoint` takes the place of the folder's transformer: whatever `model.checkpoint` may name, a `.pt` file of
        Self-Forcing's kind too, of which `use_ema` picks the averaged weights. `options` are diffusers'; components
        given by name take the place of the folder's. A hub id is downloaded whole. Raises `CheckpointError`.
        """
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            folder = Path(snapshot_download(str(pretrained_model_name_or_path)))
        index = json.loads((folder / cls.config_name).read_text(encoding="utf-8"))
        plain = index["transformer"][1] != CausalWanModel.__name__
        if options.get("transformer") is None and (plain or checkpoint is not None):
            settings = {name: options.get(name) or index.get(name) for name in ("cache", "video")}
            cache = UNTRAINED_CACHE if settings["cache"] is None else section(CacheConfig, "cache", settings["cache"])
            video = section(VideoConfig, "video", settings["video"] or {})
            source = ModelConfig(bundle=str(folder), checkpoint=checkpoint and str(checkpoint), use_ema=use_ema)
            transformer = load_transformer(Config(model=source, cache=cache, video=video))
            dtype = options.get("torch_dtype")
            options["transformer"] = place(transformer, torch.device("cpu"), dtype) if dtype else transformer
        if index["scheduler"][1] != FlowMatchEulerDiscreteScheduler.__name__ and options.get("scheduler") is None:
            options["scheduler"] = read_scheduler(folder)
        return super().from_pretrained(str(folder), **options)

    def load_lora_weights(self, pretrained_model_name_or_path_or_dict, **options: Any) -> None:
        """As diffusers' Wan pipelines do; also peft's files, and `.pt` files with `generator_lora` (LongLive)."""
        super().load_lora_weights(read_lora(pretrained_model_name_or_path_or_dict), **options)

    def enable_group_offload(self, *arguments: Any, **options: Any) -> None:
        """As in diffusers."""
        if self.text_encoder is not None:  # one module, not two of one weight, which would be offloaded twice
            self.text_encoder.encoder.embed_tokens = self.text_encoder.shared
        super().enable_group_offload(*arguments, **options)

    @property
    def current_timestep(self) -> float | None:
        """Of the step at work, for step caches such as `PyramidAttentionBroadcastConfig`; 0 in a commit."""
        return None if self._rollout is None else self._rollout.timestep

    @property
    def cache_config(self) -> CacheConfig:
        return section(CacheConfig, "cache", self.config.cache)

    @property
    def sampler_config(self) -> SamplerConfig:
        """With `shift` made definite: the scheduler's, where the settings have none."""
        sampler = section(SamplerConfig, "sampler", self.config.sampler)
        return sampler if sampler.shift is not None else replace(sampler, shift=flow_shift(self.scheduler.config))

    @property
    def video_config(self) -> VideoConfig:
        return section(VideoConfig, "video", self.config.video)

    def encode_prompt(self, prompt: str) -> torch.Tensor:
        """[1, n, text_dim], n <= text_len; without the zeros that the model pads with."""
        if prompt in self._encoded:
            return self._encoded[prompt]
        text_len = self.transformer.config.text_len
        return encode_prompt(self.tokenizer, self.text_encoder, prompt, text_len, self._execution_device)

    def encode_ahead(self, prompts: Sequence[str]) -> None:
        """Encode texts and remember them; calls that ask for no others run without the text encoder."""
        for prompt in prompts:
            self._encoded[prompt] = self.encode_prompt(prompt)

    def num_chunks(self, num_frames: int) -> int:
        """Chunks that hold at least `num_frames` pixel frames."""
        return math.ceil(self.vae_shape.latent_frames(num_frames) / self.transformer.config.frames_per_chunk)

    @torch.no_grad()
    def __call__(
        self,
        prompt: Prompt | Sequence[Prompt] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_videos_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        seconds: float | None = None,
        seed: int | None = None,
        samples: Sequence[int] | None = None,
        cache: dict[str, Any] | CacheConfig | None = None,
        noise: NoiseSource | None = None,
    ) -> WanPipelineOutput | tuple:
        """Generate whole videos. Arguments are those of diffusers' `WanPipeline`; None: what the pipeline says.

        Args:
            prompt: a text, a schedule `[{"at": seconds, "prompt": text}, ...]`, or a list of those, a video each.
            num_frames: pixel frames of each video; chunks are generated whole and the rest of the last one is cut off.
            num_inference_steps: of the many-step sampler (`sampler.kind=euler`); few-step models have their steps.
            guidance_scale: 1 or less turns classifier-free guidance off.
            generator: source of all noise, in place of `seed`.
            latents: noise that the chunks start from, [B, C, F, H, W].
            seconds: in place of `num_frames`, rounded up to whole chunks.
            seed: noise depends on nothing but (seed, text of the chunk's prompt, number of that prompt's video, chunk,
                step), so a schedule's later prompts do not change what comes before them; default 0.
            samples: those numbers, one a video, in place of 0, 1, ... for each prompt.
            cache: settings to change for this call, `{"top_k": 4}`, or all of them.
            noise: source of all noise by (chunk, step, shape), in place of `seed` and `generator`.

        Returns:
            `.frames`, or a tuple of them, as `Chunk.frames` for whole videos.

        Raises:
            ConfigError: arguments that do not fit each other or the model.
            NotFiniteError: a chunk of NaN or infinite numbers.
        """
        arguments = SimpleNamespace(**{key: value for key, value in locals().items() if key != "self"})
        pieces = [chunk.frames for chunk in self.progress_bar(self._stream(arguments))]
        if output_type == "pil":
            frames = [sum(parts, []) for parts in zip(*pieces, strict=True)]
        elif output_type == "latent":
            frames = torch.cat(pieces, dim=2)
        else:
            frames = torch.cat(pieces, 1) if output_type == "pt" else np.concatenate(pieces, 1)
        return WanPipelineOutput(frames=frames) if return_dict else (frames,)

    def stream(self, *arguments: Any, **options: Any) -> Iterator[Chunk]:
        """Yield each chunk as it is made; arguments and errors as for a call. Memory does not grow with the video."""
        return self._stream(self._asked(*arguments, **options))

    def rollout(self, *arguments: Any, **options: Any) -> Rollout:
        """The rollout behind a call with these arguments, at its start: to commit given latents, or to time it."""
        return self._rollout_of(self._asked(*arguments, **options))[0]

    def _asked(self, *arguments: Any, **options: Any) -> SimpleNamespace:
        bound = inspect.signature(self.__call__).bind(*arguments, **options)
        bound.apply_defaults()
        return SimpleNamespace(**bound.arguments)

    def _rollout_of(self, asked: SimpleNamespace) -> tuple[Rollout, Conditioning, int]:
        """The rollout of a call, its text and how many chunks it is to make."""
        self._check(asked)
        video, length, sampler = self.video_config, asked.num_frames, self._sampler(asked)
        if length is None and asked.seconds is None:
            length = self.vae_shape.frames(video.trained_frames)
        elif length is None:
            length = math.ceil(asked.seconds * video.fps)
        conditioning, chunks = Conditioning.of(self, asked, sampler), self.num_chunks(length)
        cache = self.make_cache(asked.height or video.height, asked.width or video.width, asked.cache)
        size = cache.geometry.frames * chunks, cache.geometry.latent_height, cache.geometry.latent_width
        noise = conditioning.noise(asked, (self.transformer.config.in_channels, *size))
        decoded = asked.output_type != "latent" or cache.needs_pixels
        place = {"device": self._execution_device, "decoder": StreamingDecoder(self.vae) if decoded else None}
        rollout = Rollout(self.transformer, cache, sampler, conditioning.parts[0], noise, **place)
        if asked.callback_on_step_end is not None:
            rollout.on_step_end = self._step_callback(rollout, asked)
        return rollout, conditioning, chunks

    @torch.no_grad()
    def _stream(self, asked: SimpleNamespace) -> Iterator[Chunk]:
        self._rollout, conditioning, chunks = self._rollout_of(asked)
        rollout = self._rollout
        try:
            for chunk in self._decoded(rollout, chunks, asked.num_frames, asked.output_type):
                yield chunk
                if chunk.index + 1 in conditioning.parts:
                    rollout.switch(conditioning.parts[chunk.index + 1])
        finally:
            self._rollout = None
            self.maybe_free_model_hooks()

    def _decoded(self, rollout: Rollout, total: int, wanted: int | None, output_type: str) -> Iterator[Chunk]:
        """Run the rollout; `wanted`: pixel frames after which the last chunk is cut."""
        made = 0
        for index, latents in rollout.run(total):
            self._require_finite(index, latents, "latents", rollout)
            frames = latents
            if output_type != "latent":
                pixels = rollout.pixels  # [B, 3, F, H, W]
                self._require_finite(index, pixels, "pixels", rollout)
                pixels = pixels if wanted is None else pixels[:, :, : wanted - made]
                made += pixels.shape[2]
                if output_type == "uint8":  # as files hold it, rounded once
                    frames = np.stack([to_uint8(clip) for clip in pixels])
                else:
                    frames = self.video_processor.postprocess_video(pixels, output_type)
            yield Chunk(index, frames, latents, rollout.cache.report())

    def make_cache(self, height: int, width: int, cache: dict[str, Any] | CacheConfig | None = None) -> PackCache:
        """An empty cache for videos of a size. Raises `ConfigError` for settings that fit neither model nor size."""
        config = cache if isinstance(cache, CacheConfig) else section(
            CacheConfig, "cache", {**self.config.cache, **(cache or {})}
        )  # fmt: skip
        stride = self.vae_shape.spatial_stride
        try:
            return PackCache.for_model(
                self.transformer, config, height // stride, width // stride, self.video_config.trained_frames
            )
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def _sampler(self, asked: SimpleNamespace) -> SamplerConfig:
        sampler, steps = self.sampler_config, asked.num_inference_steps
        if steps is not None and sampler.kind == "few_step" and steps != len(sampler.steps):
            raise ConfigError(
                f"num_inference_steps is {steps}: this model was distilled for the {len(sampler.steps)} steps "
                f"{sampler.steps}; leave it out, or load the pipeline with sampler={{'kind': 'euler'}}"
            )
        guidance = None if asked.guidance_scale is None else max(1.0, asked.guidance_scale)
        changes = {"num_steps": steps, "guidance": guidance}
        return replace(sampler, **{key: value for key, value in changes.items() if value is not None})

    def _check(self, asked: SimpleNamespace) -> None:
        """Raise `ConfigError` for arguments that do not fit each other or the model."""
        unit, video = self.vae_shape.spatial_stride * self.transformer.config.patch_size[-1], self.video_config
        height, width = asked.height or video.height, asked.width or video.width
        if height % unit or width % unit:
            raise ConfigError(f"height and width are {height} and {width}: must be multiples of {unit} px")
        if (height, width) != (video.height, video.width):
            trained = f"{video.height}x{video.width}"
            log.warning("the model was trained on %s, not on %dx%d: expect worse videos", trained, height, width)
        for first, second in (("prompt", "prompt_embeds"), ("num_frames", "seconds"), ("seed", "generator")):
            if getattr(asked, first) is not None and getattr(asked, second) is not None:
                raise ConfigError(f"{first} and {second} are both given: leave one out")
        if asked.prompt is None and asked.prompt_embeds is None:
            raise ConfigError("neither prompt nor prompt_embeds is given")
        for name in ("num_frames", "seconds", "num_videos_per_prompt", "num_inference_steps"):
            value = getattr(asked, name)
            whole = isinstance(value, int) or name == "seconds"
            if value is not None and not (whole and 0 < value < math.inf):
                raise ConfigError(f"{name} is {value}: must be a positive {'number' if whole else 'whole number'}")
        width, longest = self.transformer.config.text_dim, self.transformer.config.text_len
        for name in ("prompt_embeds", "negative_prompt_embeds"):
            value = getattr(asked, name)
            if value is not None and (value.ndim != 3 or value.shape[1] > longest or value.shape[2] != width):
                raise ConfigError(f"{name} is {list(value.shape)}: must be [videos, at most {longest}, {width}]")
        if asked.output_type not in OUTPUT_TYPES:
            raise ConfigError(f"output_type is {asked.output_type}: expected one of {', '.join(OUTPUT_TYPES)}")
        if asked.samples is not None and asked.prompt is not None:
            videos = len(prompts_of(asked.prompt)) * asked.num_videos_per_prompt
            if len(asked.samples) != videos:
                raise ConfigError(f"samples has {len(asked.samples)} numbers: give one for each of the {videos} videos")
        for name in asked.callback_on_step_end_tensor_inputs:
            if name not in self._callback_tensor_inputs:
                raise ConfigError(
                    f"callback_on_step_end_tensor_inputs has {name}: expected some of {self._callback_tensor_inputs}"
                )

    def _step_callback(self, rollout: Rollout, asked: SimpleNamespace) -> StepCallback:
        def call(chunk: int, step: int, timestep: float, latents: torch.Tensor) -> torch.Tensor:
            prompts = rollout.prompts
            tensors = {"latents": latents, "prompt_embeds": prompts.embeds, "negative_prompt_embeds": prompts.negative}
            wanted = {name: tensors[name] for name in asked.callback_on_step_end_tensor_inputs}
            changed = asked.callback_on_step_end(self, chunk * rollout.steps_per_chunk + step, timestep, wanted) or {}
            if changed.keys() - {"latents"}:
                tensors |= changed
                rollout.prompts = Prompts(tensors["prompt_embeds"], tensors["negative_prompt_embeds"])
            return changed.get("latents", latents)

        return call

    def _require_finite(self, index: int, tensor: torch.Tensor, what: str, rollout: Rollout) -> None:
        if tensor.isfinite().all():
            return
        if what == "pixels":
            part = "the VAE or its dtype: the latents are finite"
        elif not rollout.embeds.isfinite().all():
            part = "the text encoder or its dtype: the prompt's embeddings are not finite"
        elif not all(weight.isfinite().all() for weight in self.transformer.parameters() if not weight.is_meta):
            part = "the transformer's weights, which are not all finite"
        else:
            part = f"sampler.guidance={rollout.sampler.guidance}, the dtype or an untrained checkpoint"
        raise NotFiniteError(f"chunk {index}: its {what} are NaN or infinite; the likely part is {part}")
