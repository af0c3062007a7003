"""Jobs traced and compiled for a target, never run, and what the compiler says of them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax

from vlmalign.planning.graphs import compile_with_listing, launches_per_round
from vlmalign.planning.hlo import Findings, read_program
from vlmalign.planning.jobs import Job
from vlmalign.planning.kernels import KEPT_IN
from vlmalign.planning.target import GRAPH_SIZE, Target, tracing


class Memory(NamedTuple):
    """Bytes on one device, as the compiler plans them."""

    arguments: int
    outputs: int
    temporary: int
    aliased: int  #: of the outputs: written over arguments that are given away

    @property
    def beyond(self) -> int:
        """What a call needs beside its arguments."""
        return self.outputs - self.aliased + self.temporary


@dataclass(frozen=True)
class Program:
    """One compiled program."""

    name: str
    memory: Memory
    findings: Findings
    seconds: float  #: tracing and compiling
    launches: tuple[str, ...] | None = None  #: of a loop over tokens on a GPU, per round: see `graphs`
    how: str = "compiled"  #: "compiled", or from which depths it was drawn out: see `depth`


def lower(job: Job, target: Target) -> jax.stages.Lowered:
    """The job's function traced for the target, ready for its compiler."""
    with tracing(target, job.mesh), _no_places():
        return jax.jit(job.function, donate_argnums=job.donated).trace(*job.arguments).lower()


@contextmanager
def _no_places() -> Iterator[None]:
    """Within, programs do not record the line of Python that each instruction is from: 5 to 10 % of the compile time."""
    before = jax.config.jax_traceback_in_locations_limit
    jax.config.update("jax_traceback_in_locations_limit", 0)
    try:
        yield
    finally:
        jax.config.update("jax_traceback_in_locations_limit", before)


def options_of(job: Job, target: Target) -> dict[str, Any]:
    """What the compiler is told."""
    told = {**target.options, **job.options}
    if job.counted:
        told.pop(GRAPH_SIZE, None)
    return told


def compile_all(jobs: Sequence[Job], target: Target, say: Callable[[str], None]) -> dict[str, Program]:
    """Every job's program. Tracing takes its turn; compiling runs beside it, a program per core."""
    with ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
        waiting: list[Future[Program]] = []
        for job in jobs:
            started = time.perf_counter()
            waiting.append(pool.submit(_compile, job, lower(job, target), target, started))
        found = {}
        for future in waiting:
            program = future.result()
            found[program.name] = program
            say(f"compiled {program.name}: {program.seconds:.0f} s")
    return found


def _compile(job: Job, lowered: jax.stages.Lowered, target: Target, started: float) -> Program:
    launches = None
    with _kernels_kept(target) as kept:
        options = options_of(job, target) | kept
        if job.counted:
            compiled, listing = compile_with_listing(lowered, options)
            launches = launches_per_round(listing)
        else:
            compiled = lowered.compile(compiler_options=options)
    program = read_compiled(job.name, compiled)
    return replace(program, seconds=time.perf_counter() - started, launches=launches)


@contextmanager
def _kernels_kept(target: Target) -> Iterator[dict[str, Any]]:
    """Within, what the compiler is told about a file for kernels; nothing, of devices that are here."""
    if target.kernels is None:
        yield {}
        return
    with target.kernels.borrowed() as file:
        yield {KEPT_IN: str(file)}


def read_compiled(name: str, compiled: jax.stages.Compiled) -> Program:
    """What is known of a compiled program."""
    stats = compiled.memory_analysis()
    memory = Memory(
        stats.argument_size_in_bytes, stats.output_size_in_bytes, stats.temp_size_in_bytes, stats.alias_size_in_bytes
    )
    return Program(name, memory, read_program(compiled.as_text()), 0.0)
