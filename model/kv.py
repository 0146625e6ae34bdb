"""Keys and values on their way between the model and its memory, and a chunk's history as the model sees it.

Shape letters: B batch, L tokens, D head dim, M archived chunks, N_c tokens of a compressed one, k selected chunks.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol
from weakref import WeakValueDictionary

import torch

from model.compressor import Compressor
from model.rope import Rotation

Pair = tuple[torch.Tensor, torch.Tensor]  # K and V
TextKV = dict[int, Pair]  # by layer, of one batch of prompts [B, text_len, heads, D]; its first forward fills it


class History(Protocol):
    """What the model asks of a chunk's context (`model.cache.context.ChunkContext`)."""

    keeps_query: bool
    keeps_history: bool
    may_train: bool
    forwards: bool
    trains_compressor: bool

    def history_tokens(self) -> int: ...
    def select(self, layer: int, query: torch.Tensor) -> torch.Tensor: ...
    def extend(
        self, layer: int, selected: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mid: Pair | None
    ) -> Pair: ...
    def chosen_mid(self, layer: int, query: torch.Tensor) -> Pair: ...
    def extend_small(self, layer: int, selected: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Pair: ...


class Room(NamedTuple):
    """Where one layer attends a chunk without gradient: all of its history that a compiled model reads."""

    # [B, history + n, heads, D] of the workspace, the mid part last; None: a video's first chunk, which attends itself.
    keys: torch.Tensor | None = None
    values: torch.Tensor | None = None
    own: torch.Tensor | None = None  # int64 [n], the places of the chunk's own tokens in them
    mid_tokens: int = 0  # of the mid part that is still to be placed
    choice: torch.Tensor | None = None  # what `chosen_mid` gives that for

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Pair:
        """Un-rotated query, rotated key and value of the chunk, [B, n, heads, D] each -> all K, V."""
        if self.keys is None:
            return key, value
        if self.mid_tokens:
            mid = chosen_mid(query, self.choice, self.mid_tokens).to(self.keys.dtype)
            for held, chosen in zip((self.keys, self.values), mid, strict=True):
                held[:, held.shape[1] - self.mid_tokens :] = chosen
        self.keys.index_copy_(1, self.own, key.to(self.keys.dtype))
        self.values.index_copy_(1, self.own, value.to(self.values.dtype))
        return self.keys, self.values


_choosers: WeakValueDictionary[int, History] = WeakValueDictionary()


def choices_of(history: History, layers: int) -> list[torch.Tensor]:
    """What `chosen_mid` needs to find the history of a chunk again, for each layer: int64 [2]."""
    _choosers[id(history)] = history
    return list(torch.tensor([[id(history), layer] for layer in range(layers)]))


@torch.library.custom_op("packforcing::chosen_mid", mutates_args=())
def chosen_mid(query: torch.Tensor, choice: torch.Tensor, mid_tokens: int) -> torch.Tensor:
    """Choose mid chunks by query [B, n, heads, D]: their rotated K, and V, [2, B, mid_tokens, heads, D].

    A single step to the compiler, which cannot follow a choice, and the way to an archive in host memory. Which chunk
    asks is a tensor: as a constant it would have each layer and chunk compiled anew.
    """
    history, layer = choice.tolist()
    return torch.stack(_choosers[history].chosen_mid(layer, query)).to(query.dtype)


@chosen_mid.register_fake
def _(query, choice, mid_tokens):
    return query.new_empty(2, query.shape[0], mid_tokens, *query.shape[2:])


@dataclass(eq=False)
class ReadyHistory:
    """A chunk's history, settled as far as it can be before a forward (`ChunkContext.ready`)."""

    context: History
    rotation: Rotation  # of the chunk's tokens
    rooms: list[Room | None]  # a layer each; None: keys are put together in the forward, which breaks a compiled graph
    compresses: bool  # the chunk's compressed K, V are wanted at its commit
    compressor: type[Compressor]  # of the cache
    mid_grid: tuple[int, int, int]

    def history_tokens(self) -> int:
        return self.context.history_tokens()


class LayerKV(NamedTuple):
    """What one layer leaves behind of a chunk, un-rotated. [B, L, heads, D] each, `mid_*` [B, N_c, heads, D]."""

    query: torch.Tensor | None  # None where the history will not score by it
    key: torch.Tensor
    value: torch.Tensor
    mid_key: torch.Tensor | None
    mid_value: torch.Tensor | None


class SmallFrame(NamedTuple):
    """What the tokens of a compressed chunk need to pass through the blocks (`cache.compressor.kv=forward`)."""

    # Of the chunk they stand for, whose history they attend, and themselves; once committed `cache.attended.Attended`.
    context: History
    rotation: Rotation  # of the tokens
    modulation: torch.Tensor  # [B, 1, 6, dim] of the timestep that the chunk was committed at
    text_kv: TextKV  # of that commit


@dataclass
class ChunkKV:
    """What `PackCache.commit` takes of a chunk."""

    layers: list[LayerKV]
    latents: torch.Tensor  # clean [B, C, F, H, W]
    low_res: torch.Tensor | None = None  # [B, C, f, h, w] of averaged pixels, where the compressor looks at them
    frame: SmallFrame | None = None  # to compress it again, with gradient


class MidTokens(NamedTuple):
    """Compressed chunks on their way to a layer's K, V."""

    hidden: torch.Tensor  # [B, M, N_c, dim]
    chunk_ids: list[int]  # [M]
    frames: list[SmallFrame] | None = None  # [M] where `hidden` passes through the blocks; None: projected as it is
