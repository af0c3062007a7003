"""`vlmalign doctor [STUDY.yaml]`: can this machine run it? One line for each thing that a run needs, with what to do.

Nothing is written, and no weights are read.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import NamedTuple

GIB = 2**30
#: below this much room a run folder is worth a word: checkpoints, answers and pages of a small study
LITTLE_DISK, LITTLE_MEMORY = 2 * GIB, 4 * GIB


class Finding(NamedTuple):
    """One thing that was looked at."""

    what: str
    found: str
    advice: str = ""  #: what to do; "" where nothing is wrong


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config", metavar="STUDY.yaml", nargs="?", help="a study, whose models, data and folder are looked at"
    )
    parser.add_argument(
        "--set", dest="overrides", metavar="a.b=c", nargs="+", action="extend", default=[], help="as for `vlmalign run`"
    )


def run(arguments: argparse.Namespace) -> None:
    """Raises ValueError, after the list, when something is wrong."""
    from vlmalign.reporting.visible_text import plain

    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # to look at a device is not to fill it
    wrong = 0
    for finding in examine(arguments.config, arguments.overrides):
        wrong += bool(finding.advice)
        print(plain(f"{'!!' if finding.advice else 'ok'}  {finding.what:18} {finding.found}"), flush=True)
        if finding.advice:
            print(plain(f"    {'':18} {finding.advice}"), flush=True)
    if wrong:
        raise ValueError(f"{wrong} of these need something; the lines marked !! say what")


def examine(config: str | None = None, overrides: Sequence[str] = ()) -> Iterator[Finding]:
    """What is found, one after the other: packages, devices, memory; of a study its file, folder, models and data."""
    yield from _packages()
    yield from _devices()
    yield _memory()
    if config is not None:
        yield from _study(config, overrides)


def _packages() -> Iterator[Finding]:
    from packaging.requirements import Requirement

    wrong = []
    try:
        needed = [Requirement(text) for text in requires("vlmalign") or ()]
    except PackageNotFoundError:
        yield Finding("packages", "vlmalign is not installed here", "pip install -e . -c constraints.txt")
        return
    for each in needed:
        if each.marker is not None and not each.marker.evaluate({"extra": ""}):
            continue
        try:
            have = version(each.name)
        except PackageNotFoundError:
            wrong.append(f"{each.name} is missing")
            continue
        if not each.specifier.contains(have, prereleases=True):
            wrong.append(f"{each.name} is {have}, needed {each.specifier}")
    told = ", ".join(f"{name} {version(name)}" for name in ("vlmalign", "jax", "transformers"))
    yield Finding("packages", "; ".join(wrong) or told, "pip install -e . -c constraints.txt" if wrong else "")


def _devices() -> Iterator[Finding]:
    import jax

    try:
        devices = jax.devices()
    except RuntimeError as error:
        yield Finding(
            "devices", f"JAX finds none: {str(error).splitlines()[0]}", "look at JAX_PLATFORMS and the driver"
        )
        return
    kinds = ", ".join(
        f"{sum(d.device_kind == k for d in devices)} x {k}" for k in dict.fromkeys(d.device_kind for d in devices)
    )
    cards = _cards()
    if cards and devices[0].platform == "cpu":
        yield Finding(
            "devices",
            f"{kinds}, though the driver shows {', '.join(cards)}",
            'pip install -e ".[cuda]" -c constraints.txt',
        )
        return
    yield Finding("devices", kinds)
    for device in devices:
        stats = device.memory_stats() or {}
        if "bytes_limit" in stats:
            free = stats["bytes_limit"] - stats.get("bytes_in_use", 0)
            busy = free < 0.8 * stats["bytes_limit"]
            yield Finding(
                f"device {device.id}",
                f"{free / GIB:.0f} GiB free of {stats['bytes_limit'] / GIB:.0f}",
                "another process uses this device; end it, or choose others with CUDA_VISIBLE_DEVICES" if busy else "",
            )


def _cards() -> list[str]:
    """The GPUs that NVIDIA's driver shows, whether JAX can use them or not."""
    try:
        said = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in said.stdout.splitlines() if line.strip()]


def _memory() -> Finding:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():  # what is kept of files is free as well
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = f"{free / GIB:.1f} GiB free of {total / GIB:.1f}, {cores} cores"
    return Finding(
        "memory", found, "end other programs; loading a model takes its size" if free < LITTLE_MEMORY else ""
    )


def _study(config: str, overrides: Sequence[str]) -> Iterator[Finding]:
    from vlmalign.inspection.inspect import inspect
    from vlmalign.studies.engine.chain import load_study
    from vlmalign.studies.engine.stage_config import AdapterStage, ModelStage

    def tried(what: str, look: Callable[[], str], advice: str) -> Finding:
        try:
            return Finding(what, look())
        except (ValueError, OSError) as error:
            return Finding(what, " ".join(str(error).split()), advice)

    try:
        study = load_study(config, list(overrides))
    except (ValueError, OSError) as error:
        yield Finding("study", str(error), "correct the file")
        return
    yield Finding(
        "study", f"{config}: {len(study.stages)} stages, {len(study.sets)} sets, {len(study.answers)} answers"
    )
    yield _folder(study.run)
    for name, stage in study.stages.items():
        if isinstance(stage, ModelStage | AdapterStage):
            path = study.place(stage.path)

            def look(path: Path = path) -> str:
                found = inspect(path)
                if found.problems:
                    raise ValueError(f"{path}: {found.problems[0]}")
                return f"{path}: {found.model_type or 'an adapter'}"

            yield tried(f"stage {name}", look, f"vlmalign inspect {path} says all that is wrong")
    for name, source in study.sources.items():
        root = study.place(getattr(source, "root", ""))
        if getattr(source, "phantom", None) is not None and not root.exists():
            yield Finding(f"source {name}", "will be invented")
            continue
        invented = any(
            getattr(other, "phantom", None) is not None and study.place(other.root) == root
            for other in study.sources.values()
        )
        if invented and not root.exists():
            yield Finding(f"source {name}", "a part of one that will be invented")
            continue

        def opened(source: object = source) -> str:
            found = source.open(study.place)
            return f"{len(found)} cases" + (f", {len(found.skipped)} skipped" if found.skipped else "")

        yield tried(f"source {name}", opened, f"look at sources.{name} in the study, and at what it names")


def _folder(run: Path) -> Finding:
    there = next(path for path in (run, *run.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    found = f"{run}: {free / GIB:.1f} GiB free"
    if not os.access(there, os.W_OK):
        return Finding(
            "run folder", f"{found}, not writable", f"make {there} writable, or choose another with --set run=FOLDER"
        )
    return Finding(
        "run folder", found, "make room, or choose another with --set run=FOLDER" if free < LITTLE_DISK else ""
    )
