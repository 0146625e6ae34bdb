"""Ranks, shards, accumulation and kills change nothing; checkpoints are whole or absent; what is exported loads."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from diffusers import WanTransformer3DModel
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse

from model.causal_wan import CausalWanModel
from model.weights import read_weights
from pipeline.train import checks as preflight
from pipeline.train.checkpoints import Checkpoints, list_checkpoints, read_info, read_into, tensor_shapes
from pipeline.train.checks import check_ranks
from pipeline.train.flow import ARDiffusionStage
from pipeline.train.parallel import prepare_stage
from pipeline.train.plan import StepPlan
from scripts import export_checkpoint
from tests import scale_runs
from tests.scale_runs import arguments, batch_of, finish, stage_overrides, start
from utils.choices import Sharding
from utils.config import Config, ConfigError
from utils.distributed import World
from utils.load_config import load_config

ROOT = Path(__file__).resolve().parents[1]
SLOW_STAGES = ["consistency", "forward"]
STAGES = ["teacher", "ar_diffusion", "dmd", *(pytest.param(stage, marks=pytest.mark.slow) for stage in SLOW_STAGES)]
TOLERANCE = 1e-5
WAYS = {  # name -> ranks, accumulation, further overrides
    "one": (1, 1, []),
    "accumulated": (1, 2, []),
    "ranks": (2, 1, []),
    "shards": (2, 1, ["train.sharding=full"]),
    "accumulated_shards": (2, 2, ["train.sharding=full", "train.text_placement=sharded"]),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    scale_runs.write_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def records(inputs, tmp_path_factory):
    """records(stage) -> what each of `WAYS` recorded."""
    done = {}

    def of_stage(stage):
        if stage in done:
            return done[stage]
        folder = tmp_path_factory.mktemp(stage)
        for ranks in (1, 2):
            argvs = {
                name: arguments(inputs, folder / name, *stage_overrides(inputs, stage), *batch_of(ranks, micros), *more)
                for name, (needed, micros, more) in WAYS.items()
                if needed == ranks
            }
            assert finish(start(ranks, scale_runs.recorded, argvs, folder)) == [0] * ranks
        done[stage] = {name: torch.load(folder / f"{name}.pt") for name in WAYS}
        return done[stage]

    return of_stage


def assert_same(record, reference):
    """Losses and gradients, the latter relative to each tensor's largest entry."""
    assert len(record["gradients"]) == len(reference["gradients"]) >= 5
    for ours, theirs in zip(record["gradients"], reference["gradients"], strict=True):
        assert ours.keys() == theirs.keys()
        errors = {name: (ours[name] - theirs[name]).abs().max() for name in theirs}
        allowed = {name: TOLERANCE * theirs[name].abs().max() for name in theirs}
        assert [name for name in theirs if errors[name] > allowed[name]] == []
    for ours, theirs in zip(record["logs"], reference["logs"], strict=True):
        for name in theirs:
            if name.endswith(("loss", "grad_norm")):
                assert ours[name] == pytest.approx(theirs[name], rel=TOLERANCE)


@pytest.mark.parametrize("way", [way for way in WAYS if way != "one"])
@pytest.mark.parametrize("stage", STAGES)
def test_ranks_shards_and_accumulation_change_nothing(records, stage, way):
    reference = records(stage)["one"]
    assert min(reference["moved"].values()) > 1e-3
    assert_same(records(stage)[way], reference)


