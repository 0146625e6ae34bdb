"""Where the time of a chunk goes, and how far it is from its floor.

    python -m scripts.bench_inference --config_path configs/bench_cpu.yaml --chunks 12
    python -m scripts.bench_inference --config_path configs/bench_cpu.yaml --chunks 12 cache.top_k=4 inference.threads=1

Weights are random with `model.random_init`. The cache is filled first; then `--chunks` chunks are timed.
After each of them its *floor* runs: for every forward and layer only the matmuls (q, k, v, o, cross q, o, both ffn) and
the self- and cross-attention calls, on tensors of the same shapes. `floor_ratio` is the median over the timed chunks of
chunk time / floor time. With `--videos N`, N pairs of videos of so many chunks go into mp4 files, chunks decoded and
encoded beside the next one and before it; `overlap` is the median ratio. Prints a table, then one line of JSON.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from model.attention import attend
from model.cache.cache import PackCache
from model.causal_wan import CausalWanModel
from model.schedule import WAN_SHIFT
from pipeline.bundle import pipeline_settings
from pipeline.generate.inference import Runtime, load_model, resolve_runtime
from pipeline.generate.pipeline import PackForcingPipeline
from pipeline.generate.rollout import Rollout
from pipeline.generate.vae_stream import StreamingDecoder
from pipeline.load import load_scheduler, load_text_encoder, load_vae
from pipeline.text import encode_text
from utils.ahead import ahead
from utils.cli import check_positive, config_parser, print_rows, run_configured
from utils.config import Config, ConfigError
from utils.timing import Stopwatch, device_name, peak_memory, synchronise
from utils.video import VideoWriter

PARTS = ("denoise", "commit", "select_rotate", "compress")  # the last two are inside the first two


@torch.no_grad()
def floor_seconds(model: CausalWanModel, cache: PackCache, batch: int, steps: int, commits: bool) -> float:
    """Seconds of the matmuls and attention calls alone of one chunk, on random tensors of the same shapes: of `steps`
    forwards, and of a commit, whose last block makes query, key and value only."""
    device, dtype = model.device, model.dtype
    heads, dim = model.config.num_attention_heads, model.config.attention_head_dim
    tokens = cache.geometry.tokens
    history = sum(cache.report()[part]["tokens"] for part in ("sink", "mid", "recent"))

    def tensor(*shape):
        return torch.randn(*shape, device=device, dtype=dtype)

    x, hidden = tensor(batch, tokens, heads * dim), tensor(batch, tokens, model.config.ffn_dim)
    query = tensor(batch, tokens, heads, dim)
    keys, values = (tensor(batch, history + tokens, heads, dim) for _ in range(2))
    text_keys, text_values = (tensor(batch, model.config.text_len, heads, dim) for _ in range(2))
    synchronise(device)
    start = time.perf_counter()
    for forward in range(steps + commits):
        for block in model.blocks:
            backend = block.attn1.processor._attention_backend
            attn1, attn2 = block.attn1, block.attn2
            for linear in (attn1.to_q, attn1.to_k, attn1.to_v):
                F.linear(x, linear.weight, linear.bias)
            if forward == steps and block is model.blocks[-1]:
                continue
            for linear in (attn1.to_out[0], attn2.to_q, attn2.to_out[0]):
                F.linear(x, linear.weight, linear.bias)
            F.linear(x, block.ffn.net[0].proj.weight, block.ffn.net[0].proj.bias)
            F.linear(hidden, block.ffn.net[2].weight, block.ffn.net[2].bias)
            attend(query, keys, values, backend)
            attend(query, text_keys, text_values, backend)
    synchronise(device)
    return time.perf_counter() - start


def fill(rollout: Rollout) -> None:
    """Bring the cache to its full size with chunks of noise."""
    cache, layout = rollout.cache, rollout.cache.layout
    geometry, channels = cache.geometry, rollout.model.config.in_channels
    latents = torch.randn(1, channels, geometry.frames, geometry.latent_height, geometry.latent_width)
    for _ in tqdm(range(min(layout.sink, 64) + layout.recent + layout.top_k + 1), desc="fill the cache", leave=False):
        rollout.commit(latents.to(rollout.device))


def pipeline_of(config: Config, runtime: Runtime) -> PackForcingPipeline:
    """Without a text encoder; where there is no bundle, with a VAE of random weights."""
    model = load_model(config, runtime)
    if config.model.bundle is None:
        vae, scheduler = AutoencoderKLWan().to(runtime.device, runtime.dtype).eval(), FlowMatchEulerDiscreteScheduler()
        config.sampler.shift = config.sampler.shift or WAN_SHIFT
    else:
        vae, scheduler = load_vae(config, runtime.device, runtime.dtype), load_scheduler(config)
    return PackForcingPipeline(None, None, vae, scheduler, model, **pipeline_settings(config))


def vae_seconds(vae: AutoencoderKLWan, latents: torch.Tensor, chunks: int) -> float:
    """Median seconds to decode one chunk, the first (which yields fewer frames) left out."""
    decoder, times = StreamingDecoder(vae), []
    for _ in tqdm(range(chunks + 1), desc="vae", leave=False):
        synchronise(latents.device)
        start = time.perf_counter()
        decoder.decode(latents)
        synchronise(latents.device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def video_seconds(pipe: PackForcingPipeline, overlap: bool, **options) -> float:
    """Seconds from embeddings to an mp4, with decoding and encoding beside the next chunk, or after each."""
    video, pipe.overlap = pipe.video_config, overlap
    stream, start = pipe.stream(output_type="uint8", **options), time.perf_counter()
    with (
        tempfile.TemporaryDirectory() as folder,
        VideoWriter(Path(folder, "video.mp4"), video.fps, video.height, video.width) as writer,
        closing(ahead(stream) if overlap else stream) as chunks,
    ):
        for chunk in chunks:
            writer.append(chunk.frames[0])
    return time.perf_counter() - start


def overlap_ratio(pipe: PackForcingPipeline, pairs: int, **options) -> float | None:
    """Median over pairs of videos of the time with overlap over that without; None without pairs."""
    ratios = []
    for number in tqdm(range(pairs), desc="pairs of videos", leave=False):
        order = (True, False) if number % 2 else (False, True)
        seconds = {overlap: video_seconds(pipe, overlap, **options) for overlap in order}
        ratios.append(seconds[True] / seconds[False])
    return statistics.median(ratios) if ratios else None


def text_seconds(config: Config, runtime: Runtime) -> float | None:
    """Seconds to encode one prompt; None where there is no bundle with a text encoder."""
    if config.model.bundle is None:
        return None
    tokenizer, encoder = load_text_encoder(config, runtime.device, runtime.dtype)
    encode_text(tokenizer, encoder, ["a first call to warm up"], config.model.text_len)
    start = time.perf_counter()
    encode_text(tokenizer, encoder, ["a red circle bounces over a blue checkerboard"], config.model.text_len)
    synchronise(runtime.device)
    return time.perf_counter() - start


def largest_costs(call: Callable[[], object], device: torch.device, count: int = 3) -> dict[str, float]:
    """Kernels (operations on a CPU) that take most of a call, and the share of its time that each takes."""
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=kinds) as profiler:
        call()
        synchronise(device)
    name = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    times = {event.key: getattr(event, name) for event in profiler.key_averages()}
    most = sorted(times, key=lambda key: -times[key])[:count]
    return {key[:60]: times[key] / max(sum(times.values()), 1) for key in most}


def bench(config: Config, chunks: int, vae_chunks: int, profiled: bool = False, videos: int = 0) -> dict:
    """Time `chunks` chunks with the cache full; see the module's docstring."""
    runtime = resolve_runtime(config)
    device, dtype = runtime.device, runtime.dtype
    pipe = pipeline_of(config, runtime)
    model, width = pipe.transformer, pipe.transformer.config.text_dim
    embeds = torch.randn(1, min(8, model.config.text_len), width, device=device, dtype=dtype)
    asked = {"prompt_embeds": embeds, "negative_prompt_embeds": torch.zeros_like(embeds), "seed": config.seed}
    rollout = pipe.rollout(output_type="latent", **asked)
    cache = rollout.cache
    fill(rollout)
    chunk_times, ratios, parts = [], [], defaultdict(list)
    generator, bar = rollout.run(chunks + 2), tqdm(range(chunks + 1), desc="chunks", unit="chunk")
    with Stopwatch(device) as watch:
        if model.pack_compressor is not None:
            watch.watch_module(model.pack_compressor, "compress")
        for number in bar:
            watch.clear()
            with watch.part("chunk"):
                _, latents = next(generator)
            steps = rollout.steps_per_chunk
            floor = floor_seconds(model, cache, len(rollout.embeds), steps, rollout.forwards_per_chunk > steps)
            if number == 0:  # warm-up: allocations, compilation
                continue
            seconds = watch.total("chunk")
            chunk_times.append(seconds)
            ratios.append(seconds / floor)
            for name in PARTS:
                parts[name].append(watch.total(name))
            bar.set_postfix(s=f"{seconds:.3f}", ratio=f"{statistics.median(ratios):.3f}")

    costs = largest_costs(lambda: next(generator), device) if profiled else None
    seconds = {name: statistics.median(values) for name, values in parts.items()}
    seconds["vae"] = vae_seconds(pipe.vae, latents.to(device), vae_chunks) if vae_chunks else None
    seconds["encode"] = text_seconds(config, runtime)
    length = pipe.vae_shape.frames(chunks * config.video.frames_per_chunk)
    overlap = overlap_ratio(pipe, videos, num_frames=length, **asked)
    frames = config.video.frames_per_chunk * 4
    chunk_seconds = statistics.median(chunk_times)
    half = len(chunk_times) // 2
    return {
        "device": device_name(device),
        "dtype": str(dtype).removeprefix("torch."),
        "chunks": chunks,
        "seconds_per_chunk": {"total": chunk_seconds, **seconds},
        "floor_ratio": statistics.median(ratios),
        "fps": frames / chunk_seconds,
        "fps_with_vae": frames / (chunk_seconds + seconds["vae"]) if seconds["vae"] else None,
        "second_half_over_first": statistics.median(chunk_times[half:]) / statistics.median(chunk_times[:half] or [1]),
        "overlap": overlap,
        "kv": cache.report(),
        "costs": costs,
        "peak_bytes": peak_memory(device),
    }


