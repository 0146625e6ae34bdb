"""What one chunk attends: the fixed, read-only history that every forward of the chunk shares.

Shapes: B batch, n tokens of a full-resolution chunk, N_c of a compressed one, k selected mid chunks, D head dim.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch

from model.cache.selection import affinity, top_chunks
from model.geometry import ChunkGeometry
from model.rope import Rotation, chunk_rotation, frame_times, grid_rotation, time_rotation
from utils.config import MidSpan, QueryScope, Refresh, Selection, Temporal
from utils.timing import timed

if TYPE_CHECKING:
    from model.cache.cache import PackCache


class _Frozen(NamedTuple):
    """What a layer attended with gradient, in tensors that later commits leave alone."""

    selected: torch.Tensor  # [B, k]
    history: list[tuple[float, torch.Tensor, torch.Tensor]]  # (start, un-rotated key, value) of sink and recent


class ChunkContext:
    """The fixed, read-only history of one chunk, resolved layer by layer at its first forward.

    `select` fixes the mid chunks of a layer (with `per_chunk`, once), `extend` gives the layer's keys and values.

    A forward with gradient reads the history from un-rotated tensors that it keeps, not from the workspace: activation
    checkpointing runs its blocks again in the backward pass, which may come after this and later chunks are committed.
    """

    def __init__(self, cache: "PackCache"):
        self.cache, self._layers = cache, cache.layers  # a reset cache has other layers
        self.chunk = cache.num_chunks
        layout, config = cache.layout, cache.config
        self.sink, self.recent = layout.held(self.chunk)
        self.archive = dict(cache.archive)  # chunk index -> compressed chunk, in time order
        self.archived = list(self.archive)
        self.num_selected = min(len(self.archived), layout.top_k)
        self.will_be_compressed = layout.top_k > 0 and self.chunk >= layout.sink
        self.uses_compressor = layout.top_k > 0 and cache.compressor.trainable
        self._selection: dict[int, torch.Tensor] = {}
        self._frozen: dict[int, _Frozen] = {}
        self._rotations: dict[object, Rotation] = {}
        self._selected_at = self.chunk
        made_for, previous = cache._last_selection
        lasts = config.refresh == Refresh.per_chunk and self.chunk < made_for + config.refresh_interval
        if lasts and previous and config.selection == Selection.query_score:
            kept = torch.tensor(self.archived)
            if all(ids.shape[1] == layout.top_k and torch.isin(ids, kept).all() for ids in previous.values()):
                self._selection, self._selected_at = dict(previous), made_for

    def check_fits(self, batch: int, geometry: ChunkGeometry) -> None:
        """Raise RuntimeError where this chunk is committed already, ValueError for latents of other sizes."""
        self.check_current()
        if geometry != self.cache.geometry:
            raise ValueError(f"latents have {geometry}: the cache was made for {self.cache.geometry}")
        if self.cache.layers and self.cache.layers[0].keys.shape[0] != batch:
            raise ValueError(f"batch is {batch}: the cache holds {self.cache.layers[0].keys.shape[0]} videos")

    @property
    def _is_current(self) -> bool:
        return self.cache.num_chunks == self.chunk and self.cache.layers is self._layers

    def check_current(self) -> None:
        """Raise RuntimeError where the chunk of this context is committed already, or the cache was reset."""
        if not self._is_current:
            raise RuntimeError(
                f"context of chunk {self.chunk} used when its cache had gone on to chunk {self.cache.num_chunks} or to "
                "another video; ask the cache for a new context for every chunk"
            )

    def query_rotation(self, device: torch.device) -> Rotation:
        """Rotation of the current chunk's tokens, at time 0."""
        return chunk_rotation(self.cache.geometry, 0.0, self.cache.head_dim, device)

    def selection_to_keep(self) -> tuple[int, dict[int, torch.Tensor]]:
        """(chunk the selection was made for, per layer ids), for `refresh_interval`."""
        return self._selected_at, self._selection

    @timed("select_rotate")
    def select(self, layer: int, query: torch.Tensor) -> torch.Tensor:
        """Ids of the mid chunks this layer attends, in time order: int64 CPU [B, k].

        Args:
            query: un-rotated queries of the current chunk [B, n, heads, D]; scored where the selection needs them.
        """
        recomputed = torch.is_grad_enabled() and not self._is_current
        if recomputed and layer in self._frozen:
            return self._frozen[layer].selected
        self.check_current()
        if layer not in self._selection:
            ids = self._select(layer, query)
            if self.cache.config.refresh == Refresh.per_forward:
                return ids
            self._selection[layer] = ids
        return self._selection[layer]

    @torch.no_grad()
    def _select(self, layer: int, query: torch.Tensor) -> torch.Tensor:
        cache, batch = self.cache, query.shape[0]
        if self.num_selected == len(self.archived) or cache.config.selection == Selection.recency:
            last = self.archived[len(self.archived) - self.num_selected :]
            return torch.tensor(last, dtype=torch.long).expand(batch, -1)
        return top_chunks(self.scores(layer, query), self.archived, cache.layout.top_k)

    def scores(self, layer: int, query: torch.Tensor) -> torch.Tensor:
        """Affinity of every archived chunk with the queries in scope: float32 [B, M]."""
        cache, frames = self.cache, self.cache.geometry.frames
        mean_query = cache.mean_query(query)  # [B, h, D]
        if cache.config.query_scope == QueryScope.recent_and_current:
            means = [mean_query]
            for chunk in self.recent:
                own_time = cache.layers[layer].mean_queries[cache.layout.slot(chunk)]  # [B, h, D]
                start = torch.tensor([(chunk - self.chunk) * frames], device=query.device)
                means.append(time_rotation(start, query.shape[-1])(own_time[:, None])[:, 0])
            mean_query = torch.stack(means).mean(0)
        shifts = (torch.tensor(self.archived) - self.chunk).double() * frames
        return affinity(mean_query, cache.mean_keys(layer), shifts)

    def extend(
        self,
        layer: int,
        selected: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mid: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the history and the current chunk, for one attention call.

        Args:
            selected: [B, k] from `select`.
            key, value: the current chunk's, key rotated: [B, n, heads, D].
            mid: K (un-rotated), V [B, k * N_c, heads, D] of the selected chunks, recomputed with gradient; None: the
                archived ones.

        Returns:
            K, V [B, history + n, heads, D]. Without gradient they are views of the workspace, valid until the layer's
            next forward; with gradient or `mid` fresh tensors.
        """
        if torch.is_grad_enabled() or mid is not None:
            return self._assemble(layer, selected, key, value, mid)
        self.check_current()
        if self.chunk == 0:
            return key, value
        store, tokens = self.cache.layers[layer], self.cache.geometry.tokens
        self._place(layer, selected)
        slot, slots = self.cache.layout.slot(self.chunk), len(self.sink) + len(self.recent) + 1
        own = slice(slot * tokens, (slot + 1) * tokens)
        end = slots * tokens + selected.shape[1] * self.cache.mid_tokens
        store.keys[:, own], store.values[:, own] = key, value
        return store.keys[:, :end], store.values[:, :end]

    def _assemble(self, layer, selected, key, value, mid) -> tuple[torch.Tensor, torch.Tensor]:
        """`extend` without the workspace: every part rotated anew and put together."""
        cache = self.cache
        if self._is_current:
            slots = [(start, cache.layout.slot(chunk)) for chunk, start in self.history_starts()]
            history = [(start, *cache.layers[layer].raw(slot, cache.geometry.tokens)) for start, slot in slots]
            self._frozen[layer] = _Frozen(selected, history)
        parts = [
            (chunk_rotation(cache.geometry, start, cache.head_dim, key.device)(raw_key), history_value)
            for start, raw_key, history_value in self._frozen[layer].history
        ]
        if selected.shape[1]:
            mid_key, mid_value = self._archived_kv(layer, selected, key.device) if mid is None else mid
            parts.append((self._mid_rotation(selected, key.device)(mid_key), mid_value))
        keys, values = zip(*parts, (key, value), strict=True)
        return torch.cat(keys, dim=1), torch.cat(values, dim=1)

    def _archived_kv(self, layer: int, selected: torch.Tensor, device: torch.device) -> list[torch.Tensor]:
        """K (un-rotated), V [B, k * N_c, heads, D] of the selected chunks, each sample its own."""
        return [
            torch.stack(
                [
                    torch.cat([self.archive[chunk].kv[layer][part][sample] for chunk in ids])
                    for sample, ids in enumerate(selected.tolist())
                ]
            ).to(device)
            for part in range(2)
        ]

    @timed("select_rotate")
    def _place(self, layer: int, selected: torch.Tensor) -> None:
        """Bring the workspace to this chunk's positions: once per chunk, and where the selection changes."""
        cache, store, tokens = self.cache, self.cache.layers[layer], self.cache.geometry.tokens
        store.reserve(cache._workspace_tokens(self.chunk), store.keys)
        for chunk, start in self.history_starts():
            slot = cache.layout.slot(chunk)
            if store.starts.get(slot) != start:
                rotation = chunk_rotation(cache.geometry, start, cache.head_dim, store.keys.device)
                store.keys[:, slot * tokens : (slot + 1) * tokens] = rotation(store.raw_keys[slot])
                store.starts[slot] = start
        if not selected.shape[1]:
            return
        if store.placed is not None and store.placed[0] == self.chunk and torch.equal(store.placed[1], selected):
            return
        begin = (len(self.sink) + len(self.recent) + 1) * tokens
        end = begin + selected.shape[1] * cache.mid_tokens
        keys, values = store.keys[:, begin:end], store.values[:, begin:end]
        for sample, ids in enumerate(selected.tolist()):
            for place, chunk in enumerate(ids):
                where = slice(place * cache.mid_tokens, (place + 1) * cache.mid_tokens)
                source_key, source_value = self.archive[chunk].kv[layer]
                keys[sample, where].copy_(source_key[sample], non_blocking=True)
                values[sample, where].copy_(source_value[sample], non_blocking=True)
        keys.copy_(self._mid_rotation(selected, keys.device)(keys))
        store.placed = self.chunk, selected

    def history_starts(self) -> list[tuple[int, float]]:
        """(chunk, time of its first latent frame) of the full-resolution history; the current chunk is at 0."""
        frames, absolute = self.cache.geometry.frames, self.cache.config.temporal == Temporal.absolute
        recent = [(chunk, float((chunk - self.chunk) * frames)) for chunk in self.recent]
        sink_end = float(self.sink.stop - self.chunk) * frames if absolute else self._mid_start()
        sink = [(chunk, sink_end - (self.sink.stop - chunk) * frames) for chunk in self.sink]
        return sink + recent

    @property
    def mid_span(self) -> float:
        """Latent frames that one selected mid chunk spans."""
        cache = self.cache
        frames = cache.geometry.frames
        if cache.config.temporal == Temporal.fit and self.num_selected:
            return min(float(frames), cache.fit_room / self.num_selected)
        compressed = cache.config.temporal == Temporal.packed and cache.config.mid_span == MidSpan.compressed
        return float(cache.mid_grid[0] if compressed else frames)

    def _mid_start(self) -> float:
        """Packed time at which the mid part begins (and the sink ends)."""
        return -float(len(self.recent) * self.cache.geometry.frames) - self.num_selected * self.mid_span

    def mid_starts(self, selected: torch.Tensor) -> torch.Tensor:
        """float64 [B or 1, k]: time at which each selected mid chunk begins."""
        if self.cache.config.temporal == Temporal.absolute:
            return (selected - self.chunk).double() * self.cache.geometry.frames
        return (self._mid_start() + torch.arange(selected.shape[1], dtype=torch.float64) * self.mid_span)[None]

    def _mid_rotation(self, selected: torch.Tensor, device: torch.device) -> Rotation:
        starts = self.mid_starts(selected)
        key = ("mid", tuple(starts.flatten().tolist()))
        if key not in self._rotations:
            times = starts[..., None] + frame_times(0, self.mid_span, self.cache.mid_grid[0])  # [B or 1, k, frames]
            axes = self.cache.mid_axes(device)
            self._rotations[key] = grid_rotation(times.flatten(1), *axes, self.cache.head_dim)
        return self._rotations[key]

    def archived_latents(self) -> tuple[list[int], torch.Tensor]:
        """Ids [M] and clean latents [B, M, C, F, H, W] of the archived chunks that some layer may select."""
        cache, ids = self.cache, self.archived
        if cache.config.selection == Selection.recency:
            ids = ids[len(ids) - self.num_selected :]
        elif len(self._selection) == len(cache.layers):
            ids = sorted({i for chosen in self._selection.values() for i in chosen.flatten().tolist()})
        if not ids:
            return [], torch.empty(0)
        return ids, torch.stack([self.archive[i].latents.to(cache.layers[0].keys.device) for i in ids], dim=1)

    def attended_mid_tokens(self) -> int:
        """Mid tokens per layer and sample that this chunk attends."""
        return self.num_selected * self.cache.mid_tokens