@pytest.mark.slow
def test_hybrid_sharding_changes_nothing(records, inputs, tmp_path):
    argv = arguments(inputs, tmp_path / "run", *stage_overrides(inputs, "ar_diffusion"), *batch_of(4),
                     "train.sharding=hybrid", "train.shard_size=2")  # fmt: skip
    assert finish(start(4, scale_runs.recorded, {"hybrid": argv}, tmp_path)) == [0] * 4
    assert_same(torch.load(tmp_path / "hybrid.pt"), records("ar_diffusion")["one"])


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_a_run_goes_on_with_another_number_of_ranks(records, inputs, tmp_path, before, after):
    for ranks, steps in ((before, 3), (after, 5)):
        argv = arguments(inputs, tmp_path / "run", *stage_overrides(inputs, "ar_diffusion"), *batch_of(ranks),
                         "train.sharding=full", f"train.max_steps={steps}")  # fmt: skip
        assert finish(start(ranks, scale_runs.recorded, {"resumed": argv}, tmp_path)) == [0] * ranks
    resumed, reference = torch.load(tmp_path / "resumed.pt"), records("ar_diffusion")["one"]
    assert len(resumed["logs"]) == 2
    for ours, theirs in zip(resumed["logs"], reference["logs"][3:], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


def test_samples_go_on_where_another_number_of_ranks_left_off():
    config = Config()
    plan = replace(StepPlan(config, world_size=2), taken_elsewhere=30 - 10 * 2)  # ten steps of three ranks
    assert plan.samples_before(10) == 30
    assert [*plan.indices(10, 0, 0), *plan.indices(10, 0, 1), *plan.indices(11, 0, 0)] == [30, 31, 32]


def stored(checkpoint: Path) -> dict[str, torch.Tensor]:
    tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in tensor_shapes(checkpoint).items()}
    read_into(checkpoint, tensors)
    return tensors


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_killed_twice_ends_with_the_same_bits(inputs, tmp_path, ranks):
    def begin(name):
        argv = arguments(inputs, tmp_path / name, *stage_overrides(inputs, "ar_diffusion"), *batch_of(ranks),
                         "train.sharding=full", "train.max_steps=30", "train.checkpoint_every=2")  # fmt: skip
        return start(ranks, scale_runs.run, argv)

    assert finish(begin("whole")) == [0] * ranks
    checkpoints = tmp_path / "cut" / "checkpoints"
    for after in (6, 16):
        processes = begin("cut")
        while not any(path.name >= f"step-{after:08d}" for path in list_checkpoints(checkpoints)):
            assert all(process.is_alive() for process in processes)
            time.sleep(0.002)
        for process in processes:
            os.kill(process.pid, signal.SIGKILL)
        assert finish(processes) == [-signal.SIGKILL] * ranks
    assert finish(begin("cut")) == [0] * ranks
    last = [list_checkpoints(tmp_path / name / "checkpoints") for name in ("whole", "cut")]
    assert [[path.name for path in paths] for paths in last] == [["step-00000028", "step-00000030"]] * 2
    whole, cut = (stored(paths[-1]) for paths in last)
    assert whole.keys() == cut.keys() and {f"rng.cpu-{rank}" for rank in range(ranks)} <= whole.keys()
    assert [name for name in whole if not torch.equal(whole[name], cut[name])] == []
    assert read_info(last[0][-1]) == read_info(last[1][-1])
    assert not list(checkpoints.glob(".partial-*"))


def test_a_save_that_fails_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    checkpoints, value = Checkpoints(tmp_path, 1, "seed: 0", World()), torch.arange(3.0)
    checkpoints.save(1, {"value": value}, {})
    checkpoints.finish()
    failed = Future()
    failed.set_exception(OSError("disk full"))
    monkeypatch.setattr(dcp, "async_save", lambda *args, **kwargs: AsyncSaveResponse(failed, failed))
    checkpoints.save(2, {"value": value}, {})
    with pytest.raises(OSError, match="disk full"):
        checkpoints.poll()
    monkeypatch.undo()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000001"]
    assert stored(tmp_path / "step-00000001")["value"].tolist() == [0.0, 1.0, 2.0]
    checkpoints.save(3, {"value": value}, {})
    checkpoints.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


def test_a_checkpoint_of_another_model_is_one_line(tmp_path):
    checkpoints = Checkpoints(tmp_path, 1, "", World())
    checkpoints.save(1, {"value": torch.zeros(3)}, {})
    checkpoints.finish()
    for other in ({"other": torch.zeros(3)}, {"value": torch.zeros(4)}):
        with pytest.raises(ConfigError, match=r"step-00000001 .*(other|value).*train.logdir") as raised:
            read_into(tmp_path / "step-00000001", other)
        assert "\n" not in str(raised.value)


