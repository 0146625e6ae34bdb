"""One block of the chunk-causal DiT, and what goes in and out of it.

Shape letters: B batch, L tokens, G timestep groups, D head dim, M archived chunks, N_c tokens of a compressed one.
"""

from dataclasses import dataclass

import torch
from diffusers.hooks._helpers import (
    AttentionProcessorMetadata,
    AttentionProcessorRegistry,
    TransformerBlockMetadata,
    TransformerBlockRegistry,
)
from diffusers.models.normalization import FP32LayerNorm
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel, WanTransformerBlock
from torch.nn.functional import layer_norm

from model.attention import CausalWanAttnProcessor, LayerNorm, RMSNorm, TanhGELU, exact, own_heads, project
from model.kv import History, LayerKV, MidTokens, Pair, ReadyHistory, Room, TextKV
from model.rope import Rotation


class Passed:
    """Compressed chunks that have passed through a block. Not a dataclass: of those FSDP gives the block a copy."""

    def __init__(self) -> None:
        self.mid_tokens: MidTokens | None = None
        self.new_mid: MidTokens | None = None
        self.memories: list[LayerMemory] = []  # of the layer, for each chunk that passes

    def prepare(self, layer: int, mid_tokens: MidTokens | None, new_mid: MidTokens | None) -> None:
        """Before the block: compiled code that knew which layer it is would be compiled anew for each."""
        frames, own = (None if tokens is None else tokens.frames for tokens in (mid_tokens, new_mid))
        for frame in frames or []:
            memory = LayerMemory(layer, frame.context, is_small=True, remembers_text=True)
            memory.selected, memory.text_pair = frame.context.small_selection(layer), frame.text_kv.get(layer)
            self.memories.append(memory)
        if own:
            self.memories.append(LayerMemory(layer, own[0].context, is_small=True, remembers_text=True))

    def keep_text(self, layer: int, mid_tokens: MidTokens | None, new_mid: MidTokens | None) -> None:
        """After the block."""
        frames = [frame for tokens in (mid_tokens, new_mid) if tokens is not None for frame in tokens.frames or []]
        for frame, memory in zip(frames, self.memories, strict=True):
            if memory.text_pair is not None:
                frame.text_kv[layer] = memory.text_pair


