"""Attention of the causal DiT: its processor, diffusers' backend dispatcher, and the block masks of whole-clip passes.

Shape letters: B batch, L queries, M keys, H heads, D head dim.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch
from diffusers import ModelMixin
from diffusers.models.activations import GELU
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanAttention
from diffusers.utils import is_flash_attn_3_available, is_flash_attn_available
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from model.rope import Rotation
from model.sequence import Ranks


def best_backend(device: torch.device | str, trains: bool = False) -> str:
    """Fastest dispatcher backend that is installed: FlashAttention 3 (to which diffusers gives no backward), 2, cuDNN,
    else PyTorch's SDPA."""
    if torch.device(device).type != "cuda":
        return AttentionBackendName.NATIVE.value
    if not trains and is_flash_attn_3_available() and torch.cuda.get_device_capability(device)[0] == 9:
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
    flash kernels take none. On a CPU, what needs a gradient goes to plain matrix products (`matmul_attention`).
    """
    if query.requires_grad and query.device.type == "cpu":
        return matmul_attention(query, key, value, mask)
    if isinstance(mask, BlockMask):
        out = _compiled_flex()(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), block_mask=mask)
        return out.transpose(1, 2)
    if mask is not None:
        backend = AttentionBackendName.NATIVE
    elif backend is None:
        backend = _AttentionBackendRegistry.get_active_backend()[0]
    trains = torch.is_grad_enabled() or torch.is_autocast_enabled("cuda")
    if backend == AttentionBackendName._NATIVE_CUDNN and not trains:  # as diffusers, but no other kernel switched off
        parts = (x.transpose(1, 2).contiguous() for x in (query, key, value))
        return torch.ops.aten._scaled_dot_product_cudnn_attention(*parts, None, False)[0].transpose(1, 2)
    return dispatch_attention_fn(query, key, value, attn_mask=mask, backend=backend)


def switches_kernels(model: ModelMixin) -> bool:
    """Whether attention without gradient switches SDPA's other kernels off while it runs, and so for all threads: what
    another one attends by SDPA changes its last bits, or finds no kernel."""
    default, names = _AttentionBackendRegistry.get_active_backend()[0], AttentionBackendName
    used = [getattr(processor, "_attention_backend", None) or default for processor in model.attn_processors.values()]
    return any(backend in (names._NATIVE_EFFICIENT, names._NATIVE_FLASH, names._NATIVE_MATH) for backend in used)


def matmul_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """query [B, L, H, D], key and value [B, M, H, D], mask boolean [1, 1, L, M] (True: sees) -> [B, L, H, D].

    Products in the dtype of `value`, softmax in float32. PyTorch's fused CPU attention has a slow backward: measured
    with bf16 on an AMX core, 288 tokens, 4 heads x 64, it takes 1.6 times as long, and with 16 text tokens as keys 6
    times.
    """
    query, key, value = (x.transpose(1, 2).to(value.dtype) for x in (query, key, value))  # [B, H, L or M, D]
    scores = torch.matmul(query * query.shape[-1] ** -0.5, key.transpose(-1, -2)).float()  # [B, H, L, M]
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return torch.matmul(scores.softmax(-1).to(value.dtype), value).transpose(1, 2)  # [B, L, H, D]


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


def exact(device_type: str) -> AbstractContextManager[None]:
    """Out of autocast, which makes float32 copies of what a kernel takes as it is."""
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()


class LayerNorm(nn.LayerNorm):
    """Layer norm in the dtype of its input, float32 inside: none of the copies that `FP32LayerNorm` makes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, L, dim] -> [B, L, dim]."""
        affine = (None if y is None else y.to(x.dtype) for y in (self.weight, self.bias))
        with exact(x.device.type):
            return nn.functional.layer_norm(x, self.normalized_shape, *affine, self.eps)


class RMSNorm(nn.RMSNorm):
    """RMS norm in the dtype of its input, which autocast on CUDA would make float32, and with it the KV cache."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, L, dim] -> [B, L, dim]."""
        return rms_norm(x, self.weight, self.eps)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Over the last dimension, float32 inside, in the dtype of x; with fewer passes over memory on CPU, where PyTorch
    has no fused kernel of it."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        with exact(x.device.type):
            return nn.functional.rms_norm(x, weight.shape, weight.to(x.dtype), eps)
    squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square()
    scaled = x * torch.rsqrt(squares / x.shape[-1] + eps)
    return (scaled * weight if torch.is_grad_enabled() else scaled.mul_(weight)).type_as(x)


def project(attn: WanAttention, x: torch.Tensor, parts: str) -> list[torch.Tensor]:
    """Un-rotated query, key and value, those of them in `parts`, of tokens x [B, L, dim]: [B, L, H, D] each.

    `parts` is `qkv`, `kv` or `q`; fused projections (`fuse_qkv_projections`) are used where they hold them.
    """
    if attn.fused_projections and parts != "q":
        fused, count = (attn.to_kv, 2) if attn.is_cross_attention else (attn.to_qkv, 3)
        projected = fused(x).chunk(count, dim=-1)[-len(parts) :]
    else:
        projected = [getattr(attn, f"to_{part}")(x) for part in parts]
    norms = {"q": attn.norm_q, "k": attn.norm_k, "v": nn.Identity()}
    normed = [norms[part](tokens).type_as(tokens) for part, tokens in zip(parts, projected, strict=True)]
    return [tokens.unflatten(2, (attn.heads, -1)) for tokens in normed]


