"""Teacher and AR-diffusion stages: what enters the loss, what the loss is, what is exported."""

import pytest
import torch
from diffusers import WanTransformer3DModel
from tiny import vae as tiny_vae
from transformers import AutoTokenizer, UMT5EncoderModel

from model.attention import matmul_attention
from model.block import CausalWanBlock
from model.causal_wan import CausalWanModel
from pipeline.data.clips import place_of
from pipeline.generate.vae_stream import StreamingDecoder
from pipeline.text import encode_text
from pipeline.train import generator
from pipeline.train.export import swapped_in
from pipeline.train.flow import ARDiffusionStage, TeacherStage
from utils.choices import LossWeighting
from utils.config import Config, ConfigError
from utils.distributed import World
from utils.train_config import PhaseConfig
from utils.video import iterate_video

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    torch.manual_seed(0)
    tiny_vae().save_pretrained(folder)
    return folder


@pytest.fixture
def config(vae_folder, tmp_path) -> Config:
    config = Config(seed=1)
    video, model, train, data = config.video, config.model, config.train, config.data
    video.height, video.width, video.frames_per_chunk, video.trained_frames = 32, 48, 1, 2
    model.num_layers, model.num_attention_heads, model.attention_head_dim, model.ffn_dim = 1, 2, 12, 16
    model.text_dim, model.text_len, model.text_layers, model.text_heads, model.freq_dim = 8, 12, 1, 2, 8
    config.sampler.kind, config.sampler.num_steps, config.sampler.guidance = "euler", 2, 2.0
    config.cache.compressor.channels = [4]
    train.mixed_precision, train.gradient_checkpointing, train.loss_weighting = "no", False, LossWeighting.none
    train.sample_frames = 2
    data.path, data.vae, data.clip_frames, data.num_clips, data.num_stills = str(tmp_path), str(vae_folder), 5, 4, 6
    return config


def rows_of(batch: dict, row: int) -> dict:
    keep = {key: value[row : row + 1] for key, value in batch.items() if key not in ("step",)}
    return keep | {"step": batch["step"]}


@pytest.mark.parametrize("kind", [TeacherStage, ARDiffusionStage])
def test_a_sample_is_a_function_of_step_and_index_alone(config, kind):
    stage = kind(config, CPU, World())
    both, alone = stage.batch(3, [10, 11]), stage.batch(3, [11])
    for key in ("latents", "noise", "timestep", "context_timestep"):
        assert torch.equal(both[key][1:], alone[key]), key
    assert both["captions"][1] == alone["captions"][0]
    later = stage.batch(4, [11])
    assert not torch.equal(later["noise"], alone["noise"]) and not torch.equal(later["timestep"], alone["timestep"])


@pytest.mark.parametrize("kind", [TeacherStage, ARDiffusionStage])
@pytest.mark.parametrize("weighting", list(LossWeighting))
def test_loss_and_gradient_of_a_batch_are_the_means_over_its_samples(config, kind, weighting):
    config.train.loss_weighting, config.train.context_noise_timestep = weighting, 200
    stage = kind(config, CPU, World())
    batch = stage.batch(0, [0, 1])
    weight = stage.transformer.blocks[0].attn1.to_q.weight

    def loss_and_gradient(part):
        loss, _ = stage.loss("generator", part, 0)
        return loss.item(), torch.autograd.grad(loss, weight)[0]

    together, gradient = loss_and_gradient(batch)
    (one, first), (two, second) = (loss_and_gradient(rows_of(batch, i)) for i in (0, 1))
    assert together == pytest.approx((one + two) / 2, rel=1e-5)
    assert torch.allclose(gradient, (first + second) / 2, atol=1e-6)
    assert gradient.abs().max() > 0


