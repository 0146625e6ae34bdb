"""Attention calls of the causal DiT: diffusers' backend dispatcher, and the block masks of whole-clip passes."""

from functools import lru_cache

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.utils import is_flash_attn_3_available, is_flash_attn_available
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from model.matmul_attention import matmul_attention


def best_backend(device: torch.device | str) -> str:
    """Fastest dispatcher backend that is installed: FlashAttention 3, FlashAttention 2, cuDNN, else PyTorch's SDPA."""
    if torch.device(device).type != "cuda":
        return AttentionBackendName.NATIVE.value
    if is_flash_attn_3_available() and torch.cuda.get_device_capability(device)[0] == 9:
        return AttentionBackendName._FLASH_3.value
    if is_flash_attn_available():
        return AttentionBackendName.FLASH.value
    if torch.backends.cudnn.is_available() and torch.cuda.get_device_capability(device)[0] >= 8:
        return AttentionBackendName._NATIVE_CUDNN.value
    return AttentionBackendName.NATIVE.value


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    backend: AttentionBackendName | str | None,
    mask: torch.Tensor | BlockMask | None = None,
) -> torch.Tensor:
    """query [B, L, H, D], key and value [B, M, H, D] -> [B, L, H, D].

    With a mask the call goes to flex attention (block mask) or SDPA (boolean mask), whatever `backend` says, as the
    flash kernels take none. On a CPU, what needs a gradient goes to plain matrix products (model/matmul_attention.py).
    """
    if query.requires_grad and query.device.type == "cpu":
        return matmul_attention(query, key, value, mask)
    if isinstance(mask, BlockMask):
        out = _compiled_flex()(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), block_mask=mask)
        return out.transpose(1, 2)
    if mask is not None:
        backend = AttentionBackendName.NATIVE
    return dispatch_attention_fn(query, key, value, attn_mask=mask, backend=backend)


@lru_cache(maxsize=1)
def _compiled_flex():
    return torch.compile(flex_attention)


@lru_cache(maxsize=8)
def clip_mask(
    frames: int, tokens_per_frame: int, frames_per_chunk: int, teacher_forcing: bool, device: torch.device
) -> torch.Tensor | BlockMask:
    """Chunk-causal mask of a whole clip of `frames` latent frames.

    Plain: a token sees every token of its own and of earlier chunks. Teacher forcing (Causal Forcing, arXiv
    2602.02214): the sequence is [clean | noisy]; clean is chunk-causal, a noisy chunk sees the clean chunks before it
    and itself.

    Returns:
        On CUDA a flex attention `BlockMask`; elsewhere a boolean [1, 1, L, L], True where the row sees the column.
    """
    half = frames * tokens_per_frame
    length = 2 * half if teacher_forcing else half
    chunk_tokens = frames_per_chunk * tokens_per_frame

    def sees(batch, head, query, key):  # flex attention's signature; also run on index grids below
        query_chunk, key_chunk = query % half // chunk_tokens, key % half // chunk_tokens
        if not teacher_forcing:
            return key_chunk <= query_chunk
        query_clean, key_clean = query < half, key < half
        own = (key_chunk == query_chunk) & ~(query_clean ^ key_clean)  # inductor has no `==` of booleans
        return own | (key_clean & (key_chunk < query_chunk))

    if device.type == "cuda":
        return create_block_mask(sees, None, None, length, length, device=device, _compile=True)  # or it builds L x L
    with torch.inference_mode(False):  # what is kept must serve a later forward with gradient too
        index = torch.arange(length, device=device)
        return sees(None, None, index[:, None], index[None, :])[None, None]


def rms_norm(norm: torch.nn.RMSNorm, x: torch.Tensor) -> torch.Tensor:
    """norm(x) in the dtype of x [B, L, dim], which autocast on CUDA would make float32, and with it the KV cache; with
    fewer passes over memory on CPU, where PyTorch has no fused kernel of it."""
    offloaded = norm.weight.is_meta  # a hook on the module's own forward fetches it
    if x.device.type != "cpu" or offloaded or torch.compiler.is_compiling():
        return norm(x).type_as(x)
    squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square()  # [B, L, 1]
    scale = torch.rsqrt(squares / x.shape[-1] + norm.eps)
    return (x * scale * norm.weight).type_as(x)
