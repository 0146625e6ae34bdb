"""A run of the command line: models loaded once, then prompt -> stream of chunks -> mp4 and its description.

Every video is generated alone and its noise depends on nothing but (seed, prompt, sample), so it does not matter which
other prompts a run holds, in which order, or on how many ranks. Chunks are encoded as they come: memory does not grow.
"""

import logging
import platform
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
import torch.distributed as dist
from av.error import FFmpegError
from diffusers import ContextParallelConfig
from diffusers.models.attention_dispatch import AttentionBackendName
from tqdm import tqdm

from model.attention import best_backend
from model.cache.cache import CACHES, PackCache
from model.causal_wan import CausalWanModel
from model.geometry import ChunkGeometry
from model.sequence import PeerError, check_parts
from model.weights import content_hash
from pipeline.bundle import pipeline_settings, transformer_settings
from pipeline.data.schedule import texts
from pipeline.generate.chunks import NotFiniteError
from pipeline.generate.jobs import Job
from pipeline.generate.pipeline import PackForcingPipeline
from pipeline.generate.sampler import check_commit
from pipeline.load import load_scheduler, load_text_encoder, load_transformer, load_vae, place
from pipeline.sources import bundle_part, loras, transformer_source
from pipeline.vae_shape import VAEShape
from utils.ahead import ahead
from utils.choices import Offload
from utils.cli import one_line, stop_if_asked
from utils.config import Config, ConfigError, require
from utils.files import write_json
from utils.load_config import first_line, plain
from utils.video import VideoWriter

log = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEVICES = ("cpu", "cuda", "cuda:N", "mps", "xpu")
_LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "av")


@dataclass(frozen=True)
class Runtime:
    """Where and in what precision a run computes."""

    device: torch.device
    dtype: torch.dtype


def resolve_runtime(config: Config) -> Runtime:
    """`auto` settings made definite, and the threads of a CPU set. Raises `ConfigError` for a device, dtype or backend
    that is not there."""
    if config.inference.threads is not None:
        torch.set_num_threads(config.inference.threads)
    need, name, dtype = partial(require, config), config.inference.device, config.inference.dtype
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    need("inference.device", name.split(":")[0] in DEVICES, f"expected auto or {', '.join(DEVICES)}")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without it
        need("inference.device", False, f"not there ({first_line(error)}); use auto or cpu")
    if dtype == "auto":
        can = torch.cpu.get_capabilities()
        native = device.type != "cpu" or can.get("amx_bf16", False) or can.get("avx512_bf16", False)
        dtype = "bfloat16" if native else "float32"
    need("inference.dtype", dtype in _DTYPES, f"expected auto, {', '.join(_DTYPES)}")
    known, backend = [backend.value for backend in AttentionBackendName], config.inference.attention_backend
    need("inference.attention_backend", backend is None or backend in known, f"expected one of {', '.join(known)}")
    return Runtime(device, _DTYPES[dtype])


