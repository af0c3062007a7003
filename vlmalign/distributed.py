"""Several processes as one run: how many there are, which one this is, and how it starts and leaves.

One process runs on each host, or on each accelerator. All of them run the same program: they make the same plan from
the same seeds, each works on its share, and what was found is exchanged (`exchange.py`), so that all hold the same
values in the same order. Process 0 writes what a person reads. Nothing here does anything in a run of one process.

Where settings come from, the first that says something:

    flags of the command          --coordinator --processes --process --local-devices --heartbeat
    variables                     VLMALIGN_COORDINATOR, VLMALIGN_PROCESSES, ... (what scripts/launch_ssh.py sets)
    Open MPI, SLURM, Kubernetes   their own variables, the coordinator's address by JAX's detection

This module imports JAX only once there are processes to start.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from types import TracebackType
from typing import Any, TypeVar

Item = TypeVar("Item")

#: seconds without a sign of life after which a process counts as dead, and the others end. JAX's own default is 100.
HEARTBEAT_SECONDS = 30
#: a process that has ended its work waits this long for the others to end theirs
SHUTDOWN_SECONDS = 300

#: scheduler -> its variables for the number of processes, this one's number, its number on its host. JAX's order.
SCHEDULERS: Mapping[str, tuple[str, str, str]] = {
    "ompi": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "slurm": ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID"),
    "k8s": ("VLMALIGN_PROCESSES", "JOB_COMPLETION_INDEX", ""),
}
#: scheduler -> a variable that only processes started by it have
STARTED_BY: Mapping[str, str] = {
    "ompi": "OMPI_COMM_WORLD_SIZE",
    "slurm": "SLURM_STEP_NODELIST",
    "k8s": "JOB_COMPLETION_INDEX",
}

#: what JAX raises in a process whose peer is gone, as a RuntimeError or a ValueError: a status, and then a connection
#: that broke or heartbeats that ceased
LOST = re.compile(
    r"(?-i:[A-Z_]+): .*(heartbeat timeout|coordination service|connection (closed|reset|refused)|broken pipe|NCCL.*remote)",
    re.IGNORECASE | re.DOTALL,
)

#: exit code of a process that ends because another one has: launchers look for the cause among the others
LOST_ANOTHER = 75

_started = False


@dataclass(frozen=True)
class Processes:
    """What was said about the processes of a run; None where nothing was."""

    coordinator: str | None = None  #: "host:port" of process 0, as the others reach it
    processes: int | None = None  #: how many there are
    process: int | None = None  #: which one this is, from 0
    local_devices: str | None = None  #: "all", or numbers of this host's devices that this process uses: "0,1"
    heartbeat: int | None = None  #: seconds, see HEARTBEAT_SECONDS


def resolve(given: Processes, environment: Mapping[str, str]) -> dict[str, Any] | None:
    """The arguments of `jax.distributed.initialize`; None for a run of one process.

    Raises:
        ValueError: when only a part is said, or what is said cannot be.
    """
    said = _merged(given, environment)
    scheduler = next((name for name, mark in STARTED_BY.items() if mark in environment), None)
    count, index = said.processes, said.process
    if scheduler is not None:
        of_count, of_index, _ = SCHEDULERS[scheduler]
        count = count if count is not None else _number(environment, of_count)
        index = index if index is not None else _number(environment, of_index)
    if count == 1 or (scheduler is None and (said.coordinator, count, index) == (None, None, None)):
        return None
    if scheduler is not None and said.coordinator is None:
        _check_detection(scheduler, environment)
    missing = {"--coordinator HOST:PORT": said.coordinator, "--processes N": count, "--process I": index}
    if scheduler is not None:  # JAX asks the scheduler
        del missing["--coordinator HOST:PORT"]
        if scheduler == "k8s":
            del missing["--processes N"]
    lacking = [name for name, value in missing.items() if value is None]
    if lacking:
        raise ValueError(
            f"a run of several processes needs {', '.join(missing)}; missing: {', '.join(lacking)}. Give all of them, or "
            "none for a run of one process"
        )
    if count is not None and (count < 1 or not 0 <= index < count):
        raise ValueError(f"processes are numbered 0 .. processes - 1, found --process {index} of --processes {count}")
    if said.coordinator is not None and not re.fullmatch(r".+:\d+", said.coordinator):
        raise ValueError(f"--coordinator takes HOST:PORT of process 0, found {said.coordinator!r}")
    heartbeat = HEARTBEAT_SECONDS if said.heartbeat is None else said.heartbeat
    if heartbeat < 1:
        raise ValueError(f"--heartbeat takes seconds >= 1, found {heartbeat}")
    return {
        "coordinator_address": said.coordinator,
        "num_processes": count,
        "process_id": index,
        "local_device_ids": _local_devices(said.local_devices, scheduler, environment),
        "cluster_detection_method": scheduler if said.coordinator is None else "deactivate",
        "heartbeat_timeout_seconds": heartbeat,
        "shutdown_timeout_seconds": SHUTDOWN_SECONDS,
    }


def start(given: Processes = Processes()) -> None:
    """Join the other processes, where there are any; called before anything touches a device.

    Raises:
        ValueError: see `resolve`.
    """
    global _started
    arguments = resolve(given, os.environ)
    if arguments is None:
        return
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # Programs that do not depend on each other may otherwise run in another order in each process, and each then waits
    # in another collective for ever. Accelerators run them in the order of their streams.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    jax.distributed.initialize(**arguments)
    _started = True
    sys.excepthook = _leave_on_error


def leave(code: int, error: BaseException | None = None) -> int:
    """`code`; but a process of several that fails ends here and now: with `LOST_ANOTHER`, and saying so, if it is for the
    end of another one.

    `error` is by default the exception that is being handled.

    An ordinary exit waits for the other processes, which wait for this one's share of their next exchange. Its
    connections break as it ends, and by that the others learn of it.
    """
    if code and _started:
        if lost_another(error or sys.exception()):
            print(
                f"vlmalign: process {process_index()} cannot go on: another process of this run has ended, or cannot be "
                "reached any more; its own output says why. The run goes on from its last checkpoint when all are started "
                "again, also in another number",
                file=sys.stderr,
            )
            code = LOST_ANOTHER
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def process_count() -> int:
    """How many processes the run has."""
    import jax

    return jax.process_count() if jax.distributed.is_initialized() else 1


def process_index() -> int:
    """The number of this process, from 0."""
    import jax

    return jax.process_index() if jax.distributed.is_initialized() else 0


def is_writer() -> bool:
    """True in the one process that writes metrics, logs and results."""
    return process_index() == 0


def own_share(items: Sequence[Item]) -> Sequence[Item]:
    """This process's part of `items`: contiguous, in process order, sizes differing by one at most."""
    return items[share_of(len(items), process_index(), process_count())]


