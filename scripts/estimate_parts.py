"""What `scripts/estimate.py` runs: the project's own stages, trainer, rollout and text encoder on a fake GPU."""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from unittest import mock

import torch
from diffusers import AutoencoderKLWan, ContextParallelConfig, WanTransformer3DModel
from transformers import UMT5Config, UMT5EncoderModel

from model.cache.cache import PackCache
from model.cache.context import ChunkContext
from model.cache.state import UNBOUNDED, CacheLayout
from model.causal_wan import CausalWanModel
from model.geometry import ChunkGeometry
from pipeline.bundle import read_json, transformer_settings, vae_shape_of
from pipeline.data.prompts import sample_prompts
from pipeline.generate.inputs import Prompts
from pipeline.generate.rollout import Rollout
from pipeline.generate.vae_stream import StreamingDecoder
from pipeline.load import load_transformer, place
from pipeline.text import encode_tokens
from pipeline.train.generator import GeneratorStage
from pipeline.train.parallel import shard_model, sharding_mesh
from pipeline.train.stages import METHODS, build_stage
from pipeline.train.trainer import Trainer
from scripts.fake_models import Residents
from scripts.stand_ins import at_depth
from utils.choices import CacheKind, Sharding, TextPlacement
from utils.config import Config, ConfigError
from utils.distributed import World
from utils.fakecuda.count import Counts, OnDevice
from utils.rng import keyed_randn
from utils.timing import part
from utils.tracking import Tracker

DEVICE = torch.device("cuda", 0)
PARTS = {"weights", "state", "text", "denoise", "commit", "cache", "real_score", "fake_score", "backward", "optimizer",
         "vae"}  # fmt: skip
UMT5_XXL = {"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
            "feed_forward_proj": "gated-gelu", "dropout_rate": 0.0}  # fmt: skip
PROCESS = 1.5  # GiB of a process that has loaded nothing but torch, its libraries and a CUDA context
STEADY = 2  # chunks of inference counted once the cache is full


@dataclass
class Phase:
    """What was counted in a stretch of the run, on one rank."""

    name: str
    highest: dict[str, dict[str, float]]  # label -> bytes by label of allocation, at the highest point under it
    flops: dict[str, dict[str, float]]  # kind -> label -> FLOPs
    moved: dict[str, float]  # label -> bytes of what is neither matmul nor attention
    by_operation: dict[str, float]
    comm: dict[str, list[float]]  # kind -> [calls, bytes]
    syncs: dict[str, float]

    @classmethod
    def of(cls, name: str, counts: Counts) -> "Phase":
        highest = {label: held for label, (_, held) in counts.highest.items()}
        flops = {kind: dict(found) for kind, found in counts.flops.items()}
        others = (dict(found) for found in (counts.moved, counts.by_operation, counts.comm, counts.syncs))
        made = cls(name, highest, flops, *others)
        counts.new_phase()
        return made

    @property
    def peak(self) -> dict[str, float]:
        """Bytes by label of allocation at the highest point."""
        return max(self.highest.values(), key=lambda held: sum(held.values()))

    @classmethod
    def between(cls, one: "Phase", two: "Phase", factor: float) -> "Phase":
        """one + factor x (two - one), number by number: what depth `1 + factor` has, of depths one and two."""

        def line(a, b):
            if isinstance(a or b, dict):
                return {key: line((a or {}).get(key), (b or {}).get(key)) for key in {**(a or {}), **(b or {})}}
            if isinstance(a or b, list):
                return [line(x, y) for x, y in zip(a or [0, 0], b or [0, 0], strict=True)]
            return (a or 0) + factor * ((b or 0) - (a or 0))

        numbers = {key: line(value, asdict(two)[key]) for key, value in asdict(one).items() if key != "name"}
        return cls(one.name, **numbers)


def in_training(config: Config, counts: Counts, world: World, folder: Path) -> Trainer:
    """The stage placed and sharded, in mid-run: moments and EMA are there."""
    with part("weights"):
        stage = build_stage(config, DEVICE, world)
        if isinstance(stage, GeneratorStage):
            stage.vae = lambda: AutoencoderKLWan.from_config(stage.vae_folder).eval().to(DEVICE)
        nowhere = Tracker(folder, None, "", {}, False)
        trainer = Trainer(config, stage, world, folder / "run", nowhere, DEVICE, save=False, visualize=False)
    with part("state"):
        for state in trainer.states.values():
            state.allocate(True, state.ema_start is not None)
    counts.new_phase()
    return trainer


