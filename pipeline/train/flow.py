"""Flow-matching stages on cached latents: the bidirectional teacher and the chunk-causal AR-diffusion model.

Both learn flow = noise - x0 at table timesteps drawn uniformly. The teacher draws one timestep a clip and, where no
text encoder is given, trains a small one along. AR diffusion is teacher forcing (Causal Forcing, arXiv 2602.02214):
one timestep a chunk, and the clean clip beside the noisy one under the block mask.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import nn

from model.schedule import NUM_TIMESTEPS, FlowMatchSchedule
from pipeline.bundle import transformer_settings, vae_shape_of
from pipeline.data.latents import LatentData
from pipeline.generate.inference import check_cache
from pipeline.generate.inputs import Prompts
from pipeline.generate.sampler import sample_clip
from pipeline.load import random_model
from pipeline.sources import vae_folder
from pipeline.train.generator import GeneratorStage
from pipeline.train.losses import flow_loss
from pipeline.train.method import method
from pipeline.train.plan import StepPlan
from pipeline.train.roles import load_causal, load_student, load_text, load_wan, prepare
from pipeline.train.text import TextConditioning
from pipeline.train.through_cache import flows_through_cache, loss_shares
from utils.choices import DataKind, LossWeighting, Sharding
from utils.config import CacheConfig, Config, ConfigError
from utils.distributed import World
from utils.rng import keyed_generator, keyed_randn

HIGH_NOISE = 700.0  # timestep that parts the two logged errors


class FlowMatching:
    """Flow matching on cached clips: what is drawn of them, and the loss of a predicted flow.

    Args:
        per_chunk: every chunk has a timestep, a caption and a weight of its own; else the clip has one.

    Raises `ConfigError` for clips that chunks do not fill.
    """

    def __init__(self, config: Config, device: torch.device, world: World, text: TextConditioning, per_chunk: bool):
        self.config, self.device, self.text, self.per_chunk = config, device, text, per_chunk
        self.plan = StepPlan(config, world.size)
        self.schedule = FlowMatchSchedule(config.train.shift)
        self.data = LatentData.load(config, device, world)
        channels, frames, *size = self.data.shape
        self.latent_shape = (channels, *size)
        if per_chunk:
            check_chunks(config, frames)

    def frames(self, step: int) -> int:
        """Latent frames of the clips at a step."""
        phase = self.plan.phase(step)
        return self.data.shape[1] if phase is None else phase.frames

    def batch(self, step: int, sample_indices: Sequence[int]) -> dict[str, Any]:
        """latents, noise [B, C, F, H, W] float32, timestep and shares of the loss [B, G] (G 1, or a group a chunk),
        captions of each clip, one or one a chunk; chunks that have a share, `wanted`."""
        seed, train = self.config.seed, self.config.train
        frames = self.frames(step)
        groups = frames // self.config.video.frames_per_chunk if self.per_chunk else 1
        latents, captions, weights, noise, picks, context = [], [], [], [], [], []
        for index in sample_indices:
            clip = self.data.sample(seed, index, frames)
            draw = keyed_generator(seed, "timestep", step, index)
            picks.append(torch.randint(NUM_TIMESTEPS, (groups,), generator=draw))  # table indices
            dropped, level = torch.rand(2, generator=draw).tolist()
            kept = dropped >= train.prompt_dropout
            captions.append([text if kept else self.config.sampler.negative_prompt for text in clip.captions])
            weights.append(clip.weights if self.per_chunk else None)
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
            "wanted": [chunk for chunk in range(groups) if any(row is None or row[chunk] for row in weights)],
            "step": step,
            "indices": list(sample_indices),
        }

    def embeds(self, batch: dict[str, Any]) -> torch.Tensor:
        """Captions [B, text_len, text_dim] where each clip has one, else [B, captions, text_len, text_dim]."""
        captions = batch["captions"]
        embeds = self.text.encode([text for texts in captions for text in texts])
        return embeds if len(captions[0]) == 1 else embeds.unflatten(0, (len(captions), -1))

    def noisy(self, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Noised clips [B, C, F, H, W] and their timesteps [B, F]."""
        latents, timestep = batch["latents"], batch["timestep"]
        timestep = timestep.repeat_interleave(latents.shape[2] // timestep.shape[1], dim=1)
        return self.schedule.add_noise(latents, batch["noise"], timestep), timestep

    def condition(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """What teacher forcing takes beside noisy clips, as the causal DiT names it: captions [B, (captions,) text_len,
        text_dim], and clean clips [B, C, F, H, W], noised to a level [B] below `train.context_noise_timestep`."""
        clean, level = batch["latents"], batch["context_timestep"]
        if self.config.train.context_noise_timestep > 0:
            seed, shape = self.config.seed, clean.shape[1:]
            noise = [keyed_randn(shape, seed, "context", batch["step"], index) for index in batch["indices"]]
            clean = self.schedule.add_noise(clean, torch.stack(noise).to(clean), level)
        return {"encoder_hidden_states": self.embeds(batch), "clean_hidden_states": clean, "clean_timestep": level}

    def loss(
        self, flow: torch.Tensor, batch: dict[str, Any], groups: slice = slice(None)
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """What a part of the clips' groups, with flow [B, C, f, H, W], adds to the loss, weighted by
        `train.loss_weighting` and by chunk, and to what is logged: the error, and that below and above t = 700."""
        count = batch["timestep"].shape[1]
        # Samples and chunks both count as rows: each has a timestep of its own.
        noise, latents = (
            x.unflatten(2, (count, -1))[:, :, groups].transpose(1, 2).flatten(0, 1)
            for x in (batch["noise"], batch["latents"])
        )
        flow = flow.float().unflatten(2, (-1, latents.shape[2])).transpose(1, 2).flatten(0, 1)
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


def check_chunks(config: Config, clip_frames: int | None = None) -> None:
    """Raise `ConfigError` where clips are not whole chunks. `clip_frames`: latent frames of the data, where known."""
    chunk = config.video.frames_per_chunk
    lengths = {f"train.phases[{i}].frames": phase.frames for i, phase in enumerate(config.train.phases)}
    for name, frames in (lengths or {"data.clip_frames": clip_frames or chunk}).items():
        if frames % chunk:
            raise ConfigError(f"setting `{name}` means clips of {frames} latent frames: these must be a multiple of "
                              f"video.frames_per_chunk={chunk}")  # fmt: skip


def mean_weights(shares: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Weights, like `shares`, of a mean over the masked rows; over all rows where none is left of them."""
    masked = shares * mask
    return masked / masked.sum() if masked.any() else shares / shares.numel()


def mean_where(errors: torch.Tensor, mask: torch.Tensor) -> float:
    """Mean over the masked rows; the mean over all where there is none, so that it can be averaged over ranks."""
    return (errors * mean_weights(torch.ones_like(errors), mask)).sum().item()


class ClipStage(GeneratorStage):
    """A stage on cached clips, in `clips`, with a `loss` of its own. `per_chunk`: as `FlowMatching` has it;
    `from_student`: the model is the one that `model` names."""

    per_chunk, from_student = True, False

    @classmethod
    def check(cls, config: Config) -> None:
        super().check(config)
        if cls.per_chunk:
            sprites, vae = config.data.kind == DataKind.sprites, vae_shape_of(vae_folder(config))
            check_chunks(config, vae.latent_frames(config.data.clip_frames) if sprites else None)

    def __init__(self, config: Config, device: torch.device, world: World):
        text = load_text(config, device)
        self.clips = FlowMatching(config, device, world, text, self.per_chunk)
        model = self.start(config, text, device, self.clips.latent_shape[0])
        super().__init__(config, device, model, text, self.clips.latent_shape)

    def start(
        self, config: Config, text: TextConditioning, device: torch.device, channels: int
    ) -> WanTransformer3DModel:
        """The model as training begins: else `train.init_from`'s, or random, of `model`'s shape for these latents."""
        if self.from_student:
            return load_student(config, text, device, channels)
        sizes = {"in_channels": channels, "out_channels": channels, "text_dim": text.text_dim}
        settings, path = transformer_settings(config) | sizes, config.train.init_from
        if path is None:
            model = random_model(self.kind, settings, config.seed)
        elif self.kind is WanTransformer3DModel:
            model = load_wan(path, "train.init_from")
        else:
            own = ("text_len", "frames_per_chunk", "compressor", "compressor_channels")
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.seed)  # of a fresh compressor
                model = load_causal(path, "train.init_from", **{name: settings[name] for name in own})
        return prepare(model.train(), config, device)

    def batch(self, step: int, sample_indices: Sequence[int]) -> dict[str, Any]:
        return self.clips.batch(step, sample_indices)

    def through_cache(
        self, batch: dict[str, Any], wanted: Collection[int], cache: CacheConfig | None = None
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """`flows_through_cache` of a batch's noisy chunks, `wanted` ones, against `cache`, else the configured one."""

        def context_noise(chunk: int, denoising_step: int, shape: tuple[int, ...]) -> torch.Tensor:
            keys = ((self.config.seed, "context", batch["step"], index, chunk) for index in batch["indices"])
            return torch.stack([keyed_randn(shape, *key) for key in keys])

        captions = batch["captions"]

        def prompts(chunk: int) -> Prompts:
            return Prompts(self.text.encode([texts[chunk % len(texts)] for texts in captions]))  # one, or one a chunk

        sampler = replace(self.config.sampler, guidance=1.0)
        rollout = self.new_rollout(sampler, prompts(0), context_noise, cache=cache)
        noisy, _ = self.clips.noisy(batch)
        level = batch["context_timestep"] if self.config.train.context_noise_timestep > 0 else None
        return flows_through_cache(
            rollout, batch["latents"], noisy, batch["noise"], batch["timestep"], prompts, level, wanted
        )


@method("teacher")
class TeacherStage(ClipStage):
    """Bidirectional `WanTransformer3DModel`, one timestep a clip."""

    kind, per_chunk = WanTransformer3DModel, False

    def loss(self, role: str, batch: dict[str, Any], step: int) -> tuple[torch.Tensor, dict[str, float]]:
        noisy, timestep = self.clips.noisy(batch)
        flow = self.transformer(noisy, timestep[:, 0], self.clips.embeds(batch), return_dict=False)[0]
        return self.clips.loss(flow, batch)

    def generate(self, noise, prompts, step):
        """Euler steps of the flow ODE with classifier-free guidance, over the whole clip at once."""
        frames = min(self.clips.frames(step), self.config.train.sample_frames)
        start = noise(0, 0, (self.latent_shape[0], frames, *self.latent_shape[1:])).to(self.device)
        return sample_clip(self.transformer, start, prompts, self.config.sampler)


@method("ar_diffusion")
class ARDiffusionStage(ClipStage):
    """Chunk-causal `CausalWanModel` by teacher forcing, one timestep a chunk."""

    @classmethod
    def check(cls, config: Config) -> None:
        super().check(config)
        check_cache(config, vae_shape_of(vae_folder(config)))  # of samples and, through it, of training

    def parts(self, role: str) -> dict[str, nn.Module]:
        compressor = self.transformer.pack_compressor
        return {"compressor": compressor} if self.config.train.through_cache and compressor is not None else {}

    def loss(self, role: str, batch: dict[str, Any], step: int) -> tuple[torch.Tensor, dict[str, float]]:
        noisy, timestep = self.clips.noisy(batch)
        flow = self.transformer(noisy, timestep, **self.clips.condition(batch)).sample
        return self.clips.loss(flow, batch)

    def losses(self, role: str, batch: dict[str, Any], step: int) -> Iterator[tuple[torch.Tensor, dict[str, float]]]:
        """As one loss under the block mask; through the cache (`train.through_cache`) a part a chunk."""
        train = self.config.train
        if not train.through_cache:
            yield self.loss(role, batch, step)
            return

        wanted = batch["wanted"] or [0]
        if train.sharding != Sharding.none:  # forwards are collective
            wanted = list(range(batch["shares"].shape[1]))
        flows = self.through_cache(batch, wanted)
        for chunk, flow in flows:
            yield self.clips.loss(flow, batch, slice(chunk, chunk + 1))
