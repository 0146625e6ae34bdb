"""Videos that two ranks make together, beside what one makes alone, for tests/test_sequence.py."""

import json
from collections import defaultdict
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from diffusers import ContextParallelConfig, FirstBlockCacheConfig, PyramidAttentionBroadcastConfig
from torch.distributed.device_mesh import init_device_mesh

import inference_packforcing
from model.cache.cache import PackCache
from model.causal_wan import CausalWanModel
from model.sequence import PeerError
from pipeline.generate.inputs import Prompts, prompt_noise
from pipeline.generate.pipeline import PackForcingPipeline
from pipeline.generate.rollout import Rollout
from tests import tiny
from utils.config import CacheConfig, ConfigError, SamplerConfig
from utils.distributed import join_world, leave_world
from utils.load_config import section
from utils.video import VideoWriter

CHUNKS = 7
SIZE = tiny.HEIGHT // 8, tiny.WIDTH // 8
PACK = {"sink": 1, "recent": 1, "top_k": 2, "compressor": {"channels": [4, 8]}}
DEEP = {"kind": "deep_forcing", "unit": "frames", "sink": 2, "recent": 2, "window": 8, "budget": 6}


def caches() -> dict[str, dict]:
    """Settings of `cache` by the case's name."""
    kinds = {"identity": {}, "hr_spatial": {}, "hr_spatiotemporal": {}, "pooled": {}, "lr_spatial": {}, "dual": {}}
    compressed = {f"{kind}_project": {**PACK, "compressor": {"kind": kind, "channels": [4, 8]}} for kind in kinds}
    forward = {
        f"{kind}_forward": {**PACK, "compressor": {"kind": kind, "channels": [4, 8], "kv": "forward"}}
        for kind in ("hr_spatial", "pooled")
    }
    return {
        "full": {"kind": "full"},
        **compressed,
        **forward,
        "recent_queries": {**PACK, "query_scope": "recent+current"},
        "per_forward": {**PACK, "refresh": "per_forward"},
        "random": {**PACK, "selection": "random", "temporal": "absolute"},
        "int8": {**PACK, "mid_dtype": "int8", "sink_dtype": "bfloat16"},
        "deep_forcing": DEEP,
    }


def model(parallel: bool, **settings) -> CausalWanModel:
    """Random weights, the same on every rank."""
    torch.manual_seed(3)
    made = tiny.transformer(**{"num_attention_heads": 4, **settings}).eval()
    if parallel:
        made.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    return made


def rollout(made: CausalWanModel, cache: dict, guidance: float = 1.0, **sampler) -> Rollout:
    embeds = torch.randn(2, tiny.TEXT_LEN - 3, 16, generator=torch.Generator().manual_seed(4))
    held = PackCache.for_model(made, section(CacheConfig, "cache", cache), *SIZE, 40)
    steps = SamplerConfig(steps=[1000.0, 500.0], shift=3.0, guidance=guidance, **sampler)
    noise, prompts = prompt_noise(5, ["a", "b"], [0, 0]), Prompts(embeds, embeds[:1] + 1)
    return Rollout(made, held, steps, prompts, noise, decoder=True if held.needs_pixels else None)


def video(run: Rollout, chunks: int = CHUNKS, parts: dict[int, Prompts] | None = None) -> torch.Tensor:
    """Latents [B, C, F, H, W]; those of averaged pixels, where the compressor wants them, are the chunk's own."""
    if run.cache.needs_pixels:
        run._decode = lambda latents, context: latents[..., : run.cache.mid_grid[1] * 2, : run.cache.mid_grid[2] * 2]
    return torch.cat([latents for _, latents in run.run(chunks, parts=parts)], dim=2)


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one - other).abs().max().item()


