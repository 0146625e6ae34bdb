"""Fixed-prompt samples during training: mp4 with a sidecar that `scripts/evaluate.py` reads, and a contact sheet."""

from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
from diffusers import AutoencoderKLWan

from pipeline.generate.vae_stream import StreamingDecoder
from utils.files import write_json
from utils.sprites.read import accuracy, read_seconds, score
from utils.sprites.world import parse_caption
from utils.video import to_uint8, write_video

SHEET_COLUMNS = 8  # frames of each video on the contact sheet


def write_samples(
    folder: Path, prompts: list[str], latents: torch.Tensor, vae: AutoencoderKLWan, fps: int
) -> dict[str, float]:
    """Decode and write one video per prompt, from normalised latents [P, C, F, H, W]. Where every prompt is a caption
    of the sprite world: returns the share of attributes read right in these videos, said ones only."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        facts = [parse_caption(prompt) for prompt in prompts]
    except ValueError:  # prompts of another world: nothing that could be read
        facts = None
    marks, rows = [], []
    for i, (prompt, clip) in enumerate(zip(prompts, latents, strict=True)):
        pieces = StreamingDecoder(vae).by_frame(clip[None])
        frames = np.concatenate([to_uint8(piece[0]) for piece in pieces])  # [F, H, W, 3]
        path = folder / f"{i:03d}.mp4"
        write_video(path, frames, fps)
        write_json(path.with_suffix(".json"), {"prompt": prompt, "fps": fps})
        rows.append(np.concatenate([frames[k] for k in np.linspace(0, len(frames) - 1, SHEET_COLUMNS).astype(int)], 1))
        if facts is not None:
            still = len(frames) < fps
            readings = read_seconds(np.repeat(frames[:1], fps, 0) if still else frames, fps)
            marks += score(readings, facts[i])
    iio.imwrite(folder / "sheet.png", np.concatenate(rows))
    return accuracy(marks, said=True) if marks else {}
