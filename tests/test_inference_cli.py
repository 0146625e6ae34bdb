"""`inference_packforcing.py` end to end on a random tiny bundle: files, repeatability, re-runs, kills and bad input."""

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file

from inference_packforcing import main
from model.convert import diffusers_to_wan
from pipeline.data.prompt_files import PromptItem, read_prompt_items
from pipeline.generate import inference, run
from pipeline.generate.jobs import plan, slug
from pipeline.generate.vae_stream import StreamingDecoder
from tests import tiny
from utils.config import Config, ConfigError, InferenceConfig
from utils.lock import locked
from utils.video import frame_rate, read_video

PROMPTS = ["a red circle bounces over a blue plain", "a green shape circles over a gradient", "blue"]
FIRST, SECOND, THIRD = (f"{i:04d}_{prompt.replace(' ', '-')}" for i, prompt in enumerate(PROMPTS))
ONE = {"prompt": PROMPTS[0], "data_path": None}  # in place of the file
ROOT = Path(__file__).parent.parent
SHAPE = ("num_layers", "num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "text_dim",
         "freq_dim", "ffn_dim")  # fmt: skip


@pytest.fixture(scope="module")
def arguments(tmp_path_factory, bundle):
    """Command line with any flag or override changed: arguments(folder, "--seconds", "1", data_path=...)."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "config.yaml").write_text(tiny.CONFIG)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS[:2]) + "\n\n" + PROMPTS[2] + "\n")

    def build(output, *more, **flags):
        flags = {"config_path": folder / "config.yaml", "data_path": folder / "prompts.txt", **flags}
        named = [f"--{name}={value}" for name, value in {**flags, "output_folder": output}.items() if value is not None]
        return [*named, f"model.bundle={bundle}", *more]

    return build


@pytest.fixture(scope="module")
def finished(arguments, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    assert main(arguments(folder)) == 0
    return folder


def fails(capsys, argv, *expected):
    """The command ends with exit code 2 and one line that says all of `expected`."""
    assert main(argv) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    for text in expected:
        assert text in lines[0]


def test_writes_a_video_and_a_sidecar_per_prompt(finished):
    names = {f"{name}.{kind}" for name in (FIRST, SECOND, THIRD) for kind in ("mp4", "json")}
    assert {path.name for path in finished.iterdir()} == names
    video = read_video(finished / f"{FIRST}.mp4")
    assert video.shape == (13, tiny.HEIGHT, tiny.WIDTH, 3) and video.std() > 1
    assert frame_rate(finished / f"{FIRST}.mp4") == 16

    sidecar = json.loads((finished / f"{THIRD}.json").read_text())
    assert (sidecar["prompt"], sidecar["index"], sidecar["sample"], sidecar["seed"]) == ("blue", 2, 0, 0)
    assert (sidecar["fps"], sidecar["frames"], sidecar["latent_frames"], sidecar["chunks"]) == (16, 13, 4, 2)
    assert sidecar["config"]["cache"]["top_k"] == 1 and sidecar["config"]["cache"]["selection"] == "query_score"
    assert len(sidecar["weights"]["transformer"]) == 64
    assert sidecar["cache"]["sink"] == {"tokens": 12, "bytes": 12 * 2 * 2 * 24 * 4}
    assert sidecar["versions"]["torch"] and sidecar["timing"]["seconds"] > 0


def test_a_video_does_not_depend_on_the_other_prompts(arguments, finished, tmp_path):
    (tmp_path / "one.txt").write_text(PROMPTS[1])
    assert main(arguments(tmp_path / "out", data_path=tmp_path / "one.txt")) == 0
    alone = tmp_path / "out" / SECOND.replace("0001", "0000")
    assert alone.with_suffix(".mp4").read_bytes() == (finished / f"{SECOND}.mp4").read_bytes()


def test_seed_prompt_and_sample_each_change_the_video(arguments, finished, tmp_path):
    assert main(arguments(tmp_path, "inference.num_samples=2", seed=1)) == 0
    videos = [read_video(finished / f"{name}.mp4").tobytes() for name in (FIRST, SECOND)]
    videos += [read_video(tmp_path / f"{name}.mp4").tobytes() for name in (FIRST, FIRST + "_s1")]
    assert len(set(videos)) == 4


def test_guidance_and_euler_sampler(arguments, tmp_path):
    for guidance in (1, 4):
        euler = ["sampler.kind=euler", "sampler.num_steps=3", f"sampler.guidance={guidance}"]
        assert main(arguments(tmp_path / str(guidance), *euler, **ONE)) == 0
    assert len({(tmp_path / str(g) / f"{FIRST}.mp4").read_bytes() for g in (1, 4)}) == 2


def test_seconds_are_rounded_up_to_whole_chunks(arguments, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    assert main(arguments(tmp_path, "--seconds", "1", **ONE)) == 0
    assert len(read_video(tmp_path / f"{FIRST}.mp4")) == 21  # 16 frames are 5 latent frames are 3 chunks of 2
    assert "--seconds 1: 3 chunks, --num_output_frames 6, 21 frames at 16 fps, 1.31 s" in caplog.text


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["cache.top_k=2"], None),  # 2 * (1 + 2 + 1 + 1) frames, as trained
        (["cache.top_k=3"], "take 12 latent frames at packed positions, the model was trained on 10: videos may"),
        (["cache.kind=sink", "cache.recent=3"], None),
        (["cache.top_k=3", "cache.temporal=fit"], None),
        (["cache.kind=window", "cache.recent=5"], "take 12 latent frames"),
        (["cache.kind=full"], None),
    ],
)
def test_a_history_longer_than_the_trained_clips_is_told(arguments, tmp_path, caplog, settings, said):
    assert main(arguments(tmp_path, *settings, seconds="0.1")) == 0
    told = [r.getMessage() for r in caplog.records if "packed positions" in r.getMessage()]
    assert len(told) == (said is not None) and (said or "") in "".join(told)


def test_checkpoint_and_flags_reach_the_run(arguments, finished, bundle, tmp_path):
    other = tiny.write_bundle(tmp_path / "other", seed=1)
    assert main(arguments(tmp_path / "out", checkpoint_path=other / "transformer", num_output_frames=2, **ONE)) == 0
    sidecar = json.loads((tmp_path / "out" / f"{FIRST}.json").read_text())
    before = json.loads((finished / f"{FIRST}.json").read_text())
    assert sidecar["checkpoint"] == str(other / "transformer") and sidecar["frames"] == 5
    assert sidecar["weights"]["transformer"] != before["weights"]["transformer"]
    assert sidecar["weights"]["vae"] == before["weights"]["vae"]


class TestRunningAgain:
    def test_skips_what_is_finished_without_loading_a_model(self, arguments, finished, caplog, monkeypatch):
        monkeypatch.setattr(run, "load_pipeline", None)
        caplog.set_level(logging.INFO)
        assert main(arguments(finished, "inference.threads=2")) == 0
        assert "3 of 3 videos are finished already" in caplog.text

    def test_makes_what_is_missing(self, arguments, tmp_path, monkeypatch):
        made = []
        make = run.VideoMaker.make
        monkeypatch.setattr(run.VideoMaker, "make", lambda s, job, *a: made.append(job.index) or make(s, job, *a))
        assert main(arguments(tmp_path)) == 0
        (tmp_path / f"{SECOND}.json").unlink()  # killed between the video and its description
        (tmp_path / f"{THIRD}.mp4").unlink()
        assert main(arguments(tmp_path)) == 0
        assert made == [0, 1, 2, 1, 2]

    @pytest.mark.parametrize(
        "change, message",
        [
            (["cache.top_k=2"], "cache.top_k=1, now 2"),
            (["--seed", "5"], "seed=0, now 5"),
            (["--num_output_frames", "6"], "inference.num_output_frames=4, now 6"),
        ],
    )
    def test_other_settings_are_refused(self, arguments, finished, capsys, change, message):
        fails(capsys, arguments(finished, *change), FIRST, message, "choose another output folder")

    def test_other_weights_are_refused(self, arguments, finished, capsys, tmp_path):
        other = tiny.write_bundle(tmp_path / "other", seed=1)
        fails(capsys, arguments(finished, checkpoint_path=other), "was made with weights.transformer=")

    def test_other_prompt_under_the_same_name_is_refused(self, arguments, finished, capsys, tmp_path):
        (tmp_path / "p.txt").write_text(PROMPTS[0].title())
        fails(capsys, arguments(finished, data_path=tmp_path / "p.txt"), f"prompt={PROMPTS[0]}, now A Red Circle")

    def test_a_foreign_json_is_refused(self, arguments, capsys, tmp_path):
        for kind in ("mp4", "json"):
            (tmp_path / f"{FIRST}.{kind}").write_text("[]")
        fails(capsys, arguments(tmp_path), f"{FIRST}.json is not the description of a video")


def start_of_a_long_run(arguments, folder):
    """A process that makes a video of ten minutes, and what it has made so far, about a second of it."""
    command = [sys.executable, "inference_packforcing.py", *map(str, arguments(folder, "--seconds", "600"))]
    run = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE)
    partial = folder / f"{FIRST}.{run.pid}.partial.mp4"
    deadline = time.monotonic() + 120
    while not (partial.is_file() and partial.stat().st_size > 20_000):
        assert run.poll() is None and time.monotonic() < deadline, run.stderr.read().decode()
        time.sleep(0.05)
    return run, partial


def test_a_killed_run_leaves_a_playable_partial_video(arguments, tmp_path):
    run, partial = start_of_a_long_run(arguments, tmp_path)
    run.kill()
    assert run.wait() == -signal.SIGKILL
    assert {path.name for path in tmp_path.iterdir()} == {partial.name, ".lock"}
    assert len(read_video(partial)) >= 16


def test_ctrl_c_keeps_what_there_is(arguments, tmp_path, monkeypatch, capsys):
    decode = StreamingDecoder.decode
    pieces = iter([decode, decode])

    def decode_two(self, latents):
        if (step := next(pieces, None)) is None:
            raise KeyboardInterrupt
        return step(self, latents)

    monkeypatch.setattr(StreamingDecoder, "decode", decode_two)
    assert main(arguments(tmp_path, num_output_frames=8)) == 130
    assert "run the same command again to go on" in capsys.readouterr().err
    partial = f"{FIRST}.{os.getpid()}.partial.mp4"
    assert [path.name for path in tmp_path.iterdir()] == [partial]
    assert len(read_video(tmp_path / partial)) == 13


def test_pixels_are_written_chunk_by_chunk(arguments, tmp_path, monkeypatch):
    pieces = []
    append = inference.VideoWriter.append
    monkeypatch.setattr(inference.VideoWriter, "append", lambda s, x: pieces.append(len(x)) or append(s, x))
    assert main(arguments(tmp_path, num_output_frames=12, **ONE)) == 0
    assert pieces == [5, 8, 8, 8, 8, 8]


class TestBadInput:
    """Each ends before a model is loaded: the models are taken away."""

    @pytest.fixture(autouse=True)
    def no_models(self, monkeypatch):
        monkeypatch.setattr(run, "load_pipeline", None)

    @pytest.mark.parametrize(
        "more, flags, expected",
        [
            ([], {"config_path": "none.yaml"}, ["none.yaml does not exist"]),
            (["cache.topk=1"], {}, ["unknown setting `cache.topk`", "nearest known one is `cache.top_k`"]),
            ([], {"data_path": "none.txt"}, ["prompt file none.txt does not exist"]),
            ([], {"data_path": None}, ["--data_path is missing"]),
            ([], {"num_output_frames": 5}, ["`inference.num_output_frames` is 5", "multiple"]),
            ([], {"num_output_frames": -2}, ["`inference.num_output_frames` is -2", "must lie in [1, 1e7]"]),
            ([], {"seconds": 0}, ["--seconds is 0"]),
            ([], {"seconds": "inf"}, ["--seconds is inf"]),
            (["video.height=40"], {}, ["`video.height` is 40: must be a positive multiple of 16"]),
            (["model.bundle=runs/none"], {}, ["bundle runs/none does not exist; a training run writes it"]),
            (
                ["model.bundle=ckpt/Wan2.1-T2V-14B-Diffusers", "--lora", "none.safetensors"],
                {"checkpoint_path": "ckpt/chunkwise/causal_cd.pt"},
                [
                    "hf download Wan-AI/Wan2.1-T2V-14B-Diffusers --local-dir ckpt/Wan2.1-T2V-14B-Diffusers; and ",
                    "hf download zhuhz22/Causal-Forcing chunkwise/causal_cd.pt --local-dir ckpt; and ",
                    "no file none.safetensors",
                ],
            ),
            (["inference.device=tpu9"], {}, ["`inference.device` is tpu9"]),
            (["inference.dtype=int8"], {}, ["`inference.dtype` is int8: expected auto, float32"]),
            (["inference.attention_backend=magic"], {}, ["`inference.attention_backend` is magic"]),
            (["inference.threads=0"], {}, ["`inference.threads` is 0"]),
            (["cache.temporal=fit", "cache.sink=3"], {}, ["cache.temporal=fit", "trained"]),
        ],
    )
    def test_one_clear_line(self, arguments, capsys, tmp_path, more, flags, expected):
        fails(capsys, arguments(tmp_path / "out", *more, **flags), *expected)
        assert not (tmp_path / "out").exists()

    def test_a_folder_that_needs_another_step_is_named(self, arguments, capsys, tmp_path):
        (tmp_path / "run" / "checkpoints").mkdir(parents=True)
        command = f"python -m scripts.export_checkpoint {tmp_path / 'run'} model.pt"
        fails(capsys, arguments(tmp_path / "out", checkpoint_path=tmp_path / "run"), "is of a training run", command)
        (tmp_path / "run" / "Wan2.1_VAE.pth").touch()
        fails(capsys, arguments(tmp_path / "out", f"model.bundle={tmp_path / 'run'}"), "in Wan2.1's own layout")

    @pytest.mark.parametrize("content, expected", [(b"\n \n", "is empty"), (b"\xff\xfe\xfa", "not readable as UTF-8")])
    def test_prompt_file(self, arguments, capsys, tmp_path, content, expected):
        (tmp_path / "p.txt").write_bytes(content)
        fails(capsys, arguments(tmp_path / "out", data_path=tmp_path / "p.txt"), "p.txt", expected)

    def test_unwritable_output(self, arguments, capsys, tmp_path):
        (tmp_path / "file").write_text("")
        fails(capsys, arguments(tmp_path / "file" / "out"), "output folder", "is not writable")

    def test_both_lengths(self, arguments, capsys, tmp_path):
        with pytest.raises(SystemExit) as stop:
            main(arguments(tmp_path, "--seconds=1", num_output_frames=4))
        assert stop.value.code == 2 and "not allowed with" in capsys.readouterr().err


def test_wrong_checkpoint_is_named_before_the_text_encoder_loads(arguments, bundle, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(inference, "load_text_encoder", None)
    fails(capsys, arguments(tmp_path, checkpoint_path=bundle / "vae"), "is not one of a CausalWanModel")
    flags = {"checkpoint_path": bundle / "transformer"}
    fails(capsys, arguments(tmp_path, "cache.compressor.channels=[4,6]", **flags), "misshapen pack_compressor.net.2")
    fails(capsys, arguments(tmp_path, "--use_ema", **flags), "--use_ema needs a .pt file")


@pytest.mark.parametrize(
    "prompt, expected",
    [
        ("A red fox!", "a-red-fox"),
        ("../../etc/passwd", "etc-passwd"),
        ("Un café à Liège", "un-cafe-a-liege"),
        ("一只红色的狐狸", "prompt"),
        ("word " * 30, "word-word-word-word-word-word-word-word-word-word-word-word"),
        ("x" * 99, "x" * 60),
    ],
)
def test_slug(prompt, expected):
    assert slug(prompt) == expected


def test_names_do_not_collide():
    items = [PromptItem("same words"), PromptItem("same  words")]
    jobs = plan(items, "out", Config(inference=InferenceConfig(num_samples=3)), None)
    assert len({job.video for job in jobs}) == len({job.sidecar for job in jobs}) == 6


FILES = {
    "p.csv": 'prompt,seed,seconds,note\n"one, two",3,1.5,x\nthree,,,\n',
    "p.json": json.dumps([{"prompt": "one, two", "seed": 3, "seconds": 1.5, "note": "x"}, "three"]),
    "p.jsonl": '{"prompt": "one, two", "seed": 3, "seconds": 1.5}\n\n{"prompt": "three"}\n',
}


@pytest.mark.parametrize("name", FILES)
def test_prompt_files_of_every_kind_say_the_same(tmp_path, name):
    (tmp_path / name).write_text(FILES[name])
    assert read_prompt_items(tmp_path / name) == [PromptItem("one, two", 3, 1.5), PromptItem("three")]


@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("p.csv", b"text\none", "no column `prompt`"),
        ("p.json", b'{"prompt": "x"}', "holds a dict, expected a list"),
        ("p.json", b"[1]", "item 1: expected a prompt or an object with one, found int"),
        ("p.jsonl", b'{"prompt": "x"}\n{"prompt', "line 2: not JSON"),
        ("p.jsonl", b'{"promt": "x"}', "unknown key `promt`; did you mean `prompt`"),
        ("p.jsonl", b'{"prompt": "\\ud800"}', "`prompt` is '\\ud800', expected text"),
        ("p.jsonl", b'{"prompt": "x", "negative_prompt": "\\ud800"}', "`negative_prompt` is '\\ud800', expected text"),
        ("p.jsonl", b'{"prompt": "x", "seed": 1%s}' % (b"0" * 400), "`seed` is 1000"),
        ("p.jsonl", b'{"prompt": 7}', "`prompt` is 7, expected text"),
        ("p.jsonl", b'{"prompt": "x", "seed": 1.5}', "`seed` is 1.5, expected a whole number"),
        ("p.jsonl", b'{"prompt": "x", "seconds": "inf"}', "`seconds` is 'inf', expected a number"),
        ("p.jsonl", b'{"prompt": "x", "negative_prompt": 1}', "`negative_prompt` is 1"),
        ("p.txt", "a red fox".encode("utf-16"), "is binary or UTF-16"),
        ("p.txt", b"PK\x03\x04\0\0", "is binary or UTF-16"),
    ],
)
def test_prompt_files_that_cannot_be_read_are_named(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=re.escape(expected)) as error:
        read_prompt_items(tmp_path / name)
    assert name in str(error.value)


def test_a_line_sets_seed_length_and_negative_prompt_of_its_video(arguments, finished, tmp_path):
    rows = [{"prompt": PROMPTS[0], "seed": 0}, {"prompt": PROMPTS[0], "seed": 5, "seconds": 0.3}]
    (tmp_path / "p.json").write_text(json.dumps(rows))
    out = tmp_path / "out"
    assert main(arguments(out, data_path=tmp_path / "p.json")) == 0
    name = FIRST.removeprefix("0000")
    assert (out / f"{FIRST}.mp4").read_bytes() == (finished / f"{FIRST}.mp4").read_bytes()
    sidecar = json.loads((out / f"0001{name}.json").read_text())
    assert (sidecar["seed"], sidecar["frames"]) == (5, 5)
    assert main(arguments(out, data_path=tmp_path / "p.json")) == 0


def test_what_the_model_does_not_know_is_said(arguments, tmp_path, caplog):
    prompt = ["--prompt", "a purple circle bounces over a blue field"]
    assert main(arguments(tmp_path, *prompt, "video.width=64", data_path=None, num_output_frames=2)) == 0
    known = "a, blue, bounces, checkerboard, circle, circles, down"
    assert f"the text encoder does not know purple, field; it knows {known}" in caplog.text
    assert "video.width is 64: " in caplog.text and "was trained on 48" in caplog.text
    caplog.clear()
    assert main(arguments(tmp_path, "--prompt", PROMPTS[0], data_path=None)) == 0
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_the_first_real_path_needs_no_training(bundle, tmp_path, caplog):
    """A plain Diffusers folder of Wan and a few-step checkpoint in Wan2.1's names, as the config for them has it."""
    shutil.copytree(bundle, tmp_path / "wan")
    shutil.rmtree(tmp_path / "wan" / "transformer")
    shape = {key: value for key, value in tiny.transformer().config.items() if key in SHAPE}
    transformer = WanTransformer3DModel(**shape)
    transformer.save_pretrained(tmp_path / "wan" / "transformer")
    index = {"_class_name": "WanPipeline", "transformer": ["diffusers", "WanTransformer3DModel"]}
    (tmp_path / "wan" / "model_index.json").write_text(json.dumps(index))
    weights = {f"model.{diffusers_to_wan(name)}": tensor for name, tensor in transformer.state_dict().items()}
    torch.save({"generator": weights}, tmp_path / "causal_forcing.pt")
    caplog.set_level(logging.INFO)
    flags = {"config_path": ROOT / "configs/wan_causal_forcing.yaml", "checkpoint_path": tmp_path / "causal_forcing.pt"}
    flags |= {"prompt": PROMPTS[0], "output_folder": tmp_path / "out", "seconds": 0.5}
    settings = [f"model.bundle={tmp_path / 'wan'}", f"video.height={tiny.HEIGHT}", f"video.width={tiny.WIDTH}"]
    assert main([f"--{name}={value}" for name, value in flags.items()] + settings) == 0
    assert "compressor" not in caplog.text
    sidecar = json.loads((tmp_path / "out" / f"{FIRST}.json").read_text())
    assert sidecar["config"]["cache"]["kind"] == "sink" and sidecar["frames"] == 9
    assert read_video(tmp_path / "out" / f"{FIRST}.mp4").std() > 1


