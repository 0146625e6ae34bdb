"""Prompt -> rollout -> streamed VAE decode -> mp4 and its description.

Every video is generated alone and its noise depends on nothing but (seed, prompt, sample), so it does not matter which
other prompts a run holds, nor in which order. Chunks are decoded and encoded as they come: memory does not grow.
"""

import json
import logging
import platform
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.models.attention_dispatch import AttentionBackendName
from tqdm import tqdm

from model.attention import best_backend
from model.cache.cache import PackCache
from model.causal_wan import CausalWanModel
from model.geometry import ChunkGeometry
from model.weights import content_hash
from pipeline.bundle import (
    VAEShape,
    bundle_folder,
    load_text_encoder,
    load_transformer,
    load_vae,
    place,
    transformer_settings,
    transformer_source,
)
from pipeline.generate.jobs import Job, resolved
from pipeline.generate.pipeline import PackForcingPipeline
from pipeline.generate.rollout import Prompts, Rollout, prompt_noise
from pipeline.generate.vae_stream import StreamingDecoder
from pipeline.text import encode_text
from utils.config import Config, ConfigError
from utils.video import VideoWriter, to_uint8

log = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "av")


@dataclass(frozen=True)
class Runtime:
    """Where and in what precision a run computes."""

    device: torch.device
    dtype: torch.dtype


def resolve_runtime(config: Config) -> Runtime:
    """`auto` settings made definite. Raises `ConfigError` for a device, dtype or backend that is not there."""
    settings = config.inference
    name = settings.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"setting `inference.device` is {name}: expected auto, cpu or cuda[:n]") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"setting `inference.device` is {name}: no CUDA device is available; use cpu or auto")
    dtype = settings.dtype
    if dtype == "auto":
        native = device.type == "cuda" or torch.cpu.get_capabilities().get("amx_bf16", False)
        dtype = "bfloat16" if native else "float32"
    if dtype not in _DTYPES:
        raise ConfigError(f"setting `inference.dtype` is {dtype}: expected auto, {', '.join(_DTYPES)}")
    known = [backend.value for backend in AttentionBackendName]
    if settings.attention_backend is not None and settings.attention_backend not in known:
        raise ConfigError(
            f"setting `inference.attention_backend` is {settings.attention_backend}: expected one of {', '.join(known)}"
        )
    if settings.threads is not None and settings.threads < 1:
        raise ConfigError(f"setting `inference.threads` is {settings.threads}: must be at least 1")
    return Runtime(device, _DTYPES[dtype])


def make_cache(config: Config, vae: VAEShape) -> PackCache:
    """The history, one for all videos of a run. Raises `ConfigError` where its settings do not fit chunk or size."""
    settings = transformer_settings(config)
    try:
        geometry = ChunkGeometry(
            config.video.frames_per_chunk,
            config.video.height // vae.spatial_stride,
            config.video.width // vae.spatial_stride,
        )
        return PackCache(config.cache, geometry, settings["attention_head_dim"], config.video.trained_frames)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def weight_hashes(config: Config) -> dict[str, str]:
    """SHA-256 of the weights a video depends on (the text encoder's, many times larger, are left to the path)."""
    vae = content_hash(bundle_folder(config) / "vae")
    if config.model.random_init:
        return {"transformer": f"random, seed {config.seed}", "vae": vae}
    return {"transformer": content_hash(transformer_source(config)), "vae": vae}


@torch.no_grad()
def encode_prompts(config: Config, prompts: list[str], runtime: Runtime) -> dict[str, torch.Tensor]:
    """Embeddings [1, n, text_dim] of every prompt, on the CPU; the text encoder is loaded for this and freed again.

    One prompt at a time: in a batch the numbers, and so the video, would depend on the other prompts. The zero padding
    is left off; the model puts it back.
    """
    text_len = transformer_settings(config)["text_len"]
    tokenizer, text_encoder = load_text_encoder(config, runtime.device, runtime.dtype)
    embeddings = {}
    for prompt in dict.fromkeys(prompts):
        tokens = len(tokenizer(prompt).input_ids)
        if tokens > text_len:
            log.warning("prompt `%s...` has %d tokens: the model reads the first %d", prompt[:40], tokens, text_len)
        padded = encode_text(tokenizer, text_encoder, [prompt], text_len)  # [1, text_len, text_dim]
        embeddings[prompt] = padded[:, : max(1, min(tokens, text_len))].cpu().clone()
    return embeddings


def load_model(config: Config, runtime: Runtime) -> CausalWanModel:
    """The causal DiT, ready to run: cast, placed, with the attention backend and compilation asked for."""
    model = place(load_transformer(config), runtime.device, runtime.dtype)
    backend = config.inference.attention_backend or best_backend(runtime.device)
    try:
        model.set_attention_backend(backend)
    except (ImportError, RuntimeError, ValueError) as error:
        raise ConfigError(f"setting `inference.attention_backend`: {backend} cannot be used here ({error})") from error
    if config.inference.compile:
        model.compile_repeated_blocks(dynamic=True)  # the history grows over the first chunks
    return model


