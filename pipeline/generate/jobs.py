"""What an inference run has to make: prompts, file names, and which videos are finished already.

Beside every video `NAME.mp4` lies `NAME.json`, written last: a video counts as finished where that file says it was
made with the settings of this run.
"""

import json
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.data.prompt_files import PromptItem
from pipeline.data.schedule import Prompt, texts
from utils.config import Config, ConfigError
from utils.load_config import plain

_SLUG_LENGTH = 60
# Settings that say where and how fast, not what; weights are compared by content, not by path.
_NOT_IN_THE_VIDEO = {
    "model": ("bundle", "checkpoint", "lora"),
    "cache": ("archive_device",),
    "inference": (
        "data_path", "output_folder", "num_samples", "device", "attention_backend", "compile", "threads",
        "offload",
    ),
    "parallel": ("sequence",),
}  # fmt: skip
_OTHER_SECTIONS = ("train", "data", "vae", "consistency", "ode", "dmd")


@dataclass(frozen=True)
class Job:
    """One video: sample `sample` of item `index` (blank lines not counted) of the prompts, under `config`."""

    index: int
    prompt: Prompt
    sample: int
    video: Path
    config: Config

    @property
    def sidecar(self) -> Path:
        return self.video.with_suffix(".json")


def slug(prompt: str) -> str:
    """The prompt's words as a file name: ASCII letters and digits, at most 60 characters, cut between words."""
    ascii_text = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode().lower()
    words = "-".join(re.findall(r"[a-z0-9]+", ascii_text))
    if len(words) > _SLUG_LENGTH:
        cut = words[: _SLUG_LENGTH + 1].rfind("-")
        words = words[: cut if cut > 0 else _SLUG_LENGTH]
    return words or "prompt"


def plan(items: list[PromptItem], folder: str | Path, config: Config, frames_of: Callable[[float], int]) -> list[Job]:
    """All videos of a run. Sample 0 has no suffix, so asking for more samples later keeps the first. `frames_of`:
    seconds -> latent frames."""
    jobs = []
    for index, item in enumerate(items):
        own = _own_settings(config, item, frames_of)
        for sample in range(config.inference.num_samples):
            name = f"{index:04d}_{slug(texts(item.prompt)[0])}{f'_s{sample}' if sample else ''}.mp4"
            jobs.append(Job(index, item.prompt, sample, Path(folder) / name, own))
    return jobs


def _own_settings(config: Config, item: PromptItem, frames_of: Callable[[float], int]) -> Config:
    """The config with what the prompt's own line sets."""
    sampler, inference = config.sampler, config.inference
    if item.negative_prompt is not None:
        sampler = replace(sampler, negative_prompt=item.negative_prompt)
    if item.seconds is not None:
        inference = replace(inference, num_output_frames=frames_of(item.seconds))
    seed = config.seed if item.seed is None else item.seed
    return replace(config, seed=seed, sampler=sampler, inference=inference)


def what_was_made(prompt: Prompt, sample: int, config: dict[str, Any], weights: dict[str, str]) -> dict[str, Any]:
    """Everything a video is a function of, flat: {"cache.top_k": 16, ...}."""
    flat: dict[str, Any] = {"prompt": prompt, "sample": sample}
    for section, values in config.items():
        if section in _OTHER_SECTIONS:
            continue
        if not isinstance(values, dict):
            flat[section] = values
            continue
        skipped = _NOT_IN_THE_VIDEO.get(section, ())
        flat |= {f"{section}.{key}": value for key, value in values.items() if key not in skipped}
    return flat | {f"weights.{part}": digest for part, digest in weights.items()}


def is_finished(job: Job, weights: dict[str, str]) -> bool:
    """Whether the video of `job` is there, made with these settings and weights. Raises `ConfigError` naming the first
    difference where it was made with others."""
    if not (job.video.is_file() and job.sidecar.is_file()):
        return False
    try:
        stored = json.loads(job.sidecar.read_text(encoding="utf-8"))
        before = what_was_made(stored["prompt"], stored["sample"], stored["config"], stored["weights"])
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{job.sidecar} is not the description of a video; remove it or choose another "
                          "output folder") from error  # fmt: skip
    now = what_was_made(job.prompt, job.sample, plain(job.config), weights)
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            raise ConfigError(
                f"{job.video} exists already and was made with {key}={before.get(key)}, now {now.get(key)}; choose "
                "another output folder or remove it"
            )
    return True
