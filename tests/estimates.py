"""Estimates of the shipped configs with two layers, to compare with those in tests/data/estimates.json.

    python -m tests.estimates configs/a.yaml configs/b.yaml   # prints JSON: config -> part -> GiB
    python -m tests.estimates --write [configs/a.yaml ...]    # into the file, all shipped configs or some
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

from utils.config import ParallelConfig
from utils.distributed import World
from utils.fakecuda.device import ensure
from utils.load_config import load_config

LAYERS, STORED = 2, Path(__file__).parent / "data" / "estimates.json"
CONFIGS = sorted(str(path) for path in Path("configs").rglob("*.yaml") if "base" not in path.name)
BY_TWO = ("configs/tiny/dmd.yaml",)  # also of a rank of two that make a video together
CONFIGS = [path for path in CONFIGS if not path.endswith(("world.yaml", "generator.yaml"))]


def estimate(path: str) -> dict[str, float]:
    from scripts.estimate import GIB, measure, ranks_of

    config = load_config(path)
    ranks = ranks_of(config)
    world = World(0, ranks, min(8, ranks))
    found = {}
    for part in ("train", "infer") if config.train.stage is not None else ("infer",):
        if part == "infer" and config.train.stage not in (None, "dmd"):
            continue
        for phase in measure(config, part, world, most_layers=LAYERS):
            found[f"{part}/{phase.name}"] = round(sum(phase.peak.values()) / GIB, 4)
    if path in BY_TWO:
        config = replace(config, parallel=ParallelConfig(sequence=2))
        for phase in measure(config, "infer", World(0, 2, 2), most_layers=LAYERS):
            found[f"infer by two ranks/{phase.name}"] = round(sum(phase.peak.values()) / GIB, 4)
    return found


if __name__ == "__main__":
    ensure("tests.estimates", sys.argv[1:])
    paths = [argument for argument in sys.argv[1:] if argument != "--write"] or CONFIGS
    estimates = {}
    for path in paths:
        estimates[path] = estimate(path)
        print(path, estimates[path], file=sys.stderr, flush=True)
        if "--write" in sys.argv:
            known = json.loads(STORED.read_text()) | estimates
            STORED.write_text(json.dumps({path: known[path] for path in CONFIGS if path in known}, indent=1) + "\n")
    print(json.dumps(estimates))
