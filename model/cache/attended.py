"""What a forward with gradient attended, kept while later chunks change the cache: its backward pass, under activation
checkpointing, and a compressed chunk that passes through the blocks again read it.

Shapes: B batch, N_c tokens of a compressed chunk, k selected mid chunks, D head dim.
"""

from typing import NamedTuple

import torch

from model.cache.workspace import Held
from model.kv import Pair


class Frozen(NamedTuple):
    """What a layer attended with gradient, in tensors that later commits leave alone."""

    selected: torch.Tensor  # [B, k]
    history: list[tuple[float, Held]]  # (start, K and V) of sink and recent chunks
    mid: tuple[torch.Tensor, torch.Tensor] | None  # K, rotated, and V [B, k * N_c, heads, D]; None: computed anew

    def with_own(self, key: torch.Tensor, value: torch.Tensor, mid: Pair | None = None) -> Pair:
        """K, V of all that was attended and, last, the chunk's own; `mid`: in place of what was kept."""
        parts = [held.at(start) for start, held in self.history]
        if self.selected.shape[1]:
            parts.append(mid or self.mid)
        keys, values = zip(*parts, (key, value), strict=True)
        return torch.cat(keys, dim=1), torch.cat(values, dim=1)


class Attended(NamedTuple):
    """What the compressed tokens of a committed chunk attended, by layer, to let them pass again with gradient.

    The cache keeps it in the context's place: a context holds its cache, and in a circle both would outlive the rollout
    until Python looks for circles, with all of their K and V.
    """

    layers: dict[int, Frozen]
    keeps_query: bool = False

    def small_selection(self, layer: int) -> torch.Tensor:
        """Ids [B, k] of the mid chunks attended."""
        return self.layers[layer].selected

    def extend_small(self, layer: int, selected: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Pair:
        """As `ChunkContext.extend_small`."""
        return self.layers[layer].with_own(key, value)
