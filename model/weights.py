"""Weights of a Wan DiT from whatever they come in, loaded strictly.

Read: a `.safetensors` file, a sharded index, a folder of either (in the layout of diffusers or of Wan2.1), and the
`.pt` files of Self-Forcing, Causal-Forcing and PackForcing (a dict with `generator`, `generator_ema` or `model`). Names
come out as diffusers' (`model/convert.py`). Tensors are memory-mapped: reading costs nothing until they are used.
"""

import hashlib
import json
import pickle
import zipfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from model.convert import is_wan_layout, strip_prefixes, wan_to_diffusers
from utils.config import ConfigError

PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
FORMATS = "a .safetensors file, a .safetensors.index.json, a .pt file, or a folder with one of them"
_NAMES_SHOWN = 4


class CheckpointError(ConfigError):
    """A checkpoint that is not there, not readable, or not of the model it is loaded into."""


def weight_files(path: str | Path) -> list[Path]:
    """The files that hold the weights at `path`, in a fixed order, without opening any of them.

    Raises `CheckpointError` where there is nothing at `path`, or nothing that can be read.
    """
    path = Path(path)
    if path.is_dir():
        return _files_of_folder(path)
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} does not exist; expected {FORMATS}")
    if path.name.endswith(".index.json"):
        return _files_of_index(path)
    if path.suffix == ".safetensors" or path.suffix in PICKLE_SUFFIXES:
        return [path]
    raise CheckpointError(f"checkpoint {path}: unknown kind of file `{path.suffix}`; expected {FORMATS}")


def _files_of_folder(folder: Path) -> list[Path]:
    if (folder / "transformer").is_dir():  # a bundle, or a diffusers pipeline
        folder = folder / "transformer"
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if len(indices) == 1:
        return _files_of_index(indices[0])
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.pt"))
    if len(files) == 1:
        return files
    if not files:
        raise CheckpointError(f"checkpoint folder {folder} holds no weights; expected {FORMATS}")
    names = ", ".join(file.name for file in files[:_NAMES_SHOWN])
    raise CheckpointError(f"checkpoint folder {folder} holds several weight files ({names}) and no index; name one")


def _files_of_index(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"checkpoint index {index}: not a safetensors index (no `weight_map`)") from error
    absent = [name for name in names if not (index.parent / name).is_file()]
    if absent:
        raise CheckpointError(f"checkpoint index {index}: {_some(absent)} of its {len(names)} files are not there")
    return [index.parent / name for name in names]


def read_weights(path: str | Path, use_ema: bool = False) -> dict[str, torch.Tensor]:
    """Parameters at `path` by diffusers' names; names that belong to no Wan model keep theirs.

    `use_ema` picks `generator_ema` of a `.pt` file. Raises `CheckpointError`.
    """
    files = weight_files(path)
    if files[0].suffix in PICKLE_SUFFIXES:
        raw = _choose_entry(read_pickle(files[0]), files[0], use_ema)
    else:
        if use_ema:
            raise CheckpointError(f"checkpoint {path} has no entry `generator_ema`: --use_ema needs a .pt file")
        raw = read_files(path)
    return _diffusers_names(raw, path)


def check_weights(path: str | Path) -> None:
    """Raise `CheckpointError` as `weight_files` does, and for .safetensors files that are damaged or hold other numbers
    than floating-point ones; reads their headers only."""
    for file in weight_files(path):
        if file.suffix != ".safetensors":
            continue
        try:
            with safe_open(file, "pt") as held:
                dtypes = {name: held.get_slice(name).get_dtype() for name in held.keys()}  # noqa: SIM118 - no dict
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"checkpoint {file}: not a safetensors file, or cut short ({error})") from error
        odd = [f"{name} ({dtype})" for name, dtype in dtypes.items() if not dtype.startswith(("F", "BF"))]
        if odd:
            raise CheckpointError(f"checkpoint {file}: weights are floating-point numbers, not {_some(odd)}")


def read_files(path: str | Path) -> dict[str, torch.Tensor]:
    """All tensors of the safetensors files at `path`, by their own names, memory-mapped. Raises `CheckpointError`."""
    return {name: tensor for file in weight_files(path) for name, tensor in read_safetensors(file).items()}


def read_safetensors(file: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"checkpoint {file}: not a safetensors file, or cut short ({error})") from error


