"""Memory, FLOPs, traffic and time of a config on GPUs that need not be there: the project's own code at full size, on a
fake CUDA device with fake tensors and a fake process group.

    python -m scripts.estimate --config_path configs/packforcing_dmd_chunkwise_hr_8gpu_sink3_recent2.yaml
    python -m scripts.estimate --config_path C --world 64 --local 8      # eight machines
    python -m scripts.estimate --config_path C --part infer --device 4090 cache.top_k=4
    python -m scripts.estimate --all --markdown     # the table of docs/benchmarks.md, in half an hour

Parts: `train` (an update of every role), `infer` (prompt, a chunk once the cache
is full, its pixels), `sample` (the sample videos of training), `text` (UMT5-XXL), `load` (host memory of a machine
while models are loaded). Default: what the config is for, `train` where it names a stage.

Models deeper than nine layers are run at a tenth and at two tenths of their depth, and everything is extended along a
line; --exact runs all layers (minutes). No file that the config names is needed.

Memory is per rank, without CUDA context, NCCL buffers and fragmentation: --reserve GiB stand for these. Times are FLOPs
and bytes over the rates that a device sustains (--matmul, --attention: TFLOP/s; --bandwidth: TB/s; --link: GB/s), added
up; collectives overlap with them, but for those inside a forward (`parallel.sequence`). A table, then one line of JSON.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from utils.cli import run_command
from utils.config import Config, ConfigError
from utils.distributed import World
from utils.fakecuda.device import ensure
from utils.load_config import load_config

GIB, EXTENDED = 2**30, 10  # layers from which depth is extended
PCIE = 45.0  # GB/s that pinned host memory reaches a GPU with
FIXED = ("weights", "state")  # does not grow with the batch


@dataclass(frozen=True)
class Device:
    """Usable memory in GiB, and rates that good kernels sustain: about 0.65 of the dense bf16 peak in matmuls, 0.45 in
    attention (forward and backward), 0.8 of the memory's and of the link's bandwidth."""

    memory: float
    matmul: float  # TFLOP/s
    attention: float
    bandwidth: float  # TB/s
    link: float  # GB/s between the ranks of a machine


DEVICES = {
    "h100": Device(79.1, 640, 445, 2.7, 360),
    "h200": Device(139.8, 640, 445, 3.8, 360),
    "a100": Device(79.1, 200, 140, 1.6, 240),
    "4090": Device(23.5, 107, 74, 0.8, 20),
}


def measure(config: Config, part: str, world: World, exact: bool = False, most_layers: int | None = None) -> list:
    """`Phase`s of a part at full depth, or with at most `most_layers`."""
    from scripts import estimate_parts as parts
    from scripts.fake_models import forget_kept, on_fake_models
    from scripts.stand_ins import at_depth, shallow, transformer_settings
    from utils.fakecuda.count import Counts
    from utils.fakecuda.device import fake_device

    layers = transformer_settings(config)["num_layers"]
    depths = [most_layers] if exact or most_layers or layers < EXTENDED else [0.1, 0.2]
    found, counts = [], Counts(parts.PARTS)
    with tempfile.TemporaryDirectory() as folder:
        folders = [Path(folder, str(depth)) for depth in depths]
        ready = [at_depth(config, place, depth) for place, depth in zip(folders, depths, strict=True)]
        with fake_device(counts, world.size) as mode, on_fake_models(mode):
            for small, place in zip(ready, folders, strict=True):
                forget_kept()
                found.append(list(parts.RUNS[part](small, mode, world, place)))
                counts.forget()
    if len(found) == 1:
        return found[0]
    one, two = (shallow(layers, depth) for depth in depths)
    factor = (layers - one) / (two - one)
    return [parts.Phase.between(a, b, factor) for a, b in zip(*found, strict=True)]


def summary(config: Config, part: str, phases: list, device: Device, reserve: float) -> dict:
    """What the table and the JSON line show."""
    from scripts.estimate_parts import ran_micros, ran_steps
    from utils.fakecuda.count import WAITED

    # Denoising steps of a rollout at training's mean, over those that were run.
    exits = (len(config.sampler.steps) + 1) / 2 / ran_steps(config) if part == "train" else 1.0

    def total(values: dict[str, float]) -> float:
        return sum(value * (exits if label.endswith("/denoise") else 1.0) for label, value in values.items())

    rows = []
    for phase in phases:
        matmul, attention = (total(phase.flops.get(kind, {})) for kind in ("matmul", "attention"))
        seconds = {"matmul": matmul / device.matmul / 1e12, "attention": attention / device.attention / 1e12,
                   "elementwise": total(phase.moved) / device.bandwidth / 1e12}  # fmt: skip
        rates = {"host to device": PCIE}
        link, waited = (sum(size / rates.get(kind, device.link) / 1e9 for kind, (_, size) in phase.comm.items()
                            if kind.endswith(WAITED) is alone) for alone in (False, True))  # fmt: skip
        memory = sum(phase.peak.values())
        rows.append({
            "phase": phase.name, "memory_gib": memory / GIB, "parts_gib": _grouped(phase.peak),
            "seconds": max(sum(seconds.values()), link) + waited,
            "seconds_by": seconds | {"collectives": link + waited},
            "tflop": matmul / 1e12 + attention / 1e12, "elementwise_tb": total(phase.moved) / 1e12, **asdict(phase),
        })  # fmt: skip
    highest = max(rows, key=lambda row: row["memory_gib"])
    fixed = sum(highest["parts_gib"].get(name, 0) for name in FIXED)
    room = device.memory - reserve
    growing = (highest["memory_gib"] - fixed) / (config.train.batch_size if part == "train" else 1)
    found = {"memory_gib": highest["memory_gib"], "fits": highest["memory_gib"] <= room,
             "largest_batch": max(0, int((room - fixed) / growing)), "phases": rows}  # fmt: skip
    if part == "train":
        micros = config.train.gradient_accumulation / ran_micros(config)
        often = {"generator": 1 / config.dmd.critic_updates if config.train.stage == "dmd" else 1}
        found["micro_batches"] = ran_micros(config)
        found["seconds_per_step"] = micros * sum(often.get(row["phase"], 1) * row["seconds"] for row in rows)
    return found


def _grouped(peak: dict[str, float]) -> dict[str, float]:
    """GiB by part: labels without their role; what is no part of its own is called activations."""
    groups: dict[str, float] = {}
    for label, size in peak.items():
        name = label.split("/")[-1]
        name = name if name in (*FIXED, "cache", "optimizer", "text", "vae") else "activations"
        groups[name] = groups.get(name, 0.0) + size / GIB
    return groups


def print_table(found: dict, device: Device) -> None:
    if found.get("micro_batches", 1) > 1:
        print(f"\nof every update {found['micro_batches']} micro-batches are counted")
    for row in found["phases"]:
        parts = ", ".join(f"{name} {size:.2f}" for name, size in sorted(row["parts_gib"].items(), key=lambda x: -x[1])
                          if size >= 0.005)  # fmt: skip
        seconds = ", ".join(f"{name} {value:.2f}" for name, value in row["seconds_by"].items())
        print(f"\n{row['phase']}: {row['memory_gib']:.2f} GiB ({parts}); {row['seconds']:.2f} s ({seconds})")
        print(f"  {'part':<24}{'matmul TF':>11}{'attention TF':>14}{'elementwise GB':>16}{'syncs':>7}")
        labels = sorted({*row["moved"], *(x for kind in row["flops"].values() for x in kind)})
        for label in labels:
            matmul, attention = (row["flops"].get(kind, {}).get(label, 0) / 1e12 for kind in ("matmul", "attention"))
            moved, syncs = row["moved"].get(label, 0) / 1e9, row["syncs"].get(label, 0)
            print(f"  {label:<24}{matmul:>11.2f}{attention:>14.2f}{moved:>16.2f}{syncs:>7.0f}")
        most = sorted(row["by_operation"].items(), key=lambda x: -x[1])[:8]
        print("  elementwise, GB by operation: " + ", ".join(f"{name} {size / 1e9:.1f}" for name, size in most))
        if row["comm"]:
            comm = (f"{name} {calls:.0f} calls, {size / 1e9:.2f} GB" for name, (calls, size) in row["comm"].items())
            print("  collectives: " + ", ".join(comm))
    fits = "fits" if found["fits"] else "DOES NOT FIT"
    print(f"\n{found['memory_gib']:.1f} GiB of {device.memory:.1f}: {fits}; largest batch {found['largest_batch']}")
    if "seconds_per_step" in found:
        print(f"{found['seconds_per_step']:.2f} s a step, mean over the steps at which rollouts stop")
    print()


def print_rows(found: dict, name: str, part: str, seen: set[str]) -> None:
    """For docs/benchmarks.md; rows with numbers that are in `seen` are left out, the others added."""
    for row in found["phases"]:
        matmul, attention = (sum(row["flops"].get(kind, {}).values()) / 1e12 for kind in ("matmul", "attention"))
        moved = (sum(row["moved"].values()), sum(size for _, size in row["comm"].values()))
        counted = (f"{value:,.0f}" for value in (matmul, attention, *(size / 1e9 for size in moved)))
        numbers = f"{part}: {row['phase']} | {row['memory_gib']:.1f} | {' | '.join(counted)} | {row['seconds']:.2f} |"
        if numbers not in seen:
            print(f"| {name} | {numbers}", flush=True)
            seen.add(numbers)
    if "seconds_per_step" in found:
        print(f"| {name} | {part}: a step | | | | | | {found['seconds_per_step']:.1f} |", flush=True)


def ranks_of(config: Config) -> int:
    """Those that `train.total_batch_size` asks for."""
    train = config.train
    return max(1, (train.total_batch_size or 1) // (train.batch_size * train.gradient_accumulation))


def run_all(arguments: argparse.Namespace) -> None:
    """Every shipped config of a real size, training and inference."""
    from pipeline.bundle import transformer_settings

    if not arguments.markdown or arguments.overrides:
        raise ConfigError("--all: writes the table of the shipped configs; add --markdown, and no overrides")
    print("| config x ranks | | GiB | TF matmul | TF attention | GB elementwise | GB gathered | s |")
    print("|---" * 8 + "|", flush=True)
    seen = set()
    for path in sorted(Path(__file__).resolve().parents[1].glob("configs/*.yaml")):
        config = load_config(path)
        if path.stem.endswith("_base") or transformer_settings(config)["num_layers"] < EXTENDED:
            continue
        stage = config.train.stage
        for part in (["train"] if stage else []) + (["infer"] if stage in (None, "dmd") else []):
            run(argparse.Namespace(**{**vars(arguments), "config_path": str(path), "part": part, "seen": seen}))


def run(arguments: argparse.Namespace) -> None:
    config = load_config(arguments.config_path, arguments.overrides)
    rates = {name: getattr(arguments, name) for name in ("matmul", "attention", "bandwidth", "link", "memory")}
    device = replace(DEVICES[arguments.device], **{k: v for k, v in rates.items() if v is not None})
    part = arguments.part or ("infer" if config.train.stage is None else "train")
    size = arguments.world or (config.parallel.sequence if part == "infer" else ranks_of(config))
    world = World(0, size, min(arguments.local or 8, size))
    if part == "load":
        from scripts.estimate_parts import host

        with tempfile.TemporaryDirectory() as folder:
            own = host(config, world, Path(folder, "load"))
        print("\nGiB of a machine's own memory while models are loaded, beside the mapped files:")
        print(", ".join(f"{name} {size:.1f}" for name, size in own.items()), f"; in all {sum(own.values()):.1f}\n")
        print(json.dumps({"config": arguments.config_path, "part": part, "world": world.size, "host_gib": own}))
        return
    phases = measure(config, part, world, arguments.exact)
    found = summary(config, part, phases, device, arguments.reserve)
    if arguments.markdown:
        print_rows(found, f"{Path(arguments.config_path).stem} x {size}", part, arguments.seen)
        return
    print_table(found, device)
    print(json.dumps({"config": arguments.config_path, "overrides": arguments.overrides, "part": part,
                      "world": world.size, "device": arguments.device, **asdict(device), **found}))  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--config_path")
    which.add_argument("--all", action="store_true", help="every shipped config of a real size; with --markdown")
    parser.add_argument("--world", type=int, help="ranks; default those that train.total_batch_size asks for")
    parser.add_argument("--local", type=int, help="ranks a machine; default 8")
    parser.add_argument("--part", choices=["train", "infer", "sample", "text", "load"])
    parser.add_argument("--device", choices=DEVICES, default="h100")
    for name in ("matmul", "attention", "bandwidth", "link", "memory"):
        parser.add_argument(f"--{name}", type=float, help="in place of the device's")
    parser.add_argument("--reserve", type=float, default=3.0, help="GiB that the counted memory leaves out")
    parser.add_argument("--markdown", action="store_true", help="rows of a table in place of tables and JSON")
    parser.add_argument("--exact", action="store_true", help="all layers")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.set_defaults(seen=set())
    arguments = parser.parse_intermixed_args(argv)
    ensure("scripts.estimate", sys.argv[1:] if argv is None else argv)
    return run_command(lambda: run_all(arguments) if arguments.all else run(arguments))


if __name__ == "__main__":
    sys.exit(main())
