"""A folder of videos becomes latents that a stage trains on; what is broken is named and left out."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from tiny import vae as tiny_vae
from tiny import write_bundle

import inference_packforcing
import train
from model.weights import content_hash
from pipeline.data import shards
from pipeline.data.clips import LatentClips, write_clips
from pipeline.data.latents import LatentData
from pipeline.data.shards import Shards, ShardWriter, read_notes, shard_path
from pipeline.data.vae_clip import encode_frames
from pipeline.data.videos import VideoClips, fit, list_videos, nearest_frames, read_clip
from pipeline.train.flow import ARDiffusionStage
from scripts.prepare_data import main
from utils.config import ConfigError
from utils.distributed import World
from utils.load_config import load_config
from utils.sprites.world import render, sample_spec
from utils.video import read_video, write_video

CPU, ALONE = torch.device("cpu"), World()
HEIGHT, WIDTH = 32, 48
CAPTION = "a red circle bounces over a blue plain"

CONFIG = f"""
video: {{height: {HEIGHT}, width: {WIDTH}, fps: 8, frames_per_chunk: 1, trained_frames: 2}}
model: {{num_layers: 1, num_attention_heads: 2, attention_head_dim: 12, ffn_dim: 16, text_dim: 16, text_len: 12,
        freq_dim: 8}}
sampler: {{kind: euler, num_steps: 2}}
train: {{stage: ar_diffusion, mixed_precision: "no", gradient_checkpointing: false}}
data: {{kind: latents, clip_frames: 5, shard_size: 2, workers: 0}}
"""


def clip(index, frames=8, height=HEIGHT, width=WIDTH):
    return render(sample_spec(0, index), frames, height, width)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Five usable videos, one in a folder of its own, and one each: broken, too short, without caption."""
    folder = tmp_path_factory.mktemp("videos")
    for index, name in enumerate(["a", "b", "c", "deep/d", "e"]):
        write_video(folder / f"{name}.mp4", clip(index), 8)
        (folder / f"{name}.txt").write_text(f"{CAPTION} {index}\n")
    (folder / "broken.mp4").write_text("no video")
    (folder / "broken.txt").write_text(CAPTION)
    write_video(folder / "short.mp4", clip(5, frames=4), 8)
    (folder / "short.txt").write_text(CAPTION)
    write_video(folder / "silent.mp4", clip(6), 8)
    return folder


@pytest.fixture
def prepared(videos, bundle, tmp_path):
    """run(*arguments) calls the script; the latents are in `tmp_path/latents/clips`."""
    (tmp_path / "config.yaml").write_text(CONFIG)

    def run(*arguments):
        return main([
            f"--config_path={tmp_path / 'config.yaml'}", f"data.path={tmp_path / 'latents'}",
            f"data.vae={bundle / 'vae'}", f"train.text_from={bundle}", *map(str, arguments),
        ])  # fmt: skip

    return run


# Reading videos


def times(fps, count, offset=0.0):
    return [(offset + k / fps, k) for k in range(count)]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (times(8, 6), [0, 1, 2, 3, 4]),
        (times(16, 12), [0, 2, 4, 6, 8]),
        (times(24, 13), [0, 3, 6, 9, 12]),
        (times(4, 3), [0, 0, 1, 1, 2]),  # nearest, ties to the earlier
        (times(8, 5, offset=0.01), [0, 1, 2, 3, 4]),
        ([(0.0, 0), (0.3, 1), (0.35, 2), (0.5, 3)], [0, 0, 1, 2, 3]),  # variable rate
        (times(8, 3), [0, 1, 2]),
    ],
    ids=["same", "twice", "triple", "half", "offset", "variable", "ends early"],
)
def test_frames_are_the_nearest_in_time(source, expected):
    assert list(nearest_frames(iter(source), 5, 8)) == expected


def test_a_clip_is_scaled_to_cover_and_cropped_in_the_middle(tmp_path):
    frames = np.zeros((6, 64, 160, 3), np.uint8)
    frames[:, :, :56], frames[:, :, 56:104], frames[:, :, 104:] = (200, 20, 20), (20, 200, 20), (20, 20, 200)
    write_video(tmp_path / "wide.mp4", frames, 8)
    read = read_clip(tmp_path / "wide.mp4", 5, 8, 32, 24)  # the green middle
    assert read.shape == (5, 32, 24, 3) and read.dtype == np.uint8
    assert np.abs(read[:, :, 4:-4].astype(int) - (20, 200, 20)).max() < 12
    tall = read_clip(tmp_path / "wide.mp4", 5, 8, 16, 80)  # width decides: all three colours, rows cut
    assert tall[0, 8, 4, 0] > 150 and tall[0, 8, 40, 1] > 150 and tall[0, 8, 75, 2] > 150


