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
from einops import rearrange
from torch import nn

from model.attention import CausalWanAttnProcessor, clip_mask
from model.block import CausalWanBlock, LayerMemory, Passed
from model.compressing import compress_archived, compress_own
from model.fresh_compressor import COMPRESSOR_PREFIX, FreshCompressor
from model.geometry import ChunkGeometry
from model.kv import ChunkKV, ReadyHistory, TextKV
from model.rope import Rotation, grid_positions, grid_rotation, precise
from model.sequence import SequenceParallel


@dataclass
class CausalWanOutput(Transformer2DModelOutput):
    """`sample`: flow [B, C, F, H, W]; `kv`: the chunk's K, V where a context was given and every layer was computed."""

    kv: ChunkKV | None = None


class CausalWanModel(SequenceParallel, FreshCompressor, WanTransformer3DModel):
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
        if encoder_hidden_states_image is not None:
            raise ValueError("encoder_hidden_states_image: CausalWanModel is text-to-video only")
        _, _, frames, height, width = hidden_states.shape
        geometry, chunk = self.geometry(height, width), self.config.frames_per_chunk
        if (frames != chunk) if context is not None else (frames % chunk):
            raise ValueError(f"{frames} latent frames do not fit chunks of {chunk} (set frames_per_chunk)")
        if torch.is_grad_enabled():
            text_kv = None  # a memo has no gradient, and a recomputation must not find it filled
        timestep = timestep if timestep.ndim == 2 else timestep[:, None]  # [B, G]
        if timestep.shape[1] not in (1, frames):
            raise ValueError(f"timestep has {timestep.shape[1]} columns: give [B], or [B, F] with {frames} frames")

        latents, clean = hidden_states, hidden_states if clean_hidden_states is None else clean_hidden_states
        teacher_forcing = context is None and clean_hidden_states is not None
        if teacher_forcing:
            if clean.shape != hidden_states.shape:
                shapes = f"{tuple(clean.shape)}: must be of the shape of hidden_states, {tuple(hidden_states.shape)}"
                raise ValueError(f"clean_hidden_states are {shapes}")
            timestep = timestep.expand(-1, frames)
            clean_timestep = torch.zeros_like(timestep) if clean_timestep is None else clean_timestep
            clean_timestep = clean_timestep if clean_timestep.ndim == 2 else clean_timestep[:, None]
            timestep = torch.cat((clean_timestep.expand(-1, frames), timestep), dim=1)  # [B, 2F]
            latents = torch.cat((clean, hidden_states), dim=2)  # [B, C, 2F, H, W]

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
            mid_tokens = new_mid = None
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
                memory = LayerMemory(layer, context, mid_tokens, new_mid, text_kv is not None, return_kv)
                memory.passed, memory.left = Passed(), None if kv is None else kv.layers[layer]
                memory.passed.prepare(layer, mid_tokens, new_mid)
                memory.room = None if context is None else history.rooms[layer]
                memory.only_kv = not (return_sample or context is None) and layer == len(self.blocks) - 1
                memory.text_pair = None if text_kv is None else text_kv.get(layer)
            arguments = (x, text, modulation, rotation, mask, memory)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(block, *arguments)  # [B, L, dim]
            else:
                x = block(*arguments)  # [B, L, dim]
            if memory is not None:
                layers.append(memory.left)
                if memory.text_pair is not None:
                    text_kv[layer] = memory.text_pair
                memory.passed.keep_text(layer, mid_tokens, new_mid)
                mid_tokens, new_mid = memory.passed.mid_tokens or mid_tokens, memory.passed.new_mid or new_mid
                memory.left = memory.passed.mid_tokens = None  # or a checkpoint would keep them until the backward pass

        sample = None
        if x is not None:
            sample = self._unpatchify(self._project_out(x, temb), latents.shape[2], geometry)  # [B, C, F or 2F, H, W]
            sample = sample[:, :, -frames:]  # [B, C, F, H, W]
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

    def _embed_time(self, timestep: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """timestep [B, G] -> temb [B, G, dim] and modulation [B, G, 6, dim]."""
        embedder = self.condition_embedder
        sinusoid = embedder.timesteps_proj(timestep.flatten()).unflatten(0, timestep.shape)  # [B, G, freq_dim]
        sinusoid = sinusoid.to(embedder.time_embedder.linear_1.weight.dtype)
        temb = embedder.time_embedder(sinusoid).to(dtype)  # [B, G, dim]
        return temb, embedder.time_proj(embedder.act_fn(temb)).unflatten(-1, (6, -1))

    def _embed_text(self, prompt_embeds: torch.Tensor, text_kv: TextKV | None) -> torch.Tensor | None:
        """[B, ..., n, text_dim], n <= text_len -> [B, ..., text_len, dim]; None where every layer has its K, V."""
        if text_kv is not None and len(self.blocks) - 1 in text_kv:
            return None
        missing = self.config.text_len - prompt_embeds.shape[-2]
        if missing < 0:
            raise ValueError(f"prompt embeddings have {prompt_embeds.shape[-2]} tokens: text_len is "
                             f"{self.config.text_len}")  # fmt: skip
        padded = nn.functional.pad(prompt_embeds, (0, 0, 0, missing))  # [B, ..., text_len, text_dim]
        return self.condition_embedder.text_embedder(padded)

    def _clip_rotation(self, geometry: ChunkGeometry, frames: int, repeat: bool, device: torch.device) -> Rotation:
        times = torch.arange(frames, dtype=precise(device), device=device)
        rows, cols = (grid_positions(size, size, aligned=False, device=device) for size in geometry.grid)
        return grid_rotation(times.repeat(2) if repeat else times, rows, cols, self.config.attention_head_dim)

    def _project_out(self, x: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        """x [B, L, dim], temb [B, G, dim] -> [B, L, C * prod(patch)]."""
        shift, scale = (self.scale_shift_table[:, None] + temb[:, :, None]).unbind(2)  # [B, G, dim] each
        out = self.norm_out(x.float()).unflatten(1, (temb.shape[1], -1))  # [B, G, L/G, dim]
        out = out * (1 + scale[:, :, None]) + shift[:, :, None]
        return self.proj_out(out.flatten(1, 2).type_as(x))

    def _unpatchify(self, x: torch.Tensor, frames: int, geometry: ChunkGeometry) -> torch.Tensor:
        _, patch_h, patch_w = geometry.patch_size
        h, w = geometry.grid
        return rearrange(x, "b (f h w) (ph pw c) -> b c f (h ph) (w pw)", f=frames, h=h, w=w, ph=patch_h, pw=patch_w)

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
