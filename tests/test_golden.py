"""scripts/check_golden.py on the recorded reference values."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from scripts.check_golden import main

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
