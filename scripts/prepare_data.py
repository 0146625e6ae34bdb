"""What training reads, computed once: latents of captioned videos, and embeddings of prompts.

    python -m scripts.prepare_data --config_path configs/wan_base.yaml --videos ~/videos \\
        data.path=data/latents data.vae=ckpt/Wan2.1-T2V-1.3B-Diffusers/vae data.clip_frames=81
    torchrun --nproc_per_node=8 -m scripts.prepare_data ... --captions ~/videos/captions.csv \\
        data.text_embeddings=data/text train.text_from=ckpt/Wan2.1-T2V-1.3B-Diffusers
    python -m scripts.prepare_data --config_path configs/tiny/dmd.yaml data.text_embeddings=runs/text
    python -m scripts.prepare_data ... --check

With --videos: of every video `data.clip_frames` frames are taken at `video.fps`, scaled to cover `video.height` x
`video.width`, cropped around the middle and encoded to `data.path`/clips. Captions: without --captions, `clip.txt`
beside `clip.mp4`, anywhere below the folder; with it, a .csv file with a header or a .jsonl file, one clip per row:
`video` (or `path`, `file_name`), relative to the folder; `caption` (or `text`, `prompt`); and `start`, in seconds,
where the clip does not begin at the video's beginning. What cannot be used is left out and named at the end.

With `data.text_embeddings` the config's negative and sample prompts are embedded, and those of the videos, of the file
--prompts, or of `data` (lines of a file, captions of latents or of the sprite world's clips). The encoder is that of
`train.text_from`, else of `model.bundle`. Prompts can be added to a folder later.

Every rank writes its share; started again, it writes what is missing. --check reads every shard of latents and prints
counts, shapes, NaN, statistics and what was left out, then the same as one line of JSON; its exit status is 1 where
something is wrong.
"""

import argparse
import json
import logging
import sys
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan

from pipeline.bundle import vae_shape_of
from pipeline.data.clips import LatentClips, check_clips, data_folder, vae_mark, write_clips
from pipeline.data.prompts import data_prompts, fixed_prompts, read_prompts
from pipeline.data.text import TextEmbeddings, embed_prompts
from pipeline.data.vae_clip import encode_frames
from pipeline.data.videos import VideoClips, list_videos
from pipeline.load import load_library_model
from pipeline.sources import vae_folder
from utils.cli import check_positive, config_parser, run_configured
from utils.config import Config, ConfigError
from utils.distributed import World, rank

log = logging.getLogger(__name__)
NOT_SOUND = 1


def prepare(config: Config, arguments: argparse.Namespace, device: torch.device, world: World) -> None:
    """Write what is missing of latents and embeddings. Raises `ConfigError`."""
    data, video = config.data, config.video
    if arguments.videos is None:
        prompts = read_prompts(arguments.prompts) if arguments.prompts else data_prompts(config)
        return embed_prompts(config, fixed_prompts(config) + prompts, arguments.text_batch, device, world)
    folder, encoder = clips_folder(config), vae_folder(config)
    vae_shape_of(encoder).size(video)
    videos = list_videos(arguments.videos, arguments.captions)
    if data.text_embeddings is not None:  # first: it ends on all ranks at about the same time
        prompts = fixed_prompts(config) + [clip.caption for clip in videos if not clip.problem]
        embed_prompts(config, prompts, arguments.text_batch, device, world)
    vae = load_library_model(AutoencoderKLWan, encoder, torch.float32).to(device)
    encode = partial(encode_frames, vae, whole=False)
    source = VideoClips(videos, Path(arguments.videos), data.clip_frames, video.fps, video.height, video.width)
    skipped = write_clips(source, encode, vae_mark(encoder, folder), folder, world,
                          shard_size=data.shard_size, workers=data.workers)  # fmt: skip
    for clip, reason in skipped.items():
        log.warning("left out: %s: %s", clip, reason)


def clips_folder(config: Config) -> Path:
    return data_folder(config) / "clips"


def check(config: Config) -> int:
    """Print what is there; returns the exit status. Raises `ConfigError` where there is nothing."""
    found = check_clips(clips_folder(config))
    if config.data.text_embeddings is not None and not found["problems"]:
        stored = TextEmbeddings(config.data.text_embeddings)
        missing = stored.missing(fixed_prompts(config) + LatentClips(clips_folder(config)).captions)
        found["text"] = stored.check() | {"missing": len(missing)}
        if missing:
            found["problems"].append(f"{len(missing)} prompts have no embedding in {stored.folder}")
        found["problems"] += [f"the embedding of {prompt!r} is not finite" for prompt in found["text"]["not_finite"]]
    captions = found["captions"]
    print(f"{found['folder']}: {found['clips']} clips {found['shape']} of {found['asked_for']} asked for, in "
          f"{found['shards']} shards")  # fmt: skip
    print(f"captions: {captions['different']} different, {captions['words_min']} to {captions['words_max']} words, "
          f"{captions['words_mean']:.1f} on average")  # fmt: skip
    for name in ("mean", "std"):
        print(f"latents per channel, {name}: " + " ".join(f"{value:.2f}" for value in found.get(name, ())))
    print(f"clips left out: {len(found['skipped'])}")
    for name, reason in found["skipped"].items():
        print(f"  {name}: {reason}")
    for problem in found["problems"]:
        print(f"PROBLEM {problem}")
    print(json.dumps(found))
    return NOT_SOUND if found["problems"] else 0


def run(config: Config, arguments: argparse.Namespace) -> int:
    check_positive(arguments, "text_batch")
    if arguments.check:
        return check(config)
    if arguments.videos is None and config.data.text_embeddings is None:
        raise ConfigError("nothing to prepare: give --videos FOLDER, or set data.text_embeddings, or --check")
    with rank() as (device, world):
        prepare(config, arguments, device, world)
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = config_parser(__doc__)
    parser.add_argument("--videos", help="folder of videos")
    parser.add_argument("--captions", help=".csv or .jsonl; without it, a .txt beside each video")
    parser.add_argument("--prompts", help="file of prompts to embed, in place of the prompts of `data`")
    parser.add_argument("--text_batch", type=int, default=8, help="prompts embedded at once, padded to the longest")
    parser.add_argument("--check", action="store_true", help="read and report what is there; write nothing")
    return run_configured(parser, argv, run)


if __name__ == "__main__":
    sys.exit(main())
