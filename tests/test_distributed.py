"""Several processes: where their number is read from, what they tell each other, how launchers end them all."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from vlmalign import exchange
from vlmalign.distributed import (
    LOST_ANOTHER,
    Processes,
    is_writer,
    leave,
    lost_another,
    own_share,
    process_count,
    resolve,
    share_of,
)
from vlmalign.rewards.crew import Crew

EXPLICIT = {"VLMALIGN_COORDINATOR": "node1:29400", "VLMALIGN_PROCESSES": "4", "VLMALIGN_PROCESS": "2"}
SLURM = {
    "SLURM_JOB_ID": "70001", "SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}  # fmt: skip
OMPI = {
    "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4", "OMPI_MCA_orte_hnp_uri": "4096.0;tcp://10.0.0.1:34911",
}  # fmt: skip
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}

# ----------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"VLMALIGN_PROCESSES": "1"},
        {**SLURM, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"},
        {**OMPI, "OMPI_COMM_WORLD_SIZE": "1"},
        {**POD, "VLMALIGN_PROCESSES": "1"},
        # A shell or batch script within an allocation: no task of it.
        {name: SLURM[name] for name in ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_PROCID")},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},  # a pod of no indexed job
    ],
)
def test_a_run_of_one_process_starts_nothing(environment):
    assert resolve(Processes(), environment) is None


@pytest.mark.parametrize(
    ("given", "environment", "expected"),
    [
        (Processes(), EXPLICIT, ("node1:29400", 4, 2, [], "deactivate", 30)),
        (Processes("a:1", 2, 0, "0,3", 7), {}, ("a:1", 2, 0, [0, 3], "deactivate", 7)),
        (Processes(process=3, heartbeat=5), EXPLICIT, ("node1:29400", 4, 3, [], "deactivate", 5)),
        (Processes(), {**EXPLICIT, "VLMALIGN_LOCAL_DEVICES": "1"}, ("node1:29400", 4, 2, [1], "deactivate", 30)),
        # Two tasks a node: each takes its device; one a node: all; each shown one device only: that one.
        (Processes(), SLURM, (None, 4, 3, [1], "slurm", 30)),
        (Processes(), {**SLURM, "SLURM_STEP_TASKS_PER_NODE": "1(x4)"}, (None, 4, 3, [], "slurm", 30)),
        (Processes(), {**SLURM, "CUDA_VISIBLE_DEVICES": "5"}, (None, 4, 3, [], "slurm", 30)),
        (Processes(), {**SLURM, "CUDA_VISIBLE_DEVICES": "4,5"}, (None, 4, 3, [1], "slurm", 30)),
        (Processes(local_devices="all"), SLURM, (None, 4, 3, [], "slurm", 30)),
        (Processes("head:1"), SLURM, ("head:1", 4, 3, [1], "deactivate", 30)),
        (Processes(), OMPI, (None, 4, 1, [1], "ompi", 30)),
        # Open MPI started by SLURM: its own numbers count.
        (Processes(), {**SLURM, **OMPI}, (None, 4, 1, [1], "ompi", 30)),
        (Processes("a:1", 2), POD, ("a:1", 2, 1, [], "deactivate", 30)),
        (Processes(), POD, (None, None, 1, [], "k8s", 30)),
    ],
)
def test_what_jax_is_told(given, environment, expected, monkeypatch):
    monkeypatch.setattr("vlmalign.distributed.find_spec", lambda name: object())  # Kubernetes' package is there
    names = ("coordinator_address", "num_processes", "process_id", "local_device_ids")
    found = resolve(given, environment)
    assert tuple(found[name] for name in (*names, "cluster_detection_method", "heartbeat_timeout_seconds")) == expected


@pytest.mark.parametrize(
    ("given", "environment", "message"),
    [
        (Processes("a:1"), {}, "missing: --processes N, --process I"),
        (Processes(processes=2), {}, "missing: --coordinator HOST:PORT, --process I"),
        (Processes(process=0), {}, "missing: --coordinator HOST:PORT, --processes N"),
        (Processes("a:1", 2, 2), {}, "--process 2 of --processes 2"),
        (Processes("a:1", 0, 0), {}, "--process 0 of --processes 0"),
        (Processes("a", 2, 0), {}, "HOST:PORT of process 0, found 'a'"),
        (Processes("a:1", 2, 0, heartbeat=0), {}, "seconds >= 1, found 0"),
        (Processes("a:1", 2, 0, "0;1"), {}, "found '0;1'"),
        (Processes(), {**EXPLICIT, "VLMALIGN_PROCESS": "two"}, "VLMALIGN_PROCESS must be a whole number, found 'two'"),
        (Processes(), {k: v for k, v in OMPI.items() if "orte" not in k}, "give --coordinator HOST:PORT"),
        (Processes(), POD, "--processes 1 for a job of one pod"),
    ],
)
def test_half_of_the_settings_is_refused(given, environment, message, monkeypatch):
    monkeypatch.setattr("vlmalign.distributed.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=message.replace(".", "[.]").replace(":", "[:]")):
        resolve(given, environment)


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        # As JAX said them in a process that was left behind: by Gloo, at a barrier, and when process 0 is gone.
        (RuntimeError("UNKNOWN: Gloo all-reduce failed: [...] Connection closed by peer [127.0.0.1]:11145"), True),
        (RuntimeError("INTERNAL: Barrier failed because: [...] UNAVAILABLE: Task 1 heartbeat timeout."), True),
        (RuntimeError("UNAVAILABLE: Failed to send RPC to coordination service. Either the leader [...]"), True),
        (ValueError("UNKNOWN: Gloo AllGather failed: [...] Connection closed by peer [127.0.0.1]:9420"), True),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 8 bytes."), False),
        (ValueError("--heartbeat: the heartbeat timeout is no number"), False),
    ],
)
def test_errors_that_come_of_another_process(error, lost):
    assert lost_another(error) == lost


@pytest.mark.parametrize("size", [0, 1, 3, 4, 11])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_shares_are_contiguous_and_even(size, processes):
    items = list(range(size))
    shares = [items[share_of(size, process, processes)] for process in range(processes)]
    assert [item for share in shares for item in share] == items
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


# ----------------------------------------------------------------------------------------------------------- exchange


def test_alone_nothing_moves():
    items = [1, "a", object()]
    assert exchange.gather(items) == items
    assert exchange.gather_from(lambda: items) == items
    assert exchange.from_first(lambda: items) is items
    assert own_share(items) == items
    exchange.agree({"seed": 1}, "the config")
    assert (process_count(), is_writer(), leave(3)) == (1, True, 3)
    assert isinstance(exchange, Crew)


def test_records_arrive_as_they_were_sent():
    import ml_dtypes

    rng = np.random.default_rng(0)
    records = [
        {"tokens": rng.integers(0, 9, 5).astype(np.int32), "logp": [0.1, float("nan"), -float("inf")], "id": None},
        [rng.normal(size=(2, 0, 3)), True, "text with \0 and ü", {"deep": [np.float32(0.1) * np.ones(3, np.float32)]}],
        rng.normal(size=(2, 3)).astype(ml_dtypes.bfloat16).T,
        np.bool_([True, False]),
    ]
    found = exchange._unpacked(exchange._packed(records))
    np.testing.assert_equal(found, records)
    for one, other in ((found[0]["tokens"], records[0]["tokens"]), (found[2], records[2]), (found[3], records[3])):
        assert one.dtype == other.dtype
        assert one.flags.writeable


@pytest.mark.parametrize("value", [object(), np.array(["a"]), np.array([None]), {1: 2, "a": {3}}])
def test_what_is_no_record_is_refused(value):
    with pytest.raises(ValueError, match="JSON values and numpy arrays of numbers"):
        exchange._packed([value])


# ---------------------------------------------------------------------------------------------------------- launchers


def launch(repository, *arguments: str, **options) -> subprocess.Popen:
    script = [sys.executable, repository / "scripts" / "launch_ssh.py", "--transport", "local"]
    return subprocess.Popen(
        [*script, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=repository, **options
    )


def test_the_launcher_tells_every_process_who_it_is(repository, tmp_path):
    report = "import os; print({k: v for k, v in os.environ.items() if k.startswith('VLMALIGN_')}, os.getcwd())"
    options = ("--hosts", "a,b", "--per-host", "2", "--heartbeat", "11", "--directory", str(tmp_path))
    started = launch(repository, *options, "--", sys.executable, "-c", report)
    out, err = started.communicate(timeout=60)
    assert (started.returncode, err) == (0, "")
    for process in range(4):
        (line,) = [line for line in out.splitlines() if line.startswith(f"[{process}] ")]
        assert f"'VLMALIGN_PROCESS': '{process}'" in line
        assert f"'VLMALIGN_LOCAL_DEVICES': '{process % 2}'" in line
        assert "'VLMALIGN_PROCESSES': '4'" in line
        assert "'VLMALIGN_HEARTBEAT': '11'" in line
        assert "'VLMALIGN_COORDINATOR': '127.0.0.1:" in line
        assert line.endswith(f" {tmp_path}")


#: process 1 ends as its argument says; the others wait, and one of them hears no SIGTERM
WAITS = """
import os, signal, sys, time
me = int(os.environ["VLMALIGN_PROCESS"])
print("heartbeat", os.environ["VLMALIGN_HEARTBEAT"], "pid", os.getpid(), flush=True)
if me == 1 and sys.argv[1] != "wait":
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL) if sys.argv[1] == "killed" else sys.exit(2)
if me == 2:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
time.sleep(300)
"""


@pytest.mark.full
@pytest.mark.parametrize(
    ("how", "code", "said"),
    [("killed", 137, "was ended by SIGKILL"), ("failed", 2, "exit code 2")],
)
def test_one_that_dies_ends_all(repository, how, code, said):
    begun = time.monotonic()
    started = launch(repository, "--hosts", "a,b,c", "--grace", "2", "--", sys.executable, "-c", WAITS, how)
    out, err = started.communicate(timeout=60)
    assert time.monotonic() - begun < 45
    assert started.returncode == code
    first = err.splitlines()[0]
    assert first.startswith(f"launch_ssh: process 1 on b {'was' if how == 'killed' else 'ended with'}")
    assert said in first
    last = err.splitlines()[-1]
    assert last.startswith("launch_ssh: the run ended because process 1 on b "), "below what the others said"
    assert said in last
    assert "[0] heartbeat 30 pid " in out, "where the launcher is not told otherwise"
    assert_gone(out)


#: process 2 ends for the sake of 1, whose own end is known only half a second later; the others hear of both
FOLLOWS = """
import os, signal, sys, time
me = int(os.environ["VLMALIGN_PROCESS"])
if me == 1:
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL) if sys.argv[1] == "killed" else sys.exit(3)
if me == 2:
    sys.exit(75)
