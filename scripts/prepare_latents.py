"""A folder of videos with captions -> latents to train on (`data.kind=latents`), and embeddings of the captions.

    python -m scripts.prepare_latents --config_path configs/wan_base.yaml --videos ~/videos \\
        data.path=data/latents data.vae=ckpt/Wan2.1-T2V-1.3B-Diffusers/vae data.clip_frames=81
    torchrun --nproc_per_node=8 -m scripts.prepare_latents ... --captions ~/videos/captions.csv \\
        data.text_embeddings=data/text train.text_from=ckpt/Wan2.1-T2V-1.3B-Diffusers
    python -m scripts.prepare_latents ... --check

Captions: without --captions, `clip.txt` beside `clip.mp4`, anywhere below the folder. With it, a .csv file with a
header or a .jsonl file, one clip per row: `video` (or `path`, `file_name`), relative to the folder; `caption` (or
`text`, `prompt`); and `start`, in seconds, where the clip does not begin at the video's beginning.

Of every video `data.clip_frames` frames are taken at `video.fps`, scaled to cover `video.height` x `video.width` and
cropped around the middle. Shards go to `data.path`/clips, every rank its share; started again, it writes what is
missing. A video that is broken, too short or without caption is left out and named at the end. With
`data.text_embeddings`, captions and the config's own prompts are embedded too (see scripts/precompute_text.py).

--check reads every shard and prints counts, shapes, NaN, statistics of latents and captions and the videos left out,
then the same as one line of JSON; its exit code is 1 where something is wrong.
"""

import argparse
import json
import logging
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan

from model.weights import content_hash
from pipeline.data.clips import read_captions
from pipeline.data.precompute import embed_prompts
from pipeline.data.prompts import fixed_prompts
from pipeline.data.shards import META
from pipeline.data.text_embeddings import TextEmbeddings
from pipeline.data.video_latents import check_video_latents, write_video_latents
from pipeline.data.videos import CaptionedVideo, list_videos
from pipeline.train.stage_parts import need_folder
from utils.config import Config, ConfigError
from utils.distributed import World, rank
from utils.load_config import load_config

USAGE_ERROR, NOT_SOUND = 2, 1


def prepare(config: Config, videos: list[CaptionedVideo], root: Path, folder: Path, batch_size: int,
            device: torch.device, world: World) -> None:  # fmt: skip
    """Write what is missing of latents and embeddings. Raises `ConfigError`."""
    vae_folder = need_folder(config.data.vae, "data.vae", "an AutoencoderKLWan")
    if config.data.text_embeddings is not None:  # first: it ends on all ranks at about the same time
        prompts = fixed_prompts(config) + [video.caption for video in videos if video.caption]
        embed_prompts(config, prompts, batch_size, device, world)
    try:
        vae = AutoencoderKLWan.from_pretrained(vae_folder, local_files_only=True).eval().to(device)
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise ConfigError(f"setting `data.vae` is {vae_folder}: no AutoencoderKLWan there ({reason})") from error
    stride = vae.config.scale_factor_spatial
    for name, size in (("height", config.video.height), ("width", config.video.width)):
        if size % stride:
            raise ConfigError(f"setting `video.{name}` is {size}: must be a multiple of the VAE's {stride} pixels")
    write_video_latents(config, videos, root, vae, content_hash(vae_folder), folder, world)


def check(config: Config, folder: Path) -> bool:
    """Print what is there; returns whether it is sound and finished. Raises `ConfigError` where there is nothing."""
    found = check_video_latents(folder)
    if config.data.text_embeddings is not None and (folder / META).is_file():
        stored = TextEmbeddings(config.data.text_embeddings)
        wanted = fixed_prompts(config) + [text for texts in read_captions(folder) for text in texts]
        found["text"] = stored.check() | {"missing": len(stored.missing(wanted))}
        if found["text"]["missing"]:
            found["problems"].append(f"{found['text']['missing']} prompts have no embedding in {stored.folder}")
        found["problems"] += [f"the embedding of {prompt!r} is not finite" for prompt in found["text"]["not_finite"]]
    captions = found["captions"]
    print(f"{found['folder']}: {found['clips']} clips {found['shape']} of {found['videos']} videos, "
          f"{found['shards']} shards")  # fmt: skip
    print(f"captions: {captions['different']} different, {captions['empty']} empty, {captions['words_min']} to "
          f"{captions['words_max']} words, {captions['words_mean']:.1f} on average")  # fmt: skip
    if "mean" in found:
        print("latents per channel, mean: " + " ".join(f"{value:.2f}" for value in found["mean"]))
        print("latents per channel, std:  " + " ".join(f"{value:.2f}" for value in found["std"]))
    print(f"videos left out: {len(found['skipped'])}")
    for name, reason in found["skipped"].items():
        print(f"  {name}: {reason}")
    for problem in found["problems"]:
        print(f"PROBLEM {problem}")
    print(json.dumps(found, ensure_ascii=False))
    return not found["problems"]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config_path", required=True, help="YAML of the stage that will train on the latents")
    parser.add_argument("--videos", help="folder of videos")
    parser.add_argument("--captions", help=".csv or .jsonl; without it, a .txt beside each video")
    parser.add_argument("--check", action="store_true", help="read and report what is there; write nothing")
    parser.add_argument("--text_batch", type=int, default=8, help="captions embedded at once")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, for example data.path=data/x")
    parsed = parser.parse_intermixed_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    try:
        config = load_config(parsed.config_path, parsed.overrides)
        if config.data.path is None:
            raise ConfigError("setting `data.path` is not set: name the folder of latents")
        folder = Path(config.data.path) / "clips"
        if parsed.check:
            return 0 if check(config, folder) else NOT_SOUND
        if parsed.videos is None:
            raise ConfigError("give --videos FOLDER, or --check to look at what was written")
        videos = list_videos(parsed.videos, parsed.captions)
        with rank() as (device, world):
            prepare(config, videos, Path(parsed.videos), folder, parsed.text_batch, device, world)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main())
