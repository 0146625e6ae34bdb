"""Which mid chunks a chunk attends: the last ones, those whose keys answer its queries, or any.

The score of an archived chunk (PackForcing eq. 11 and appendix G) is the mean over sampled queries i, its keys j and
the first half of the heads of q_i . k_j / sqrt(D), queries and keys rotated at their true times. A mean of dot products
is the dot product of the means, so one stored mean key per (chunk, head) gives exactly these scores.

Shapes: B batch, L tokens, h scored heads, D head dim, M archived chunks, k selected ones.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from model.rope import Rotation
from utils.registry import Registry
from utils.rng import keyed_randn


class Candidates(NamedTuple):
    """What a policy may choose from, for one layer of one chunk."""

    archived: range  # chunk ids [M], in time order
    top_k: int
    batch: int
    scores: Callable[[], torch.Tensor]  # -> float32 [B, M]; runs only where it is asked for
    key: tuple[int, ...]  # (seed, chunk, layer)


class Policy(NamedTuple):
    """`choose` gives ids in time order, int64 [B, k]; `by_query`: what it chooses depends on the chunk's queries."""

    choose: Callable[[Candidates], torch.Tensor]
    by_query: bool = False


SELECTIONS: Registry[Policy] = Registry("cache.selection")


def last(candidates: Candidates) -> torch.Tensor:
    """The most recent chunks."""
    archived, batch = candidates.archived, candidates.batch
    return torch.arange(archived.stop - candidates.top_k, archived.stop).expand(batch, -1)


def best(candidates: Candidates) -> torch.Tensor:
    """The chunks of the highest scores."""
    return top_chunks(candidates.scores(), candidates.top_k) + candidates.archived.start


def any_chunks(candidates: Candidates) -> torch.Tensor:
    """As many at random, drawn anew for every chunk and layer: what an ablation holds the others against."""
    noise = keyed_randn((1, len(candidates.archived)), "selection", *candidates.key)
    return top_chunks(noise, candidates.top_k).expand(candidates.batch, -1) + candidates.archived.start


SELECTIONS.register("recency")(Policy(last))
SELECTIONS.register("query_score")(Policy(best, by_query=True))
SELECTIONS.register("random")(Policy(any_chunks))


def top_chunks(scores: torch.Tensor, top_k: int) -> torch.Tensor:
    """Places of the `top_k` best of M chunks, in time order: scores [B, M] -> int64 [B, top_k]."""
    return scores.topk(top_k, dim=1).indices.sort(dim=1).values


def sampled_queries(num_tokens: int, fraction: float, minimum: int) -> torch.Tensor:
    """Indices floor(n * N / target) of target = max(minimum, floor(fraction * N)) evenly spread tokens, at most N."""
    target = min(num_tokens, max(minimum, int(fraction * num_tokens)))
    return torch.arange(target) * num_tokens // target


def scored_heads(num_heads: int) -> int:
    """The first half of the heads is scored, at least one (appendix G)."""
    return max(1, num_heads // 2)


def mean_rotated(tokens: torch.Tensor, rotation: Rotation, heads: int) -> torch.Tensor:
    """tokens [B, L, H, D] -> float32 mean over L of the first `heads` of the heads, rotated: [B, heads, D]."""
    return rotation(tokens[:, :, :heads].float()).mean(1)


def affinity(mean_query: torch.Tensor, mean_keys: torch.Tensor) -> torch.Tensor:
    """mean_query [B, h, D] and mean_keys [B, M, h, D], rotated at their true times -> scores, float32 [B, M]."""
    # Not an einsum: autocast would take it in bfloat16, and training would choose otherwise than inference.
    return (mean_query[:, None] * mean_keys).sum((-2, -1)) / (mean_query.shape[-1] ** 0.5 * mean_query.shape[1])
