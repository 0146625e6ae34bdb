"""scripts/check_golden.py on the recorded reference values."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from oracle import OracleMemory, OracleWan, clip_flow
from safetensors.torch import load_file, save_file
from toy import randn, toy_config, toy_model

from model.convert import diffusers_to_wan
from scripts.check_golden import main
from utils.choices import CacheKind, Refresh

GOLDEN = Path(__file__).parent / "data" / "golden"
INPUTS = ("clean_latents", "noisy_latents", "prompt_embeds", "teacher_forcing.timestep")


def copy(folder, *names):
    for name in names:
        shutil.copyfile(GOLDEN / name, folder / name)  # not the read-only mode
    return folder


def copy_cases(folder, *prefixes):
    """The recorded outputs whose names begin so, with all inputs and weights."""
    copy(folder, "meta.json", "wan_weights.safetensors", "hr_compressor_weights.safetensors")
    io = load_file(GOLDEN / "io.safetensors")
    kept = {name: tensor for name, tensor in io.items() if name.startswith((*INPUTS, *prefixes))}
    save_file(kept, folder / "io.safetensors")
    return kept


def perturb(path, name, factor):
    weights = load_file(path)
    weights[name] *= factor
    save_file(weights, path)


def last_line(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_every_recorded_case_is_met(capsys):
    assert main([str(GOLDEN)]) == 0
    result = last_line(capsys)
    assert result["cases"] == 40 and result["failed"] == []
    assert 0 < result["worst"] <= 1e-4


def test_a_tolerance_below_rounding_fails(tmp_path, capsys):
    copy_cases(tmp_path, "bidirectional.", "kv_full.")
    assert main([str(tmp_path), "--tolerance", "1e-12"]) == 1
    assert last_line(capsys)["failed"] == ["bidirectional.flow", "kv_full.flow"]


def test_wrong_weights_are_found_and_named(tmp_path, capsys):
    copy_cases(tmp_path, "bidirectional.", "teacher_forcing.flow", "kv_window.", "pack.identity.recency.rope.flow")
    perturb(tmp_path / "wan_weights.safetensors", "blocks.1.self_attn.v.weight", 1.05)
    assert main([str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    failed = ["bidirectional.flow", "teacher_forcing.flow", "kv_window.flow", "pack.identity.recency.rope.flow"]
    assert json.loads(printed.splitlines()[-1])["failed"] == failed
    assert all(f"{name}\n" in printed for name in failed)


def test_a_wrong_compressor_fails_only_what_uses_it(tmp_path, capsys):
    copy_cases(tmp_path, "kv_full.", "pack.hr_spatial.recency.rope.flow", "pack.identity.recency.rope.flow")
    perturb(tmp_path / "hr_compressor_weights.safetensors", "pack_compressor.net.2.weight", 1.05)
    assert main([str(tmp_path)]) == 1
    assert last_line(capsys)["failed"] == ["pack.hr_spatial.recency.rope.flow"]


def test_a_gradient_is_also_held_relative_to_its_size(tmp_path, capsys):
    """A gradient all of whose values are below the tolerance must not pass when it is wrong."""
    io = copy_cases(tmp_path, "pack.hr_spatial.recency.rope.train.")
    case = next(name for name in io if ".train.grad." in name)
    io[case] = io[case] + 0.01 * io[case].abs().max()
    save_file(io, tmp_path / "io.safetensors")
    assert main([str(tmp_path), "--tolerance", "1000"]) == 1
    assert last_line(capsys)["failed"] == [case]


def test_absent_cases_are_skipped(tmp_path, capsys):
    copy_cases(tmp_path, "bidirectional.", "kv_full.")
    (tmp_path / "hr_compressor_weights.safetensors").unlink()
    assert main([str(tmp_path)]) == 0
    assert last_line(capsys)["cases"] == 2


def test_a_recorded_nan_is_no_pass(tmp_path, capsys):
    copy(tmp_path, "meta.json")
    dmd = load_file(GOLDEN / "dmd.safetensors")
    dmd["warped_steps"] = torch.full_like(dmd["warped_steps"], torch.nan)
    save_file(dmd, tmp_path / "dmd.safetensors")
    assert main([str(tmp_path)]) == 1
    assert last_line(capsys)["failed"] == ["warped_steps"]


@pytest.mark.parametrize("names", [(), ("meta.json",)], ids=["empty", "nothing recorded"])
def test_no_case_is_an_error(tmp_path, names, capsys):
    assert main([str(copy(tmp_path, *names))]) == 2
    assert str(tmp_path) in capsys.readouterr().err


def record(folder):
    """Reference values of another network, computed by the oracle: chunks of 2 frames, 5 chunks, latents 4x10."""
    settings = {
        "num_attention_heads": 2,
        "attention_head_dim": 20,
        "num_layers": 2,
        "text_dim": 10,
        "ffn_dim": 30,
        "freq_dim": 16,
        "text_len": 6,
        "frames_per_chunk": 2,
        "compressor_channels": (5,),
        "eps": 1e-5,
    }
    model = toy_model(seed=3, **settings)
    oracle, frames, latent = OracleWan(model), 10, (4, 10)
    clean, noisy = (randn(1, 4, frames, *latent, seed=seed) for seed in (1, 2))
    prompt = randn(1, 4, 10, seed=3)
    timestep = torch.tensor([[900.0, 900, 200, 200, 500, 500]])

    def rollout(**cache):
        config = toy_config(channels=(5,), refresh=Refresh.per_forward, min_queries=32, **cache)
        memory, flows = OracleMemory(oracle, config, latent, frames), []
        for start in range(0, frames, 2):
            flows.append(memory.flow(noisy[0, :, start : start + 2], 400.0, prompt[0]))
            memory.commit(clean[0, :, start : start + 2], 10.0, prompt[0])
        return torch.cat(flows, dim=1)

    short = noisy[0, :, :6]
    teacher = clip_flow(oracle, short, timestep[0], prompt[0], clean[0, :, :6], [0.0] * 6)
    scored = "pack.hr_spatial.query_score.rope"
    flows = {
        "diffusion_forcing.flow": clip_flow(oracle, short, timestep[0], prompt[0]),
        "teacher_forcing.flow": teacher,
        "kv_window.flow": rollout(kind=CacheKind.sink, sink=1, recent=1, temporal="absolute"),
        f"{scored}.flow": rollout(top_k=1, mid_capacity=2),
    }
    flows = {name: flow.transpose(0, 1)[None].float().contiguous() for name, flow in flows.items()}
    inputs = {"clean_latents": clean.transpose(1, 2).contiguous(), "noisy_latents": noisy.transpose(1, 2).contiguous(),
              "prompt_embeds": prompt, "teacher_forcing.timestep": timestep,
              "kv_window.sink_frames": torch.tensor(2), "kv_window.window_frames": torch.tensor(6)}  # fmt: skip
    save_file({**inputs, **flows}, folder / "io.safetensors")
    weights = {diffusers_to_wan(name): tensor for name, tensor in model.state_dict().items()}
    for file, of_compressor in (("wan_weights", False), ("hr_compressor_weights", True)):
        part = {name: tensor for name, tensor in weights.items() if name.startswith("pack_compressor") == of_compressor}
        save_file(part, folder / f"{file}.safetensors")
    shared = ("num_layers", "ffn_dim", "text_dim", "freq_dim", "text_len", "eps")
    dims = {name: settings[name] for name in shared}
    dims |= {"patch_size": [1, 2, 2], "in_dim": 4, "out_dim": 4, "cross_attn_norm": True, "dim": 40, "num_heads": 2}
    variant = {"name": scored, "sink_chunks": 1, "recent_chunks": 1, "mid_capacity_chunks": 2, "top_k": 1,
               "selection": "query_score", "compressor": "hr_spatial", "rope_adjustment": True}  # fmt: skip
    meta = {"dims": dims, "latent_hw": latent, "frames_per_chunk": 2, "num_chunks": 5, "denoise_timestep": 400,
            "context_timestep": 10, "variants": [variant], "hr_stage_channels": [5]}  # fmt: skip
    (folder / "meta.json").write_text(json.dumps(meta))


def test_a_folder_of_other_dims(tmp_path, capsys):
    record(tmp_path)
    assert main([str(tmp_path)]) == 0
    assert last_line(capsys)["cases"] == 4
