"""The streaming mp4 writer and its reader."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from utils.video import VideoWriter, frame_rate, read_video, to_uint8

FPS, HEIGHT, WIDTH = 16, 32, 48
ROOT = Path(__file__).parent.parent


def moving_square(count):
    frames = np.full((count, HEIGHT, WIDTH, 3), (24, 44, 96), np.uint8)
    for i, frame in enumerate(frames):
        x = 2 * (i % 12)
        frame[8:24, x : x + 16] = (230, 50, 50)
    return frames


def write(path, frames, chunk=12):
    with VideoWriter(path, FPS, HEIGHT, WIDTH) as writer:
        for start in range(0, len(frames), chunk):
            writer.append(frames[start : start + chunk])


def test_round_trip_keeps_frames_rate_and_colours(tmp_path):
    frames = moving_square(45)
    write(tmp_path / "video.mp4", frames)
    back = read_video(tmp_path / "video.mp4")
    assert back.shape == frames.shape and back.dtype == np.uint8
    assert np.abs(back.astype(int) - frames).mean() < 3
    assert frame_rate(tmp_path / "video.mp4") == FPS
    # Inside flat areas nothing but rounding is left, so neither colour matrix nor range got lost.
    assert np.abs(back[0, 28, 40].astype(int) - frames[0, 28, 40]).max() <= 4
    assert np.abs(back[0, 16, 8].astype(int) - frames[0, 16, 8]).max() <= 4
    assert [path.name for path in tmp_path.iterdir()] == ["video.mp4"]


def test_finished_file_is_an_ordinary_h264_mp4(tmp_path):
    write(tmp_path / "video.mp4", moving_square(33))
    with av.open(str(tmp_path / "video.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert stream.frames == 33  # known from the index without decoding
        assert float(container.duration / av.time_base) == pytest.approx(33 / FPS, abs=0.01)


def test_bytes_do_not_depend_on_how_frames_were_appended(tmp_path):
    frames = moving_square(30)
    write(tmp_path / "a.mp4", frames, chunk=1)
    write(tmp_path / "b.mp4", frames, chunk=30)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


ENCODE = """
import hashlib, sys
from pathlib import Path
from utils.sprites.world import render, sample_spec
from utils.video import VideoWriter
path, width, first = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
for index in range(first, 2):  # the video that counts is the last; one before it leaves the heap otherwise
    with VideoWriter(path, 16, 64, width) as writer:
        writer.append(render(sample_spec(0, index), 96, 64, width))
print(hashlib.sha256(path.read_bytes()).hexdigest())
"""


def test_bytes_depend_on_the_frames_alone(tmp_path):
    """Not on what memory held before: macroblock trees read stray memory at widths that are no multiple of 128 px."""

    def encode(first, fill):
        command = [sys.executable, "-c", ENCODE, str(tmp_path / "a.mp4"), "96", str(first)]
        environment = os.environ | {"MALLOC_PERTURB_": str(fill), "PYTHONPATH": str(ROOT)}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    assert len({encode(first=1, fill=1), encode(first=1, fill=200), encode(first=0, fill=0)}) == 1


def test_an_exception_keeps_a_playable_partial_file(tmp_path):
    with pytest.raises(RuntimeError), VideoWriter(tmp_path / "video.mp4", FPS, HEIGHT, WIDTH) as writer:
        writer.append(moving_square(20))
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == [f"video.{os.getpid()}.partial.mp4"]
    assert len(read_video(tmp_path / f"video.{os.getpid()}.partial.mp4")) == 20


def test_a_killed_run_leaves_a_playable_partial_file(tmp_path):
    script = f"""
        import os, signal
        from tests.test_video import *
        writer = VideoWriter({str(tmp_path / "video.mp4")!r}, FPS, HEIGHT, WIDTH)
        writer.append(moving_square(80))
        os.kill(os.getpid(), signal.SIGKILL)
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT, env={**os.environ})
    assert run.returncode == -signal.SIGKILL
    (partial,) = tmp_path.glob("video.*.partial.mp4")
    assert 48 <= len(read_video(partial)) <= 80  # whole fragments of a second
    write(tmp_path / "video.mp4", moving_square(20))
    assert [path.name for path in tmp_path.iterdir()] == ["video.mp4"]


@pytest.mark.parametrize("read", [read_video, frame_rate])
def test_not_a_video(tmp_path, read):
    (tmp_path / "video.mp4").write_text("no")
    with pytest.raises(ValueError, match="video.mp4: not a readable video"):
        read(tmp_path / "video.mp4")


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="31x48"):
        VideoWriter(tmp_path / "video.mp4", FPS, 31, 48)
    with pytest.raises(ValueError, match="must end in .mp4"):
        VideoWriter(tmp_path / "video.avi", FPS, HEIGHT, WIDTH)
    with VideoWriter(tmp_path / "video.mp4", FPS, HEIGHT, WIDTH) as writer:
        writer.append(moving_square(1))
        with pytest.raises(ValueError, match="uint8"):
            writer.append(moving_square(1).astype(np.float32))
        with pytest.raises(ValueError, match="expected uint8"):
            writer.append(moving_square(1)[:, :16])


def test_to_uint8():
    video = torch.tensor([-1.0, 0.0, 1.0, 3.0]).view(1, 4, 1, 1).expand(3, 4, 2, 5)
    frames = to_uint8(video)
    assert frames.shape == (4, 2, 5, 3)
    assert frames[:, 0, 0, 0].tolist() == [0, 128, 255, 255]
