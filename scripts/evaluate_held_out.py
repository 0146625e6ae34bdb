"""How much of held-out sprite-world captions a model gets right, second by second, at any length and cache setting.

    python -m scripts.evaluate_held_out --config_path configs/tiny/demo.yaml --seconds 5
    python -m scripts.evaluate_held_out --config_path configs/tiny/demo.yaml --captions 16 --seconds 60 cache.top_k=4
    python -m scripts.evaluate_held_out --config_path configs/tiny/demo.yaml --pairs unseen --output_folder output/new
    python -m scripts.evaluate_held_out --config_path configs/tiny/ar_demo.yaml --teacher \
        bundles/tiny_teacher/transformer sampler.num_steps=16 sampler.guidance=4

The captions are the first of the held-out split (clips from index 1,000,000 on): `seen` combinations of colour and
shape, or the `unseen` ones that no training clip shows. Videos are generated in batches, with fresh noise. Prints a
table, then one line of JSON. With --output_folder the videos are kept, each with its sidecar. With --teacher a
bidirectional DiT is scored on clips of `video.trained_frames`, made by `sampler`'s Euler steps; text encoder and VAE
are the bundle's.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from tqdm import tqdm

from pipeline.bundle import check_bundle, load_library_model, vae_shape
from pipeline.generate.bidirectional import sample_clip
from pipeline.generate.inference import Generator, make_cache, resolve_runtime
from pipeline.generate.rollout import NoiseSource, Prompts, Rollout, prompt_noise
from pipeline.generate.vae_stream import StreamingDecoder
from scripts.evaluate import print_table, summarise
from utils.config import Config, ConfigError
from utils.load_config import load_config
from utils.sprites.read import Mark, read_seconds, score
from utils.sprites.world import HELD_OUT_START, caption, parse_caption, sample_spec
from utils.video import VideoWriter, to_uint8


def conditioning(generator: Generator, prompts: list[str], first: int) -> tuple[Prompts, NoiseSource]:
    """Embeddings padded as the DiT was trained on them, and noise, of the captions from number `first` on."""
    text_len, device = generator.model.config.text_len, generator.runtime.device
    numbers = list(range(first, first + len(prompts)))

    def pad(embeds: torch.Tensor) -> torch.Tensor:  # [1, n, text_dim] -> [1, text_len, text_dim]
        return F.pad(embeds, (0, 0, 0, text_len - embeds.shape[1])).to(device)

    padded = torch.cat([pad(generator.embeddings[prompt]) for prompt in prompts])
    negative = None if generator.negative is None else pad(generator.negative)
    return Prompts(padded, negative), prompt_noise(generator.config.seed, prompts, numbers)


def generate(generator: Generator, prompts: list[str], first: int, num_chunks: int) -> list[np.ndarray]:
    """One video per prompt, as one batch: uint8 [F, H, W, 3] each."""
    generator.cache.reset()
    embeds, noise = conditioning(generator, prompts, first)
    rollout = Rollout(generator.model, generator.cache, generator.config.sampler, embeds, noise)
    decoder, pieces = StreamingDecoder(generator.vae), []
    for _, latents in tqdm(rollout.run(num_chunks), total=num_chunks, desc="chunks", leave=False):
        pixels = decoder.decode(latents)  # [B, 3, F, H, W]
        pieces.append([to_uint8(video) for video in pixels])
    return [np.concatenate(video) for video in zip(*pieces, strict=True)]


def generate_clips(
    generator: Generator, teacher: WanTransformer3DModel, prompts: list[str], first: int
) -> list[np.ndarray]:
    """One clip of the trained length per prompt by a bidirectional DiT: uint8 [F, H, W, 3] each."""
    embeds, noise = conditioning(generator, prompts, first)
    geometry = generator.cache.geometry
    shape = (teacher.config.in_channels, generator.config.video.trained_frames)
    shape += (geometry.latent_height, geometry.latent_width)
    latents = sample_clip(teacher, noise(0, 0, shape).to(teacher.device), embeds, generator.config.sampler)
    return [to_uint8(video) for video in StreamingDecoder(generator.vae).decode(latents)]


def load_teacher(folder: Path, generator: Generator) -> WanTransformer3DModel:
    """Raises `ConfigError` where the folder holds none, or one for other latents or texts."""
    teacher = load_library_model(WanTransformer3DModel, folder, generator.runtime.dtype)
    for name in ("in_channels", "text_dim"):
        theirs, ours = teacher.config[name], generator.model.config[name]
        if theirs != ours:
            raise ConfigError(f"--teacher is {folder}: its {name} is {theirs}, the bundle's is {ours}")
    return teacher.to(generator.runtime.device)


def keep(folder: Path, index: int, prompt: str, frames: np.ndarray, fps: int) -> None:
    """Write one video and the sidecar that scripts/evaluate.py reads."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{index:04d}.mp4"
    with VideoWriter(path, fps, *frames.shape[1:3]) as writer:
        writer.append(frames)
    path.with_suffix(".json").write_text(json.dumps({"prompt": prompt, "fps": fps}))


def evaluate(config: Config, arguments: argparse.Namespace) -> tuple[list[Mark], dict]:
    """All marks of all videos, and figures about the run."""
    check_bundle(config)
    runtime, chunk, fps = resolve_runtime(config), config.video.frames_per_chunk, config.video.fps
    vae = vae_shape(config)
    num_chunks = math.ceil(vae.latent_frames(math.ceil(arguments.seconds * fps)) / chunk)
    indices = range(HELD_OUT_START, HELD_OUT_START + arguments.captions)
    prompts = [caption(sample_spec(config.seed, index, arguments.pairs)) for index in indices]
    generator = Generator(config, runtime, prompts, {}, make_cache(config, vae))
    teacher = None if arguments.teacher is None else load_teacher(arguments.teacher, generator)
    marks, made, start = [], 0, time.perf_counter()
    for first in tqdm(range(0, len(prompts), arguments.batch), desc="batches"):
        batch = prompts[first : first + arguments.batch]
        if teacher is None:
            videos = generate(generator, batch, first, num_chunks)
        else:
            videos = generate_clips(generator, teacher, batch, first)
        for number, (prompt, frames) in enumerate(zip(batch, videos, strict=True)):
            made += len(frames)
            marks += score(read_seconds(frames, fps), parse_caption(prompt))
            if arguments.output_folder:
                keep(arguments.output_folder, first + number, prompt, frames, fps)
    seconds = time.perf_counter() - start
    return marks, {"videos": len(prompts), "frames_per_second": round(made / seconds, 1)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config_path", required=True)
    parser.add_argument("--captions", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=5.0, help="length of each video, rounded up to whole chunks")
    parser.add_argument("--pairs", choices=("seen", "unseen"), default="seen", help="colour and shape combinations")
    parser.add_argument("--batch", type=int, default=16, help="videos generated together")
    parser.add_argument("--teacher", type=Path, help="transformer folder of a bidirectional DiT to score in its place")
    parser.add_argument("--output_folder", type=Path, help="keep the videos here")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_intermixed_args(argv)
    try:
        for name in ("captions", "seconds", "batch"):
            if getattr(arguments, name) <= 0:
                raise ConfigError(f"--{name} is {getattr(arguments, name)}: must be positive")
        config = load_config(arguments.config_path, arguments.overrides)
        marks, figures = evaluate(config, arguments)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    windows = summarise(marks)
    print_table(windows)
    settings = {"config": arguments.config_path, "overrides": arguments.overrides, "pairs": arguments.pairs}
    print(json.dumps({**settings, **figures, "windows": windows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