def test_every_rank_skips_a_step_that_is_broken_on_one(inputs, tmp_path):
    argv = arguments(inputs, tmp_path, *stage_overrides(inputs, "ar_diffusion"), *batch_of(2), "train.max_steps=9",
                     "train.sharding=full", "train.checkpoint_every=1")  # fmt: skip
    assert finish(start(2, scale_runs.run_broken, argv, 1, (1, 3, 4, 5))) == [1, 1]
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [record["skipped_steps"] for record in records] == [0, 1, 1, 2, 3]
    good, later = list_checkpoints(tmp_path / "checkpoints")
    assert later.name == "step-00000005"
    kept = stored(later)
    assert all(torch.isfinite(value).all() for name, value in kept.items() if name.startswith("roles."))
    earlier = stored(good)
    assert all(torch.equal(kept[name], earlier[name]) for name in kept if ".module." in name)


@pytest.fixture(scope="module")
def visual_run(inputs, tmp_path_factory):
    """A sharded run with samples, on two ranks."""
    folder = tmp_path_factory.mktemp("visual")
    argv = arguments(inputs, folder, *stage_overrides(inputs, "ar_diffusion"), *batch_of(2), "train.sharding=full",
                     "train.max_steps=3", "train.sample_every=2", "train.sample_prompts=[a red circle]")  # fmt: skip
    assert finish(start(2, scale_runs.run_visual, argv)) == [0, 0]
    return folder


def ema_of(run: Path) -> dict[str, torch.Tensor]:
    prefix = "roles.generator.ema.transformer."
    (checkpoint,) = list_checkpoints(run / "checkpoints")
    return {name.removeprefix(prefix): x for name, x in stored(checkpoint).items() if name.startswith(prefix)}


def test_a_sharded_run_writes_samples_and_a_bundle(visual_run):
    assert (visual_run / "samples" / "step-00000002" / "000.mp4").is_file()
    exported = CausalWanModel.from_pretrained(visual_run / "bundle" / "transformer").state_dict()
    ema = ema_of(visual_run)
    assert exported.keys() == ema.keys()
    assert all(torch.equal(exported[name].bfloat16(), ema[name].bfloat16()) for name in ema)
    config = json.loads((visual_run / "bundle" / "transformer" / "config.json").read_text())
    assert config["_class_name"] == "CausalWanModel"


def test_export_in_the_seeds_layout(visual_run, tmp_path):
    assert export_checkpoint.main([str(visual_run), str(tmp_path / "generator.pt")]) == 0
    content = torch.load(tmp_path / "generator.pt", weights_only=True)
    assert content.keys() == {"generator", "generator_ema"}
    assert "model.blocks.0.self_attn.q.weight" in content["generator"]
    assert any(name.startswith("model.pack_compressor.net.") for name in content["generator"])
    ema = ema_of(visual_run)
    read = read_weights(tmp_path / "generator.pt", use_ema=True)
    assert read.keys() == ema.keys() and all(torch.equal(read[name], ema[name]) for name in ema)
    raw = read_weights(tmp_path / "generator.pt")
    assert any(not torch.equal(raw[name], ema[name]) for name in ema)


def test_export_as_a_folder(visual_run, tmp_path):
    assert export_checkpoint.main([str(visual_run), str(tmp_path), "--use_ema"]) == 0
    read, ema = CausalWanModel.from_pretrained(tmp_path / "transformer").state_dict(), ema_of(visual_run)
    assert all(torch.equal(read[name], ema[name]) for name in ema)
    assert (tmp_path / "text_encoder" / "model.safetensors").is_file()


