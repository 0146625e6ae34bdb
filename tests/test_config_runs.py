"""Every YAML in configs/ runs: its stage for one step, its inference for one chunk, at micro size.

What is made small is the network, the picture and the paths; cache, chunks, steps and losses stay the config's own.
"""

import json
import math
from pathlib import Path

import pytest
from diffusers import WanTransformer3DModel
from distill import SCORE
from tiny import HEIGHT, TEXT_LEN, WIDTH, transformer, write_bundle

import inference_packforcing
import train
from pipeline.train.checks import check_plan
from pipeline.train.stages import METHODS
from scripts import generate_ode_pairs
from utils.config import ConfigError
from utils.load_config import load_config

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
PROMPTS = "a red circle over a blue plain\na yellow square circles over a green plain\n"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A bundle without compressor, so that every config's own is fresh, two scores, and prompts."""
    root = tmp_path_factory.mktemp("micro")
    write_bundle(root / "bundle")
    transformer(compressor="identity").save_pretrained(root / "bundle" / "transformer")
    for name, layers in (("teacher", 2), ("critic", 1)):
        WanTransformer3DModel(**SCORE, num_layers=layers).save_pretrained(root / name)
    (root / "prompts.txt").write_text(PROMPTS)
    return root


def micro(world: Path, path: Path, logdir: Path) -> list[str]:
    """Overrides that shrink a config without changing what it does."""
    config = load_config(path)
    train_, data = config.train, config.data
    overrides = {
        "video.height": HEIGHT, "video.width": WIDTH, "model.num_layers": 1, "model.num_attention_heads": 2,
        "model.attention_head_dim": 12, "model.ffn_dim": 16, "model.in_channels": 4, "model.text_dim": 16,
        "model.text_len": TEXT_LEN, "model.text_layers": 1, "model.text_heads": 2, "model.freq_dim": 16,
        "model.checkpoint": "null", "train.logdir": logdir, "train.max_steps": 1, "train.total_batch_size": "null",
        "train.compile": "false", "train.log_every": 1, "train.threads": 1, "train.batch_size": 1,
        "data.vae": f"{world}/bundle/vae", "data.text_embeddings": "null",
        "data.num_clips": 2 if data.num_clips else 0, "data.num_stills": 2 if data.num_stills else 0,
        "data.stories.count": 2 if data.stories.count else 0, "dmd.critic_updates": 1,
        "dmd.teacher": f"{world}/teacher", "ode.path": logdir.parent / "pairs", "ode.num_trajectories": 2,
        "inference.num_output_frames": config.video.frames_per_chunk, "inference.dtype": "float32",
        "vae.encoder_dim": 4, "vae.decoder_dim": 4, "vae.z_dim": 4,
    }  # fmt: skip
    if config.model.bundle is not None or train_.stage is None:
        overrides["model.bundle"] = world / "bundle"
    if config.dmd.critic is not None:
        overrides["dmd.critic"] = world / "critic"
    if train_.text_from is not None:
        overrides["train.text_from"] = world / "bundle"
    if train_.init_from is not None:
        overrides["train.init_from"] = world / ("bundle/vae" if train_.stage == "vae" else "teacher")
    if train_.phases:
        overrides["train.phases"] = f"[{{steps: 1, frames: {train_.phases[-1].frames}, batch_size: 1}}]"
    if data.kind == "latents":  # drawn in place of prepared
        overrides |= {"data.kind": "sprites", "data.clip_frames": 4 * config.video.trained_frames - 3}
    if data.path is not None:
        overrides["data.path"] = world / "prompts.txt" if data.kind == "prompts" else logdir.parent / "latents"
    return [f"{key}={value}" for key, value in overrides.items()]


def of(*stages):
    found = [path for path in CONFIGS if load_config(path).train.stage in stages]
    return pytest.mark.parametrize("path", found, ids=lambda path: str(path.relative_to(ROOT / "configs")))


@of(*METHODS)
def test_the_stage_of_a_config_takes_a_step(world, tmp_path, monkeypatch, path):
    monkeypatch.setattr("pipeline.train.vae.STATISTICS_CLIPS", 2)  # of a VAE's latents, at export
    logdir = tmp_path / "run"
    arguments = ["--config_path", str(path), *micro(world, path, logdir)]
    if load_config(path).train.stage == "ode":
        assert generate_ode_pairs.main(arguments) == 0
    assert train.main([*arguments, "--no_visualize"]) == 0
    logs = (
        json.loads((logdir / "log.jsonl").read_text().splitlines()[0]) if load_config(path).train.log_every == 1 else {}
    )
    assert all(math.isfinite(value) for value in logs.values())
    if load_config(path).train.stage == "dmd":
        assert logs["critic/loss"] > 0 and logs["generator/loss"] > 0
        assert logs["generator/mid_tokens_attended"] > 0 and logs["generator/grad_norm_compressor"] > 0
    assert list((logdir / "bundle").iterdir())


@of(None, "dmd")
def test_inference_of_a_config_makes_a_chunk(world, tmp_path, path):
    arguments = ["--config_path", str(path), "--data_path", str(world / "prompts.txt"),
                 "--output_folder", str(tmp_path / "videos"), *micro(world, path, tmp_path / "run")]  # fmt: skip
    assert inference_packforcing.main(arguments) == 0
    assert len(list((tmp_path / "videos").glob("*.mp4"))) == 2


def test_lr_runs_on_an_untouched_generator(world, tmp_path, caplog):
    """The compressed middle without a weight of its own: nothing is initialised at random."""
    path = ROOT / "configs" / "wan_causal_forcing.yaml"
    arguments = ["--config_path", str(path), "--data_path", str(world / "prompts.txt"),
                 "--output_folder", str(tmp_path / "videos"), *micro(world, path, tmp_path / "run"), "cache.kind=pack",
                 "cache.compressor.kind=lr", "cache.recent=1", "inference.num_output_frames=12"]  # fmt: skip
    assert inference_packforcing.main(arguments) == 0
    assert "random" not in caplog.text
    sidecar = json.loads(next((tmp_path / "videos").glob("*.json")).read_text())
    assert sidecar["cache"]["mid"]["tokens"] == 1  # what the last chunk attended


@pytest.mark.parametrize("path", [p for p in CONFIGS if "gpu" in p.stem], ids=lambda path: path.stem)
def test_sizes_go_together_on_the_gpus_a_config_is_for(path):
    gpus = int(path.stem.split("gpu")[0].split("_")[-1])
    config = load_config(path)
    assert config.train.total_batch_size is not None
    check_plan(config, gpus)
    with pytest.raises(ConfigError, match=f": {gpus + 1} ranks x"):
        check_plan(config, gpus + 1)
