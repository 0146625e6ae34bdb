"""Devices that are not there are named in a line; those without float64 are not asked for it."""

from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from toy import LATENT, TEXT_DIM, toy_config, toy_model

from model import rope
from model.cache import selection
from model.cache.cache import PackCache
from pipeline.generate.inference import resolve_runtime
from pipeline.generate.inputs import Prompts
from pipeline.generate.rollout import Rollout
from utils.config import Config, ConfigError, InferenceConfig, SamplerConfig


@pytest.mark.parametrize("name", ["mps", "xpu", "cuda:99", "meta", "tpu9"])
def test_an_absent_device_is_one_line(name):
    with pytest.raises(ConfigError, match=f"`inference.device` is {name}: ") as error:
        resolve_runtime(Config(inference=InferenceConfig(device=name)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "cpu, dtype", [("amx_bf16", torch.bfloat16), ("avx512_bf16", torch.bfloat16), ("avx2", torch.float32)]
)
def test_bfloat16_where_the_cpu_has_instructions_for_it(cpu, dtype, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {cpu: True})
    assert resolve_runtime(Config(inference=InferenceConfig(device="cpu"))).dtype == dtype


class NoFloat64(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            wide = isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float64
            assert not (wide and tensor.device.type == "meta"), f"{function}: float64 on the device"
        return out


@pytest.mark.parametrize(
    "kind, cache",
    [
        ("few_step", {}),
        ("few_step", {"query_scope": "recent+current", "temporal": "absolute"}),
        ("euler", {"temporal": "fit"}),
    ],
)
def test_no_float64_on_a_device_without_it(kind, cache, monkeypatch):
    """The meta device plays one: it runs no kernel, but every operation names its dtype."""
    monkeypatch.setattr(rope, "WITHOUT_FLOAT64", {"meta"})
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # meta has none
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    monkeypatch.setattr(selection, "top_chunks", lambda scores, top_k: torch.arange(top_k)[None])  # no values there
    model = toy_model().to("meta")
    config = toy_config( archive_device="meta", **cache)
    sampler = SamplerConfig(kind=kind, num_steps=2, steps=[1000.0, 500.0], shift=5.0)
    embeds = torch.empty(1, 5, TEXT_DIM, device="meta")

    def noise(chunk, step, shape):
        return torch.empty(1, *shape, device="meta")

    with NoFloat64():
        cache = PackCache.for_model(model, config, *LATENT, trained_frames=21)
        rollout = Rollout(model, cache, sampler, Prompts(embeds, None), noise, device=torch.device("meta"))
        assert len(list(rollout.run(6))) == 6
