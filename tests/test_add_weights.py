"""What a training changed is added to another model, and only where all three have the tensor."""

import pytest
import torch
from tiny import transformer

from model.causal_wan import CausalWanModel
from scripts.add_weights import main


def test_the_change_is_added_and_a_compressor_of_its_own_stays(tmp_path):
    models = {}
    for seed, (name, compressor) in enumerate(
        {"model": "hr_spatial", "trained": "hr_spatial", "before": "identity"}.items()
    ):
        torch.manual_seed(seed)
        models[name] = transformer(compressor=compressor).state_dict()
        transformer(compressor=compressor).save_pretrained(tmp_path / name)
        loaded = CausalWanModel.from_pretrained(tmp_path / name)
        loaded.load_state_dict(models[name])
        loaded.save_pretrained(tmp_path / name)
    names = [str(tmp_path / name) for name in models]
    assert main([*names[:2], "--before", names[2], "--output", str(tmp_path / "sum"), "--scale", "0.5"]) == 0
    found = CausalWanModel.from_pretrained(tmp_path / "sum").state_dict()
    for name, value in models["model"].items():
        change = 0 if name not in models["before"] else models["trained"][name] - models["before"][name]
        torch.testing.assert_close(found[name], value + 0.5 * change)
    assert any(name not in models["before"] for name in found)


def test_what_shares_nothing_is_refused(tmp_path, capsys):
    transformer().save_pretrained(tmp_path / "a")
    with pytest.raises(SystemExit):
        main([str(tmp_path / "a")])
    assert main([str(tmp_path / "a"), str(tmp_path / "b"), "--before", "x", "--output", str(tmp_path / "c")]) == 2
    assert "b does not exist" in capsys.readouterr().err