@pytest.mark.parametrize(("rotation", "corner"), [(0, (0, 0)), (90, (-1, 0)), (-90, (0, -1)), (180, (-1, -1))])
def test_a_phones_video_is_turned_upright(rotation, corner):
    pixels = np.zeros((32, 48, 3), np.uint8)
    pixels[:16, :16] = 255  # top left
    stored = av.VideoFrame.from_ndarray(pixels, format="rgb24")
    frame = SimpleNamespace(rotation=rotation, height=32, width=48, reformat=stored.reformat)
    upright = fit(frame, *((48, 32) if rotation in (90, -90) else (32, 48)))
    assert upright[corner].min() > 250
    assert sum(int(upright[y, x].min() > 250) for y in (0, -1) for x in (0, -1)) == 1


def test_a_clip_starts_where_it_should(tmp_path):
    levels = np.arange(20) * 12
    frames = np.broadcast_to(levels[:, None, None, None], (20, 32, 48, 3)).astype(np.uint8)
    write_video(tmp_path / "steps.mp4", frames, 8)
    read = read_clip(tmp_path / "steps.mp4", 5, 8, 32, 48, start=1.25)
    assert np.abs(read.mean((1, 2, 3)) - levels[10:15]).max() < 4
    halved = read_clip(tmp_path / "steps.mp4", 5, 4, 32, 48, start=0.5)
    assert np.abs(halved.mean((1, 2, 3)) - levels[4:14:2]).max() < 4
    with pytest.raises(ValueError, match="too short: 2 of 5"):
        read_clip(tmp_path / "steps.mp4", 5, 8, 32, 48, start=2.25)


# Captions


def test_captions_from_csv_and_jsonl(tmp_path):
    (tmp_path / "captions.csv").write_text('path,text,start\na.mp4,"one, two",\nb.mp4,three,1.5\n')
    rows = [{"video": "a.mp4", "caption": "one, two"}, {"file_name": "b.mp4", "prompt": "three", "start": 1.5}]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    read = [list_videos(tmp_path, tmp_path / f"captions.{kind}") for kind in ("csv", "jsonl")]
    assert read[0] == read[1]
    assert [(clip.name, clip.caption, clip.start) for clip in read[0]] == [
        ("a.mp4", "one, two", 0.0), ("b.mp4", "three", 1.5),
    ]  # fmt: skip


BAD_ROWS = {
    '{"video": "bad.mp4", "caption": "x", "start": Infinity}': "bad.mp4: start is inf, expected seconds from 0 on",
    '{"video": "bad.mp4", "caption": "x", "start": -1}': "start is -1.0, expected seconds from 0 on",
    '{"video": "bad.mp4", "caption": "x", "start": "soon"}': "bad.mp4: start is 'soon', expected seconds",
    '{"video": "bad.mp4", "caption": "\\ud800"}': "bad.mp4: its caption has characters that UTF-8 does not have",
    '{"video": "bad\\ud800.mp4"}': "line 1: no column caption or text or prompt; there are video",
    '{"video": "bad.mp4", "caption": " "}': "bad.mp4: no caption",
    '{"video": ': "line 1: expected an object with video and caption",
    '["a.mp4"]': "line 1: expected an object",
}


@pytest.mark.parametrize("row", BAD_ROWS)
def test_a_bad_row_is_reported_and_alone_it_is_an_error(tmp_path, row):
    path = tmp_path / "c.jsonl"
    path.write_text(row + '\n{"video": "a.mp4", "caption": "good"}\n')
    bad, good = list_videos(tmp_path, path)
    assert BAD_ROWS[row] in f"{bad.label}: {bad.problem}" and good.problem is None
    path.write_text(row)
    with pytest.raises(ConfigError, match="none of 1 videos is usable") as error:
        list_videos(tmp_path, path)
    assert BAD_ROWS[row] in str(error.value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.csv", b"clip,caption\na.mp4,x\n", "line 2: no column video or path or file_name; there are clip, caption"),
        ("c.csv", b"video,caption\n", "no videos there"),
        ("c.csv", b"video,caption\n\xff\xfe", "not readable"),
        ("c.xls", b"", "expected a .csv or .jsonl"),
    ],
)
def test_bad_captions(tmp_path, name, text, message):
    (tmp_path / name).write_bytes(text)
    with pytest.raises(ConfigError, match=message):
        list_videos(tmp_path, tmp_path / name)