def check_cache(config: Config, vae: VAEShape) -> PackCache:
    """The empty cache; raises `ConfigError` where its settings do not fit chunk or size. Loads nothing."""
    check_commit(config.sampler, config.cache)
    settings = transformer_settings(config)
    size = (length // vae.spatial_stride for length in (config.video.height, config.video.width))
    geometry = ChunkGeometry(config.video.frames_per_chunk, *size)
    check_parts(config.parallel.sequence, settings["num_attention_heads"], geometry.tokens)
    head_dim = settings["attention_head_dim"]
    return CACHES[config.cache.kind](config.cache, geometry, head_dim, config.video.trained_frames)


def weight_hashes(config: Config) -> dict[str, str]:
    """SHA-256 of the weights a video depends on (the text encoder's, many times larger, are left to the path)."""
    log.info("hashing the weights")
    hashes = {"vae": content_hash(bundle_part(config, "vae"))}
    for number, (path, scale) in enumerate(loras(config)):
        hashes[f"lora{number}"] = f"{content_hash(path)} x {scale:g}"
    if config.model.random_init:
        return hashes | {"transformer": f"random, seed {config.seed}"}
    return hashes | {"transformer": content_hash(transformer_source(config))}


def home(config: Config, runtime: Runtime) -> torch.device:
    """Where weights lie while they are not used."""
    return runtime.device if config.inference.offload == Offload.none else torch.device("cpu")


def load_model(config: Config, runtime: Runtime) -> CausalWanModel:
    """The causal DiT, ready to run: cast, placed, with the attention backend and compilation asked for."""
    require(config, "parallel.sequence", config.parallel.sequence == 1 or dist.is_initialized(), "no process group is "
            "there: inference_packforcing.py makes one, started with torchrun; other programs take 1")  # fmt: skip
    model = place(load_transformer(config), home(config, runtime), runtime.dtype)
    backend = config.inference.attention_backend or best_backend(runtime.device)
    try:
        model.set_attention_backend(backend)
    except (ImportError, RuntimeError, ValueError) as error:
        raise ConfigError(f"setting `inference.attention_backend`: {backend} cannot be used here ({error})") from error
    if config.parallel.sequence > 1:
        model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=config.parallel.sequence))
    if config.inference.compile:
        log.info("the blocks are compiled in the first chunks, which take longer")
        torch._dynamo.config.recompile_limit = 32  # the first chunks, steps and commits, of the last block or another
        model.compile_repeated_blocks(dynamic=True)  # the history grows over the first chunks
    return model


def load_pipeline(config: Config, runtime: Runtime) -> PackForcingPipeline:
    """The pipeline that a config describes; the transformer first, so that a wrong checkpoint shows before the text
    encoder is loaded. Raises `ConfigError`."""
    log.info("loading the models of %s", config.model.bundle)
    transformer = load_model(config, runtime)
    place_of, offload = home(config, runtime), config.inference.offload
    tokenizer, text_encoder = load_text_encoder(config, place_of, runtime.dtype)
    vae = load_vae(config, place_of, runtime.dtype)
    if config.inference.vae_tiling:
        vae.enable_tiling()
    settings = pipeline_settings(config)
    pipe = PackForcingPipeline(tokenizer, text_encoder, vae, load_scheduler(config), transformer, **settings)
    if config.model.lora:
        found = {f"lora{number}": entry for number, entry in enumerate(loras(config))}
        for name, (path, _) in found.items():
            pipe.load_lora_weights(path, adapter_name=name)
        pipe.set_adapters(list(found), [scale for _, scale in found.values()])
        pipe.fuse_lora(adapter_names=list(found))  # all at once: a file read after a fusion would undo it
        pipe.unload_lora_weights()  # what was fused stays
    if offload == Offload.model:
        pipe.enable_model_cpu_offload(device=runtime.device)
    elif offload == Offload.group:
        stream = runtime.device.type == "cuda"
        pipe.enable_group_offload(runtime.device, offload_type="leaf_level", use_stream=stream)
    return pipe


