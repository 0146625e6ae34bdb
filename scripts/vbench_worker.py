"""What `scripts/vbench.py` runs in VBench's environment, which holds none of this project: reads a job from the JSON
file in argv[1] and writes {"scores": dimension -> {"score", "videos"} or {"error"}} to the one in argv[2], or
{"missing": why VBench cannot be imported}."""

import json
import sys
from pathlib import Path

job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
found = {"scores": {}}
try:
    import torch
    import vbench

    device = job["device"] or ("cuda" if torch.cuda.is_available() else "cpu")
    suite = Path(vbench.__file__).with_name("VBench_full_info.json")
    bench = vbench.VBench(torch.device(device), str(suite), job["results"])
except Exception as error:  # also what breaks in a package that does not fit another
    found, job["dimensions"] = {"missing": f"{type(error).__name__}: {error}"}, []

mode = {"mode": "vbench_standard"} if job["suite"] else {"mode": "custom_input", "prompt_list": job["prompts"]}
for dimension in job["dimensions"]:
    try:
        bench.evaluate(job["folder"], dimension, dimension_list=[dimension], **mode)
        text = Path(job["results"], f"{dimension}_eval_results.json").read_text(encoding="utf-8")
        score, videos = json.loads(text)[dimension]
        each = {Path(video["video_path"]).name: video["video_results"] for video in videos}
        if not each:
            raise ValueError("none of these videos is for this dimension")
        found["scores"][dimension] = {"score": score, "videos": each}
    except Exception as error:  # weights that cannot be had, say: other dimensions need none
        found["scores"][dimension] = {"error": f"{type(error).__name__}: {error}"}
Path(sys.argv[2]).write_text(json.dumps(found), encoding="utf-8")
