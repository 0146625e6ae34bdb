"""`PackForcingPipeline`: prompts in, long videos out, as diffusers' pipelines are called.

    pipe = PackForcingPipeline.from_pretrained("bundles/tiny")
    frames = pipe("a red circle bounces over a blue checkerboard", seconds=30, seed=0).frames[0]

    for chunk in pipe.stream("a red circle bounces over a blue checkerboard", seconds=120, cache={"top_k": 4}):
        show(chunk.frames, chunk.report)

Everything that generates goes through `stream`: the command line, evaluation, samples in training and benchmarks.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.loaders import WanLoraLoaderMixin
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
from diffusers.video_processor import VideoProcessor
from huggingface_hub import snapshot_download
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

from model.attention import switches_kernels
from model.cache.cache import PackCache
from model.causal_wan import CausalWanModel
from pipeline.data.schedule import Prompt
from pipeline.data.vae_clip import encode
from pipeline.generate.arguments import CALLBACK_INPUTS, check_arguments, sampler_of, step_callback
from pipeline.generate.chunks import Chunk, decoded, joined
from pipeline.generate.conditioning import Conditioning, Encoders
from pipeline.generate.inputs import NoiseSource
from pipeline.generate.rollout import Rollout
from pipeline.generate.together import given, in_step
from pipeline.generate.vae_stream import StreamingDecoder
from pipeline.load import UNTRAINED_CACHE, flow_shift, read_parts
from pipeline.lora import read_lora
from pipeline.text import encode_prompt
from pipeline.vae_shape import VAEShape
from utils.config import CacheConfig, ConfigError, SamplerConfig, VideoConfig
from utils.files import read_json
from utils.load_config import section


class PackForcingPipeline(DiffusionPipeline, WanLoraLoaderMixin):
    """Chunk-causal text-to-video generation with a bounded KV cache (PackForcing, arXiv 2603.25730).

    Args:
        tokenizer, text_encoder, vae, transformer: of Wan2.1 or of the same classes.
        scheduler: its `shift` is that of the sampling schedule, unless `sampler` has one.
        cache, sampler, video: settings by name, as in the sections of the same names in a YAML config; what is left
            out keeps its default. They are saved with the pipeline.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    overlap = True  # the next chunk is made, in another thread, while one is decoded
    _callback_tensor_inputs = CALLBACK_INPUTS

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
        cls, pretrained_model_name_or_path: str | Path, checkpoint: str | Path | None = None, use_ema: bool = False,
        **options: Any,
    ) -> "PackForcingPipeline":  # fmt: skip
        """From a bundle, or a diffusers folder of Wan2.1 (whose transformer is read as a chunk-causal one).

        `checkpoint` takes the place of the folder's transformer: whatever `model.checkpoint` may name, a `.pt` file of
        Self-Forcing's kind too, of which `use_ema` picks the averaged weights. `options` are diffusers'; components
        given by name take the place of the folder's. Where its model_index.json names a `_base`, the parts that it
        lacks are those of that folder. A hub id is downloaded whole. Raises `CheckpointError`.
        """
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            folder = Path(snapshot_download(str(pretrained_model_name_or_path)))
        index = read_json(folder / cls.config_name)
        if "_base" in index:
            own = {name: index[name] for name in ("cache", "sampler", "video") if name in index}
            if checkpoint is None:
                options.setdefault("transformer", CausalWanModel.from_pretrained(
                    folder / "transformer", torch_dtype=options.get("torch_dtype")))  # fmt: skip
            return cls.from_pretrained(folder / index["_base"], checkpoint, use_ema, **{**own, **options})
        options |= read_parts(folder, index, checkpoint, use_ema, options)
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

    @torch.no_grad()
    def encode_video(self, pixels: torch.Tensor) -> torch.Tensor:
        """[B, 3, 1 + 4n, H, W] in -1..1 -> normalised latents [B, C, 1 + n, H / 8, W / 8], the posterior's mean."""
        return encode(self.vae, pixels.to(self._execution_device))

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
        image: Any = None,
        video: Any = None,
        conditions: dict[str, Any] | None = None,
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
            image, video: what the videos begin with, one or one for each prompt, as diffusers' `VideoProcessor` takes
                it: an image, held for a chunk, or frames, of which the last whole chunks are taken. They are the first
                chunks of the result.
            conditions: values of further `CONDITIONS` by name.

        Returns `.frames`, or a tuple of them, as `Chunk.frames` for whole videos. Raises `ConfigError` for arguments
        that do not fit each other or the model, `NotFiniteError` for a chunk of NaN or infinite numbers.
        """
        arguments = SimpleNamespace(**{key: value for key, value in locals().items() if key != "self"})
        frames = joined(self.progress_bar(self._stream(arguments)), output_type)
        return WanPipelineOutput(frames=frames) if return_dict else (frames,)

    def stream(self, *arguments: Any, **options: Any) -> Iterator[Chunk]:
        """Yield each chunk as it is made; arguments and errors as for a call. Memory does not grow with the video. The
        next chunk is made meanwhile: callbacks are called in its thread."""
        return self._stream(self._asked(*arguments, **options))

    def rollout(self, *arguments: Any, **options: Any) -> Rollout:
        """The rollout behind a call with these arguments, at its start: to commit given latents, or to time it."""
        rollout, _, _, decoder = self._rollout_of(self._asked(*arguments, **options))
        rollout.decoder = decoder
        return rollout

    def _asked(self, *arguments: Any, **options: Any) -> SimpleNamespace:
        bound = inspect.signature(self.__call__).bind(*arguments, **options)
        bound.apply_defaults()
        return SimpleNamespace(**bound.arguments)

    def _rollout_of(self, asked: SimpleNamespace) -> tuple[Rollout, Conditioning, int, StreamingDecoder | None]:
        """The rollout of a call, what it is conditioned on, how many chunks there are to be and what decodes them."""
        video, model, stride = self.video_config, self.transformer.config, self.vae_shape.spatial_stride
        check_arguments(asked, video, stride * model.patch_size[-1], model.text_len, model.text_dim)
        length, sampler = asked.num_frames, sampler_of(asked, self.sampler_config)
        if length is None and asked.seconds is None:
            length = self.vae_shape.frames(video.trained_frames)
        elif length is None:
            length = math.ceil(asked.seconds * video.fps)
        size, chunks = (asked.height or video.height, asked.width or video.width), self.num_chunks(length)
        encoders = Encoders(
            self.encode_prompt, lambda frames: self.video_processor.preprocess_video(frames, *size), self.encode_video,
            self.vae_shape, model.frames_per_chunk, video.fps,
            {"device": self._execution_device, "dtype": self.transformer.dtype},
        )  # fmt: skip
        conditioning = Conditioning(asked, encoders, sampler)
        if len(conditioning.given) >= chunks:
            raise ConfigError(f"the given frames fill {len(conditioning.given)} chunks: ask for a video of more than "
                              f"{chunks}, which includes them")  # fmt: skip
        cache = self.make_cache(*size, asked.cache)
        shape = cache.geometry.frames * chunks, cache.geometry.latent_height, cache.geometry.latent_width
        noise = conditioning.noise((model.in_channels, *shape))
        decoder = StreamingDecoder(self.vae) if asked.output_type != "latent" or cache.needs_pixels else None
        place = {"device": self._execution_device, "decoder": decoder if cache.needs_pixels else None}
        rollout = Rollout(self.transformer, cache, sampler, conditioning.parts[0], noise, **place)
        if asked.callback_on_step_end is not None:
            rollout.on_step_end = step_callback(self, rollout, asked)
        return rollout, conditioning, chunks, decoder

    @torch.no_grad()
    def _stream(self, asked: SimpleNamespace) -> Iterator[Chunk]:
        ranks = self.transformer.ranks
        with nullcontext() if ranks is None else ranks.together(given(asked)):
            self._rollout, conditioning, chunks, decoder = self._rollout_of(asked)
        rollout, first, parts = self._rollout, conditioning.given, conditioning.parts

        def chunks_made() -> Iterator[tuple[int, torch.Tensor]]:
            for index, latents in enumerate(first):
                if index and index in parts:
                    rollout.switch(parts[index])
                rollout.give(latents)
                yield index, latents
            yield from rollout.run(chunks - len(first), commit_last=False, parts=parts)

        overlap = self.overlap and chunks > 1 and asked.output_type != "latent"
        overlap &= not hasattr(self.vae, "_hf_hook")  # offloaded: one model at a time is on the device
        overlap &= not torch.is_autocast_enabled(self._execution_device.type)  # which another thread has not
        overlap &= not switches_kernels(self.transformer)  # under the decoder's feet
        try:
            made = in_step(chunks_made(), ranks)
            yield from decoded(rollout, made, decoder, asked.output_type, asked.num_frames, overlap)
        finally:
            self._rollout = None
            self.maybe_free_model_hooks()

    def make_cache(self, height: int, width: int, cache: dict[str, Any] | CacheConfig | None = None) -> PackCache:
        """An empty cache for videos of a size. Raises `ConfigError` for settings that fit neither model nor size."""
        config = cache if isinstance(cache, CacheConfig) else section(
            CacheConfig, "cache", {**self.config.cache, **(cache or {})}
        )  # fmt: skip
        size = (length // self.vae_shape.spatial_stride for length in (height, width))
        return PackCache.for_model(self.transformer, config, *size, self.video_config.trained_frames)
