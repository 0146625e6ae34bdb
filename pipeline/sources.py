"""Which files a model comes from, and where to get those that are missing. Needs no heavy import."""

from pathlib import Path

from utils.choices import DataKind
from utils.config import Config, ConfigError, require
from utils.files import read_json

INDEX = "model_index.json"  # diffusers' name
REAL_MODELS = ("Wan2.1-T2V-1.3B-Diffusers", "Wan2.1-T2V-14B-Diffusers")  # of Wan-AI
# Where the checkpoints and prompts of the published recipes are.
PUBLISHED = {
    name: f"zhuhz22/Causal-Forcing chunkwise/{name}" for name in ("causal_ode.pt", "causal_cd.pt", "causal_forcing.pt")
} | {
    "self_forcing_dmd.pt": "gdhe17/Self-Forcing checkpoints/self_forcing_dmd.pt",
    "vidprom_filtered_extended.txt": "gdhe17/Self-Forcing vidprom_filtered_extended.txt",
}
_OF_TRAINING = "a training run writes it: run its stage with train.py, or name another"
_CONFIG_OF = {"vae": "config.json", "text_encoder": "config.json", "tokenizer": "tokenizer_config.json"}


def bundle_folder(config: Config) -> Path:
    """Where `model.bundle` points. Raises `ConfigError` where it is unset or not there."""
    require(config, "model.bundle", config.model.bundle, "name a folder with vae, text_encoder and tokenizer")
    folder = Path(config.model.bundle)
    if not folder.is_dir():
        raise ConfigError(f"bundle {folder} does not exist; {_where_to_get(folder)}")
    return folder


def part_folder(folder: Path, part: str) -> Path:
    """Where a part of the bundle at `folder` is: there, or in the one that its model_index.json names as `_base`."""
    index = folder / INDEX
    if (folder / part).is_dir() or not index.is_file():
        return folder / part
    return folder / (read_json(index).get("_base") or "") / part


def bundle_part(config: Config, part: str) -> Path:
    """Where a part of `model.bundle` is. Raises `ConfigError` as `bundle_folder`."""
    return part_folder(bundle_folder(config), part)


def need_folder(path: str | None, key: str, part: str) -> Path:
    """The folder that setting `key` names. Raises `ConfigError` where it is unset or not there."""
    if path is None:
        raise ConfigError(f"setting `{key}` is not set: name a folder with {part}")
    if not Path(path).is_dir():
        raise ConfigError(f"setting `{key}` is {path}: there is no such folder")
    return Path(path)


def vae_folder(config: Config) -> Path:
    """`data.vae`. Raises `ConfigError` as `need_folder`, and where no VAE is there."""
    folder = need_folder(config.data.vae, "data.vae", "an AutoencoderKLWan")
    require(config, "data.vae", (folder / "config.json").is_file(), "no AutoencoderKLWan there")
    return folder


def transformer_source(config: Config) -> Path:
    """Where the transformer's weights come from: `model.checkpoint`, else the bundle's own."""
    if config.model.checkpoint is not None:
        return Path(config.model.checkpoint)
    return bundle_part(config, "transformer")


def loras(config: Config) -> list[tuple[Path, float]]:
    """(file, scale) of each entry of `model.lora`. Raises `ConfigError` for a file that is not there."""
    found = []
    for entry in config.model.lora:
        path, colon, scale = entry.rpartition(":")
        try:
            file, factor = (Path(path), float(scale)) if colon else (Path(entry), 1.0)
        except ValueError:  # the colon belongs to the path
            file, factor = Path(entry), 1.0
        if not file.exists():
            raise ConfigError(f"setting `model.lora` is {entry}: there is no file {file}; expected PATH or PATH:SCALE")
        found.append((file, factor))
    return found


def require_files(config: Config) -> None:
    """Raise `ConfigError` that lists every file of the model that is not there, each with how to get it."""
    missing = []
    try:
        missing += _missing_parts(bundle_folder(config), config)
    except ConfigError as error:
        missing.append(str(error))
    if config.model.checkpoint is not None and not config.model.random_init:
        missing += _missing_checkpoint(Path(config.model.checkpoint))
    try:
        loras(config)
    except ConfigError as error:
        missing.append(str(error))
    if missing:
        raise ConfigError("; and ".join(missing))


