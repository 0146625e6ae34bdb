"""Hold the model against recorded reference values.

    python -m scripts.check_golden tests/data/golden
    python -m scripts.check_golden DIR --tolerance 1e-4

DIR holds `meta.json`, `wan_weights.safetensors` (Wan2.1 names), `hr_compressor_weights.safetensors` and
`io.safetensors`, and optionally `dmd.safetensors`; other dims and seeds work too. A case is one recorded output tensor;
absent files and cases are skipped. Errors are max abs; a gradient must also lie within 1e-3 of its recorded maximum.
The last line is JSON: {"cases": n, "worst": e, "failed": [...]}. Exit status 1 on any failure, 2 on bad input.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file

from model.cache.cache import PackCache
from model.cache.context import ChunkContext
from model.causal_wan import CausalWanModel
from model.convert import diffusers_to_wan, wan_to_diffusers
from model.schedule import FlowMatchSchedule
from pipeline.train.losses import dmd_loss, flow_loss, guided, kl_gradient
from utils.choices import CacheKind, Refresh, SizeUnit
from utils.cli import run_command
from utils.config import CacheConfig, CompressorConfig, ConfigError

GRADIENT_TOLERANCE = 1e-3  # relative to the recorded tensor's maximum
DMD_SHIFT, DMD_STEPS, DMD_GUIDANCE = 5.0, [1000, 750, 500, 250], 3.0


def to_model(frames_first: torch.Tensor) -> torch.Tensor:
    """[B, F, C, H, W] as recorded -> [B, C, F, H, W]."""
    return frames_first.transpose(1, 2).contiguous()


class Golden:
    """One folder of recorded values, and the models rebuilt from it."""

    def __init__(self, folder: Path):
        self.meta = json.loads((folder / "meta.json").read_text())
        files = ("wan_weights", "hr_compressor_weights", "io", "dmd")
        paths = (folder / f"{name}.safetensors" for name in files)
        self.weights, self.compressor, self.io, self.dmd = (load_file(p) if p.is_file() else {} for p in paths)
        self.step, self.clean_step = (
            torch.tensor([self.meta[f"{name}_timestep"]], dtype=torch.float32) for name in ("denoise", "context")
        )

    def _build(self, kind: type[WanTransformer3DModel], weights: dict[str, torch.Tensor], **extra):
        dims = self.meta["dims"]
        same = ("text_dim", "freq_dim", "ffn_dim", "num_layers", "cross_attn_norm", "eps")
        model = kind(
            patch_size=tuple(dims["patch_size"]),
            num_attention_heads=dims["num_heads"],
            attention_head_dim=dims["dim"] // dims["num_heads"],
            in_channels=dims["in_dim"],
            out_channels=dims["out_dim"],
            **{name: dims[name] for name in same},
            **extra,
        )
        model.load_state_dict({wan_to_diffusers(name): tensor for name, tensor in weights.items()})
        return model.eval()

    def bidirectional(self) -> WanTransformer3DModel:
        return self._build(WanTransformer3DModel, self.weights)

    def causal(self, compressor: str = "identity") -> CausalWanModel:
        meta, weights = self.meta, self.weights if compressor == "identity" else {**self.weights, **self.compressor}
        return self._build(
            CausalWanModel, weights, text_len=meta["dims"]["text_len"], frames_per_chunk=meta["frames_per_chunk"],
            compressor=compressor, compressor_channels=tuple(meta["hr_stage_channels"]),
        )  # fmt: skip

    def cache(self, model: CausalWanModel, **settings) -> PackCache:
        channels = list(self.meta["hr_stage_channels"])
        compressor = CompressorConfig(kind=settings.pop("compressor", "identity"), channels=channels)
        config = CacheConfig(compressor=compressor, **settings)
        height, width = self.meta["latent_hw"]
        return PackCache.for_model(model, config, height, width, trained_frames=self.io["clean_latents"].shape[1])

    def chunk(self, name: str, index: int) -> torch.Tensor:
        size = self.meta["frames_per_chunk"]
        return to_model(self.io[name][:, index * size : (index + 1) * size])


def whole_clip_cases(golden: Golden) -> Iterator[tuple[str, torch.Tensor]]:
    io = golden.io
    if "bidirectional.flow" in io:
        model, frames = golden.bidirectional(), int(io["bidirectional.frames"])
        text_len = golden.meta["dims"]["text_len"]
        prompt = torch.nn.functional.pad(io["prompt_embeds"], (0, 0, 0, text_len - io["prompt_embeds"].shape[1]))
        noisy = to_model(io["noisy_latents"][:, :frames])
        yield "bidirectional.flow", model(noisy, io["bidirectional.timestep"], prompt).sample.transpose(1, 2)
    for name in ("teacher_forcing.flow", "diffusion_forcing.flow"):
        if name not in io:
            continue
        frames, timestep = io[name].shape[1], io["teacher_forcing.timestep"]
        clean = to_model(io["clean_latents"][:, :frames]) if name.startswith("teacher") else None
        noisy = to_model(io["noisy_latents"][:, :frames])
        out = golden.causal()(noisy, timestep, io["prompt_embeds"], clean_hidden_states=clean)
        yield name, out.sample.transpose(1, 2)


def cached_rollout(golden: Golden, model: CausalWanModel, cache: PackCache) -> torch.Tensor:
    """Per chunk the flow of the noisy latents, then the commit of the clean ones: [B, F, C, H, W]."""
    flows = []
    for index in range(golden.meta["num_chunks"]):
        context = cache.context()
        flows.append(flow_of(golden, model, context, index))
        commit(golden, model, cache, context, index)
    return torch.cat(flows, dim=2).transpose(1, 2)


def flow_of(golden: Golden, model: CausalWanModel, context: ChunkContext, index: int, **options) -> torch.Tensor:
    inputs = golden.chunk("noisy_latents", index), golden.step, golden.io["prompt_embeds"]
    return model(*inputs, context=context, return_kv=False, **options).sample


def commit(golden: Golden, model: CausalWanModel, cache: PackCache, context: ChunkContext, index: int) -> None:
    inputs = golden.chunk("clean_latents", index), golden.clean_step, golden.io["prompt_embeds"]
    cache.commit(model(*inputs, context=context).kv, context)


def kv_cases(golden: Golden) -> Iterator[tuple[str, torch.Tensor]]:
    model = golden.causal()
    for name in ("kv_full", "kv_window"):
        if f"{name}.flow" not in golden.io:
            continue
        sink, window = int(golden.io[f"{name}.sink_frames"]), int(golden.io[f"{name}.window_frames"])
        settings = {"kind": CacheKind.full}
        if window >= 0:  # the reference's window counts sink, recent and the current chunk
            recent = window - sink - golden.meta["frames_per_chunk"]
            settings = {"kind": CacheKind.sink, "unit": SizeUnit.frames, "sink": sink, "recent": recent}
        cache = golden.cache(model, temporal="absolute", **settings)
        yield f"{name}.flow", cached_rollout(golden, model, cache)


def pack_settings(variant: dict) -> dict:
    return {
        "sink": variant["sink_chunks"],
        "recent": variant["recent_chunks"],
        "mid_capacity": variant["mid_capacity_chunks"],
        "top_k": variant["top_k"],
        "selection": variant["selection"],
        "compressor": variant["compressor"],
        "refresh": Refresh.per_forward,
        "temporal": "packed" if variant["rope_adjustment"] else "absolute",
    }


def pack_cases(golden: Golden) -> Iterator[tuple[str, torch.Tensor]]:
    for variant in golden.meta["variants"]:
        name = variant["name"]
        if f"{name}.flow" in golden.io:
            model = golden.causal(variant["compressor"])
            yield f"{name}.flow", cached_rollout(golden, model, golden.cache(model, **pack_settings(variant)))
        if f"{name}.train.flow" in golden.io:
            yield from train_cases(golden, variant)


def train_cases(golden: Golden, variant: dict) -> Iterator[tuple[str, torch.Tensor]]:
    """History committed from clean latents, then one forward with gradient: its flow and the recorded gradients."""
    name, io = variant["name"], golden.io
    model = golden.causal(variant["compressor"])
    cache, last = golden.cache(model, **pack_settings(variant)), int(io[f"{name}.train.chunk"])
    for index in range(last):
        commit(golden, model, cache, cache.context(), index)
    with torch.enable_grad():
        flow = flow_of(golden, model, cache.context(), last, train_compressor=True)
        flow.square().mean().backward()
    yield f"{name}.train.flow", flow.detach().transpose(1, 2)
    for parameter, tensor in model.named_parameters():
        case = f"{name}.train.grad.{diffusers_to_wan(parameter)}"
        if case in io:
            yield case, tensor.grad if tensor.grad is not None else torch.zeros_like(tensor)


def dmd_cases(golden: Golden) -> Iterator[tuple[str, torch.Tensor]]:
    data = golden.dmd
    if not data:
        return
    schedule = FlowMatchSchedule(DMD_SHIFT)
    yield "schedule.sigmas", schedule.sigmas
    yield "schedule.timesteps", schedule.timesteps
    yield "schedule.training_weights", schedule.training_weights
    yield "warped_steps", schedule.warp(DMD_STEPS)
    inputs = ("x0", "noise", "dmd.fake_x0", "dmd.real_x0_cond", "dmd.real_x0_uncond")
    x0, noise, fake, cond, uncond = (to_model(data[name]) for name in inputs)
    noisy = schedule.add_noise(x0, noise, data["timestep"])
    yield "noisy", noisy.transpose(1, 2)
    gradient = kl_gradient(x0, fake, guided(cond, uncond, DMD_GUIDANCE))
    yield "dmd.kl_grad", gradient.transpose(1, 2)
    with torch.enable_grad():
        leaf = x0.clone().requires_grad_()
        loss = dmd_loss(leaf, gradient)
        loss.backward()
    yield "dmd.loss", loss.detach()
    yield "dmd.loss_grad", leaf.grad.transpose(1, 2)
    flow = schedule.x0_to_flow(fake, noisy, data["timestep"])
    yield "critic.flow_loss", flow_loss(flow, noise, x0).mean()


def compare(name: str, value: torch.Tensor, recorded: torch.Tensor, tolerance: float) -> tuple[float, bool]:
    """(max abs error, whether it passes)."""
    if value.shape != recorded.shape:
        return float("inf"), False
    error = (value.double() - recorded.double()).abs().max().item()
    passed = error <= tolerance
    if ".grad." in name:
        passed = passed and error <= GRADIENT_TOLERANCE * recorded.abs().max().item()
    return error, passed


@torch.no_grad()
def check(folder: Path, tolerance: float) -> dict:
    """Run every case of `folder`, printing each; returns {"cases", "worst", "failed"}."""
    golden = Golden(folder)
    groups = [dmd_cases(golden)]
    if golden.io and golden.weights:
        groups = [whole_clip_cases(golden), kv_cases(golden), pack_cases(golden), *groups]
    cases, worst, failed = 0, 0.0, []
    for name, value in (case for group in groups for case in group):
        recorded = golden.io.get(name, golden.dmd.get(name))
        if recorded is None:
            continue
        error, passed = compare(name, value, recorded, tolerance)
        print(f"{'ok  ' if passed else 'FAIL'} {error:9.2e}  {name}", flush=True)
        cases, worst = cases + 1, max(worst, error)
        failed += [] if passed else [name]
    return {"cases": cases, "worst": worst, "failed": failed}


def run(folder: Path, tolerance: float) -> int:
    if not (folder / "meta.json").is_file():
        raise ConfigError(f"no meta.json in {folder}: give a folder of recorded values")
    result = check(folder, tolerance)
    if not result["cases"]:
        raise ConfigError(f"no recorded case found in {folder}")
    print(json.dumps(result))
    return 1 if result["failed"] else 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="largest allowed max abs error")
    arguments = parser.parse_args(argv)
    return run_command(lambda: run(arguments.folder, arguments.tolerance))


if __name__ == "__main__":
    sys.exit(main())
