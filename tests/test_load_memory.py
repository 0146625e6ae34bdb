"""What loading takes of host memory: files are mapped, not copied, on any number of ranks."""

import os
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from transformers import UMT5Config, UMT5EncoderModel

from model.weights import CheckpointError
from pipeline.load import load_mapped
from pipeline.train.roles import prepare
from utils.choices import Sharding
from utils.config import Config

WAN = {"num_layers": 4, "num_attention_heads": 8, "attention_head_dim": 64, "in_channels": 4, "out_channels": 4,
       "text_dim": 16, "freq_dim": 16, "ffn_dim": 2048}  # fmt: skip


def anonymous_bytes() -> int:
    """Resident memory that is this process's own, without mapped files."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wan")
    WanTransformer3DModel(**WAN).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs procfs")
def test_weights_stay_in_their_files(folder):
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    before = anonymous_bytes()
    model = load_mapped(WanTransformer3DModel, folder)
    assert anonymous_bytes() - before < 0.2 * size
    config = Config()
    config.train.sharding = Sharding.full
    prepare(model, config, torch.device("cpu"))  # to be float32, but not before it is placed
    assert anonymous_bytes() - before < 0.2 * size
    assert model.blocks[0].ffn.net[2].weight.dtype == torch.bfloat16 and model.placed_dtype == torch.float32
    assert sum(p.nbytes for p in model.parameters()) == pytest.approx(size, rel=0.01)


def test_mapped_weights_are_those_that_libraries_load(folder, tmp_path):
    theirs = WanTransformer3DModel.from_pretrained(folder, torch_dtype=torch.bfloat16).state_dict()
    ours = load_mapped(WanTransformer3DModel, folder).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name].float(), theirs[name].float()) for name in ours)
    encoder = UMT5EncoderModel(UMT5Config(vocab_size=11, d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2)).eval()
    encoder.save_pretrained(tmp_path)
    tokens = torch.tensor([[1, 2, 3]])
    assert torch.equal(load_mapped(UMT5EncoderModel, tmp_path)(tokens)[0], encoder(tokens)[0])


def test_what_is_missing_is_named(folder, tmp_path):
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        load_mapped(WanTransformer3DModel, tmp_path)
    os.symlink(folder / "diffusion_pytorch_model.safetensors", tmp_path / "diffusion_pytorch_model.safetensors")
    settings = (folder / "config.json").read_text(encoding="utf-8").replace('"num_layers": 4', '"num_layers": 5')
    (tmp_path / "config.json").write_text(settings, encoding="utf-8")
    with pytest.raises(CheckpointError, match="missing blocks.4"):
        load_mapped(WanTransformer3DModel, tmp_path)
