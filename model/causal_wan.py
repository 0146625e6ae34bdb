"""The chunk-causal Wan2.1 DiT: one set of weights, three uses.

(a) a chunk with a cache context -> its flow and its K, V;
(b) a teacher-forced pass over a whole clip under the block mask (training);
(c) a plain chunk-causal pass over a noisy clip with a timestep per frame (diffusion forcing).

Modules and parameter names are those of `diffusers.WanTransformer3DModel`. The model only reads the cache: what a chunk
adds to it is returned, and `pipeline.generate.rollout` alone commits it.

Shape letters: B batch, C latent channels, F latent frames, H W latent size, L tokens, G timestep groups, D head dim.
"""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ModelMixin as ModelMixin  # pipelines look for it beside a class of ours to know how to load it
from diffusers import WanTransformer3DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils.peft_utils import apply_lora_scale
from torch import nn

from model.attention import CausalWanAttnProcessor, clip_mask
from model.block import CausalWanBlock, LayerMemory
from model.compressing import compress_archived, compress_own
from model.ends import Ends, behind_clean
from model.fresh_compressor import COMPRESSOR_PREFIX, FreshCompressor
from model.geometry import ChunkGeometry
from model.kv import ChunkKV, ReadyHistory, TextKV
from model.sequence import SequenceParallel


@dataclass
class CausalWanOutput(Transformer2DModelOutput):
    """`sample`: flow [B, C, F, H, W]; `kv`: the chunk's K, V where a context was given and every layer was computed."""

    kv: ChunkKV | None = None


