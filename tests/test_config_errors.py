"""A wrong setting is one line that names it and where it is from, before torch is even imported."""

import math
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest

from utils.cli import answer_typos, run_command
from utils.config import Config, ConfigError
from utils.foreign_keys import OURS
from utils.interval import Interval
from utils.load_config import known_settings, load_config, validate
from utils.train_config import PhaseConfig

ROOT = Path(__file__).parent.parent
YAML = {
    "42": "found int",
    "": "found NoneType",
    "- a": "found list",
    "[1": "not valid YAML",
    "\0": "not valid YAML",
    "a: &a [*a]": "recursive",
    "cache: {top_k: 1, top_k: 2}": "duplicate key top_k",
    "{a: 1}": "unknown setting `a`",
    "1: 2": "unknown setting `1`",
    "base: 5": "`base` is 5",
    "base: [1]": "`base` is [1]",
    "base: {a: 1}": "`base` is {'a': 1}",
    "base: nowhere.yaml": "nowhere.yaml does not exist",
    "cache: 5": "`cache` is 5: expected a mapping",
    "cache: null": "`cache` is None: expected a mapping",
    "cache: {top_k: {a: 1}}": "`cache.top_k`: Value '{'a': 1}'",
    "seed: 1.5": "`seed`: Value '1.5'",
    "train: {phases: 5}": "`train.phases`",
    "train: {phases: [5]}": "`train.phases[0]`",
    "train: {phases: [{steps: 1}]}": "`train.phases[0].frames`",
    "train: {mixed_precision: fp16}": "expected one of [no, bf16]",
    "train: {tracker: mlflow}": "expected one of [wandb, tensorboard]",
    "model: {bundle: '${nowhere}'}": "nowhere",
}
OVERRIDES = {
    "cache.top_k": "expected key=value",
    "=5": "expected key=value",
    "cache.top_k=x": "command line: setting `cache.top_k`: Value 'x'",
    "cache.sink=true": "command line: setting `cache.sink`: Value 'True'",
    "cache.topk=1": "command line: unknown setting `cache.topk`; the nearest known one is `cache.top_k`",
    "cache.top_k=[1": "command line, `cache.top_k=[1`: not valid YAML",
    "cache=5": "command line: setting `cache` is 5",
    "cache.kind=packs": "command line: setting `cache.kind`",
    "data.path=a\0b": "not valid YAML",
    "data.path='a\udc80'": "not valid YAML",
}


def numbers(node: Any, prefix: str = "") -> Iterator[tuple[Any, str, str, Interval | None]]:
    """(section, field, full key, interval) of every setting that is a number or a list of them."""
    for item in fields(node):
        value = getattr(node, item.name)
        if is_dataclass(value):
            yield from numbers(value, f"{prefix}{item.name}.")
        elif {"int", "float"} & set(str(item.type).replace("[", " ").replace("]", " ").replace("'", " ").split()):
            yield node, item.name, prefix + item.name, item.metadata.get("interval")


def test_every_number_has_an_interval_that_its_default_lies_in():
    config, seen = Config(), 0
    config.train.phases = [PhaseConfig(1, 1, 1)]
    for _, _, key, interval in (*numbers(config), *numbers(config.train.phases[0])):
        assert interval is not None, key
        seen += 1
    assert seen > 90
    validate(Config())


def test_a_number_outside_its_interval_is_named():
    for _, name, key, interval in numbers(Config()):
        low, high = (float(bound) for bound in interval.text[1:-1].split(","))
        for bad in (math.nan, math.inf, -math.inf, low - 1, 2 * high + 1, *([low] if interval.text[0] == "(" else [])):
            config = Config()
            section = config
            for part in key.split(".")[:-1]:
                section = getattr(section, part)
            listed = isinstance(getattr(section, name), list)
            setattr(section, name, [bad] if listed else bad)
            with pytest.raises(ConfigError, match=rf"`{key}` is .*must lie in ") as raised:
                validate(config)
            assert "\n" not in str(raised.value)


