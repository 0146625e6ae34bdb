"""The project's models on a fake GPU: built fake, with stand-ins for what needs values or a compiler."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from unittest import mock

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import UMT5EncoderModel

from model import attention, rope
from model.cache import selection
from model.cache.cache import PackCache
from model.causal_wan import CausalWanModel
from utils.choices import Offload
from utils.fakecuda.count import Counts, OnDevice
from utils.timing import timed


def forget_kept() -> None:
    """What the model keeps from run to run is of the run before, whose memory is forgotten: it is to be made again."""
    for kept in (attention.clip_mask, rope.chunk_rotation, rope._time_shift):
        kept.cache_clear()


@contextmanager
def on_fake_models(mode: OnDevice) -> Iterator[None]:
    """Models are built fake; what reads values of scores or compiles a mask has a stand-in."""
    kinds = CausalWanModel, WanTransformer3DModel, UMT5EncoderModel, AutoencoderKLWan
    replaced = [(kind, "__init__", _built_fake(kind.__init__, mode)) for kind in kinds]
    replaced += [
        (selection, "top_chunks", _last_chunks),
        (attention, "create_block_mask", _block_mask(mode.counts)),
        (attention, "_compiled_flex", _flex),
        (PackCache, "commit", timed("cache")(PackCache.commit)),
        (WanTransformer3DModel, "enable_group_offload", _offloaded(mode.counts)),
    ]
    with ExitStack() as stack:
        stack.callback(forget_kept)  # made of fake tensors
        for owner, name, value in replaced:
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


def _built_fake(init: Callable, mode: OnDevice) -> Callable:
    @wraps(init)
    def build(*args, **kwargs):
        with mode.building():
            init(*args, **kwargs)

    return build


def _last_chunks(scores: torch.Tensor, top_k: int) -> torch.Tensor:
    """Which chunks score best has no value here; the device's work is done."""
    if scores.is_cuda:
        scores.topk(top_k, dim=1).indices.sort(dim=1).values.cpu()
    return torch.arange(scores.shape[1] - top_k, scores.shape[1]).expand(scores.shape[0], -1)


def _block_mask(counts: Counts) -> Callable:
    def create(sees, batch, heads, queries, keys, **_):
        with unset_fake_temporarily():
            at = torch.arange(0, queries, max(1, queries // 2048))
            counts.density[queries, keys] = sees(None, None, at[:, None], at[None]).float().mean().item()
        return attention.BlockMask.from_kv_blocks(torch.ones(1, 1, 1, dtype=torch.int32),
                                                  torch.zeros(1, 1, 1, 1, dtype=torch.int32))  # fmt: skip

    return create


def _offloaded(counts: Counts) -> Callable:
    """diffusers' group offload as far as it is counted: two blocks at a time are on the device, all are copied there
    at every forward. Fake parameters cannot change their device."""

    def offload(model: WanTransformer3DModel, onload_device: torch.device, **_) -> None:
        blocks = [[p for p in block.parameters()] for block in model.blocks]
        for p in sum(blocks[2:], []):
            counts.discard(p)
        size = sum(p.nbytes for p in sum(blocks, []))
        model.register_forward_pre_hook(lambda *_: counts.communicated("host to device", size))

    return offload


class Residents:
    """Models of inference, and whose weights lie on the device (`inference.offload`): all; of `model` those that are
    asked for; of `group` two layers, the largest, of these, one at work and one on its way. Counts what comes there."""

    def __init__(self, counts: Counts, offload: Offload):
        self.counts, self.offload, self._coming = counts, offload, False
        self._models: dict[str, torch.nn.Module] = {}

    def add(self, name: str, model: torch.nn.Module, runs: torch.nn.Module | None = None) -> None:
        """`runs`: the part of the model that is called."""
        self._models[name], runs = model, runs or model
        size = sum(p.nbytes for p in runs.parameters())

        def came(*_) -> None:
            if self.offload == Offload.group or self._coming:
                self.counts.communicated("host to device", size)
                self._coming = False

        if self.offload != Offload.none:
            runs.register_forward_pre_hook(came)
        for leaf in _linears(model) if self.offload == Offload.group else ():
            leaf.forward = leaf.forward  # where a hook would stand, past which nothing may read the weights

    def forget(self, name: str) -> None:
        """The model is needed no more."""
        for leaf in _linears(self._models.pop(name)):
            vars(leaf).pop("forward", None)  # a circle, which would keep it

    def run(self, name: str, *others: str) -> None:
        """Model `name` is next to run; `others` are on the device still, where models are there as a whole."""
        if self.offload == Offload.none:
            return
        for known, model in self._models.items():
            for p in model.parameters():
                self.counts.discard(p)
            if self.offload == Offload.group and known == name:
                for leaf in sorted(_leaves(model), key=lambda leaf: -sum(p.nbytes for p in leaf.parameters()))[:2]:
                    for p in leaf.parameters():
                        self.counts.recall(p)
            elif self.offload == Offload.model and known in (name, *others):
                for p in model.parameters():
                    self.counts.recall(p)
        self._coming = True


def _leaves(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [module for module in model.modules() if not [*module.children()]]


def _linears(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [module for module in model.modules() if isinstance(module, torch.nn.Linear)]


def _flex() -> Callable:
    """Flex attention's cost is a flash kernel's over what the mask leaves."""
    return lambda q, k, v, block_mask: torch.nn.functional.scaled_dot_product_attention(q, k, v)
