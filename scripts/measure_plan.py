"""How well a plan foresees memory: its peaks beside what a run of the same programs takes on this CPU, as JSON.

    python scripts/measure_plan.py

A Gemma 3 of random weights (0.38 B parameters, 1.5 GB in float32, by default) is planned for the device that JAX runs
on here. Then the planned programs, compiled but never run before, are run phase by phase on real arrays that are made
after everything was compiled. Counted is the growth of the process's anonymous memory (RssAnon of /proc/PID/status:
Linux only) from just before the first array, at its peak in each phase.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from measure_loading import Watch, memory

if TYPE_CHECKING:  # JAX must not be imported before main() has said on what it runs
    from jax.stages import Compiled

    from vlmalign.models.model import Model
    from vlmalign.planning.jobs import Job

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "chexreason" / "medgemma_4b.yaml"


def gemma(asked: argparse.Namespace) -> dict[str, Any]:
    """config.json of a Gemma 3 of these sizes, with a small tower of 16 soft tokens."""
    return {
        "model_type": "gemma3",
        "image_token_index": 5,
        "boi_token_index": 6,
        "eoi_token_index": 7,
        "mm_tokens_per_image": 16,
        "text_config": {
            "model_type": "gemma3_text",
            "vocab_size": asked.vocab,
            "hidden_size": asked.embed,
            "intermediate_size": asked.ffn,
            "num_hidden_layers": asked.layers,
            "num_attention_heads": asked.embed // 256,
            "num_key_value_heads": max(1, asked.embed // 512),
            "head_dim": 128,
        },
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 224,
            "patch_size": 14,
            "vision_use_head": False,
        },
    }


class Planned(NamedTuple):
    """A workload's programs: what goes in, what was compiled, and the peak that is foreseen in each phase, bytes."""

    model: Model
    jobs: Mapping[str, Job]
    compiled: Mapping[str, Compiled]
    expected: Mapping[str, int]


def plan(asked: argparse.Namespace) -> Planned:
    """The study on this model, planned for this device and compiled."""
    from vlmalign.planning.lengths import Given
    from vlmalign.planning.memory import phases
    from vlmalign.planning.plan import jobs
    from vlmalign.planning.programs import lower, options_of, read_compiled
    from vlmalign.planning.study import workloads_of
    from vlmalign.planning.this_device import this_device
    from vlmalign.studies.engine.chain import load_study

    overrides = ["base.dtype=float32", f"base.remat={asked.remat}"]
    overrides += [f"grpo.rollout.rows={asked.rows}", f"grpo.rollout.completion={asked.completion}"]
    overrides += [f"grpo.prompts={asked.rows}", f"sft.batch={asked.rows}"]
    for stage in ("sft", "grpo"):
        overrides += [f"{stage}.shapes.rows={asked.rows}", f"{stage}.shapes.completion_multiple=32"]
    config = load_study(CONFIG, [f"stages.{each}" for each in overrides])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.json"
        file.write_text(json.dumps(gemma(asked)), encoding="utf-8")
        ((workload, target),) = workloads_of(
            config,
            this_device,
            1,
            model_configs={"": str(file)},
            given=Given(prompt=asked.prompt),
            only=["sft", "grpo"],
        )
    planned = {job.name: job for job in jobs(workload, target)}
    compiled = {
        name: lower(job, target).compile(compiler_options=options_of(job, target)) for name, job in planned.items()
    }
    programs = {name: read_compiled(name, each) for name, each in compiled.items()}
    return Planned(workload.model, planned, compiled, {p.name: p.peak for p in phases(workload, programs, target)})


def filled(tree: Any) -> Any:
    """Arrays of these shapes whose memory is really there: written, not promised."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    def one(x: jax.ShapeDtypeStruct) -> jax.Array:
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        return jax.device_put(np.full(x.shape, 0 if jnp.issubdtype(x.dtype, jnp.integer) else 0.01, x.dtype))

    return jax.block_until_ready(jax.tree.map(one, tree))


def run_phases(planned: Planned) -> tuple[dict[str, int], int]:
    """Bytes at the peak of each phase of a step, above what there was before the first array; numbers in the base."""
    import jax
    import jax.numpy as jnp

    from vlmalign.planning.batches import base_of
    from vlmalign.rollout.decode_weights import with_made
    from vlmalign.training.step import TrainState

    found: dict[str, int] = {}
    baseline = memory("self", "RssAnon")

    def run(phase: str, *arguments: Any, program: str | None = None) -> Any:
        with Watch(os.getpid()) as watch:
            out = jax.block_until_ready(planned.compiled[program or phase](*arguments))
        found[phase] = watch.peak - baseline
        return out

    def inputs(program: str, start: int, stop: int | None = None) -> Any:
        return filled(planned.jobs[program].arguments[start:stop])

    base, pixels = inputs("encode", 0)
    run("encode", base, pixels)
    del pixels
    (state,), (sums,) = inputs("grpo optimiser", 0, 1), inputs("sft gradients", 0, 1)
    sums, _ = run("sft gradients", sums, state.params, base, *inputs("sft gradients", 3))
    state, *_ = run("sft optimiser", state, sums, jnp.float32(1))
    del sums, _
    reference = {name: value.copy() for name, value in state.params.items()}
    # The program makes the matrices that change; the others are the base's own.
    policy = with_made(base_of(planned.model), base, run("grpo merge", base, state.params, program="merge"))
    run("grpo prefill", policy, *inputs("grpo prefill", 1))
    run("grpo decode", policy, *inputs("grpo decode", 1))
    del policy
    run("grpo reference", base, reference, *inputs("grpo reference", 2))
    (sums,) = inputs("grpo gradients", 0, 1)
    sums, _ = run("grpo gradients", sums, state.params, base, *inputs("grpo gradients", 3))
    run("grpo optimiser", TrainState(*state), sums, jnp.float32(1))
    return found, sum(value.size for value in base.values())


def measure(asked: argparse.Namespace) -> dict[str, Any]:
    """Plan, compile, run; every phase with its planned and measured bytes."""
    planned = plan(asked)
    found, parameters = run_phases(planned)
    expected = planned.expected
    rows = [
        {"phase": n, "planned_bytes": expected[n], "measured_bytes": v, "ratio": round(expected[n] / v, 3)}
        for n, v in found.items()
    ]
    planned_peak, measured_peak = max(expected.values()), max(found.values())
    return {
        "parameters": parameters,
        "planned_peak_bytes": planned_peak,
        "measured_peak_bytes": measured_peak,
        "ratio": round(planned_peak / measured_peak, 3),
        "phases": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (
        ("layers", 6), ("embed", 2048), ("ffn", 8192), ("vocab", 16_384), ("rows", 2), ("prompt", 64), ("completion", 64)
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--remat", default="none", choices=("none", "dots", "attention", "full"))
    # Before JAX is imported: what is measured is a CPU's memory.
    os.environ["JAX_PLATFORMS"] = "cpu"
    print(json.dumps(measure(parser.parse_args()), indent=2))


if __name__ == "__main__":
    main()
