"""What one chunk attends: the fixed, read-only history that every forward of the chunk shares.

Shapes: B batch, n tokens of a full-resolution chunk, N_c of a compressed one, k selected mid chunks, D head dim.
"""

from functools import partial

import torch

from model.cache.attended import Attended, Frozen
from model.cache.positions import Parts, Times
from model.cache.precision import Kept
from model.cache.selection import Candidates, affinity
from model.cache.state import CacheState
from model.geometry import ChunkGeometry
from model.kv import Pair, ReadyHistory, Room, choices_of
from model.rope import Rotation, chunk_rotation, frame_times, grid_rotation, precise
from utils.choices import CompressedKV, Refresh
from utils.timing import timed


class ChunkContext:
    """The fixed, read-only history of one chunk, resolved layer by layer at its first forward.

    A forward with gradient keeps hold of what it attended: activation checkpointing runs its blocks again in the
    backward pass, which may come after this and later chunks are committed.
    """

    def __init__(self, cache: CacheState):
        self.cache, self._layers = cache, cache.layers  # a reset cache has other layers
        self.chunk = cache.num_chunks
        layout, config = cache.layout, cache.config
        self.sink, self.recent = layout.held(self.chunk)
        self.archived = cache.archived  # chunks to select from
        self.num_selected = min(len(self.archived), layout.top_k)
        self.will_be_compressed = layout.top_k > 0 and self.chunk >= layout.sink  # its compressed K, V are wanted
        self.uses_compressor = layout.top_k > 0 and cache.compressor.makes_tokens()
        self.trains_compressor = layout.top_k > 0 and cache.compressor.trainable
        self.forwards = config.compressor.kv == CompressedKV.forward  # compressed chunks pass through the blocks
        self.keeps_history = False  # what such a one attended, to let it pass again with gradient
        self.may_train = True  # a later forward may have a gradient
        self.keeps_query = cache.scores_recent  # at the chunk's commit
        frames = cache.geometry.frames
        counts = len(self.sink), len(self.recent), self.num_selected
        self.times = cache.positions(Parts(self.chunk, frames, *counts, cache.mid_span, cache.fit_room))
        self.selection: dict[int, torch.Tensor] = {}  # ids chosen so far, by layer
        self._frozen: dict[tuple[int, bool], Frozen] = {}  # by layer, and whether a compressed chunk attended
        self._packed_rotation: Rotation | None = None
        self._own = self._choices = None  # see `Room`
        self.selected_at = self.chunk  # the chunk that these were chosen for
        made_for, previous = cache._last_selection
        lasts = config.refresh == Refresh.per_chunk and self.chunk < made_for + config.refresh_interval
        if lasts and cache.selection.by_query and previous and all(
            ids.shape[1] == layout.top_k and ids.min() >= self.archived.start for ids in previous.values()
        ):
            self.selection, self.selected_at = dict(previous), made_for

    @property
    def _is_current(self) -> bool:
        return self.cache.num_chunks == self.chunk and self.cache.layers is self._layers

    def check_fits(self, batch: int, geometry: ChunkGeometry) -> None:
        """Raise RuntimeError where this chunk is committed already, ValueError for latents of other sizes."""
        self.check_current()
        if geometry != self.cache.geometry:
            raise ValueError(f"latents have {geometry}: the cache was made for {self.cache.geometry}")
        if self.cache.layers and self.cache.layers[0].keys.shape[0] != batch:
            raise ValueError(f"batch is {batch}: the cache holds {self.cache.layers[0].keys.shape[0]} videos")

    def check_current(self) -> None:
        """Raise RuntimeError where the chunk of this context is committed already, or the cache was reset."""
        if not self._is_current:
            raise RuntimeError(
                f"context of chunk {self.chunk} used when its cache had gone on to chunk {self.cache.num_chunks} or to "
                "another video; ask the cache for a new context for every chunk"
            )

    def query_rotation(self, device: torch.device) -> Rotation:
        """Rotation of the current chunk's tokens."""
        return chunk_rotation(self.cache.geometry, self.times.now, self.cache.head_dim, device)

    @property
    def chooses(self) -> bool:
        """Whether the queries of the first forward decide what every forward of the chunk attends."""
        once = self.cache.selection.by_query and self.cache.config.refresh == Refresh.per_chunk
        return once and len(self.archived) > self.num_selected

    @timed("select_rotate")
    def select(self, layer: int, query: torch.Tensor) -> torch.Tensor:
        """Ids of the mid chunks this layer attends, in time order: int64 [B, k]. `query`: un-rotated, of the current
        chunk [B, n, heads, D], scored where the selection needs it."""
        recomputed = torch.is_grad_enabled() and not self._is_current
        if recomputed and (layer, False) in self._frozen:
            return self._frozen[layer, False].selected
        self.check_current()
        if layer not in self.selection:
            ids = self._select(layer, len(query), query)
            if self.cache.config.refresh == Refresh.per_forward:
                return ids
            self.selection[layer] = ids
        return self.selection[layer]

    @torch.no_grad()
    def _select(self, layer: int, batch: int, query: torch.Tensor | None = None) -> torch.Tensor:
        archived = self.archived
        if self.num_selected == len(archived):
            return torch.arange(archived.start, archived.stop).expand(batch, -1)
        key = self.cache.config.selection_seed, self.chunk, layer
        candidates = Candidates(archived, self.num_selected, batch, lambda: self.scores(layer, query), key)
        return self.cache.selection.choose(candidates)

    def scores(self, layer: int, query: torch.Tensor) -> torch.Tensor:
        """Affinity of every archived chunk with the queries in scope: float32 [B, M]."""
        cache = self.cache
        mean_query = cache.mean_query(query, self.chunk)  # [B, h, D]
        if cache.scores_recent:
            recent = [cache.layers[layer].mean_queries[cache.layout.slot(chunk)] for chunk in self.recent]
            mean_query = torch.stack([mean_query, *recent]).mean(0)
        rows = cache.archive.row(torch.arange(self.archived.start, self.archived.stop) - cache.layout.sink)
        return affinity(mean_query, cache.archive.means(layer))[:, rows.to(mean_query.device)]

    def extend(
        self, layer: int, selected: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mid: Pair | None
    ) -> Pair:
        """K, V [B, history + n, heads, D] of the history and the current chunk. Without gradient they are views of the
        workspace, valid until the layer's next forward; with gradient or `mid` fresh tensors.

        Args:
            selected: [B, k] from `select`.
            key, value: the current chunk's, key rotated: [B, n, heads, D].
            mid: K (un-rotated), V [B, k * N_c, heads, D] of the selected chunks, recomputed with gradient; None: the
                archived ones.
        """
        if torch.is_grad_enabled() or mid is not None:
            return self._assemble(layer, selected, key, value, mid)
        self.check_current()
        if self.chunk == 0:
            return key, value
        cache, mid = self.cache, (selected, self.times) if selected.shape[1] else None
        workspace, own = cache.layers[layer], cache.layout.slot(self.chunk)
        if not workspace.in_place(self.chunk, mid):
            self._place(layer, mid)
        return workspace.attend(own, self._slots, selected.shape[1] * cache.mid_tokens, key, value)

    @property
    def stays(self) -> bool:
        """Whether what is placed stays so between forwards."""
        return not self.cache.packs

    def ready(self, layers: int, device: torch.device) -> ReadyHistory:
        """For the next forward; without gradient, where keys stay in place, what needs no queries is placed now."""
        self.check_current()
        cache, rooms = self.cache, [None] * layers
        settled = self.stays and not (torch.is_grad_enabled() or self.forwards)
        if settled and self.chunk == 0:
            rooms = [Room()] * layers
        elif settled:
            if self._choices is None:
                tokens, start = cache.geometry.tokens, cache.layout.slot(self.chunk) * cache.geometry.tokens
                self._own = torch.arange(start, start + tokens, device=device)
                self._choices = choices_of(self, layers)
            rooms = [self._room(layer) for layer in range(layers)]
        compresses = self.will_be_compressed and self.uses_compressor
        rotation = self.query_rotation(device)
        return ReadyHistory(self, rotation, rooms, compresses, cache.compressor, cache.mid_grid)

    def _room(self, layer: int) -> Room:
        workspace, mid_tokens, mid = self.cache.layers[layer], self.attended_mid_tokens(), None
        if layer in self.selection and mid_tokens:
            mid = self.selection[layer], self.times
        if not workspace.in_place(self.chunk, mid):
            self._place(layer, mid)
        prefix = workspace.prefix(self._slots, mid_tokens)
        if mid is not None or not mid_tokens:
            return Room(*prefix, self._own)
        return Room(*prefix, self._own, mid_tokens, self._choices[layer])

    @torch.no_grad()
    def chosen_mid(self, layer: int, query: torch.Tensor) -> Pair:
        """Rotated K, and V, [B, k * N_c, heads, D] of the mid chunks that the chunk's queries choose, as they lie."""
        self._place_mid(layer, (self.select(layer, query), self.times))
        keys, values = self.cache.layers[layer].prefix(self._slots, self.attended_mid_tokens())
        end = self._slots * self.cache.geometry.tokens
        return keys[:, end:], values[:, end:]

    def _rotated_mid(self, layer: int, selected: torch.Tensor) -> Pair:
        batch, count = selected.shape
        which = torch.arange(batch, device=selected.device).repeat_interleave(count), selected.flatten()
        kept = (self._archived(layer, part, *which).restored() for part in (0, 1))
        key, value = (x.unflatten(0, (batch, count)).flatten(1, 2) for x in kept)
        return self._mid_rotation(selected, key.device)(key), value

    @property
    def _slots(self) -> int:
        return len(self.sink) + len(self.recent) + 1

    def small_rotation(self, device: torch.device) -> Rotation:
        """Rotation of the chunk's compressed tokens, in the chunk's place."""
        return self.cache.mid_rotation(self.times.now, device)

    def attended(self) -> Attended:
        """What the chunk's compressed tokens attended, where that was kept."""
        return Attended({layer: frozen for (layer, is_small), frozen in self._frozen.items() if is_small})

    def extend_small(self, layer: int, selected: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Pair:
        """As `extend`, which comes before it, with the chunk's compressed tokens [B, N_c, heads, D] in its place."""
        if torch.is_grad_enabled() or self.keeps_history:
            return self._assemble(layer, selected, key, value, None, is_small=True)
        self.check_current()
        if self.chunk == 0:
            return key, value
        own, tokens = self.cache.layout.slot(self.chunk), self.cache.geometry.tokens
        prefix = self.cache.layers[layer].prefix(self._slots, selected.shape[1] * self.cache.mid_tokens)
        return tuple(
            torch.cat((old[:, : own * tokens], old[:, (own + 1) * tokens :], new), dim=1)
            for old, new in zip(prefix, (key, value), strict=True)
        )

    @timed("select_rotate")
    def _place(self, layer: int, mid: tuple[torch.Tensor, Times] | None = None) -> None:
        """Place history and, where `mid` names selection and times, the mid part."""
        layout, workspace = self.cache.layout, self.cache.layers[layer]
        starts = [(layout.slot(chunk), start) for chunk, start in self.history_starts()]
        workspace.place(self.chunk, layout.slot(self.chunk), starts)
        if mid is not None:
            self._place_mid(layer, mid)

    def _place_mid(self, layer: int, mid: tuple[torch.Tensor, Times]) -> None:
        workspace, starts = self.cache.layers[layer], self.mid_starts(mid[0]).expand(mid[0].shape).tolist()
        rotation = self._mid_rotation(mid[0], workspace.keys.device)
        workspace.place_mid(self._slots, mid[0].tolist(), starts, partial(self._archived, layer), rotation)
        workspace.mid_for = mid

    def _archived(self, layer: int, part: int, samples: torch.Tensor, chunks: torch.Tensor) -> Kept:
        """K (part 0, un-rotated) or V [m, N_c, heads, D] of archived chunks [m], as they are kept."""
        cache = self.cache
        return cache.archive.gather(layer, part, samples, chunks - cache.layout.sink, cache.layers[0].keys.device)

    def _assemble(self, layer, selected, key, value, mid, is_small=False) -> Pair:
        """`extend` without the workspace: every part put together anew."""
        cache, device = self.cache, key.device
        if self._is_current:
            history = []
            if self.chunk:
                self._place(layer)
                workspace, slot = cache.layers[layer], cache.layout.slot
                history = [(start, workspace.hold(chunk, slot(chunk))) for chunk, start in self.history_starts()]
            archived = self._rotated_mid(layer, selected) if selected.shape[1] and mid is None else None
            self._frozen[layer, is_small] = Frozen(selected, history, archived)
        if mid is not None:
            mid = self._mid_rotation(selected, device)(mid[0]), mid[1]
        return self._frozen[layer, is_small].with_own(key, value, mid)

    def history_starts(self) -> list[tuple[int, float]]:
        """(chunk, time of its first latent frame) of the full-resolution history."""
        frames = self.cache.geometry.frames
        sink = [(chunk, self.times.sink + chunk * frames) for chunk in self.sink]
        return sink + [(chunk, self.times.now - (self.chunk - chunk) * frames) for chunk in self.recent]

    def mid_starts(self, selected: torch.Tensor) -> torch.Tensor:
        """float64 [B or 1, k]: time at which each selected mid chunk begins."""
        if self.times.mid is None:
            return selected.to(precise(selected.device)) * self.cache.geometry.frames
        return (self.times.mid + torch.arange(selected.shape[1], dtype=torch.float64) * self.times.span)[None]

    def _mid_rotation(self, selected: torch.Tensor, device: torch.device) -> Rotation:
        if self._packed_rotation is not None:
            return self._packed_rotation
        starts, frames = self.mid_starts(selected), self.cache.mid_grid[0]
        times = starts[..., None] + frame_times(0, self.times.span, frames).to(starts.device)  # [B or 1, k, frames]
        rotation = grid_rotation(times.flatten(1), *self.cache.mid_axes(device), self.cache.head_dim)
        if self.times.mid is not None:
            self._packed_rotation = rotation
        return rotation

    def archived_latents(self) -> tuple[list[int], list[torch.Tensor]]:
        """Ids [M] of the archived chunks that some layer may select, and what the compressor saw of them: clean latents
        [B, M, C, F, H, W] and, for its LR branch, those of averaged pixels [B, M, C, f, h, w]."""
        cache, layers = self.cache, range(len(self.cache.layers))
        if not cache.selection.by_query:
            chosen = [self._select(layer, batch=1) for layer in layers]
        else:
            known = len(self.selection) == len(layers)
            chosen = self.selection.values() if known else [torch.arange(self.archived.start, self.archived.stop)]
        ids = sorted({chunk for layer in chosen for chunk in layer.flatten().tolist()})
        if not ids:
            return [], []
        return ids, cache.archive.seen(torch.tensor(ids) - cache.layout.sink, cache.layers[0].keys.device)

    def attended_mid_tokens(self) -> int:
        """Mid tokens per layer and sample that this chunk attends."""
        return self.num_selected * self.cache.mid_tokens

    def history_tokens(self) -> int:
        """Tokens per layer and sample that this chunk attends beside itself."""
        return (len(self.sink) + len(self.recent)) * self.cache.geometry.tokens + self.attended_mid_tokens()
