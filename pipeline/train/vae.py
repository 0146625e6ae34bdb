"""The VAE stage: `AutoencoderKLWan` trained from scratch on the sprite world.

What a small model of this class needs to train in minutes rather than days, and where each piece lives here: an
initialisation that starts as a per-frame network (`initialise`), single crowded frames before clips (`train.phases`),
crops before whole frames (`vae.crop_steps`), and whole clips in one pass with the numbers of the chunked path
(`pipeline/data/vae_clip.py`).
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, WanResample, WanResidualBlock
from torch import nn

from pipeline.data.vae_clip import channels_last, decode_clip, encode_moments, to_video
from pipeline.load import load_library_model
from pipeline.sources import need_folder
from pipeline.train.export import exported, swapped_in
from pipeline.train.method import Stage, Weights, method
from pipeline.train.plan import StepPlan
from pipeline.train.samples import write_samples
from utils.config import Config
from utils.distributed import World
from utils.files import read_json
from utils.rng import keyed_randn
from utils.sprites.world import HELD_OUT_START, SpriteSpec, caption, render, render_layers, sample_spec
from utils.train_config import VAEConfig

TEMPORAL_STAGES, RGB = 2, 3
CROP_STEP = 16  # px; background cells are 8 px wide, so the patterns keep their place on the latent grid
STATISTICS_CLIPS = 256
CUTS_PER_CLIP = 1.5  # on average, where `vae.cuts` has any


def build_vae(config: VAEConfig) -> AutoencoderKLWan:
    """A fresh VAE with 4x temporal and 8x spatial compression; statistics of the latents are 0 and 1 until measured."""
    vae = AutoencoderKLWan(
        base_dim=config.encoder_dim,
        decoder_base_dim=config.decoder_dim,
        z_dim=config.z_dim,
        dim_mult=list(config.dim_mult),
        num_res_blocks=config.res_blocks,
        attn_scales=[],
        temperal_downsample=[True] * TEMPORAL_STAGES,
        in_channels=RGB * config.patch_size**2,
        out_channels=RGB * config.patch_size**2,
        patch_size=config.patch_size,
        scale_factor_temporal=2**TEMPORAL_STAGES,
        scale_factor_spatial=config.patch_size * 2 ** (len(config.dim_mult) - 1),
        latents_mean=[0.0] * config.z_dim,
        latents_std=[1.0] * config.z_dim,
    )
    initialise(vae, config.initial_logvar)
    return vae


@torch.no_grad()
def initialise(vae: AutoencoderKLWan, initial_logvar: float) -> None:
    """Start near a per-frame network with quiet residual branches and a quiet posterior. The default start leaves a
    small model of this class stuck for hours: random past taps blur every frame with its predecessors, and a posterior
    as wide as the prior hides the signal."""
    for module in vae.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            nn.init.zeros_(module.bias)
            taps = module.weight.shape[2] if isinstance(module, nn.Conv3d) else 1
            spread = 1.0 / math.sqrt(module.weight[0].numel() / taps)
            nn.init.normal_(module.weight, std=spread)
            if isinstance(module, WanCausalConv3d) and taps > 1:
                module.weight[:, :, :-1] *= 0.1
    for module in vae.modules():
        if isinstance(module, WanResidualBlock):
            module.conv1.weight *= math.sqrt(2.0)
            module.conv2.weight *= 0.2
        if isinstance(module, WanResample) and module.mode in ("downsample3d", "upsample3d"):
            _keep_frames(module.time_conv)
    z_dim = vae.config.z_dim
    vae.encoder.conv_out.weight[z_dim:] *= 0.1
    for conv in (vae.quant_conv, vae.post_quant_conv):
        conv.weight.copy_(torch.eye(conv.weight.shape[0])[:, :, None, None, None])
    vae.quant_conv.bias[z_dim:] = initial_logvar
    vae.decoder.conv_out.weight *= 0.5


def _keep_frames(conv: WanCausalConv3d) -> None:
    """Make a temporal resampling start as "take the last frame" (down) and "show it twice" (up)."""
    copies = conv.out_channels // conv.in_channels
    conv.weight[:, :, -1, 0, 0] = torch.eye(conv.in_channels).repeat(copies, 1)
    conv.weight[:, :, :-1] = 0.0


@torch.no_grad()
def latent_statistics(vae: AutoencoderKLWan, clips: Iterable[torch.Tensor]) -> tuple[list[float], list[float]]:
    """Mean and std per latent channel over clips of one size [batch, 3, 1 + 4n, height, width], for the VAE's config.
    The std is that of sampled latents, posterior variance included: a channel that carries nothing keeps its unit std
    instead of having its residue blown up to it."""
    moments = []  # of every clip, mean and mean square per channel [2, z]
    for clip in clips:
        mean, logvar = (x.double() for x in encode_moments(vae, clip))  # [B, z, 1+n, h, w]
        moments.append(torch.stack((mean, mean.square() + logvar.exp())).mean(dim=(1, 3, 4, 5)))
    mean, square = torch.stack(moments).mean(0)  # [z] each
    return mean.tolist(), (square - mean.square()).sqrt().tolist()


def _start(config: Config, only_shape: bool = False) -> AutoencoderKLWan:
    """The VAE as training begins: `train.init_from`'s (with `only_shape` as its config describes it, no weights read),
    or a fresh one of `vae`'s shape."""
    if config.train.init_from is None:
        return build_vae(config.vae)
    folder = need_folder(config.train.init_from, "train.init_from", "a VAE")
    if only_shape:
        return AutoencoderKLWan.from_config(read_json(folder / "config.json"))
    return load_library_model(AutoencoderKLWan, folder, torch.float32)