class VideoMaker:
    """Turns jobs into files. Prompts are encoded first, then the text encoder is let go."""

    def __init__(self, pipe: PackForcingPipeline, jobs: list[Job], weights: dict[str, str], runtime: Runtime):
        self.pipe, self.weights, self.runtime = pipe, weights, runtime
        self.ranks = pipe.transformer.ranks
        wanted = [text for job in jobs for text in texts(job.prompt)]
        wanted += [job.config.sampler.negative_prompt for job in jobs if job.config.sampler.guidance != 1]
        pipe.encode_ahead(wanted)
        pipe.register_modules(text_encoder=None)

    def make_all(self, jobs: list[Job], show_progress: bool = True) -> dict[str, str]:
        """Make every video; one that fails does not stop the others. Returns reasons by the names of failed videos."""
        failed, alone = {}, self.ranks is None
        # In the middle of a chunk, where the other ranks of a video wait for it, a rank that has no memory left leaves:
        # torchrun ends the others.
        told = (ConfigError, NotFiniteError, OSError, FFmpegError, torch.OutOfMemoryError if alone else PeerError)
        for job in jobs:
            try:
                content = self.make(job, show_progress)
            except told as error:
                failed[job.video.name] = one_line(error)
                log.error("%s failed: %s", job.video, failed[job.video.name])
                continue
            if self.writes:
                speed = content["timing"]["frames_per_second"]
                log.info("%s: %d frames, %.1f frames/s", job.video, content["frames"], speed)
        return failed

    @property
    def writes(self) -> bool:
        """Of the ranks that make a video the first one decodes and writes it."""
        return self.ranks is None or self.ranks.rank == 0

    @contextmanager
    def _written(self, job: Job) -> Iterator[VideoWriter | None]:
        """The job's file where this rank writes it; one that cannot be written is found by all ranks of the video."""
        with ExitStack() as stack:
            with nullcontext() if self.ranks is None else self.ranks.together():
                writer, video = None, job.config.video
                if self.writes:
                    if job.video.is_dir():
                        raise ConfigError(f"{job.video} is a folder: remove it or choose another output folder")
                    writer = stack.enter_context(VideoWriter(job.video, video.fps, video.height, video.width))
            yield writer

    def make(self, job: Job, show_progress: bool = True) -> dict[str, Any]:
        """Write the job's video and, when it is complete, its sidecar; returns the sidecar's content, {} on a rank that
        writes nothing."""
        config = job.config
        start, report, chunks = time.perf_counter(), {}, 0
        frames = self.pipe.vae_shape.frames(config.inference.num_output_frames)
        stream = self.pipe.stream(
            prompt=[job.prompt],
            negative_prompt=config.sampler.negative_prompt,
            seed=config.seed,
            samples=[job.sample],
            num_frames=frames,
            output_type="uint8" if self.writes else "latent",
        )
        with (
            self._written(job) as writer,
            closing(ahead(stream) if self.pipe.overlap else stream) as decoded,
            tqdm(
                total=self.pipe.num_chunks(frames), desc=job.video.stem[:32], unit="chunk", dynamic_ncols=True,
                disable=not show_progress,
            ) as progress,
        ):  # fmt: skip
            for chunk in decoded:
                stop_if_asked()
                if writer is None:
                    continue
                writer.append(chunk.frames[0])
                report, chunks = chunk.report, chunks + 1
                speed = writer.frames / (time.perf_counter() - start)
                progress.set_postfix_str(f"{speed:.1f} frames/s, {describe_cache(report)}", refresh=False)
                progress.update()
        if writer is None:
            return {}
        content = self._describe(job, writer.frames, chunks, report, time.perf_counter() - start)
        write_json(job.sidecar, content)
        return content

    def _describe(self, job: Job, frames: int, chunks: int, report: dict, seconds: float) -> dict[str, Any]:
        config = job.config
        return {
            "prompt": job.prompt,
            "index": job.index,
            "sample": job.sample,
            "seed": config.seed,
            "video": job.video.name,
            "fps": config.video.fps,
            "frames": frames,
            "latent_frames": config.inference.num_output_frames,
            "chunks": chunks,
            "height": config.video.height,
            "width": config.video.width,
            "checkpoint": None if config.model.random_init else str(transformer_source(config)),
            "weights": self.weights,
            "cache": report,
            "timing": {"seconds": round(seconds, 3), "frames_per_second": round(frames / seconds, 3)},
            "device": _device_name(self.runtime.device),
            "dtype": str(self.runtime.dtype).removeprefix("torch."),
            "versions": {"python": platform.python_version(), **{name: version(name) for name in _LIBRARIES}},
            "config": plain(config),
        }


def describe_cache(report: dict[str, dict[str, int]]) -> str:
    """`27768 tokens, 5.12 GB`: what a chunk attended."""
    parts = [report[name] for name in ("sink", "mid", "recent")]
    tokens, size = (sum(part[key] for part in parts) for key in ("tokens", "bytes"))
    return f"{tokens} tokens, {size / 1e9:.2f} GB" if size >= 1e8 else f"{tokens} tokens, {size / 1e6:.3g} MB"


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
