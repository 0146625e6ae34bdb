"""Prompt schedules: how they are read, which chunks they change, and that nothing but the text changes."""

import json
import logging

import numpy as np
import pytest
import torch
from test_inference_cli import fails

from inference_packforcing import main
from model.cache.cache import PackCache
from model.schedule import FlowMatchSchedule
from pipeline.data.schedule import read_prompt, timeline
from pipeline.generate import run
from pipeline.generate.inputs import Prompts, prompt_noise
from pipeline.generate.pipeline import PackForcingPipeline
from pipeline.generate.rollout import Rollout
from pipeline.generate.vae_stream import StreamingDecoder
from pipeline.vae_shape import VAEShape
from tests import tiny
from utils.config import ConfigError
from utils.rng import keyed_randn
from utils.video import VideoWriter

FIRST, SECOND = "a red circle bounces over a blue plain", "a circle drifts left over a plain"
SCHEDULE = [{"at": 0, "prompt": FIRST}, {"at": 0.7, "prompt": SECOND}]  # chunks begin at 0, 0.31, 0.81, 1.31 s
SETTINGS = {
    "cache": {"sink": 1, "recent": 1, "top_k": 1, "compressor": {"channels": [4, 8]}},
    "sampler": {"steps": [1000.0, 500.0]},
    "video": {"height": tiny.HEIGHT, "width": tiny.WIDTH, "trained_frames": 10, "frames_per_chunk": 2},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def pipe(folder):
    return PackForcingPipeline.from_pretrained(folder, **SETTINGS)


def same(one, other):
    return np.array_equal(one, other)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ([], "`prompt` is \\[\\], expected text, or a list"),
        ([{"at": 1, "prompt": "a"}], "its first `at` is 1: a schedule begins at 0"),
        ([{"at": 0, "prompt": "a"}, {"at": 2, "prompt": "b"}, {"at": 1, "prompt": "c"}], "`at` 1 follows 2: sort"),
        ([{"at": 0, "prompt": "a"}, {"at": "soon", "prompt": "b"}], "here, entry 2: `at` is 'soon', expected a number"),
        ([{"at": 0, "prompt": "a"}, {"prompt": "b"}], "entry 2: `at` is None"),
        ([{"at": 0, "prompt": " "}], "entry 1: `prompt` is ' ', expected text"),
        ([{"at": 0, "promt": "a"}], "unknown key `promt`; did you mean `prompt`"),
        ([{"at": 0, "prompt": [{"at": 0, "prompt": "a"}]}], "entry 1: `prompt` is .* expected text"),
        (["a", "b"], "entry 1: expected an object with `at`"),
    ],
)
def test_a_wrong_schedule_is_one_clear_line(schedule, message):
    with pytest.raises(ConfigError, match=message):
        read_prompt(schedule, "here")


def test_seconds_are_rounded_to_chunks():
    def starts(*times):
        return list(timeline([{"at": at, "prompt": str(at)} for at in times], VAEShape(4, 4, 8), 3, 16))

    begin = [VAEShape(4, 4, 8).frames(3 * chunk) / 16 for chunk in (1, 2, 13)]  # 0.5625, 1.3125, 9.5625 s
    assert starts(0, *begin) == [0, 1, 2, 13]
    assert starts(0, begin[0] + 0.3, begin[2] + 0.4) == [0, 1, 14]
    with pytest.raises(ConfigError, match="`0.9` at 0.9 s falls on chunk 1, where `0.6` begins: a chunk lasts 0.75 s"):
        starts(0, 0.6, 0.9)
    with pytest.raises(ConfigError, match="falls on chunk 0"):
        starts(0, 0.1)


def test_one_entry_is_a_plain_prompt(pipe):
    plain = pipe(FIRST, num_frames=21, seed=3).frames
    assert same(pipe([{"at": 0, "prompt": FIRST}], num_frames=21, seed=3).frames, plain)


