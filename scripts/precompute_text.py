"""Embed the prompts of a training run once, so that training needs no text encoder.

    python -m scripts.precompute_text --config_path configs/tiny/dmd.yaml data.text_embeddings=runs/text
    python train.py --config_path configs/tiny/dmd.yaml data.text_embeddings=runs/text
    torchrun --nproc_per_node=8 -m scripts.precompute_text --config_path configs/wan_base.yaml \\
        --prompts prompts/train.txt data.text_embeddings=data/text

Embedded are the config's negative and sample prompts and, without --prompts, those of `data` (lines of a file, captions
of latents or of the sprite world's clips); with it, the lines of that file. The encoder is that of `train.text_from`,
else of `model.bundle`. Every rank writes its share of the shards, bfloat16, each prompt as long as it is; what is there
already is kept, so a stopped run goes on, and prompts can be added to a folder later.
"""

import argparse
import logging
import sys

from pipeline.data.precompute import embed_prompts
from pipeline.data.prompts import data_prompts, fixed_prompts, read_prompts
from utils.config import ConfigError
from utils.distributed import rank
from utils.load_config import load_config

USAGE_ERROR = 2


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config_path", required=True, help="YAML of the stage that will be trained")
    parser.add_argument("--prompts", help="file with one prompt per line, in place of the prompts of `data`")
    parser.add_argument("--batch_size", type=int, default=8, help="prompts encoded at once, padded to the longest")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, for example train.text_from=ckpt")
    parsed = parser.parse_intermixed_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    try:
        config = load_config(parsed.config_path, parsed.overrides)
        prompts = read_prompts(parsed.prompts) if parsed.prompts else data_prompts(config)
        with rank() as (device, world):
            embed_prompts(config, fixed_prompts(config) + prompts, parsed.batch_size, device, world)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main())
