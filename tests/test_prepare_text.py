"""Stored prompt embeddings: the same as the encoder's, resumable, and training runs without the encoder."""

import json
from functools import partial

import pytest
import torch
from safetensors import safe_open

from pipeline.data import shards
from pipeline.data import text as text_embeddings
from pipeline.data.text import TextEmbeddings, encode_trimmed, write_embeddings
from pipeline.load import load_text_encoder
from pipeline.text import encode_text
from pipeline.train import text as conditioning
from pipeline.train.text import TextConditioning
from scripts.prepare_data import main
from utils.cli import INTERRUPTED
from utils.config import ConfigError
from utils.distributed import World
from utils.load_config import load_config

CPU = torch.device("cpu")
TEXT_LEN = 12
PROMPTS = [
    "a red circle bounces over a blue plain",
    "a green shape circles over a gradient",
    "blue",
    "a white triangle drifts left over a magenta stripes and a red circle bounces over a blue plain",  # cut
    "a red circle bounces over a blue plain",  # again
]
CONFIG = f"""
video: {{height: 32, width: 48, frames_per_chunk: 1}}
model: {{text_len: {TEXT_LEN}, text_dim: 16}}
sampler: {{negative_prompt: "a black shape"}}
train: {{sample_prompts: ["a yellow square drifts up over a red plain"]}}
data: {{kind: prompts}}
"""


@pytest.fixture
def run(bundle, tmp_path):
    """run(*arguments) calls the script; the embeddings are in `tmp_path/text`."""
    (tmp_path / "config.yaml").write_text(CONFIG)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))

    def call(*arguments):
        return main([
            f"--config_path={tmp_path / 'config.yaml'}", f"train.text_from={bundle}", *arguments,
            f"data.path={tmp_path / 'prompts.txt'}", f"data.text_embeddings={tmp_path / 'text'}",
        ])  # fmt: skip

    return call


def config_of(tmp_path, *overrides):
    places = [f"data.path={tmp_path / 'prompts.txt'}", f"data.text_embeddings={tmp_path / 'text'}"]
    return load_config(tmp_path / "config.yaml", [*places, *overrides])


@pytest.mark.parametrize("batch_size", [1, 3])
def test_stored_embeddings_are_the_encoders(run, bundle, tmp_path, batch_size):
    assert run(f"--text_batch={batch_size}") == 0
    live = TextConditioning.load(config_of(tmp_path, "data.text_embeddings=null", f"train.text_from={bundle}"), CPU, 12)
    stored = TextConditioning.load(config_of(tmp_path), CPU, TEXT_LEN)
    assert stored.encoder is None and not stored.trainable and stored.text_dim == 16
    everything = [*PROMPTS, "a black shape", "a yellow square drifts up over a red plain"]
    expected, given = live.encode(everything), stored.encode(everything)
    assert given.shape == (7, TEXT_LEN, 16) and given.dtype == torch.float32
    assert torch.allclose(given, expected, rtol=2**-8, atol=1e-4)  # bfloat16 keeps 8 bits
    lengths = (expected.abs().sum(-1) > 0).sum(1)
    assert lengths.tolist() == [9, 8, 2, 12, 9, 4, 10]
    assert torch.equal((given.abs().sum(-1) > 0).sum(1), lengths)


def test_only_what_is_needed_is_stored(run, tmp_path):
    assert run() == 0
    (path,) = (tmp_path / "text").glob("shard-*.safetensors")
    with safe_open(path, "pt") as shard:
        assert len(json.loads(shard.metadata()["notes"])["records"]) == 6  # each prompt once
        assert shard.get_tensor("embeddings").shape == (9 + 8 + 2 + 12 + 4 + 10, 16)
        assert shard.get_tensor("embeddings").dtype == torch.bfloat16


def test_a_stopped_run_goes_on_and_prompts_can_be_added(run, tmp_path, monkeypatch):
    monkeypatch.setattr(text_embeddings, "SHARD_PROMPTS", 2)
    original, encoded = text_embeddings.encode_trimmed, []

    def counted(tokenizer, encoder, prompts, **options):
        if len(encoded) == 4:
            raise KeyboardInterrupt
        encoded.extend(prompts)
        return original(tokenizer, encoder, prompts, **options)

    monkeypatch.setattr(text_embeddings, "encode_trimmed", counted)
    assert run() == INTERRUPTED
    assert len(TextEmbeddings(tmp_path / "text")) == 4
    done = encoded.copy()
    encoded.clear()
    assert run() == 0
    assert len(encoded) == 2 and not set(encoded) & set(done)
    encoded.clear()
    (tmp_path / "more.txt").write_text("a red shape\n" + PROMPTS[0])
    assert run(f"--prompts={tmp_path / 'more.txt'}") == 0
    assert encoded == ["a red shape"]
    assert not list((tmp_path / "text").glob("*.partial"))


