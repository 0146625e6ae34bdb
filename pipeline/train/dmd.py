"""Distribution-matching distillation of the few-step generator (DMD, arXiv 2311.18828; Self-Forcing, 2506.08009).

The generator is rolled out exactly as at inference (`pipeline/generate/rollout.py`), cache and compressor included,
and every chunk stops at one random step, which runs with gradient. Two bidirectional scores look at the clip: the
frozen teacher says where real videos are, the critic, trained along on the generator's clips, where generated ones are.
Their difference is the generator's gradient.

All randomness is keyed by (seed, purpose, role, step, sample index), so it does not depend on ranks or accumulation.
"""

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import nn

from model.schedule import NUM_TIMESTEPS, FlowMatchSchedule
from pipeline.bundle import read_shape, transformer_settings, vae_shape_of
from pipeline.data.vae_clip import encode
from pipeline.generate.inputs import Prompts
from pipeline.generate.rollout import Rollout
from pipeline.generate.vae_stream import StreamingDecoder
from pipeline.sources import need_folder, vae_folder
from pipeline.train.generator import GeneratorStage
from pipeline.train.losses import dmd_loss, flow_loss, guided, kl_gradient
from pipeline.train.method import method
from pipeline.train.parallel import gathered
from pipeline.train.prompt_data import PromptData, Script, story_script
from pipeline.train.reach import attends_mid, check_mid_is_reached, inert
from pipeline.train.roles import check_student, load_score, load_student, load_text
from utils.choices import Reshard
from utils.config import Config, ConfigError, require
from utils.distributed import World
from utils.rng import keyed_generator, keyed_randn
from utils.timing import part
from utils.train_config import OptimizerConfig

_TINY = 1e-12
_WAN_SETTINGS = inspect.signature(WanTransformer3DModel.__init__).parameters


@dataclass(frozen=True)
class Generated:
    """A self-rollout."""

    latents: torch.Tensor  # its last `video.trained_frames` [B, C, F, H, W], float32
    frozen_frames: int  # latent frames at their start that the generator has no gradient for
    rollout: Rollout  # how they came about


