"""K, V kept in fewer bits than they are computed in: bfloat16, or 8 bits with a scale per token and head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from utils.registry import Registry


class Format(NamedTuple):
    dtype: torch.dtype
    largest: float | None = None  # code that the largest channel of a token and head gets; None: no scale


PRECISIONS: Registry[Format] = Registry("cache.mid_dtype")
PRECISIONS.register("bfloat16")(Format(torch.bfloat16))
PRECISIONS.register("fp8")(Format(torch.float8_e4m3fn, torch.finfo(torch.float8_e4m3fn).max))
PRECISIONS.register("int8")(Format(torch.int8, 127.0))


@dataclass
class Kept:
    """A tensor [..., heads, D] as codes and, for 8 bits, float32 scales [..., heads, 1]; `dtype`: what it was."""

    codes: torch.Tensor
    scales: torch.Tensor | None
    dtype: torch.dtype

    @classmethod
    def empty(cls, shape, dtype: torch.dtype, precision: str | None, device, pin: bool = False) -> Kept:
        """Room for a tensor of `shape` and `dtype`, kept in `precision` (None: as it is)."""
        format = Format(dtype) if precision is None else PRECISIONS[precision]
        options = {"device": device, "pin_memory": pin}
        scales = None if format.largest is None else torch.empty(*shape[:-1], 1, **options)
        return cls(torch.empty(*shape, dtype=format.dtype, **options), scales, dtype)

    def room(self, lead: Sequence[int], dropped: int, device: torch.device | None = None) -> Kept:
        """For tensors of the same kind, with `lead` in place of the first `dropped` dimensions."""
        new = (None if x is None else x.new_empty(*lead, *x.shape[dropped:], device=device or x.device)
               for x in (self.codes, self.scales))  # fmt: skip
        return Kept(*new, self.dtype)

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def _each(self, function) -> Kept:
        return Kept(function(self.codes), None if self.scales is None else function(self.scales), self.dtype)

    def __getitem__(self, index) -> Kept:
        """Of the leading dimensions."""
        return self._each(lambda x: x[index])

    def __setitem__(self, index, other: Kept) -> None:
        self.codes[index] = other.codes
        if self.scales is not None:
            self.scales[index] = other.scales

    def to(self, device: torch.device) -> Kept:
        return self._each(lambda x: x.to(device, non_blocking=True))

    def copy_(self, other: Kept) -> None:
        """Take the values of another of the same shape and precision."""
        self.codes.copy_(other.codes, non_blocking=True)
        if self.scales is not None:
            self.scales.copy_(other.scales, non_blocking=True)

    def restored(self) -> torch.Tensor:
        """[..., heads, D] in `dtype`."""
        return self.codes.to(self.dtype) if self.scales is None else (self.codes.float() * self.scales).to(self.dtype)


def keep(tensor: torch.Tensor, precision: str | None) -> Kept:
    """`tensor` [..., heads, D] in a precision of `PRECISIONS`; None: as it is."""
    if precision is None:
        return Kept(tensor, None, tensor.dtype)
    format = PRECISIONS[precision]
    if format.largest is None:
        return Kept(tensor.to(format.dtype), None, tensor.dtype)
    x = tensor.float()
    scales = x.abs().amax(-1, keepdim=True).clamp_min(1e-12) / format.largest
    codes = x / scales
    return Kept((codes.round() if format.dtype == torch.int8 else codes).to(format.dtype), scales, tensor.dtype)