def ran_steps(config: Config) -> int:
    """Denoising steps of a chunk that are run in the estimate of training: one with gradient, and one without."""
    return min(2, len(config.sampler.steps))


def ran_micros(config: Config) -> int:
    """Micro-batches of an update that are run there: the second one meets gradients."""
    return min(2, config.train.gradient_accumulation)


def train(config: Config, mode: OnDevice, world: World, folder: Path) -> Iterator[Phase]:
    """One update of every role, its rollouts as long as they get, two of the denoising steps in each chunk."""
    config = replace(config, train=replace(config.train, gradient_accumulation=ran_micros(config)))
    trainer = in_training(config, mode.counts, world, folder)
    stage = trainer.stage
    if config.train.stage == "dmd":
        stage.exit_step = lambda role, step: ran_steps(config) - 1
        stage.num_chunks = lambda role, step: stage.max_chunks
        mode.counts.watch_module(stage.teacher, "real_score")
        mode.counts.watch_module(stage.critic, "fake_score")
    for role in stage.modules:
        with part(role):
            trainer.update_role(role)
        yield Phase.of(role, mode.counts)


def full_cache(layout: CacheLayout, longest: int) -> int:
    """The chunk that is counted of a video of `longest` chunks: one that meets a full cache, or the last."""
    return min(layout.sink + layout.recent + layout.top_k + STEADY, longest) - 1


def sample(config: Config, mode: OnDevice, world: World, folder: Path) -> Iterator[Phase]:
    """The sample videos of training, by the EMA's weights: a chunk of all of them once the cache is full, and a latent
    frame's pixels of one."""
    if not (issubclass(METHODS[config.train.stage], GeneratorStage) and sample_prompts(config)):
        raise ConfigError("part sample: counts videos of train.sample_prompts by a generator; this config makes none")
    trainer = in_training(config, mode.counts, world, folder)
    stage, lengths, phases = trainer.stage, trainer.stage.config.train, []
    frames = config.video.frames_per_chunk
    longest = math.ceil(max(lengths.sample_frames, lengths.sample_long_frames) / frames)
    counted = full_cache(CacheLayout.of(config.cache, ChunkGeometry(frames, *stage.latent_shape[1:])), longest)
    lengths.sample_frames, lengths.sample_long_frames = (counted + 1) * frames, 0

    def denoise(rollout: Rollout, chunk: int, context: ChunkContext) -> torch.Tensor:
        if chunk == counted:
            return denoised(rollout, chunk, context)
        mode.counts.new_phase()  # the commit that comes next is counted, as the last chunk has none
        return rollout._draw(chunk, 0)

    def write(folder, prompts, latents, vae, fps):
        phases.append(Phase.of("chunk", mode.counts))
        with part("vae"):
            for _ in StreamingDecoder(vae).by_frame(latents[:1, :, :2]):  # the first frame of a video is another case
                phases[1:] = [Phase.of("latent frame decoded", mode.counts)]
        return {}

    denoised = Rollout._sample
    with (
        mock.patch("pipeline.train.generator.write_samples", write),
        mock.patch.object(Rollout, "_sample", denoise),
    ):
        stage.sample(0, folder / "samples", trainer.ema())
    yield from phases


def text(config: Config, mode: OnDevice, world: World, folder: Path) -> Iterator[Phase]:
    """UMT5-XXL in shards (`train.text_placement=sharded`), or whole on one rank, and one prompt."""
    with part("weights"):
        encoder = UMT5EncoderModel(UMT5Config(**UMT5_XXL)).to(torch.bfloat16).eval().requires_grad_(False)
        if (mesh := sharding_mesh(config, world, DEVICE)) is not None:
            shard_model(encoder, mesh, config.train.mixed_precision, DEVICE)
    ids = torch.zeros(1, config.model.text_len, dtype=torch.long, device=DEVICE)
    mode.counts.new_phase()
    with torch.no_grad(), part("text"):
        encode_tokens(encoder, ids, torch.ones_like(ids))
    yield Phase.of("one prompt encoded", mode.counts)


