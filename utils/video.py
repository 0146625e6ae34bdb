"""H.264 mp4 files, written as the frames come and read back frame by frame.

While a video grows it is called `NAME.PROCESS.partial.mp4` and stored in fragments of one second, so what a killed run
leaves behind plays. On closing it becomes an ordinary mp4 (index, duration) and gets its final name in one step.
"""

import glob
import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import TracebackType

import av
import numpy as np
import torch
from av.error import FFmpegError
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

PARTIAL_SUFFIX = ".partial.mp4"


def to_uint8(video: torch.Tensor) -> np.ndarray:
    """Pixels [3, F, H, W] in -1..1 -> frames [F, H, W, 3] in 0..255."""
    frames = (video.float().clamp(-1, 1) + 1) * 127.5
    return frames.round().to(torch.uint8).permute(1, 2, 3, 0).cpu().numpy()


class VideoWriter:
    """Appends frames to an H.264 (yuv420p) mp4 in a folder that exists. As a context manager: left normally it finishes
    the file, left by an exception it keeps the partial one. `crf`: x264's constant rate factor (0 lossless, 51 worst);
    without macroblock trees 21 looks like 17 with them.

    Raises ValueError for a size (odd) or a name (not `.mp4`) that such a file cannot have, OSError where it cannot be
    written.
    """

    def __init__(self, path: str | Path, fps: int, height: int, width: int, crf: int = 21):
        self.path = Path(path)
        if self.path.suffix != ".mp4":
            raise ValueError(f"video {self.path}: the name must end in .mp4")
        if height % 2 or width % 2:
            raise ValueError(f"video size {height}x{width}: yuv420p needs even numbers")
        self.partial = self.path.with_suffix(f".{os.getpid()}{PARTIAL_SUFFIX}")
        self.frames = 0
        self._size = (height, width, 3)
        # hybrid_fragmented: fragments until the end, then one index over all of them.
        muxer = {"movflags": "hybrid_fragmented+frag_keyframe", "flush_packets": "1"}
        # No macroblock trees: their AVX-512 code reads stray memory where the width is no multiple of 128 px, and the
        # bytes of a video would depend on what the process had made before.
        encoder = {"crf": str(crf), "preset": "veryfast", "g": str(fps), "x264-params": "mbtree=0"}
        self._container = av.open(str(self.partial), "w", format="mp4", options=muxer)
        self._stream = self._container.add_stream("libx264", rate=Fraction(fps), options=encoder)
        self._stream.height, self._stream.width, self._stream.pix_fmt = height, width, "yuv420p"
        codec = self._stream.codec_context
        codec.thread_count = 1  # its frame threads hold frames back, and change the bytes with the machine
        codec.colorspace, codec.color_range = Colorspace.SMPTE170M, ColorRange.MPEG
        codec.color_primaries, codec.color_trc = ColorPrimaries.BT709, ColorTrc.BT709

    def append(self, frames: np.ndarray) -> None:
        """Encode `frames` [F, H, W, 3], uint8. Raises ValueError for another shape or type."""
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1:] != self._size:
            raise ValueError(f"frames are {frames.dtype} {list(frames.shape)}: expected uint8 [F, *{list(self._size)}]")
        for pixels in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24").reformat(
                format="yuv420p",
                src_color_range=ColorRange.JPEG,
                dst_colorspace=Colorspace.ITU601,
                dst_color_range=ColorRange.MPEG,
                interpolation="AREA",  # chroma is halved: average, do not sample
            )
            self._container.mux(self._stream.encode(picture))
        self.frames += len(frames)

    def close(self) -> None:
        """Write what the encoder still holds, give the file its final name, remove what killed processes left of it."""
        self._finish()
        self.partial.replace(self.path)
        for left in self.path.parent.glob(f"{glob.escape(self.path.stem)}.*{PARTIAL_SUFFIX}"):
            left.unlink(missing_ok=True)

    def _finish(self) -> None:
        if self.frames:
            self._container.mux(self._stream.encode(None))
        self._container.close()

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if kind is None:
            self.close()
        else:
            self._finish()


def write_video(path: Path, frames: np.ndarray, fps: int) -> None:
    """Frames uint8 [F, H, W, 3] as an mp4; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with VideoWriter(path, fps, *frames.shape[1:3]) as writer:
        writer.append(frames)


def iterate_video(path: str | Path) -> Iterator[np.ndarray]:
    """Frames [H, W, 3], uint8, one after the other. Raises ValueError where `path` is not a video."""
    try:
        with av.open(str(path)) as container:
            for frame in container.decode(video=0):
                yield frame.to_ndarray(format="rgb24")
    except (FFmpegError, IndexError) as error:
        raise ValueError(f"{path}: not a readable video ({error})") from error


def read_video(path: str | Path) -> np.ndarray:
    """The whole video: [F, H, W, 3], uint8."""
    return np.stack(list(iterate_video(path)))


def frame_rate(path: str | Path) -> float:
    """Frames per second. Raises ValueError where `path` is not a video."""
    try:
        with av.open(str(path)) as container:
            return float(container.streams.video[0].average_rate)
    except (FFmpegError, IndexError) as error:
        raise ValueError(f"{path}: not a readable video ({error})") from error
