"""The VAE stage, and the VAE that ships: whole-clip passes equal the library's chunked ones, and readings survive."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan

from pipeline.data.vae_clip import channels_last, decode_clip, encode_moments, to_video
from pipeline.train.vae import VAEStage, latent_statistics
from utils.config import Config, ConfigError, VideoConfig
from utils.distributed import World
from utils.sprites.read import READERS, read_seconds, score
from utils.sprites.world import FPS, HELD_OUT_START, CaptionFacts, render, sample_spec
from utils.train_config import DataConfig, PhaseConfig, TrainConfig, VAEConfig
from utils.video import to_uint8

SHIPPED = Path(__file__).resolve().parents[1] / "bundles" / "tiny" / "vae"
ROUND_TRIP_FLOOR = 0.97
CLIP_FRAMES = 81


def small_stage(**vae) -> VAEStage:
    config = Config(
        video=VideoConfig(height=64, width=96),
        train=TrainConfig(stage="vae", phases=[PhaseConfig(3, 1, 2), PhaseConfig(5, 2, 1)]),
        data=DataConfig(clip_frames=5),
        vae=VAEConfig(**{"encoder_dim": 8, "decoder_dim": 8, "z_dim": 4, **vae}),
    )
    return VAEStage(config, torch.device("cpu"), World(rank=0, size=1))


@pytest.mark.parametrize("frames", [1, 5, 17])
def test_whole_clip_pass_equals_the_chunked_one(frames):
    vae = small_stage().vae
    with torch.no_grad():
        # The stage's own start has no past in its temporal taps; random weights make a slip there visible.
        for parameter in vae.parameters():
            parameter.normal_(std=0.1)
        video = torch.rand(2, 3, frames, 32, 48) * 2 - 1
        mean, logvar = encode_moments(vae, video)
        expected = vae.encode(video).latent_dist
        assert mean.shape == (2, 4, 1 + frames // 4, 4, 6)
        assert torch.allclose(mean, expected.mean, atol=1e-4)
        assert torch.allclose(logvar, expected.logvar, atol=1e-4)
        decoded = decode_clip(vae, mean).clamp(-1, 1)
        assert decoded.shape == video.shape
        assert torch.allclose(decoded, vae.decode(mean).sample, atol=1e-4)


def test_batches_are_a_pure_function_of_step_and_index():
    stage, again = small_stage(), small_stage()
    stage.batch(0, [0])
    for step, indices in ((0, [0, 1]), (2, [5]), (3, [6, 9])):
        ours, theirs = stage.batch(step, indices), again.batch(step, indices)
        assert torch.equal(ours["video"], theirs["video"]) and torch.equal(ours["noise"], theirs["noise"])
    both, second = stage.batch(3, [6, 9]), stage.batch(3, [9])
    assert torch.equal(both["video"][1], second["video"][0]) and torch.equal(both["noise"][1], second["noise"][0])
    assert not torch.equal(both["video"][0], both["video"][1])


def test_phases_set_the_clip_length():
    stage = small_stage()
    batches = [stage.batch(step, [0]) for step in (0, 2, 3, 100)]
    assert [batch["video"].shape[2] for batch in batches] == [1, 1, 5, 5]
    assert [batch["noise"].shape[2] for batch in batches] == [1, 1, 2, 2]


def test_crops_come_first_and_show_part_of_the_frame():
    cropped, whole = small_stage(crop_steps=4), small_stage()
    assert cropped.batch(4, [3])["video"].shape[3:] == (64, 96)
    crop, frame = cropped.batch(3, [3])["video"], whole.batch(3, [3])["video"]
    assert crop.shape == (1, 3, 5, 32, 48)
    places = [frame[..., top : top + 32, left : left + 48] for top in (0, 16, 32) for left in (0, 16, 32, 48)]
    assert any(torch.equal(crop, place) for place in places)


def test_cuts_fall_between_latent_frames():
    stage = small_stage(cuts=1.0)
    stage.config.train.phases[-1].frames = 9
    found = Counter()
    for video in stage.batch(3, range(40))["video"]:
        change = video.diff(dim=1).abs().mean(dim=(0, 2, 3))  # [32]
        cuts = [int(i) + 1 for i in (change > 5 * change.median() + 0.02).nonzero()]
        assert all(cut % 4 == 1 for cut in cuts)
        found[len(cuts)] += 1
    assert found[1] > 3 and found[2] > 3 and max(found) <= 8
    without = small_stage(cuts=0.0)
    without.config.train.phases[-1].frames = 9
    change = without.batch(3, [0])["video"].diff(dim=2).abs().mean(dim=(0, 1, 3, 4))
    assert change.max() < 1.5 * change.median()


def _shapes(vae):
    return {name: parameter.shape for name, parameter in vae.named_parameters()}


def test_the_shape_of_a_vae_is_known_without_its_weights(tmp_path):
    vae = AutoencoderKLWan(base_dim=4, z_dim=2, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[True],
                           latents_mean=[0.0] * 2, latents_std=[1.0] * 2)  # fmt: skip
    vae.save_config(tmp_path)
    config = replace(small_stage().config, train=TrainConfig(stage="vae", init_from=str(tmp_path)))
    with torch.device("meta"):
        (found,) = VAEStage.trained(config)
    assert _shapes(found) == _shapes(vae)


def test_a_frozen_encoder_keeps_its_latents(tmp_path):
    start, stage = small_stage(), None
    with torch.no_grad():
        start.vae.decoder.conv_in.weight.add_(0.01)
    start.vae.register_to_config(latents_mean=[1.0, 2.0, 3.0, 4.0], latents_std=[0.5, 1.5, 2.5, 3.5])
    start.vae.save_pretrained(tmp_path / "vae")
    stage = small_stage(train_encoder=False, latent_noise=0.3, change_weight=1.0)
    stage.config.train.init_from = str(tmp_path / "vae")
    stage = VAEStage(stage.config, torch.device("cpu"), World(rank=0, size=1))
    batch = stage.batch(3, [0, 1])
    assert 0 < batch["std"].min() < batch["std"].max() < 0.3
    loss, logs = stage.loss("vae", batch, 3)
    loss.backward()
    assert logs["change"] > 0
    moved = {name for name, parameter in stage.vae.named_parameters() if parameter.grad is not None}
    assert moved and all(name.startswith(("decoder", "post_quant_conv")) for name in moved)
    stage.export(tmp_path / "out", None)
    config = AutoencoderKLWan.load_config(tmp_path / "out" / "vae")
    assert (config["latents_mean"], config["latents_std"]) == ([1.0, 2.0, 3.0, 4.0], [0.5, 1.5, 2.5, 3.5])


def test_noise_on_latents_by_hand():
    stage, plain = small_stage(latent_noise=0.5), small_stage()
    stage._latent_std = torch.full((1, 4, 1, 1, 1), 2.0)
    seen = []
    stage._decode = plain._decode = lambda vae, latents: seen.append(latents) or decode_clip(vae, latents)
    batch = stage.batch(3, [0, 1])
    with torch.no_grad():
        stage.loss("vae", batch, 3), plain.loss("vae", plain.batch(3, [0, 1]), 3)
    mean, logvar = encode_moments(stage.vae, batch["video"])
    std = (logvar.exp() + (2.0 * batch["std"]) ** 2).sqrt()
    torch.testing.assert_close(seen[0], mean + std * batch["noise"])
    torch.testing.assert_close(seen[1], mean + (0.5 * logvar).exp() * batch["noise"])


def test_a_start_that_is_not_there_is_named():
    stage = small_stage()
    stage.config.train.init_from = "nowhere/vae"
    with pytest.raises(ConfigError, match="train.init_from. is nowhere/vae"):
        VAEStage(stage.config, torch.device("cpu"), World(rank=0, size=1))


def test_compression_factors_are_in_the_config():
    config = small_stage().vae.config
    assert (config.scale_factor_temporal, config.scale_factor_spatial) == (4, 8)


def test_the_start_looks_at_the_present_and_has_a_narrow_posterior():
    stage = small_stage()
    video = stage.batch(3, [0])["video"]  # 5 frames: two latent frames
    with torch.no_grad():
        mean, logvar = encode_moments(stage.vae, video)
        assert (logvar + 5.0).abs().mean() < 1.0
        moved = []
        for frames in (slice(0, 1), slice(1, 5)):
            changed = video.clone()
            changed[:, :, frames] = -changed[:, :, frames]
            moved.append((encode_moments(stage.vae, changed)[0] - mean)[:, :, 1].norm())
    past, present = moved
    assert 0 < past < 0.5 * present


def test_a_few_steps_bring_the_loss_down():
    stage = small_stage()
    optimizer = torch.optim.AdamW(stage.vae.parameters(), lr=3e-3)
    batch, losses = stage.batch(0, [0, 1]), []
    for _ in range(40):
        loss, logs = stage.loss("vae", batch, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert set(logs) == {"l1", "psnr", "kl", "posterior_std"}
    assert losses[-1] < 0.6 * losses[0]


def test_latent_statistics_count_the_posterior_in():
    vae = small_stage().vae
    with torch.no_grad():
        vae.quant_conv.weight.zero_()
        vae.quant_conv.bias[:4] = torch.tensor([1.0, -2.0, 0.0, 3.0])
        vae.quant_conv.bias[4:] = torch.log(torch.tensor(0.25))
    mean, std = latent_statistics(vae, [torch.rand(1, 3, 5, 32, 48)] * 2)
    assert mean == pytest.approx([1.0, -2.0, 0.0, 3.0], abs=1e-5)
    assert std == pytest.approx([0.5] * 4, abs=1e-5)


def test_export_loads_back_with_its_statistics(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.train.vae.STATISTICS_CLIPS", 2)
    stage = small_stage()
    ema = {"vae": {name: value.detach() + 0.01 for name, value in stage.vae.named_parameters()}}
    stage.export(tmp_path, ema)
    loaded = AutoencoderKLWan.from_pretrained(tmp_path / "vae", torch_dtype=torch.float32)
    for name, value in loaded.named_parameters():
        assert torch.equal(value, ema["vae"][name].bfloat16().float()), name
    clips = [to_video(render(sample_spec(0, index), 5)[None]) for index in range(2)]
    mean, std = latent_statistics(loaded, clips)
    assert loaded.config.latents_mean == pytest.approx(mean) and loaded.config.latents_std == pytest.approx(std)


def test_samples_are_round_trips_with_readable_sidecars(tmp_path):
    stage = small_stage()
    stage.config.train.sample_held_out, stage.config.train.sample_frames = 2, 5
    scores = stage.sample(0, tmp_path, None)
    assert {path.name for path in tmp_path.glob("*.mp4")} == {"000.mp4", "001.mp4"}
    assert set(scores) == set(READERS) - {"motion", "moving"} and all(0 <= value <= 1 for value in scores.values())


def test_pixels_round_trip():
    frames = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16, 1).repeat(3, axis=-1)
    assert np.array_equal(to_uint8(to_video(frames)[0]), frames[0])


@pytest.mark.skipif(not SHIPPED.is_dir(), reason="bundles/tiny/vae is not there yet")
def test_shipped_vae_keeps_the_readings_of_held_out_clips():
    vae = channels_last(AutoencoderKLWan.from_pretrained(SHIPPED, torch_dtype=torch.float32))
    right, total = Counter(), Counter()
    for index in range(8):
        spec = sample_spec(1, HELD_OUT_START + index)
        with torch.no_grad():
            latents, _ = encode_moments(vae, to_video(render(spec, CLIP_FRAMES)[None]))
            decoded = to_uint8(decode_clip(vae, latents)[0])
        facts = CaptionFacts(spec.colour, spec.shape, spec.motion, spec.background, spec.pattern)
        for mark in score(read_seconds(decoded, FPS), facts):
            total[mark.attribute] += 1
            right[mark.attribute] += mark.right
    rates = {name: right[name] / total[name] for name in READERS}
    assert min(rates.values()) >= ROUND_TRIP_FLOOR, rates