def load_pipeline(config: Config, runtime: Runtime) -> PackForcingPipeline:
    """The pipeline of a config: its bundle, with the checkpoint and the settings that it names."""
    if config.inference.threads is not None:
        torch.set_num_threads(config.inference.threads)
    model = load_model(config, runtime)  # first: a wrong checkpoint shows before the text encoder is loaded
    tokenizer, text_encoder = load_text_encoder(config, runtime.device, runtime.dtype)
    vae = load_vae(config, runtime.device, runtime.dtype)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=config.sampler.shift)
    settings = {name: resolved(config)[name] for name in ("cache", "sampler", "video")}
    return PackForcingPipeline(tokenizer, text_encoder, vae, scheduler, model, **settings)


class Generator:
    """Turns jobs into files. Loads all models; the checks that need none belong before it."""

    def __init__(
        self, config: Config, runtime: Runtime, prompts: list[str], weights: dict[str, str], cache: PackCache
    ):
        self.config, self.runtime, self.weights, self.cache = config, runtime, weights, cache
        if config.inference.threads is not None:
            torch.set_num_threads(config.inference.threads)
        guided = config.sampler.guidance != 1
        negative = config.sampler.negative_prompt
        # The transformer first: a wrong checkpoint shows before the text encoder is loaded.
        self.model = load_model(config, runtime)
        self.embeddings = encode_prompts(config, [*prompts, negative] if guided else prompts, runtime)
        self.negative = self.embeddings[negative] if guided else None
        self.vae = load_vae(config, runtime.device, runtime.dtype)

    def generate(self, job: Job) -> dict[str, Any]:
        """Write the job's video and, when it is complete, its sidecar; returns the sidecar's content."""
        config, video, device = self.config, self.config.video, self.runtime.device
        self.cache.reset()
        rollout = Rollout(
            self.model,
            self.cache,
            config.sampler,
            Prompts(*(None if x is None else x.to(device) for x in (self.embeddings[job.prompt], self.negative))),
            prompt_noise(config.seed, [job.prompt], [job.sample]),
        )
        decoder = StreamingDecoder(self.vae)
        num_chunks = config.inference.num_output_frames // video.frames_per_chunk
        start = time.perf_counter()
        with (
            VideoWriter(job.video, video.fps, video.height, video.width) as writer,
            tqdm(total=num_chunks, desc=job.video.stem[:32], unit="chunk", dynamic_ncols=True) as progress,
        ):
            for _, latents in rollout.run(num_chunks):
                pixels = decoder.decode(latents)  # [1, 3, F, H, W]
                writer.append(to_uint8(pixels[0]))
                progress.set_postfix_str(
                    f"{writer.frames / (time.perf_counter() - start):.1f} frames/s, {describe_cache(self.cache)}",
                    refresh=False,
                )
                progress.update()
        seconds = time.perf_counter() - start
        content = self._describe(job, writer.frames, seconds)
        _write_json(job.sidecar, content)
        return content

    def _describe(self, job: Job, frames: int, seconds: float) -> dict[str, Any]:
        config = self.config
        return {
            "prompt": job.prompt,
            "index": job.index,
            "sample": job.sample,
            "seed": config.seed,
            "video": job.video.name,
            "fps": config.video.fps,
            "frames": frames,
            "latent_frames": config.inference.num_output_frames,
            "chunks": self.cache.num_chunks,
            "height": config.video.height,
            "width": config.video.width,
            "checkpoint": None if config.model.random_init else str(transformer_source(config)),
            "weights": self.weights,
            "cache": self.cache.report(),
            "timing": {"seconds": round(seconds, 3), "frames_per_second": round(frames / seconds, 3)},
            "device": _device_name(self.runtime.device),
            "dtype": str(self.runtime.dtype).removeprefix("torch."),
            "versions": {"python": platform.python_version(), **{name: version(name) for name in _LIBRARIES}},
            "config": resolved(config),
        }


def describe_cache(cache: PackCache) -> str:
    """`27768 tokens, 5.12 GB`: what the next chunk attends."""
    parts = [cache.report()[name] for name in ("sink", "mid", "recent")]
    tokens, size = (sum(part[key] for part in parts) for key in ("tokens", "bytes"))
    return f"{tokens} tokens, {size / 1e9:.2f} GB" if size >= 1e8 else f"{tokens} tokens, {size / 1e6:.3g} MB"


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()


def _write_json(path: Path, content: dict[str, Any]) -> None:
    """In one step: a sidecar is there whole or not at all."""
    partial = path.with_suffix(".json.partial")
    partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)