def test_the_loss_is_the_error_of_the_flow(config):
    stage = TeacherStage(config, CPU, World())
    batch = stage.batch(0, [0, 1, 2])
    sigma = (batch["timestep"] / 1000).view(-1, 1, 1, 1, 1)
    noisy = (1 - sigma) * batch["latents"] + sigma * batch["noise"]
    captions = [text for (text,) in batch["captions"]]
    embeds = encode_text(stage.text.tokenizer, stage.text.encoder, captions, 12)
    flow = stage.transformer(noisy, batch["timestep"][:, 0], embeds).sample
    expected = (flow - (batch["noise"] - batch["latents"])).square().mean()
    assert stage.loss("generator", batch, 0)[0].item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_noisy_chunk_sees_clean_chunks_before_it_and_no_later_ones(config):
    stage = ARDiffusionStage(config, CPU, World())
    with torch.no_grad():  # residual gates start small; make attention count
        stage.transformer.blocks[0].scale_shift_table.fill_(1.0)
    batch = stage.batch(0, [0])

    def error_of_chunks(batch):
        flow = stage.transformer(batch["noise"], batch["timestep"], **stage.clips.condition(batch)).sample
        return flow[:, :, 0], flow[:, :, 1]

    first, second = error_of_chunks(batch)
    changed = dict(batch, latents=batch["latents"].clone())
    changed["latents"][:, :, 0] += 1
    first_after, second_after = error_of_chunks(changed)
    assert torch.equal(first, first_after) and not torch.allclose(second, second_after, atol=1e-4)
    changed = dict(batch, latents=batch["latents"].clone())
    changed["latents"][:, :, 1] += 1
    assert all(torch.equal(a, b) for a, b in zip(error_of_chunks(batch), error_of_chunks(changed), strict=True))


def test_phases_choose_stills_and_crops_from_the_start(config):
    config.train.phases = [PhaseConfig(2, 1, 1), PhaseConfig(2, 2, 1)]
    stage = TeacherStage(config, CPU, World())
    assert stage.batch(1, [5])["latents"].shape[2] == 1 and stage.batch(2, [5])["latents"].shape[2] == 2
    stills = stage.clips.data.stills
    assert torch.equal(stage.batch(0, [5])["latents"][0].half(), stills[place_of(len(stills), 1, 5)])


def test_dropped_prompts_become_the_negative_prompt(config):
    config.train.prompt_dropout, config.sampler.negative_prompt = 1.0, "a shape bounces over a plain"
    captions = TeacherStage(config, CPU, World()).batch(0, range(4))["captions"]
    assert captions == [["a shape bounces over a plain"]] * 4


def test_the_text_encoder_learns_with_the_teacher_and_is_frozen_after(config, tmp_path):
    teacher = TeacherStage(config, CPU, World())
    teacher.loss("generator", teacher.batch(0, [0, 1]), 0)[0].backward()
    embedding = teacher.text.encoder.shared.weight
    assert embedding.grad is not None and embedding.grad.abs().max() > 0
    teacher.export(tmp_path / "bundle", None)
    config.train.text_from, config.train.init_from = str(tmp_path / "bundle"), str(tmp_path / "bundle" / "transformer")
    stage = ARDiffusionStage(config, CPU, World())
    assert stage.modules["generator"].text_encoder is None
    assert not any(p.requires_grad for p in stage.text.encoder.parameters())
    for name, value in stage.transformer.state_dict().items():
        if not name.startswith("pack_compressor"):
            assert torch.equal(value, teacher.transformer.state_dict()[name].bfloat16().float()), name


@pytest.mark.parametrize("kind", [TeacherStage, ARDiffusionStage])
def test_export_is_a_bf16_bundle_of_the_ema(config, kind, tmp_path):
    stage = kind(config, CPU, World())
    name = "transformer.proj_out.bias"
    own = dict(stage.modules["generator"].named_parameters())[name]
    before = own.detach().clone()
    stage.export(tmp_path / "bundle", {"generator": {name: torch.full_like(own, 0.5)}})
    loader = WanTransformer3DModel if kind is TeacherStage else CausalWanModel
    stored = loader.from_pretrained(tmp_path / "bundle" / "transformer", torch_dtype=torch.bfloat16)
    assert torch.equal(stored.proj_out.bias, torch.full_like(own, 0.5).bfloat16()) and torch.equal(own, before)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "bundle" / "tokenizer")
    encoder = UMT5EncoderModel.from_pretrained(tmp_path / "bundle" / "text_encoder")
    assert encode_text(tokenizer, encoder, ["a red circle"], 12).shape == (1, 12, 8)