@dataclass(eq=False)
class LayerMemory:
    """What one layer reads beyond its own tokens, a chunk's history and the prompts' K, V, and what it leaves."""

    layer: int  # index of the block
    context: History | None = None  # of the chunk; None for a whole clip
    mid_tokens: MidTokens | None = None  # archived chunks whose K, V are made anew, with gradient; None: taken as kept
    new_mid: MidTokens | None = None  # the chunk's own compressed tokens, M = 1
    remembers_text: bool = False  # the prompts' K, V are to be kept
    leaves: bool = True  # the chunk's K, V are wanted
    only_kv: bool = False  # and nothing else of it, as in the last layer of a commit
    is_small: bool = False  # the tokens are those of a compressed chunk, in place of the chunk
    selected: torch.Tensor | None = None  # ids [B, k] of the mid chunks attended; the forward fills it
    mid_kv: Pair | None = None  # [B, M, N_c, heads, D] of `mid_tokens` that passed through the block
    # The forward fills it; stays None where a hook skips the layer's attention. Given where an earlier forward left it
    # and only its compressed K, V are wanted.
    left: LayerKV | None = None
    passed: Passed | None = None  # for the next layer
    room: Room | None = None  # where keys and values go, where that is settled
    text_pair: Pair | None = None  # the prompts' K, V; the forward fills it

    @classmethod
    def before(
        cls, layer: int, history: ReadyHistory | None, mid_tokens: MidTokens | None, new_mid: MidTokens | None,
        text_kv: TextKV | None, leaves: bool,
    ) -> "LayerMemory":  # fmt: skip
        """Of the block with index `layer`, from a forward's history (None: a whole clip) and memo (None: without)."""
        context = None if history is None else history.context
        memory = cls(layer, context, mid_tokens, new_mid, text_kv is not None, leaves)
        memory.passed = Passed()
        memory.passed.prepare(layer, mid_tokens, new_mid)
        memory.room = None if history is None else history.rooms[layer]
        memory.text_pair = None if text_kv is None else text_kv.get(layer)
        return memory

    def after(
        self, mid_tokens: MidTokens | None, new_mid: MidTokens | None, text_kv: TextKV | None
    ) -> tuple[MidTokens | None, MidTokens | None]:
        """Behind the block: fills `text_kv` and lets go of what the block left. Returns the compressed chunks for the
        next one."""
        if self.text_pair is not None:
            text_kv[self.layer] = self.text_pair
        self.passed.keep_text(self.layer, mid_tokens, new_mid)
        passed = self.passed.mid_tokens or mid_tokens, self.passed.new_mid or new_mid
        self.left = self.passed.mid_tokens = None  # or a checkpoint would keep them until the backward pass
        return passed

    def with_history(self, attn, query, rotated_key, value):
        """Keys and values of the history and the chunk itself: [B, history + L, heads, D] each."""
        if self.room is None or not torch.compiler.is_compiling():
            return self._with_history(attn, query, rotated_key, value)
        keys, values = self.room.attend(query, rotated_key, value)
        return keys.type_as(query), values.type_as(query)

    @torch.compiler.disable  # or every layer and chunk would compile anew, as both are constants to the compiler
    def _with_history(self, attn, query, rotated_key, value):
        if self.selected is None:
            self.selected = self.context.select(self.layer, query)
        if self.is_small:
            return self.context.extend_small(self.layer, self.selected, rotated_key, value)
        mid = None
        if self.mid_tokens is not None and self.selected.shape[1]:
            chunk_ids = self.mid_tokens.chunk_ids
            if self.mid_kv is None:
                hidden = _gather_chunks(self.mid_tokens.hidden, chunk_ids, self.selected)
                mid = own_heads(attn, project(attn, hidden, "kv"))
            else:
                mid = tuple(_gather_chunks(x, chunk_ids, self.selected) for x in self.mid_kv)
        keys, values = self.context.extend(self.layer, self.selected, rotated_key, value, mid)
        return keys.type_as(query), values.type_as(query)  # a cache may be of another dtype than the computation

    def leave(self, query, key, value) -> None:
        """Keep the chunk's un-rotated query, key and value [B, L, heads, D]."""
        if self.leaves:
            self.left = LayerKV(query if self.context.keeps_query else None, key, value, None, None)

    def text(self, attn, text: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """K, V of the prompts [B, text_len, dim]: [B, text_len, heads, D] each."""
        if self.text_pair is not None:
            return self.text_pair
        pair = project(attn, text, "kv")
        if self.remembers_text:
            pair = self.text_pair = tuple(x.detach() for x in pair)
        return pair


class CausalWanBlock(WanTransformerBlock):
    """A Wan block whose self-attention takes its history from a `LayerMemory`, or a mask over a whole clip."""

    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, **settings)
        self._use_own_attention()

    def _use_own_attention(self) -> None:
        for attn in (self.attn1, self.attn2):
            attn.set_processor(CausalWanAttnProcessor())
            for norm in (attn.norm_q, attn.norm_k):
                norm.__class__ = RMSNorm
        for norm in (self.norm1, self.norm2, self.norm3):
            if isinstance(norm, FP32LayerNorm):  # not where there is no cross_attn_norm
                norm.__class__ = LayerNorm
        self.ffn.net[0].__class__ = TanhGELU

    @staticmethod
    def adopt(model: WanTransformer3DModel) -> None:
        """Let a bidirectional Wan model run on blocks of this class, in place: the same numbers in fewer passes over
        memory, and queries, keys and values of one dtype, which flash kernels ask for."""
        for block in model.blocks:
            block.__class__ = CausalWanBlock
            block._use_own_attention()
        model._no_split_modules = [CausalWanBlock.__name__]

    def forward(
        self,
        hidden_states: torch.Tensor | None,
        encoder_hidden_states: torch.Tensor | None,
        temb: torch.Tensor,
        rotary_emb: Rotation,
        mask=None,
        memory: LayerMemory | None = None,
    ) -> torch.Tensor | None:
        """hidden_states [B, L, dim], temb [B, G, 6, dim] or [B, 6, dim] -> [B, L, dim]; G timestep groups share the L
        tokens evenly.

        `encoder_hidden_states` [B, text_len, dim], or of G equal parts of L [B, G, text_len, dim], may be None where
        `memory` holds the prompts' K, V. None comes out where `memory` wants nothing but the chunk's K, V. Compressed
        chunks of `memory` that pass through the blocks are run too, and left in it for the next block; without
        `hidden_states` the chunk's own alone.
        """
        arguments = encoder_hidden_states, temb, rotary_emb, mask, memory
        if memory is None:
            return self._run(hidden_states, *arguments)
        if memory.mid_tokens is not None and memory.mid_tokens.frames is not None:
            memories = memory.passed.memories[: len(memory.mid_tokens.frames)]
            memory.passed.mid_tokens, memory.mid_kv = self._run_small(memories, memory.mid_tokens, None)
        if hidden_states is not None:
            hidden_states = self._run(hidden_states, *arguments)
        if memory.new_mid is not None and memory.left is not None:
            if memory.new_mid.frames is None:
                mid_key, mid_value = own_heads(self.attn1, project(self.attn1, memory.new_mid.hidden[:, 0], "kv"))
            else:
                own = memory.passed.memories[-1:]
                own[0].selected, own[0].text_pair = memory.selected, memory.text_pair
                memory.passed.new_mid, kv = self._run_small(own, memory.new_mid, encoder_hidden_states)
                mid_key, mid_value = (part[:, 0] for part in kv)
            memory.left = memory.left._replace(mid_key=mid_key, mid_value=mid_value)
        return hidden_states

    def _run_small(self, memories: list[LayerMemory], tokens: MidTokens, text):
        """Compressed chunks through the block, each with its memory -> them, and their K, V [B, M, N_c, heads, D]."""
        hidden, kv = [], []
        for place, (frame, memory) in enumerate(zip(tokens.frames, memories, strict=True)):
            run = self._run(tokens.hidden[:, place], text, frame.modulation, frame.rotation, None, memory)
            hidden.append(run)
            kv.append((memory.left.key, memory.left.value))
            memory.left = None
        key, value = (torch.stack(part, dim=1) for part in zip(*kv, strict=True))
        return tokens._replace(hidden=torch.stack(hidden, dim=1)), (key, value)

    def _run(self, hidden_states, encoder_hidden_states, temb, rotary_emb, mask, memory) -> torch.Tensor | None:
        temb = temb if temb.ndim == 4 else temb[:, None]
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (self.scale_shift_table + temb.float()).unbind(2)
        groups = temb.shape[1]
        only_kv = memory is not None and memory.only_kv
        memory = {} if memory is None else {"memory": memory}  # unknown to processors of other models

        def scaled(base, x, factor):  # base + x * factor in float32, as Wan does, rounded once
            out = None
            if not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
                out = hidden_states.new_empty(x.shape)  # written by the same kernel
            with exact(x.device.type):
                return torch.addcmul(base, x, factor, out=out).flatten(1, 2).type_as(hidden_states)

        def modulate(norm, x, scale, shift):  # [B, L, dim] -> [B, L, dim]
            if x.device.type == "cpu" and shift.shape[:2] == (1, 1) and not torch.is_grad_enabled():
                with exact("cpu"):  # whose kernel takes weights of another dtype
                    return layer_norm(x, x.shape[-1:], 1 + scale.flatten(), shift.flatten(), norm.eps)
            x = norm(x)
            return scaled(shift[:, :, None], x.unflatten(1, (groups, -1)), 1 + scale[:, :, None])

        def residual(x, update, gate):
            x, update = (y.unflatten(1, (groups, -1)) for y in (x, update))  # [B, G, L/G, dim] each
            return scaled(x, update, gate[:, :, None])

        x = modulate(self.norm1, hidden_states, scale, shift)  # [B, L, dim]
        if only_kv:  # see `CausalWanAttnProcessor`
            self.attn1(x, None, mask, rotary_emb, **memory)
            return None
        hidden_states = residual(hidden_states, self.attn1(x, None, mask, rotary_emb, **memory), gate)

        x = self.norm2(hidden_states)
        text, parts = encoder_hidden_states, x
        if text is not None and text.ndim == 4:  # one text for each of G equal parts of the tokens
            parts, text = x.unflatten(1, (text.shape[1], -1)).flatten(0, 1), text.flatten(0, 1)  # [B * G, L / G, dim]
        update = self.attn2(parts, text, None, None, **memory).reshape(x.shape)
        hidden_states = hidden_states + update if torch.is_grad_enabled() else hidden_states.add_(update)  # our own

        x = modulate(self.norm3, hidden_states, ffn_scale, ffn_shift)
        return residual(hidden_states, self.ffn(x), ffn_gate)


def _gather_chunks(tokens: torch.Tensor, chunk_ids: list[int], selected: torch.Tensor) -> torch.Tensor:
    """Tokens [B, M, N_c, ...] of the chunks `chunk_ids` [M] -> those of the selected ones [B, k]: [B, k * N_c, ...]."""
    place = {chunk: i for i, chunk in enumerate(chunk_ids)}
    index = torch.tensor([[place[chunk] for chunk in row] for row in selected.tolist()])
    rows = torch.arange(len(index))[:, None]
    return tokens[rows.to(tokens.device), index.to(tokens.device)].flatten(1, 2)


# What diffusers' step caches (FirstBlockCache, MagCache, ...) and layer skipping need to know of block and processor.
TransformerBlockRegistry.register(CausalWanBlock, TransformerBlockMetadata(return_hidden_states_index=0))
AttentionProcessorRegistry.register(
    CausalWanAttnProcessor,
    AttentionProcessorMetadata(skip_processor_output_fn=lambda attn, hidden_states, *_, **__: hidden_states),
)
