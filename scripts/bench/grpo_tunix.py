"""GRPO steps of vlmalign and of google-tunix on the same shapes, in turn, each in a process of its own.

    python -m venv tunix && tunix/bin/pip install google-tunix==0.1.7
    python scripts/bench/grpo_tunix.py --tunix tunix/bin/python
    python scripts/bench/grpo_tunix.py --tunix tunix/bin/python --out scripts/bench/results/tunix.json

A Gemma 3 decoder with random weights, all of them trained (AdamW, float32), with a reference for the KL penalty: the
sizes are those that Tunix's own examples run on small machines. Both sides generate every completion to its full
length. While one makes a step the other waits. Both multiply with XLA: nothing is to be divided out of the ratio but
what different versions of jaxlib differ by, whose float32 rate is printed for our side.
"""

# ruff: noqa: E402 - the environment must be set before torch and JAX are imported

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from vlmalign.host_memory import keep_freed_memory

keep_freed_memory()  # as the vlmalign command does

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from matmul import matmul_rates, versions
from shapes import Sizes, write_checkpoint

from vlmalign.models.model import Model
from vlmalign.objectives.grpo import grpo_counts, grpo_loss
from vlmalign.objectives.grpo_settings import GrpoSettings
from vlmalign.rewards.runner import ScoredBatch
from vlmalign.rollout.completions import Generator
from vlmalign.rollout.sampling import Sampling
from vlmalign.training.optimiser import OptimiserSettings, build_optimiser
from vlmalign.training.policy import PolicySource
from vlmalign.training.rollout_settings import RolloutSettings
from vlmalign.training.rollouts import Task
from vlmalign.training.step import Objective, Trainer
from vlmalign.training.supervised import Shapes
from vlmalign.types import Group, Segment
from vlmalign.weights.checkpoint import load_config, load_params

SIZES = Sizes(
    vocab=32_000, embed=256, ffn=1024, layers=4, heads=4, kv_heads=2, head_dim=64, prompt=128, completion=64
)  # fmt: skip
BETA = 0.04


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tunix", required=True, help="a Python interpreter that has google-tunix")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of either side")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("-G", "--group", type=int, default=4)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    # Two steps of either side go by untimed: the first compiles, and Tunix's first update comes with its second step.
    count = arguments.steps + 2
    ours, theirs = our_steps(arguments.prompts, arguments.group), their_steps(arguments, count)
    names = next(theirs)
    pairs = [(next(ours), next(theirs)) for _ in range(count)]
    mine, other = (statistics.median(column[2:]) for column in zip(*pairs, strict=True))
    result = {
        "versions": versions(),
        "tunix_versions": names,
        "sizes": {"prompts": arguments.prompts, "group": arguments.group, **vars(SIZES)},
        "matmul_gflops": matmul_rates()["jax"],
        "load": os.getloadavg(),
        "vlmalign_s": mine,
        "tunix_s": other,
        "ratio": other / mine,
        "all_s": pairs,
    }
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


def their_steps(arguments: argparse.Namespace, count: int) -> Iterator:
    """First Tunix's versions, then seconds of a step each time it is asked."""
    names = ("vocab", "embed", "ffn", "layers", "heads", "kv_heads", "head_dim", "window", "prompt", "completion")
    sizes = {name: getattr(SIZES, name) for name in names}
    sizes |= {"prompts": arguments.prompts, "group": arguments.group, "steps": count + 1, "beta": BETA}
    command = [arguments.tunix, str(Path(__file__).with_name("tunix_peer.py")), json.dumps(sizes)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:

        def line() -> dict:
            said = child.stdout.readline()
            if not said:
                raise RuntimeError(
                    f"google-tunix's process ended with exit code {child.wait()}; its error stands above"
                )
            return json.loads(said)

        try:
            yield line()["versions"]
            line()  # the first rollout: no step is complete yet
            for _ in range(count):
                child.stdin.write("go\n")
                child.stdin.flush()
                found = line()
                assert found["completions"] == arguments.prompts * arguments.group
                yield found["seconds"]
        finally:
            child.kill()


def our_steps(prompts: int, group: int) -> Iterator[float]:
    """Seconds of a step each time it is asked."""
    with tempfile.TemporaryDirectory() as scratch:
        write_checkpoint(Path(scratch), "text", SIZES, seed=0)
        model = Model(load_config(Path(scratch)), dtype="float32")
        params = load_params(Path(scratch), model)
    settings = GrpoSettings(beta=BETA, max_completion=SIZES.completion)
    reference = {name: jnp.array(value) for name, value in params.items()}
    trainer = Trainer(
        model,
        Objective(
            "grpo",
            lambda scores, batch: grpo_loss(scores, batch, settings=settings),
            lambda batches: grpo_counts(batches, settings=settings),
            needs_reference=True,
        ),
        build_optimiser(OptimiserSettings(1e-4, warmup=0.0, schedule="constant"), 10**6),
        reference=(model, reference),
    )
    generator = Generator(
        model=model, features=None, stop_ids=(), rows=prompts, group=group, completion=SIZES.completion,
        sampling=Sampling(temperature=1.0), multiple=SIZES.prompt,
    )  # fmt: skip
    rng = np.random.default_rng(0)

    def task(number: int) -> Task:
        tokens = rng.integers(5, SIZES.vocab, SIZES.prompt).astype(np.int32)
        prompt = Segment(tokens, np.full(tokens.shape, -1, np.int32), np.zeros(tokens.shape, np.float32))
        return Task(Group(number, prompt, (), ()), "", {})

    def score(number, keys, texts, completions, columns) -> ScoredBatch:
        del number, keys, texts, columns
        rewards = [float(len(set(c.split()))) + 0.01 * i for i, c in enumerate(completions)]
        return ScoredBatch(rewards, {}, ())

    source = PolicySource(
        [task(i) for i in range(64 * prompts)], generator=generator, trainer=trainer, base={},
        decode=lambda tokens: " ".join(map(str, tokens)), score=score,
        shapes=Shapes(rows=prompts, prompt_multiple=SIZES.prompt, completion_multiple=SIZES.completion),
        settings=RolloutSettings(prompts, scale="group"),
    )  # fmt: skip
    state, step = trainer.init(params), 0
    while True:
        began = time.perf_counter()
        work = source.work(step, state.params)
        state, found = trainer.step(state, {}, work.batches, work.options)
        jax.block_until_ready((state.params, found))
        step += 1
        yield time.perf_counter() - began


if __name__ == "__main__":
    main()
