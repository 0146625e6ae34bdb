"""Clips to latents: `AutoencoderKLWan` over a whole clip at once, its chunked path without the feature cache.

The library's `encode` and `decode` walk the clip in chunks of one latent frame and carry every convolution's last
frames in a cache. That keeps memory flat at inference; in training it multiplies kernel launches and copies. Every
operation in between is causal, so one pass over the whole clip gives the same numbers, provided the temporal resampling
does what the cache makes it do: the first frame goes through untouched, and the up path never looks at it
(`tests/test_vae.py` holds the two equal).
"""

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample, patchify, unpatchify
from torch import nn


def channels_last(module: nn.Module) -> nn.Module:
    """Put convolution weights in the layout that CPU and GPU kernels want in bf16 (twice as fast on a CPU)."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv3d):
            layer.to(memory_format=torch.channels_last_3d)
        elif isinstance(layer, nn.Conv2d):
            layer.to(memory_format=torch.channels_last)
    return module


def _resample_frames(layer: WanResample, x: torch.Tensor) -> torch.Tensor:
    batch, _, frames, _, _ = x.shape
    x = x.transpose(1, 2).flatten(0, 1)  # [B*F, C, H, W]
    x = layer.resample(x)  # [B*F, C', H', W']
    return x.unflatten(0, (batch, frames)).transpose(1, 2)  # [B, C', F, H', W']


def _downsample(layer: WanResample, x: torch.Tensor) -> torch.Tensor:
    x = _resample_frames(layer, x)  # [B, C, 1+2n, H/2, W/2]
    if layer.mode != "downsample3d" or x.shape[2] == 1:
        return x
    return torch.cat([x[:, :, :1], layer.time_conv(x)], dim=2)  # [B, C, 1+n, H/2, W/2]


def _upsample(layer: WanResample, x: torch.Tensor) -> torch.Tensor:
    if layer.mode == "upsample3d" and x.shape[2] > 1:
        pairs = layer.time_conv(x[:, :, 1:])  # [B, 2C, n, H, W]
        pairs = pairs.unflatten(1, (2, -1)).permute(0, 2, 3, 1, 4, 5).flatten(2, 3)  # [B, C, 2n, H, W]
        x = torch.cat([x[:, :, :1], pairs], dim=2)  # [B, C, 1+2n, H, W]
    return _resample_frames(layer, x)  # [B, C/2, 1+2n, 2H, 2W]


def encode_moments(vae: AutoencoderKLWan, video: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """video [B, 3, 1+4n, H, W] in -1..1 -> posterior mean and log-variance, clamped as in the library, both
    [B, z, 1+n, H/8, W/8]."""
    encoder = vae.encoder
    x = patchify(video, vae.config.patch_size)  # [B, 3*p*p, F, H/p, W/p]
    x = encoder.conv_in(x)
    for layer in encoder.down_blocks:
        x = _downsample(layer, x) if isinstance(layer, WanResample) else layer(x)
    x = encoder.mid_block(x)  # [B, C, 1+n, H/8, W/8]
    x = encoder.conv_out(encoder.nonlinearity(encoder.norm_out(x)))  # [B, 2z, 1+n, H/8, W/8]
    mean, logvar = vae.quant_conv(x).chunk(2, dim=1)
    return mean, logvar.clamp(-30.0, 20.0)


def decode_clip(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """latents [B, z, 1+n, H/8, W/8], as the encoder gives them (not normalised) -> video [B, 3, 1+4n, H, W], without
    the library's clamp to -1..1 (a clamped pixel would get no gradient)."""
    decoder = vae.decoder
    x = decoder.conv_in(vae.post_quant_conv(latents))  # [B, C, 1+n, h, w]
    x = decoder.mid_block(x)
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            x = resnet(x)
        if block.upsamplers is not None:
            x = _upsample(block.upsamplers[0], x)
    x = decoder.conv_out(decoder.nonlinearity(decoder.norm_out(x)))  # [B, 3*p*p, 1+4n, H/p, W/p]
    return unpatchify(x, vae.config.patch_size)


def _statistics(vae: AutoencoderKLWan, device: torch.device) -> list[torch.Tensor]:
    """Mean and std per channel of the VAE's latents: [1, C, 1, 1, 1] each."""
    values = vae.config.latents_mean, vae.config.latents_std
    return [torch.tensor(each, device=device).view(1, -1, 1, 1, 1) for each in values]


def normalise(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """Latents [B, C, F, H, W] as the VAE encodes them -> float32 with mean 0 and std 1 per channel."""
    mean, std = _statistics(vae, latents.device)
    return (latents.float() - mean) / std


def denormalise(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """Latents [B, C, F, H, W] as the DiT sees them (mean 0, std 1 per channel) -> as the VAE does, in its dtype."""
    mean, std = _statistics(vae, latents.device)
    return (latents.float() * std + mean).to(vae.dtype)


def encode(vae: AutoencoderKLWan, video: torch.Tensor) -> torch.Tensor:
    """video [B, 3, F, H, W] in -1..1 -> normalised latents [B, C, 1 + (F-1)/4, H/8, W/8], the posterior's mean, by the
    library's own path."""
    return normalise(vae, vae.encode(video.to(vae.dtype)).latent_dist.mode())


def to_video(frames: np.ndarray) -> torch.Tensor:
    """uint8 [B, F, H, W, 3] -> float [B, 3, F, H, W] in -1..1, channels last."""
    return torch.from_numpy(frames).permute(0, 4, 1, 2, 3).float().div_(127.5).sub_(1.0)


@torch.no_grad()
def encode_frames(vae: AutoencoderKLWan, frames: np.ndarray, whole: bool = True) -> torch.Tensor:
    """uint8 [B, F, H, W, 3] -> normalised latents float32 [B, C, 1 + (F-1)/4, H/8, W/8], the posterior's mean. `whole`:
    a clip in one pass, on a CPU in bfloat16: fast for small frames. False: by the library's own path, a few frames at a
    time, as the memory of a whole clip at 480x832 is out of proportion to what it saves."""
    video = to_video(frames).to(vae.device)  # [B, 3, F, H, W]
    if not whole:
        return encode(vae, video)
    with torch.autocast("cpu", torch.bfloat16, enabled=video.device.type == "cpu"):
        mean, _ = encode_moments(vae, video)  # [B, C, f, h, w]
    return normalise(vae, mean)