@method("dmd")
class DMDStage(GeneratorStage):
    """Generator and critic against a frozen teacher; `dmd.critic_updates` of the critic to one of the generator.

    What is logged of the generator, the critic's lag included, is logged at the steps at which it is due.
    """

    @classmethod
    def check(cls, config: Config) -> None:
        """Both scores must be of the student's world, too."""
        super().check(config)
        check_student(config)
        told, window = config.data.stories, config.video.trained_frames // config.video.frames_per_chunk
        require(config, "data.stories.chunks", not told.count or told.chunks > window,
                f"the last takes the {window} chunks of video.trained_frames; a story needs more")  # fmt: skip
        require(config, "data.num_clips", not told.count or config.data.num_clips,
                "clips of one shot say what latents should look like")  # fmt: skip
        student = transformer_settings(config)
        for key, path in (("dmd.teacher", config.dmd.teacher), ("dmd.critic", config.dmd.critic)):
            if path is None and (config.model.random_init or key == "dmd.critic"):
                continue  # a random one of the student's shape; the teacher's
            settings = read_shape(need_folder(path, key, "a WanTransformer3DModel") / "config.json")
            for name in ("in_channels", "text_dim"):
                own = settings.get(name, _WAN_SETTINGS[name].default)
                if own != student[name]:
                    raise ConfigError(f"setting `{key}` is {path}: its {name} is {own}, the student's (model.bundle) "
                                      f"is {student[name]}")  # fmt: skip

    @classmethod
    def trained(cls, config: Config) -> list[nn.Module]:
        key = "dmd.critic" if config.dmd.critic is not None else "dmd.teacher"
        folder = need_folder(config.dmd.critic or config.dmd.teacher, key, "a WanTransformer3DModel")
        return [*super().trained(config), WanTransformer3DModel.from_config(read_shape(folder / "config.json"))]

    def __init__(self, config: Config, device: torch.device, world: World):
        self.config = config
        self.window = config.video.trained_frames // config.video.frames_per_chunk  # chunks that the scores see
        longest = config.dmd.max_rollout_frames or config.video.trained_frames
        self.max_chunks = longest // config.video.frames_per_chunk
        told = config.data.stories
        longest_told = max(self.max_chunks, told.chunks if told.count and told.share else 0)
        size = vae_shape_of(vae_folder(config)).size(config.video)
        check_mid_is_reached(config.cache, longest_told, (config.video.frames_per_chunk, *size))
        text = load_text(config, device)
        student = load_student(config, text, device)
        super().__init__(config, device, student, text, (student.config.in_channels, *size))
        self.new_cache()  # raises where its settings do not fit the model
        if student.pack_compressor is not None:
            student.pack_compressor.requires_grad_(config.dmd.train_compressor)
        self.prompts = PromptData.load(config, self.latent_shape[0], device, world)
        self.teacher, self.critic = (load_score(config, role, student, device) for role in ("teacher", "critic"))
        self.teacher.requires_grad_(False).eval()
        self.modules = {"critic": self.critic.train(), **self.modules}
        self.frozen = {"teacher": self.teacher}
        if config.dmd.offload_teacher and device.type == "cuda":
            self.teacher.enable_group_offload(device, offload_type="block_level", num_blocks_per_group=1,
                                              use_stream=True)  # fmt: skip
            self.offloaded = [self.teacher]
        self.schedule = FlowMatchSchedule(config.train.shift)

    def roles(self, step: int) -> tuple[str, ...]:
        """The critic at every step; after every `dmd.critic_updates`-th of them the generator too."""
        return ("critic", "generator") if (step + 1) % self.config.dmd.critic_updates == 0 else ("critic",)

    def optimizer(self, role: str) -> OptimizerConfig | None:
        return self.config.dmd.critic_optimizer if role == "critic" else None

    def keeps_ema(self, role: str) -> bool:
        return role == "generator"

    def parts(self, role: str) -> dict[str, nn.Module]:
        compressor = self.transformer.pack_compressor
        trained = role == "generator" and compressor is not None and self.config.dmd.train_compressor
        return {"compressor": compressor} if trained else {}

    def role_batch(self, role: str, step: int, sample_indices: Sequence[int]) -> dict[str, Any]:
        """Prompts, other ones for each role, as in the reference; everything else is made by the generator."""
        key = (self.config.seed, role) if role == "generator" else self.config.seed
        script = story_script(self.config, step, key, sample_indices) or self.prompts.script(key, sample_indices)
        return {"script": script, "indices": list(sample_indices)}

    def batch(self, step: int, sample_indices: Sequence[int]) -> dict[str, Any]:
        return self.role_batch("critic", step, sample_indices)

    def ahead(self, role: str, step: int, sample_indices: Sequence[int]) -> None:
        if self.text.beside:
            script: Script = self.role_batch(role, step, sample_indices)["script"]
            self.text.ahead(chain(*script.prompts.values(), script.scored))

    def loss(self, role: str, batch: dict[str, Any], step: int) -> tuple[torch.Tensor, dict[str, float]]:
        script: Script = batch["script"]
        with part("text"):
            shots = {start: Prompts(self.text.encode(prompts)) for start, prompts in script.prompts.items()}
            embeds = self.text.encode(script.scored)  # [B, text_len, text_dim]
        with part("rollout"):
            made = self._generated(role, batch, step, shots)
        logs = {"mid_tokens_attended": float(made.rollout.mid_tokens_attended)}
        logs |= {"exit_step": float(made.rollout.grad_step)} | self.prompts.reference.compare(made.latents)
        objective = self._critic_loss if role == "critic" else self._generator_loss
        loss, more = objective(made, embeds, batch, step)
        return loss, logs | more

    # Rollout

    def exit_step(self, role: str, step: int) -> int:
        """Index of the denoising step at which every chunk on every rank stops."""
        draw = keyed_generator(self.config.seed, "exit", role, step)
        return int(torch.randint(len(self.config.sampler.steps), (), generator=draw))

    def num_chunks(self, role: str, step: int) -> int:
        """Chunks of the rollout, the same on every rank: from the window up to the longest, all equally likely."""
        draw = keyed_generator(self.config.seed, "length", role, step)
        return int(torch.randint(self.window, self.max_chunks + 1, (), generator=draw))

    def _generated(self, role: str, batch: dict[str, Any], step: int, shots: dict[int, Prompts]) -> Generated:
        """Roll the generator out; for its own update with gradient on the window's chunks."""
        story, seed, indices = batch["script"].chunks, self.config.seed, batch["indices"]
        chunks = story or self.num_chunks(role, step)
        longer = chunks > self.window
        # The first chunk of a window inside a longer shot holds a re-encoded frame that is not the generator's. In that
        # of a story's last shot it must remember: all but that frame is trained.
        trained = self.window - 1 if longer and not story else self.window

        def noise(chunk: int, denoising_step: int, shape: tuple[int, ...]) -> torch.Tensor:
            keys = ((seed, "rollout", role, step, index, chunk, denoising_step) for index in indices)
            return torch.stack([keyed_randn(shape, *key) for key in keys])  # [B, C, F, H, W]

        whole = gathered(self.transformer) if self.config.train.reshard == Reshard.never else nullcontext()
        with torch.set_grad_enabled(role == "generator"), whole:
            rollout = self.new_rollout(
                self.config.sampler,
                shots[0],
                noise,
                grad_step=self.exit_step(role, step),
                grad_from=chunks - trained if role == "generator" else chunks,
                train_compressor=self.config.dmd.train_compressor,
            )
            rolled = rollout.run(chunks, commit_last=False, parts=shots)
            made = [latents for _, latents in rolled]  # [B, C, F, H, W] each
            video = torch.cat(made, dim=2)  # [B, C, N, H, W]
        expected = attends_mid(self.config.cache, chunks, rollout.cache.geometry)
        if expected and rollout.mid_tokens_attended == 0:
            raise inert(self.config.cache, chunks)
        if longer:
            return Generated(self._as_clip(video), 1 if story else self.config.video.frames_per_chunk, rollout)
        return Generated(video, 0, rollout)

    @torch.no_grad()
    def _image_latent(self, latents: torch.Tensor) -> torch.Tensor:
        """The last pixel frame of a video's latents [B, C, n, H, W], encoded as an image: [B, C, 1, H, W].

        The scores know clips whose first latent stands for one frame, not four.
        """
        decoder = StreamingDecoder(self.decoder_vae)
        for frame in latents.split(1, dim=2):
            pixels = decoder.decode(frame)  # [B, 3, 1 or 4, 8H, 8W]
        return encode(self.decoder_vae, pixels[:, :, -1:])  # [B, C, 1, H, W]

    def _as_clip(self, video: torch.Tensor) -> torch.Tensor:
        """The last window of a longer video [B, C, N, H, W] as a clip of its own [B, C, F, H, W]."""
        frames = self.config.video.trained_frames
        first = self._image_latent(video[:, :, : 1 - frames].detach())
        return torch.cat([first.to(video), video[:, :, 1 - frames :]], dim=2)

    # Scores

    def _score_input(self, role: str, x0: torch.Tensor, batch: dict[str, Any], step: int):
        """x0 [B, C, F, H, W] -> timestep [B] (uniform, shifted, clamped; one per sample), noise, noisy latents."""
        dmd, picks, noise = self.config.dmd, [], []
        for index in batch["indices"]:
            draw = keyed_generator(self.config.seed, "score", role, step, index)
            picks.append(torch.randint(NUM_TIMESTEPS, (), generator=draw))
            noise.append(torch.randn(x0.shape[1:], generator=draw))
        u = torch.stack(picks) / NUM_TIMESTEPS  # [B]
        timestep = NUM_TIMESTEPS * dmd.score_shift * u / (1 + (dmd.score_shift - 1) * u)
        timestep = timestep.clamp(dmd.min_timestep, dmd.max_timestep).to(x0.device)
        noise = torch.stack(noise).to(x0.device)
        return timestep, noise, self.schedule.add_noise(x0.detach(), noise, timestep)

    @staticmethod
    def _flow(model: nn.Module, noisy: torch.Tensor, timestep: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        return model(noisy, timestep, embeds, return_dict=False)[0].float()  # [B, C, F, H, W]

    def _generator_loss(self, made: Generated, embeds: torch.Tensor, batch: dict[str, Any], step: int):
        """The DMD loss. Logs the size of its gradient and whether the critic keeps up.

        `critic_lag`: flow error of the critic on these clips over that of the teacher. Below 1 the critic knows them
        better than the teacher does; at 1 and above it has learnt nothing about them, and the gradient is noise.
        """
        x0, skip = made.latents, made.frozen_frames
        with torch.no_grad():
            timestep, noise, noisy = self._score_input("generator", x0, batch, step)
            critic_flow = self._flow(self.critic, noisy, timestep, embeds)
            negative = self.text.encode([self.config.sampler.negative_prompt], fixed=True).expand_as(embeds)
            both = self._flow(
                self.teacher, noisy.repeat(2, 1, 1, 1, 1), timestep.repeat(2), torch.cat((embeds, negative))
            )
            teacher_flow, uncond_flow = both.chunk(2)
            fake, real, uncond = (
                self.schedule.flow_to_x0(flow, noisy, timestep) for flow in (critic_flow, teacher_flow, uncond_flow)
            )
            guidance = self.config.dmd.guidance * (timestep >= self.config.dmd.guidance_above)  # [B]
            gradient = kl_gradient(x0, fake, guided(real, uncond, guidance[:, None, None, None, None]))
            critic_error, teacher_error = (flow_loss(flow, noise, x0).mean() for flow in (critic_flow, teacher_flow))
        loss = dmd_loss(x0[:, :, skip:], gradient[:, :, skip:])
        return loss.float(), {
            "kl_gradient": gradient[:, :, skip:].abs().mean().item(),
            "critic_error": critic_error.item(),
            "teacher_error": teacher_error.item(),
            "critic_lag": (critic_error / teacher_error.clamp_min(_TINY)).item(),
        }

    def _critic_loss(self, made: Generated, embeds: torch.Tensor, batch: dict[str, Any], step: int):
        """Flow matching on the generator's clips, renoised."""
        timestep, noise, noisy = self._score_input("critic", made.latents, batch, step)
        flow = self._flow(self.critic, noisy, timestep, embeds)
        return flow_loss(flow, noise, made.latents).mean(), {}
