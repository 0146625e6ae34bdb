"""One block of the chunk-causal DiT, and what goes in and out of it.

Shape letters: B batch, L tokens, G timestep groups, D head dim, M archived chunks, N_c tokens of a compressed one.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from diffusers.hooks._helpers import (
    AttentionProcessorMetadata,
    AttentionProcessorRegistry,
    TransformerBlockMetadata,
    TransformerBlockRegistry,
)
from diffusers.models.transformers.transformer_wan import WanTransformerBlock

from model.attention import CausalWanAttnProcessor, RMSNorm, project
from model.rope import Rotation

if TYPE_CHECKING:
    from model.cache.context import ChunkContext


class LayerKV(NamedTuple):
    """What one layer leaves behind of a chunk, un-rotated. [B, L, heads, D] each, `mid_*` [B, N_c, heads, D]."""

    query: torch.Tensor | None  # None where the history will not score by it
    key: torch.Tensor
    value: torch.Tensor
    mid_key: torch.Tensor | None
    mid_value: torch.Tensor | None


@dataclass
class ChunkKV:
    """What `PackCache.commit` takes: one `LayerKV` a layer, the chunk's clean latents [B, C, F, H, W], and those of its
    averaged pixels [B, C, f, h, w] where the compressor looks at them."""

    layers: list[LayerKV]
    latents: torch.Tensor
    low_res: torch.Tensor | None = None


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


@dataclass(eq=False)
class LayerMemory:
    """What one layer reads beyond its own tokens, a chunk's history and the prompts' K, V, and what it leaves behind.

    Args:
        layer: index of the block.
        context: `ChunkContext` of the chunk; None for a whole clip.
        mid_tokens: archived chunks whose K, V are projected anew, with gradient; None: the archived K, V are taken.
        new_mid: the chunk's own compressed tokens [B, N_c, dim].
        text_kv: memo of the prompts' K, V.
        left: filled by the forward; stays None where a hook skips the layer's attention.
    """

    layer: int
    context: "ChunkContext | None" = None
    mid_tokens: MidTokens | None = None
    new_mid: torch.Tensor | None = None
    text_kv: TextKV | None = None
    left: LayerKV | None = None

    @torch.compiler.disable  # or every layer and chunk would compile anew, as both are constants to the compiler
    def with_history(self, attn, query, rotated_key, value):
        """Keys and values of the history and the chunk itself: [B, history + L, heads, D] each."""
        selected = self.context.select(self.layer, query)  # [B, k] chunk ids
        mid = None
        if self.mid_tokens is not None and selected.shape[1]:
            mid = project(attn, _gather_chunks(self.mid_tokens, selected), "kv")
        keys, values = self.context.extend(self.layer, selected, rotated_key, value, mid)
        return keys.type_as(query), values.type_as(query)  # a cache may be of another dtype than the computation

    def leave(self, attn, query, key, value) -> None:
        """Keep the chunk's un-rotated query, key and value [B, L, heads, D], and K, V of its compressed tokens."""
        mid_key, mid_value = (None, None) if self.new_mid is None else project(attn, self.new_mid, "kv")
        self.left = LayerKV(query if self.context.keeps_query else None, key, value, mid_key, mid_value)

    @torch.compiler.disable
    def text(self, attn, text: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """K, V of the prompts [B, text_len, dim]: [B, text_len, heads, D] each."""
        if self.layer not in self.text_kv:
            self.text_kv[self.layer] = project(attn, text, "kv")
        return self.text_kv[self.layer]


class CausalWanBlock(WanTransformerBlock):
    """A Wan block whose self-attention takes its history from a `LayerMemory`, or a mask over a whole clip."""

    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, **settings)
        for attn in (self.attn1, self.attn2):
            attn.set_processor(CausalWanAttnProcessor())
            attn.norm_q, attn.norm_k = (RMSNorm(x.normalized_shape, x.eps) for x in (attn.norm_q, attn.norm_k))

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None,
        temb: torch.Tensor,
        rotary_emb: Rotation,
        mask=None,
        memory: LayerMemory | None = None,
    ) -> torch.Tensor:
        """hidden_states [B, L, dim], temb [B, G, 6, dim] -> [B, L, dim]; G timestep groups share the L tokens evenly.

        `encoder_hidden_states` [B, text_len, dim], or of G equal parts of L [B, G, text_len, dim], may be None where
        `memory` holds the prompts' K, V.
        """
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (self.scale_shift_table + temb.float()).unbind(2)
        groups = temb.shape[1]
        memory = {} if memory is None else {"memory": memory}  # unknown to processors of other models

        def modulate(x, scale, shift):  # [B, L, dim] -> [B, L, dim], in float32 as Wan does
            x = torch.addcmul(shift[:, :, None], x.unflatten(1, (groups, -1)), 1 + scale[:, :, None])
            return x.flatten(1, 2).type_as(hidden_states)

        def residual(x, update, gate):
            x, update = (y.float().unflatten(1, (groups, -1)) for y in (x, update))  # [B, G, L/G, dim] each
            return torch.addcmul(x, update, gate[:, :, None]).flatten(1, 2).type_as(hidden_states)

        x = modulate(self.norm1(hidden_states.float()), scale, shift)  # [B, L, dim]
        hidden_states = residual(hidden_states, self.attn1(x, None, mask, rotary_emb, **memory), gate)

        x = self.norm2(hidden_states.float()).type_as(hidden_states)
        text, parts = encoder_hidden_states, x
        if text is not None and text.ndim == 4:  # one text for each of G equal parts of the tokens
            parts, text = x.unflatten(1, (text.shape[1], -1)).flatten(0, 1), text.flatten(0, 1)  # [B * G, L / G, dim]
        hidden_states = hidden_states + self.attn2(parts, text, None, None, **memory).reshape(x.shape)

        x = modulate(self.norm3(hidden_states.float()), ffn_scale, ffn_shift)
        return residual(hidden_states, self.ffn(x), ffn_gate)


def _gather_chunks(tokens: MidTokens, selected: torch.Tensor) -> torch.Tensor:
    """Hidden tokens of the selected chunks: [B, k] ids -> [B, k * N_c, dim]."""
    place = {chunk: i for i, chunk in enumerate(tokens.chunk_ids)}
    index = torch.tensor([[place[chunk] for chunk in row] for row in selected.tolist()])
    rows = torch.arange(len(index))[:, None]
    return tokens.hidden[rows.to(tokens.hidden.device), index.to(tokens.hidden.device)].flatten(1, 2)


# What diffusers' step caches (FirstBlockCache, MagCache, ...) and layer skipping need to know of block and processor.
TransformerBlockRegistry.register(CausalWanBlock, TransformerBlockMetadata(return_hidden_states_index=0))
AttentionProcessorRegistry.register(
    CausalWanAttnProcessor,
    AttentionProcessorMetadata(skip_processor_output_fn=lambda attn, hidden_states, *_, **__: hidden_states),
)
