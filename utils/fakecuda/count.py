"""What code does on a fake CUDA device, counted: live bytes by part, FLOPs, bytes that other operations move,
collectives and host synchronisations.

Memory is that of live storages, each rounded up as the caching allocator does: no fragmentation, library workspaces,
NCCL buffers or CUDA context.
"""

import weakref
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod

import torch
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, register_flop_formula

from utils.timing import Stopwatch

aten = torch.ops.aten
BLOCK = 512  # bytes that the caching allocator rounds up to
SECTOR = 32  # bytes, the least that a GPU moves from or to its memory
MATMULS = (aten.mm, aten.addmm, aten._addmm_activation, aten.bmm, aten.baddbmm, aten.convolution)
FREE = {  # moves nothing
    aten.view, aten._unsafe_view, aten.transpose, aten.t, aten.expand, aten.slice, aten.select, aten.unsqueeze,
    aten.squeeze, aten.split, aten.split_with_sizes, aten.permute, aten.detach, aten.alias, aten.unbind, aten.narrow,
    aten.as_strided, aten.view_as_real, aten.view_as_complex, aten.unfold, aten.resize_, aten.empty, aten.empty_like,
    aten.empty_strided, aten.new_empty,
}  # fmt: skip
if aten._addmm_activation not in flop_registry:
    register_flop_formula(aten._addmm_activation, get_raw=True)(flop_registry[aten.addmm])
OVERWRITES = {aten.copy_, aten.fill_, aten.zero_}  # do not read what they write to
GATHERS = {aten.index, aten.index_select, aten.embedding, aten.gather}  # read as much of the first as they give
SCATTERS = {aten.index_put_, aten.index_copy_}  # write as much of the first as the last holds
WAITED = "waited for"  # of collectives that nothing overlaps with


class Counts(Stopwatch):
    """Counts by part, the code's own (`utils.timing.part`): a label is `role/part`, of the innermost part that has a
    name in `parts`; what was allocated under a label stays its own until it is freed."""

    def __init__(self, parts: set[str]):
        super().__init__(torch.device("cpu"))
        self.parts, self.labels = parts, ["other"]
        self._storages: dict[int, list] = {}  # storage -> [device type, bytes, label]
        self.now = self.peak = self.host = 0
        self.by_label: Counter = Counter()
        self.density: dict[tuple[int, int], float] = {}  # (queries, keys) -> share that a mask leaves
        self.new_phase()

    def new_phase(self) -> None:
        """Forget all counts but what is allocated."""
        self.peak = self.now
        # What was allocated, by label, at the highest point while each label was the current one.
        self.highest: dict[str, tuple[int, dict[str, int]]] = {}
        self.flops = {"matmul": Counter(), "attention": Counter()}  # kind -> label -> FLOPs
        self.moved, self.by_operation = Counter(), Counter()  # bytes by label, by operation
        self.comm: dict[str, list[int]] = defaultdict(lambda: [0, 0])  # kind -> [calls, bytes]
        self.syncs: Counter = Counter()

    def forget(self) -> None:
        """Forget all memory too: what comes next is another run."""
        self._storages, self.now, self.host, self.by_label = {}, 0, 0, Counter()
        self.new_phase()

    @property
    def label(self) -> str:
        return self.labels[-1]

    def _begin(self, name: str, tokens: int) -> None:
        role = self.label.split("/")[0]
        if name in ("critic", "generator") and role not in ("critic", "generator"):
            role, name = name, "other"
        in_role = role in ("critic", "generator")
        known = f"{role}/{name}" if in_role else name
        self.labels.append(known if name in self.parts or name == "other" else self.label)

    def _end(self) -> None:
        self.labels.pop()

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._storages:
            size = _rounded(storage.nbytes())
            self._storages[key] = [tensor.device.type, size, self.label]
            weakref.finalize(storage, self._remove, key)
            self._change(tensor.device.type, size, self.label)

    def _remove(self, key: int) -> None:
        if key in self._storages:
            kind, size, label = self._storages.pop(key)
            self._change(kind, -size, label)

    def discard(self, tensor: torch.Tensor) -> None:
        """Count a tensor's memory as free: it lies elsewhere, its views too."""
        kind, size, label = self._storages[key := tensor.untyped_storage()._cdata]
        self._storages[key] = [kind, 0, label]
        self._change(kind, -size, label)

    def recall(self, tensor: torch.Tensor) -> None:
        """Count the memory of a discarded tensor again: it is back."""
        self.resized(tensor.untyped_storage())

    def communicated(self, kind: str, size: int) -> None:
        self.comm[kind][0] += 1
        self.comm[kind][1] += size

    def resized(self, storage: torch.UntypedStorage) -> None:
        if (entry := self._storages.get(storage._cdata)) is not None:
            size = _rounded(storage.nbytes())
            self._change(entry[0], size - entry[1], entry[2])
            entry[1] = size

    def _change(self, kind: str, size: int, label: str) -> None:
        if kind != "cuda":
            self.host += size
            return
        self.now += size
        self.by_label[label] += size
        self.peak = max(self.peak, self.now)
        if size > 0 and self.now > self.highest.get(self.label, (0,))[0]:
            self.highest[self.label] = self.now, dict(self.by_label)

    def synchronised(self, tensor: torch.Tensor) -> None:
        self.syncs[self.label] += tensor.is_cuda

    def operation(self, packet, args: tuple, kwargs: dict, inputs: list, outputs: list, out) -> None:
        """One operation with inputs and outputs on the fake device."""
        if "_c10d_functional" in str(packet):  # a sequence's tokens and heads on their way
            if packet.__name__ != "wait_tensor":
                self.communicated(f"{packet.__name__}, {WAITED}", sum(x.nbytes for x in outputs))
        elif packet in flop_registry:
            name = packet.__name__
            kind = "attention" if "attention" in name else "matmul"
            flops = flop_registry[packet](*args, **kwargs, out_val=out)
            if kind == "attention":
                query, key = args[1:3] if "backward" in name else args[:2]
                flops *= self.density.get((query.shape[-2], key.shape[-2]), 1)
            self.flops[kind][self.label] += flops
        else:
            unread = args[0] if packet in OVERWRITES | GATHERS | SCATTERS else kwargs.get("out")
            inputs = [x for x in inputs if x is not unread]
            outputs = inputs[-1:] if packet in SCATTERS else outputs
            size = sum(map(_covered, [*inputs, *outputs])) + sum(map(_covered, outputs)) * (packet in GATHERS)
            self.moved[self.label] += size
            self.by_operation[packet.__name__] += size