def test_prompts_on_the_command_line(arguments, finished, tmp_path):
    assert main(arguments(tmp_path, "--prompt", PROMPTS[0], "--prompt", PROMPTS[1], data_path=None)) == 0
    for name in (FIRST, SECOND):
        assert (tmp_path / f"{name}.mp4").read_bytes() == (finished / f"{name}.mp4").read_bytes()


def test_one_failed_video_does_not_stop_the_others(arguments, finished, tmp_path, caplog):
    (tmp_path / f"{SECOND}.mp4").mkdir()
    assert main(arguments(tmp_path)) == 1
    assert f"1 of 3 videos failed: {SECOND}.mp4: " in caplog.text and "is a folder" in caplog.text
    (tmp_path / f"{SECOND}.mp4").rmdir()
    assert main(arguments(tmp_path)) == 0
    for name in (FIRST, SECOND, THIRD):
        assert (tmp_path / f"{name}.mp4").read_bytes() == (finished / f"{name}.mp4").read_bytes()


def test_a_video_that_is_not_finite_is_not_finished(arguments, bundle, tmp_path, caplog):
    shutil.copytree(bundle, tmp_path / "broken")
    path = tmp_path / "broken" / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    save_file({name: value * float("nan") for name, value in weights.items()}, path, metadata={"format": "pt"})
    assert main(arguments(tmp_path / "out", f"model.bundle={tmp_path / 'broken'}")) == 1
    assert "chunk 0: its pixels are NaN or infinite; the likely part is the VAE" in caplog.text
    assert not list((tmp_path / "out").glob("*.json"))


