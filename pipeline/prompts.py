"""Which prompts a training run needs embeddings of, known before any model is loaded."""

from pathlib import Path

from pipeline.jobs import read_prompts
from pipeline.samples import sample_prompts
from utils.config import Config, ConfigError
from utils.data import read_captions
from utils.sprite_world import caption, sample_spec


def fixed_prompts(config: Config) -> list[str]:
    """The negative prompt, also that of dropped captions, and those of the sample videos."""
    return [config.sampler.negative_prompt, *sample_prompts(config)]


def data_prompts(config: Config) -> list[str]:
    """The prompts of `data`: lines of a file, captions of latent shards, or of the sprite world's clips.

    Raises `ConfigError` where the file or folder is not there.
    """
    data = config.data
    if data.kind == "sprites":
        return [caption(sample_spec(config.seed, i)) for i in range(max(data.num_clips, data.num_stills))]
    if data.path is None:
        raise ConfigError("setting `data.path` is not set: name a file with one prompt per line, or latent shards")
    if data.kind == "prompts":
        return read_prompts(data.path)
    return [text for texts in read_captions(Path(data.path) / "clips") for text in texts]