def test_text_must_be_such_that_a_file_can_be_called_so():
    config = Config()
    for bad in ("a\0b", "a\udc80"):  # as the shell's arguments come that are not UTF-8
        config.inference.output_folder = bad
        with pytest.raises(ConfigError, match="`inference.output_folder` is .*: holds what is no character"):
            validate(config)


def test_intervals():
    assert 0 in Interval("[0, 1)") and 1 not in Interval("[0, 1)")
    assert 0 not in Interval("(0, 1]") and 1 in Interval("(0, 1]") and math.nan not in Interval("(0, 1]")


@pytest.mark.parametrize("text", YAML)
def test_a_malformed_file_is_one_line_that_names_it(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as raised:
        load_config(path)
    message = str(raised.value)
    assert YAML[text] in message and "\n" not in message
    assert "bad.yaml" in message or "nowhere" in message or "settings: " in message


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / "bad.yaml").write_text("seed: 1", encoding="utf-16")
    with pytest.raises(ConfigError, match="bad.yaml: not a text file in UTF-8"):
        load_config(tmp_path / "bad.yaml")


@pytest.mark.parametrize("override", OVERRIDES)
def test_a_wrong_override_blames_the_command_line(tmp_path, override):
    (tmp_path / "good.yaml").write_text("{}")
    with pytest.raises(ConfigError) as raised:
        load_config(tmp_path / "good.yaml", [override])
    message = str(raised.value)
    assert OVERRIDES[override] in message and "\n" not in message and "good.yaml" not in message


def test_a_window_of_frames_has_no_positions_that_fit():
    with pytest.raises(ConfigError, match="`cache.temporal` is fit: with cache.kind=deep_forcing"):
        load_config("configs/tiny/demo.yaml", ["cache.kind=deep_forcing"])


def test_no_is_a_word(tmp_path):
    (tmp_path / "no.yaml").write_text("train: {mixed_precision: no, compile: no}\nsampler: {negative_prompt: no}")
    config = load_config(tmp_path / "no.yaml", ["model.random_init=yes"])
    assert config.train.mixed_precision == "no" and config.sampler.negative_prompt == "no"
    assert config.train.compile is False and config.model.random_init is True
    assert load_config(tmp_path / "no.yaml", ["train.mixed_precision=no"]).train.mixed_precision == "no"


COMMANDS = """
import importlib, sys
for name in sys.argv[1:]:
    arguments = ["--config_path", "configs/tiny/demo.yaml", "cache.topk=1"]
    assert importlib.import_module(name).main(arguments) == 2, name
    heavy = {"torch", "diffusers", "transformers"} & sys.modules.keys()
    assert not heavy, f"{name} imports {heavy}"
"""


