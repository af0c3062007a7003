"""A plan as plain data for JSON; every group of numbers says how it was come by.

"compiled": the compiler's plan for the program, never run. "drawn out": so for models with fewer layers, and from them by
what a layer adds. "arithmetic": counted from shapes. "measured": timed here.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from vlmalign.mesh import AXES
from vlmalign.planning.batches import places, size, whole
from vlmalign.planning.cost import adapter_weights
from vlmalign.planning.devices import THIS
from vlmalign.planning.memory import MARGIN, usable
from vlmalign.planning.plan import Plan, Version
from vlmalign.planning.target import COMPILER_OPTIONS, Target, build_sizes
from vlmalign.planning.workload import Workload

LIMITS = (
    "No kernel was tried on a GPU: a run there may choose others, with workspaces of some MiB."
    + (
        ""
        if COMPILER_OPTIONS["xla_gpu_enable_triton_gemm"]
        else " This version of JAX plans products on cuBLAS alone, and too little where nothing is rematerialised (12 % "
        "less than an H200 took for an update of MedGemma-4B, of which 0.11 foresees all but 1 %)."
    ),
    "What is drawn out can be far from the program of the whole model (gradients of MedGemma-4B on 8 H100, a row on each, "
    "remat full: 2.6 GiB beside their arguments where the whole program takes 8.4): plan with the settings that you take.",
    "cuDNN's attention is planned with, but whether a version of it takes these shapes shows only on the GPU.",
    "Times are rooflines of weights, caches and products: activations, samplers, hosts and links between devices come "
    "on top.",
)


def record(plan: Plan, *, share: float) -> dict[str, Any]:
    """Everything a plan says; `share` is of the roofline, for the GPU-hours to expect."""
    target, workload = plan.target, plan.now.workload
    device, model = target.device, workload.model
    return {
        "device": {
            "name": device.name,
            "title": device.title,
            "count": target.count,
            "memory_bytes": device.memory,
            "usable_bytes": usable(device.memory),
            "margin": MARGIN,
            "axes": dict(zip(AXES, build_sizes(target.axes, target.count), strict=True)),
            "bytes_per_second": device.bandwidth,
            "flops_per_second": device.flops[model.dtype],
            "how": "measured" if device.name == THIS else "data sheet",
        },
        "method": "compiled" if plan.programs else "arithmetic",
        "versions": {name: version(name) for name in ("jax", "jaxlib")},
        "refusal": target.refusal,
        "model": {
            "stages": list(workload.bases),
            "family": model.config.family,
            "layers": len(model.config.decoder.layers),
            "parameters": sum(value.size for value in whole(model).values()),
            "trained_parameters": adapter_weights(model) if workload.stages else 0,
            "dtype": model.dtype,
        },
        "lengths": [
            {
                "stages": list(update.stages),
                "prompt_tokens": update.lengths.prompt,
                "answer_tokens": update.lengths.answer,
                "completion_tokens": update.lengths.completion,
                "known": dict(update.lengths.known),
            }
            for update in workload.stages
        ],
        "as_configured": _settings(plan.now, target, share),
        "proposed": None if plan.better is None else _settings(plan.better, target, share),
        "tried": [
            {"stage": choice.stage, **t.candidate._asdict(), "peak_bytes": t.peak, "fits": t.fits, "how": t.how}
            for choice in plan.choices
            for t in choice.tried
        ],
        "nothing_fits": [choice.stage for choice in plan.choices[-1:] if plan.better is None],
        "programs": [
            {
                "name": program.name,
                "how": program.how,
                **{f"{name}_bytes": value for name, value in program.memory._asdict().items()},
                "collectives": [each._asdict() for each in program.findings.collectives],
                "copies_in_loops": [each._asdict() for each in program.findings.copies],
                "library_calls": program.findings.calls,
                "sorts": program.findings.sorts,
                "launches_per_round": program.launches,
                "calls_per_step": _calls(program.name, workload),
                "compile_seconds": round(program.seconds, 1),
            }
            for program in plan.programs.values()
        ],
        "gathered_for_rollout_bytes": _gathered(plan),
        "left_out": list(workload.left_out),
        "limits": list(LIMITS),
    }


def _calls(program: str, workload: Workload) -> int | None:
    """How often an optimiser step calls this program; None where that is not per step."""
    for update in workload.stages:
        if program in (f"{update.name} gradients", f"{update.name} reference"):
            return update.micro_batches
        if program == f"{update.name} optimiser":
            return 1
    return None


def _gathered(plan: Plan) -> int:
    """Bytes of the weights that a rollout reads on each device where training has cut them otherwise; 0 where not."""
    target, model = plan.target, plan.now.workload.model
    samples = any(update.rollout is not None for update in plan.now.workload.stages)
    if target.mesh is None or not samples or (target.axes.fsdp, target.sampling_axes.tensor) == (1, 1):
        return 0
    return size(places(target, model).sampled(whole(model)))


def _settings(version: Version, target: Target, share: float) -> dict[str, Any]:
    (workload, phases, times), device = version, target.device
    return {
        "remat": workload.model.remat,
        "rows": {update.name: update.rows for update in workload.stages},
        "rollout_rows": {update.name: update.rollout.rows for update in workload.stages if update.rollout is not None},
        "fits": version.peak.peak <= usable(device.memory),
        "peak_bytes": version.peak.peak,
        "memory_per_device": [{**phase._asdict(), "peak": phase.peak} for phase in phases],
        "time": {
            "how": "arithmetic",
            "parts": [
                {
                    "name": part.name,
                    "flops": part.cost.flops,
                    "bytes": part.cost.bytes,
                    "bound": part.cost.bound(device, workload.model.dtype),
                    "roofline_seconds": part.seconds,
                    "times": part.times,
                }
                for part in times.parts
            ],
            "stages": [
                {"stages": list(each.stages), "step_seconds": each.step, "epoch_seconds": each.epoch}
                for each in times.stages
            ],
            "roofline_gpu_hours": times.hours(target.count, 1.0),
            "share_of_roofline": share,
            "gpu_hours": times.hours(target.count, share),
        },
    }
