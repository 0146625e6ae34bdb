"""What stages that train a generator share: fixed-prompt samples, and export as a bundle."""

import shutil
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from torch import nn

from model.cache.cache import PackCache
from model.causal_wan import CausalWanModel
from model.compressor import COMPRESSORS
from model.schedule import FlowMatchSchedule
from pipeline.bundle import pipeline_settings, read_shape, transformer_settings, vae_shape_of, write_model_index
from pipeline.data.prompts import sample_prompts
from pipeline.generate.inputs import NoiseSource, Prompts, prompt_noise
from pipeline.generate.pipeline import PackForcingPipeline
from pipeline.generate.rollout import Rollout
from pipeline.generate.sampler import SAMPLERS, check_commit
from pipeline.generate.vae_stream import StreamingDecoder
from pipeline.load import random_model
from pipeline.sources import need_folder, vae_folder
from pipeline.train.compiled import compile_blocks
from pipeline.train.export import save_exported, swapped_in
from pipeline.train.method import Stage, Weights
from pipeline.train.parallel import keeps_attention, models_of
from pipeline.train.roles import attention_operators
from pipeline.train.samples import write_samples
from pipeline.train.text import TextConditioning
from utils.choices import TextPlacement
from utils.config import CacheConfig, Config, SamplerConfig, require


class Generator(nn.Module):
    """The module of the role "generator": the DiT and, where it is trained along, the text encoder."""

    def __init__(self, transformer: nn.Module, text_encoder: nn.Module | None = None):
        super().__init__()
        self.transformer = transformer
        self.text_encoder = text_encoder


class GeneratorStage(Stage):
    """A stage whose role "generator" is sampled and exported; chunk by chunk, as at inference, unless `generate` says
    otherwise. The trainer moves its modules to the device. `latent_shape`: (C, H, W) of a latent frame."""

    kind: type[WanTransformer3DModel] = CausalWanModel

    @classmethod
    def check(cls, config: Config) -> None:
        COMPRESSORS[config.cache.compressor.kind]  # an unknown one shows here
        SAMPLERS[config.sampler.kind]
        check_commit(config.sampler, config.cache)
        model, given = config.model, config.train.text_from or config.data.text_embeddings  # else text is trained along
        require(config, "model.text_heads", given or model.text_dim % model.text_heads == 0,
                f"must divide model.text_dim={model.text_dim}")  # fmt: skip
        require(config, "model.attention_head_dim", model.attention_head_dim % 2 == 0, "must be even (rotary)")
        vae_shape_of(vae_folder(config)).size(config.video)

    @classmethod
    def trained(cls, config: Config) -> list[nn.Module]:
        channels, init = vae_shape_of(vae_folder(config)).channels, config.train.init_from
        settings = transformer_settings(config) | {"in_channels": channels, "out_channels": channels}
        if init is not None:
            settings |= read_shape(need_folder(init, "train.init_from", "a transformer") / "config.json")
        return [random_model(cls.kind, settings, config.seed)]

    def __init__(
        self, config: Config, device: torch.device, transformer: WanTransformer3DModel, text: TextConditioning,
        latent_shape: tuple[int, int, int],
    ):  # fmt: skip
        self.config, self.device = config, device
        self.transformer, self.text, self.latent_shape = transformer, text, latent_shape
        self.vae_folder = vae_folder(config)  # of the VAE that decodes samples
        self.modules = {"generator": Generator(transformer, text.encoder if text.trainable else None)}

    def close(self) -> None:
        self.text.close()

    def frozen_modules(self) -> list[nn.Module]:
        sharded = self.config.train.text_placement == TextPlacement.sharded
        encoder = self.text.encoder if sharded and not self.text.trainable else None
        return super().frozen_modules() + ([] if encoder is None else [encoder])

    def compile(self) -> None:
        torch._dynamo.config.recompile_limit = 32  # a variant per clip length of the curriculum, not per block
        kept = attention_operators() if keeps_attention(self.config, self.device) else ()
        for module in (*self.modules.values(), *self.targets.values(), *self.frozen.values()):
            for model in models_of(module):
                if isinstance(model, WanTransformer3DModel):
                    compile_blocks(model, kept, dynamic=False if model is self.transformer else None)

    def vae(self) -> AutoencoderKLWan:
        return AutoencoderKLWan.from_pretrained(self.vae_folder).eval().to(self.device)

    def new_cache(self, cache: CacheConfig | None = None) -> PackCache:
        """An empty cache as `cache`, else the config's, describes it, for the generator and the stage's latents."""
        frames = self.config.video.trained_frames
        return PackCache.for_model(self.transformer, cache or self.config.cache, *self.latent_shape[1:], frames)

    @cached_property
    def decoder_vae(self) -> AutoencoderKLWan:
        """The frozen VAE, kept for rollouts that look at pixels."""
        return self.vae()

    def new_rollout(
        self, sampler: SamplerConfig, prompts: Prompts, noise: NoiseSource, cache: CacheConfig | None = None,
        **options: Any,
    ) -> Rollout:  # fmt: skip
        """A rollout of the generator with an empty cache (`new_cache`); `options` as `Rollout` has them."""
        cache = self.new_cache(cache)
        decoder = StreamingDecoder(self.decoder_vae) if cache.needs_pixels else None
        return Rollout(self.transformer, cache, sampler, prompts, noise, decoder=decoder, **options)

    def scheduler(self) -> FlowMatchEulerDiscreteScheduler:
        """Of its rollouts and samples, and of those who load its bundle."""
        return FlowMatchEulerDiscreteScheduler(shift=FlowMatchSchedule(self.config.sampler.shift).shift)

    def generate(self, noise: NoiseSource, prompts: Prompts, step: int) -> torch.Tensor:
        """`noise` as a rollout takes it and P prompts -> latents [P, C, F, H, W]."""
        config, train = self.config, self.config.train
        settings = pipeline_settings(config)
        pipe = PackForcingPipeline(None, None, self.decoder_vae, self.scheduler(), self.transformer, **settings)
        latent_frames = max(train.sample_frames, train.sample_long_frames)
        chunks = pipe.stream(
            prompt_embeds=prompts.embeds, negative_prompt_embeds=prompts.negative, noise=noise,
            num_frames=pipe.vae_shape.frames(latent_frames), output_type="latent",
        )  # fmt: skip
        return torch.cat([chunk.latents for chunk in chunks], dim=2)

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
            noise = prompt_noise(config.seed, prompts, [0] * len(prompts))
            latents = self.generate(noise, Prompts(embeds[:-1], embeds[-1:]), step).float()
            if folder is None:
                module.train()
                return {}
            vae, short = self.decoder_vae, train.sample_frames
            scores = write_samples(folder, prompts, latents[:, :, :short], vae, config.video.fps)
            if latents.shape[2] > short:
                longer = write_samples(folder / "long", prompts, latents, vae, config.video.fps)
                scores |= {f"long/{key}": value for key, value in longer.items()}
        module.train()
        return scores

    def export(self, folder: Path | None, ema: Weights | None) -> None:
        """A bundle (`pipeline/bundle.py`): transformer and text encoder in bfloat16, and the VAE as it is."""
        module = self.modules["generator"]
        with swapped_in(module, None if ema is None else ema["generator"]):
            save_exported(self.transformer, folder, "transformer")
            self.text.save(folder)
        if folder is None:
            return
        self.scheduler().save_pretrained(folder / "scheduler")
        shutil.copytree(self.vae_folder, folder / "vae", dirs_exist_ok=True)
        if (folder / "tokenizer").is_dir():
            write_model_index(folder, self.config)
