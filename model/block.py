"""One block of the chunk-causal DiT, and what goes in and out of it.

Shape letters: B batch, L tokens, G timestep groups, D head dim, M archived chunks, N_c tokens of a compressed one.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from diffusers.models.transformers.transformer_wan import WanTransformerBlock

from model.attention import attend, rms_norm
from model.rope import Rotation


class LayerKV(NamedTuple):
    """What one layer leaves behind of a chunk, un-rotated. [B, L, heads, D] each, `mid_*` [B, N_c, heads, D]."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mid_key: torch.Tensor | None
    mid_value: torch.Tensor | None


@dataclass
class ChunkKV:
    """What `PackCache.commit` takes: one `LayerKV` a layer, and the chunk's clean latents [B, C, F, H, W]."""

    layers: list[LayerKV]
    latents: torch.Tensor


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


class MidTokens(NamedTuple):
    """Hidden tokens [B, M, N_c, dim] of archived chunks, with gradient to the compressor, and the chunks' ids [M]."""

    hidden: torch.Tensor
    chunk_ids: list[int]


class CausalWanBlock(WanTransformerBlock):
    """A Wan block whose self-attention takes its history from a context, or a mask over a whole clip."""

    layer: int  # index of the block, set by the model

    def _project_kv(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Un-rotated K, V of tokens [B, L, dim] by this layer's own projections: [B, L, heads, D] each."""
        attn = self.attn1
        key = rms_norm(attn.norm_k, attn.to_k(hidden)).unflatten(2, (attn.heads, -1))
        return key, attn.to_v(hidden).unflatten(2, (attn.heads, -1))

    def _self_attention(self, x, rotation, mask, context, mid_tokens):
        """x [B, L, dim] -> attention output [B, L, dim], (query, key, value) un-rotated."""
        attn, backend = self.attn1, self.attn1.processor._attention_backend
        query = rms_norm(attn.norm_q, attn.to_q(x)).unflatten(2, (attn.heads, -1))  # [B, L, heads, D]
        key, value = self._project_kv(x)  # [B, L, heads, D]
        rotated_query, rotated_key = rotation(query), rotation(key)
        if context is None:
            out = attend(rotated_query, rotated_key, value, backend, mask)  # [B, L, heads, D]
        else:
            keys, values = self._with_history(context, query, rotated_key, value, mid_tokens)
            out = attend(rotated_query, keys, values, backend)  # [B, L, heads, D]
        out = attn.to_out[0](out.flatten(2).type_as(x))  # [B, L, dim]
        return attn.to_out[1](out), (query, key, value)

    @torch.compiler.disable  # or every layer and chunk would compile anew, as both are constants to the compiler
    def _with_history(self, context, query, rotated_key, value, mid_tokens):
        """Keys and values of the history and the chunk itself: [B, history + L, heads, D] each."""
        selected = context.select(self.layer, query)  # [B, k] chunk ids
        mid = None
        if mid_tokens is not None and selected.shape[1]:
            mid = self._project_kv(_gather_chunks(mid_tokens, selected))
        return context.extend(self.layer, selected, rotated_key, value, mid)

    def _project_text(self, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, text_len, dim] -> K, V [B, text_len, heads, D] each."""
        attn = self.attn2
        key = rms_norm(attn.norm_k, attn.to_k(text)).unflatten(2, (attn.heads, -1))
        return key, attn.to_v(text).unflatten(2, (attn.heads, -1))

    @torch.compiler.disable
    def _memorised_text(self, text: torch.Tensor | None, text_kv: TextKV) -> tuple[torch.Tensor, torch.Tensor]:
        if self.layer not in text_kv:
            text_kv[self.layer] = self._project_text(text)
        return text_kv[self.layer]

    def _cross_attention(self, x, text, text_kv):
        """x [B, L, dim], text [B, text_len, dim] -> [B, L, dim]."""
        attn = self.attn2
        query = rms_norm(attn.norm_q, attn.to_q(x)).unflatten(2, (attn.heads, -1))  # [B, L, heads, D]
        key, value = self._project_text(text) if text_kv is None else self._memorised_text(text, text_kv)
        out = attend(query, key, value, attn.processor._attention_backend)  # [B, L, heads, D]
        out = attn.to_out[0](out.flatten(2).type_as(x))  # [B, L, dim]
        return attn.to_out[1](out)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None,
        temb: torch.Tensor,
        rotary_emb: Rotation,
        mask=None,
        context=None,
        mid_tokens: MidTokens | None = None,
        new_mid: torch.Tensor | None = None,
        text_kv: TextKV | None = None,
    ) -> tuple[torch.Tensor, LayerKV]:
        """hidden_states [B, L, dim], temb [B, G, 6, dim] -> [B, L, dim] and what the layer leaves behind.

        G timestep groups share the L tokens evenly. `new_mid` [B, N_c, dim]: the chunk's own compressed tokens.
        """
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (self.scale_shift_table + temb.float()).unbind(2)
        groups = temb.shape[1]

        def modulate(x, scale, shift):  # [B, L, dim] -> [B, L, dim], in float32 as Wan does
            x = torch.addcmul(shift[:, :, None], x.unflatten(1, (groups, -1)), 1 + scale[:, :, None])
            return x.flatten(1, 2).type_as(hidden_states)

        def residual(x, update, gate):
            x, update = (y.float().unflatten(1, (groups, -1)) for y in (x, update))  # [B, G, L/G, dim] each
            return torch.addcmul(x, update, gate[:, :, None]).flatten(1, 2).type_as(hidden_states)

        x = modulate(self.norm1(hidden_states.float()), scale, shift)  # [B, L, dim]
        x, (query, key, value) = self._self_attention(x, rotary_emb, mask, context, mid_tokens)
        hidden_states = residual(hidden_states, x, gate)

        x = self.norm2(hidden_states.float()).type_as(hidden_states)
        hidden_states = hidden_states + self._cross_attention(x, encoder_hidden_states, text_kv)

        x = modulate(self.norm3(hidden_states.float()), ffn_scale, ffn_shift)
        hidden_states = residual(hidden_states, self.ffn(x), ffn_gate)

        mid_key, mid_value = (None, None) if new_mid is None else self._project_kv(new_mid)
        return hidden_states, LayerKV(query, key, value, mid_key, mid_value)


def _gather_chunks(tokens: MidTokens, selected: torch.Tensor) -> torch.Tensor:
    """Hidden tokens of the selected chunks: [B, k] ids -> [B, k * N_c, dim]."""
    place = {chunk: i for i, chunk in enumerate(tokens.chunk_ids)}
    index = torch.tensor([[place[chunk] for chunk in row] for row in selected.tolist()])
    rows = torch.arange(len(index))[:, None]
    return tokens.hidden[rows.to(tokens.hidden.device), index.to(tokens.hidden.device)].flatten(1, 2)