def share_of(size: int, process: int, processes: int) -> slice:
    """Which of `size` items belong to a process.

    >>> [share_of(5, process, 2) for process in range(2)]
    [slice(0, 2, None), slice(2, 5, None)]
    """
    return slice(process * size // processes, (process + 1) * size // processes)


def _leave_on_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    traceback.print_exception(kind, error, trace)
    leave(1, error)


def lost_another(error: BaseException | None) -> bool:
    """True for what JAX, Gloo and NCCL raise in a process when another one has died.

    >>> lost_another(RuntimeError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer [127.0.0.1]:11145"))
    True
    """
    return isinstance(error, RuntimeError | ValueError) and LOST.match(str(error)) is not None


def _merged(given: Processes, environment: Mapping[str, str]) -> Processes:
    """Flags before variables; of those a launcher sets none is empty."""
    return Processes(
        coordinator=given.coordinator or environment.get("VLMALIGN_COORDINATOR") or None,
        processes=_number(environment, "VLMALIGN_PROCESSES") if given.processes is None else given.processes,
        process=_number(environment, "VLMALIGN_PROCESS") if given.process is None else given.process,
        local_devices=given.local_devices or environment.get("VLMALIGN_LOCAL_DEVICES") or None,
        heartbeat=_number(environment, "VLMALIGN_HEARTBEAT") if given.heartbeat is None else given.heartbeat,
    )


def _number(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name)
    if text is not None and not re.fullmatch(r"\d+", text):
        raise ValueError(f"the variable {name} must be a whole number, found {text!r}")
    return None if text is None else int(text)


def _check_detection(scheduler: str, environment: Mapping[str, str]) -> None:
    """Raises ValueError where JAX cannot find the coordinator, saying what to do."""
    if scheduler == "ompi" and "OMPI_MCA_orte_hnp_uri" not in environment:
        raise ValueError(
            "Open MPI started this process, but from version 5 on it does not say where process 0 is; "
            "give --coordinator HOST:PORT with the first host and a free port"
        )
    if scheduler == "k8s" and find_spec("kubernetes") is None:
        raise ValueError(
            "this is a pod of an indexed Kubernetes job, whose other pods the package kubernetes finds; install it, or "
            "give --coordinator HOST:PORT and --processes N (--processes 1 for a job of one pod)"
        )


def _local_devices(said: str | None, scheduler: str | None, environment: Mapping[str, str]) -> list[int]:
    """The devices of this host that this process takes; []: all that it sees.

    JAX would take one device for each process of SLURM and Open MPI, even where there is one process for a whole host.
    Here it is one where the scheduler starts several on a host, unless it shows each of them its own device only.
    """
    if said == "all":
        return []
    if said is not None:
        if not re.fullmatch(r"\d+(,\d+)*", said):
            raise ValueError(f'--local-devices takes "all" or numbers such as 0,1, found {said!r}')
        return [int(number) for number in said.split(",")]
    if scheduler not in ("slurm", "ompi"):
        return []
    # SLURM writes 2(x3),1 for three hosts of two tasks and one of one.
    tasks = environment.get("OMPI_COMM_WORLD_LOCAL_SIZE" if scheduler == "ompi" else "SLURM_STEP_TASKS_PER_NODE", "1")
    several = max(int(number) for number in re.findall(r"(?:^|,)(\d+)", tasks)) > 1
    visible = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
    own = _number(environment, SCHEDULERS[scheduler][2])
    if not several or own is None or (visible != [""] and own >= len(visible)):
        return []
    return [own] if len(visible) != 1 or visible == [""] else []
