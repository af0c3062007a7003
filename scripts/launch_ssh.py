#!/usr/bin/env python3
"""Start one command as several processes of one run, on hosts reached by ssh, and end all of them when one dies.

    scripts/launch_ssh.py --hosts node1,node2 -- vlmalign align config.yaml --run /shared/runs/first
    scripts/launch_ssh.py --hosts localhost --per-host 2 --transport local -- vlmalign align config.yaml

Each host must be reached without a password, and have this folder, Python and the run folder at the same paths. Commands
are looked for beside that Python first, so that those of its environment are found. By default there is one process on
each host, which uses all of its accelerators; with --per-host N each takes its own.

The processes meet at a free port of the first host, at the address that ssh reaches it by; --address and --port name
others, for a faster network or a firewall.

Lines of output come with the number of their process. Ctrl-C reaches all processes; a second one kills them. SIGTERM lets
them finish their step and save. The exit code is 0, that of the process that failed first (128 + the number of the signal
that ended it), 85 where all have saved, or 130. The others often end before it is known that it has: those that say that
they end for the sake of another (exit code 75, or SIGABRT by JAX) count as the first only where there is no other.

Standard library only, so that any Python 3 starts it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

#: seconds that the other processes are given to end by themselves after one has died, and again after SIGTERM
GRACE = 10
#: seconds that processes are given to end after Ctrl-C: some wait for a computation of all of them
INTERRUPTED = 20.0
#: and after SIGTERM: a run finishes its step and saves
TERMINATED = 600.0
#: a host that does not answer for half a minute counts as lost, and then its processes end by themselves (`host_side`)
LIMITS = ("BatchMode=yes", "ConnectTimeout=30", "ServerAliveInterval=10", "ServerAliveCountMax=3")
SSH = ("ssh", "-T", *(f"-o{limit}" for limit in LIMITS))
#: addresses of a host that it alone can be reached by
LOOPBACK = ("localhost", "127.0.0.1", "::1")
#: how a host's side is told to pass a signal on, and which one
SIGNALS = {"INT": signal.SIGINT, "TERM": signal.SIGTERM, "KILL": signal.SIGKILL}
#: how processes end whose only fault is that another has ended: `vlmalign.distributed.LOST_ANOTHER`, and 128 + SIGABRT
FOLLOWING = (75, 134)
#: how they end when they were told to and have saved: `vlmalign.stopping.STOPPED`
SAVED = 85
#: what usually stands behind a signal that nobody sent by hand
OFTEN = {
    "SIGKILL": " (often: out of memory)",
    "SIGABRT": " (often: JAX ended it, since another process gave no sign of life any more)",
}


class LaunchError(Exception):
    """Nothing was started, and why."""


class Ended(NamedTuple):
    """A process that has ended."""

    process: int
    code: int


class Process:
    """One process: its host's side is started here, its output read line by line."""

    def __init__(self, number: int, host: str, start: Sequence[str], job: dict[str, Any], ended: queue.Queue[Ended]):
        self.number, self.host = number, host
        # A session of its own: Ctrl-C on the terminal must reach the launcher alone, which passes it on.
        self._popen = subprocess.Popen(
            start, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )
        self._tell(json.dumps(job))
        self._ended = ended
        threading.Thread(target=self._follow, daemon=True).start()

    def send(self, name: str) -> None:
        """Pass a signal on to the process."""
        self._tell(name)

    def give_up(self) -> None:
        """Close the line to the host's side, which ends the process, and kill what runs here."""
        self._popen.kill()

    def _tell(self, line: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has ended, and its exit code says how
            self._popen.stdin.write(line.encode() + b"\n")
            self._popen.stdin.flush()

    def _follow(self) -> None:
        for line in self._popen.stdout:
            sys.stdout.write(f"[{self.number}] {line.decode(errors='replace')}")
            sys.stdout.flush()
        self._ended.put(Ended(self.number, self._popen.wait()))


def launch(arguments: argparse.Namespace) -> int:
    """Starts all processes, waits for them, and returns the exit code."""
    hosts = [host for host in arguments.hosts.split(",") if host]
    local = arguments.transport == "local"
    count = len(hosts) * arguments.per_host
    own = [arguments.python, str(Path(__file__).resolve())]
    address = arguments.address or ("127.0.0.1" if local else _address(hosts[0]))
    if not local and address in LOOPBACK and not all(_address(host) in LOOPBACK for host in hosts):
        raise LaunchError(
            f"the others cannot reach {hosts[0]} at {address}; give --address, or its name in the network"
        )
    port = arguments.port or _free_port(_on(hosts[0], [*own, "--free-port"], local=local))
    ended: queue.Queue[Ended] = queue.Queue()
    pressed: queue.Queue[int] = queue.Queue()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda found, _: pressed.put(found))
    processes = []
    for number in range(count):
        host, of_host = hosts[number // arguments.per_host], number % arguments.per_host
        environment = {
            "VLMALIGN_COORDINATOR": f"{address}:{port}",
            "VLMALIGN_PROCESSES": str(count),
            "VLMALIGN_PROCESS": str(number),
            "VLMALIGN_LOCAL_DEVICES": "all" if arguments.per_host == 1 else str(of_host),
            "VLMALIGN_HEARTBEAT": str(arguments.heartbeat),
            **{name: os.environ[name] for name in arguments.env if name in os.environ},
        }
        job = {"command": arguments.command, "directory": str(arguments.directory), "environment": environment}
        processes.append(Process(number, host, _on(host, [*own, "--host-side"], local=local), job, ended))
    return _watch(processes, ended, pressed, arguments.grace)


def _watch(processes: list[Process], ended: queue.Queue[Ended], pressed: queue.Queue[int], grace: float) -> int:
    """Waits until all have ended; after a death or Ctrl-C, ever less kindly."""
    left, interrupted = {process.number: process for process in processes}, 0
    failed: list[Ended] = []  # by themselves: before they were told to end
    told, codes = False, set()
    plan: list[tuple[float, str]] = []  # (when, signal) still to come
    while left:
        while not pressed.empty():
            found = pressed.get()
            kind = "INT" if found == signal.SIGINT else "TERM"
            if kind == "TERM" and interrupted:  # schedulers send several
                continue
            if interrupted == 128 + found:  # the second time
                kind, plan = "KILL", [(time.monotonic() + grace, "give up")]
            else:
                interrupted = interrupted or 128 + found
                plan = _schedule(INTERRUPTED if kind == "INT" else TERMINATED, grace)
            _say(f"interrupted: sending SIG{kind} to {len(left)} processes")
            _send(left, kind)
            told = True
        while plan and time.monotonic() >= plan[0][0]:
            _, kind = plan.pop(0)
            _say(f"{_names(left)} still there: {'giving up' if kind == 'give up' else 'SIG' + kind}")
            _send(left, kind)
            told = True
        try:
            end = ended.get(timeout=0.1)
        except queue.Empty:
            continue
        del left[end.process]
        codes.add(end.code)
        if not end.code:
            continue
        more = ""
        if not told:
            if not failed:
                plan = _schedule(grace, grace)
                more = f"; a run cannot go on without it, the others ({len(left)}) are ended. What it said is above"
            failed.append(end)
        _say(f"{_told(processes, end)}{more}")
    if failed:  # again, below what the others said as they ended
        cause = next((end for end in failed if _positive(end.code) not in FOLLOWING), failed[0])
        _say(
            f"the run ended because {_told(processes, cause)}. "
            "It goes on from its last checkpoint when it is started again, also with another number of processes"
        )
        return _positive(cause.code)
    return SAVED if codes and codes == {SAVED} else interrupted


def _told(processes: list[Process], end: Ended) -> str:
    return f"process {end.process} on {processes[end.process].host} {_how(end.code)}"


def _schedule(first: float, grace: float) -> list[tuple[float, str]]:
    now = time.monotonic()
    return [(now + first, "TERM"), (now + first + grace, "KILL"), (now + first + 2 * grace, "give up")]


def _send(processes: dict[int, Process], kind: str) -> None:
    for process in processes.values():
        if kind == "give up":
            process.give_up()
        else:
            process.send(kind)


def _names(processes: dict[int, Process]) -> str:
    return ", ".join(f"process {process.number} on {process.host}" for process in processes.values())


def _positive(code: int) -> int:
    return code if code >= 0 else 128 - code


def _how(code: int) -> str:
    """How a process ended, in words, from its exit code."""
    code = _positive(code)
    if code == 255:
        return "ended with exit code 255 (ssh: the host could not be reached, or the connection broke)"
    if code == FOLLOWING[0]:
        return f"ended with exit code {code} (another process of the run had ended, or could not be reached any more)"
    if code == SAVED:
        return f"was told to end, and has saved (exit code {code})"
    if code <= 128:
        return f"ended with exit code {code}"
    name = signal.Signals(code - 128).name if code - 128 in set(signal.Signals) else f"signal {code - 128}"
    return f"was ended by {name}" + OFTEN.get(name, "")


def _say(text: str) -> None:
    print(f"launch_ssh: {text}", file=sys.stderr, flush=True)


def _on(host: str, command: Sequence[str], *, local: bool) -> list[str]:
    return list(command) if local else [*SSH, host, shlex.join(command)]


def _address(host: str) -> str:
    """Where ssh finds a host: what the user calls it may be a name that only ssh's own settings know."""
    try:
        said = subprocess.run(["ssh", "-G", host], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise LaunchError(f"ssh does not say where {host} is ({error}); install ssh, or give --address") from error
    found = dict(line.split(" ", 1) for line in said.splitlines() if " " in line)["hostname"]
    return f"[{found}]" if ":" in found else found


def _free_port(ask: Sequence[str]) -> int:
    """A port that is free where `ask` runs: at one in use, these processes would join those of another run."""
    said = subprocess.run(ask, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    try:
        return int(said.stdout.split()[-1])  # a host may greet before it answers
    except (IndexError, ValueError):
        raise LaunchError(
            f"the first host named no free port ({shlex.join(ask)} {_how(said.returncode)}): "
            f"{said.stderr.strip() or said.stdout.strip() or 'no output'}"
        ) from None


def host_side() -> int:
    """Runs the job that the first line of standard input describes and passes on the signals that later lines name.

    When the line to the launcher breaks, the job is ended: no process outlives its launcher.
    """
    job = json.loads(sys.stdin.readline())
    # A shell that ssh opens for one command has seldom read the profile that says where commands are.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    try:
        child = subprocess.Popen(
            job["command"],
            cwd=job["directory"],
            env={**os.environ, "PATH": path, **job["environment"]},
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=lambda: [signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGTERM)],
        )
    except OSError as error:  # no such command or folder here, as the shell says it: 127
        print(f"launch_ssh: cannot start {job['command'][0]!r} in {job['directory']} ({error}); looked in {path}")
        return 127

    def listen() -> None:
        for line in sys.stdin:
            _signal_all(child.pid, SIGNALS[line.strip()])
        _signal_all(child.pid, signal.SIGTERM)
        time.sleep(GRACE)
        _signal_all(child.pid, signal.SIGKILL)

    threading.Thread(target=listen, daemon=True).start()
    code = _positive(child.wait())
    _signal_all(child.pid, signal.SIGKILL)  # what it started must not hold accelerators
    return code


def _signal_all(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # all of them have ended
        os.killpg(group, number)


def main() -> int:
    if sys.argv[1:] == ["--host-side"]:
        return host_side()
    if sys.argv[1:] == ["--free-port"]:
        with socket.socket() as found:
            found.bind(("", 0))
            print(found.getsockname()[1])
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--hosts", required=True, metavar="A,B", help="hosts as ssh knows them; process 0 is on the first"
    )
    parser.add_argument("--per-host", type=int, default=1, metavar="N", help="processes on each host (default 1)")
    parser.add_argument("--port", type=int, help="port of the first host where processes meet (any that is free there)")
    parser.add_argument("--address", help="where the others reach the first host (where ssh finds it)")
    parser.add_argument("--heartbeat", type=int, default=30, metavar="S", help="seconds without a sign of life (30)")
    parser.add_argument(
        "--grace",
        type=int,
        default=GRACE,
        metavar="S",
        help="seconds to end in, before SIGTERM and before SIGKILL (10)",
    )
    parser.add_argument("--directory", type=Path, default=Path.cwd(), help="working directory on the hosts (this one)")
    parser.add_argument("--env", nargs="*", default=[], metavar="NAME", help="variables of this shell to pass on")
    parser.add_argument("--python", default=sys.executable, help="Python on the hosts (the one that runs this)")
    parser.add_argument("--transport", choices=("ssh", "local"), default="ssh", help="local: all on this machine")
    parser.add_argument("command", nargs="+", metavar="-- COMMAND", help="what each process runs")
    arguments = parser.parse_args()
    if min(arguments.per_host, arguments.heartbeat, arguments.grace) < 1:
        parser.error("--per-host, --heartbeat and --grace must be >= 1")
    try:
        return launch(arguments)
    except LaunchError as error:
        _say(str(error))
        return 2


if __name__ == "__main__":
    sys.exit(main())
