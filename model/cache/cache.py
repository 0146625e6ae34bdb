"""The three-part KV cache: full-resolution sink, compressed and selected mid, full-resolution recent.

A chunk's history is fixed while it is generated: `PackCache.context()` gives one `ChunkContext` that every denoising
step, the commit forward and the training step of that chunk read, and only `PackCache.commit()` changes the cache.

What a layer attends lies rotated in its `Workspace`, what waits to be selected un-rotated in the `Archive`.
"""

import sys
import warnings
from dataclasses import dataclass, replace

import torch

from model.block import ChunkKV, SmallFrame
from model.cache.archive import Archive
from model.cache.context import ChunkContext
from model.cache.positions import POSITIONS, SPATIAL
from model.cache.precision import PRECISIONS, keep
from model.cache.selection import SELECTIONS, mean_rotated, sampled_queries
from model.cache.workspace import Buffers, PackedWorkspace, Workspace
from model.causal_wan import CausalWanModel
from model.compressor import COMPRESSORS
from model.geometry import ChunkGeometry
from model.rope import Rotation, chunk_rotation, frame_times, grid_rotation, precise, time_rotation
from utils.config import AtSwitch, CacheConfig, CacheKind, QueryScope, SizeUnit
from utils.registry import Registry

UNBOUNDED = sys.maxsize


