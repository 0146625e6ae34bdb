"""A world small enough to distil in a test: bundle, scores, latents, and the settings of the stages."""

from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from tiny import HEIGHT, WIDTH, transformer, write_bundle
from toy import randn, randomize

from model.weights import content_hash
from pipeline.data.shards import ShardWriter
from pipeline.train.stages import build_stage
from pipeline.train.trainer import Trainer
from utils.config import Config
from utils.distributed import World
from utils.load_config import load_config
from utils.sprites.world import caption, sample_spec
from utils.tracking import Tracker

CPU = torch.device("cpu")
CHANNELS, SIZE, CHUNK, FRAMES = 4, (HEIGHT // 8, WIDTH // 8), 2, 8  # latent channels, size, frames
SCORE = {
    "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": CHANNELS, "out_channels": CHANNELS,
    "text_dim": 16, "freq_dim": 16, "ffn_dim": 32,
}  # fmt: skip

SETTINGS = """
seed: 5
video: {{height: {height}, width: {width}, frames_per_chunk: {chunk}, trained_frames: {frames}}}
model: {{bundle: {root}/bundle}}
cache: {{sink: 1, recent: 1, top_k: 1, compressor: {{channels: [4, 8]}}}}
sampler: {{steps: [1000, 750, 500, 250], shift: 3.0, negative_prompt: a green square}}
inference: {{num_output_frames: {frames}}}
train:
  stage: {stage}
  logdir: {root}/{stage}
  text_from: {root}/bundle
  mixed_precision: "no"
  gradient_checkpointing: false
  shift: 3.0
  ema_start_step: 0
  batch_size: 2
  max_steps: 4
  checkpoint_every: 100
  optimizer: {{lr: 1.0e-3}}
data: {{kind: latents, path: {root}/latents, vae: {root}/bundle/vae}}
dmd:
  teacher: {root}/teacher
  critic: {root}/critic
  critic_updates: 2
  critic_optimizer: {{lr: 2.0e-3}}
  score_shift: 3.0
ode: {{path: {root}/pairs, num_trajectories: 5, shard_size: 2, grid_steps: 8}}
consistency: {{grid_steps: 6}}
"""


def write_world(root: Path) -> Path:
    """Everything on disk that the stages start from."""
    write_bundle(root / "bundle")
    student = transformer()
    randomize(student, seed=1)
    student.save_pretrained(root / "bundle" / "transformer")
    for seed, (name, layers) in enumerate((("teacher", 2), ("critic", 1)), start=2):
        score = WanTransformer3DModel(**SCORE, num_layers=layers)
        randomize(score, seed)
        score.save_pretrained(root / name)
    write_clips(root / "latents" / "clips", root / "bundle" / "vae")
    return root


def write_clips(folder: Path, vae: Path, count: int = 5) -> None:
    """Latents that drift: every frame is the one before and a little noise."""
    latents = randn(count, CHANNELS, FRAMES, *SIZE, seed=11).cumsum(2) * 0.4
    records = [{"caption": caption(sample_spec(0, i))} for i in range(count)]
    ShardWriter(folder, "clips", {"vae": content_hash(vae)}, 1, World()).write(0, {"latents": latents.half()}, records)


def settings(root: Path, stage: str, overrides: list[str] = ()) -> Config:
    path = root / f"{stage}.yaml"
    height, width = HEIGHT, WIDTH
    path.write_text(SETTINGS.format(root=root, stage=stage, height=height, width=width, chunk=CHUNK, frames=FRAMES))
    return load_config(path, list(overrides))


def make_stage(root: Path, name: str, *overrides: str):
    return build_stage(settings(root, name, overrides), CPU, World())


def run_stage(stage, logdir: Path, save: bool = True, config: Config | None = None) -> Trainer:
    """Run a stage to the end, without sample videos."""
    logdir.mkdir(exist_ok=True)
    tracker = Tracker(logdir, None, "test", {}, is_main=True)
    try:
        trainer = Trainer(config or stage.config, stage, World(), logdir, tracker, CPU, save, visualize=False)
        trainer.run()
    finally:
        tracker.close()
    return trainer


def gradients(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
