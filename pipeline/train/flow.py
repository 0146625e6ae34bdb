"""Flow-matching stages on cached latents: the bidirectional teacher and the chunk-causal AR-diffusion model.

Both learn flow = noise - x0 at table timesteps drawn uniformly. The teacher draws one timestep a clip and, where no
text encoder is given, trains a small one along. AR diffusion is teacher forcing (Causal Forcing, arXiv 2602.02214):
one timestep a chunk, and the clean clip beside the noisy one under the block mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import nn

from model.attention import prepare_for_cpu
from model.causal_wan import CausalWanModel
from model.geometry import WAN_PATCH_SIZE
from model.schedule import NUM_TIMESTEPS, FlowMatchSchedule
from pipeline.generate.bidirectional import sample_clip
from pipeline.generate.rollout import Prompts, Rollout, prompt_noise
from pipeline.train.generator import CausalGeneratorStage, Generator, GeneratorStage
from pipeline.train.losses import flow_loss
from pipeline.train.stage_parts import LatentData, TextConditioning, load_causal, load_wan
from pipeline.train.through_cache import flows_through_cache, loss_shares
from pipeline.train.trainer import StepPlan
from utils.config import Config, ConfigError, LossWeighting, Sharding
from utils.distributed import World
from utils.rng import keyed_generator, keyed_randn


class FlowMatchingStage(GeneratorStage):
    """What the stages share: data, text, noise and the loss."""

    timestep_per_chunk: bool

    def __init__(self, config: Config, device: torch.device, world: World):
        self.config, self.device = config, device
        self.plan = StepPlan(config, world.size)
        self.schedule = FlowMatchSchedule(config.train.shift)
        self.text = self._load_text()
        self.data = LatentData.load(config, device, world)
        self.vae_folder, self.latent_shape = self.data.vae_folder, (self.data.channels, *self.data.size)
        self.transformer = self._build(self.text.text_dim)  # the trainer moves it to the device
        if device.type == "cpu":
            prepare_for_cpu(self.transformer)
        if config.train.gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()
        trained_text = self.text.encoder if self.text.trainable else None
        self.modules = {"generator": Generator(self.transformer, trained_text)}

    def _load_text(self) -> TextConditioning:
        return TextConditioning.load(self.config, self.device, self.config.model.text_len)

    def _build(self, text_dim: int) -> nn.Module:
        raise NotImplementedError

    def _frames(self, step: int) -> int:
        """Latent frames of the clips at a step."""
        phases = self.config.train.phases
        return phases[self.plan.phase_of(step)[0]].frames if phases else self.data.frames

    def batch(self, step: int, sample_indices: Sequence[int]) -> dict[str, Any]:
        """latents, noise [B, C, F, H, W] float32, timestep and shares of the loss [B, G] (G 1, or a group a chunk),
        captions of each clip, one or one a chunk."""
        seed, train = self.config.seed, self.config.train
        frames = self._frames(step)
        groups = frames // self.config.video.frames_per_chunk if self.timestep_per_chunk else 1
        latents, captions, weights, noise, picks, context = [], [], [], [], [], []
        for index in sample_indices:
            clip = self.data.sample(seed, index, frames)
            draw = keyed_generator(seed, "timestep", step, index)
            picks.append(torch.randint(NUM_TIMESTEPS, (groups,), generator=draw))  # table indices
            dropped, level = torch.rand(2, generator=draw).tolist()
            kept = dropped >= train.prompt_dropout
            captions.append([text if kept else self.config.sampler.negative_prompt for text in clip.captions])
            weights.append(clip.weights if self.timestep_per_chunk else None)
            context.append(level * train.context_noise_timestep)
            noise.append(keyed_randn(clip.latents.shape, seed, "noise", step, index))
            latents.append(clip.latents)
        return {
            "latents": torch.stack(latents).to(self.device, torch.float32),
            "noise": torch.stack(noise).to(self.device),
            "timestep": self.schedule.timesteps[torch.stack(picks)].to(self.device),  # [B, G]
            "context_timestep": torch.tensor(context, device=self.device),  # [B]
            "captions": captions,
            "shares": loss_shares(weights, groups).to(self.device),
            "step": step,
            "indices": list(sample_indices),
        }

    def encode(self, captions: Sequence[Sequence[str]]) -> torch.Tensor:
        """Captions of each clip -> [B, text_len, text_dim] where each has one, else [B, captions, ...]."""
        embeds = self.text.encode([text for texts in captions for text in texts])
        return embeds if len(captions[0]) == 1 else embeds.unflatten(0, (len(captions), -1))

    def loss(self, role: str, batch: dict[str, Any], step: int) -> tuple[torch.Tensor, dict[str, float]]:
        """Flow loss, weighted by `train.loss_weighting` and by chunk, over samples; logs it below and above t = 700."""
        latents, noise = batch["latents"], batch["noise"]  # [B, C, F, H, W]
        timestep = self._per_frame(batch)  # [B, F]
        noisy = self.schedule.add_noise(latents, noise, timestep)
        flow = self._flow(noisy, timestep, self.encode(batch["captions"]), batch).float()
        return self._flow_loss(flow, batch, slice(None))

    def _per_frame(self, batch: dict[str, Any]) -> torch.Tensor:
        """Timesteps [B, F]."""
        timestep = batch["timestep"]  # [B, G]
        return timestep.repeat_interleave(batch["latents"].shape[2] // timestep.shape[1], dim=1)

    def _flow_loss(
        self, flow: torch.Tensor, batch: dict[str, Any], groups: slice
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """What a part of the clips' groups, with flow [B, C, f, H, W], adds to loss and logs."""
        count = batch["timestep"].shape[1]
        # Samples and chunks both count as rows: each has a timestep of its own.
        rows = [
            x.unflatten(2, (count, -1))[:, :, groups].transpose(1, 2).flatten(0, 1)
            for x in (batch["noise"], batch["latents"])
        ]
        noise, latents = rows
        flow = flow.unflatten(2, (-1, latents.shape[2])).transpose(1, 2).flatten(0, 1)
        errors = flow_loss(flow, noise, latents).unflatten(0, (len(batch["shares"]), -1))  # [B, g]
        share = batch["shares"][:, groups] / batch["shares"].numel()  # sums to 1 over samples and chunks
        weights = torch.ones_like(errors)
        if self.config.train.loss_weighting == LossWeighting.bell:
            weights = self.schedule.training_weight(batch["timestep"][:, groups]).to(errors)
        high = batch["timestep"] > HIGH_NOISE
        logs = {"flow_mse": (errors * share).sum().item()}
        for name, mask in (("high", high), ("low", ~high)):
            logged = mean_weights(batch["shares"], mask)[:, groups]
            logs[f"flow_mse_{name}"] = (errors * logged).sum().item()
        return (errors * weights * share).sum(), logs

    def _flow(self, noisy, timestep, embeds, batch) -> torch.Tensor:
        """noisy [B, C, F, H, W], timestep [B, F], embeds [B, text_len, text_dim] -> flow [B, C, F, H, W]."""
        raise NotImplementedError

    def _settings(self, text_dim: int) -> dict[str, Any]:
        """Shape of a fresh transformer: the config's `model` section and the data's channels."""
        model = self.config.model
        return {
            "patch_size": WAN_PATCH_SIZE,
            "num_layers": model.num_layers,
            "num_attention_heads": model.num_attention_heads,
            "attention_head_dim": model.attention_head_dim,
            "ffn_dim": model.ffn_dim,
            "in_channels": self.data.channels,
            "out_channels": self.data.channels,
            "text_dim": text_dim,
            "freq_dim": model.freq_dim,
            "cross_attn_norm": model.cross_attn_norm,
            "eps": model.eps,
        }


