"""What works on this machine's GPU and how fast: run by scripts/gpu_check.sh.

In turn, each in a process of its own, within --minutes altogether: the environment; the tests marked `cuda`; chunks of
inference at Wan-1.3B's shape with random weights (frames per second with and without VAE, floor ratio, the three
largest costs, peak memory) and what its estimate says; DMD steps on one GPU, all models of 1.3B, and theirs. Without a
GPU: the shapes of configs/bench_cpu.yaml and a tiny DMD. Writes check.json and check.md (a table for
docs/benchmarks.md) to --output; the exit status is 1 where a part failed.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from utils.cli import run_command

WAN = ["--config_path=configs/packforcing_dmd_chunkwise_hr_8gpu_sink3_recent2.yaml", "model.random_init=true",
       "model.bundle=null", "model.checkpoint=null"]  # fmt: skip
ONE_GPU = ["--config_path=configs/packforcing_dmd_chunkwise_hr_1gpu.yaml", "train.gradient_accumulation=1",
           "train.total_batch_size=1", "dmd.teacher=null", "dmd.critic=null"]  # fmt: skip
TINY = ["--config_path=configs/bench_cpu.yaml", "model.num_layers=2", "cache.top_k=2", "video.height=128"]
TINY_DMD = ["--config_path=configs/tiny/dmd.yaml", "model.random_init=true", "dmd.teacher=null", "train.batch_size=1",
            "train.compile=false"]  # fmt: skip
FAILED = 1


def environment() -> dict[str, Any]:
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "cpu": platform.processor() or platform.machine(),
        "packages": [name for name in ("flash_attn", "flash_attn_interface", "triton") if find_spec(name)],
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "gpus": torch.cuda.device_count(),
                  "memory_gib": properties.total_memory / 2**30}  # fmt: skip
    return found


def parts(on_gpu: bool) -> dict[str, list[str]]:
    """Name -> module and arguments; the estimates stand beside what they foretell."""
    infer, dmd = (WAN, [*ONE_GPU, "model.random_init=true"]) if on_gpu else (TINY, TINY_DMD)
    chunks = ["--chunks=10", "--vae_chunks=3"] if on_gpu else ["--chunks=2", "--vae_chunks=0"]
    found = {
        "tests": ["pytest", "-q", "-m", "cuda", "tests/test_cuda.py"],
        "inference": ["scripts.bench_inference", *infer, *chunks, "--profile"],
        "dmd": ["scripts.bench_train", *dmd, "--repeats=1"],
    }
    if on_gpu:
        found["inference estimate"] = ["scripts.estimate", WAN[0], "--part=infer"]
        found["dmd estimate"] = ["scripts.estimate", *ONE_GPU]
    return found


def run_part(command: list[str], seconds: float) -> dict[str, Any]:
    """What a program says in its last line, as JSON where it is; how long it took, and the end of what went wrong."""
    start = time.perf_counter()
    try:
        done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, timeout=max(seconds, 0))
        status, lines, errors = done.returncode, done.stdout.splitlines() or [""], done.stderr
    except subprocess.TimeoutExpired:
        status, lines, errors = None, [""], f"not finished in {max(seconds, 0):.0f} s"
    found = {"status": status, "seconds": round(time.perf_counter() - start, 1)}
    try:
        found["result"] = json.loads(lines[-1])
    except ValueError:
        found["result"] = lines[-1]
    return found if status == 0 else found | {"error": (errors or "\n".join(lines))[-2000:]}


def table(found: dict[str, Any]) -> str:
    device = found["environment"].get("gpu", "CPU alone: small shapes, no figures of a GPU")
    rows = [f"{device}, torch {found['environment']['torch']}", "", "| part | |", "|---|---|"]
    for name, part in found["parts"].items():
        result = part["result"]
        if part["status"] != 0:
            text = f"FAILED: {part['error'].strip().splitlines()[-1] if part['error'].strip() else part['status']}"
        elif name == "inference":
            costs = ", ".join(f"{cost} {share:.0%}" for cost, share in result["costs"].items())
            text = f"{result['fps']:.1f} frames/s"
            text += f", {result['fps_with_vae']:.1f} with VAE" if result["fps_with_vae"] else ""
            text += f", floor ratio {result['floor_ratio']:.3f}, {result['peak_bytes'] / 2**30:.1f} GiB; most: {costs}"
        elif name == "dmd":
            text = f"{result['seconds_per_step']:.2f} s a step, {result['peak_bytes'] / 2**30:.1f} GiB"
        elif name.endswith("estimate"):
            text = f"{result['memory_gib']:.1f} GiB, {sum(row['seconds'] for row in result['phases']):.2f} s"
        else:
            text = str(result)
        rows.append(f"| {name} | {text} |")
    return "\n".join(rows) + "\n"


def run(arguments: argparse.Namespace) -> int:
    on_gpu, end = torch.cuda.is_available(), time.perf_counter() + 60 * arguments.minutes
    if not on_gpu:
        print("no GPU here: the same parts on the CPU, at small shapes")
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    found = {"environment": environment(), "parts": {}}
    for name, command in parts(on_gpu).items():
        print(f"{name} ...", flush=True)
        found["parts"][name] = run_part(command, end - time.perf_counter())
    folder = Path(arguments.output)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "check.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    (folder / "check.md").write_text(text := table(found), encoding="utf-8")
    print("\n" + text)
    return FAILED if any(part["status"] != 0 for part in found["parts"].values()) else 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--output", default="runs/gpu_check")
    arguments = parser.parse_args(argv)
    return run_command(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
