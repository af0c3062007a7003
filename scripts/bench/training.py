"""SFT, DPO and GRPO steps of vlmalign and of TRL on the same checkpoint and shapes, in turn, each in its own process.

    python scripts/bench/training.py                                # text and image, all jobs
    python scripts/bench/training.py --kinds image --jobs grpo -G 8
    python scripts/bench/training.py --out scripts/bench/results/training.json

Prints a table and one JSON object. Each job runs `--steps` steps of either side in turn, after one of each to warm up
(ours also compiles there); medians are compared. A step is everything a training loop does on new data: images
prepared and encoded, prompts collated, completions sampled and rewarded, the reference scored, the adapter updated. On
a shared machine only ratios mean anything. Beside the ratio stands what is left of it when the speed of each
framework's float32 matrix product is divided out.
"""

# ruff: noqa: E402 - the environment must be set before torch and JAX are imported

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # torch's idle threads must not spin on JAX's cores
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from vlmalign.host_memory import keep_freed_memory

keep_freed_memory()  # as the vlmalign command does; TRL runs in a process without it, as its users have it

import argparse
import json
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

warnings.filterwarnings("ignore")

import transformers
from matmul import matmul_rates, versions
from ours import Bench
from peers import PeerProcess
from rich.console import Console
from rich.table import Table
from shapes import KINDS, Sizes, prompt_tokens, write_checkpoint

JOBS = ("sft", "dpo", "grpo")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--jobs", default=",".join(JOBS))
    parser.add_argument("--steps", type=int, default=5, help="timed steps of either side")
    parser.add_argument("-G", "--groups", default="4,8", help="completions per prompt, for GRPO")
    parser.add_argument("--prompts", type=int, default=1, help="prompts per GRPO step")
    parser.add_argument("--same-heap", action="store_true", help="TRL's process keeps freed memory too")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    sizes = Sizes()
    rates = matmul_rates()
    result = {
        "versions": versions(),
        "sizes": vars(sizes),
        "matmul_gflops": rates,
        "load_before": os.getloadavg(),
        "same_heap": arguments.same_heap,
        "jobs": [],
    }
    gain = rates["jax"]["[2048, 384] x [384, 1536]"] / rates["torch"]["[2048, 384] x [384, 1536]"]
    with tempfile.TemporaryDirectory() as scratch:
        for kind in arguments.kinds.split(","):
            folder = Path(scratch) / kind
            processor = write_checkpoint(folder, kind, sizes, seed=0)
            spare = prompt_tokens(processor, kind, "w1 w2 w3", sizes) - 3
            bench = Bench(folder, kind, sizes, spare=spare)
            jobs = arguments.jobs.split(",")
            groups = [(job, g) for job in jobs for g in (arguments.groups.split(",") if job == "grpo" else [None])]
            with PeerProcess(folder, kind, sizes, spare=spare, same_heap=arguments.same_heap) as peer:
                for job, group in groups:
                    row = compare(bench, peer, job, None if group is None else int(group), arguments)
                    row["ratio_corrected"] = row["ratio"] / gain
                    result["jobs"].append(row)
                    print(json.dumps(row), file=sys.stderr, flush=True)
                    if arguments.out is not None:  # after every job: an interrupted run keeps what it measured
                        arguments.out.parent.mkdir(parents=True, exist_ok=True)
                        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    result["load_after"] = os.getloadavg()
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))
    Console(stderr=True).print(table(result))


def compare(bench: Bench, peer: PeerProcess, job: str, group: int | None, arguments: argparse.Namespace) -> dict:
    """Medians of both sides, and their ratio."""
    batch = {"sft": 4, "dpo": 2, "grpo": arguments.prompts}[job]
    step = bench.grpo(group, batch) if job == "grpo" else getattr(bench, job)(batch)
    seconds: list[float] = []
    theirs: list[float] = []
    for taken in peer.steps(job, batch, arguments.steps + 1, group):
        theirs.append(taken)
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    mine, trl = statistics.median(seconds[1:]), statistics.median(theirs[1:])
    return {
        "kind": bench.kind, "job": job, "group": group, "batch": batch, "vlmalign_s": mine, "trl_s": trl,
        "ratio": trl / mine, "vlmalign_all": seconds, "trl_all": theirs,
    }  # fmt: skip


def table(result: dict) -> Table:
    found = Table(title="seconds per step, medians", title_justify="left")
    for name in ("kind", "job", "G", "vlmalign", "TRL", "ratio", "without the gap of matmul rates"):
        found.add_column(name, justify="left" if name in ("kind", "job") else "right")
    for row in result["jobs"]:
        found.add_row(
            row["kind"], row["job"], str(row["group"] or ""), f"{row['vlmalign_s']:.2f}", f"{row['trl_s']:.2f}",
            f"{row['ratio']:.1f}", f"{row['ratio_corrected']:.1f}",
        )  # fmt: skip
    return found


if __name__ == "__main__":
    main()
