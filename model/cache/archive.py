"""Compressed chunks that wait to be attended again: a ring of rows, in host memory as a rule.

Shapes: B batch, N_c tokens of a compressed chunk, h scored heads, D head dim, k selected chunks.
"""

import logging
import os
from functools import lru_cache

import psutil
import torch

from model.cache.precision import Kept, keep
from model.sequence import Ranks
from utils.config import CacheConfig

log = logging.getLogger(__name__)

MOST_CHUNKS = 1024  # of an automatic capacity: 13 minutes at 12 frames a chunk and 16 a second
SHARE = 4  # an automatic capacity takes one part in this many of the memory


class Archive:
    """K, V of compressed chunks per layer, what selection scores them by, and what a trained compressor made them of.

    Args:
        config: `mid_capacity` chunks may be selected from, K, V in `mid_dtype`; they wait on `archive_device`.
        pending: further chunks that are kept, as they have not left the recent part yet.
        like: compressed K of a chunk [B, N_c, heads, D], of one of `layers` layers.
        ranks: that make the video, each with heads of its own; they select from the same chunks.
    """

    def __init__(self, config: CacheConfig, pending: int, layers: int, like: torch.Tensor, ranks: Ranks | None):
        self.device, self.layers = torch.device(config.archive_device), layers
        capacity, precision = config.mid_capacity, config.mid_dtype
        if capacity == "auto":
            capacity = auto_capacity(2 * layers * keep(like, precision).nbytes, self.device)
            capacity = capacity if ranks is None else min(ranks.from_all(capacity))
        self.capacity, self.size = capacity, None if capacity is None else capacity + pending
        self._shape, self._dtype, self._precision = like.shape[1:], like.dtype, precision
        self._kv: list[tuple[Kept, Kept]] = []  # per layer [B, rows, N_c, heads, D]
        self._means: torch.Tensor | None = None  # [layers, B, rows, h, D], float32, on the model's device
        self._seen: list[torch.Tensor] = []  # by the compressor: latents [B, rows, C, F, H, W], low_res likewise
        self._copied: torch.cuda.Event | None = None

    @property
    def rows(self) -> int:
        return self._kv[0][0].codes.shape[1] if self._kv else 0

    def row(self, number):
        """Row of the `number`-th chunk that was ever archived (an int, or a tensor of them)."""
        return number if self.size is None else number % self.size

    def write(self, number: int, mid: list[tuple[torch.Tensor, torch.Tensor]], means, seen: list[torch.Tensor]) -> None:
        """Take a chunk's compressed K (un-rotated) and V of every layer, its `means` [layers, B, h, D] or None, and
        what a trained compressor saw."""
        row, key = self.row(number), mid[0][0]
        if row >= self.rows:
            self._grow(row, key, seen, means)
        for kept, pair in zip(self._kv, mid, strict=True):
            for part, new in zip(kept, pair, strict=True):
                part[:, row].copy_(keep(new, self._precision))
        for stored, new in zip(self._seen, seen, strict=True):
            stored[:, row].copy_(new, non_blocking=True)
        if means is not None:
            self._means[:, :, row] = means
        if key.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()

    def _grow(self, row: int, key: torch.Tensor, seen: list[torch.Tensor], means: torch.Tensor | None) -> None:
        rows = max(16, 1 << row.bit_length())
        rows = rows if self.size is None else min(rows, self.size)
        batch, held, old = key.shape[0], self.rows, self._kv
        pin = key.is_cuda and self.device.type == "cpu"  # so that the way back is asynchronous

        def enlarged(tensor, shape, dim, **options):
            new = torch.zeros(*shape[:dim], rows, *shape[dim:], **options)
            if tensor is not None:
                new.narrow(dim, 0, tensor.shape[dim]).copy_(tensor)
            return new

        self._kv = [
            tuple(
                Kept.empty((batch, rows, *self._shape), self._dtype, self._precision, self.device, pin)
                for _ in range(2)
            )
            for _ in range(self.layers)
        ]
        for new_pair, old_pair in zip(self._kv, old, strict=False):
            for new_part, old_part in zip(new_pair, old_pair, strict=True):
                new_part[:, :held].copy_(old_part)
        self._seen = [
            enlarged(stored, new.shape, 1, dtype=new.dtype, device=self.device, pin_memory=pin)
            for stored, new in zip(self._seen or [None] * len(seen), seen, strict=True)
        ]
        if means is not None:
            self._means = enlarged(self._means, means.shape, 2, dtype=means.dtype, device=means.device)

    def means(self, layer: int) -> torch.Tensor:
        """Mean keys [B, rows, h, D] of a layer, in the order of the rows."""
        return self._means[layer]

    def gather(
        self, layer: int, part: int, samples: torch.Tensor, numbers: torch.Tensor, device: torch.device
    ) -> Kept:
        """K (part 0, un-rotated) or V (1) of `samples` [m] and their chunks `numbers` [m]: [m, N_c, heads, D]."""
        rows, kept = self._rows(numbers), self._kv[layer][part]
        if self.device.type == "cpu" and device.type != "cpu":
            return copied_in_runs(kept, samples.tolist(), rows.tolist(), device)
        return kept[samples.to(self.device), rows].to(device)

    def seen(self, numbers: torch.Tensor, device: torch.device) -> list[torch.Tensor]:
        """Clean latents [B, M, C, F, H, W] of the chunks `numbers` [M] and, where there are any, those of averaged
        pixels [B, M, C, f, h, w]."""
        return [stored[:, self._rows(numbers)].to(device) for stored in self._seen]

    def _rows(self, numbers: torch.Tensor) -> torch.Tensor:
        if self._copied is not None:
            self._copied.synchronize()
            self._copied = None
        return self.row(numbers).to(self.device)


def copied_in_runs(kept: Kept, samples: list[int], rows: list[int], device: torch.device) -> Kept:
    """`rows` [m] of `samples` [m] of `kept` [B, rows, ...] on another device [m, ...]: a copy for each run of
    neighbouring rows, and none in host memory, where gathering them would take longer than the way."""
    found, start = kept.room([len(rows)], 2, device), 0
    for end in range(1, len(rows) + 1):
        if end == len(rows) or (samples[end], rows[end]) != (samples[end - 1], rows[end - 1] + 1):
            found[start:end].copy_(kept[samples[start], rows[start] : rows[end - 1] + 1])
            start = end
    return found


def auto_capacity(chunk_bytes: int, device: torch.device) -> int:
    """Chunks that a share of the device's memory holds, that of the host divided among its processes; at most 1024."""
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = psutil.virtual_memory().total // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    chunks = max(1, min(MOST_CHUNKS, memory // SHARE // chunk_bytes))
    _say_once(chunks, chunks * chunk_bytes, device)
    return chunks


@lru_cache  # training makes a cache a step
def _say_once(chunks: int, size: int, device: torch.device) -> None:
    log.info(
        "cache.mid_capacity=auto: the last %d compressed chunks are kept for selection, at most %.2f GB in memory (%s)",
        chunks, size / 1e9, device,
    )  # fmt: skip
