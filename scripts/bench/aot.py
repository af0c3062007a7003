"""What MedGemma-4B's training step needs on GPUs that are not here, against the limits it must keep, as JSON.

    python scripts/bench/aot.py --device a100-80 h100 --out scripts/bench/results/aot_medgemma_4b.json

Each program is the run's own, compiled for a description of the GPU (extra `plan`; minutes per device) and never run:
memory is the compiler's plan, not a measurement. One optimiser batch is 8 groups of 4 completions, prompts of 456
tokens (256 of them one film) and completions of 512. The tower's weights, the optimiser's moments and the reference's
adapter are counted wherever they lie in memory, though the program at work may not read them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "chexreason" / "medgemma_4b.yaml"
GIB = 2**30
PROMPT, COMPLETION = 456, 512
#: GiB: the update in one micro-batch, at two groups per micro-batch, and the highest point of a whole step
WHOLE, PAIRS, STEP = 16.5, 12.0, 18.0


def workload(rows: int, remat: str = "full") -> Any:
    """ChexReason's, at the shapes of the limits, `rows` groups per micro-batch."""
    from vlmalign.planning.devices import find_device
    from vlmalign.planning.lengths import Given
    from vlmalign.planning.study import workloads_of
    from vlmalign.studies.engine.chain import load_study

    settings = [f"rollout.completion={COMPLETION}", "shapes.prompt_multiple=8", f"shapes.rows={rows}"]
    config = load_study(CONFIG, [*(f"stages.grpo.{each}" for each in settings), f"stages.base.remat={remat}"])
    ((found, _),) = workloads_of(
        config, lambda dtype: find_device("a100-80"), 1, model_configs={"": "medgemma-4b"}, given=Given(prompt=PROMPT),
        only=["grpo"], compiles=False,
    )  # fmt: skip
    return found


def describe(name: str) -> tuple[Any, Callable[[str], None]]:
    """What to compile for, and how to say what is done."""
    from vlmalign.planning.devices import find_device
    from vlmalign.planning.target import open_target

    target = open_target(find_device(name), 1)
    if not target.devices:
        sys.exit(f"nothing can be compiled: {target.refusal}")
    return target, lambda text: print(f"{name}: {text}", file=sys.stderr, flush=True)


def step(name: str, remat: str, rows: int) -> dict[str, Any]:
    """The phases of a whole step, to be set beside what `gpu.py --parts step` measures."""
    from vlmalign.planning.memory import phases
    from vlmalign.planning.plan import jobs
    from vlmalign.planning.programs import compile_all

    target, say = describe(name)
    work = workload(rows, remat)
    wanted = [job for job in jobs(work, target) if not job.name.startswith("sft")]
    found = phases(work, compile_all(wanted, target, say), target)
    peaks = {phase.name: phase.peak for phase in found if not phase.name.startswith("sft")}
    return {
        "step": {"remat": remat, "rows": rows},
        "peak_gib": round(max(peaks.values()) / GIB, 2),
        "phases_gib": {phase: round(peak / GIB, 2) for phase, peak in peaks.items()},
    }


def limits(name: str) -> Iterator[dict[str, Any]]:
    """One record per limit."""
    from vlmalign.planning.batches import places, size, split
    from vlmalign.planning.jobs import micro_job
    from vlmalign.planning.memory import phases
    from vlmalign.planning.plan import jobs
    from vlmalign.planning.programs import compile_all
    from vlmalign.rollout.engine import BLOCK

    target, say = describe(name)
    whole, pairs = workload(8), workload(2)
    assert whole["grpo"].layout == (PROMPT, 4, COMPLETION)
    wanted = [job for job in jobs(whole, target) if not job.name.startswith("sft")]
    small = micro_job(pairs.model, pairs["grpo"], places(target, pairs.model), target)
    programs = compile_all([*wanted, small._replace(name="pairs")], target, say)
    by_rows = {
        "update of 8 groups in one micro-batch": (whole, programs, WHOLE),
        "update of 8 groups, two per micro-batch": (pairs, {"grpo gradients": programs["pairs"]}, PAIRS),
    }
    for title, (work, compiled, limit) in by_rows.items():
        (phase,) = (p for p in phases(work, compiled, target) if p.name == "grpo gradients")
        # The update of the limit has no penalty: the reference's adapter is counted with the whole step alone.
        peak = phase.peak - size(split(work.model).trained)
        yield {"limit": title, "limit_gib": limit, "peak_gib": round(peak / GIB, 2), "kept": peak <= limit * GIB}
    found = phases(whole, programs, target)
    found = [phase for phase in found if not phase.name.startswith("sft")]
    assert all(phase.how == "compiled" for phase in found), found
    peak = max(found, key=lambda phase: phase.peak)
    yield {
        "limit": "whole step with rollout and merged copy",
        "limit_gib": STEP,
        "peak_gib": round(peak.peak / GIB, 2),
        "kept": peak.peak <= STEP * GIB,
        "phases_gib": {phase.name: round(phase.peak / GIB, 2) for phase in found},
    }
    decode, base = programs["grpo decode"], size(split(whole.model).frozen)
    per_token = sum(each.bytes for each in decode.findings.copies) / BLOCK
    yield {
        "limit": "decode: no copies of weights or caches and no sorts in the loop over tokens, caches donated",
        "copies_in_loop": [each._asdict() for each in decode.findings.copies],
        "copied_bytes_per_token": per_token,
        "sorts": decode.findings.sorts,
        "donated_bytes": decode.memory.aliased,
        # What is left are the prompts' attention weights, padded for a product; the smallest matrix has 5 MB a layer.
        "kept": per_token < 0.01 * base and not decode.findings.sorts and decode.memory.aliased > 0,
    }
    yield {
        "limit": "decode: one CUDA graph per token",
        "launches_per_token": decode.launches,
        "kept": decode.launches == ("CommandBuffer",),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", nargs="+", default=["a100-80", "h100"])
    parser.add_argument("--step", nargs="+", help="REMAT:ROWS; the phases of such whole steps, in place of the limits")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    started = time.perf_counter()
    steps = [tuple(each.split(":")) for each in asked.step or ()]
    devices = {
        name: [step(name, remat, int(rows)) for remat, rows in steps] if steps else list(limits(name))
        for name in asked.device
    }
    found = {
        "method": "compiled for a description of the GPU, never run",
        "shape": {"groups": 8, "completions": 4, "prompt_tokens": PROMPT, "completion_tokens": COMPLETION},
        "versions": {name: version(name) for name in ("jax", "jaxlib", "flax")},
        "python": platform.python_version(),
        "devices": devices,
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(time.process_time(), 1),
    }
    text = json.dumps(found, indent=2)
    print(text)
    if asked.out is not None:
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text(text + "\n", encoding="utf-8")
    sys.exit(not all(each.get("kept", True) for records in devices.values() for each in records))


if __name__ == "__main__":
    main()
