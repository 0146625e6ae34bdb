"""The next chunk is made while one is decoded and encoded: the same frames, a bounded queue, errors as they are."""

import threading
import time

import numpy as np
import pytest
import torch
from test_pipeline import CACHE, PROMPT, SAMPLER, VIDEO

from model.attention import attend
from model.cache.cache import PackCache
from pipeline.generate.pipeline import PackForcingPipeline
from pipeline.generate.vae_stream import StreamingDecoder
from scripts.bench_inference import overlap_ratio
from utils.ahead import ahead, used_beside

SCHEDULE = [{"at": 0, "prompt": PROMPT}, {"at": 0.8, "prompt": "a green shape circles over a gradient"}]


@pytest.fixture
def pipe(bundle):
    return PackForcingPipeline.from_pretrained(bundle, cache=CACHE, sampler=SAMPLER, video=VIDEO)


def threads():
    return sum(thread.name.startswith("ahead") for thread in threading.enumerate())


class Counted:
    """A generator of numbers that says where it is."""

    def __init__(self, stop=5, error=None):
        self.made, self.closed, self.stop, self.error = 0, False, stop, error

    def __call__(self):
        try:
            while self.made < self.stop:
                self.made += 1
                yield self.made
            if self.error is not None:
                raise self.error
        finally:
            self.closed = True


def settled(counted, made):
    """Wait for the other thread to make that many, and see that it makes no more."""
    for _ in range(200):
        if counted.made == made:
            break
        time.sleep(0.005)
    time.sleep(0.05)
    return counted.made == made


def test_one_item_is_made_ahead_and_no_more():
    counted = Counted()
    items = ahead(counted())
    for expected in range(1, 5):
        assert next(items) == expected and settled(counted, expected + 1)
    assert list(items) == [5] and counted.closed and threads() == 0


def test_an_error_comes_as_it_is_after_what_was_made_before_it():
    error = KeyError("mine")
    items, seen = ahead(Counted(2, error)()), []
    with pytest.raises(KeyError) as raised:
        for item in items:
            seen.append(item)
    assert seen == [1, 2] and raised.value is error and threads() == 0


def test_closing_stops_it():
    counted = Counted(1000)
    items = ahead(counted())
    next(items)
    items.close()
    assert counted.closed and counted.made <= 2 and threads() == 0


@pytest.mark.parametrize("overlap", [True, False])
def test_an_error_of_the_reader_closes_it_too(overlap):
    counted = Counted()
    with pytest.raises(ZeroDivisionError):
        list(used_beside(counted(), lambda item: 1 / 0, overlap))
    assert counted.closed and threads() == 0


@pytest.mark.parametrize("output", ["np", "pt", "uint8", "pil"])
@pytest.mark.parametrize("cache", [{}, {"compressor": {"kind": "lr", "channels": [4, 8]}}], ids=["project", "lr"])
def test_frames_are_those_made_one_after_the_other(pipe, output, cache):
    options = {"prompt": SCHEDULE, "num_frames": 34, "seed": 2, "output_type": output, "cache": cache}
    together = list(pipe.stream(**options))
    pipe.overlap = False
    apart = list(pipe.stream(**options))
    assert len(together) == len(apart) == 5
    for one, other in zip(together, apart, strict=True):
        assert np.array_equal(np.asarray(one.frames), np.asarray(other.frames))
        assert one.report == other.report and one.index == other.index
    assert torch.equal(together[-1].latents, apart[-1].latents)


@pytest.mark.parametrize("kind", ["hr_spatial", "lr"])
def test_first_frames_before_the_first_commit_and_none_for_the_last_chunk(pipe, monkeypatch, kind):
    events, commit, decode = [], PackCache.commit, StreamingDecoder.decode
    monkeypatch.setattr(PackCache, "commit", lambda self, *args: (commit(self, *args), events.append("commit"))[0])
    monkeypatch.setattr(StreamingDecoder, "decode", lambda *args: (events.append("decode"), decode(*args))[1])
    pipe.overlap = False
    cache = {"compressor": {"kind": kind, "channels": [4, 8]}}
    for _ in pipe.stream(PROMPT, num_frames=29, cache=cache):
        events.append("shown")
    assert events == ["decode", "shown", "commit"] * 3 + ["decode", "shown"]


def test_decoding_waits_for_no_chunk_but_its_own(pipe, monkeypatch):
    """The second chunk cannot be finished before the first is decoded, and its making is under way by then."""
    begun, decoded, decode = threading.Event(), threading.Event(), StreamingDecoder.decode

    def wait(self, latents):
        assert begun.wait(20)
        decoded.set()
        return decode(self, latents)

    def step(pipeline, number, timestep, tensors):
        if number == 2:  # first of the second chunk
            begun.set()
            assert decoded.wait(20)
        return {}

    monkeypatch.setattr(StreamingDecoder, "decode", wait)
    assert pipe(PROMPT, num_frames=13, callback_on_step_end=step).frames.shape[1] == 13


def test_what_goes_wrong_in_the_other_thread(pipe):
    def fail(pipeline, number, timestep, tensors):
        return {} if number < 4 else 1 / 0

    seen = []
    with pytest.raises(ZeroDivisionError):
        for chunk in pipe.stream(PROMPT, num_frames=29, callback_on_step_end=fail):
            seen.append(chunk.index)
    assert seen == [0, 1] and threads() == 0


def test_a_stream_that_nobody_reads_to_its_end(pipe):
    stream = pipe.stream(PROMPT, num_frames=400)
    next(stream)
    stream.close()
    assert threads() == 0 and pipe.current_timestep is None


def test_under_autocast_everything_stays_in_one_thread(pipe, monkeypatch):
    monkeypatch.setattr("utils.ahead.ahead", lambda items: pytest.fail("a thread does not know of it"))
    with torch.autocast("cpu", torch.bfloat16):
        assert pipe(PROMPT, num_frames=13).frames.shape[1] == 13


def test_where_attention_switches_kernels_everything_stays_in_one_thread(pipe, monkeypatch, diffusers_backend):
    """The VAE's attention would be switched with it, at times."""
    monkeypatch.setattr("utils.ahead.ahead", lambda items: pytest.fail("its thread switches kernels for both"))
    pipe.transformer.set_attention_backend("_native_math")
    assert pipe(PROMPT, num_frames=13).frames.shape[1] == 13
    pipe.transformer.reset_attention_backend()  # diffusers' default is what was set last, for whatever model
    assert pipe(PROMPT, num_frames=13).frames.shape[1] == 13


@torch.no_grad()
def test_attention_by_cudnn_switches_no_kernel(monkeypatch):
    monkeypatch.setattr(torch.nn.attention, "sdpa_kernel", lambda *_: pytest.fail("kernels are switched off"))
    query, key = (torch.empty(2, size, 4, 64, device="meta", dtype=torch.bfloat16) for size in (96, 320))
    assert attend(query, key, key, "_native_cudnn").shape == query.shape


def test_what_overlap_is_worth_can_be_measured(pipe):
    assert overlap_ratio(pipe, 2, prompt=PROMPT, num_frames=13) > 0
    assert overlap_ratio(pipe, 0) is None
