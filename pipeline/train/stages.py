"""The stages there are: a module that defines one is imported here, so that `METHODS` has it."""

import torch

from pipeline.train import compressor, consistency, dmd, flow, ode, vae  # noqa: F401 - each registers its own
from pipeline.train.method import METHODS, Stage
from utils.config import Config, require
from utils.distributed import World


def build_stage(config: Config, device: torch.device, world: World) -> Stage:
    """The stage that `train.stage` names. Loads models and data; raises `ConfigError` for what is missing."""
    name, through_cache = config.train.stage, config.train.through_cache
    require(config, "train.through_cache", not through_cache or name in ("ar_diffusion", "compressor"),
            f"stage {name} does not know it; it is for ar_diffusion and compressor")  # fmt: skip
    METHODS[name].check(config)
    return METHODS[name](config, device, world)
