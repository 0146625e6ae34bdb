"""Add what one training changed to another model: MODEL + scale * (TRAINED - BEFORE), tensor by tensor.

    python -m scripts.add_weights runs/story_cache/bundle/transformer bundles/tiny/transformer \
        --before bundles/tiny_ar/transformer --output runs/story/transformer

Both must come from the same ancestor (task arithmetic, Ilharco et al., arXiv 2212.04089). So a generator keeps the four
steps that distillation taught it when its ancestor learns something else. Tensors that TRAINED or BEFORE lack (another
compressor) stay MODEL's. Writes a folder in diffusers' layout, in MODEL's dtype.
"""

import argparse
import shutil
import sys
from pathlib import Path

from safetensors.torch import save_file

from model.weights import read_weights
from utils.cli import run_command
from utils.config import ConfigError


def add(options: argparse.Namespace) -> None:
    """Raises `ConfigError` for folders without weights, or of models that share no tensor."""
    model, trained, before = (read_weights(path) for path in (options.model, options.trained, options.before))
    shared = [
        name for name, value in model.items() if name in trained and name in before
        and value.shape == trained[name].shape == before[name].shape
    ]  # fmt: skip
    if not shared:
        raise ConfigError(f"{options.model}, {options.trained} and {options.before} share no tensor: name transformers")
    for name in shared:
        change = trained[name].float() - before[name].float()
        model[name] = (model[name].float() + options.scale * change).to(model[name].dtype)
    options.output.mkdir(parents=True, exist_ok=True)
    save_file(model, options.output / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(options.model / "config.json", options.output / "config.json")
    kept = sorted(set(model) - set(shared))
    print(f"{len(shared)} tensors added, {len(kept)} of {options.model} kept: {', '.join(kept) or 'none'}")
    print(f"-> {options.output}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL", help="transformer folder")
    parser.add_argument("trained", type=Path, metavar="TRAINED")
    parser.add_argument("--before", type=Path, required=True, metavar="BEFORE", help="what TRAINED started from")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--scale", type=float, default=1.0)
    options = parser.parse_args(argv)
    return run_command(lambda: add(options))


if __name__ == "__main__":
    sys.exit(main())