@dataclass(frozen=True)
class CacheLayout:
    """Part sizes in chunks; `full` is a sink without end. `ring`: first chunk that went to the ring of recent ones."""

    sink: int
    recent: int
    top_k: int
    ring: int = 0

    @classmethod
    def of(cls, config: CacheConfig, geometry: ChunkGeometry) -> "CacheLayout":
        """Raises ValueError for sizes in frames that are not multiples of the chunk."""
        if config.kind == CacheKind.deep_forcing:  # counts in frames
            return cls(0, -(-(config.window or 0) // geometry.frames), 0)
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
        return chunk if chunk < self.sink else self.sink + (chunk - max(self.sink, self.ring)) % (self.recent + 1)

    def held(self, chunk: int) -> tuple[range, range]:
        """(sink, recent) chunk indices at full resolution while `chunk` is generated."""
        sink = min(chunk, self.sink)
        return range(sink), range(max(sink, min(chunk, self.ring), chunk - self.recent), chunk)


CACHES: Registry["type[PackCache]"] = Registry("cache.kind")


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
        if config.at_switch in (AtSwitch.recommit, AtSwitch.restart) and not self.layout.recent:
            switch = config.at_switch.value
            raise ValueError(f"cache.at_switch is {switch}: this cache has no recent part; set cache.recent")
        self.selection, self.positions = SELECTIONS[config.selection], POSITIONS[config.temporal]
        self.spatial = SPATIAL[config.spatial]
        for precision in (config.sink_dtype, config.mid_dtype):
            if precision is not None:
                PRECISIONS[precision]
        self.compressor = COMPRESSORS[config.compressor.kind]
        shape = geometry, config.compressor.channels
        self.mid_grid, self.pixel_pool = self.compressor.grid(*shape), self.compressor.pool(*shape)
        bounded = self.layout.sink != UNBOUNDED
        if config.temporal == "fit" and bounded and self.fit_room < (1 if self.layout.top_k else 0):
            raise ValueError(
                f"cache.temporal=fit: sink {self.layout.sink} + recent {self.layout.recent} + the current chunk take "
                f"{trained_frames - self.fit_room} latent frames of the {trained_frames} trained ones, which leaves no "
                "room; make cache.sink or cache.recent smaller, or use cache.temporal=packed"
            )
        capacity, top_k = config.mid_capacity, self.layout.top_k
        if top_k and isinstance(capacity, int) and capacity <= top_k:
            warnings.warn(
                f"cache.mid_capacity={capacity} is not larger than cache.top_k={top_k}: every archived "
                "chunk is attended and cache.selection has no effect; raise the capacity or leave it auto",
                stacklevel=2,
            )
        self.reset()

    @staticmethod
    def for_model(
        model: CausalWanModel, config: CacheConfig, latent_height: int, latent_width: int, trained_frames: int
    ) -> "PackCache":
        """A cache for `model` at a latent size. Raises ValueError where the model lacks the compressor asked for."""
        has, wants = model.config.compressor, config.compressor.kind
        if config.kind == CacheKind.pack and config.top_k and COMPRESSORS[wants].trainable:
            stages = (has, list(model.config.compressor_channels)), (wants, list(config.compressor.channels))
            if stages[0] != stages[1]:
                raise ValueError(f"cache.compressor is {stages[1]}: the model was built with {stages[0]}")
        geometry = model.geometry(latent_height, latent_width)
        return CACHES[config.kind](config, geometry, model.config.attention_head_dim, trained_frames)

    def reset(self) -> None:
        """Forget everything."""
        self.num_chunks = 0  # committed so far
        self.layout = replace(self.layout, ring=0)
        self.layers: list[Workspace] = []
        self.archive: Archive | None = None
        self.frames: dict[int, SmallFrame] = {}  # of chunks that a forward with gradient may compress again
        self._last_selection: tuple[int, dict[int, torch.Tensor]] = (-1, {})  # chunk it was made for, per layer ids

    def rewind(self, most: int) -> int:
        """Forget the recent chunks, `most` of them, to commit them again in order; returns how many these are.

        Each then sees sink, mid and those committed again before it: what was recent for it has left the ring.
        """
        _, recent = self.layout.held(self.num_chunks)
        recent = recent[max(0, len(recent) - most) :]
        self.num_chunks, self.layout = recent.start, replace(self.layout, ring=recent.start)
        self._last_selection = (-1, {})
        for workspace in self.layers:
            workspace.moved()
        return len(recent)

    @property
    def fit_room(self) -> int:
        """Latent frames that `fit` leaves to the mid chunks."""
        return self.trained_frames - self.geometry.frames * (self.layout.sink + self.layout.recent + 1)

    @property
    def needs_pixels(self) -> bool:
        """Whether chunks are compressed with a look at their decoded pixels."""
        return self.layout.top_k > 0 and self.compressor.needs_pixels

    @property
    def mid_tokens(self) -> int:
        """N_c."""
        frames, height, width = self.mid_grid
        return frames * height * width

    def context(self) -> ChunkContext:
        """The fixed history of the next chunk."""
        return ChunkContext(self)

    @property
    def archived(self) -> range:
        """Chunks that the next one may select from."""
        sink, recent = self.layout.held(self.num_chunks)
        if not self.layout.top_k or self.archive is None:
            return range(recent.start, recent.start)
        capacity = self.archive.capacity or UNBOUNDED
        return range(max(sink.stop, recent.start - capacity), recent.start)

    @torch.no_grad()
    def commit(self, kv: ChunkKV, context: ChunkContext) -> None:
        """Add the finished chunk of `context`.

        Raises:
            RuntimeError: where `context` is not that of the next chunk.
        """
        context.check_current()
        chunk, layout, device = self.num_chunks, self.layout, kv.layers[0].key.device
        if not self.layers:
            self.layers = self._workspaces(len(kv.layers))
        slot, rotation = layout.slot(chunk), context.query_rotation(device)
        for workspace, new in zip(self.layers, kv.layers, strict=True):
            workspace.write(slot, rotation(new.key), new.value, context.times.now)
            if self.scores_recent:
                workspace.mean_queries[slot] = self.mean_query(new.query, chunk)
        if context.will_be_compressed:
            self._archive(chunk, kv)
            if kv.frame is not None:
                self.frames[chunk] = kv.frame
        self._last_selection = context.selected_at, context.selection
        self.num_chunks += 1
        for chunk in [chunk for chunk in self.frames if chunk < self.archived.start]:
            del self.frames[chunk]

    def _workspaces(self, layers: int) -> list[Workspace]:
        layout, config, tokens = self.layout, self.config, self.geometry.tokens
        slots = None if layout.sink == UNBOUNDED else layout.sink + layout.recent + 1
        sizes = slots, tokens, layout.top_k * self.mid_tokens
        if config.sink_dtype is None and (config.mid_dtype is None or not layout.top_k):
            return [Workspace(*sizes) for _ in range(layers)]
        shared = Buffers()
        packed = {"buffers": shared, "sink": layout.sink, "precision": config.sink_dtype}
        return [PackedWorkspace(*sizes, **packed) for _ in range(layers)]

    def _archive(self, chunk: int, kv: ChunkKV) -> None:
        mid, means = [], None
        for layer in kv.layers:
            identity = layer.mid_key is None
            mid.append((layer.key, layer.value) if identity else (layer.mid_key, layer.mid_value))
        key = mid[0][0]
        if self.selection.by_query:
            own = self.mid_rotation(0.0, key.device)
            means = self._at_true_time(torch.stack([mean_rotated(key, own) for key, _ in mid]), chunk)
        if self.archive is None:
            config = self.config
            self.archive = Archive(
                config.mid_capacity, self.layout.recent, len(mid), key, config.archive_device, config.mid_dtype
            )
        self.archive.write(chunk - self.layout.sink, kv, mid, means)

    @property
    def scores_recent(self) -> bool:
        """Whether the queries of recent chunks are scored beside the current one's."""
        both = self.config.query_scope == QueryScope.recent_and_current
        return self.layout.top_k > 0 and self.selection.by_query and both

    def mid_rotation(self, start: float, device: torch.device) -> Rotation:
        """Rotation of a compressed chunk that spans what the chunk does, from `start` on."""
        times = frame_times(start, self.geometry.frames, self.mid_grid[0])
        return grid_rotation(times, *self.mid_axes(device), self.head_dim)

    def _at_true_time(self, means: torch.Tensor, chunk: int) -> torch.Tensor:
        """Means [..., h, D] of tokens rotated at their chunk's time 0 -> as if rotated at the chunk's true time."""
        start = torch.tensor([float(chunk * self.geometry.frames)], dtype=precise(means.device), device=means.device)
        return time_rotation(start, self.head_dim)(means.flatten(0, -3)[:, None]).view_as(means)

    def mid_axes(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Row and column positions of compressed tokens."""
        sizes = zip(self.mid_grid[1:], self.geometry.grid, strict=True)
        return tuple(self.spatial(small, full, device=device) for small, full in sizes)

    def mean_query(self, query: torch.Tensor, chunk: int) -> torch.Tensor:
        """query [B, n, heads, D] of a chunk -> mean of its sampled queries, rotated at its true time: [B, h, D]."""
        index = sampled_queries(query.shape[1], self.config.query_fraction, self.config.min_queries).to(query.device)
        rotation = chunk_rotation(self.geometry, 0.0, query.shape[-1], query.device)
        mean = mean_rotated(query[:, index], Rotation(rotation.cos[:, index], rotation.sin[:, index]))
        return self._at_true_time(mean, chunk)

    def report(self) -> dict[str, dict[str, int]]:
        """Tokens (per layer and sample) and bytes (all layers, the whole batch) of each part for the next chunk.

        `sink`, `recent`, `mid` are what will be attended; `archive` is what waits on `archive_device`.
        """
        (sink, recent), config = self.layout.held(self.num_chunks), self.config
        parts = {
            "sink": (len(sink) * self.geometry.tokens, config.sink_dtype),
            "mid": (min(len(self.archived), self.layout.top_k) * self.mid_tokens, config.mid_dtype),
            "recent": (len(recent) * self.geometry.tokens, None),
            "archive": (len(self.archived) * self.mid_tokens, config.mid_dtype),
        }
        return {
            name: {"tokens": tokens, "bytes": tokens and tokens * self._token_bytes(precision)}
            for name, (tokens, precision) in parts.items()
        }

    def _token_bytes(self, precision: str | None) -> int:
        return 2 * len(self.layers) * keep(self.layers[0].keys[:, :1], precision).nbytes


for _kind in (CacheKind.pack, CacheKind.full, CacheKind.window, CacheKind.sink):
    CACHES.register(_kind)(PackCache)
