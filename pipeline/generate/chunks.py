"""Chunks of a video as they are handed out: decoded, checked, in the form that was asked for."""

from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from diffusers.video_processor import VideoProcessor

from pipeline.generate.rollout import Rollout
from pipeline.generate.vae_stream import StreamingDecoder
from utils.ahead import used_beside
from utils.timing import part
from utils.video import to_uint8

OUTPUT_TYPES = ("pil", "np", "pt", "uint8", "latent")


class NotFiniteError(RuntimeError):
    """A chunk of NaN or infinite numbers."""

    exit_status = 1


@dataclass(frozen=True)
class Chunk:
    """What `PackForcingPipeline.stream` yields. Its frames are as `output_type` says: [B, F, H, W, 3] in 0..1 ("np"),
    [B, F, 3, H, W] in 0..1 ("pt"), uint8 [B, F, H, W, 3] ("uint8"), B lists of images ("pil"), or its latents."""

    index: int
    frames: Any
    latents: torch.Tensor  # [B, C, F, H, W], normalised, float32
    report: dict[str, dict[str, int]]  # tokens and bytes of each part of the cache that it attended


def decoded(
    rollout: Rollout, made: Generator[tuple[int, torch.Tensor]], decoder: StreamingDecoder | None, output_type: str,
    wanted: int | None, overlap: bool,
) -> Iterator[Chunk]:  # fmt: skip
    """What the rollout has made, cut after `wanted` pixel frames. Raises `NotFiniteError`. `overlap`: the next chunk is
    made meanwhile."""
    processor, done = VideoProcessor(), 0

    @torch.no_grad()
    def chunks() -> Iterator[Chunk]:
        with closing(made):
            for index, latents in made:
                yield Chunk(index, rollout.pixels, latents, rollout.cache.report())

    def frames(chunk: Chunk) -> Any:
        nonlocal done
        index, latents, pixels = chunk.index, chunk.latents, chunk.frames  # pixels where the cache wanted them
        _require_finite(index, latents, "latents", rollout)
        if output_type == "latent":
            return latents
        if pixels is None:
            with part("decode"):
                pixels = decoder.decode(latents)  # [B, 3, F, H, W]
        _require_finite(index, pixels, "pixels", rollout)
        pixels = pixels if wanted is None else pixels[:, :, : wanted - done]
        done += pixels.shape[2]
        if output_type == "uint8":  # as files hold it, rounded once
            return np.stack([to_uint8(clip) for clip in pixels])
        return processor.postprocess_video(pixels, output_type)

    for chunk, shown in used_beside(chunks(), frames, overlap):
        yield replace(chunk, frames=shown)


def joined(chunks: Iterable[Chunk], output_type: str) -> Any:
    """Frames of whole videos, in the form of `Chunk.frames`."""
    pieces = [chunk.frames for chunk in chunks]
    if output_type == "pil":
        return [sum(parts, []) for parts in zip(*pieces, strict=True)]
    if output_type == "latent":
        return torch.cat(pieces, dim=2)
    return torch.cat(pieces, 1) if output_type == "pt" else np.concatenate(pieces, 1)


def _require_finite(index: int, tensor: torch.Tensor, what: str, rollout: Rollout) -> None:
    if tensor.isfinite().all():
        return
    if what == "pixels":
        part = "the VAE or its dtype: the latents are finite"
    elif not rollout.embeds.isfinite().all():
        part = "the text encoder or its dtype: the prompt's embeddings are not finite"
    elif not all(weight.isfinite().all() for weight in rollout.model.parameters() if not weight.is_meta):
        part = "the transformer's weights, which are not all finite"
    else:
        part = f"sampler.guidance={rollout.sampler.guidance}, the dtype or an untrained checkpoint"
    raise NotFiniteError(f"chunk {index}: its {what} are NaN or infinite; the likely part is {part}")
