"""All videos of a command line, shared over ranks: checks first, then models, then one video after the other."""

import logging
import math
import warnings
from contextlib import nullcontext
from datetime import timedelta

import diffusers
import transformers
from tqdm.contrib.logging import logging_redirect_tqdm

from pipeline.bundle import check_bundle, vae_shape_of
from pipeline.data.prompt_files import PromptItem
from pipeline.data.schedule import timeline
from pipeline.fit import check_memory
from pipeline.generate.inference import VideoMaker, check_cache, load_pipeline, resolve_runtime, weight_hashes
from pipeline.generate.jobs import is_finished, plan
from pipeline.generate.sampler import SAMPLERS
from pipeline.sources import bundle_part
from pipeline.vae_shape import VAEShape
from utils.config import Config, ConfigError, require
from utils.distributed import barrier, described_world, from_all, join_world, leave_world
from utils.files import writable_folder
from utils.lock import locked

log = logging.getLogger("inference")

LONGEST = timedelta(days=30)  # that a rank may wait for the videos of another
SOME_FAILED = 1


def latent_frames(seconds: float, config: Config, vae: VAEShape) -> int:
    """Latent frames of at least `seconds` of video, in whole chunks. Raises `ConfigError`."""
    if not 0 < seconds < math.inf:
        raise ConfigError(f"--seconds is {seconds}: must be a positive number")
    chunk, fps = config.video.frames_per_chunk, config.video.fps
    frames = chunk * math.ceil(vae.latent_frames(math.ceil(seconds * fps)) / chunk)
    log.info(
        "--seconds %g: %d chunks, --num_output_frames %d, %d frames at %d fps, %.2f s",
        seconds, frames // chunk, frames, vae.frames(frames), fps, vae.frames(frames) / fps,
    )  # fmt: skip
    return frames


def run_jobs(config: Config, items: list[PromptItem], seconds: float | None, estimate: bool = True) -> int:
    """Make what is missing; returns the exit status. Raises `ConfigError` for what is found wrong before that.
    `estimate`: ask first whether it fits the GPU."""
    _quiet_libraries()
    SAMPLERS[config.sampler.kind]  # an unknown one shows here
    check_bundle(config)
    vae = vae_shape_of(bundle_part(config, "vae"))
    if seconds is not None:
        config.inference.num_output_frames = latent_frames(seconds, config, vae)
    runtime = resolve_runtime(config)
    span, trained = check_cache(config, vae).packed_span, config.video.trained_frames
    folder = writable_folder(config.inference.output_folder, "output folder")

    size, ranks = described_world().size, config.parallel.sequence
    require(config, "parallel.sequence", size % ranks == 0, f"the ranks, {size} here, must be a multiple of it; start "
            f"with torchrun --nproc_per_node={ranks}")  # fmt: skip
    world = join_world(runtime.device, timeout=LONGEST)
    if world.is_main and span is not None and span > trained:
        log.warning("a chunk and its history take %g latent frames at packed positions, the model was trained on %d: "
                    "videos may jump, then stand still (docs/experiments.md, static drift); use cache.temporal=fit, or "
                    "less of cache.sink, cache.recent and cache.top_k", span, trained)  # fmt: skip
    try:
        if estimate:
            check_memory(config, "infer", world, runtime.device)
        with locked(folder, "output folder") if world.is_main else nullcontext():
            barrier(world)  # the others write only once the folder is the first rank's
            weights = weight_hashes(config)
            jobs = plan(items, folder, config, lambda length: latent_frames(length, config, vae))
            for job in jobs[:: config.inference.num_samples]:
                timeline(job.prompt, vae, config.video.frames_per_chunk, config.video.fps, f"prompt {job.index}")
            waiting = [job for job in jobs if not is_finished(job, weights)]
            barrier(world)  # every rank has the same list before a video is added
            if len(waiting) < len(jobs):
                log.info("%d of %d videos are finished already in %s", len(jobs) - len(waiting), len(jobs), folder)
            mine, failed = waiting[world.rank // ranks :: world.size // ranks], {}
            if mine or (waiting and ranks > 1):  # groups of ranks are made by all of them, those without a video too
                pipe = load_pipeline(config, runtime)
                log.info("encoding the prompts of %d videos", len(mine))
                maker = VideoMaker(pipe, mine, weights, runtime)
                with logging_redirect_tqdm():  # messages above the bar, not in it
                    failed = maker.make_all(mine, show_progress=world.is_main)
            found = reversed(from_all(failed, world))  # the rank that writes a video comes last, and counts
            failures = {name: why for part in found for name, why in part.items()}
    finally:
        leave_world(world)
    if failures and world.is_main:
        listed = "; ".join(f"{name}: {reason}" for name, reason in failures.items())
        log.error("error: %d of %d videos failed: %s; run again to make them", len(failures), len(jobs), listed)
    return SOME_FAILED if failures else 0


def _quiet_libraries() -> None:
    logging.captureWarnings(True)
    warnings.formatwarning = lambda message, *_: str(message)
    warnings.filterwarnings("ignore", "`torch.distributed._functional_collectives", FutureWarning)  # diffusers' calls
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
