"""Streamed VAE decoding: a video's latents come in pieces, its pixels go out in pieces, memory stays flat.

`AutoencoderKLWan.decode` carries the last frames of every causal convolution from one latent frame to the next, but
forgets them at the end of the call. Here they live in the stream, so any number of videos can be decoded side by side
with one VAE, and what comes out does not depend on where the latents were cut.
"""

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, unpatchify


def denormalise(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """Latents [B, C, F, H, W] as the DiT sees them (mean 0, std 1 per channel) -> as the VAE does, in its dtype."""
    mean, std = (
        torch.tensor(values, device=latents.device).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return (latents.float() * std + mean).to(vae.dtype)


class StreamingDecoder:
    """Decodes one video (or a batch of equal length) piece by piece.

    Args:
        vae: the VAE; shared, never written to.
    """

    def __init__(self, vae: AutoencoderKLWan):
        self._vae = vae
        convolutions = sum(isinstance(module, WanCausalConv3d) for module in vae.decoder.modules())
        self._features: list = [None] * convolutions  # last frames seen by each, kept by the decoder's blocks
        self._started = False

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """The next latents of the video -> its next pixels.

        Args:
            latents: [B, C, F, H, W], normalised, any F >= 1, on the VAE's device.

        Returns:
            [B, 3, 4F, 8H, 8W] in -1..1 (4F - 3 frames at the start of the video), for a VAE of strides 4 and 8.

        Raises:
            ValueError: where the latents do not have the VAE's channels.
        """
        vae = self._vae
        if latents.shape[1] != vae.config.z_dim:
            raise ValueError(f"latents have {latents.shape[1]} channels, the VAE has {vae.config.z_dim}")
        hidden = vae.post_quant_conv(denormalise(vae, latents))  # [B, C, F, H, W]
        pieces = []
        for frame in hidden.split(1, dim=2):  # as the library does, for its memory
            pieces.append(
                vae.decoder(frame, feat_cache=self._features, feat_idx=[0], first_chunk=not self._started)
            )  # [B, 3 * p * p, 4, 8H / p, 8W / p]
            self._started = True
        video = torch.cat(pieces, dim=2)  # [B, 3 * p * p, 4F, 8H / p, 8W / p]
        if vae.config.patch_size is not None:
            video = unpatchify(video, patch_size=vae.config.patch_size)  # [B, 3, 4F, 8H, 8W]
        return video.clamp(-1.0, 1.0)