def test_a_typo_is_answered_before_torch_is_imported():
    names = ("train", "inference_packforcing", "scripts.generate_ode_pairs")
    done = subprocess.run([sys.executable, "-c", COMMANDS, *names], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == len(names) and all("`cache.top_k`" in line for line in lines)


@pytest.mark.parametrize("name", ["ablate", "bench_inference", "bench_train", "evaluate", "prepare_data", "soak"])
def test_a_script_answers_a_typo_before_torch_is_imported(name):
    command = [sys.executable, "-X", "importtime", "-m", f"scripts.{name}", "--config_path", "configs/tiny/demo.yaml"]
    done = subprocess.run([*command, "cache.topk=1"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "torch" not in done.stderr
    assert "\nerror: command line: unknown setting `cache.topk`" in done.stderr


def test_what_follows_a_flag_may_be_its_value(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", "--config_path=configs/tiny/demo.yaml", "--vary", "cache.topk=1", "topk"])
    answer_typos()


@pytest.mark.parametrize("error", [MemoryError("x"), RuntimeError("DefaultCPUAllocator: can't allocate memory: ...")])
def test_too_little_memory_is_one_line(capsys, error):
    def work():
        raise error

    assert run_command(work) == 2
    assert capsys.readouterr().err.startswith("error: out of memory: ")


SEED = """
generator_ckpt: ckpt/causal_forcing_ckpt/causal_ode.pt
real_name: Wan2.1-T2V-14B
denoising_step_list: [1000, 750, 500, 250]
seed: 0
wandb_key: {your key}
lr: 2.0e-06
gc_interval: 100
unheard_of: 1
model_kwargs: {timestep_shift: 5.0, pack_sink_blocks: 3, pack_mid_select_topk_blocks: 16}
"""


def test_keys_of_the_seeds_configs_are_told_by_their_names_here(tmp_path):
    (tmp_path / "seed.yaml").write_text(SEED)
    with pytest.raises(ConfigError) as raised:
        load_config(tmp_path / "seed.yaml")
    message = str(raised.value)
    assert "\n" not in message and "docs/other_configs.md" in message and "`seed`" not in message
    for theirs, ours in {"generator_ckpt": "model.checkpoint", "real_name": "dmd.teacher", "lr": "train.optimizer.lr",
                         "model_kwargs.pack_sink_blocks": "cache.sink", "gc_interval": "there is nothing like it",
                         "wandb_key": "the environment's WANDB_API_KEY"}.items():  # fmt: skip
        assert f"`{theirs}` (here {ours})" in message
    assert "`unheard_of`; the nearest known one is" in message


def test_the_table_of_foreign_keys_names_settings_and_is_in_the_docs():
    known, text = set(known_settings()), (ROOT / "docs" / "other_configs.md").read_text()
    for theirs, ours in OURS.items():
        short = theirs.removeprefix("model_kwargs.")
        assert re.search(rf"`(model_kwargs\.)?{short}[`:]", text), theirs
        assert set(re.findall(r"[a-z]+(?:\.[a-z_]+)+", ours)) <= known, ours
    sections = "|".join(item.name for item in fields(Config()))
    named = re.findall(rf"`((?:{sections})\.[a-z_.]+)[=`]", text)
    assert len(named) > 50 and set(named) <= known | {"train.py", "inference.py"}
    for name in re.findall(r"\| `([a-z0-9_]+\.yaml)`[^|]* \|$", text, re.MULTILINE):
        assert (ROOT / "configs" / name).is_file(), name


def test_files_that_a_training_lacks_are_listed_at_once_each_with_how_to_get_it(tmp_path):
    run = ["--config_path", str(ROOT / "configs" / "packforcing_dmd_chunkwise_hr_8gpu_sink3_recent2.yaml")]
    run += [f"--logdir={tmp_path / 'run'}", "data.text_embeddings=/nowhere", "train.text_from=runs/ar"]
    command, environment = [sys.executable, "-X", "importtime", str(ROOT / "train.py")], {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, *run], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    *imports, line = done.stderr.splitlines()
    assert not any("torch" in module for module in imports)
    for part in (
        "`data.vae` is ckpt/Wan2.1-T2V-1.3B-Diffusers/vae: nothing is there; hf download Wan-AI/Wan2.1-T2V-1.3B",
        " --local-dir ckpt/Wan2.1-T2V-1.3B-Diffusers;",
        "`dmd.teacher` is ckpt/Wan2.1-T2V-14B-Diffusers/transformer: nothing is there; hf download Wan-AI/Wan2.1-T2V-1",
        "hf download gdhe17/Self-Forcing vidprom_filtered_extended.txt and move it to prompts/",
        "hf download zhuhz22/Causal-Forcing chunkwise/causal_ode.pt",
        "`data.text_embeddings` is /nowhere: nothing is there; python -m scripts.prepare_data writes it",
        "`train.text_from` is runs/ar: nothing is there; a training run writes it",
    ):
        assert part in line
    assert not (tmp_path / "run").exists()