def test_two_runs_on_one_folder_do_not_mix(arguments, tmp_path, capsys):
    with locked(tmp_path, "output folder"):
        fails(capsys, arguments(tmp_path), f"output folder {tmp_path} is in use by process {os.getpid()}")
    (tmp_path / ".lock").write_text("process 1 on nowhere")  # left by a process that was killed
    assert main(arguments(tmp_path)) == 0


def test_ranks_share_the_prompts_and_make_the_same_videos(arguments, finished, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               "inference_packforcing.py", *map(str, arguments(tmp_path))]  # fmt: skip
    (tmp_path / f"{THIRD}.mp4").mkdir()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1 and "1 of 3 videos failed" in done.stderr
    (tmp_path / f"{THIRD}.mp4").rmdir()
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True, timeout=200)
    for name in (FIRST, SECOND, THIRD):
        assert (tmp_path / f"{name}.mp4").read_bytes() == (finished / f"{name}.mp4").read_bytes()
    assert not list(tmp_path.glob("*.partial.mp4"))


def test_terminated_it_ends_cleanly(arguments, tmp_path):
    run, _ = start_of_a_long_run(arguments, tmp_path)
    run.terminate()
    assert run.wait(timeout=60) == 143 and b"run the same command again to go on" in run.stderr.read()
    assert not (tmp_path / ".lock").exists()
