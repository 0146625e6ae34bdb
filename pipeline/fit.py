"""Whether a run fits its GPU, known before anything is loaded: `scripts/estimate.py` in a process of its own."""

import json
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from model.flops import forward_flops
from model.geometry import WAN_PATCH_SIZE
from pipeline.bundle import transformer_settings
from utils.config import Config, ConfigError
from utils.distributed import World, from_main
from utils.load_config import to_yaml

log = logging.getLogger(__name__)

ROOT, LIMIT_SECONDS, SMALL, GIB = Path(__file__).resolve().parents[1], 900, 1e8, 2**30
_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def check_memory(config: Config, part: str, world: World, device: torch.device) -> None:
    """Log what a rank will need of its GPU for `part` of the estimate. Raises `ConfigError` where that is not there.
    Does nothing on a CPU or for a model that fits anywhere; an estimate that fails is a warning only."""
    settings = transformer_settings(config) | {"patch_size": WAN_PATCH_SIZE}
    weights = forward_flops(settings, 1, 0, 0)["matmul"] / 2  # a token meets each once
    if device.type != "cuda" or weights < SMALL:
        return
    memory = torch.cuda.get_device_properties(device).total_memory / GIB
    found = from_main(lambda: estimated(config, part, world, memory), world)
    if found is None:
        return
    highest = max(found["phases"], key=lambda row: row["memory_gib"])
    parts = ", ".join(f"{name} {size:.1f}" for name, size in highest["parts_gib"].items() if size >= 0.05)
    if world.is_main:
        log.info("estimate: %.1f of %.1f GiB a rank at the peak (%s)", found["memory_gib"], memory, parts)
    if not found["fits"]:
        training = "more ranks with train.sharding=full, a smaller train.batch_size"
        way = "inference.offload, several ranks a video (parallel.sequence)" if part == "infer" else training
        raise ConfigError(
            f"{part} needs about {found['memory_gib']:.1f} GiB a rank ({parts}) and some for CUDA itself; the GPU has "
            f"{memory:.1f} GiB: use {way} or a smaller cache, or skip this check with --no_estimate"
        )


def estimated(config: Config, part: str, world: World, memory: float) -> dict[str, Any] | None:
    """The estimate's JSON; None where it failed, which is logged."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(to_yaml(config), encoding="utf-8")
        command = [sys.executable, "-m", "scripts.estimate", f"--config_path={path}", f"--part={part}",
                   f"--world={world.size}", f"--local={world.local_size}", f"--memory={memory}"]  # fmt: skip
        environment = {name: value for name, value in os.environ.items() if name not in _TORCHRUN}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH"))))
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT_SECONDS)
            return json.loads(done.stdout.splitlines()[-1])
        except (subprocess.TimeoutExpired, OSError, ValueError, IndexError) as error:
            log.warning("memory was not estimated (%s)", type(error).__name__)
            return None
