"""Prompts: of a file, of the data, and of sample videos; known before any model is loaded."""

from pathlib import Path

from pipeline.data.clips import LatentClips
from pipeline.data.prompt_files import read_prompt_items
from pipeline.data.schedule import texts
from utils.config import Config, require
from utils.sprites.world import caption, held_out_captions, sample_spec


def read_prompts(path: str | Path) -> list[str]:
    """The texts of a file, without what its lines may set (`pipeline/data/prompt_files.py`). Raises `ConfigError`."""
    return [text for item in read_prompt_items(path) for text in texts(item.prompt)]


def sample_prompts(config: Config) -> list[str]:
    """`train.sample_prompts`, then the first `train.sample_held_out` captions of the held-out split."""
    return config.train.sample_prompts + held_out_captions(config.seed, config.train.sample_held_out, "seen")


def fixed_prompts(config: Config) -> list[str]:
    """The negative prompt, also that of dropped captions, and those of the sample videos."""
    return [config.sampler.negative_prompt, *sample_prompts(config)]


def data_prompts(config: Config) -> list[str]:
    """The prompts of `data`: lines of a file, captions of latent shards, or of the sprite world's clips. Raises
    `ConfigError` where the file or folder is not there."""
    data = config.data
    if data.kind == "sprites":
        count = max(data.num_clips, data.num_stills)
        return [caption(sample_spec(config.seed, i, motions=data.motions)) for i in range(count)]
    require(config, "data.path", data.path, "name a file with one prompt per line, or latent shards")
    if data.kind == "prompts":
        return read_prompts(data.path)
    return LatentClips(Path(data.path) / "clips").captions
