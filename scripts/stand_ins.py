"""What stands for the files that a config names, where their content does not matter: random or fake weights, noise."""

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import save_file

from pipeline.bundle import transformer_settings, vae_shape_of
from pipeline.data.clips import CLIPS, encoder_mark
from pipeline.data.prompts import fixed_prompts
from pipeline.data.shards import ShardWriter
from pipeline.data.text import write_embeddings
from pipeline.train.trajectories import TRAJECTORIES, student_steps
from pipeline.train.vae import build_vae
from utils.config import Config
from utils.distributed import World
from utils.rng import keyed_randn
from utils.train_config import StoryConfig

WAN_14B = {"num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13824, "num_layers": 40}


def stand_ins(config: Config, folder: Path) -> Config:
    """The config with what takes the place of every file it names: VAE, prompts and their embeddings, in `folder`."""
    settings, data, dmd = transformer_settings(config), config.data, config.dmd
    vae = {"z_dim": config.model.in_channels, "latents_mean": [0.0] * config.model.in_channels,
           "latents_std": [1.0] * config.model.in_channels}  # fmt: skip
    if data.stories.count:  # DMD on stories: a rollout of their length
        dmd = replace(dmd, max_rollout_frames=data.stories.chunks * config.video.frames_per_chunk)
    re_encodes = dmd.max_rollout_frames not in (None, config.video.trained_frames)  # the first frame of a window
    with nullcontext() if re_encodes else init_empty_weights():
        model = build_vae(config.vae) if data.kind == "sprites" else AutoencoderKLWan(**vae)
    (model.save_pretrained if re_encodes else model.save_config)(folder / "vae")
    prompts = [f"prompt {number}" for number in range(8)]
    (folder / "prompts.txt").write_text("\n".join(prompts))
    shape = settings["text_len"], settings["text_dim"]
    write_embeddings(fixed_prompts(config) + prompts, lambda some: [keyed_randn(shape, prompt) for prompt in some],
                     "random", folder / "text", *shape, World())  # fmt: skip
    shapes = {
        name: path if path is not None and (Path(path) / "config.json").is_file() else None
        for name, path in (("teacher", dmd.teacher), ("critic", dmd.critic))
    }
    return replace(
        config,
        model=replace(config.model, bundle=None, checkpoint=None),
        train=replace(config.train, text_from=None),
        data=replace(data, kind="prompts", path=str(folder / "prompts.txt"), vae=str(folder / "vae"),
                     text_embeddings=str(folder / "text"), stories=StoryConfig()),
        dmd=replace(dmd, **shapes),
    )  # fmt: skip


def shallow(layers: int, depth: float | int | None) -> int:
    """Layers of a model at a share of its depth, or at most `depth` of them; None: all."""
    if isinstance(depth, float):
        return max(1, round(layers * depth))
    return layers if depth is None else min(layers, depth)


def at_depth(config: Config, folder: Path, depth: float | int | None) -> Config:
    """The config with what stands for every file that it names, and models of random weights; shapes are those of the
    files' configs where these are there, else of Wan2.1 by the folder's name."""
    folder.mkdir()
    settings = transformer_settings(config)
    names = ("num_attention_heads", "attention_head_dim", "ffn_dim", "in_channels", "text_dim", "text_len", "freq_dim")
    layers = shallow(settings["num_layers"], depth)
    model = replace(config.model, random_init=True, num_layers=layers, **{name: settings[name] for name in names})
    config = replace(config, model=model)
    scores = {}
    for role in ("teacher", "critic") if config.train.stage == "dmd" else ():
        named = Path(getattr(config.dmd, role) or config.dmd.teacher or "")
        shape = {k: settings[k] for k in (*names, "num_layers") if k != "text_len"} | {
            "_class_name": WanTransformer3DModel.__name__, "out_channels": settings["out_channels"]}  # fmt: skip
        if (named / "config.json").is_file():
            shape |= json.loads((named / "config.json").read_text())
        elif "14B" in str(named):
            shape |= WAN_14B
        (folder / role).mkdir()
        shape["num_layers"] = shallow(shape["num_layers"], depth)
        (folder / role / "config.json").write_text(json.dumps(shape))
        scores[role] = str(folder / role)
    trains_text = config.train.text_from is None and config.data.text_embeddings is None
    stages = ("vae", "dmd", None)
    ready = stand_ins(replace(config, dmd=replace(config.dmd, **scores)), folder)
    train = replace(ready.train, init_from=None, ema_start_step=0, phases=ready.train.phases[-1:],
                    sample_every=0, tracker=None)  # fmt: skip
    if config.train.stage not in stages:
        ready = replace(ready, data=replace(ready.data, kind="latents", path=str(folder), num_clips=2))
        write_latents(ready, folder)
    if trains_text:
        ready = replace(ready, data=replace(ready.data, text_embeddings=None))
    return replace(ready, train=train, vae=replace(config.vae, crop_steps=0))


def write_latents(config: Config, folder: Path) -> None:
    """Clips, single frames and trajectories of noise, two each."""
    vae = vae_shape_of(folder / "vae")
    save_file({"none": torch.zeros(1)}, folder / "vae" / "diffusion_pytorch_model.safetensors")
    size = vae.size(config.video)
    frames, prompts = vae.latent_frames(config.data.clip_frames), ["prompt 0", "prompt 1"]
    plan = {"vae": encoder_mark(folder / "vae"), "clips": 2}
    for name, length in (("clips", frames), ("stills", 1)):
        latents = keyed_randn((2, config.model.in_channels, length, *size), name).half()
        writer = ShardWriter(folder / name, CLIPS, plan, 1, World())
        writer.write(0, {"latents": latents}, [{"caption": prompt} for prompt in prompts], skipped={})
    steps, trained = student_steps(config).tolist(), config.video.trained_frames
    plan = {"timesteps": steps, "frames_per_chunk": config.video.frames_per_chunk}
    end = keyed_randn((2, config.model.in_channels, trained, *size), "end").half()
    points = end[:, None].expand(-1, len(steps), -1, -1, -1, -1)
    ShardWriter(folder / "ode", TRAJECTORIES, plan, 1, World()).write(0, {"points": points, "latents": end}, prompts)
    config.ode.path = str(folder / "ode")