time.sleep(1)
sys.exit(75) if me == 0 else os.abort()
"""


@pytest.mark.full
@pytest.mark.parametrize(("how", "code", "said"), [("killed", 137, "SIGKILL"), ("failed", 3, "exit code 3")])
def test_the_cause_is_not_one_that_ended_for_the_sake_of_another(repository, how, code, said):
    assert LOST_ANOTHER == 75
    started = launch(repository, "--hosts", "a,b,c,d", "--", sys.executable, "-c", FOLLOWS, how)
    _, err = started.communicate(timeout=60)
    assert started.returncode == code
    lines = err.splitlines()
    assert lines[0].startswith(
        "launch_ssh: process 2 on c ended with exit code 75 (another process of the run had ended"
    )
    assert lines[-1].startswith("launch_ssh: the run ended because process 1 on b ")
    assert said in lines[-1]


def test_a_command_that_is_not_there_is_named(repository, tmp_path):
    started = launch(repository, "--hosts", "a", "--directory", str(tmp_path), "--", "no-such-command")
    out, err = started.communicate(timeout=60)
    assert started.returncode == 127
    assert f"[0] launch_ssh: cannot start 'no-such-command' in {tmp_path}" in out
    assert "process 0 on a ended with exit code 127" in err


#: stands in for ssh: settings know "a" by another name, and what follows options and the host is run here
SSH = """#!/bin/bash
if [[ $1 == -G ]]; then
    echo "user root"; echo "hostname node-of-$2"
