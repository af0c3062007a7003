"""A plan as plain data for JSON; every group of numbers says how it was come by.

"compiled": the compiler's plan for the program, never run. "drawn out": so for models with fewer layers, and from them by
what a layer adds. "arithmetic": counted from shapes. "measured": timed here. "assumed": given, or the stated guess.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from vlmalign.mesh import AXES
from vlmalign.planning.batches import places, size, whole
from vlmalign.planning.cost import adapter_weights
from vlmalign.planning.devices import THIS, Device
from vlmalign.planning.memory import MARGIN, Phase
from vlmalign.planning.plan import Plan
from vlmalign.planning.schedule import Times
from vlmalign.planning.target import COMPILER_OPTIONS, build_sizes
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
    target, workload = plan.target, plan.workload
    device, model = target.device, workload.model
    return {
        "device": {
            "name": device.name,
            "title": device.title,
            "count": target.count,
            "memory_bytes": device.memory,
            "usable_bytes": plan.usable,
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
            "family": model.config.family,
            "layers": len(model.config.decoder.layers),
            "parameters": sum(value.size for value in whole(model).values()),
            "trained_parameters": adapter_weights(model),
            "dtype": model.dtype,
        },
        "lengths": {
            "how": "assumed",
            "prompt_tokens": workload.lengths.prompt,
            "answer_tokens": workload.lengths.answer,
            "completion_tokens": workload.lengths.completion,
            "known": workload.lengths.known,
        },
        "fits": plan.fits,
        "peak_bytes": plan.peak.peak,
        "as_configured": _settings(plan, workload, plan.phases, plan.times, share),
        "proposed": None
        if plan.proposed is None
        else _settings(plan, plan.proposed, plan.proposed_phases, plan.proposed_times, share),
        "tried": [
            {"stage": choice.stage, **t.candidate._asdict(), "peak_bytes": t.peak, "fits": t.fits, "how": t.how}
            for choice in plan.choices
            for t in choice.tried
        ],
        "nothing_fits": [choice.stage for choice in plan.choices[-1:] if plan.proposed is None],
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
    target, model = plan.target, plan.workload.model
    if plan.workload.rollout is None or target.mesh is None:
        return 0
    if (target.axes.fsdp, target.sampling_axes.tensor) == (1, 1):
        return 0
    return size(places(target, model).sampled(whole(model)))


def _settings(plan: Plan, workload: Workload, phases: tuple[Phase, ...], times: Times, share: float) -> dict[str, Any]:
    device, count = plan.target.device, plan.target.count
    peak = max(phase.peak for phase in phases)
    return {
        "remat": workload.model.remat,
        "sft_rows": workload.sft and workload.sft.rows,
        "grpo_rows": workload.grpo and workload.grpo.rows,
        "rollout_rows": workload.rollout and workload.rollout.rows,
        "fits": peak <= plan.usable,
        "peak_bytes": peak,
        "memory_per_device": [{**phase._asdict(), "peak": phase.peak} for phase in phases],
        "time": {
            "how": "arithmetic",
            "parts": [
                {
                    "name": part.name,
                    "flops": part.cost.flops,
                    "bytes": part.cost.bytes,
                    "bound": _bound(part.cost.flops, part.cost.bytes, device, workload.model.dtype),
                    "roofline_seconds": part.seconds,
                    "times": part.times,
                }
                for part in times.parts
            ],
            "first": "SFT" if workload.sft is None else workload.sft.name.upper(),
            "sft_step_seconds": times.sft_step,
            "sft_epoch_seconds": times.sft_epoch,
            "grpo_step_seconds": times.grpo_step,
            "grpo_epoch_seconds": times.epoch,
            "roofline_gpu_hours": times.hours(count, 1.0),
            "share_of_roofline": share,
            "gpu_hours": times.hours(count, share),
        },
    }


def _bound(flops: float, moved: float, device: Device, dtype: str) -> str:
    return "operations" if flops / device.flops[dtype] >= moved / device.bandwidth else "bandwidth"