def forwards() -> dict[str, float]:
    """The facts of diffusers' own tests of context parallelism: a forward, a batch, a mesh of one's own, gradients."""
    found, shape = {}, (4, 6, *SIZE)  # three chunks
    alone, together, wide = model(False), model(True), model(False, frames_per_chunk=3)
    wide_together = model(True, frames_per_chunk=3)
    draw = torch.Generator().manual_seed(6)
    for name, batch, pair, frames, options in (
        ("clip", 1, (alone, together), 1, {}),
        ("batch", 2, (alone, together), 1, {}),
        ("frame_times", 2, (wide, wide_together), 6, {}),
        ("teacher_forcing", 1, (wide, wide_together), 6, {"clean": True}),
        ("texts", 1, (wide, wide_together), 6, {"texts": 2}),
    ):
        latents, clean = (torch.randn(batch, *shape, generator=draw) for _ in range(2))
        text = torch.randn(batch, *([options["texts"]] if "texts" in options else []), 5, 16, generator=draw)
        timestep = torch.rand(batch, frames, generator=draw) * 1000
        given = {"clean_hidden_states": clean} if "clean" in options else {}
        with torch.no_grad():
            results = [one(latents, timestep, text, return_dict=False, **given)[0] for one in pair]
        found[name] = difference(*results)
    mesh = init_device_mesh("cpu", (1, 2, 1), mesh_dim_names=("ring", "ulysses", "fsdp"))
    own = model(False)
    own.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2, ulysses_anything=True, mesh=mesh))
    latents, text = torch.randn(1, *shape, generator=draw), torch.randn(1, 5, 16, generator=draw)
    for one in (alone, own):
        one(latents, torch.tensor([300.0]), text).sample.square().sum().backward()
    found["mesh"] = difference(*(one(latents, torch.tensor([300.0]), text).sample.detach() for one in (alone, own)))
    gradients = []
    for (name, one), other in zip(alone.named_parameters(), own.parameters(), strict=True):
        if one.grad is None or "proj_out" in name or "pack_compressor" in name:
            continue
        torch.distributed.all_reduce(other.grad)  # each rank's is of its own tokens
        gradients.append(difference(one.grad, other.grad) / one.grad.abs().max().item())
    found["gradients"] = max(gradients)
    return found


def refusals() -> dict[str, str]:
    """What is said of what cannot be, by every rank and without a message between them."""
    found = {}

    def says(name, function):
        try:
            function()
            found[name] = "nothing"
        except (ConfigError, RuntimeError, PeerError) as error:
            found[name] = f"{type(error).__name__}: {error}"

    says("heads", lambda: model(True, num_attention_heads=3))
    says("ring", lambda: model(False).enable_parallelism(config=ContextParallelConfig(ring_degree=2)))
    says("degree", lambda: model(False, num_attention_heads=6).enable_parallelism(
        config=ContextParallelConfig(ulysses_degree=3)))  # fmt: skip
    together, odd = model(True), model(True, frames_per_chunk=1)
    says("again", lambda: together.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2)))
    says("tokens", lambda: odd(torch.zeros(1, 4, 1, 6, 6), torch.zeros(1), torch.zeros(1, 5, 16)))
    says("first_block", lambda: together.enable_cache(FirstBlockCacheConfig()))
    run = rollout(model(False), PACK)
    run.model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    says("cache", lambda: video(run, 1))
    return found