elif [[ "$*" == *" lost "* ]]; then
    echo "connect to host lost port 22: No route to host" >&2; exit 255
else
    while [[ $1 == -* ]]; do shift; done
    exec bash -c "$2"
fi
"""


def test_over_ssh_processes_meet_where_ssh_finds_the_first_host_at_a_port_free_there(repository, tmp_path):
    (tmp_path / "ssh").write_text(SSH)
    (tmp_path / "ssh").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    script = [sys.executable, repository / "scripts" / "launch_ssh.py"]
    report = [Path(sys.executable).name, "-c", "import os; print(os.environ['VLMALIGN_COORDINATOR'])"]
    ports = set()
    for options, address in (((), r"node-of-a:\d+"), (("--address", "10.0.0.7", "--port", "29400"), "10.0.0.7:29400")):
        command = [*script, "--hosts", "a,b", *options, "--", *report]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=True)
        lines = sorted(done.stdout.splitlines())
        assert re.fullmatch(rf"\[0\] {address}", lines[0])
        assert [line.split()[1] for line in lines] == [lines[0].split()[1]] * 2
        ports.add(lines[0].rpartition(":")[2])
    assert len(ports) == 2
    command = [*script, "--hosts", "lost,a", "--", *report]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "launch_ssh: the first host named no free port" in done.stderr
    assert "No route to host" in done.stderr
    command = [*script, "--hosts", "a,b", "--address", "localhost", "--", *report]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "the others cannot reach a at localhost" in done.stderr


def assert_gone(out: str) -> None:
    pids = [int(line.split()[-1]) for line in out.splitlines() if " pid " in line]
    assert len(pids) == 3
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_an_interrupted_launcher_interrupts_all(repository):
    """Ctrl-C reaches Python's own handler in every process; a killed launcher leaves none behind."""
    started = launch(repository, "--hosts", "a,b,c", "--", sys.executable, "-c", WAITS, "wait")
    lines = [started.stdout.readline() for _ in range(3)]
    started.send_signal(signal.SIGINT)
    out, err = started.communicate(timeout=60)
    assert started.returncode == 130
    assert out.count("KeyboardInterrupt") == 3
    assert "interrupted: sending SIGINT to 3 processes" in err
    assert_gone("".join(lines))