def test_ranks_share_the_work(bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(text_embeddings, "SHARD_PROMPTS", 1)
    monkeypatch.setattr(text_embeddings, "barrier", lambda world: None)
    monkeypatch.setattr(shards, "from_main", lambda make, world: make())
    (tmp_path / "config.yaml").write_text(CONFIG)
    config = load_config(tmp_path / "config.yaml", [f"model.bundle={bundle}"])
    tokenizer, encoder = load_text_encoder(config, CPU, torch.float32)
    encode = partial(encode_trimmed, tokenizer, encoder, text_len=TEXT_LEN, batch_size=1)
    listed, size = PROMPTS[:4], (TEXT_LEN, encoder.config.d_model)
    write_embeddings(listed, encode, "hash", tmp_path / "text", *size, World(0, 2))
    first = TextEmbeddings(tmp_path / "text")
    assert first.missing(listed) == [listed[1], listed[3]]
    # A second rank that started at the same time has the full list: its share is what the first left.
    monkeypatch.setattr(TextEmbeddings, "missing", lambda self, prompts: list(prompts))
    write_embeddings(listed, encode, "hash", tmp_path / "text", *size, World(1, 2))
    monkeypatch.undo()
    both = TextEmbeddings(tmp_path / "text")
    assert both.missing(listed) == [] and len(both) == 4
    expected = encode_text(tokenizer, encoder, listed[1:2], TEXT_LEN)[0, : len(both[listed[1]])]
    assert torch.allclose(both[listed[1]].float(), expected, rtol=2**-8, atol=1e-4)
    with pytest.raises(ConfigError, match="another `encoder`"):
        write_embeddings(listed, encode, "other", tmp_path / "text", *size, World())


def test_missing_prompts_show_before_training(run, tmp_path):
    assert run() == 0
    (tmp_path / "prompts.txt").write_text("\n".join([*PROMPTS, "a red shape", "a blue shape"]))
    with pytest.raises(ConfigError, match="2 prompts are not among its 6, the first is 'a red shape'"):
        TextConditioning.load(config_of(tmp_path), CPU, TEXT_LEN)
    with pytest.raises(ConfigError, match="cut at 12 tokens, the model takes 16"):
        TextConditioning.load(config_of(tmp_path), CPU, 16)
    with pytest.raises(ConfigError, match="no text are there"):
        TextConditioning.load(config_of(tmp_path, f"data.text_embeddings={tmp_path / 'no'}"), CPU, TEXT_LEN)


def test_a_bundle_gets_the_encoder_from_where_it_lies(run, bundle, tmp_path, caplog):
    assert run() == 0
    TextConditioning.load(config_of(tmp_path, f"train.text_from={bundle}"), CPU, TEXT_LEN).save(tmp_path / "out")
    name = "text_encoder/model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (bundle / name).read_bytes()
    assert (tmp_path / "out" / "tokenizer" / "tokenizer.json").is_file()
    TextConditioning.load(config_of(tmp_path), CPU, TEXT_LEN).save(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists() and "train.text_from" in caplog.text


def test_embeddings_are_remembered_up_to_a_limit(run, tmp_path, monkeypatch):
    assert run() == 0
    text = TextConditioning.load(config_of(tmp_path), CPU, TEXT_LEN)
    monkeypatch.setattr(conditioning, "MEMO_BYTES", 2 * TEXT_LEN * 16 * 4)
    first = text.encode(PROMPTS[:1])
    for prompt in PROMPTS:
        assert torch.equal(text.encode([prompt]), text.encode([prompt]))
        assert len(text._memo) <= 2
    assert torch.equal(first, text.encode(PROMPTS[:1]))


def test_usage_errors_are_one_line(run, tmp_path, capsys):
    for arguments, message in (
        (["--text_batch=0"], "must be positive"),
        ([f"--prompts={tmp_path / 'nowhere.txt'}"], "nowhere.txt does not exist"),
        (["train.text_from=null"], "`train.text_from` is not set"),
        ([f"train.text_from={tmp_path}"], "tokenizer"),
    ):
        assert run(*arguments) == 2
        assert message in capsys.readouterr().err


def test_a_bundle_may_share_the_encoder_of_another(bundle, tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_base": str(bundle)}))
    (tmp_path / "config.yaml").write_text(CONFIG.replace("kind: prompts", "kind: sprites"))
    config = load_config(tmp_path / "config.yaml", [f"train.text_from={tmp_path}"])
    shared, own = (TextConditioning.load(config, CPU, TEXT_LEN) for config.train.text_from in (tmp_path, bundle))
    assert torch.equal(shared.encode(PROMPTS[:1]), own.encode(PROMPTS[:1]))
    shared.save(tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer" / "tokenizer.json").is_file()
