"""Shards of clips: written once, whole or absent, and read in an order that is a function of the sample index."""

from functools import partial

import numpy as np
import pytest
import torch
from tiny import vae as tiny_vae

from pipeline.data.clips import LatentClips, SpriteClips, place_of, write_clips
from pipeline.data.latents import LatentData
from pipeline.data.shards import PLAN, Shards, ShardWriter
from pipeline.data.vae_clip import encode_frames, normalise
from pipeline.train.prompt_data import PromptData
from utils.choices import DataKind
from utils.config import ConfigError
from utils.distributed import World
from utils.load_config import load_config
from utils.sprites.world import caption, sample_spec
from utils.train_config import PhaseConfig

CPU, SIZE = torch.device("cpu"), (32, 48)


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return tiny_vae().eval()


def write(vae, folder, count=10, frames=5, vae_hash="a"):
    source = SpriteClips(0, count, frames, *SIZE)
    write_clips(source, partial(encode_frames, vae), vae_hash, folder, World(), batch=3, shard_size=4)
    return source


def test_shards_hold_normalised_latents_and_captions_in_order(vae, tmp_path):
    source = write(vae, tmp_path)
    clips = LatentClips(tmp_path)
    assert (len(clips), *clips.shape) == (10, 4, 2, 4, 6)
    assert clips.captions == [caption(sample_spec(0, i)) for i in range(10)]
    for index in (2, 3, 7, 9):
        direct = encode_frames(vae, np.stack([source[index][0]]))[0]
        assert (clips[index].float() - direct).abs().max() < 0.05 * direct.std()  # half precision, bf16 encoder
    with pytest.raises(IndexError):
        clips[10]


def test_normalise_gives_the_statistics_that_the_vae_names(vae):
    latents = torch.randn(3, 4, 5, 8, 8) * 2 + 7
    vae.register_to_config(latents_mean=[7.0] * 4, latents_std=[2.0] * 4)
    out = normalise(vae, latents)
    vae.register_to_config(latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    assert out.mean().abs() < 0.1 and abs(out.std() - 1) < 0.1


def test_a_folder_of_another_vae_or_source_is_refused(vae, tmp_path):
    write(vae, tmp_path, count=4)
    for other in ({"vae_hash": "b"}, {"count": 5}, {"frames": 1}):
        with pytest.raises(ConfigError, match="remove it"):
            write(vae, tmp_path, **{"count": 4, **other})


def test_rows_of_different_length_and_shards_without_samples(tmp_path):
    writer = ShardWriter(tmp_path, "text", {}, None, World())
    rows = [torch.arange(length * 2.0).view(length, 2) + length for length in (3, 1, 2)]
    writer.write(0, {"x": torch.cat(rows[:2]), "ends": torch.tensor([3, 4])}, ["three", "one"])
    writer.write(2, {"x": torch.empty(0, 2), "ends": torch.empty(0, dtype=torch.int64)}, [])
    writer.write(10, {"x": rows[2], "ends": torch.tensor([2])}, ["\ud800"])
    shards = Shards(tmp_path, "text", "command")
    assert shards.records == ["three", "one", "\ud800"]
    assert all(torch.equal(shards[i]["x"], row) for i, row in enumerate(rows)) and shards[0].keys() == {"x"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (PLAN, '{"kind": ', "plan.json is damaged"),
        (PLAN, "[]", "plan.json is damaged"),
        (PLAN, '{"kind": "text", "format": 2, "shards": 1}', "holds text in format 2, not clips"),
        (PLAN, '{"kind": "clips", "format": 3, "shards": 1}', "in format 3, not clips in format 2"),
        ("shard-00000.safetensors", "no shard", "shard-00000.safetensors: not a readable shard"),
    ],
)
def test_what_is_wrong_with_a_folder_is_one_line(tmp_path, name, content, message):
    ShardWriter(tmp_path, "clips", {}, 1, World()).write(0, {"latents": torch.zeros(2, 3)}, [{}, {}])
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message):
        Shards(tmp_path, "clips", "command")


def test_records_that_do_not_match_the_samples_are_refused(tmp_path):
    ShardWriter(tmp_path, "clips", {}, 1, World()).write(0, {"latents": torch.zeros(4, 3)}, [{}])
    with pytest.raises(ConfigError, match="4 samples but 1 records"):
        Shards(tmp_path, "clips", "command")


def test_every_clip_comes_once_an_epoch_whatever_order_is_asked():
    first = [place_of(6, 0, i) for i in range(6)]
    second = [place_of(6, 0, i) for i in range(6, 12)]
    assert sorted(first) == sorted(second) == list(range(6)) and first != second
    assert [place_of(6, 0, i) for i in reversed(range(12))] == list(reversed(first + second))
    assert [place_of(6, 1, i) for i in range(12)] != first + second


def test_only_what_a_stage_shows_is_encoded(tmp_path):
    torch.manual_seed(0)
    tiny_vae().save_pretrained(tmp_path / "vae")
    config = load_config("configs/tiny/dmd.yaml")
    config.video.height, config.video.width = 32, 48
    config.data.path, config.data.vae = str(tmp_path / "latents"), str(tmp_path / "vae")
    config.data.num_clips, config.data.num_stills, config.data.clip_frames = 3, 5, 5
    captions = [caption(sample_spec(config.seed, i, motions=config.data.motions)) for i in range(3)]
    few = PromptData.load(config, 4, CPU, World())
    assert [path.name for path in (tmp_path / "latents").iterdir()] == ["reference"]
    assert few.prompts == captions
    LatentData.load(config, CPU, World())
    assert (tmp_path / "latents" / "clips").is_dir() and not (tmp_path / "latents" / "stills").exists()
    again = PromptData.load(config, 4, CPU, World())
    assert again.prompts == captions and torch.equal(again.reference.mean, few.reference.mean)
    config.data.kind = DataKind.latents
    config.train.phases = [PhaseConfig(1, 1, 1)]
    data = LatentData.load(config, CPU, World())  # asks for no stills
    assert data.sample(0, 0, 1).latents.shape[1] == 1
    config.data.kind = DataKind.sprites
    LatentData.load(config, CPU, World())
    assert (tmp_path / "latents" / "stills").is_dir()