def _covered(tensor: torch.Tensor) -> int:
    """Bytes of memory that a tensor covers, each once. A device moves whole sectors: every second number of a row takes
    as much as the row."""
    axes = zip(tensor.shape, tensor.stride(), strict=True)
    axes = [(size, stride) for size, stride in axes if stride and size != 1]
    width, step = tensor.element_size(), min((stride for _, stride in axes), default=1)
    return prod(size for size, _ in axes) * max(width, min(step * width, SECTOR))


def _rounded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


class OnDevice(TorchDispatchMode):
    """Under a `FakeTensorMode`: small CPU tensors stay real (indices, noise, keyed randomness), so that what the code
    decides by value is decided as in a run; everything on the device is fake, and counted. `whole`: so is what is made
    on the CPU."""

    def __init__(self, counts: Counts):
        super().__init__()
        self.counts, self.whole = counts, False

    @contextmanager
    def building(self) -> Iterator[None]:
        """Models are made straight on the device: a fake parameter cannot change its device in place."""
        before, self.whole = self.whole, True
        try:
            with torch.device("cuda", 0):
                yield
        finally:
            self.whole = before

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        leaves = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        packet, sharded = func._overloadpacket, any(isinstance(x, DTensor) for x in leaves)
        if not sharded:
            fake = any(isinstance(x, FakeTensor) for x in leaves)
            if fake and packet is aten._local_scalar_dense:
                self.counts.synchronised(leaves[0])
                return {torch.bool: True}.get(leaves[0].dtype, 1.0 if leaves[0].dtype.is_floating_point else 1)
            device = kwargs.get("device")
            device = None if device is None else torch.device(device).type
            pinned = kwargs.pop("pin_memory", False)
            if not (fake or pinned or device == "cuda" or (self.whole and device != "meta")):
                with unset_fake_temporarily():
                    return func(*args, **kwargs)
            if fake and device == "cpu" and packet is aten._to_copy:
                self.counts.synchronised(next((x for x in leaves if x.is_cuda), leaves[0]))
        if packet in MATMULS and len({x.dtype for x in leaves}) > 1:  # kernels refuse a mixture, fake ones do not
            raise RuntimeError(f"{func}: operands of {[(tuple(x.shape), x.dtype) for x in leaves]}")
        out = func(*args, **kwargs)
        found = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        local = [x._local_tensor if isinstance(x, DTensor) else x for x in found]
        local = [x for x in local if isinstance(x, FakeTensor)]
        for tensor in local:
            self.counts.add(tensor)
        if not sharded and any(x.is_cuda for x in local) and packet not in FREE and not func.is_view:
            inputs = [x for x in leaves if isinstance(x, FakeTensor)]
            self.counts.operation(packet, args, kwargs, inputs, local, out)
        return out