def print_table(result: dict) -> None:
    total = result["seconds_per_chunk"]["total"]
    times = {name: seconds for name, seconds in result["seconds_per_chunk"].items() if seconds is not None}
    rows = [[name, f"{seconds:.4f}", f"{seconds / total:.1%}"] for name, seconds in times.items()]
    held = [[name, part["tokens"], f"{part['bytes'] / 1e6:.1f}"] for name, part in result["kv"].items()]
    print_rows([["part", "s/chunk", "share"], *rows, ["", "tokens", "MB"], *held])
    with_vae = f", {result['fps_with_vae']:.2f} with VAE" if result["fps_with_vae"] else ""
    overlap = f", video with overlap {result['overlap']:.3f} of the time without" if result["overlap"] else ""
    print(
        f"\n{result['device']}, {result['dtype']}: floor ratio {result['floor_ratio']:.3f}, "
        f"{result['fps']:.2f} frames/s{with_vae}, peak {result['peak_bytes'] / 1e9:.2f} GB{overlap}\n"
    )


def run(config: Config, arguments: argparse.Namespace) -> None:
    check_positive(arguments, "chunks")
    if config.model.bundle is None and not config.model.random_init:
        raise ConfigError("nothing to time: set model.bundle, or model.random_init=true for random weights")
    result = bench(config, arguments.chunks, arguments.vae_chunks, arguments.profile, arguments.videos)
    print_table(result)
    print(json.dumps({"config": arguments.config_path, "overrides": arguments.overrides, **result}))


def main(argv: list[str] | None = None) -> int:
    parser = config_parser(__doc__)
    parser.add_argument("--chunks", type=int, default=12, help="timed chunks, at least 10 for a figure to report")
    parser.add_argument("--vae_chunks", type=int, default=2, help="chunks decoded to time the VAE; 0: none")
    parser.add_argument("--videos", type=int, default=0, help="pairs of videos, decoded beside and after each chunk")
    parser.add_argument("--profile", action="store_true", help="name the three largest costs of a chunk")
    return run_configured(parser, argv, run)


if __name__ == "__main__":
    sys.exit(main())
