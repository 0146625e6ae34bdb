"""Where the model compresses chunks: archived ones again, with gradient, and the chunk of a commit."""

import torch
from torch import nn

from model.compressor import embedded_tokens
from model.kv import MidTokens, ReadyHistory, SmallFrame, TextKV


@torch.compiler.disable
def compress_archived(model: nn.Module, context) -> MidTokens | None:
    """Hidden tokens, with gradient, of the archived chunks that a forward of `ChunkContext` may attend."""
    chunk_ids, seen = context.archived_latents()  # ids [M], latents [B, M, C, F, H, W] and perhaps low_res
    if not chunk_ids:
        return None
    hidden = compress(model, context.cache, *(x.flatten(0, 1) for x in seen))  # [B * M, N_c, dim]
    frames = None
    if context.forwards:
        kept = context.cache.frames
        if not kept.keys() >= set(chunk_ids):
            raise RuntimeError("train_compressor with cache.compressor.kv=forward: the chunks were committed in "
                               "eval mode, which keeps no history of theirs; call model.train() first")  # fmt: skip
        frames = [kept[chunk] for chunk in chunk_ids]
    return MidTokens(hidden.unflatten(0, seen[0].shape[:2]), chunk_ids, frames)


def compress_own(
    model: nn.Module, history: ReadyHistory, clean: torch.Tensor, low_res: torch.Tensor | None,
    modulation: torch.Tensor, text_kv: TextKV | None,
) -> MidTokens:  # fmt: skip
    """The chunk's own hidden tokens; see `CausalWanModel.forward` and `SmallFrame`."""
    context, frames = history.context, None
    if context.forwards:
        context.keeps_history = model.training and context.trains_compressor and context.may_train
        rotation, memo = context.small_rotation(clean.device), TextKV() if text_kv is None else text_kv
        frames = [SmallFrame(context, rotation, modulation[:, :1].detach(), memo)]
    return MidTokens(compress(model, history, clean, low_res)[:, None], [], frames)


def compress(
    model: nn.Module, settings, latents: torch.Tensor, low_res: torch.Tensor | None = None
) -> torch.Tensor:
    """Hidden tokens [B, N_c, dim] of chunks [B, C, F, H, W] and, for the LR branch, [B, C, f, h, w]. `settings`:
    whatever has the cache's `compressor` and `mid_grid`. Raises ValueError where the LR branch gets nothing."""
    kind, branches = settings.compressor, []
    if kind.trainable:
        branches.append(model.pack_compressor(latents))
    if kind.needs_pixels:
        if low_res is None:
            raise ValueError("the compressor looks at pixels: give low_res")
        branches.append(embedded_tokens(model.patch_embedding, low_res, settings.mid_grid))
    if kind.pools_tokens:
        branches.append(embedded_tokens(model.patch_embedding, latents, settings.mid_grid))
    return sum(branches)