def test_export_of_no_checkpoint_is_one_line(tmp_path, capsys):
    assert export_checkpoint.main([str(tmp_path), str(tmp_path / "x.pt")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_what_is_sharded(inputs, tmp_path):
    argv = arguments(inputs, tmp_path, *stage_overrides(inputs, "dmd"), *batch_of(2), "train.sharding=full")
    assert finish(start(2, scale_runs.placed, argv, tmp_path / "placed.json")) == [0, 0]
    sharded = json.loads((tmp_path / "placed.json").read_text())
    for name in (
        "generator:transformer.blocks.0.attn1.to_q.weight",
        "generator:transformer.pack_compressor.net.0.weight",
        "generator:transformer.patch_embedding.weight",
        "critic:blocks.1.ffn.net.2.weight",
        "teacher:blocks.0.attn1.to_q.weight",
    ):
        assert sharded[name], name
    for name in ("blocks.0.scale_shift_table", "blocks.0.norm2.weight"):
        assert not sharded[f"critic:{name}"], name  # float32 on every rank


def test_the_time_embedding_is_float32_in_mixed_precision():
    model = WanTransformer3DModel(num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
                                  text_dim=8, freq_dim=8, ffn_dim=16, num_layers=1)  # fmt: skip
    stage = namedtuple("Stage", "modules targets offloaded frozen_modules")({"generator": model}, {}, (), list)
    assert not prepare_stage(stage, Config(), World(), torch.device("cpu"))
    embedder = model.condition_embedder
    with torch.autocast("cpu", torch.bfloat16):
        assert embedder.time_embedder(torch.randn(1, 8)).dtype == torch.float32
        assert embedder.time_proj(torch.randn(1, 24)).dtype == torch.bfloat16


def test_ranks_must_fill_the_groups():
    config = Config()
    config.train.sharding = Sharding.hybrid
    check_ranks(config, World(0, 8, local_size=4))
    with pytest.raises(ConfigError, match="train.shard_size.*6 ranks.*groups of 4"):
        check_ranks(config, World(0, 6, local_size=4))


@pytest.mark.parametrize("stage", ["teacher", "ar_diffusion", "dmd"])
def test_a_full_disk_is_noticed_before_anything_is_loaded(inputs, tmp_path, monkeypatch, capsys, stage):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100_000))
    monkeypatch.setattr("pipeline.train.stages.build_stage", lambda *args: pytest.fail("models were loaded"))
    argv = arguments(inputs, tmp_path / "run", *stage_overrides(inputs, stage), *batch_of(1))
    assert scale_runs.run(argv) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(error) == 1 and "train.keep_checkpoints=2" in error[0] and "train.logdir" in error[0]
    assert not (tmp_path / "run").exists()


def test_the_disk_estimate_is_that_of_a_checkpoint(visual_run, inputs):
    (checkpoint,) = list_checkpoints(visual_run / "checkpoints")
    config = load_config(inputs / "config.yaml", stage_overrides(inputs, "ar_diffusion"))
    weights = sum(p.numel() for model in ARDiffusionStage.trained(config) for p in model.parameters())
    tensors = sum(x.nbytes for name, x in stored(checkpoint).items() if ".transformer." in name)
    assert tensors == pytest.approx(preflight.BYTES_PER_WEIGHT * weights, rel=0.05)


def test_launcher_reads_the_environment(tmp_path):
    stub = tmp_path / "torchrun"
    stub.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    stub.chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "VIRTUAL_ENV": "activated",
        "CONFIG_PATH": "a.yaml",
        "LOGDIR": "somewhere",
        "MASTER_PORT": "1234",
        "CUDA_VISIBLE_DEVICES": "2,5,7",
        "EXTRA_ARGS": "--disable-wandb train.max_steps=3",
        "NNODES": "2",
        "NODE_RANK": "1",
        "MASTER_ADDR": "10.0.0.1",
    }
    script = ROOT / "scripts" / "train_packforcing_dmd_hr_8gpu.sh"
    done = subprocess.run(["bash", str(script)], env=environment, capture_output=True, text=True, check=True)
    words = done.stdout.split()
    flags = {"nnodes": "2", "node_rank": "1", "nproc_per_node": "3", "master_addr": "10.0.0.1"}
    flags |= {"master_port": "1234", "config_path": "a.yaml", "logdir": "somewhere"}
    assert {name: words[words.index(f"--{name}") + 1] for name in flags} == flags
    assert words[-2:] == ["--disable-wandb", "train.max_steps=3"]
    bare = {name: environment[name] for name in ("PATH", "VIRTUAL_ENV")}
    done = subprocess.run(["bash", str(script)], env=bare, capture_output=True, text=True, check=True)
    words = done.stdout.split()
    assert words[words.index("--nproc_per_node") + 1] == "8"
    assert (ROOT / words[words.index("--config_path") + 1]).is_file()


@pytest.mark.slow
def test_torchrun_itself(inputs, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py"]
    argv = arguments(inputs, tmp_path / "run", *stage_overrides(inputs, "teacher"), *batch_of(2), "train.max_steps=1")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, *argv, "--no_visualize", "--no_save"], cwd=ROOT, env=environment, check=True, timeout=600)
