"""A folder of captioned videos, and clips of them at one size and frame rate."""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.error import FFmpegError

from pipeline.data.rows import read_rows
from utils.config import ConfigError
from utils.load_config import is_text

SUFFIXES = {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi"}
# Names that a column or key may have, in captions.csv and captions.jsonl alike.
COLUMNS = {"video": ("video", "path", "file_name"), "caption": ("caption", "text", "prompt"), "start": ("start",)}


@dataclass(frozen=True)
class CaptionedVideo:
    """One clip: video `name` in the folder from `start` seconds on."""

    name: str
    caption: str
    start: float = 0.0
    problem: str | None = None  # why it cannot be used, if that is known already

    @property
    def label(self) -> str:
        """What to call it in a report: text that can be printed, whatever bytes the file's name has."""
        label = f"{self.name} from {self.start:g} s" if self.start else self.name
        return label.encode("utf-8", "backslashreplace").decode()


def list_videos(folder: str | Path, captions: str | Path | None) -> list[CaptionedVideo]:
    """The clips to make, in order; what is wrong with one is its `problem`.

    `captions`: .csv (with a header) or .jsonl; a row is a clip, with the keys of `COLUMNS`: video (relative to
    `folder`), caption and, if it does not begin at 0, start in seconds. None: every video below `folder`, with its
    caption in the .txt file of the same name beside it.

    Raises `ConfigError` for what is not there or not readable, and where no clip is usable, naming each.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"folder of videos {folder} does not exist")
    if captions is None:
        paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
        found = [_beside(path, str(path.relative_to(folder))) for path in paths]
    else:
        if Path(captions).suffix not in (".csv", ".jsonl"):
            raise ConfigError(f"captions {captions}: expected a .csv or .jsonl file")
        found = [_clip(row, where) for where, row in read_rows(Path(captions), f"captions {captions}")]
    if not found:
        raise ConfigError(f"{captions or folder}: no videos there ({', '.join(sorted(SUFFIXES))})")
    if all(clip.problem for clip in found):
        listed = "; ".join(f"{clip.label}: {clip.problem}" for clip in found)
        raise ConfigError(f"{captions or folder}: none of {len(found)} videos is usable: {listed}")
    return found


def _captioned(name: str, caption: str, start: float = 0.0) -> CaptionedVideo:
    caption, problem = " ".join(caption.split()), None
    if not caption:
        problem = "no caption"
    elif not is_text(caption):
        problem = "its caption has characters that UTF-8 does not have"
    elif not math.isfinite(start) or start < 0:
        problem = f"start is {start}, expected seconds from 0 on"
    return CaptionedVideo(name, "" if problem else caption, 0.0 if problem else start, problem)


def _beside(video: Path, name: str) -> CaptionedVideo:
    path = video.with_suffix(".txt")
    try:
        return _captioned(name, path.read_text(encoding="utf-8-sig") if path.is_file() else "")
    except (OSError, UnicodeDecodeError) as error:
        return CaptionedVideo(name, "", problem=f"{path.name} is not readable as UTF-8 text ({error})")


def _clip(row: Any, where: str) -> CaptionedVideo:
    if not isinstance(row, dict):
        return CaptionedVideo(where, "", problem="expected an object with video and caption")
    values = {}
    for column, names in COLUMNS.items():
        present = [name for name in names if name in row]
        if not present and column != "start":
            have = ", ".join(map(str, row))
            return CaptionedVideo(where, "", problem=f"no column {' or '.join(names)}; there are {have}")
        values[column] = row[present[0]] if present else None
    name, caption, start = str(values["video"] or ""), str(values["caption"] or ""), values["start"] or 0.0
    try:
        return _captioned(name or where, caption, float(start))
    except (TypeError, ValueError):
        return CaptionedVideo(name or where, "", problem=f"start is {start!r}, expected seconds")


class VideoClips:
    """A `ClipSource`: the first `frames` frames of every video at one frame rate and size."""

    def __init__(self, videos: list[CaptionedVideo], root: Path, frames: int, fps: int, height: int, width: int):
        self.videos, self.root, self._form = videos, root, (frames, fps, height, width)
        listed = json.dumps([asdict(video) for video in videos])
        form = dict(zip(("frames", "fps", "height", "width"), self._form, strict=True))
        self.made_by = {"captioned_videos": hashlib.sha256(listed.encode()).hexdigest(), **form}

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: int) -> tuple[np.ndarray | str, dict[str, Any]]:
        video = self.videos[index]
        record = {"caption": video.caption, "clip": video.label}
        if video.problem:
            return video.problem, record
        try:
            return read_clip(self.root / video.name, *self._form, video.start), record
        except ValueError as error:
            return str(error), record


def read_clip(path: str | Path, count: int, fps: float, height: int, width: int, start: float = 0.0) -> np.ndarray:
    """`count` frames at `fps` from `start` seconds on, scaled to cover height x width and cropped around the middle:
    uint8 [count, height, width, 3]. Frame k is the one nearest in time to start + k / fps, so a slower video repeats
    frames and a faster one drops some.

    Raises ValueError, with a reason, for a file that is no video, is broken or too short.
    """
    frames: list[np.ndarray] = []
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            if start:
                first = stream.start_time or 0
                container.seek(first + int(start / stream.time_base), stream=stream)  # to a keyframe at or before it
            for frame in nearest_frames(_timed(container, stream, start), count, fps):
                frames.append(fit(frame, height, width))
    except (FFmpegError, IndexError, OSError, ArithmeticError, TypeError) as error:
        raise ValueError(f"not a readable video ({error})") from error
    if len(frames) < count:
        raise ValueError(f"too short: {len(frames)} of {count} frames at {fps:g} frames per second")
    return np.stack(frames)


def _timed(container: av.container.InputContainer, stream: av.VideoStream, start: float):
    """(seconds after `start`, frame) of what is left of a video."""
    for index, frame in enumerate(container.decode(stream)):
        if frame.pts is None:  # a raw stream: frames are as far apart as it says
            yield index / float(stream.average_rate or stream.guessed_rate) - start, frame
        else:
            yield float((frame.pts - (stream.start_time or 0)) * frame.time_base) - start, frame


def nearest_frames(timed: Iterable[tuple[float, Any]], count: int, fps: float) -> Iterator[Any]:
    """Of `timed`, (seconds, frame) in order, the frames nearest in time to 0, 1/fps, ... (count-1)/fps, as long as
    there are any. The last one is on show for as long as the one before."""
    wanted, last, shown = 0, None, 1 / fps
    for seconds, frame in timed:
        if last is not None:
            while wanted < count and 2 * wanted / fps <= last[0] + seconds:
                yield last[1]
                wanted += 1
            shown = seconds - last[0]
        if wanted == count:
            return
        last = seconds, frame
    while last is not None and wanted < count and wanted / fps <= last[0] + shown / 2:
        yield last[1]
        wanted += 1


def fit(frame: av.VideoFrame, height: int, width: int) -> np.ndarray:
    """A frame, upright, scaled to cover height x width and cropped around the middle: uint8 [height, width, 3]."""
    quarters = round(frame.rotation / 90)  # counterclockwise, as a phone notes it
    across, down = (frame.height, frame.width) if quarters % 2 else (frame.width, frame.height)
    scale = max(height / down, width / across)
    across, down = max(width, round(across * scale)), max(height, round(down * scale))
    size = {"width": down, "height": across} if quarters % 2 else {"width": across, "height": down}
    pixels = frame.reformat(**size, format="rgb24", interpolation="BICUBIC").to_ndarray()
    pixels = np.rot90(pixels, quarters)  # [down, across, 3]
    top, left = (down - height) // 2, (across - width) // 2
    return np.ascontiguousarray(pixels[top : top + height, left : left + width])
