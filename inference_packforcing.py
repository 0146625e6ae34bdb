"""Long videos from prompts.

    python inference_packforcing.py --config_path configs/tiny/demo.yaml --output_folder output/tiny --seconds 60 \
        --prompt "a red circle bounces over a blue plain"

    torchrun --nproc_per_node=8 inference_packforcing.py \
        --config_path configs/packforcing_dmd_chunkwise_hr_8gpu_sink3_recent2.yaml --checkpoint_path ckpt/model.pt \
        --use_ema --data_path prompts/demos.txt --output_folder output/demos --num_output_frames 120 cache.top_k=1

Flags left out keep the config's values; `key=value` changes any setting of it. Ranks share the prompts. Exit status 2:
a mistake, in one line, before any model is loaded where that is possible; 1: some videos failed, each named. Running it
again goes on where it stopped.
"""

import argparse
import sys

from pipeline.data.prompt_files import PromptItem, read_prompt_items
from pipeline.data.schedule import read_prompt
from pipeline.sources import require_files
from utils.cli import run_command
from utils.config import Config, ConfigError
from utils.load_config import load_config, validate


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], epilog="Overrides may follow: cache.top_k=1 inference.num_samples=4"
    )
    parser.add_argument("--config_path", required=True, help="YAML file, see configs/")
    parser.add_argument("--checkpoint_path", help="weights of the transformer: folder, .safetensors or .pt")
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument("--data_path", help="prompts: text file (one per line), .csv, .json or .jsonl")
    prompts.add_argument("--prompt", action="append", metavar="TEXT", help="in place of a file; may be repeated")
    parser.add_argument("--output_folder", help="where NAME.mp4 and NAME.json go")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--num_output_frames", type=int, help="latent frames, a multiple of the chunk")
    length.add_argument("--seconds", type=float, help="length of the video, rounded up to whole chunks")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--use_ema", action="store_true", help="read `generator_ema` of a .pt file")
    parser.add_argument("--lora", action="append", default=[], metavar="PATH[:SCALE]", help="LoRA to fuse; repeatable")
    parser.add_argument("--no_estimate", action="store_true", help="do not ask first whether it fits the GPU")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any setting of the config")
    return parser.parse_intermixed_args(argv)


def configure(arguments: argparse.Namespace) -> Config:
    """The config file, then overrides, then flags. Raises `ConfigError`."""
    config = load_config(arguments.config_path, arguments.overrides)
    if arguments.checkpoint_path is not None:
        config.model.checkpoint = arguments.checkpoint_path
    config.model.use_ema |= arguments.use_ema
    config.model.lora += arguments.lora
    if arguments.seed is not None:
        config.seed = arguments.seed
    for name in ("data_path", "output_folder", "num_output_frames"):
        if (value := getattr(arguments, name)) is not None:
            setattr(config.inference, name, value)
    if config.inference.data_path is None and not arguments.prompt:
        raise ConfigError("--data_path is missing, and the config sets no inference.data_path; or give --prompt TEXT")
    if config.inference.output_folder is None:
        raise ConfigError("--output_folder is missing, and the config sets no inference.output_folder")
    validate(config)
    return config


def run(arguments: argparse.Namespace) -> int:
    config = configure(arguments)
    if arguments.prompt:
        items = [PromptItem(read_prompt(text, "--prompt")) for text in arguments.prompt]
    else:
        items = read_prompt_items(config.inference.data_path)
    require_files(config)
    from pipeline.generate.run import run_jobs  # heavy: torch and diffusers, after what can be checked without them

    return run_jobs(config, items, arguments.seconds, not arguments.no_estimate)


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    return run_command(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
