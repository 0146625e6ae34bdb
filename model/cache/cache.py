"""The three-part KV cache: full-resolution sink, compressed and selected mid, full-resolution recent.

A chunk's history is fixed while it is generated: `PackCache.context()` gives one `ChunkContext` that every denoising
step, the commit forward and the training step of that chunk read, and only `PackCache.commit()` changes the cache.

Keys are kept un-rotated. What a layer attends lies in one workspace per layer,

    [ sink chunks | ring of recent + 1 chunks | selected mid chunks ]

in which the history is rotated once per chunk and the current chunk's K, V go to their ring slot at every forward, so
attention reads one contiguous prefix and nothing is concatenated. The order of keys does not matter to attention.

Positions (design of PackForcing section 3.4): the current chunk is at time 0, the history at negative times.
"""

import sys
import warnings
from dataclasses import dataclass

import torch

from model.block import ChunkKV
from model.cache.context import ChunkContext
from model.cache.selection import mean_rotated, sampled_queries
from model.causal_wan import CausalWanModel
from model.compressor import COMPRESSORS
from model.geometry import ChunkGeometry
from model.rope import Rotation, chunk_rotation, frame_times, grid_positions, grid_rotation
from utils.config import (
    CacheConfig,
    CacheKind,
    QueryScope,
    Selection,
    SizeUnit,
    Spatial,
    Temporal,
)

UNBOUNDED = sys.maxsize


@dataclass(frozen=True)
class CacheLayout:
    """Part sizes in chunks; `full` is a sink without end."""

    sink: int
    recent: int
    top_k: int

    @classmethod
    def of(cls, config: CacheConfig, geometry: ChunkGeometry) -> "CacheLayout":
        """Raises ValueError for sizes in frames that are not multiples of the chunk."""
        unit = geometry.frames if config.unit == SizeUnit.frames else 1
        for name, size in (("sink", config.sink), ("recent", config.recent)):
            if size % unit:
                raise ValueError(
                    f"cache.{name} is {size} frames: must be a multiple of the chunk, {unit} latent frames"
                )
        sink, recent = config.sink // unit, config.recent // unit
        return {
            CacheKind.pack: cls(sink, recent, config.top_k),
            CacheKind.sink: cls(sink, recent, 0),
            CacheKind.window: cls(0, recent, 0),
            CacheKind.full: cls(UNBOUNDED, 0, 0),
        }[config.kind]

    def slot(self, chunk: int) -> int:
        """Place of a full-resolution chunk in the workspace."""
        return chunk if chunk < self.sink else self.sink + (chunk - self.sink) % (self.recent + 1)

    def held(self, chunk: int) -> tuple[range, range]:
        """(sink, recent) chunk indices at full resolution while `chunk` is generated."""
        sink = min(chunk, self.sink)
        return range(sink), range(max(sink, chunk - self.recent), chunk)


@dataclass
class _Archived:
    """A chunk that aged out: per layer compressed, un-rotated K, V [B, N_c, heads, D], and its clean latents."""

    kv: list[tuple[torch.Tensor, torch.Tensor]]
    mean_keys: list[torch.Tensor] | None  # per layer [B, h, D], rotated at the chunk's own time 0
    latents: torch.Tensor