# The whole


def test_a_folder_of_videos_becomes_training_data(prepared, videos, bundle, tmp_path, capsys):
    assert prepared(f"--videos={videos}", f"data.text_embeddings={tmp_path / 'text'}") == 0
    clips = LatentClips(tmp_path / "latents" / "clips")
    assert clips.captions == [f"{CAPTION} {i}" for i in (0, 1, 2, 3, 4)]
    assert clips.shape == (4, 2, 4, 6)
    vae = tiny_vae().from_pretrained(bundle / "vae").eval()
    direct = encode_frames(vae, read_clip(videos / "deep" / "d.mp4", 5, 8, HEIGHT, WIDTH)[None], whole=False)[0].half()
    assert torch.equal(clips[3], direct) and direct.std() > 0.01

    capsys.readouterr()
    assert prepared("--check", f"data.text_embeddings={tmp_path / 'text'}") == 0
    *_, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert (found["asked_for"], found["clips"], found["shape"]) == (8, 5, [4, 2, 4, 6]) and not found["problems"]
    assert found["skipped"].keys() == {"broken.mp4", "short.mp4", "silent.mp4"}
    assert found["skipped"]["short.mp4"].startswith("too short: 4 of 5")
    assert found["skipped"]["silent.mp4"] == "no caption" and "not a readable" in found["skipped"]["broken.mp4"]
    assert found["captions"]["words_max"] == 9 and found["text"]["missing"] == 0
    stacked = torch.stack(list(clips)).double()
    assert found["mean"] == pytest.approx(stacked.mean((0, 2, 3, 4)).tolist(), abs=1e-6)
    assert found["std"] == pytest.approx(stacked.std((0, 2, 3, 4), correction=0).tolist(), abs=1e-6)

    options = [f"data.path={tmp_path / 'latents'}", f"data.vae={bundle / 'vae'}"]
    config = load_config(tmp_path / "config.yaml", [*options, f"data.text_embeddings={tmp_path / 'text'}"])
    stage = ARDiffusionStage(config, CPU, World())
    batch = stage.batch(0, [0, 1])
    loss, _ = stage.loss("generator", batch, 0)
    loss.backward()
    assert loss.isfinite() and stage.transformer.proj_out.weight.grad.abs().max() > 0
    assert all(any(torch.equal(sample.half(), clips[i]) for i in range(5)) for sample in batch["latents"])


@pytest.fixture
def write(videos, bundle):
    """write(folder, world, **options) encodes the videos into the folder, two a shard."""
    vae = tiny_vae().from_pretrained(bundle / "vae").eval()

    def call(folder, world=ALONE, listed=None, vae_hash="hash", encode=None, shard_size=2, workers=0):
        source = VideoClips(listed or list_videos(videos, None), videos, 5, 8, HEIGHT, WIDTH)
        encode = encode or (lambda frames: encode_frames(vae, frames, whole=False))
        return write_clips(source, encode, vae_hash, folder, world, shard_size=shard_size, workers=workers)

    call.vae = vae
    return call


def test_ranks_share_the_work_and_a_killed_run_goes_on(write, tmp_path, monkeypatch):
    skipped = write(tmp_path / "alone")
    assert skipped.keys() == {"broken.mp4", "short.mp4", "silent.mp4"}
    monkeypatch.setattr(shards, "barrier", lambda world: None)  # one rank after the other, in this process
    monkeypatch.setattr(shards, "from_main", lambda make, world: make())
    both = tmp_path / "both"
    assert write(both, World(0, 2)) == {}
    assert [path.name for path in shards.shard_paths(both)] == ["shard-00000.safetensors", "shard-00002.safetensors"]
    with pytest.raises(ConfigError, match="is not finished: 2 of 4"):
        LatentClips(both)

    encoded, limit = [], 0

    def dies(frames):
        if len(encoded) == limit:
            raise KeyboardInterrupt
        encoded.append(frames)
        return encode_frames(write.vae, frames, whole=False)

    with pytest.raises(KeyboardInterrupt):
        write(both, encode=dies)  # a rank fewer
    limit, stamp = 10, shard_path(both, 0).stat().st_mtime_ns
    assert write(both, encode=dies) == skipped
    assert stamp == shard_path(both, 0).stat().st_mtime_ns and 0 < len(encoded) < 5
    alone, again = LatentClips(tmp_path / "alone"), LatentClips(both)
    assert again.captions == alone.captions and all(map(torch.equal, again, alone))
    assert not list(both.glob("*.partial"))
    with pytest.raises(ConfigError, match="another `vae`"):
        write(both, vae_hash="other")


