"""Whether a long video costs at its end what it cost at its start: seconds and bytes a chunk, and host memory.

    python -m scripts.soak --config_path configs/tiny/demo.yaml --seconds 7200 --decode output/soak.mp4
    python -m scripts.soak --config_path configs/bench_cpu.yaml --chunks 10000 video.height=32 video.width=48 \\
      model.num_layers=2 model.attention_head_dim=24 model.ffn_dim=96    # micro size, random weights, minutes

Without --decode chunks end as latents; with it in an mp4, frames going to the encoder as they come. Nothing of a chunk
is kept here. A chunk's seconds, by the clock and of the CPU (which other jobs disturb less), are medians over the 100
before each row of the table, the first row's over chunks 50 to 150; `tensors` are the bytes of all that are alive,
weights and cache among them. Ratios are the last row over the first. Archived chunks are kept up to
`cache.mid_capacity` (auto: 1024), so memory grows that far. A table, then one line of JSON.
"""

import argparse
import gc
import json
import math
import statistics
import sys
import time
from collections import deque
from contextlib import ExitStack, closing
from pathlib import Path

import psutil
import torch
from tqdm import tqdm

from pipeline.bundle import check_bundle
from pipeline.generate.inference import load_pipeline, resolve_runtime
from pipeline.generate.pipeline import PackForcingPipeline
from scripts.bench_inference import pipeline_of
from utils.ahead import ahead
from utils.cli import check_positive, config_parser, print_rows, run_configured
from utils.config import Config, ConfigError
from utils.files import writable_folder
from utils.timing import device_name, peak_memory
from utils.video import VideoWriter

SETTLED, WINDOW, ROWS = 50, 100, 12  # chunks left out at first, chunks of a median, rows of the table


def tensor_bytes() -> int:
    """Of all tensors alive, each storage once; on `meta`, as a compiler's stand-ins are, there are none."""
    tensors = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
    storages = [x.untyped_storage() for x in tensors]
    return sum({x.data_ptr(): x.nbytes() for x in storages if x.device.type != "meta"}.values())


def row_of(number: int, times: deque[tuple[float, float]], report: dict) -> dict:
    """What is noted after chunk `number`."""
    attended = [report[part] for part in ("sink", "mid", "recent")]
    return {
        "chunk": number,
        "seconds": statistics.median(seconds for seconds, _ in times),
        "cpu_seconds": statistics.median(seconds for _, seconds in times),
        "attended_tokens": sum(part["tokens"] for part in attended),
        "attended_bytes": sum(part["bytes"] for part in attended),
        "archive_bytes": report["archive"]["bytes"],
        "tensor_bytes": tensor_bytes(),
        "resident_bytes": psutil.Process().memory_info().rss,
    }


