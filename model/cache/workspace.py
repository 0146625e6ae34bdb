"""What one layer attends, in place and rotated; no other room places keys or turns them.

    [ sink chunks | ring of recent + 1 chunks | selected mid chunks ]

A chunk's keys are rotated when it is committed and turned by the difference where its time changes later, which the
policies' origins keep rare (`positions`): sink never, a recent chunk at most once a chunk while it is recent. There are
no un-rotated keys beside them. The current chunk's K, V go to their ring slot at every forward, so attention reads one
contiguous prefix and nothing is concatenated. The order of keys does not matter to attention.

Shapes: B batch, n tokens of a full-resolution chunk, N_c of a compressed one, k selected mid chunks, D head dim.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from weakref import WeakValueDictionary, ref

import torch

from model.cache.precision import Kept, keep
from model.rope import Rotation, shift_in_time

# (0 for K, 1 for V; samples [m], chunks [m]) -> as they are kept, K un-rotated, [m, N_c, heads, D]
Fetch = Callable[[int, torch.Tensor, torch.Tensor], Kept]


class Buffers:
    """Keys and values [B, capacity, heads, D] that attention reads."""

    keys: torch.Tensor | None = None
    values: torch.Tensor | None = None

    def reserve(self, tokens: int, like: torch.Tensor) -> None:
        """Room for `tokens`, keeping what is there."""
        if self.keys is not None and self.keys.shape[1] >= tokens:
            return
        for name in ("keys", "values"):
            old, new = getattr(self, name), like.new_empty(like.shape[0], tokens, *like.shape[2:])
            if old is not None:
                new[:, : old.shape[1]] = old
            setattr(self, name, new)


@dataclass(eq=False)
class Held:
    """K [B, n, heads, D] of a chunk, rotated to `start`, and its V, for forwards with gradient.

    Views of the workspace until that is about to change them, copies from then on.
    """

    slot: int
    start: float
    key: torch.Tensor
    value: torch.Tensor
    is_copy: bool = False

    def at(self, start: float) -> tuple[torch.Tensor, torch.Tensor]:
        """K rotated to `start`, and V."""
        return self.key if start == self.start else shift_in_time(self.key.clone(), start - self.start), self.value


class Workspace:
    """K, V that one layer attends.

    Args:
        slots: full-resolution chunks that fit; None: any number.
        tokens: n.
        mid_tokens: k * N_c at most.
        buffers: to be used in place of its own.
    """

    def __init__(self, slots: int | None, tokens: int, mid_tokens: int, buffers: Buffers | None = None):
        self.slots, self.tokens, self.mid_tokens = slots, tokens, mid_tokens
        self.buffers = buffers or Buffers()
        self.starts: dict[int, float] = {}  # slot -> time its keys are rotated to
        self.mean_queries: dict[int, torch.Tensor] = {}  # slot -> [B, h, D], where the queries of recent chunks score
        self._placed: int | None = None  # chunk that the history was last placed for
        self.mid_for: tuple[object, object] = (None, None)  # selection and times that the mid part is placed for
        self.mid_places: list[list[tuple[int, float]]] = []  # of each sample: chunk and its time
        self._mid_at = 0, 0  # full-resolution chunks before them, and their number
        self._held: WeakValueDictionary[int, Held] = WeakValueDictionary()  # chunk -> what a forward still reads
        self._own: tuple[int, ref] | None = None  # slot and V of the chunk that the last forward put there

    @property
    def keys(self) -> torch.Tensor:
        return self.buffers.keys

    @property
    def values(self) -> torch.Tensor:
        return self.buffers.values

    def write(self, slot: int, key: torch.Tensor, value: torch.Tensor, start: float, rotation: Rotation) -> None:
        """Take a finished chunk: un-rotated K and V, [B, n, heads, D] each, in place of what the slot held. `rotation`:
        of its tokens, from time `start` on."""
        slots = self.slots or 1 << (slot + 1).bit_length()  # room for the next chunk too
        self.buffers.reserve(slots * self.tokens + self.mid_tokens, key)
        if not self._has(slot, value):
            self._let_go(slot)
            self._store(slot, rotation(key), value)
        self.starts[slot] = start

    def _has(self, slot: int, value: torch.Tensor) -> bool:
        """Whether the last forward put the chunk there already: the one that gave this very V."""
        return self._own is not None and self._own[0] == slot and self._own[1]() is value

    def _store(self, slot: int, key: torch.Tensor, value: torch.Tensor) -> None:
        for part, new in zip(self._slot(slot), (key, value), strict=True):
            part.copy_(new)

    def _slot(self, slot: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K, V [B, n, heads, D] of a slot."""
        where = slice(slot * self.tokens, (slot + 1) * self.tokens)
        return self.keys[:, where], self.values[:, where]

    def hold(self, chunk: int, slot: int) -> Held:
        """K, V of a chunk that outlive what happens to its slot later."""
        held = self._held.get(chunk)
        if held is None:
            held = self._held[chunk] = Held(slot, self.starts[slot], *self._slot(slot))
        return held

    def _let_go(self, slot: int) -> None:
        """Copy what is still read of a slot that is about to change."""
        for held in list(self._held.values()):
            if held.slot == slot and not held.is_copy:
                held.key, held.value, held.is_copy = held.key.clone(), held.value.clone(), True

    def place(self, chunk: int, own: int, starts: Sequence[tuple[int, float]]) -> None:
        """Turn the history to the times that it has for `chunk`; only its first forward has something to do.

        Args:
            own: slot that the chunk's own K, V will go to.
            starts: (slot, time) of every full-resolution chunk of the history.
        """
        for slot, start in starts:
            if self.starts[slot] != start:
                self._let_go(slot)
                shift_in_time(self._slot(slot)[0], start - self.starts[slot])
                self.starts[slot] = start
        self._let_go(own)
        self._placed = chunk

    def in_place(self, chunk: int, mid: tuple[torch.Tensor, object] | None) -> bool:
        """Whether the history is placed for `chunk`, and the mid part for this very selection at these times."""
        return chunk == self._placed and (mid is None or (self.mid_for[0] is mid[0] and self.mid_for[1] == mid[1]))

    def moved(self) -> None:
        """Chunks have other slots from now on: what was placed is to be placed again."""
        self._placed, self.mid_for, self._mid_at = None, (None, None), (0, 0)

    def place_mid(
        self, slots: int, chunks: list[list[int]], starts: list[list[float]], fetch: Fetch, rotation: Rotation
    ) -> None:
        """Mid chunks behind `slots` full-resolution ones. What is there stays where it is: their order is of no matter.

        Args:
            chunks, starts: of every sample, [B][k] in time order.
            rotation: of all of them [B or 1, k * N_c].
        """
        changed, new = self._changes(slots, chunks, starts)
        for part, (buffer, entries) in enumerate(((self.keys, changed), (self.values, new))):
            if entries:
                samples, places, ranks, ids = torch.tensor(entries).unbind(1)
                tokens = fetch(part, samples, ids).restored()  # [m, N_c, heads, D]
                if buffer is self.keys:
                    tokens = rotation.of_parts(len(chunks[0]), samples, ranks)(tokens)
                room = buffer.narrow(1, slots * self.tokens, len(chunks[0]) * tokens.shape[1])
                room.unflatten(1, (len(chunks[0]), -1))[samples, places] = tokens

    def _changes(self, slots: int, chunks: list[list[int]], starts: list[list[float]]) -> tuple[list, list]:
        """(sample, place, rank in time, chunk) of the mid chunks that are new or have another time; of the new ones."""
        if self._mid_at != (slots, len(chunks[0])):
            self._mid_at = slots, len(chunks[0])
            self.mid_places = [[(None, None)] * len(wanted) for wanted in chunks]
        changed, new = [], []
        for sample, (held, wanted, times) in enumerate(zip(self.mid_places, chunks, starts, strict=True)):
            where = {chunk: place for place, (chunk, _) in enumerate(held)}
            free = [place for place, (chunk, _) in enumerate(held) if chunk not in wanted]
            for rank, (chunk, start) in enumerate(zip(wanted, times, strict=True)):
                place = where[chunk] if chunk in where else free.pop()
                entry = sample, place, rank, chunk
                changed += [entry] if held[place] != (chunk, start) else []
                new += [entry] if chunk not in where else []
                held[place] = chunk, start
        return changed, new

    def attend(
        self, own: int, slots: int, mid_tokens: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K (rotated), V of the current chunk, [B, n, heads, D] each, go to slot `own`; what lies in `slots` chunks and
        the mid part behind them, [B, slots * n + mid_tokens, heads, D]."""
        where = slice(own * self.tokens, (own + 1) * self.tokens)
        self.keys[:, where], self.values[:, where] = key, value
        self._own = own, ref(value)
        return self.prefix(slots, mid_tokens)

    def prefix(self, slots: int, mid_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K, V [B, slots * n + mid_tokens, heads, D] as they lie, to read and to write."""
        end = slots * self.tokens + mid_tokens
        return self.keys[:, :end], self.values[:, :end]


class PackedWorkspace(Workspace):
    """A workspace that keeps sink or mid in fewer bits, and no other copy of them.

    The layers share `buffers`; each restores its parts into them, and rotates the mid part, at every forward.

    Args:
        sink: chunks of the sink part.
        precision: of the sink part, a name of `PRECISIONS`; None: that of the model. The mid part comes as it is kept.
    """

    def __init__(self, *sizes, buffers: Buffers, sink: int, precision: str | None):
        super().__init__(*sizes, buffers)
        self.sink, self.precision = sink, precision
        self._parts: dict[int, tuple[Kept, Kept]] = {}  # slot -> K, V
        self._mid: tuple[Kept, Kept] | None = None  # [B, k, N_c, heads, D], by place
        self._rotation: Rotation | None = None  # in time order, of which each place has a rank
        self._ranks: torch.Tensor | None = None

    def _has(self, slot, value):
        return False  # what the layers share holds another layer's by now

    def _store(self, slot, key, value):
        precision = self.precision if slot < self.sink else None
        if slot not in self._parts:
            self._parts[slot] = tuple(Kept.empty(x.shape, x.dtype, precision, x.device) for x in (key, value))
        for part, new in zip(self._parts[slot], (key, value), strict=True):
            part.copy_(keep(new, precision))

    def _slot(self, slot):
        return tuple(part.restored() for part in self._parts[slot])

    def place_mid(self, slots, chunks, starts, fetch, rotation):
        count, before = len(chunks[0]), self._mid_at
        _, new = self._changes(slots, chunks, starts)
        for part in (0, 1) if new else ():
            samples, places, _, ids = torch.tensor(new).unbind(1)
            kept = fetch(part, samples, ids)
            if before != self._mid_at and part == 0:
                self._mid = tuple(kept.room((len(chunks), count), 1) for _ in range(2))
            self._mid[part][samples, places] = kept
        pairs = zip(self.mid_places, chunks, strict=True)
        ranks = [[wanted.index(chunk) for chunk, _ in held] for held, wanted in pairs]
        self._rotation, self._ranks = rotation, torch.tensor(ranks)  # [B, k]

    def attend(self, own, slots, mid_tokens, key, value):
        for slot in range(slots):
            if slot != own:
                for part, kept in zip(super()._slot(slot), self._slot(slot), strict=True):
                    part.copy_(kept)
        if mid_tokens:
            where = slice(slots * self.tokens, slots * self.tokens + mid_tokens)
            mid_key, mid_value = (part.restored().flatten(0, 1) for part in self._mid)  # [B * k, N_c, heads, D]
            samples = torch.arange(len(self._ranks)).repeat_interleave(self._ranks.shape[1])
            mid_key = self._rotation.of_parts(self._ranks.shape[1], samples, self._ranks.flatten())(mid_key)
            self.keys[:, where].copy_(mid_key.view_as(self.keys[:, where]))
            self.values[:, where].copy_(mid_value.view_as(self.values[:, where]))
        return super().attend(own, slots, mid_tokens, key, value)