@pytest.mark.parametrize("kind", [TeacherStage, ARDiffusionStage])
def test_samples_are_written_with_sidecars_and_do_not_touch_the_weights(config, kind, tmp_path):
    config.train.sample_prompts = ["a red circle bounces over a blue plain", "a white shape circles over a stripes"]
    stage = kind(config, CPU, World())
    before = {key: value.clone() for key, value in stage.transformer.state_dict().items()}
    scores = stage.sample(0, tmp_path / "samples", None)
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == [
        "000.json", "000.mp4", "001.json", "001.mp4", "sheet.png",
    ]  # fmt: skip
    assert 0 <= scores["background"] <= 1
    assert all(torch.equal(value, before[key]) for key, value in stage.transformer.state_dict().items())


def test_samples_are_decoded_a_latent_frame_at_a_time(config, tmp_path, monkeypatch):
    config.train.sample_prompts = ["a red circle bounces over a blue plain"]
    decode, lengths = StreamingDecoder.decode, []
    monkeypatch.setattr(StreamingDecoder, "decode", lambda *a: (lengths.append(a[1].shape[2]), decode(*a))[1])
    stage = TeacherStage(config, CPU, World())
    stage.sample(0, tmp_path, None)
    frames = len(list(iterate_video(tmp_path / "000.mp4")))
    assert set(lengths) == {1} and frames == 4 * len(lengths) - 3 > 1


def test_videos_of_other_prompts_are_not_read(config, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.train.samples.read_seconds", None)  # minutes for a real video, for nothing
    config.train.sample_prompts = ["a red circle bounces over a blue plain", "a cat on a mat"]
    assert TeacherStage(config, CPU, World()).sample(0, tmp_path, None) == {}
    assert (tmp_path / "001.mp4").is_file()


def test_a_rank_without_a_folder_writes_nothing(config, tmp_path, monkeypatch):
    config.train.sample_prompts = ["a red circle bounces over a blue plain"]
    stage = ARDiffusionStage(config, CPU, World())
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(generator, "write_samples", None)  # nor does it decode
    assert stage.sample(0, None, None) == {} and stage.modules["generator"].training
    stage.export(None, None)
    assert not list((tmp_path / "here").iterdir())


def test_clips_that_do_not_fit_the_chunk_are_refused(config):
    config.video.frames_per_chunk = 3
    with pytest.raises(ConfigError, match="2 latent frames.*frames_per_chunk=3"):
        ARDiffusionStage(config, CPU, World())


def test_swapped_weights_come_back_after_an_error():
    layer = torch.nn.Linear(2, 2)
    own = layer.weight.detach().clone()
    with pytest.raises(RuntimeError), swapped_in(layer, {"weight": torch.zeros(2, 2)}):
        assert layer.weight.abs().sum() == 0
        raise RuntimeError
    assert torch.equal(layer.weight, own)


def test_parts_of_ours_keep_the_numbers_and_the_names():
    settings = dict(num_layers=2, num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
                    text_dim=8, ffn_dim=16, freq_dim=8)  # fmt: skip
    torch.manual_seed(0)
    model = WanTransformer3DModel(**settings)
    inputs = (torch.randn(2, 4, 3, 4, 6), torch.tensor([100.0, 900.0]), torch.randn(2, 5, 8))
    expected, names = model(*inputs).sample, list(model.state_dict())
    CausalWanBlock.adopt(model)
    assert list(model.state_dict()) == names
    assert (model(*inputs).sample - expected).abs().max() < 1e-5 * expected.abs().max()
    model.requires_grad_(False)  # or a gradient would choose other attention
    with torch.no_grad():
        assert (model(*inputs).sample - expected).abs().max() < 1e-5 * expected.abs().max()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(*inputs).sample
        with torch.no_grad():  # fewer passes, the same bits
            assert torch.equal(model(*inputs).sample, rounded)


def test_masked_matmul_attention_equals_sdpa():
    query, key, value = (torch.randn(2, 6, 3, 8) for _ in range(3))
    mask = torch.rand(1, 1, 6, 6) > 0.5
    mask |= torch.eye(6, dtype=torch.bool)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (query, key, value)), attn_mask=mask
    ).transpose(1, 2)
    assert torch.allclose(matmul_attention(query, key, value, mask), expected, atol=1e-5)
