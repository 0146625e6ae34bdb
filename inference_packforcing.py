"""Long videos from a file of prompts.

    python inference_packforcing.py --config_path configs/tiny/demo.yaml --data_path prompts/tiny.txt \
        --output_folder output/tiny --seconds 60

    python inference_packforcing.py --config_path configs/packforcing_dmd_chunkwise_hr_8gpu_sink3_recent2.yaml \
        --checkpoint_path ckpt/model.pt --use_ema --data_path prompts/demos.txt --output_folder output/demos \
        --num_output_frames 120 cache.top_k=1

Flags left out keep the config's values; `key=value` changes any setting of it. A mistake of the user ends with one line
and exit code 2, before any model is loaded where that is possible. Running it again goes on where it stopped.
"""

import argparse
import logging
import math
import sys
import warnings

import diffusers
import transformers

from pipeline.bundle import VAEShape, check_bundle, vae_shape
from pipeline.data.prompts import read_prompts
from pipeline.generate.inference import Generator, make_cache, resolve_runtime, weight_hashes
from pipeline.generate.jobs import check_output_folder, is_finished, plan, resolved
from utils.config import Config, ConfigError
from utils.load_config import load_config, validate
from utils.video import PARTIAL_SUFFIX

log = logging.getLogger("inference")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], epilog="Overrides may follow: cache.top_k=1 inference.num_samples=4"
    )
    parser.add_argument("--config_path", required=True, help="YAML file, see configs/")
    parser.add_argument("--checkpoint_path", help="weights of the transformer: folder, .safetensors or .pt")
    parser.add_argument("--data_path", help="text file, one prompt per line")
    parser.add_argument("--output_folder", help="where NAME.mp4 and NAME.json go")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--num_output_frames", type=int, help="latent frames, a multiple of the chunk")
    length.add_argument("--seconds", type=float, help="length of the video, rounded up to whole chunks")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--use_ema", action="store_true", help="read `generator_ema` of a .pt file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any setting of the config")
    return parser.parse_intermixed_args(argv)


def configure(arguments: argparse.Namespace) -> Config:
    """The config file, then overrides, then flags. Raises `ConfigError`."""
    config = load_config(arguments.config_path, arguments.overrides)
    if arguments.checkpoint_path is not None:
        config.model.checkpoint = arguments.checkpoint_path
    config.model.use_ema |= arguments.use_ema
    if arguments.seed is not None:
        config.seed = arguments.seed
    for name in ("data_path", "output_folder", "num_output_frames"):
        if (value := getattr(arguments, name)) is not None:
            setattr(config.inference, name, value)
    for name in ("data_path", "output_folder"):
        if getattr(config.inference, name) is None:
            raise ConfigError(f"--{name} is missing, and the config sets no inference.{name}")
    validate(config)
    return config


def latent_frames(seconds: float, config: Config, vae: VAEShape) -> int:
    """Latent frames of at least `seconds` of video, in whole chunks. Raises `ConfigError`."""
    if not 0 < seconds < math.inf:
        raise ConfigError(f"--seconds is {seconds}: must be a positive number")
    chunk, fps = config.video.frames_per_chunk, config.video.fps
    frames = chunk * math.ceil(vae.latent_frames(math.ceil(seconds * fps)) / chunk)
    log.info(
        "--seconds %g: %d chunks, --num_output_frames %d, %d frames at %d fps, %.2f s",
        seconds, frames // chunk, frames, vae.frames(frames), fps, vae.frames(frames) / fps,
    )  # fmt: skip
    return frames


def run(arguments: argparse.Namespace) -> None:
    config = configure(arguments)
    prompts = read_prompts(config.inference.data_path)
    check_bundle(config)
    vae = vae_shape(config)
    if arguments.seconds is not None:
        config.inference.num_output_frames = latent_frames(arguments.seconds, config, vae)
    runtime = resolve_runtime(config)
    cache = make_cache(config, vae)
    folder = check_output_folder(config.inference.output_folder)

    weights, settings = weight_hashes(config), resolved(config)
    jobs = plan(prompts, folder, config.inference.num_samples)
    waiting = [job for job in jobs if not is_finished(job, settings, weights)]
    if len(waiting) < len(jobs):
        log.info("%d of %d videos are finished already in %s", len(jobs) - len(waiting), len(jobs), folder)
    if not waiting:
        return
    generator = Generator(config, runtime, [job.prompt for job in waiting], weights, cache)
    for job in waiting:
        content = generator.generate(job)
        log.info("%s: %d frames, %.1f frames/s", job.video, content["frames"], content["timing"]["frames_per_second"])


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.captureWarnings(True)
    warnings.formatwarning = lambda message, *_: str(message)
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    try:
        run(arguments)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"stopped; the unfinished video ends in {PARTIAL_SUFFIX}, run again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