def test_decoding_in_other_processes_gives_the_same(write, tmp_path):
    for workers in (0, 2):
        write(tmp_path / str(workers), workers=workers)
    one, two = (LatentClips(tmp_path / str(workers)) for workers in (0, 2))
    assert one.captions == two.captions and all(map(torch.equal, one, two))


def test_check_names_what_is_wrong(prepared, videos, tmp_path, capsys):
    assert prepared("--check") == 2
    assert "no clips are there" in capsys.readouterr().err
    assert prepared(f"--videos={videos}") == 0
    folder = tmp_path / "latents" / "clips"
    notes = read_notes(shard_path(folder, 0))
    spoilt = torch.stack(list(LatentClips(folder))[:2])
    spoilt[1, 0, 0, 0, 0] = float("nan")
    plan = Shards(folder, "clips", "").plan
    made_by = {key: value for key, value in plan.items() if key not in ("format", "kind", "shards")}
    ShardWriter(folder, "clips", made_by, 4, World()).write(0, {"latents": spoilt}, **notes)
    shard_path(folder, 2).unlink()
    shard_path(folder, 3).write_bytes(b"no shard")
    capsys.readouterr()
    assert prepared("--check") == 1
    problems = json.loads(capsys.readouterr().out.splitlines()[-1])["problems"]
    assert any("b.mp4 has NaN" in problem for problem in problems)
    assert any(problem.startswith("shard-00002.safetensors is missing") for problem in problems)
    assert any("shard-00003.safetensors: not a readable shard" in problem for problem in problems)
    assert len(problems) == 3


def test_a_shard_without_a_usable_video_is_no_obstacle(write, videos, tmp_path):
    by_name = {clip.name: clip for clip in list_videos(videos, None)}
    usable, broken = by_name["a.mp4"], by_name["broken.mp4"]
    write(tmp_path / "some", listed=[broken, usable, broken], shard_size=1)
    clips = LatentClips(tmp_path / "some")
    assert len(clips) == 1 and clips.captions == [f"{CAPTION} 0"] and clips[0].shape == clips.shape
    with pytest.raises(IndexError):
        clips[1]


def test_no_usable_video_is_an_error_that_names_each(prepared, videos, tmp_path, capsys):
    folder = tmp_path / "bad"
    folder.mkdir()
    for name in ("broken.mp4", "short.mp4"):
        (folder / name).write_bytes((videos / name).read_bytes())
    assert prepared(f"--videos={folder}") == 2  # no captions: before anything is loaded
    assert "none of 2 videos is usable: broken.mp4: no caption; short.mp4: no caption" in capsys.readouterr().err
    for name in ("broken.txt", "short.txt"):
        (folder / name).write_text(CAPTION)
    assert prepared(f"--videos={folder}") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "none of 2 clips is usable" in error and "broken.mp4: not a readable video" in error
    assert "short.mp4: too short: 4 of 5 frames" in error


def test_a_name_that_is_no_text_is_left_out_by_a_name_that_can_be_printed(prepared, videos, tmp_path, capsys):
    rows = [{"video": "odd\ud800.mp4", "caption": "x"}, {"video": "a.mp4", "caption": "y", "start": 1e300}]
    rows += [{"video": "a.mp4", "caption": CAPTION}, {"video": "a.mp4", "caption": CAPTION, "start": float("inf")}]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert prepared(f"--videos={videos}", f"--captions={tmp_path / 'c.jsonl'}") == 0
    capsys.readouterr()
    assert prepared("--check") == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["clips"] == 1 and found["skipped"].keys() == {"odd\\ud800.mp4", "a.mp4 from 1e+300 s", "a.mp4"}


