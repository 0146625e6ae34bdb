"""Latent shards: written once, whole or absent, and read in an order that is a function of the sample index."""

import json

import numpy as np
import pytest
import torch
from tiny import vae as tiny_vae

from pipeline.data import clips as data
from pipeline.data.clips import LatentClips, shard_path, sprite_clips
from pipeline.data.latents import encode_frames, normalise, write_latents
from utils.config import ConfigError
from utils.distributed import World
from utils.sprites.world import caption, sample_spec

SIZE = (32, 48)


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return tiny_vae().eval()


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr("pipeline.data.latents.SHARD_CLIPS", 4)


def write(vae, folder, count=10, frames=5, vae_hash="a"):
    source = sprite_clips(0, count, frames, *SIZE)
    write_latents(source, vae, vae_hash, folder, World())
    return source


def test_shards_hold_normalised_latents_and_captions_in_order(vae, tmp_path, small_shards):
    source = write(vae, tmp_path)
    clips = LatentClips(tmp_path)
    assert (len(clips), *clips.shape) == (10, 4, 2, 4, 6) and clips.frames == 2
    assert clips.captions == [caption(sample_spec(0, i)) for i in range(10)]
    direct = encode_frames(vae, np.stack([source.frames(7)]))[0]
    assert (clips[7].float() - direct).abs().max() < 0.05 * direct.std()  # half precision, bf16 encoder


def test_normalise_gives_the_statistics_that_the_vae_names(vae):
    latents = torch.randn(3, 4, 5, 8, 8) * 2 + 7
    vae.register_to_config(latents_mean=[7.0] * 4, latents_std=[2.0] * 4)
    out = normalise(vae, latents)
    vae.register_to_config(latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    assert out.mean().abs() < 0.1 and abs(out.std() - 1) < 0.1


def test_a_killed_write_goes_on_at_the_first_missing_shard(vae, tmp_path, small_shards):
    write(vae, tmp_path)
    whole = list(LatentClips(tmp_path))
    kept = shard_path(tmp_path, 0, ".safetensors")
    stamp = kept.stat().st_mtime_ns
    shard_path(tmp_path, 1, ".safetensors").unlink()
    (tmp_path / "meta.json").unlink()
    with pytest.raises(ConfigError, match=r"no meta\.json"):
        LatentClips(tmp_path)
    write(vae, tmp_path)
    again = LatentClips(tmp_path)
    assert len(again) == len(whole) and all(map(torch.equal, again, whole))
    assert kept.stat().st_mtime_ns == stamp


def test_a_folder_of_another_vae_or_source_is_refused(vae, tmp_path, small_shards):
    write(vae, tmp_path, count=4)
    for other in ({"vae_hash": "b"}, {"count": 5}, {"frames": 1}):
        with pytest.raises(ConfigError, match="remove it"):
            write(vae, tmp_path, **{"count": 4, **other})


def test_captions_that_do_not_match_the_clips_are_refused(vae, tmp_path, small_shards):
    write(vae, tmp_path, count=4)
    shard_path(tmp_path, 0, ".json").write_text(json.dumps(["only one"]))
    with pytest.raises(ConfigError, match="4 clips but 1 captions"):
        LatentClips(tmp_path)


def test_every_clip_comes_once_an_epoch_whatever_order_is_asked(vae, tmp_path, small_shards):
    write(vae, tmp_path, count=6)
    clips, again = LatentClips(tmp_path), LatentClips(tmp_path)
    first = [clips.clip_of(0, i) for i in range(6)]
    second = [clips.clip_of(0, i) for i in range(6, 12)]
    assert sorted(first) == sorted(second) == list(range(6)) and first != second
    assert [again.clip_of(0, i) for i in reversed(range(12))] == list(reversed(first + second))
    assert [clips.clip_of(1, i) for i in range(12)] != first + second


def test_shard_names_sort_by_number():
    names = [shard_path(data.Path("x"), n, ".json").name for n in (2, 10, 100)]
    assert names == sorted(names)