@pytest.mark.full
def test_no_process_outlives_its_launcher(repository):
    started = launch(repository, "--hosts", "a,b,c", "--", sys.executable, "-c", WAITS, "wait")
    lines = [started.stdout.readline() for _ in range(3)]
    started.kill()
    started.communicate(timeout=60)
    end = time.monotonic() + 30  # SIGTERM at once; SIGKILL for the one that hears none
    while time.monotonic() < end:
        try:
            return assert_gone("".join(lines))
        except pytest.fail.Exception:
            time.sleep(0.5)
    assert_gone("".join(lines))


def test_the_slurm_script(repository, tmp_path):
    """Its syntax, what it would run, and, under a stand-in for srun, what it says of a task that was killed."""
    script = repository / "scripts" / "launch_slurm.sh"
    subprocess.run(["bash", "-n", script], check=True)
    shown = subprocess.run(
        [script, "--dry-run", "vlmalign", "align", "a b.yaml"], capture_output=True, text=True, check=True
    )
    assert shown.stdout.startswith("srun --label --kill-on-bad-exit=1 bash -c ")
    assert shown.stdout.rstrip().endswith(r"vlmalign align a\ b.yaml")
    (tmp_path / "srun").write_text('#!/bin/bash\nwhile [[ $1 == -* ]]; do shift; done\nSLURM_PROCID=3 exec "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for command, code, out in (
        (["bash", "-c", 'echo "$VLMALIGN_HEARTBEAT $1"', "x", "a b"], 0, "30 a b\n"),
        (["bash", "-c", "kill -9 $$"], 137, ""),
        (["bash", "-c", "exit 2"], 2, ""),
        # Told to end, as srun tells all when one fails: not the cause, which has the higher code of the two.
        (["bash", "-c", "kill $PPID $$"], 1, ""),
        # Ended for the sake of another: not the cause either.
        (["bash", "-c", "exit 75"], 1, ""),
    ):
        done = subprocess.run([script, *command], capture_output=True, text=True, env=environment, check=False)
        assert (done.returncode, done.stdout) == (code, out)
        how = {0: "", 137: "was ended by SIGKILL (often: out of memory)", 2: "ended with exit code 2"}.get(code)
        if how is None:
            how = "since another one had" if "75" in command[2] else "was told to end"
        assert how in done.stderr
        assert ("launch_slurm: process 3 on " in done.stderr) == (code != 0)
    shown = subprocess.run(
        [script, "--dry-run", "x"],
        capture_output=True,
        text=True,
        check=True,
        env={**environment, "SLURM_CPUS_PER_TASK": "8"},
    )
    assert " --cpus-per-task=8 bash -c " in shown.stdout
    assert subprocess.run([script], capture_output=True, check=False).returncode == 2


