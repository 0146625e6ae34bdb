"""The code blocks of docs/extend.md do what the page says."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from distill import make_stage, write_world
from toy import toy_cache, toy_config, toy_model, toy_prompt

from model.cache.selection import SELECTIONS, Candidates
from model.compressor import COMPRESSORS
from pipeline.generate.conditioning import CONDITIONS
from pipeline.generate.inputs import Prompts, prompt_noise
from pipeline.generate.pipeline import PackForcingPipeline
from pipeline.generate.rollout import Rollout
from pipeline.train.method import METHODS
from utils.config import ConfigError, SamplerConfig
from utils.metrics import METRICS, measure
from utils.sprites.read import READERS, accuracy, read_seconds, score
from utils.sprites.world import FPS, caption, parse_caption, render, sample_spec

PAGE = (Path(__file__).parent.parent / "docs" / "extend.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^## (.+?)$.*?```python\n(.*?)```", PAGE, flags=re.S | re.M)


@pytest.fixture(scope="module", autouse=True)
def registered():
    """All blocks run; the registries are as before when the tests are over."""
    choices = [COMPRESSORS, SELECTIONS, CONDITIONS, METHODS, METRICS, READERS]
    before = [dict(each) for each in choices]
    for title, code in BLOCKS:
        assert code.count("\n") < 30, title
        exec(code, {})
    yield
    for each, old in zip(choices, before, strict=True):
        each.clear()
        each.update(old)


def test_every_kind_is_shown():
    kinds = ["A compressor", "A selection", "A condition", "A stage", "A metric", "A reader"]
    assert [title for title, _ in BLOCKS] == kinds


def rolled_out(compressor: str, channels: tuple[int, ...], **cache):
    """A toy rollout of seven chunks: the model's cache after it."""
    model = toy_model(compressor=compressor, compressor_channels=channels)
    cache = toy_cache(model, toy_config(compressor, channels, **cache))
    noise = prompt_noise(0, ["a prompt"], [0])
    rollout = Rollout(model, cache, SamplerConfig(steps=[1000.0], shift=5.0), Prompts(toy_prompt()), noise)
    assert all(latents.isfinite().all() for _, latents in rollout.run(7))
    return cache


def test_the_compressor():
    report = rolled_out("patches", (1, 1)).report()  # latents of 3 x 8 x 12
    assert report["mid"]["tokens"] == 2 * 3 * 2 * 3
    latents = torch.randn(1, 4, 3, 8, 12, requires_grad=True)
    tokens = COMPRESSORS["patches"](4, [1, 1], 48)(latents)
    tokens[0, 7].sum().backward()  # frame 1, row 0, column 1
    changed = latents.grad.abs().sum((0, 1)).nonzero()
    assert tokens.shape == (1, 18, 48)
    assert changed.min(0).values.tolist() == [1, 0, 4] and changed.max(0).values.tolist() == [1, 3, 7]


def test_the_selection():
    assert SELECTIONS["spread"].choose(Candidates(range(3, 11), 4, 2, None, (0, 0, 0))).tolist() == [[3, 5, 7, 9]] * 2
    rolled_out("hr_spatial", (6, 8), selection="spread")


def test_the_condition(bundle):
    pipe = PackForcingPipeline.from_pretrained(bundle)
    whole = pipe("a red circle", num_frames=21, output_type="latent").frames
    again = pipe("a red circle", num_frames=21, output_type="latent", conditions={"opening": whole[:, :, :4]}).frames
    assert whole.shape[2] == 6 and torch.equal(whole, again)
    with pytest.raises(ConfigError, match="`conditions` is end: expected one of prompt, prompt_embeds, image, video"):
        pipe("a red circle", conditions={"end": whole})


def test_the_stage(tmp_path):
    root = write_world(tmp_path)
    stage = make_stage(root, "ar_robust", f"train.init_from={root}/bundle/transformer", "model.text_len=12")
    loss, logs = stage.loss("generator", stage.batch(0, [0, 1]), 0)
    loss.backward()
    assert stage.name == "ar_robust" and logs["huber"] == loss.item() > 0
    assert stage.transformer.proj_out.weight.grad.abs().max() > 0


def test_the_metric():
    frames = np.repeat(np.array([10, 30], np.uint8), 8)[:, None, None, None] * np.ones((1, 32, 48, 3), np.uint8)
    drift = METRICS["brightness_drift"]
    assert drift.unit == "levels" and drift.over_time(measure(frames, 8)) == pytest.approx([0, 20])


def test_the_reader():
    spec = replace(sample_spec(0, 2), diameter=0.34)
    frames = np.concatenate([render(replace(spec, diameter=d), seconds * FPS) for d, seconds in ((0.34, 5), (0.44, 1))])
    marks = score(read_seconds(frames, FPS), parse_caption(caption(spec)))
    assert accuracy(marks, False, range(5)) == {"size": 1.0} and accuracy(marks, False, range(5, 6)) == {"size": 0.0}