def compare(bundle: Path, folder: Path) -> None:
    """Every case, by both ranks: largest differences and messages into `folder/rankN.json`."""
    torch.set_num_threads(1)
    world = join_world(torch.device("cpu"))
    found: dict = {"forward": forwards(), "says": refusals(), "pipeline": pipelines(bundle)}
    videos, heads, chosen = {}, {}, {}
    for name, settings in caches().items():
        layers = {"num_layers": 1} if name == "pooled_project" else {}  # whose only layer is the last one
        if settings.get("compressor"):
            layers |= {"compressor": settings["compressor"].get("kind", "hr_spatial")}
        both = [rollout(model(parallel, **layers), settings) for parallel in (False, True)]
        with torch.no_grad():
            videos[name] = difference(*(video(run) for run in both))
        one, other = (run.cache for run in both)
        heads[name] = [(cache.layers[0].keys.shape[2]) for cache in (one, other)]
        picked = [{layer: ids.tolist() for layer, ids in cache._last_selection[1].items()} for cache in (one, other)]
        chosen[name] = picked[0] == picked[1]
    for name, options in {
        "guidance": {"guidance": 3.0}, "last_step": {"commit": "last_step"}, "noisy_commit": {"context_timestep": 100.0}
    }.items():  # fmt: skip
        videos[name] = difference(*(video(rollout(model(parallel), PACK, **options)) for parallel in (False, True)))
    other_text = Prompts(torch.ones(2, 4, 16))
    for at_switch in ("keep", "recommit", "restart"):
        cache = {**PACK, "at_switch": at_switch}
        both = (video(rollout(model(parallel), cache), parts={4: other_text}) for parallel in (False, True))
        videos[f"switch_{at_switch}"] = difference(*both)
    made = []
    for parallel in (False, True):
        run = rollout(model(parallel), PACK)
        config = PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(100, 1000),
            current_timestep_callback=lambda run=run: run.timestep,
        )  # fmt: skip
        run.model.enable_cache(config)
        made.append(video(run))
    videos["broadcast"] = difference(*made)
    found |= {"videos": videos, "heads": heads, "chosen": chosen}
    (folder / f"rank{world.rank}.json").write_text(json.dumps(found), encoding="utf-8")
    leave_world(world)


def pipelines(bundle: Path) -> dict[str, str]:
    """What the ranks say of a call that is not the same on both, of a rank that stops, and of one that fails alone."""
    pipe, rank, found = PackForcingPipeline.from_pretrained(bundle), torch.distributed.get_rank(), {}
    pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    asked = {"num_frames": 29, "cache": PACK, "output_type": "latent"}

    def says(name, prompt="a", stop_after=None, **options):
        try:
            with closing(pipe.stream(prompt, **{**asked, **options})) as chunks:
                made = [chunk.index for chunk, _ in zip(chunks, range(stop_after or 99), strict=False)]
            found[name] = f"{len(made)} chunks"
        except (ConfigError, PeerError) as error:
            found[name] = f"{type(error).__name__}: {error}"

    says("seed", seed=rank)
    says("size", prompt=None if rank else "a")  # that rank has an error of its own
    says("stop", stop_after=2 - rank, output_type="latent" if rank else "uint8")  # in another thread on the first one
    says("after", output_type="latent" if rank else "np")
    return found


def compiled(folder: Path) -> None:
    """Largest difference that compiled blocks of two ranks make, and their graph breaks."""
    world = join_world(torch.device("cpu"))
    with torch.no_grad():
        alone, together = (rollout(model(parallel, num_layers=1), PACK) for parallel in (False, True))
        together.model.compile_repeated_blocks(dynamic=True)
        torch._dynamo.config.recompile_limit = 32
        found = {"difference": difference(*(video(run, 4) for run in (alone, together)))}
    found["breaks"] = len(torch._dynamo.utils.counters["graph_break"])
    (folder / f"rank{world.rank}.json").write_text(json.dumps(found), encoding="utf-8")
    leave_world(world)


def run(argv: list[str], frames: Path, breaks: int | None = None) -> int:
    """The command line; the frames that it wrote of each video go to `frames`/NAME.npy. `breaks`: the disk is full at
    that call for frames to be written."""
    append, calls, kept = VideoWriter.append, [], defaultdict(list)

    def recording(writer, new):
        calls.append(1)
        if len(calls) == breaks:
            raise OSError("no space left on device")
        kept[writer.path.stem].append(new)
        append(writer, new)

    VideoWriter.append = recording
    code = inference_packforcing.main(argv)
    for name, pieces in kept.items():
        np.save(frames / f"{name}.npy", np.concatenate(pieces))
    return code