def test_latents_of_another_vae_or_size_are_refused(prepared, videos, bundle, tmp_path):
    assert prepared(f"--videos={videos}") == 0
    options = [f"data.path={tmp_path / 'latents'}"]
    other = write_bundle(tmp_path / "other", seed=1) / "vae"
    config = load_config(tmp_path / "config.yaml", [*options, f"data.vae={other}"])
    with pytest.raises(ConfigError, match="of another VAE"):
        LatentData.load(config, CPU, World())
    config = load_config(tmp_path / "config.yaml", [*options, f"data.vae={bundle / 'vae'}", "video.width=64"])
    with pytest.raises(ConfigError, match="of 32x48 videos"):
        LatentData.load(config, CPU, World())


def test_a_vae_with_another_decoder_takes_the_latents(prepared, videos, bundle, tmp_path):
    assert prepared(f"--videos={videos}") == 0
    folder, vae = tmp_path / "latents" / "clips", tiny_vae().from_pretrained(bundle / "vae")

    def load(**changed):
        for name, tensor in vae.state_dict().items():
            tensor.add_(0.5 if name.startswith(changed.get("part", "none")) else 0)
        vae.register_to_config(latents_std=changed.get("std", vae.config.latents_std))
        vae.save_pretrained(tmp_path / "changed")
        options = [f"data.path={tmp_path / 'latents'}", f"data.vae={tmp_path / 'changed'}"]
        return LatentData.load(load_config(tmp_path / "config.yaml", options), CPU, World())

    assert load(part="decoder.").shape[1] == load(part="post_quant_conv").shape[1] == 2
    plan = json.loads((folder / "plan.json").read_text())
    for change in ({"std": [2.0] * 4}, {"std": [1.0] * 4, "part": "encoder.conv_out"}, {"part": "quant_conv"}):
        with pytest.raises(ConfigError, match="are of another VAE$"):
            load(**change)
    for name, works in (("changed", True), ("bundle", False)):  # as earlier versions marked them
        where = bundle / "vae" if name == "bundle" else tmp_path / name
        (folder / "plan.json").write_text(json.dumps(plan | {"vae": content_hash(where)}))
        with nullcontext() if works else pytest.raises(ConfigError, match="with another decoder.*encode them again"):
            load()
    (folder / "plan.json").write_text(json.dumps(plan | {"vae": content_hash(bundle / "vae")}))
    (folder / "shard-00000.safetensors").unlink()
    assert prepared(f"--videos={videos}") == 0  # goes on under the mark that is there
    assert json.loads((folder / "plan.json").read_text())["vae"] == content_hash(bundle / "vae")


def test_usage_errors_are_one_line(prepared, videos, tmp_path, capsys):
    for arguments, message in (
        ([], "nothing to prepare"),
        ([f"--videos={tmp_path / 'nowhere'}"], "nowhere does not exist"),
        ([f"--videos={videos}", f"data.vae={videos}"], "no AutoencoderKLWan there"),
        ([f"--videos={videos}", "--text_batch=0"], "must be positive"),
        ([f"--videos={videos}", "data.text_embeddings=x", "train.text_from=null"], "`train.text_from` is not set"),
    ):
        assert prepared(*arguments) == 2
        assert message in capsys.readouterr().err


def test_from_six_videos_through_a_trained_step_to_a_sample(prepared, bundle, tmp_path):
    """Own data, by the commands alone."""
    for index in range(6):
        write_video(tmp_path / "own" / f"{index}.mp4", clip(index), 8)
        (tmp_path / "own" / f"{index}.txt").write_text(CAPTION)
    data = [f"data.text_embeddings={tmp_path / 'text'}"]
    assert prepared(f"--videos={tmp_path / 'own'}", *data) == 0
    data += [f"data.path={tmp_path / 'latents'}", f"data.vae={bundle / 'vae'}", f"train.text_from={bundle}"]
    settings = [f"--config_path={tmp_path / 'config.yaml'}", "train.max_steps=1", "train.batch_size=2"]
    assert train.main([*settings, f"--logdir={tmp_path / 'run'}", "--no_visualize", *data]) == 0
    (tmp_path / "prompt.txt").write_text(CAPTION)
    options = [f"--data_path={tmp_path / 'prompt.txt'}", f"--output_folder={tmp_path / 'out'}", "--seconds=1"]
    model = [f"model.bundle={tmp_path / 'run' / 'bundle'}", "cache.compressor.kind=identity", "inference.device=cpu"]
    assert inference_packforcing.main([f"--config_path={tmp_path / 'config.yaml'}", *options, *model]) == 0
    (sample,) = (tmp_path / "out").glob("*.mp4")
    assert read_video(sample).shape == (9, HEIGHT, WIDTH, 3)