def own_heads(attn: WanAttention, projected: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """Of tokens that every rank of a video has [B, M, H, D] each, the heads that this one attends [B, M, H / P, D]."""
    ranks = Ranks.of(getattr(attn.processor, "_parallel_config", None))
    return projected if ranks is None else [ranks.part(x, 2) for x in projected]


class CausalWanAttnProcessor:
    """Attention of a Wan block: over a clip under a mask, over a chunk and its history, or over the prompt.

    Takes what `WanAttnProcessor` takes (text-to-video), so that it serves bidirectional Wan models too, and a
    `LayerMemory`.
    """

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | BlockMask | None = None,
        rotary_emb=None,
        memory=None,
    ) -> torch.Tensor | None:
        """hidden_states [B, L, dim], encoder_hidden_states [B, M, dim] or None -> [B, L, dim].

        `rotary_emb`: a `Rotation`, or Wan's table (cos, sin). `memory`: `model.block.LayerMemory` of the layer; None
        where it wants K, V only.
        """
        ranks = None if attn.is_cross_attention else Ranks.of(self._parallel_config)
        if attn.is_cross_attention:
            (query,) = project(attn, hidden_states, "q")
            if memory is None:
                key, value = project(attn, encoder_hidden_states, "kv")
            else:
                key, value = memory.text(attn, encoder_hidden_states)
        else:
            query, key, value = unrotated = project(attn, hidden_states, "qkv")
            is_whole = ranks is not None and memory is not None and memory.is_small  # no rank has but a part of it
            if is_whole:
                query, key, value = unrotated = own_heads(attn, unrotated)  # [B, L, H / P, D] each
            elif ranks is not None:
                query, key, value = unrotated = ranks.to_heads(*unrotated)  # [B, L / P, H, D] -> [B, L, H / P, D] each
            if rotary_emb is not None:
                query, key = _rotate(query, rotary_emb), _rotate(key, rotary_emb)
            if memory is not None and memory.context is not None:
                memory.leave(*unrotated)
                # Two calls: where one breaks the graph and once nothing comes after it, dynamo never compiles
                # what comes after that call again.
                if memory.only_kv:
                    memory.with_history(attn, unrotated[0], key, value)
                    return None
                key, value = memory.with_history(attn, unrotated[0], key, value)
        out = attend(query, key, value, self._attention_backend, attention_mask)  # [B, L, H, D]
        if ranks is not None:
            out = ranks.gathered(out, 2) if is_whole else ranks.to_tokens(out)  # of all H heads
        out = attn.to_out[0](out.flatten(2).type_as(hidden_states))  # [B, L, dim]
        return attn.to_out[1](out)


def _rotate(x: torch.Tensor, rotary_emb) -> torch.Tensor:
    """x [B, L, H, D] by a `Rotation` or by Wan's table, cos and sin [1, L, 1, D] with each value given twice.

    One dtype for query, key and value: flash kernels take no mixture, which Wan's own rotation in float32 leaves.
    """
    if isinstance(rotary_emb, tuple):
        cos, sin = rotary_emb
        rotary_emb = Rotation(cos[..., ::2], sin[..., ::2])
    return rotary_emb(x)


class TanhGELU(GELU):
    """Projection and tanh-form GELU: 0.5 x (1 + tanh(z)) = x sigmoid(2 z), z = sqrt(2 / pi) (x + 0.044715 x^3), by the
    second form on a CPU, which vectorises better."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[B, L, dim] -> [B, L, ffn_dim]."""
        if hidden_states.is_cuda and can_fuse(self.proj, hidden_states):  # cuBLASLt ends the product with it
            flat, weight = hidden_states.flatten(0, -2), self.proj.weight.t()
            out = torch._addmm_activation(self.proj.bias, flat, weight, use_gelu=True)  # on CUDA the tanh form
            return out.unflatten(0, hidden_states.shape[:-1])
        x, slope = self.proj(hidden_states), 2 * (2 / torch.pi) ** 0.5
        if x.device.type == "cpu" and (x.requires_grad or torch.compiler.is_compiling()):
            return x * torch.sigmoid(slope * (x + 0.044715 * x * x * x))
        if x.device.type == "cpu" and x.dtype == torch.float32:  # in place
            gate = torch.addcmul(x.new_tensor(slope), x, x, value=0.044715 * slope)
            return gate.mul_(x).sigmoid_().mul_(x)
        return self.gelu(x)


def can_fuse(linear: nn.Linear, x: torch.Tensor) -> bool:
    """Whether a plain product with a projection's weights is all that calling it on x would be: not with a gradient,
    hooks (offload), adapters, quantised weights, or a cast on the way; a compiler fuses by itself."""
    if type(linear) is not nn.Linear or linear.bias is None or is_traceable_wrapper_subclass(linear.weight):
        return False
    hooks = linear._forward_pre_hooks or linear._forward_hooks or "forward" in vars(linear)
    away = torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type) or torch.compiler.is_compiling()
    return not hooks and not away and linear.weight.dtype == linear.bias.dtype == x.dtype
