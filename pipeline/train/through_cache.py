"""Teacher forcing through the cache: every noisy chunk of a clip is trained against exactly its inference context.

The clip's clean chunks are committed one after another, as at inference and without gradient. Each noisy chunk is
denoised with gradient, that of the compressor included, against what the cache holds then, and is done with before the
next chunk is committed: memory does not grow with the clip.
"""

from collections.abc import Callable, Collection, Iterator, Sequence

import torch

from model.cache.context import ChunkContext
from model.schedule import NUM_TIMESTEPS
from pipeline.generate.inputs import Prompts
from pipeline.generate.rollout import Rollout
from pipeline.generate.sampler import few_step_timesteps


def flows_through_cache(
    rollout: Rollout,
    clean: torch.Tensor,
    noisy: torch.Tensor,
    noise: torch.Tensor,
    timestep: torch.Tensor,
    prompts: Callable[[int], Prompts],
    context_timestep: torch.Tensor | None,
    wanted: Collection[int],
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (chunk, flow [B, C, f, H, W] with gradient) of the `wanted` chunks, in time order.

    The graph of a flow must be done with before the next one is asked for.

    Args:
        rollout: with an empty cache.
        clean, noisy, noise: clips [B, C, F, H, W] of G chunks.
        timestep: [B, G] of the noisy chunks.
        prompts: conditioning of each chunk.
        context_timestep: [B] at which chunks are committed; None: the sampler's.
    """
    chunks = (x.split(rollout.model.config.frames_per_chunk, dim=2) for x in (clean, noisy, noise))
    for chunk, (history, start, pure) in enumerate(zip(*chunks, strict=True)):
        context = rollout.cache.context()
        rollout.prompts = prompts(chunk)
        select_as_at_inference(rollout, context, pure)
        if chunk in wanted:
            yield chunk, rollout.flow(start, timestep[:, chunk], context, train=True)
        if chunk == max(wanted):
            return
        rollout.commit(history, context, context_timestep)


def select_as_at_inference(rollout: Rollout, context: ChunkContext, noise: torch.Tensor) -> None:
    """Let the first denoising step, on pure noise, choose the chunk's mid tokens where there is a choice."""
    if not context.chooses:
        return
    sampler = rollout.sampler
    first = few_step_timesteps(sampler, rollout.schedule)[0] if sampler.kind == "few_step" else float(NUM_TIMESTEPS)
    rollout.flow(noise, first, context)


def loss_shares(weights: Sequence[Sequence[float] | None], chunks: int) -> torch.Tensor:
    """Share of every chunk in its sample's loss, [B, G], 1 on average; a sample that weighs nothing has none."""
    rows = torch.tensor([[1.0] * chunks if row is None else list(row) for row in weights])
    return rows * chunks / rows.sum(1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
