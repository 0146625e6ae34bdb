"""Prompt schedules: a prompt that changes while the video goes on, as prompt files write it.

    [{"at": 0, "prompt": "a red circle bounces over a blue checkerboard"}, {"at": 10, "prompt": "..."}]

`at`: seconds, rounded to the nearest chunk boundary. Needs no heavy import.
"""

import difflib
import json
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from pipeline.vae_shape import VAEShape
from utils.config import ConfigError
from utils.load_config import is_text

Prompt = str | list[dict[str, Any]]  # a text, or a schedule
FIELDS = ("at", "prompt")
LARGEST = 1e300


def check_keys(row: dict, known: Iterable[str], where: str) -> None:
    """Raise `ConfigError` for a key that is nearly a known one; others are comments."""
    for key in row:
        near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.75)
        if key not in known and near:
            raise ConfigError(f"{where}: unknown key `{key}`; did you mean `{near[0]}`?")


def number(value: Any, name: str, where: str) -> float:
    """Whole ones stay exact. Raises `ConfigError` for what is no finite number."""
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        found = None
    if not isinstance(found, int | float) or isinstance(found, bool) or not abs(found) < LARGEST:
        raise ConfigError(f"{where}: `{name}` is {value!r}, expected a number")
    return found


def read_prompt(value: Any, where: str) -> Prompt:
    """A text or a schedule with single spaces between words. Raises `ConfigError` where it is neither."""
    if isinstance(value, list | tuple) and value:
        entries = [_entry(entry, f"{where}, entry {place}") for place, entry in enumerate(value, 1)]
        times = [entry["at"] for entry in entries]
        if times[0] != 0:
            raise ConfigError(f"{where}: its first `at` is {times[0]:g}: a schedule begins at 0")
        for before, after in pairwise(times):
            if after <= before:
                raise ConfigError(f"{where}: `at` {after:g} follows {before:g}: sort the entries by time")
        return entries
    if not is_text(value) or not value.strip():
        raise ConfigError(f"{where}: `prompt` is {value!r}, expected text, or a list of {{at, prompt}}")
    return " ".join(value.split())


def prompts_of(prompt: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One a video. Raises `ConfigError` for what is neither text nor schedule."""
    alone = isinstance(prompt, str) or all(isinstance(entry, dict) for entry in prompt)
    prompts = [prompt] if alone else list(prompt)
    return [one if isinstance(one, str) else read_prompt(one, f"prompt {place}") for place, one in enumerate(prompts)]


def _entry(entry: Any, where: str) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise ConfigError(f"{where}: expected an object with `at` (seconds) and `prompt`, found {entry!r}")
    check_keys(entry, FIELDS, where)
    text = entry.get("prompt")
    if not is_text(text):
        raise ConfigError(f"{where}: `prompt` is {text!r}, expected text")
    return {"at": number(entry.get("at"), "at", where), "prompt": read_prompt(text, where)}


def texts(prompt: Prompt) -> list[str]:
    """All of its texts, in order of time."""
    return [prompt] if isinstance(prompt, str) else [entry["prompt"] for entry in prompt]


def timeline(prompt: Prompt, vae: VAEShape, frames_per_chunk: int, fps: float, where: str = "prompt") -> dict[int, str]:
    """Chunk -> the text that holds from there on. Raises `ConfigError` where two entries fall on one chunk."""
    if isinstance(prompt, str):
        return {0: prompt}
    first, each = vae.frames(frames_per_chunk) / fps, vae.temporal_stride * frames_per_chunk / fps  # seconds of a chunk
    found: dict[int, str] = {}
    for entry in prompt:
        at, text = entry["at"], entry["prompt"]
        chunk = round(1 + (at - first) / each) if at else 0
        if chunk in found:
            raise ConfigError(
                f"{where}: `{text}` at {at:g} s falls on chunk {chunk}, where `{found[chunk]}` begins: a chunk lasts "
                f"{each:g} s"
            )
        found[chunk] = text
    return found


def text_at(line: dict[int, str], chunk: int) -> str:
    """The text of a timeline that holds for a chunk."""
    return line[max(start for start in line if start <= chunk)]
