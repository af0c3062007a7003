"""A plan's record as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table

GIB, MIB = 2**30, 2**20


def show(found: Mapping[str, Any], console: Console) -> None:
    """Print everything worth knowing of a `record`."""
    for each in _parts(found):
        console.print(each)


def _parts(found: Mapping[str, Any]) -> Iterator[RenderableType]:
    device, model = found["device"], found["model"]
    yield (
        f"{device['count']} x {device['title']}: {device['memory_bytes'] / GIB:.1f} GiB each, of which "
        f"{device['usable_bytes'] / GIB:.1f} are planned with; {device['flops_per_second'] / 1e12:.4g} TFLOP/s, "
        f"{device['bytes_per_second'] / 1e9:.0f} GB/s ({device['how']})"
    )
    yield (
        f"{', '.join(model['stages'])}: {model['family']}, {model['layers']} layers, "
        f"{model['parameters'] / 1e9:.3f} B parameters in {model['dtype']}, "
        f"of which {model['trained_parameters'] / 1e6:.1f} M are trained"
    )
    for each in found["lengths"]:
        said = ", ".join(f"{name} {each[f'{name}_tokens']} ({how})" for name, how in each["known"].items())
        yield f"tokens of {', '.join(each['stages'])}: {said}"
    if found["refusal"]:
        yield f"Nothing was compiled; sizes are rough estimates. {found['refusal']}"
    now, better = found["as_configured"], found["proposed"]
    yield _memory(f"as configured: {_words(now)}", now, device)
    yield _verdict(now, device)
    if found["nothing_fits"]:
        yield f"No rows and no rematerialisation fit for {', '.join(found['nothing_fits'])}: take a larger device."
    elif better is not None and _words(better) != _words(now):
        yield _memory(f"better: {_words(better)}", better, device)
        yield _verdict(better, device)
    elif better is not None:
        yield "Nothing faster fits: take these." if now["fits"] else _what_to_lower(now)
    for program in found["programs"]:
        yield from _findings(program)
    if device["count"] > 1:
        alone = [program["name"] for program in found["programs"] if not program["collectives"]]
        if alone:
            yield f"no collectives: {', '.join(alone)}"
        if found["gathered_for_rollout_bytes"]:
            yield (
                f"rollout: weights gathered to where they are read, once per rollout, "
                f"{found['gathered_for_rollout_bytes'] / GIB:.2f} GiB on each device (arithmetic)"
            )
    yield _time(
        "time, as configured" if better is None or _words(better) == _words(now) else "time, better", better or now
    )
    for text in (*(f"left out: {each}" for each in found["left_out"]), *found["limits"]):
        yield f"- {text}"


def _words(settings: Mapping[str, Any]) -> str:
    rows = settings["rows"] | {f"rollouts of {name}": rows for name, rows in settings["rollout_rows"].items()}
    return f"remat {settings['remat']}, rows " + ", ".join(f"{name} {n}" for name, n in rows.items())


def _memory(title: str, settings: Mapping[str, Any], device: Mapping[str, Any]) -> Table:
    columns = {
        "parameters": "parameters, frozen", "adapter": "trained, and gradients", "optimiser": "optimiser", "cache": "cache",
        "working": "activations and batch", "peak": "peak",
    }  # fmt: skip
    table = Table(title=f"GiB per device, {title}", title_justify="left")
    table.add_column("phase")
    for name in columns.values():
        table.add_column(name, justify="right")
    table.add_column("of device", justify="right")
    table.add_column("activations are")
    for phase in settings["memory_per_device"]:
        cells = [f"{phase[name] / GIB:.2f}" for name in columns]
        style = "bold" if phase["peak"] == settings["peak_bytes"] else None
        share = f"{phase['peak'] / device['memory_bytes']:.0%}"
        table.add_row(phase["name"], *cells, share, phase["how"], style=style)
    return table


def _verdict(settings: Mapping[str, Any], device: Mapping[str, Any]) -> str:
    peak, room = settings["peak_bytes"] / GIB, device["usable_bytes"] / GIB
    if not settings["fits"]:
        return f"Does NOT fit: {peak:.1f} GiB, where {room:.1f} may be planned with."
    highest = max(settings["memory_per_device"], key=lambda phase: phase["peak"])
    words = f"Fits: {peak:.1f} of {room:.1f} GiB."
    if highest["how"] not in ("compiled", "arithmetic"):
        words = f"Fits by an estimate ({highest['how']}): {peak:.1f} of {room:.1f} GiB; plan with these settings to be sure."
    share = settings["peak_bytes"] / device["memory_bytes"]
    # JAX reserves three quarters of a GPU unless told otherwise.
    return words if share < 0.75 else f"{words} Set XLA_PYTHON_CLIENT_MEM_FRACTION=0.95: JAX takes 0.75 otherwise."


def _what_to_lower(settings: Mapping[str, Any]) -> str:
    """Where the updates fit with these settings, and something else does not."""
    highest = max(settings["memory_per_device"], key=lambda phase: phase["peak"])
    return (
        f"No other rows or rematerialisation of updates help: {highest['name']} needs the most; lower the rows, the group "
        "or the length of its completions, or take a larger device."
    )


def _findings(program: Mapping[str, Any]) -> Iterator[str]:
    often = program["calls_per_step"]
    calls = "" if often is None else f", {often} {'call' if often == 1 else 'calls'} a step"
    for each in program["collectives"]:
        place = f" in a loop {each['loop']}" if each["loop"] else ""
        yield f"{program['name']}: {each['count']} {each['kind']}{place}, {each['bytes'] / MIB:.1f} MiB per call{calls}"
    for each in program["copies_in_loops"]:
        yield (
            f"{program['name']}: {each['count']} copies ({each['kind']}) in a loop {each['loop']}, "
            f"{each['bytes'] / GIB:.2f} GiB per call"
        )
    if program["sorts"]:
        yield f"{program['name']}: {program['sorts']} sorts"


def _time(title: str, settings: Mapping[str, Any]) -> Table:
    time = settings["time"]
    table = Table(title=f"{title} (roofline: nothing is faster)", title_justify="left")
    for name in ("work", "TFLOP", "GB", "bound by", "seconds", "times", "hours"):
        table.add_column(name, justify="left" if name in ("work", "bound by") else "right")
    for part in time["parts"]:
        seconds = part["roofline_seconds"]
        table.add_row(
            part["name"],
            f"{part['flops'] / 1e12:.3g}",
            f"{part['bytes'] / 1e9:.3g}",
            part["bound"],
            f"{seconds:.3g}",
            f"{part['times']:.6g}",
            f"{seconds * part['times'] / 3600:.3g}",
        )
    table.add_section()
    for each in time["stages"]:
        for what in ("step", "epoch"):
            if each[f"{what}_seconds"]:
                name = f"{', '.join(each['stages'])} {what}"
                table.add_row(name, "", "", "", f"{each[f'{what}_seconds']:.3g}", "", "")
    table.caption = (
        f"GPU-hours: {time['roofline_gpu_hours']:.3g} at the roofline, {time['gpu_hours']:.3g} at "
        f"{time['share_of_roofline']:.0%} of it"
    )
    table.caption_justify = "left"
    return table
