"""Generated videos in folders: finished mp4s, each with what it shows in a JSON of the same name beside it."""

import json
import logging
import math
from pathlib import Path

from pipeline.data.schedule import Prompt, read_prompt
from utils.config import ConfigError
from utils.video import PARTIAL_SUFFIX

log = logging.getLogger(__name__)


def find_videos(path: Path) -> dict[str, list[Path]]:
    """Finished videos by folder, relative to `path`, in order of name."""
    if not path.exists():
        raise ConfigError(f"{path} does not exist: name an mp4 or a folder of them")
    if path.is_file():
        return {".": [path]}
    folders: dict[str, list[Path]] = {}
    for video in sorted(path.rglob("*.mp4")):
        if not video.name.endswith(PARTIAL_SUFFIX):
            folders.setdefault(str(video.parent.relative_to(path)), []).append(video)
    if not folders:
        raise ConfigError(f"{path} holds no finished .mp4: generate some with inference_packforcing.py")
    return folders


def read_sidecar(video: Path) -> tuple[Prompt | None, float | None]:
    """Prompt and frames per second from the JSON beside a video, None for what it does not say; logs what is wrong."""
    sidecar = video.with_suffix(".json")
    try:
        record = json.loads(sidecar.read_text(encoding="utf-8"))
        prompt, fps = record["prompt"], record["fps"]
        prompt = prompt if prompt == "" else read_prompt(prompt, "prompt")
        if isinstance(fps, int | float) and 0 < fps < math.inf:
            return prompt, float(fps)
        reason = f"fps must be a positive number, not {fps!r}"
    except OSError as error:
        reason = error.strerror
    except (ValueError, KeyError, TypeError) as error:
        reason = f"not a sidecar: {type(error).__name__} {error}"
    log.warning("%s: no caption (%s: %s); metrics only", video, sidecar.name, reason)
    return None, None
