"""Export the generator and its EMA from a training checkpoint; needs no other rank and no GPU.

    python -m scripts.export_checkpoint runs/dmd/checkpoints/step-00003000 generator.pt
    python -m scripts.export_checkpoint runs/dmd generator_folder --use_ema --dtype bfloat16

CHECKPOINT is a `step-N` folder, or a run's folder (its last checkpoint). OUTPUT ending in .pt gets the layout of
Self-Forcing, Causal-Forcing and PackForcing: `generator` and, where there is an EMA, `generator_ema`, with Wan2.1's
parameter names behind `model.`. Any other OUTPUT becomes a folder with transformer/ (and text_encoder/ where it was
trained along) in diffusers' layout. `--checkpoint_path` of `inference_packforcing.py` reads both.
"""

import argparse
import logging
import sys
from pathlib import Path

import torch

from model.convert import diffusers_to_wan
from model.weights import cast_weights, load_weights
from pipeline.train.checkpoints import find_damage, newest_whole, read_info, read_into, tensor_shapes
from pipeline.train.parallel import model_from_config
from utils.cli import run_command
from utils.config import ConfigError

log = logging.getLogger(__name__)

ROLE = "generator"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Weights = dict[str, torch.Tensor]


def find_checkpoint(path: Path) -> Path:
    """`path`, or the last whole checkpoint of the run at `path`. Raises `ConfigError` where there is none."""
    newest, damaged = newest_whole(path / "checkpoints")
    for each, problem in damaged.items():
        log.warning("checkpoint %s is damaged: %s", each, problem)
    checkpoint = newest or path
    info = read_info(checkpoint)
    if newest is None and (problem := find_damage(path)) is not None:
        raise ConfigError(f"checkpoint {path} is damaged: {problem}")
    if ROLE not in info["roles"]:
        raise ConfigError(f"checkpoint {checkpoint} is of stage {info['stage']}, which has no generator")
    return checkpoint


def read_generator(checkpoint: Path) -> tuple[Weights, Weights | None]:
    """The generator's tensors by parameter name, and its EMA's where there is one."""
    module, ema = f"roles.{ROLE}.module", f"roles.{ROLE}.ema"
    shapes = {name: x for name, x in tensor_shapes(checkpoint).items() if name.startswith((f"{module}.", f"{ema}."))}
    tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}
    read_into(checkpoint, tensors)
    weights, averaged = part(tensors, module), part(tensors, ema)
    return weights, weights | averaged if averaged else None


def part(weights: Weights, name: str) -> Weights:
    """Of tensors by dotted name those inside `name`."""
    prefix = f"{name}." if name else ""
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}


def write_pt(checkpoint: Path, output: Path, dtype: torch.dtype) -> None:
    models = read_info(checkpoint)["models"][ROLE]
    name = next(name for name, config in models.items() if "Wan" in config["_class_name"])
    weights, ema = read_generator(checkpoint)
    entries = {ROLE: weights} if ema is None else {ROLE: weights, f"{ROLE}_ema": ema}
    content = {
        entry: {f"model.{diffusers_to_wan(key)}": value.to(dtype) for key, value in part(values, name).items()}
        for entry, values in entries.items()
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, output)


def write_folder(checkpoint: Path, output: Path, dtype: torch.dtype, use_ema: bool) -> None:
    """Raises `ConfigError` where an EMA is asked for and there is none."""
    weights, ema = read_generator(checkpoint)
    if use_ema and ema is None:
        raise ConfigError(f"checkpoint {checkpoint} has no EMA yet (train.ema_start_step): leave out --use_ema")
    for name, config in read_info(checkpoint)["models"][ROLE].items():
        model = model_from_config(config)
        load_weights(model, part(ema if use_ema else weights, name), checkpoint)
        cast_weights(model, dtype, keep_in_fp32=None)
        model.save_pretrained(output / (name or "transformer"))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    parser.add_argument("output", type=Path, metavar="OUTPUT")
    parser.add_argument("--use_ema", action="store_true", help="a folder gets the EMA in place of the last weights")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    options = parser.parse_args(arguments)
    return run_command(lambda: export(options))


def export(options: argparse.Namespace) -> None:
    checkpoint = find_checkpoint(options.checkpoint)
    if options.output.suffix == ".pt":
        write_pt(checkpoint, options.output, DTYPES[options.dtype])
    else:
        write_folder(checkpoint, options.output, DTYPES[options.dtype], options.use_ema)
    print(f"{checkpoint} -> {options.output}")


if __name__ == "__main__":
    sys.exit(main())
