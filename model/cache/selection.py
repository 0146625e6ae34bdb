"""Which mid chunks a chunk attends: recency, or query-key affinity (PackForcing eq. 11 and appendix G).

The score of an archived chunk is the mean over sampled queries i, its keys j and the first half of the heads of
q_i . k_j / sqrt(D), queries and keys rotated at their true times. A mean of dot products is the dot product of the
means, so one stored mean key per (chunk, head) gives exactly these scores; and a temporal shift of a mean of rotated
keys is the rotation of the mean, so the stored mean never has to be recomputed.

Shapes: B batch, L tokens, h scored heads, D head dim, M archived chunks.
"""

import torch

from model.rope import Rotation, precise, time_rotation


def sampled_queries(num_tokens: int, fraction: float, minimum: int) -> torch.Tensor:
    """Indices floor(n * N / target) of target = max(minimum, floor(fraction * N)) evenly spread tokens, at most N."""
    target = min(num_tokens, max(minimum, int(fraction * num_tokens)))
    return torch.arange(target) * num_tokens // target


def scored_heads(num_heads: int) -> int:
    """The first half of the heads is scored, at least one (appendix G)."""
    return max(1, num_heads // 2)


def mean_rotated(tokens: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """tokens [B, L, H, D] -> float32 mean over L of the first half of the heads, rotated: [B, h, D]."""
    heads = scored_heads(tokens.shape[2])
    return rotation(tokens[:, :, :heads].float()).mean(1)


def affinity(mean_query: torch.Tensor, mean_keys: torch.Tensor, shifts: torch.Tensor) -> torch.Tensor:
    """Scores of M chunks.

    Args:
        mean_query: [B, h, D], rotated with the current chunk at time 0.
        mean_keys: [B, M, h, D], each rotated with its own chunk at time 0.
        shifts: [M] true start of each chunk, in latent frames from the current one (negative).

    Returns:
        float32 [B, M].
    """
    dim = mean_query.shape[-1]
    keys = time_rotation(shifts.to(mean_keys.device, precise(mean_keys.device)), dim)(mean_keys)  # [B, M, h, D]
    # Not an einsum: autocast would take it in bfloat16, and training would choose otherwise than inference.
    return (mean_query[:, None] * keys).sum((-2, -1)) / (dim**0.5 * mean_query.shape[1])


def top_chunks(scores: torch.Tensor, chunk_ids: list[int], top_k: int) -> torch.Tensor:
    """Ids of the `top_k` best of M chunks, in time order: scores [B, M] -> int64 CPU [B, top_k]."""
    best = scores.topk(min(top_k, len(chunk_ids)), dim=1).indices.cpu()
    return torch.tensor(chunk_ids)[best].sort(dim=1).values