class _Layer:
    """Workspace of one layer and the raw keys behind it."""

    def __init__(self) -> None:
        self.raw_keys: dict[int, torch.Tensor] = {}  # slot -> [B, n, heads, D]
        self.starts: dict[int, float] = {}  # slot -> time its keys in the workspace are rotated to
        self.mean_queries: dict[int, torch.Tensor] = {}  # slot -> [B, h, D]
        self.placed: tuple[int, torch.Tensor] | None = None  # (chunk, ids [B, k]) that the mid part was rotated for
        self._raw_values: dict[int, torch.Tensor] = {}  # slot -> copy for a forward with gradient
        self.keys: torch.Tensor | None = None  # [B, capacity, heads, D]
        self.values: torch.Tensor | None = None

    def reserve(self, tokens: int, like: torch.Tensor) -> None:
        """Make the workspace hold at least `tokens`, keeping what is in it."""
        if self.keys is not None and self.keys.shape[1] >= tokens:
            return
        batch, _, heads, dim = like.shape
        old = self.keys, self.values
        self.keys, self.values = (like.new_empty(batch, tokens, heads, dim) for _ in range(2))
        if old[0] is not None:
            self.keys[:, : old[0].shape[1]], self.values[:, : old[1].shape[1]] = old

    def write(self, slot: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Take a finished chunk's un-rotated K and its V, [B, n, heads, D] each, in place of what the slot held."""
        tokens = key.shape[1]
        self.raw_keys[slot] = key
        self.values[:, slot * tokens : (slot + 1) * tokens] = value
        self.starts.pop(slot, None)  # to be rotated when it is first attended
        self._raw_values.pop(slot, None)

    def raw(self, slot: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Un-rotated K and V of a chunk, [B, n, heads, D] each, that outlive what is written to the slot later."""
        if slot not in self._raw_values:
            self._raw_values[slot] = self.values[:, slot * tokens : (slot + 1) * tokens].clone()
        return self.raw_keys[slot], self._raw_values[slot]


class PackCache:
    """History of one batch of videos.

    Args:
        config: sizes and policies.
        geometry: shape numbers of a chunk.
        head_dim: channels per attention head.
        trained_frames: latent frames seen in training; `fit` positions stay inside them.

    Raises:
        ValueError: sizes that do not fit the chunk; `fit` without room for a mid chunk.
    """

    def __init__(self, config: CacheConfig, geometry: ChunkGeometry, head_dim: int, trained_frames: int):
        self.config, self.geometry, self.head_dim, self.trained_frames = config, geometry, head_dim, trained_frames
        self.layout = CacheLayout.of(config, geometry)
        self.compressor = COMPRESSORS[config.compressor.kind]
        self.mid_grid = self.compressor.grid(geometry, config.compressor.channels)
        bounded = self.layout.sink != UNBOUNDED
        if config.temporal == Temporal.fit and bounded and self.fit_room < (1 if self.layout.top_k else 0):
            raise ValueError(
                f"cache.temporal=fit: sink {self.layout.sink} + recent {self.layout.recent} + the current chunk take "
                f"{trained_frames - self.fit_room} latent frames of the {trained_frames} trained ones, which leaves no "
                "room; make cache.sink or cache.recent smaller, or use cache.temporal=packed"
            )
        capacity = config.mid_capacity
        if self.layout.top_k and capacity is not None and capacity <= self.layout.top_k:
            warnings.warn(
                f"cache.mid_capacity={capacity} is not larger than cache.top_k={self.layout.top_k}: every archived "
                "chunk is attended and cache.selection has no effect; raise the capacity or leave it null",
                stacklevel=2,
            )
        self.reset()

    @classmethod
    def for_model(
        cls, model: CausalWanModel, config: CacheConfig, latent_height: int, latent_width: int, trained_frames: int
    ) -> "PackCache":
        """A cache for `model` at a latent size. Raises ValueError where the model lacks the compressor asked for."""
        has, wants = model.config.compressor, config.compressor.kind
        if config.kind == CacheKind.pack and config.top_k and COMPRESSORS[wants].trainable:
            stages = (has, list(model.config.compressor_channels)), (wants, list(config.compressor.channels))
            if stages[0] != stages[1]:
                raise ValueError(f"cache.compressor is {stages[1]}: the model was built with {stages[0]}")
        geometry = model.geometry(latent_height, latent_width)
        return cls(config, geometry, model.config.attention_head_dim, trained_frames)

    def reset(self) -> None:
        """Forget everything."""
        self.num_chunks = 0  # committed so far
        self.layers: list[_Layer] = []
        self.archive: dict[int, _Archived] = {}  # chunk index -> compressed chunk, in time order
        self._pending: dict[int, _Archived] = {}  # compressed form of the recent chunks
        self._mean_keys: list[torch.Tensor] = []  # per layer [B, rows, h, D]; row = chunk position modulo capacity
        self._last_selection: tuple[int, dict[int, torch.Tensor]] = (-1, {})  # chunk it was made for, per layer ids

    @property
    def fit_room(self) -> int:
        """Latent frames that `fit` leaves to the mid chunks."""
        return self.trained_frames - self.geometry.frames * (self.layout.sink + self.layout.recent + 1)

    @property
    def mid_tokens(self) -> int:
        """N_c."""
        frames, height, width = self.mid_grid
        return frames * height * width

    def context(self) -> ChunkContext:
        """The fixed history of the next chunk."""
        return ChunkContext(self)

    @torch.no_grad()
    def commit(self, kv: ChunkKV, context: ChunkContext) -> None:
        """Add the finished chunk of `context`.

        Raises:
            RuntimeError: where `context` is not that of the next chunk.
        """
        context.check_current()
        chunk, layout = self.num_chunks, self.layout
        if not self.layers:
            self.layers = [_Layer() for _ in kv.layers]
        slot = layout.slot(chunk)
        for layer, new in zip(self.layers, kv.layers, strict=True):
            layer.reserve(self._workspace_tokens(chunk), new.key)
            layer.write(slot, new.key.detach(), new.value.detach())
            if self._scores_recent:
                layer.mean_queries[slot] = self.mean_query(new.query)
        if context.will_be_compressed:
            self._pending[chunk] = self._compressed(kv)
        self._last_selection = context.selection_to_keep()
        self.num_chunks += 1
        self._age()

    def _workspace_tokens(self, chunk: int) -> int:
        """Tokens to reserve: everything where the cache is bounded, else doubling."""
        if self.layout.sink == UNBOUNDED:
            chunks = 1 << (chunk + 1).bit_length()  # room for the next chunk too
            return chunks * self.geometry.tokens
        slots = self.layout.sink + self.layout.recent + 1
        return slots * self.geometry.tokens + self.layout.top_k * self.mid_tokens

    @property
    def _scores_recent(self) -> bool:
        return (
            self.layout.top_k > 0
            and self.config.selection == Selection.query_score
            and self.config.query_scope == QueryScope.recent_and_current
        )

    def _compressed(self, kv: ChunkKV) -> _Archived:
        pairs = []
        for layer in kv.layers:
            identity = layer.mid_key is None
            pair = (layer.key, layer.value) if identity else (layer.mid_key, layer.mid_value)
            pairs.append(tuple(x.detach() for x in pair))
        means = None
        if self.config.selection == Selection.query_score:
            means = [mean_rotated(key, self._own_mid_rotation(key.device)) for key, _ in pairs]
        archived = [(self._to_archive(key), self._to_archive(value)) for key, value in pairs]
        return _Archived(archived, means, self._to_archive(kv.latents.detach()))

    def _to_archive(self, tensor: torch.Tensor) -> torch.Tensor:
        """Move to the archive's device; pinned host memory makes the way back asynchronous."""
        moved = tensor.to(self.config.archive_device)
        return moved.pin_memory() if tensor.is_cuda and moved.device.type == "cpu" else moved

    def _own_mid_rotation(self, device: torch.device) -> Rotation:
        frames = self.mid_grid[0]
        times = frame_times(0, self.geometry.frames, frames)
        return grid_rotation(times, *self.mid_axes(device), self.head_dim)

    def mid_axes(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Row and column positions of compressed tokens."""
        aligned = self.config.spatial == Spatial.aligned
        sizes = zip(self.mid_grid[1:], self.geometry.grid, strict=True)
        return tuple(grid_positions(small, full, aligned, device) for small, full in sizes)

    def mean_query(self, query: torch.Tensor) -> torch.Tensor:
        """query [B, n, heads, D] of a chunk -> mean of its sampled queries, rotated at its own time 0: [B, h, D]."""
        index = sampled_queries(query.shape[1], self.config.query_fraction, self.config.min_queries).to(query.device)
        rotation = chunk_rotation(self.geometry, 0.0, query.shape[-1], query.device)
        return mean_rotated(query[:, index], Rotation(rotation.cos[:, index], rotation.sin[:, index]))

    def _age(self) -> None:
        """Move chunks that left recent to the archive, and drop the oldest over capacity."""
        _, recent = self.layout.held(self.num_chunks)
        for chunk in [c for c in self._pending if c < recent.start]:
            self.archive[chunk] = self._pending.pop(chunk)
            self._store_mean_keys(chunk)
        while self.config.mid_capacity is not None and len(self.archive) > self.config.mid_capacity:
            del self.archive[next(iter(self.archive))]

    def _mean_row(self, chunk: int | torch.Tensor) -> int | torch.Tensor:
        index = chunk - self.layout.sink
        return index if self.config.mid_capacity is None else index % self.config.mid_capacity

    def _store_mean_keys(self, chunk: int) -> None:
        means = self.archive[chunk].mean_keys
        if means is None:
            return
        row = self._mean_row(chunk)
        if not self._mean_keys or row >= self._mean_keys[0].shape[1]:
            rows = 1 << (row + 1).bit_length()
            old = self._mean_keys
            self._mean_keys = [mean.new_zeros(mean.shape[0], rows, *mean.shape[1:]) for mean in means]
            for new, previous in zip(self._mean_keys, old, strict=False):
                new[:, : previous.shape[1]] = previous
        for store, mean in zip(self._mean_keys, means, strict=True):
            store[:, row] = mean

    def mean_keys(self, layer: int) -> torch.Tensor:
        """[B, M, h, D] of the archived chunks in time order."""
        rows = self._mean_row(torch.tensor(list(self.archive)))
        return self._mean_keys[layer][:, rows.to(self._mean_keys[layer].device)]

    def report(self) -> dict[str, dict[str, int]]:
        """Tokens (per layer and sample) and bytes (all layers, the whole batch) of each part for the next chunk.

        `sink`, `recent`, `mid` are what will be attended; `archive` is what waits on `archive_device` and
        `raw_keys` the un-rotated copies of the sink and recent keys, both beside the attended ones.
        """
        sink, recent = self.layout.held(self.num_chunks)
        selected = min(len(self.archive), self.layout.top_k)
        tokens = {
            "sink": len(sink) * self.geometry.tokens,
            "mid": selected * self.mid_tokens,
            "recent": len(recent) * self.geometry.tokens,
            "archive": len(self.archive) * self.mid_tokens,
        }
        per_token = sum(2 * layer.keys[:, :1].nbytes for layer in self.layers)
        parts = {name: {"tokens": count, "bytes": count * per_token} for name, count in tokens.items()}
        raw = sum(key.nbytes for layer in self.layers for key in layer.raw_keys.values())
        parts["raw_keys"] = {"tokens": 0, "bytes": raw}
        return parts
