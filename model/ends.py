"""Before and behind the blocks of the chunk-causal DiT: its inputs checked and embedded, its output made a flow.

Shape letters: B batch, C latent channels, F latent frames, H W latent size, L tokens, G timestep groups.
"""

import torch
from einops import rearrange
from torch import nn

from model.geometry import ChunkGeometry
from model.kv import TextKV
from model.rope import Rotation, grid_positions, grid_rotation, precise


def behind_clean(
    noisy: torch.Tensor, timestep: torch.Tensor, clean: torch.Tensor, clean_timestep: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Teacher forcing's clip: clean latents, then noisy ones, [B, C, F, H, W] each -> [B, C, 2F, H, W], and a timestep
    for each frame [B, 2F]. `timestep`: [B, 1 or F]; `clean_timestep`: [B], [B, 1 or F], or None for 0.

    Raises:
        ValueError: latents of two shapes.
    """
    if clean.shape != noisy.shape:
        shapes = f"{tuple(clean.shape)}: must be of the shape of hidden_states, {tuple(noisy.shape)}"
        raise ValueError(f"clean_hidden_states are {shapes}")
    frames = noisy.shape[2]
    timestep = timestep.expand(-1, frames)
    clean_timestep = torch.zeros_like(timestep) if clean_timestep is None else clean_timestep
    clean_timestep = clean_timestep if clean_timestep.ndim == 2 else clean_timestep[:, None]
    return torch.cat((clean, noisy), dim=2), torch.cat((clean_timestep.expand(-1, frames), timestep), dim=1)


class Ends:
    """What `CausalWanModel.forward` does at its two ends, with the modules that `WanTransformer3DModel` has there."""

    def _check_inputs(self, frames: int, timestep: torch.Tensor, image: torch.Tensor | None, of_chunk: bool) -> None:
        """Raise ValueError for what no forward takes: image conditioning, frames [F] or a timestep [B, G] that do not
        fit."""
        if image is not None:
            raise ValueError("encoder_hidden_states_image: CausalWanModel is text-to-video only")
        chunk = self.config.frames_per_chunk
        if (frames != chunk) if of_chunk else (frames % chunk):
            raise ValueError(f"{frames} latent frames do not fit chunks of {chunk} (set frames_per_chunk)")
        if timestep.shape[1] not in (1, frames):
            raise ValueError(f"timestep has {timestep.shape[1]} columns: give [B], or [B, F] with {frames} frames")

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

    def _flow(self, x: torch.Tensor, temb: torch.Tensor, geometry: ChunkGeometry) -> torch.Tensor:
        """x [B, L, dim] behind the last block, temb [B, G, dim] -> [B, C, frames of L, H, W]."""
        _, patch_h, patch_w = geometry.patch_size
        h, w = geometry.grid
        out = self._project_out(x, temb)  # [B, L, C * prod(patch)]
        return rearrange(out, "b (f h w) (ph pw c) -> b c f (h ph) (w pw)", h=h, w=w, ph=patch_h, pw=patch_w)
