"""How much of held-out sprite-world captions a model gets right, second by second, at any length and cache setting.

    python scripts/evaluate_held_out.py --config_path configs/tiny/demo.yaml --seconds 5
    python scripts/evaluate_held_out.py --config_path configs/tiny/demo.yaml --captions 16 --seconds 60 cache.top_k=4
    python scripts/evaluate_held_out.py --config_path configs/tiny/demo.yaml --pairs unseen --output_folder output/new

The captions are the first of the held-out split (clips from index 1,000,000 on): `seen` combinations of colour and
shape, or the `unseen` ones that no training clip shows. Videos are generated in batches, with fresh noise. Prints a
table, then one line of JSON. With --output_folder the videos are kept, each with its sidecar.
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
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.inference import Generator, make_cache, resolve_runtime  # noqa: E402
from pipeline.rollout import Prompts, Rollout, prompt_noise  # noqa: E402
from pipeline.streaming_vae import StreamingDecoder  # noqa: E402
from scripts.evaluate import print_table, summarise  # noqa: E402
from utils.bundle import check_bundle, vae_shape  # noqa: E402
from utils.config import Config, ConfigError, load_config  # noqa: E402
from utils.metrics import Mark, read_seconds, score  # noqa: E402
from utils.sprite_world import HELD_OUT_START, caption, parse_caption, sample_spec  # noqa: E402
from utils.video import VideoWriter, to_uint8  # noqa: E402


def generate(generator: Generator, prompts: list[str], num_chunks: int) -> list[np.ndarray]:
    """One video per prompt, as one batch: uint8 [F, H, W, 3] each."""
    config, device = generator.config, generator.runtime.device
    text_len, cache = generator.model.config.text_len, generator.cache
    cache.reset()
    embeds = [generator.embeddings[prompt] for prompt in prompts]  # [1, n, text_dim] each
    padded = torch.cat([F.pad(x, (0, 0, 0, text_len - x.shape[1])) for x in embeds]).to(device)
    negative = None if generator.negative is None else generator.negative.to(device)
    noise = prompt_noise(config.seed, prompts, list(range(len(prompts))))
    rollout = Rollout(generator.model, cache, config.sampler, Prompts(padded, negative), noise)
    decoder, pieces = StreamingDecoder(generator.vae), []
    for _, latents in tqdm(rollout.run(num_chunks), total=num_chunks, desc="chunks", leave=False):
        pixels = decoder.decode(latents)  # [B, 3, F, H, W]
        pieces.append([to_uint8(video) for video in pixels])
    return [np.concatenate(video) for video in zip(*pieces, strict=True)]


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
    marks, start = [], time.perf_counter()
    for first in tqdm(range(0, len(prompts), arguments.batch), desc="batches"):
        batch = prompts[first : first + arguments.batch]
        for number, (prompt, frames) in enumerate(zip(batch, generate(generator, batch, num_chunks), strict=True)):
            marks += score(read_seconds(frames, fps), parse_caption(prompt))
            if arguments.output_folder:
                keep(arguments.output_folder, first + number, prompt, frames, fps)
    seconds = time.perf_counter() - start
    made = len(prompts) * vae.frames(num_chunks * chunk)
    return marks, {"videos": len(prompts), "frames_per_second": round(made / seconds, 1)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config_path", required=True)
    parser.add_argument("--captions", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=5.0, help="length of each video, rounded up to whole chunks")
    parser.add_argument("--pairs", choices=("seen", "unseen"), default="seen", help="colour and shape combinations")
    parser.add_argument("--batch", type=int, default=16, help="videos generated together")
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
