"""Write sampling trajectories of the AR-diffusion model, for causal ODE regression (`train.stage=ode`).

    python -m scripts.generate_ode_pairs --config_path configs/tiny/ode.yaml
    torchrun --nproc_per_node=8 -m scripts.generate_ode_pairs --config_path configs/causal_ode_chunkwise_64gpu.yaml

The model is that of the `model` section; prompts are those of `data`; the rollout is the one of inference with the
configured cache, `ode.grid_steps` Euler steps and guidance `ode.guidance`. Shards go to `ode.path`. Started again, it
writes what is missing.
"""

import argparse
import sys

from utils.cli import config_parser, run_configured
from utils.config import Config, require


def run(config: Config, arguments: argparse.Namespace) -> None:
    """Write the shards that are missing. Raises `ConfigError`."""
    require(config, "ode.path", config.ode.path, "name the folder to write trajectories to")
    import torch  # heavy, like what follows: after what can be checked without them

    from model.weights import content_hash
    from pipeline.bundle import vae_shape_of
    from pipeline.load import place
    from pipeline.sources import transformer_source, vae_folder
    from pipeline.train.prompt_data import PromptData
    from pipeline.train.roles import check_student, load_student, load_text
    from pipeline.train.trajectories import grid_points, write_trajectories
    from utils.distributed import rank

    check_student(config)
    grid_points(config)  # a student's step off the grid shows before a model is loaded
    vae = vae_shape_of(vae_folder(config))
    with rank(config.train.threads) as (device, world):
        text = load_text(config, device)
        data = PromptData.load(config, vae.channels, device, world)
        model = place(load_student(config, text, device, vae.channels).eval(), device, torch.float32)
        random = config.model.random_init
        weights = f"random, seed {config.seed}" if random else content_hash(transformer_source(config))
        with torch.autocast(device.type, torch.bfloat16, enabled=config.train.mixed_precision == "bf16"):
            write_trajectories(config, model, text, data, vae.size(config.video), weights, world)


def main(argv: list[str] | None = None) -> int:
    return run_configured(config_parser(__doc__), argv, run)


if __name__ == "__main__":
    sys.exit(main())