def infer(config: Config, mode: OnDevice, world: World, folder: Path) -> Iterator[Phase]:
    """Prompts, then chunks up to a full cache, then a chunk's pixels."""
    with part("weights"):
        model = place(load_transformer(config), DEVICE, torch.bfloat16)
        if config.parallel.sequence > 1:
            model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=config.parallel.sequence))
        with mode.building():
            vae = AutoencoderKLWan.from_config(folder / "vae").to(torch.bfloat16).eval()
    residents = Residents(mode.counts, config.inference.offload)
    residents.add("transformer", model)
    residents.add("vae", vae, vae.decoder)
    if config.inference.vae_tiling:
        vae.enable_tiling()
    if config.model.text_dim == UMT5_XXL["d_model"]:
        with part("text"), torch.no_grad():
            encoder = UMT5EncoderModel(UMT5Config(**UMT5_XXL)).to(torch.bfloat16).eval()
            ids = torch.zeros(1, config.model.text_len, dtype=torch.long, device=DEVICE)
            residents.add("text", encoder)
            residents.run("text")
            mode.counts.new_phase()
            encode_tokens(encoder, ids, torch.ones_like(ids))
        yield Phase.of("prompt", mode.counts)
        residents.forget("text")
        del encoder
    video = config.video
    size = vae_shape_of(folder / "vae").size(video)
    cache = PackCache.for_model(model, config.cache, *size, video.trained_frames)
    embeds = torch.zeros(1, model.config.text_len, model.config.text_dim, device=DEVICE, dtype=torch.bfloat16)
    prompts = Prompts(embeds, embeds if config.sampler.guidance != 1 else None)
    rollout = Rollout(model, cache, config.sampler, prompts, lambda *key: keyed_randn(key[-1], *key[:2])[None])
    longest = UNBOUNDED
    if config.cache.kind == CacheKind.full:
        longest = config.inference.num_output_frames // video.frames_per_chunk
    with torch.no_grad():
        latents = torch.zeros(1, model.config.in_channels, video.frames_per_chunk, *size, device=DEVICE)
        for _ in range(full_cache(cache.layout, longest)):
            rollout.commit(latents)
        residents.run("transformer", "vae")  # which came after the chunk before
        mode.counts.new_phase()
        ((_, latents),) = rollout.run(1)
        yield Phase.of("chunk", mode.counts)
        residents.run("vae")
        with part("vae"):
            decoder = StreamingDecoder(vae)
            for _ in range(2):  # the first latent frame of a video is another case
                mode.counts.new_phase()
                decoder.decode(latents)
        yield Phase.of("decode", mode.counts)


RUNS: dict[str, Callable[..., Iterator[Phase]]] = {"train": train, "sample": sample, "text": text, "infer": infer}


def host(config: Config, world: World, folder: Path) -> dict[str, float]:
    """GiB of a machine's own memory while models are loaded, by part. Beside it are the files, mapped and shared by its
    processes: sharded weights go from them to the device group by group; else every rank casts them first."""
    ready, own = at_depth(config, folder, None), {"processes": PROCESS * world.local_size}
    dmd, offloads = config.train.stage == "dmd", config.dmd.offload_teacher and config.train.stage == "dmd"
    with torch.device("meta"):
        models = {"student": (CausalWanModel(**transformer_settings(ready)), 4)}
        for role, width in (("critic", 4), ("teacher", 2)) if dmd else ():
            settings = read_json(folder / role / "config.json")
            models[role] = (WanTransformer3DModel.from_config(settings), width)
        text = UMT5EncoderModel(UMT5Config(**UMT5_XXL))
    for name, (model, width) in models.items():
        held = config.train.sharding == Sharding.none or (offloads and name == "teacher")
        own[name] = held * world.local_size * width * sum(p.numel() for p in model.parameters()) / 2**30
    placed = config.train.text_placement == TextPlacement.device and config.data.text_embeddings is None
    own["text encoder"] = placed * world.local_size * 4 * sum(p.numel() for p in text.parameters()) / 2**30
    return own
