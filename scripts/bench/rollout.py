"""Sampling G completions of a prompt beside transformers' `generate` on the same checkpoint, in turn, each in its process.

    python scripts/bench/rollout.py                        # 19 M parameters, prompt 300, G = 8, 64 new tokens
    python scripts/bench/rollout.py -G 4 --prompts 2 --out scripts/bench/results/rollout.json

Prints one JSON object. Both sides run in float32, sample at temperature 1 from the whole vocabulary and never stop
early; a time is that of a whole call, completions on the host, after one call of each to warm up. On a shared machine
only ratios mean anything. `corrected` is what is left of the ratio when the speed of each framework's float32 matrix
product over many rows is divided out.
"""

# ruff: noqa: E402 - the environment must be set before torch and JAX are imported

from __future__ import annotations

import os

# Before torch and JAX are imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # torch's idle threads must not spin on JAX's cores
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from vlmalign.host_memory import keep_freed_memory

keep_freed_memory()  # as the vlmalign command does

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import jax
import numpy as np
from generate_peer import GeneratePeer
from matmul import matmul_rates, versions
from shapes import Sizes, write_checkpoint

from vlmalign.models.model import Model
from vlmalign.rollout.completions import Generator
from vlmalign.rollout.sampling import Sampling
from vlmalign.rollout.statistics import RolloutStats
from vlmalign.types import Group, Segment
from vlmalign.weights.checkpoint import load_config, load_params

#: stop ids under which nothing stops
NEVER = 1_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-G", "--group", type=int, default=8, help="completions per prompt")
    parser.add_argument("--prompts", type=int, default=1, help="prompts at once")
    parser.add_argument("--prompt-tokens", type=int, default=Sizes().prompt)
    parser.add_argument("--new-tokens", type=int, default=Sizes().completion)
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of either side")
    parser.add_argument("--peer-python", default=sys.executable, help="runs the other side, where torch is elsewhere")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    sizes = replace(Sizes(), prompt=arguments.prompt_tokens, completion=arguments.new_tokens)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_checkpoint(folder, "text", sizes, seed=0)
        result = compare(folder, sizes, arguments)
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n", encoding="utf-8")


def compare(folder: Path, sizes: Sizes, arguments: argparse.Namespace) -> dict[str, object]:
    """Everything that is printed."""
    model = Model(load_config(folder))
    params = load_params(folder, model)
    ids = np.random.default_rng(0).integers(16, sizes.vocab, (arguments.prompts, sizes.prompt)).astype(np.int32)
    prompts = [
        Group(i, Segment(row, np.full(len(row), -1, np.int32), np.ones(len(row), np.float32)), (), ())
        for i, row in enumerate(ids)
    ]
    generator = Generator(
        model, None, (NEVER,), rows=arguments.prompts, group=arguments.group, completion=sizes.completion,
        sampling=Sampling(), prompt_lengths=(-(-sizes.prompt // 4) * 4,),
    )  # fmt: skip
    stats: list[RolloutStats] = []
    began = time.perf_counter()
    programs = generator.warm_up(params)
    compiled = time.perf_counter() - began

    def ours() -> None:
        found = generator.run(params, prompts, jax.random.key(0), report=stats.append)
        assert all(len(c.tokens) == sizes.completion for answers in found for c in answers)

    before = os.getloadavg()
    with GeneratePeer(
        folder, ids, group=arguments.group, completion=sizes.completion, never=NEVER, python=arguments.peer_python
    ) as peer:
        seconds = in_turn(ours, peer, arguments.repeats)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    rates = matmul_rates()
    many = next(iter(rates["jax"]))
    ratio = median["transformers"] / median["vlmalign"]
    return {
        "sizes": asdict(sizes) | {"group": arguments.group, "prompts": arguments.prompts},
        "parameters": sum(value.size for value in params.values()),
        "seconds": seconds,
        "median_seconds": median,
        "ratio": ratio,
        "corrected": ratio * rates["torch"][many] / rates["jax"][many],
        "decode_programs": programs,
        "warm_up_seconds": compiled,
        "statistics": asdict(stats[-1]) | {"decoded_per_token": stats[-1].decoded_per_token},
        "matmul_gflops": rates,
        "load": {"before": before, "after": os.getloadavg()},
        "versions": versions(),
        "peer_versions": peer.versions,
    }


def in_turn(ours: Callable[[], None], peer: GeneratePeer, repeats: int) -> dict[str, list[float]]:
    """Seconds of each call, one side after the other, so that what else the machine does meets both alike."""
    found: dict[str, list[float]] = {"vlmalign": [], "transformers": []}
    for _ in range(repeats + 1):
        began = time.perf_counter()
        ours()
        found["vlmalign"].append(time.perf_counter() - began)
        found["transformers"].append(peer.call())
    return {name: values[1:] for name, values in found.items()}


if __name__ == "__main__":
    main()
