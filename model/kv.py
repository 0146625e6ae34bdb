"""Keys and values on their way between the model and its memory, and what the model asks of a chunk's history.

Shape letters: B batch, L tokens, D head dim, M archived chunks, N_c tokens of a compressed one, k selected chunks.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from model.rope import Rotation

Pair = tuple[torch.Tensor, torch.Tensor]  # K and V


class History(Protocol):
    """What the model asks of a chunk's context (`model.cache.context.ChunkContext`)."""

    keeps_query: bool

    def select(self, layer: int, query: torch.Tensor) -> torch.Tensor: ...
    def extend(
        self, layer: int, selected: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mid: Pair | None
    ) -> Pair: ...
    def placed(self, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None: ...
    def small_selection(self, layer: int) -> torch.Tensor: ...
    def extend_small(self, layer: int, selected: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Pair: ...


class LayerKV(NamedTuple):
    """What one layer leaves behind of a chunk, un-rotated. [B, L, heads, D] each, `mid_*` [B, N_c, heads, D]."""

    query: torch.Tensor | None  # None where the history will not score by it
    key: torch.Tensor
    value: torch.Tensor
    mid_key: torch.Tensor | None
    mid_value: torch.Tensor | None


class TextKV:
    """Cross-attention K, V of one batch of prompts, filled by the first forward and reused by the others."""

    def __init__(self) -> None:
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __contains__(self, layer: int) -> bool:
        return layer in self._layers

    def __getitem__(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._layers[layer]

    def __setitem__(self, layer: int, kv: tuple[torch.Tensor, torch.Tensor]) -> None:
        self._layers[layer] = (kv[0].detach(), kv[1].detach())


class SmallFrame(NamedTuple):
    """What the tokens of a compressed chunk need to pass through the blocks (`cache.compressor.kv=forward`).

    Attributes:
        context: of the chunk they stand for; they attend its history and themselves.
        rotation: of the tokens.
        modulation: [B, 1, 6, dim] of the timestep that the chunk was committed at.
        text_kv: the prompts' K, V of that commit.
    """

    context: History
    rotation: Rotation
    modulation: torch.Tensor
    text_kv: TextKV


@dataclass
class ChunkKV:
    """What `PackCache.commit` takes: one `LayerKV` a layer, the chunk's clean latents [B, C, F, H, W], and those of its
    averaged pixels [B, C, f, h, w] where the compressor looks at them. `frame`: to compress it again, with gradient."""

    layers: list[LayerKV]
    latents: torch.Tensor
    low_res: torch.Tensor | None = None
    frame: SmallFrame | None = None


class MidTokens(NamedTuple):
    """Compressed chunks on their way to a layer's K, V.

    Attributes:
        hidden: [B, M, N_c, dim].
        chunk_ids: [M].
        frames: [M], where `hidden` passes through the blocks; None: every layer projects it as it is.
    """

    hidden: torch.Tensor
    chunk_ids: list[int]
    frames: list[SmallFrame] | None = None