HIGH_NOISE = 700.0  # timestep that parts the two logged errors


def mean_weights(shares: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Weights [B, G] of a mean over the masked rows, by their shares; over all rows where none is left of them."""
    masked = shares * mask
    return masked / masked.sum() if masked.any() else shares / shares.numel()


def mean_where(errors: torch.Tensor, mask: torch.Tensor) -> float:
    """Mean over the masked rows; the mean over all where there is none, so that it can be averaged over ranks."""
    return (errors[mask] if mask.any() else errors).mean().item()


class TeacherStage(FlowMatchingStage):
    """Bidirectional `WanTransformer3DModel`, one timestep a clip."""

    name = "teacher"
    timestep_per_chunk = False

    def _build(self, text_dim: int) -> WanTransformer3DModel:
        if self.config.train.init_from is not None:
            model = load_wan(self.config.train.init_from, "train.init_from")
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.config.seed)
                model = WanTransformer3DModel(**self._settings(text_dim), rope_max_seq_len=1024)
        return model.train()

    def _flow(self, noisy, timestep, embeds, batch):
        return self.transformer(noisy, timestep[:, 0], embeds, return_dict=False)[0]

    def _generate(self, prompts, embeds, negative, step):
        """Euler steps of the flow ODE with classifier-free guidance, over the whole clip at once."""
        sampler, frames = self.config.sampler, min(self._frames(step), self.config.train.sample_frames)
        shape = (self.latent_shape[0], frames, *self.latent_shape[1:])
        noise = prompt_noise(self.config.seed, prompts, [0] * len(prompts))(0, 0, shape).to(self.device)
        return sample_clip(self.transformer, noise, Prompts(embeds, negative), sampler)


class ARDiffusionStage(FlowMatchingStage, CausalGeneratorStage):
    """Chunk-causal `CausalWanModel` by teacher forcing, one timestep a chunk."""

    name = "ar_diffusion"
    timestep_per_chunk = True

    def __init__(self, config: Config, device: torch.device, world: World):
        super().__init__(config, device, world)
        chunk = config.video.frames_per_chunk
        lengths = [phase.frames for phase in config.train.phases] or [self.data.frames]
        for frames in lengths:
            if frames % chunk:
                raise ConfigError(f"clips of {frames} latent frames do not fit video.frames_per_chunk={chunk}")

    def _build(self, text_dim: int) -> CausalWanModel:
        extra = {
            "text_len": self.config.model.text_len,
            "frames_per_chunk": self.config.video.frames_per_chunk,
            "compressor": self.config.cache.compressor.kind,
            "compressor_channels": tuple(self.config.cache.compressor.channels),
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            if self.config.train.init_from is None:
                return CausalWanModel(**self._settings(text_dim), **extra).train()
            return load_causal(self.config.train.init_from, "train.init_from", **extra).train()

    def parts(self, role: str) -> dict[str, nn.Module]:
        compressor = self.transformer.pack_compressor
        return {"compressor": compressor} if self.config.train.through_cache and compressor is not None else {}

    def losses(self, role: str, batch: dict[str, Any], step: int) -> Iterator[tuple[torch.Tensor, dict[str, float]]]:
        """As one loss under the block mask; through the cache (`train.through_cache`) a part a chunk."""
        train = self.config.train
        if not train.through_cache:
            yield self.loss(role, batch, step)
            return

        def context_noise(chunk: int, denoising_step: int, shape: tuple[int, ...]) -> torch.Tensor:
            keys = ((self.config.seed, "context", step, index, chunk) for index in batch["indices"])
            return torch.stack([keyed_randn(shape, *key) for key in keys])

        shares, captions = batch["shares"], batch["captions"]

        def prompts(chunk: int) -> Prompts:
            return Prompts(self.text.encode([texts[chunk % len(texts)] for texts in captions]))  # one, or one a chunk

        wanted = shares.any(0).nonzero().flatten().tolist() or [0]
        if train.sharding != Sharding.none:  # forwards are collective
            wanted = list(range(shares.shape[1]))
        sampler = replace(self.config.sampler, guidance=1.0)
        rollout = Rollout(self.transformer, self.new_cache(), sampler, prompts(0), context_noise)
        noisy = self.schedule.add_noise(batch["latents"], batch["noise"], self._per_frame(batch))
        flows = flows_through_cache(
            rollout, batch["latents"], noisy, batch["noise"], batch["timestep"], prompts,
            batch["context_timestep"] if train.context_noise_timestep > 0 else None, wanted,
        )  # fmt: skip
        for chunk, flow in flows:
            yield self._flow_loss(flow, batch, slice(chunk, chunk + 1))

    def _context(self, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Clean clips [B, C, F, H, W], noised as far as `train.context_noise_timestep` says, and their timestep [B]."""
        clean, level = batch["latents"], batch["context_timestep"]
        if self.config.train.context_noise_timestep > 0:
            seed, shape = self.config.seed, clean.shape[1:]
            noise = [keyed_randn(shape, seed, "context", batch["step"], index) for index in batch["indices"]]
            clean = self.schedule.add_noise(clean, torch.stack(noise).to(clean), level)
        return clean, level

    def _flow(self, noisy, timestep, embeds, batch):
        clean, level = self._context(batch)
        out = self.transformer(noisy, timestep, embeds, clean_hidden_states=clean, clean_timestep=level)
        return out.sample
