"""A CUDA device that computes nothing, for code that counts (`utils/fakecuda/count.py`) what a GPU would do.

    ensure("scripts.estimate", argv)  # CPU builds of torch: start anew with a device guard
    with fake_device(Counts(parts), world_size) as mode: ...

What is replaced: streams and events, collectives of a fake process group, SDPA and RMS norm by the kernels that CUDA
would choose, and what cannot be read from a fake tensor.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from unittest import mock

import torch
import torch._dynamo  # noqa: F401 - before torch.cuda is pretended
import torch.distributed as dist
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from utils.fakecuda.count import Counts, OnDevice

aten = torch.ops.aten
STARTED = "PACKFORCING_FAKE_CUDA"


def ensure(module: str, argv: list[str]) -> None:
    """Where torch was built without CUDA: compile the shim (once, cached as torch's extensions are) and run
    `python -m module argv` in this process's place with it loaded first; torch asks for it as it is imported."""
    if torch.version.cuda is not None or STARTED in os.environ:
        os.environ.pop("LD_PRELOAD", None)
        return
    from torch.utils.cpp_extension import TORCH_LIB_PATH, load

    folder = Path(torch.utils.cpp_extension._get_build_directory("packforcing_fakecuda", verbose=False))
    os.environ["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))  # ninja of the venv
    load("packforcing_fakecuda", [str(Path(__file__).with_name("shim.cpp"))], extra_cflags=["-O0"],
         extra_ldflags=[f"-Wl,-rpath,{TORCH_LIB_PATH}"], is_python_module=False)  # fmt: skip
    library = next(folder.glob("*.so"))
    os.execve(sys.executable, [sys.executable, "-m", module, *argv],
              os.environ | {"LD_PRELOAD": str(library), STARTED: "1"})  # fmt: skip


class _Nothing:
    """A stream or an event."""

    device = torch.device("cuda:0")

    def __init__(self, *args, **kwargs):
        pass

    def __getattr__(self, name):
        return lambda *args, **kwargs: None

    def record_event(self, *args):
        return _Nothing()

    def __eq__(self, other):
        return isinstance(other, _Nothing)

    __hash__ = object.__hash__


@contextmanager
def fake_device(counts: Counts, world_size: int) -> Iterator[OnDevice]:
    """Inside, `cuda:0` is fake and `world_size` ranks seem to be there, of which this is the first."""
    mode = OnDevice(counts)
    with ExitStack() as stack:
        for owner, name, value in _replacements(counts):
            stack.enter_context(mock.patch.object(owner, name, value))
        if world_size > 1:
            dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
            stack.callback(dist.destroy_process_group)
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(counts)
        stack.enter_context(mode)
        yield mode


def _replacements(counts: Counts) -> Iterator[tuple[object, str, object]]:
    cuda, random = torch.cuda, torch.zeros(16, dtype=torch.uint8)

    def gives(value: object) -> Callable:
        return lambda *args, **kwargs: value

    yield from ((cuda, name, _Nothing) for name in ("Stream", "Event"))
    for names, value in {
        ("current_stream", "default_stream"): _Nothing(),
        ("stream", "device"): nullcontext(),
        ("current_device",): 0,
        ("device_count",): 8,
        ("is_initialized", "is_bf16_supported"): True,
        ("set_device", "synchronize", "empty_cache", "manual_seed", "manual_seed_all", "set_rng_state"): None,
        ("get_device_capability",): (9, 0),
        ("get_device_name",): "a fake GPU",
        ("get_rng_state",): random,
    }.items():
        yield from ((cuda, name, gives(value)) for name in names)
    yield cuda, "max_memory_allocated", lambda *args, **kwargs: counts.peak
    yield cuda.amp.common, "amp_definitely_not_available", gives(False)

    def collective(kind: str, sized_by: int, keyword: str) -> Callable:
        def run(*args, **kwargs):
            tensor = args[sized_by] if len(args) > sized_by else kwargs[keyword]
            counts.communicated(kind, tensor.nbytes)

        return run

    for name in ("all_gather_single", "all_gather_into_tensor"):
        if hasattr(dist, name):
            yield dist, name, collective("all_gather", 0, "output")
    for name in ("reduce_scatter_single", "reduce_scatter_tensor"):
        if hasattr(dist, name):
            yield dist, name, collective("reduce_scatter", 1, "input")
    yield dist, "all_reduce", collective("all_reduce", 0, "tensor")
    yield from ((dist, name, gives(None)) for name in ("barrier", "new_group"))
    yield dist, "broadcast_object_list", gives(None)
    yield dist, "all_gather_object", lambda items, item, group=None: items.__setitem__(slice(None), [item] * len(items))

    def tolist(tensor: torch.Tensor):
        if not isinstance(tensor, FakeTensor):
            return real_tolist(tensor)
        counts.synchronised(tensor)  # what is read is for logs

        def nest(shape):
            return 1.0 if not shape else [nest(shape[1:]) for _ in range(shape[0])]

        return nest(tuple(tensor.shape))

    def resize(storage, size):
        result = real_resize(storage, size)
        counts.resized(storage)
        return result

    real_tolist, real_resize = torch.Tensor.tolist, torch.UntypedStorage.resize_
    yield torch.Tensor, "pin_memory", lambda tensor, *_: tensor
    yield torch.Tensor, "tolist", tolist
    yield torch.UntypedStorage, "resize_", resize
    yield torch.nn.Module, "_apply", _apply
    yield F, "scaled_dot_product_attention", _attend
    yield F, "rms_norm", _rms_norm


def _apply(module: torch.nn.Module, fn: Callable, recurse: bool = True) -> torch.nn.Module:
    """`nn.Module._apply` swaps parameters in place, which weak references to fake ones forbid: put new ones there."""
    for child in module.children() if recurse else ():
        child._apply(fn)
    for name, p in module._parameters.items():
        if p is not None and (new := fn(p)) is not p:
            module._parameters[name] = torch.nn.Parameter(new.detach(), p.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = fn(buffer)
    return module


def _rms_norm(x, shape, weight=None, eps=None):
    """CUDA builds have one kernel for it, where CPU builds take six; a layer norm moves as many bytes."""
    if torch.is_autocast_enabled("cuda") and x.is_cuda:
        x, weight = x.float(), weight.float()
    return real_rms_norm(x, shape, weight, eps) if x.dtype != weight.dtype else F.layer_norm(x, shape, weight, eps=eps)


real_rms_norm = F.rms_norm


def _attend(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """As CUDA would: autocast's cast, then a flash kernel for half precision; else the memory-efficient one."""
    if torch.is_autocast_enabled("cuda") and query.is_cuda:
        half = torch.get_autocast_dtype("cuda")
        query, key, value = (x.to(half) if x.dtype == torch.float32 else x for x in (query, key, value))
    kinds = {query.dtype, key.dtype, value.dtype}
    if len(kinds) > 1:
        raise RuntimeError(f"scaled_dot_product_attention: query, key and value are of {kinds}")
    if query.dtype in (torch.bfloat16, torch.float16) and attn_mask is None:
        flash = aten._scaled_dot_product_flash_attention
        return flash(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    bias = None if attn_mask is None else attn_mask.to(query.dtype).expand(*query.shape[:-1], key.shape[-2])
    efficient = aten._scaled_dot_product_efficient_attention
    return efficient(query, key, value, bias, query.requires_grad, dropout_p, is_causal, scale=scale)[0]