@torch.no_grad()
def test_text_changes_at_the_chunk(pipe, caplog):
    """Against a loop without memo, whose every forward is given the chunk's text, and noise keyed by that text."""
    caplog.set_level(logging.INFO)
    cache = PackCache.for_model(pipe.transformer, pipe.cache_config, 4, 6, 10)
    schedule, pieces = FlowMatchSchedule(3.0), []
    first, second = schedule.warp([1000.0, 500.0])
    for chunk in range(5):
        text, context = (FIRST if chunk < 2 else SECOND), cache.context()
        embeds, shape = pipe.encode_prompt(text), (4, 2, 4, 6)
        latents = keyed_randn(shape, 3, text, 0, chunk, 0)[None]
        flow = pipe.transformer(latents, first[None], embeds, context=context).sample
        x0 = schedule.flow_to_x0(flow, latents, first[None])
        latents = schedule.add_noise(x0, keyed_randn(shape, 3, text, 0, chunk, 1)[None], second[None])
        flow = pipe.transformer(latents, second[None], embeds, context=context).sample
        pieces.append(schedule.flow_to_x0(flow, latents, second[None]))
        cache.commit(pipe.transformer(pieces[-1], torch.zeros(1), embeds, context=context).kv, context)
    expected = StreamingDecoder(pipe.vae).decode(torch.cat(pieces, 2))[0].permute(1, 2, 3, 0) / 2 + 0.5
    frames = np.concatenate([chunk.frames for chunk in pipe.stream(SCHEDULE, num_frames=37, seed=3)], 1)[0]
    assert np.abs(frames - expected.numpy()).max() < 1e-5
    assert f"from 0.81 s (chunk 2): {SECOND}" in caplog.text


@pytest.mark.parametrize("sampler", [{}, {"kind": "euler", "num_steps": 3}], ids=["few_step", "euler"])
@pytest.mark.parametrize("kind", ["pack", "full", "window", "sink"])
def test_every_sampler_and_cache_keeps_what_came_before(folder, kind, sampler):
    pipe = PackForcingPipeline.from_pretrained(folder, **SETTINGS | {"sampler": SETTINGS["sampler"] | sampler})
    options = {"num_frames": 37, "cache": {"kind": kind}, "guidance_scale": 3 if sampler else 1}
    plain, changed = (pipe(prompt, **options).frames[0] for prompt in (FIRST, SCHEDULE))
    assert same(plain[:13], changed[:13]) and not same(plain[13:21], changed[13:21])
    assert same(pipe(SCHEDULE, **options | {"num_frames": 21}).frames[0], changed[:21])  # a look ahead at its start


def test_schedules_of_a_batch_change_each_at_its_own_time(pipe):
    other = [{"at": 0, "prompt": SECOND}, {"at": 1.3, "prompt": FIRST}]
    batch = pipe([SCHEDULE, other, FIRST], num_frames=37, samples=[0, 2, 1]).frames
    for video, prompt, sample in zip(batch, (SCHEDULE, other, FIRST), (0, 2, 1), strict=True):
        assert np.abs(video - pipe([prompt], num_frames=37, samples=[sample]).frames[0]).max() < 1e-5
    with pytest.raises(ConfigError, match="samples has 1 numbers: give one for each of the 2 videos"):
        pipe([FIRST, SECOND], samples=[1])


def history(pipe, config, commits):
    """A rollout of FIRST's video under a fresh cache that was given `commits`: (latents, text) each."""
    cache = PackCache.for_model(pipe.transformer, config, 4, 6, 10)
    rollout = Rollout(pipe.transformer, cache, pipe.sampler_config, Prompts(pipe.encode_prompt(FIRST)), None)
    for latents, text in commits:
        rollout.prompts = Prompts(pipe.encode_prompt(text))
        rollout.commit(latents)
    return rollout


