"""What stages that train a generator share: fixed-prompt samples, and export as a bundle."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler
from torch import nn

from model.cache.cache import PackCache
from pipeline.bundle import write_model_index
from pipeline.data.prompts import sample_prompts
from pipeline.generate.rollout import Prompts, Rollout, prompt_noise
from pipeline.train.method import Stage, Weights
from pipeline.train.samples import write_samples
from pipeline.train.stage_parts import TextConditioning, save_exported, swapped_in
from utils.config import Config, TextPlacement


class Generator(nn.Module):
    """The module of the role "generator": the DiT and, where it is trained along, the text encoder."""

    def __init__(self, transformer: nn.Module, text_encoder: nn.Module | None = None):
        super().__init__()
        self.transformer = transformer
        self.text_encoder = text_encoder


class GeneratorStage(Stage):
    """A stage whose role "generator" can be sampled and exported.

    Attributes:
        transformer: the DiT inside `modules["generator"]`.
        text: conditioning.
        vae_folder: holds the VAE that decodes samples.
        latent_shape: (C, H, W) of a latent frame.
    """

    config: Config
    device: torch.device
    transformer: nn.Module
    text: TextConditioning
    vae_folder: Path
    latent_shape: tuple[int, int, int]

    def frozen_modules(self) -> list[nn.Module]:
        sharded = self.config.train.text_placement == TextPlacement.sharded
        encoder = self.text.encoder if sharded and not self.text.trainable else None
        return super().frozen_modules() + ([] if encoder is None else [encoder])

    def compile(self) -> None:
        torch._dynamo.config.recompile_limit = 32  # a variant per clip length of the curriculum, not per block
        for block in self.transformer.blocks:
            block.compile(dynamic=False)

    def vae(self) -> AutoencoderKLWan:
        return AutoencoderKLWan.from_pretrained(self.vae_folder).eval().to(self.device)

    @torch.no_grad()
    def sample(self, step: int, folder: Path | None, ema: Weights | None) -> dict[str, float]:
        """Videos of `train.sample_frames` in `folder` and, where asked for, longer ones in `folder/long`."""
        config, train = self.config, self.config.train
        prompts = sample_prompts(config)
        if not prompts:
            return {}
        module = self.modules["generator"]
        module.eval()
        with (
            swapped_in(module, None if ema is None else ema["generator"]),
            torch.random.fork_rng(devices=[]),
            torch.compiler.set_stance("force_eager"),  # sizes of its own, for a few forwards
            torch.autocast(self.device.type, torch.bfloat16, enabled=train.mixed_precision == "bf16"),
        ):
            embeds = self.text.encode([*prompts, config.sampler.negative_prompt]).float()
            latents = self._generate(prompts, embeds[:-1], embeds[-1:], step).float()
            if folder is None:
                module.train()
                return {}
            vae, short = self.vae(), train.sample_frames
            scores = write_samples(folder, prompts, latents[:, :, :short], vae, config.video.fps)
            if latents.shape[2] > short:
                longer = write_samples(folder / "long", prompts, latents, vae, config.video.fps)
                scores |= {f"long/{key}": value for key, value in longer.items()}
        module.train()
        return scores

    def _generate(self, prompts: list[str], embeds: torch.Tensor, negative: torch.Tensor, step: int) -> torch.Tensor:
        """Prompts, their embeddings [P, text_len, text_dim], negative [1, ...] -> sampled latents [P, C, F, H, W]."""
        raise NotImplementedError

    def export(self, folder: Path | None, ema: Weights | None) -> None:
        """A bundle (`pipeline/bundle.py`): transformer and text encoder in bfloat16, and the VAE as it is."""
        module = self.modules["generator"]
        with swapped_in(module, None if ema is None else ema["generator"]):
            save_exported(self.transformer, folder, "transformer")
            self.text.save(folder)
        if folder is None:
            return
        FlowMatchEulerDiscreteScheduler(shift=self.config.train.shift).save_pretrained(folder / "scheduler")
        shutil.copytree(self.vae_folder, folder / "vae", dirs_exist_ok=True)
        if (folder / "tokenizer").is_dir():
            write_model_index(folder, self.config)


class CausalGeneratorStage(GeneratorStage):
    """A generator that is sampled chunk by chunk, as at inference."""

    def new_cache(self) -> PackCache:
        """An empty cache as `cache` describes it, for the generator and the stage's latents."""
        video = self.config.video
        return PackCache.for_model(self.transformer, self.config.cache, *self.latent_shape[1:], video.trained_frames)

    def _generate(self, prompts, embeds, negative, step):
        config, train = self.config, self.config.train
        noise = prompt_noise(config.seed, prompts, [0] * len(prompts))
        rollout = Rollout(self.transformer, self.new_cache(), config.sampler, Prompts(embeds, negative), noise)
        chunks = max(train.sample_frames, train.sample_long_frames) // config.video.frames_per_chunk
        return torch.cat([latents for _, latents in rollout.run(chunks)], dim=2)
