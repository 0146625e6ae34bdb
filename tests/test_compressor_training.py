"""Every kind of compressor in training: gradient in DMD and through the cache, saved and loaded, started afresh."""

import pytest
import torch
from distill import gradients, make_stage
from dmd_by_hand import INDICES
from test_through_cache import Story, make, parts
from tiny import transformer

from model.causal_wan import CausalWanModel
from pipeline.train.roles import load_causal

TRAINED = ["hr_spatiotemporal", "dual", "dual_spatial"]
CASES = [f"kind={kind}" for kind in TRAINED] + ["kv=forward"]


@pytest.fixture(scope="module")
def root(root):
    """A generator without compressor."""
    transformer(compressor="identity").save_pretrained(root / "bundle" / "transformer")
    return root


def learnt(stage):
    found = gradients(stage.transformer.pack_compressor)
    assert found.keys() == dict(stage.transformer.pack_compressor.named_parameters()).keys()
    assert all(gradient.abs().max() > 0 for gradient in found.values())


@pytest.mark.parametrize("case", CASES)
def test_gradient_in_dmd(root, case):
    stage = make_stage(root, "dmd", f"cache.compressor.{case}")
    stage.loss("generator", stage.batch(0, INDICES), 0)[0].backward()
    learnt(stage)


@pytest.mark.parametrize("case", CASES)
def test_gradient_through_the_cache(root, case):
    stage = make(root, Story(5), f"cache.compressor.{case}")
    parts(stage, stage.batch(0, INDICES))
    learnt(stage)


def test_lr_has_nothing_to_train(root):
    """It is attended as it was committed, as history without gradient is."""
    stage = make_stage(root, "dmd", "cache.compressor.kind=lr")
    loss, logs = stage.loss("generator", stage.batch(0, INDICES), 0)
    loss.backward()
    assert logs["mid_tokens_attended"] > 0 and stage.parts("generator") == {}
    assert stage.transformer.patch_embedding.weight.grad.abs().max() > 0  # of the chunks themselves


@pytest.mark.parametrize("kind", TRAINED)
def test_saved_and_loaded(tmp_path, kind):
    model = transformer(compressor=kind)
    model.save_pretrained(tmp_path)
    loaded = CausalWanModel.from_pretrained(tmp_path)
    assert loaded.config.compressor == kind
    for (name, own), (other, again) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert name == other and torch.equal(own, again)
    convolutions = 2 if kind == "dual_spatial" else 3
    expected = {f"pack_compressor.net.{2 * i}.{part}" for i in range(convolutions + 1) for part in ("weight", "bias")}
    assert {name for name in loaded.state_dict() if "pack_compressor" in name} == expected


@pytest.mark.parametrize("kind", [*TRAINED, "lr"])
def test_initialised_where_the_weights_lack_it(tmp_path, caplog, kind):
    stored = transformer(compressor="identity")
    stored.save_pretrained(tmp_path)
    model = CausalWanModel.from_pretrained(tmp_path, compressor=kind)
    fresh = model.fresh_compressor("these weights")
    expected = stored.state_dict() | fresh
    assert model.state_dict().keys() == expected.keys() and bool(fresh) == (kind != "lr")
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert ("initialised at random" in caplog.text) == (kind != "lr")


@pytest.mark.parametrize(("kind", "kept"), [("dual_spatial", True), ("dual", False)])
def test_a_stage_takes_over_a_compressor_whole_or_not_at_all(tmp_path, kind, kept):
    stored = transformer(compressor="hr_spatial")
    stored.save_pretrained(tmp_path)
    loaded = load_causal(str(tmp_path), "train.init_from", compressor=kind).state_dict()
    for name, value in stored.state_dict().items():
        if "pack_compressor" not in name:
            assert torch.equal(loaded[name], value)
        elif name in loaded and loaded[name].shape == value.shape:
            assert torch.equal(loaded[name], value) == kept