@pytest.mark.parametrize(("mode", "kept"), [("recommit", [0, 3, 4]), ("restart", [3, 4]), ("forget", [])])
def test_what_a_switch_does_to_the_history(pipe, mode, kept):
    """Against a cache that was only ever given what is left, the recent chunks under the new prompt."""
    cache = {"kind": "sink", "sink": 1, "recent": 2, "at_switch": mode}
    schedule = [{"at": 0, "prompt": FIRST}, {"at": 2.31, "prompt": SECOND}]  # chunk 5
    made = [chunk.latents for chunk in pipe.stream(schedule, num_frames=69, seed=1, cache=cache, output_type="latent")]
    config = pipe.make_cache(tiny.HEIGHT, tiny.WIDTH, cache).config
    rollout = history(pipe, config, [(made[c], SECOND if c > 2 else FIRST) for c in kept])
    first = rollout.cache.num_chunks
    rollout.noise = lambda chunk, step, shape: prompt_noise(1, [SECOND], [0])(chunk - first + 5, step, shape)
    rollout.prompts = Prompts(pipe.encode_prompt(SECOND))
    for (_, latents), expected in zip(rollout.run(4), made[5:], strict=True):
        torch.testing.assert_close(latents, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "settings", [{}, {"query_scope": "recent+current"}, {"refresh_interval": 4}, {"mid_dtype": "int8"}]
)
def test_recommitting_leaves_sink_and_mid_as_they_were(pipe, settings):
    options = {"recent": 1, "top_k": 2, "at_switch": "recommit", **settings}
    config = pipe.make_cache(tiny.HEIGHT, tiny.WIDTH, options).config
    rollout = history(pipe, config, [(torch.randn(1, 4, 2, 4, 6), FIRST) for _ in range(6)])
    cache, workspace, tokens = rollout.cache, rollout.cache.layers[-1], rollout.cache.geometry.tokens

    def parts():
        mid = [part.restored()[:, :5] for part in cache.archive._kv[-1]]  # of latents alone, not of the prompt
        sink, recent = (workspace._slot(slot)[1].clone() for slot in (0, cache.layout.slot(5)))
        return sink, *mid, recent

    before, report = parts(), cache.report()
    rollout.switch(Prompts(pipe.encode_prompt(SECOND)))
    *kept, recent = zip(before, parts(), strict=True)
    assert all(torch.equal(*pair) for pair in kept) and not torch.equal(*recent) and recent[0].shape[1] == tokens
    assert rollout.index == cache.num_chunks == 6 and cache.report() == report
    assert cache.context().recent == range(5, 6) and list(cache.archived) == [1, 2, 3, 4]
    rollout.noise = prompt_noise(0, [SECOND], [0])
    assert all(latents.isfinite().all() for _, latents in rollout.run(3))
    assert cache.context().recent == range(8, 9) and list(cache.archived) == [1, 2, 3, 4, 5, 6, 7]


def test_a_history_without_recent_part_cannot_be_recommitted(pipe):
    with pytest.raises(ConfigError, match="at_switch is recommit: this cache has no recent part"):
        pipe(SCHEDULE, cache={"kind": "full", "at_switch": "recommit"})


class TestCommandLine:
    @pytest.fixture
    def arguments(self, folder, tmp_path):
        (tmp_path / "config.yaml").write_text(tiny.CONFIG)

        def build(schedule):
            (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": schedule}) + "\n" + json.dumps({"prompt": FIRST}))
            return [f"--config_path={tmp_path / 'config.yaml'}", f"--data_path={tmp_path / 'p.jsonl'}",
                    f"--output_folder={tmp_path / 'out'}", "--seconds=1.3", f"model.bundle={folder}"]  # fmt: skip

        return build

    def test_the_sidecar_holds_the_schedule(self, arguments, tmp_path, pipe, monkeypatch, caplog, capsys):
        caplog.set_level(logging.INFO)
        assert main(arguments(SCHEDULE)) == 0
        video = tmp_path / "out" / "0000_a-red-circle-bounces-over-a-blue-plain.mp4"
        assert json.loads(video.with_suffix(".json").read_text())["prompt"] == SCHEDULE
        with VideoWriter(tmp_path / "again.mp4", 16, tiny.HEIGHT, tiny.WIDTH) as writer:
            for chunk in pipe.stream(SCHEDULE, num_frames=21, output_type="uint8"):
                writer.append(chunk.frames[0])
        assert video.read_bytes() == (tmp_path / "again.mp4").read_bytes()
        monkeypatch.setattr(run, "load_pipeline", None)
        assert main(arguments(SCHEDULE)) == 0 and "2 of 2 videos are finished already" in caplog.text
        fails(capsys, arguments([*SCHEDULE, {"at": 1.2, "prompt": FIRST}]), "was made with prompt=", "now [{'at'")

    def test_mistakes_show_before_a_model_is_loaded(self, arguments, capsys, monkeypatch):
        monkeypatch.setattr(run, "load_pipeline", None)
        fails(capsys, arguments([{"at": 2, "prompt": "a"}]), "p.jsonl, line 1", "begins at 0")
        twice = [*SCHEDULE, {"at": 0.8, "prompt": FIRST}]
        fails(capsys, arguments(twice), "prompt 0", "falls on chunk 2", "a chunk lasts 0.5 s")