# ---------------------------------------------------------------------------------------------------------- a process
#: joins the others and tells what it got; then, as the argument says, one dies while the others compute on the host
TOGETHER = """
import json, os, signal, sys, time
import numpy as np
from vlmalign import distributed, exchange
from vlmalign.rollout.features import FeatureStore, Peers
from vlmalign.training.shared_examples import SharedBatches
from vlmalign.types import Group, Segment
distributed.start()
me = distributed.process_index()
def fail():
    if me == 1:
        raise ValueError("line 7 of rows.jsonl is broken")
    return [me]
found = {
    "gathered": exchange.gather([{"from": me, "array": np.arange(me * 1000, dtype=np.int16)}] * me),
    "first": exchange.from_first(lambda: f"made by {me}"),
    "writer": distributed.is_writer(),
    "share": distributed.own_share(list("abcde")),
}
found["gathered"] = [[item["from"], len(item["array"]), str(item["array"].dtype)] for item in found["gathered"]]
for name, call in {
    "agree": lambda: exchange.agree(["seed", me], "the config"),
    "mistake": lambda: exchange.gather_from(fail),
}.items():
    try:
        call()
    except ValueError as error:
        found[name] = str(error)
exchange.agree("same", "the config")
class Tower:
    def without_lora(self):
        return self
    def encode(self, *given):
        raise AssertionError
class Store(FeatureStore):
    def _encode_missing(self, missing):
        return {key: np.full((2, 3), ord(key), np.float32) for key in missing}
store = Store(Tower(), {}, None, peers=Peers(me, 2, exchange.gather_from))
store.features(["a", "b"] if me == 0 else ["b"])
store.share(list("abcdefghijab"))
if me == 1:
    store.share(list("jib"))  # says nothing to the other: all hold them
found["features"] = [float(part.mean()) for part in store.features(list("jabz"))]
found["encoded"] = store.encoded
def segment(length):
    return Segment(np.arange(length, dtype=np.int32), np.full(length, -1, np.int32), np.ones(length, np.float32))
class Examples(list):
    def __init__(self, items):
        super().__init__(items)
        self.taken = []
    def __getitem__(self, index):
        self.taken.append(index)
        if index == self.broken:
            raise ValueError(f"row {index} is broken")
        return super().__getitem__(index)
examples = Examples(Group(i, segment(1 + i), (segment(2),), (f"film {i}",)) for i in range(12))
examples.broken = None
batches = SharedBatches(examples, batch=5, features=None, seed=0)
found["batches"] = []
for _ in range(2):
    groups, owners = next(batches)
    found["batches"].append([[g.id, len(g.prompt), owners[g.images[0]]] for g in groups])
found["taken"] = list(examples.taken)
found["position"] = batches.get_state()
examples.broken = found["batches"][0][-1][0]
try:
    next(SharedBatches(examples, batch=5, features=None, seed=0))
except ValueError as error:
    found["broken"] = str(error)
print(json.dumps(found), flush=True)
if sys.argv[1] == "dies":
    if me == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(300)
if sys.argv[1] == "raises" and me == 0:
    raise RuntimeError("a defect")
exchange.gather([me])
"""


