"""What a cache holds, and the numbers that follow from its settings: read by contexts, changed by commits."""

import sys
import warnings
from dataclasses import dataclass, replace

import torch

from model.cache.archive import Archive
from model.cache.positions import POSITIONS, SPATIAL
from model.cache.precision import PRECISIONS
from model.cache.selection import SELECTIONS, mean_rotated, sampled_queries, scored_heads
from model.cache.workspace import Workspace
from model.compressor import COMPRESSORS
from model.geometry import ChunkGeometry
from model.kv import SmallFrame
from model.rope import Rotation, chunk_rotation, frame_times, grid_rotation, precise, time_rotation
from model.sequence import Ranks
from utils.choices import AtSwitch, CacheKind, MidSpan, QueryScope, SizeUnit
from utils.config import CacheConfig, ConfigError

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
        """Raises `ConfigError` for sizes in frames that are not multiples of the chunk."""
        if config.kind == CacheKind.deep_forcing:  # counts in frames
            return cls(0, -(-(config.window or 0) // geometry.frames), 0)
        unit = geometry.frames if config.unit == SizeUnit.frames else 1
        for name, size in (("sink", config.sink), ("recent", config.recent)):
            if size % unit:
                raise ConfigError(
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


class CacheState:
    """Everything about one batch of videos that outlives a chunk.

    Args:
        config: sizes and policies.
        geometry: shape numbers of a chunk.
        head_dim: channels per attention head.
        trained_frames: latent frames seen in training; `fit` positions stay inside them.
        ranks: that make the videos together; the cache holds the heads of this one.

    Raises `ConfigError` for sizes that do not fit the chunk, or `fit` without room for a mid chunk.
    """

    def __init__(
        self, config: CacheConfig, geometry: ChunkGeometry, head_dim: int, trained_frames: int,
        ranks: Ranks | None = None,
    ):  # fmt: skip
        self.config, self.geometry, self.head_dim, self.trained_frames = config, geometry, head_dim, trained_frames
        self.ranks = ranks
        self.layout = CacheLayout.of(config, geometry)
        if config.at_switch in (AtSwitch.recommit, AtSwitch.restart) and not self.layout.recent:
            switch = config.at_switch.value
            raise ConfigError(f"cache.at_switch is {switch}: this cache has no recent part; set cache.recent")
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
            raise ConfigError(
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

    def reset(self) -> None:
        """Forget everything."""
        self.num_chunks = 0  # committed so far
        self.layout = replace(self.layout, ring=0)
        self.layers: list[Workspace] = []
        self.archive: Archive | None = None
        self.frames: dict[int, SmallFrame] = {}  # of chunks that a forward with gradient may compress again
        self._last_selection: tuple[int, dict[int, torch.Tensor]] = (-1, {})  # chunk it was made for, per layer ids

    @property
    def fit_room(self) -> int:
        """Latent frames that `fit` leaves to the mid chunks."""
        return self.trained_frames - self.geometry.frames * (self.layout.sink + self.layout.recent + 1)

    @property
    def mid_span(self) -> float:
        """Latent frames that a mid chunk takes where nothing shrinks it."""
        compressed = self.config.temporal == "packed" and self.config.mid_span == MidSpan.compressed
        return float(self.mid_grid[0] if compressed else self.geometry.frames)

    @property
    def packed_span(self) -> float | None:
        """Latent frames that a chunk and all of its history take at packed positions; None for other caches."""
        layout, other = self.layout, (CacheKind.full, CacheKind.deep_forcing)
        if self.config.temporal != "packed" or self.config.kind in other:
            return None
        return self.geometry.frames * (layout.sink + layout.recent + 1) + layout.top_k * self.mid_span

    @property
    def needs_pixels(self) -> bool:
        """Whether chunks are compressed with a look at their decoded pixels."""
        return self.layout.top_k > 0 and self.compressor.needs_pixels

    @property
    def packs(self) -> bool:
        """Whether sink or mid is kept in fewer bits than it is attended in."""
        return self.config.sink_dtype is not None or (self.layout.top_k > 0 and self.config.mid_dtype is not None)

    @property
    def mid_tokens(self) -> int:
        """N_c."""
        frames, height, width = self.mid_grid
        return frames * height * width

    @property
    def archived(self) -> range:
        """Chunks that the next one may select from."""
        sink, recent = self.layout.held(self.num_chunks)
        if not self.layout.top_k or self.archive is None:
            return range(recent.start, recent.start)
        capacity = self.archive.capacity or UNBOUNDED
        return range(max(sink.stop, recent.start - capacity), recent.start)

    @property
    def scores_recent(self) -> bool:
        """Whether the queries of recent chunks are scored beside the current one's."""
        both = self.config.query_scope == QueryScope.recent_and_current
        return self.layout.top_k > 0 and self.selection.by_query and both

    def mid_rotation(self, start: float, device: torch.device) -> Rotation:
        """Rotation of a compressed chunk that spans what the chunk does, from `start` on."""
        times = frame_times(start, self.geometry.frames, self.mid_grid[0])
        return grid_rotation(times, *self.mid_axes(device), self.head_dim)

    def mid_axes(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Row and column positions of compressed tokens."""
        sizes = zip(self.mid_grid[1:], self.geometry.grid, strict=True)
        return tuple(self.spatial(small, full, device=device) for small, full in sizes)

    def mean_query(self, query: torch.Tensor, chunk: int) -> torch.Tensor:
        """query [B, n, heads, D] of a chunk -> mean of its sampled queries, rotated at its true time: [B, h, D]."""
        index = sampled_queries(query.shape[1], self.config.query_fraction, self.config.min_queries).to(query.device)
        rotation = chunk_rotation(self.geometry, 0.0, query.shape[-1], query.device)
        means = self.scored_means([query[:, index]], Rotation(rotation.cos[:, index], rotation.sin[:, index]))
        return self._at_true_time(means[0], chunk)

    def scored_means(self, tokens: list[torch.Tensor], rotation: Rotation) -> torch.Tensor:
        """Means over tokens [B, n, heads, D] each, rotated, of the heads that are scored: float32 [N, B, h, D]. Where
        ranks hold heads of their own all of them get all means, so that each scores and selects as one alone would."""
        heads, ranks = tokens[0].shape[2], self.ranks
        scored = scored_heads(heads) if ranks is None else heads
        means = torch.stack([mean_rotated(each, rotation, scored) for each in tokens])
        if ranks is None:
            return means
        return ranks.gathered(means, 2)[:, :, : scored_heads(heads * ranks.size)]

    def _at_true_time(self, means: torch.Tensor, chunk: int) -> torch.Tensor:
        """Means [..., h, D] of tokens rotated at their chunk's time 0 -> as if rotated at the chunk's true time."""
        start = torch.tensor([float(chunk * self.geometry.frames)], dtype=precise(means.device), device=means.device)
        return time_rotation(start, self.head_dim)(means.flatten(0, -3)[:, None]).view_as(means)
