r"""Long videos from prompts.

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
from utils.cli import config_parser, run_configured
from utils.config import Config, ConfigError


def run(config: Config, arguments: argparse.Namespace) -> int:
    config.model.lora += arguments.lora
    if config.inference.data_path is None and not arguments.prompt:
        raise ConfigError("--data_path is missing, and the config sets no inference.data_path; or give --prompt TEXT")
    if config.inference.output_folder is None:
        raise ConfigError("--output_folder is missing, and the config sets no inference.output_folder")
    if arguments.prompt:
        items = [PromptItem(read_prompt(text, "--prompt")) for text in arguments.prompt]
    else:
        items = read_prompt_items(config.inference.data_path)
    require_files(config)
    from pipeline.generate.run import run_jobs  # heavy: torch and diffusers, after what can be checked without them

    return run_jobs(config, items, arguments.seconds, not arguments.no_estimate)


def main(argv: list[str] | None = None) -> int:
    parser = config_parser(__doc__)
    flag = parser.add_argument
    flag("--checkpoint_path", dest="model.checkpoint", help="weights of the transformer: folder, .safetensors or .pt")
    flag("--use_ema", dest="model.use_ema", action="store_const", const=True, help="`generator_ema` of a .pt file")
    flag("--lora", action="append", default=[], metavar="PATH[:SCALE]", help="LoRA to fuse; repeatable")
    flag("--output_folder", dest="inference.output_folder", help="where NAME.mp4 and NAME.json go")
    flag("--seed", dest="seed", type=int)
    flag("--no_estimate", action="store_true", help="do not ask first whether it fits the GPU")
    prompts, length = parser.add_mutually_exclusive_group(), parser.add_mutually_exclusive_group()
    prompts.add_argument("--data_path", dest="inference.data_path", help="prompts: text file (one per line), .csv, "
                         ".json or .jsonl")  # fmt: skip
    prompts.add_argument("--prompt", action="append", metavar="TEXT", help="in place of a file; may be repeated")
    length.add_argument("--num_output_frames", dest="inference.num_output_frames", type=int, help="latent frames, a "
                        "multiple of the chunk")  # fmt: skip
    length.add_argument("--seconds", type=float, help="length of the video, rounded up to whole chunks")
    return run_configured(parser, argv, run)


if __name__ == "__main__":
    sys.exit(main())