def together(repository, *arguments: str, heartbeat: int = 10) -> list[subprocess.Popen]:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(repository), "VLMALIGN_HEARTBEAT": str(heartbeat)}
    environment |= {"VLMALIGN_COORDINATOR": f"127.0.0.1:{port}", "VLMALIGN_PROCESSES": "2"}
    return [
        subprocess.Popen(
            [sys.executable, "-c", TOGETHER, *arguments], env={**environment, "VLMALIGN_PROCESS": str(process)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for process in range(2)
    ]  # fmt: skip


@pytest.mark.full
def test_processes_tell_each_other(repository):
    processes = together(repository, "no")
    found = []
    for process in processes:
        out, err = process.communicate(timeout=100)
        assert process.returncode == 0, err[-3000:]
        found.append(json.loads(out.splitlines()[-1]))  # Gloo writes to stdout too
    for me, own in enumerate(found):
        assert own["gathered"] == [[1, 1000, "int16"]]
        assert own["first"] == "made by 0"
        assert own["writer"] == (me == 0)
        assert own["share"] == [["a", "b"], ["c", "d", "e"]][me]
        assert "differ in the config: process 0 has ['seed', 0], process 1 has ['seed', 1]" in own["agree"]
    # Every image by one process, but "b", which both met alone, and "z", which each asks for alone at the end.
    assert found[0]["features"] == found[1]["features"] == [ord(key) for key in "jabz"]
    assert found[0]["encoded"] + found[1]["encoded"] == len("abcdefghij") + len("b") + len("zz")
    assert min(found[0]["encoded"], found[1]["encoded"]) > 3, "shared out"
    assert found[0]["mistake"] == "process 1 stopped: line 7 of rows.jsonl is broken"
    assert found[1]["mistake"] == "line 7 of rows.jsonl is broken"
    # Batches of five: two examples of each are loaded by the first, three by the second, and both have all five.
    assert found[0]["batches"] == found[1]["batches"]
    assert found[0]["position"] == found[1]["position"]
    for batch in found[0]["batches"]:
        assert [owner for _, _, owner in batch] == [0, 0, 1, 1, 1]
        assert all(length == 1 + number for number, length, _ in batch)
    for me, own in enumerate(found):
        mine = [number for batch in own["batches"] for number, _, owner in batch if owner == me]
        assert own["taken"][: len(mine)] == mine, "what the other loads is not loaded here as well"
        assert f"row {own['batches'][0][-1][0]} is broken" in own["broken"]


@pytest.mark.full
@pytest.mark.parametrize(("dead", "heartbeat"), [(0, 10), (1, 30)])
def test_a_process_that_dies_while_the_others_work_alone_ends_them_by_its_silence(repository, dead, heartbeat):
    """No connection breaks, since nothing is exchanged: the missed heartbeats tell. Process 0 keeps the record of them."""
    processes = together(repository, "dies", str(dead), heartbeat=heartbeat)
    begun = time.monotonic()
    for process in (processes[dead], processes[1 - dead]):
        process.communicate(timeout=100)
        begun = begun if process is not processes[dead] else time.monotonic()
    assert time.monotonic() - begun < 60
    assert processes[dead].returncode == -signal.SIGKILL
    assert processes[1 - dead].returncode != 0


@pytest.mark.full
def test_a_defect_in_one_process_ends_it_at_once_and_the_others_learn_of_it(repository):
    processes = together(repository, "raises")
    begun, ends, errors = time.monotonic(), [], []
    for process in processes:
        errors.append(process.communicate(timeout=100)[1])
        ends.append(time.monotonic() - begun)
    assert processes[0].returncode == 1
    assert processes[1].returncode in (LOST_ANOTHER, -signal.SIGABRT)
    assert "RuntimeError: a defect" in errors[0]
    assert "another process of this run has ended" not in errors[0]
    if processes[1].returncode == LOST_ANOTHER:  # else JAX ended it in its own words, before Python saw the error
        assert "process 1 cannot go on: another process of this run has ended" in errors[1]
    assert ends[1] - ends[0] < 60