@method("vae")
class VAEStage(Stage):
    """Data, network and objective of the VAE."""

    @classmethod
    def trained(cls, config: Config) -> list[nn.Module]:
        return [_start(config, only_shape=True)]

    def __init__(self, config: Config, device: torch.device, world: World):
        self.config, self.device = config, device
        self.plan = StepPlan(config, world.size)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.vae = channels_last(_start(config)).to(device)
        if not config.vae.train_encoder:
            self.vae.encoder.requires_grad_(False)
            self.vae.quant_conv.requires_grad_(False)
        self.modules = {"vae": self.vae}
        self._latent_std = torch.tensor(self.vae.config.latents_std, device=device).view(1, -1, 1, 1, 1)
        self._encode, self._decode = encode_moments, decode_clip

    def compile(self) -> None:
        self._encode, self._decode = torch.compile(encode_moments), torch.compile(decode_clip)

    def clip_frames(self, step: int) -> int:
        """Pixel frames of the clips at a step."""
        phase = self.plan.phase(step)
        return self.config.data.clip_frames if phase is None else self._pixel_frames(phase.frames)

    def _pixel_frames(self, latent_frames: int) -> int:
        return 1 + (latent_frames - 1) * self.vae.config.scale_factor_temporal

    def crop_size(self, step: int) -> tuple[int, int]:
        """Height and width of the clips at a step."""
        vae, video = self.config.vae, self.config.video
        return (vae.crop_height, vae.crop_width) if step < vae.crop_steps else (video.height, video.width)

    def batch(self, step: int, sample_indices: Sequence[int]) -> dict[str, Any]:
        """video [B, 3, 1+4n, H, W] in -1..1, noise [B, z, 1+n, H/8, W/8] of the posterior and std [B, 1, 1, 1, 1] of
        the noise on top, of a latent's own, all float32. Clips show one to `vae.max_sprites` sprites, each of a
        training clip of its own: more edges and colours a frame."""
        clips = [self._draw(step, index) for index in sample_indices]
        video = to_video(np.stack(clips)).to(self.device)
        (frames, height, width), stride = video.shape[2:], self.vae.config.scale_factor_spatial
        frames = 1 + (frames - 1) // self.vae.config.scale_factor_temporal
        shape = (self.vae.config.z_dim, frames, height // stride, width // stride)
        noise = [keyed_randn(shape, self.config.seed, "posterior", step, index) for index in sample_indices]
        most = self.config.vae.latent_noise
        std = [most * np.random.default_rng([self.config.seed, step, index, 1]).random() for index in sample_indices]
        std = torch.tensor(std, dtype=torch.float32).view(-1, 1, 1, 1, 1)
        return {"video": video, "noise": torch.stack(noise).to(self.device), "std": std.to(self.device)}

    def _draw(self, step: int, index: int) -> np.ndarray:
        """uint8 [F, H, W, 3]"""
        seed, video, frames = self.config.seed, self.config.video, self.clip_frames(step)
        rng = np.random.default_rng([seed, index])
        size = (video.height, video.width, video.fps)
        clip = render_layers(self._draw_sprites(rng), frames, *size)
        if self.config.vae.cuts and rng.random() < self.config.vae.cuts:  # a latent frame never shows two shots
            stride = self.vae.config.scale_factor_temporal
            for start in range(1, frames, stride):
                if rng.random() < stride * CUTS_PER_CLIP / frames:
                    clip[start:] = render_layers(self._draw_sprites(rng), frames - start, *size)
        height, width = self.crop_size(step)
        top = CROP_STEP * int(rng.integers((video.height - height) // CROP_STEP + 1))
        left = CROP_STEP * int(rng.integers((video.width - width) // CROP_STEP + 1))
        return clip[:, top : top + height, left : left + width]

    def _draw_sprites(self, rng: np.random.Generator) -> list[SpriteSpec]:
        count = int(rng.integers(1, self.config.vae.max_sprites + 1))
        return [sample_spec(self.config.seed, int(i)) for i in rng.integers(0, HELD_OUT_START, size=count)]

    def loss(self, role: str, batch: dict[str, Any], step: int) -> tuple[torch.Tensor, dict[str, float]]:
        """L1 and weighted MSE of the reconstruction from a sampled latent, plus a small KL to the unit Gaussian."""
        video, weights = batch["video"], self.config.vae
        with torch.set_grad_enabled(weights.train_encoder and torch.is_grad_enabled()):
            mean, logvar = (x.float() for x in self._encode(self.vae, video))  # [B, z, 1+n, H/8, W/8]
        spread = (logvar.exp() + (batch["std"] * self._latent_std).square()).sqrt()
        latents = mean + spread * batch["noise"]  # [B, z, 1+n, H/8, W/8]
        error = self._decode(self.vae, latents).float() - video  # [B, 3, 1+4n, H, W]
        l1, mse = error.abs().mean(), error.square().mean()
        kl = 0.5 * (mean.square() + logvar.exp() - logvar - 1.0).mean()
        psnr = 10.0 * torch.log10(4.0 / mse)  # the range -1..1 is 2 wide
        logs = {"l1": l1, "psnr": psnr, "kl": kl, "posterior_std": (0.5 * logvar).exp().mean()}
        loss = l1 + weights.mse_weight * mse + weights.kl_weight * kl
        if weights.change_weight and error.shape[2] > 1:
            logs["change"] = error.diff(dim=2).abs().mean()
            loss = loss + weights.change_weight * logs["change"]
        return loss, {key: value.item() for key, value in logs.items()}

    @torch.no_grad()
    def sample(self, step: int, folder: Path, ema: Weights | None) -> dict[str, float]:
        """Round trips of the first `train.sample_held_out` held-out clips, at `train.sample_frames` latent frames."""
        config, frames = self.config, self._pixel_frames(self.config.train.sample_frames)
        if not config.train.sample_held_out:
            return {}
        indices = range(HELD_OUT_START, HELD_OUT_START + config.train.sample_held_out)
        specs = [sample_spec(config.seed, index, "seen") for index in indices]
        size = (config.video.height, config.video.width, config.video.fps)
        video = to_video(np.stack([render(spec, frames, *size) for spec in specs])).to(self.device)
        with swapped_in(self.vae, None if ema is None else ema["vae"]):
            latents, _ = encode_moments(self.vae, video)  # not normalised: statistics are measured at the end
            return write_samples(folder, [caption(spec) for spec in specs], latents, self.vae, config.video.fps)

    @torch.no_grad()
    def export(self, folder: Path, ema: Weights | None) -> None:
        """vae/ in bfloat16, with the statistics of its latents in the config, measured on the weights as saved."""
        config = self.config
        with swapped_in(self.vae, None if ema is None else ema["vae"]):
            vae = exported(self.vae)
        if config.vae.train_encoder:
            size = (config.data.clip_frames, config.video.height, config.video.width, config.video.fps)
            videos = (to_video(render(sample_spec(config.seed, i), *size)[None]) for i in range(STATISTICS_CLIPS))
            mean, std = latent_statistics(vae.float(), videos)
            vae.register_to_config(latents_mean=mean, latents_std=std)
        vae.to(torch.bfloat16).save_pretrained(folder / "vae")