def soak(pipe: PackForcingPipeline, chunks: int, video: Path | None, **asked) -> list[dict]:
    """Rows noted while a video of so many chunks is made, into the file `video` or nowhere."""
    size, overlap = pipe.video_config, video is not None and pipe.overlap
    frames = pipe.vae_shape.frames(chunks * pipe.transformer.config.frames_per_chunk)
    stream = pipe.stream(num_frames=frames, output_type="latent" if video is None else "uint8", **asked)
    first = SETTLED + WINDOW
    wanted = {first + (chunks - first) * part // (ROWS - 1) for part in range(ROWS)}
    rows, times = [], deque(maxlen=WINDOW)
    with ExitStack() as stack:
        writer = video and stack.enter_context(VideoWriter(video, size.fps, size.height, size.width))
        made = stack.enter_context(closing(ahead(stream) if overlap else stream))
        bar = stack.enter_context(tqdm(made, total=chunks, unit="chunk", dynamic_ncols=True))
        start, before = time.perf_counter(), time.process_time()
        for number, chunk in enumerate(bar, 1):
            if writer:
                writer.append(chunk.frames[0])
            now, spent = time.perf_counter(), time.process_time()
            times.append((now - start, spent - before))
            if number in wanted:
                rows.append(row_of(number, times, chunk.report))
                bar.set_postfix_str(f"{rows[-1]['resident_bytes'] / 1e6:.0f} MB", refresh=False)
                now, spent = time.perf_counter(), time.process_time()  # the next chunk's time is without this
            start, before = now, spent
    return rows


def run(config: Config, arguments: argparse.Namespace) -> None:
    check_positive(arguments, "chunks", "seconds")
    runtime, video = resolve_runtime(config), arguments.decode
    if video is not None and video.suffix != ".mp4":
        raise ConfigError(f"--decode is {video}: the name must end in .mp4")
    if config.model.bundle is not None:
        check_bundle(config)
        pipe, asked = load_pipeline(config, runtime), {"prompt": arguments.prompt, "seed": config.seed}
        pipe.encode_ahead([arguments.prompt, config.sampler.negative_prompt])
        pipe.register_modules(text_encoder=None)
    elif config.model.random_init and video is None:
        pipe = pipeline_of(config, runtime)
        model = pipe.transformer
        embeds = torch.randn(1, min(8, model.config.text_len), model.config.text_dim)
        asked = {"prompt_embeds": embeds, "negative_prompt_embeds": torch.zeros_like(embeds), "seed": config.seed}
    else:
        raise ConfigError("nothing to run: set model.bundle, or model.random_init=true and leave out --decode")
    chunks = arguments.chunks
    if arguments.seconds is not None:
        chunks = pipe.num_chunks(math.ceil(arguments.seconds * config.video.fps))
    if chunks < SETTLED + 2 * WINDOW:
        raise ConfigError(f"{chunks} chunks are too few to compare: ask for at least {SETTLED + 2 * WINDOW} (--chunks)")
    if video is not None:
        writable_folder(video.parent, "--decode")
    rows = soak(pipe, chunks, video, **asked)
    first, last = rows[0], rows[-1]
    result = {
        "device": device_name(runtime.device),
        "dtype": str(runtime.dtype).removeprefix("torch."),
        "chunks": chunks,
        "video_seconds": pipe.vae_shape.frames(chunks * config.video.frames_per_chunk) / config.video.fps,
        **{f"{name}_ratio": last[name] / first[name] for name in ("seconds", "cpu_seconds", "attended_bytes")},
        "peak_bytes": peak_memory(runtime.device),
        "file_bytes": None if video is None else video.stat().st_size,
        "rows": rows,
    }
    titles = ["chunk", "s/chunk", "CPU s/chunk", "tokens", "attended MB", "archive MB", "tensors MB", "resident MB"]
    cells = ([row["chunk"], f"{row['seconds']:.4f}", f"{row['cpu_seconds']:.4f}", row["attended_tokens"],
              *(f"{row[f'{name}_bytes'] / 1e6:.2f}" for name in ("attended", "archive", "tensor", "resident"))]
             for row in rows)  # fmt: skip
    print_rows([titles, *([str(row[0]), *row[1:]] for row in cells)])
    print(
        f"\n{result['device']}: the last {WINDOW} chunks took {result['seconds_ratio']:.3f} of the time of chunks "
        f"{SETTLED} to {SETTLED + WINDOW}, {result['cpu_seconds_ratio']:.3f} of their CPU time, and attended "
        f"{result['attended_bytes_ratio']:.3f} of their bytes\n"
    )
    print(json.dumps({"config": arguments.config_path, "overrides": arguments.overrides, **result}))


def main(argv: list[str] | None = None) -> int:
    parser = config_parser(__doc__)
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--chunks", type=int)
    length.add_argument("--seconds", type=float, help="of video")
    parser.add_argument("--decode", type=Path, metavar="VIDEO.mp4", help="decode and encode too, into this file")
    parser.add_argument("--prompt", default="a red circle bounces over a blue checkerboard")
    return run_configured(parser, argv, run)


if __name__ == "__main__":
    sys.exit(main())
