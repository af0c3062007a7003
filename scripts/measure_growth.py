#!/usr/bin/env python3
"""Does a long GRPO run with images take more and more memory? Linux.

    scripts/measure_growth.py --updates 400

Runs a small study of films (tiny-medgemma, 400 films of 96 px, 2 prompts x 2 completions of 8 tokens an update, a reward from
a file in a worker process) and reads, at every update, the anonymous memory of the process (RssAnon of /proc/PID/status),
its threads and its open files. Prints JSON: the slope of memory from update 100 on, by least squares, in MB per 100 updates.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from vlmalign.machine import environment_record

REPOSITORY = Path(__file__).resolve().parent.parent
WARM = 100  #: updates after which everything has been compiled and met

REWARD = """
def length(prompts, completions, **columns):
    return [len(text) / 100 for text in completions]
"""


def study(folder: Path, updates: int) -> dict[str, Any]:
    root = "{run}/sources/mimic"
    (folder / "rewards.py").write_text(REWARD)
    return {
        "run": str(folder / "run"),
        "sources": {
            "mimic": {
                "kind": "mimic-cxr-jpg", "root": root, "split": "train",
                "phantom": {"films": {"train": 400, "validate": 2, "test": 2}, "seed": 1, "size": 96},
            },
        },
        "sets": {"all": {"from": "mimic", "draw": "random", "size": 400}},
        "tasks": {"findings": {"kind": "labels", "labels": "chexpert", "prompt": "Which findings?"}},
        "stages": {
            "base": {
                "kind": "model", "path": str(REPOSITORY / "configs" / "models" / "tiny-medgemma"),
                "lora": {"rank": 4, "alpha": 8},
            },
            "grpo": {
                "kind": "grpo", "from": "base", "data": "all", "steps": updates, "prompts": 2, "checkpoint_every": 50,
                "rollout": {"rows": 4, "group": 2, "completion": 8},
                "shapes": {"rows": 4, "prompt_multiple": 16, "completion_multiple": 8},
                "optimiser": {"learning_rate": 1e-4},
                "rewards": {"length": {"kind": "file", "path": str(folder / "rewards.py"), "function": "length"}},
                "scoring": {"workers": 1},
            },
        },
    }  # fmt: skip


def look(pid: int) -> dict[str, int]:
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {
        "bytes": int(status["RssAnon"].split()[0]) * 1024,
        "threads": int(status["Threads"]),
        "files": len(list(Path(f"/proc/{pid}/fd").iterdir())),
    }


def follow(process: subprocess.Popen, lines: Path) -> dict[int, dict[str, int]]:
    """What the process took when each update's line had been written."""
    seen: dict[int, dict[str, int]] = {}
    while process.poll() is None:
        step = lines.read_bytes().count(b"\n") if lines.exists() else 0
        if step and step not in seen:
            try:
                seen[step] = look(process.pid)
            except (OSError, KeyError):  # it has just ended
                break
            print(f"update {step}: {seen[step]['bytes'] / 1e6:.1f} MB", end="\r", file=sys.stderr, flush=True)
        time.sleep(0.01)
    return seen


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=400, metavar="N", help="more than 100 (400)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="vlmalign-growth-") as name:
        folder = Path(name)
        path = folder / "study.yaml"
        path.write_text(json.dumps(study(folder, arguments.updates)))
        command = [sys.executable, "-m", "vlmalign.cli", "run", str(path), "--only", "stages/grpo"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
            seen = follow(process, folder / "run" / "stages" / "grpo" / "metrics.jsonl")
            said = process.stderr.read()
        if process.returncode:
            raise SystemExit(said[-2000:])
    steps = np.array([step for step in seen if step >= WARM])
    if len(steps) < 2:
        raise SystemExit(f"--updates must be more than {WARM}")
    taken = np.array([seen[step]["bytes"] for step in steps])
    slope = float(np.polyfit(steps, taken, 1)[0])
    first, last = (seen[min(steps)], seen[max(steps)])
    print(
        json.dumps(
            {
                "updates": arguments.updates,
                "MB per 100 updates": round(slope * 100 / 1e6, 3),
                f"at update {min(steps)}": first,
                f"at update {max(steps)}": last,
                "environment": environment_record(),
            },
            indent=1,
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