def _missing_parts(folder: Path, config: Config) -> list[str]:
    if (folder / "Wan2.1_VAE.pth").is_file():
        return [f"bundle {folder} is in Wan2.1's own layout, expected diffusers'; {_where_to_get(folder)}"]
    absent = [f"{part}/{file}" for part, file in _CONFIG_OF.items() if not (part_folder(folder, part) / file).is_file()]
    own = config.model.checkpoint is None and not config.model.random_init
    if own and not part_folder(folder, "transformer").is_dir():
        absent.append("transformer/ (or name one with --checkpoint_path)")
    return [f"bundle {folder} has no {', '.join(absent)}; {_where_to_get(folder)}"] if absent else []


def _missing_checkpoint(path: Path) -> list[str]:
    if path.exists():
        if (path / "info.json").is_file() or (path / "checkpoints").is_dir():
            export = f"python -m scripts.export_checkpoint {path} model.pt"
            return [f"checkpoint {path} is of a training run; {export} makes one for inference of it"]
        return []
    how = _where_to_get(path, None) or "expected a diffusers folder, a .safetensors or a .pt file"
    return [f"checkpoint {path} does not exist; {how}"]


def _where_to_get(path: Path, setting: str | None = "model.bundle") -> str:
    """How what is not there may come about; `setting` could name another one."""
    if path.name in PUBLISHED:
        get = PUBLISHED[path.name]
        inside = get.endswith(f" {path.parent.name}/{path.name}")
        return f"hf download {get} " + (f"--local-dir {path.parent.parent}" if inside else f"and move it to {path}")
    if "runs" in path.parts:
        return _OF_TRAINING
    real = next((folder for folder in (path, *path.parents) if folder.name in REAL_MODELS), None)
    if real is not None:
        return f"hf download Wan-AI/{real.name} --local-dir {real}"
    get = f", or for the real model: hf download Wan-AI/{REAL_MODELS[0]} --local-dir {path}"
    return "" if setting is None else f"name one with {setting}" + get * (setting == "model.bundle")


def require_training_files(config: Config) -> None:
    """Raise `ConfigError` that lists every file of a training stage that is not there, each with how to get it."""
    model, train, data, stage = config.model, config.train, config.data, config.train.stage
    if stage is None:
        return
    distilled, fresh = stage in ("consistency", "ode", "dmd"), model.random_init
    # Setting -> its value, whether the stage reads it, what must be there (None: it may be unset).
    needed = {
        "data.vae": (data.vae, stage != "vae", "an AutoencoderKLWan"),
        "data.path": (data.path, stage not in ("vae", "ode"), f"{data.kind.value} to train on"),
        "data.text_embeddings": (data.text_embeddings, stage != "vae", None),
        "train.init_from": (train.init_from, stage in ("vae", "teacher", "ar_diffusion"), None),
        "train.text_from": (train.text_from, stage != "vae", None),
        "model.bundle": (model.bundle, distilled and not fresh and model.checkpoint is None, "the student"),
        "ode.path": (config.ode.path, stage == "ode", "trajectories"),
        "dmd.teacher": (config.dmd.teacher, stage == "dmd" and not fresh, "a WanTransformer3DModel"),
        "dmd.critic": (config.dmd.critic, stage == "dmd", None),
    }
    writers = {"ode.path": "generate_ode_pairs", "data.text_embeddings": "prepare_data"}
    writers |= {"data.path": "prepare_data"} if data.kind == DataKind.latents else {}
    missing = []
    for key, (path, read, what) in needed.items():
        made = key == "data.path" and data.kind == DataKind.sprites  # written by the run itself
        if not read or (path is None and what is None):
            continue
        if path is None:
            missing.append(f"setting `{key}` is not set: name where {what} can be found")
        elif not made and not Path(path).exists():
            writer = f"python -m scripts.{writers[key]} writes it" if key in writers else None
            missing.append(f"setting `{key}` is {path}: nothing is there; {writer or _where_to_get(Path(path), key)}")
    if distilled and not fresh and model.checkpoint is not None:
        missing += _missing_checkpoint(Path(model.checkpoint))
    elif distilled and not fresh and model.bundle is not None:
        bundle = Path(model.bundle)
        missing += [f"bundle {bundle} has no transformer"] * (bundle.is_dir() and not (bundle / "transformer").is_dir())
    if missing:
        raise ConfigError("; and ".join(missing))