def read_pickle(file: Path) -> dict:
    if not zipfile.is_zipfile(file):
        raise CheckpointError(f"checkpoint {file}: not a PyTorch checkpoint, or cut short")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"checkpoint {file}: holds more than tensors, so loading it could run code; save its state dict alone"
        ) from error
    except RuntimeError as error:
        raise CheckpointError(f"checkpoint {file}: not a PyTorch checkpoint ({str(error).splitlines()[0]})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"checkpoint {file}: holds a {type(content).__name__}, expected a dict of parameters")
    return content


def _choose_entry(content: dict, file: Path, use_ema: bool) -> dict:
    wanted = ["generator_ema"] if use_ema else ["generator", "model"]
    for entry in wanted:
        if isinstance(content.get(entry), dict):
            return content[entry]
    if content and not use_ema and all(isinstance(value, torch.Tensor) for value in content.values()):
        return content  # a bare state dict
    hint = "; --use_ema reads the averaged weights" if "generator_ema" in content and not use_ema else ""
    expected = " or ".join(f"`{entry}`" for entry in wanted)
    raise CheckpointError(f"checkpoint {file}: has no {expected}, only {_some(map(str, content)) or 'nothing'}{hint}")


def _diffusers_names(raw: dict[str, torch.Tensor], source: str | Path) -> dict[str, torch.Tensor]:
    stripped = {name: strip_prefixes(name) for name in raw}
    from_wan = is_wan_layout(stripped.values())
    weights = {}
    for name, tensor in raw.items():
        key = stripped[name]
        if from_wan:
            with suppress(KeyError):  # kept, so that the strict load names it
                key = wan_to_diffusers(key)
        if key in weights:
            raise CheckpointError(f"checkpoint {source}: two parameters are called {key} once prefixes are removed")
        weights[key] = tensor
    return weights


def load_weights(
    model: nn.Module,
    weights: dict[str, torch.Tensor],
    source: str | Path,
    fresh: dict[str, torch.Tensor] | None = None,
) -> None:
    """Give `model` (which may be on the meta device) exactly these tensors, without copying them.

    `fresh` holds parameters that the checkpoint is known to lack. Raises `CheckpointError` naming missing, unexpected,
    misshapen and not floating-point parameters: a few of each, and their count.
    """
    own = model.state_dict()
    if not own.keys() & weights.keys():
        raise CheckpointError(
            f"checkpoint {source} is not one of a {type(model).__name__}: it has no parameter of it, but "
            f"{_some(weights) or 'nothing'}"
        )
    weights = weights | (fresh or {})
    common = own.keys() & weights.keys()
    shapes = [
        f"{name} {list(weights[name].shape)} instead of {list(own[name].shape)}"
        for name in own
        if name in common and weights[name].shape != own[name].shape
    ]
    problems = [
        f"{what} {_some(names)}"
        for what, names in (
            ("missing", [name for name in own if name not in common]),
            ("unexpected", [name for name in weights if name not in common]),
            ("misshapen", shapes),
            ("of whole or complex numbers", [name for name in common if not weights[name].is_floating_point()]),
        )
        if names
    ]
    if problems:
        raise CheckpointError(f"checkpoint {source} does not fit the {type(model).__name__}: {'; '.join(problems)}")
    model.load_state_dict(weights, assign=True)


def cast_weights(
    model: nn.Module, dtype: torch.dtype, keep_in_fp32: Iterable[str] | None, device: torch.device | None = None
) -> None:
    """Floating-point parameters and buffers to `dtype`; those under a module or parameter of a name in `keep_in_fp32`
    to float32, as diffusers does on loading. `device`: where they go first, and are cast, one by one."""
    kept = set(keep_in_fp32 or ())
    for module_name, module in model.named_modules():
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, tensor in own:
            if tensor.is_floating_point():
                in_fp32 = not kept.isdisjoint(f"{module_name}.{name}".split("."))
                wanted = torch.float32 if in_fp32 else dtype
                if tensor.dtype != wanted or device not in (None, tensor.device):
                    tensor.data = tensor.data.to(device).to(wanted)


def content_hash(path: str | Path) -> str:
    """SHA-256 over the weight files at `path`: the same weights under another name give the same hash."""
    digest = hashlib.sha256()
    for file in weight_files(path):
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def _some(names: Iterable[str]) -> str:
    """`a, b, c, d and 12 more`."""
    names = list(names)
    more = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