class CausalWanModel(Ends, SequenceParallel, FreshCompressor, WanTransformer3DModel):
    """Chunk-causal Wan2.1 T2V transformer.

    Takes `WanTransformer3DModel`'s settings (and loads its checkpoints), and:

    Args:
        text_len: length that prompt embeddings are padded to with zeros, as Wan does.
        frames_per_chunk: latent frames generated together, B_f.
        compressor: a name of `COMPRESSORS`; `identity` and `lr` have no parameters.
        compressor_channels: widths of the compressor's strided stages in space.
    """

    _no_split_modules = ["CausalWanBlock"]
    _repeated_blocks = ["CausalWanBlock"]
    _skip_layerwise_casting_patterns = [*WanTransformer3DModel._skip_layerwise_casting_patterns, "pack_compressor"]

    @register_to_config
    def __init__(
        self,
        patch_size: tuple[int, ...] = (1, 2, 2),
        num_attention_heads: int = 12,
        attention_head_dim: int = 128,
        in_channels: int = 16,
        out_channels: int = 16,
        text_dim: int = 4096,
        freq_dim: int = 256,
        ffn_dim: int = 8960,
        num_layers: int = 30,
        cross_attn_norm: bool = True,
        qk_norm: str | None = "rms_norm_across_heads",
        eps: float = 1e-6,
        image_dim: int | None = None,
        added_kv_proj_dim: int | None = None,
        rope_max_seq_len: int = 1024,
        pos_embed_seq_len: int | None = None,
        text_len: int = 512,
        frames_per_chunk: int = 3,
        compressor: str = "hr_spatial",
        compressor_channels: tuple[int, ...] = (64, 256, 1024),
    ) -> None:
        if image_dim is not None or added_kv_proj_dim is not None:
            raise ValueError(f"image_dim={image_dim}: CausalWanModel is text-to-video only; leave image settings unset")
        super().__init__(
            patch_size=patch_size,
            num_attention_heads=num_attention_heads,
            attention_head_dim=attention_head_dim,
            in_channels=in_channels,
            out_channels=out_channels,
            text_dim=text_dim,
            freq_dim=freq_dim,
            ffn_dim=ffn_dim,
            num_layers=0,  # Wan's own blocks would only be thrown away
            cross_attn_norm=cross_attn_norm,
            qk_norm=qk_norm,
            eps=eps,
            rope_max_seq_len=rope_max_seq_len,
        )
        self.register_to_config(num_layers=num_layers)
        dim = num_attention_heads * attention_head_dim
        self.rope = None  # positions come by formula (model/rope.py), not from a table
        self.blocks = nn.ModuleList(
            CausalWanBlock(dim, ffn_dim, num_attention_heads, qk_norm, cross_attn_norm, eps) for _ in range(num_layers)
        )
        self.pack_compressor = self._new_compressor()

    def geometry(self, latent_height: int, latent_width: int) -> ChunkGeometry:
        """Shape numbers of this model's chunks at a latent size."""
        return ChunkGeometry(self.config.frames_per_chunk, latent_height, latent_width, tuple(self.config.patch_size))

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_hidden_states_image: torch.Tensor | None = None,
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        *,
        context=None,
        clean_hidden_states: torch.Tensor | None = None,
        clean_timestep: torch.Tensor | None = None,
        return_kv: bool = True,
        return_sample: bool = True,
        compress: bool = True,
        kv: ChunkKV | None = None,
        train_compressor: bool = False,
        text_kv: TextKV | None = None,
        low_res: torch.Tensor | None = None,
    ) -> CausalWanOutput | tuple[torch.Tensor]:
        """Flow of noisy latents.

        Args:
            hidden_states: noisy latents [B, C, F, H, W]; F is one chunk with `context`, else a multiple of the chunk.
            timestep: [B], or [B, F] per frame, in 0..1000.
            encoder_hidden_states: prompt embeddings [B, <= text_len, text_dim]; without a context also one of every
                chunk [B, chunks, <= text_len, text_dim].
            context: `ChunkContext` of the chunk, from `PackCache.context()`; use (a). What its `ready` gives, where the
                model is compiled as a whole without a break.
            clean_hidden_states: clean latents [B, C, F, H, W]. Without a context: use (b), teacher forcing. With one:
                what the compressor sees, where that differs from `hidden_states`.
            clean_timestep: [B] or [B, F] of the clean half in (b); 0 by default.
            return_dict: False returns the tuple (sample,) as Wan does; the chunk's K, V come with True alone.
            return_kv: with a context, also return the chunk's K, V; with `compress` its compressed ones too, where they
                will be needed. None where a step cache of diffusers (FirstBlockCache, PAB, ...) left out a layer.
            return_sample: whether the flow is wanted; without, and with a context, the last block makes K, V only.
            kv: of the chunk, from an earlier forward without `compress`: only compressed K, V of `hidden_states`, its
                clean latents, are added. There is no `sample` then.
            train_compressor: with a context, recompute the selected mid chunks' K, V from their latents with gradient.
            text_kv: memo of the prompts' cross-attention K, V, filled where empty; not used while gradients are on.
            low_res: latents [B, C, f, h, w] of the chunk's averaged pixels (`encode_small`), to return K, V for a cache
                whose compressor looks at pixels.

        Raises:
            ValueError: frames that do not fit the chunk, a prompt that is too long, image conditioning, a context with
                attention processors that cannot read it.
        """
        _, _, frames, height, width = hidden_states.shape
        geometry, chunk = self.geometry(height, width), self.config.frames_per_chunk
        timestep = timestep if timestep.ndim == 2 else timestep[:, None]  # [B, G]
        self._check_inputs(frames, timestep, encoder_hidden_states_image, of_chunk=context is not None)
        if torch.is_grad_enabled():
            text_kv = None  # a memo has no gradient, and a recomputation must not find it filled
        latents, clean = hidden_states, hidden_states if clean_hidden_states is None else clean_hidden_states
        teacher_forcing = context is None and clean_hidden_states is not None
        if teacher_forcing:
            latents, timestep = behind_clean(hidden_states, timestep, clean, clean_timestep)  # of 2F frames, [B, 2F]

        x = self.patch_embedding(latents).flatten(2).transpose(1, 2).contiguous()  # [B, L, dim]
        temb, modulation = self._embed_time(timestep, x.dtype)  # [B, G, dim], [B, G, 6, dim]
        if encoder_hidden_states.ndim == 4:
            text_kv = None  # it remembers one prompt a video
        text = self._embed_text(encoder_hidden_states, text_kv)  # [B, (chunks,) text_len, dim] or None
        if text is not None and text.ndim == 4 and teacher_forcing:
            text = text.repeat(1, 2, 1, 1)  # the clean chunks, and the noisy ones
        if context is None:
            rotation = self._clip_rotation(geometry, frames, teacher_forcing, x.device)
            make_mask = clip_mask.__wrapped__ if torch.compiler.is_compiling() else clip_mask  # dynamo sees no memo
            mask = make_mask(frames, geometry.tokens_per_frame, chunk, teacher_forcing, x.device)
            history = mid_tokens = new_mid = None
        else:
            if not (torch.compiler.is_compiling() and isinstance(context, ReadyHistory)):
                context = self._read_context(context, x, geometry)
            history, context, mask = context, context.context, None
            rotation = history.rotation
            mid_tokens = compress_archived(self, context) if train_compressor and context.trains_compressor else None
            wanted = return_kv and compress and history.compresses
            new_mid = compress_own(self, history, clean, low_res, modulation, text_kv) if wanted else None

        x, temb, modulation, text = self._own_part(x if kv is None else None, temb, modulation, text)
        layers = []
        for layer, block in enumerate(self.blocks):
            memory = None
            if context is not None or text_kv is not None:
                memory = LayerMemory.before(layer, history, mid_tokens, new_mid, text_kv, leaves=return_kv)
                memory.left = None if kv is None else kv.layers[layer]
                memory.only_kv = not (return_sample or context is None) and layer == len(self.blocks) - 1
            arguments = (x, text, modulation, rotation, mask, memory)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(block, *arguments)  # [B, L, dim]
            else:
                x = block(*arguments)  # [B, L, dim]
            if memory is not None:
                layers.append(memory.left)
                mid_tokens, new_mid = memory.after(mid_tokens, new_mid, text_kv)

        sample = None
        if x is not None:
            sample = self._flow(x, temb, geometry)[:, :, -frames:]  # [B, C, F, H, W]
        if not return_dict:
            return (sample,)
        complete = context is not None and return_kv and all(layer is not None for layer in layers)
        if not complete:
            return CausalWanOutput(sample=sample)
        frame = new_mid.frames[0] if new_mid is not None and context.keeps_history else None
        return CausalWanOutput(sample=sample, kv=ChunkKV(layers, clean, low_res, frame))

    @torch.compiler.disable  # a context is plain Python
    def _read_context(self, context, x: torch.Tensor, geometry: ChunkGeometry) -> ReadyHistory:
        """The history of the chunk x [B, L, dim]. Raises as `forward`."""
        ready = context if isinstance(context, ReadyHistory) else context.ready(len(self.blocks), x.device)
        ready.context.check_fits(x.shape[0], geometry)
        self._check_cache(ready.context.cache)
        for block in self.blocks:
            processor = block.attn1.processor
            if not isinstance(processor, CausalWanAttnProcessor):
                raise ValueError(f"attention processor {type(processor).__name__} cannot read a chunk's history: "
                                 "set CausalWanAttnProcessor or a subclass of it")  # fmt: skip
        return ready

    @classmethod
    def from_wan(cls, wan: WanTransformer3DModel, **settings: Any) -> "CausalWanModel":
        """A causal model with the weights of another, bidirectional or causal, and `settings` of its own; a compressor
        of other kind or shape is freshly initialised."""
        known = {k: v for k, v in wan.config.items() if not k.startswith("_")}
        model = cls(**{**known, **settings})
        own, given = model.state_dict(), wan.state_dict()
        shapes, stored = ({k: v.shape for k, v in x.items() if k.startswith(COMPRESSOR_PREFIX)} for x in (own, given))
        kept = {k: v for k, v in given.items() if k not in stored or shapes == stored}
        model.load_state_dict(own | {k: v for k, v in kept.items() if not k.startswith("rope.")})
        return model
