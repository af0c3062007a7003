"""Two and four processes train as one does, end together when one is killed, and go on in another number.

Everything is on this machine, with CPU collectives: `processes_program.py` under the ssh launcher's local transport. There
are four devices, shared out to the processes; what they are held against is one process with one device.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import QUICK

pytestmark = pytest.mark.full

TOLERANCE = 1e-5
PROCESSES = [2, 4]


def start(repository: Path, what: str, folder: Path, *, processes: int, devices: int) -> subprocess.CompletedProcess:
    """Ended with whatever exit code; `devices` are those of each process."""
    program = [sys.executable, str(repository / "tests" / "training" / "processes_program.py"), what, str(folder)]
    launcher = [sys.executable, str(repository / "scripts" / "launch_ssh.py"), "--transport", "local"]
    if processes > 1:
        program = [*launcher, "--hosts", "localhost", "--per-host", str(processes), "--", *program]
    environment = {
        **os.environ,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {QUICK}",
        "PYTHONPATH": str(repository),
    }
    return subprocess.run(
        program, env=environment, cwd=repository, capture_output=True, text=True, timeout=600, check=False
    )


@pytest.fixture(scope="module")
def trained(repository, tmp_path_factory):
    """Number of processes -> the folder of a run of all cases; each is made once."""
    folders: dict[int, Path] = {}

    def made(processes: int) -> Path:
        if processes not in folders:
            folder = tmp_path_factory.mktemp(f"{processes}-processes")
            done = start(
                repository, "train", folder, processes=processes, devices=1 if processes == 1 else 4 // processes
            )
            assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
            folders[processes] = folder
        return folders[processes]

    return made


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_same_metrics(found: list[dict], expected: list[dict]) -> None:
    assert [line.keys() for line in found] == [line.keys() for line in expected]
    for one, other in zip(found, expected, strict=True):
        for name, value in other.items():
            if value is None:
                assert one[name] is None, name
            else:
                assert abs(one[name] - value) <= TOLERANCE * max(1, abs(value)), (name, one, other)


def assert_same_params(found: Path, expected: Path) -> None:
    one, other = np.load(found), np.load(expected)
    assert sorted(one.files) == sorted(other.files)
    for name in other.files:
        gap = np.max(np.abs(one[name] - other[name]))
        assert gap <= TOLERANCE * max(1, np.max(np.abs(other[name]))), name


@pytest.mark.parametrize("processes", PROCESSES)
@pytest.mark.parametrize("kind", ["sft", "dpo", "grpo"])
def test_metrics_and_parameters_are_those_of_one_process(trained, kind, processes):
    found, expected = trained(processes) / kind, trained(1) / kind
    metrics = lines(expected / "metrics.jsonl")
    assert len(metrics) == 5
    assert_same_metrics(lines(found / "metrics.jsonl"), metrics)
    assert_same_params(found / "params.npz", expected / "params.npz")
    # Something was learnt, so that there is something to agree on.
    assert metrics[-1]["grad_norm"] > 0.01
    assert metrics[-1]["objective"] != metrics[0]["objective"]


@pytest.mark.parametrize("processes", PROCESSES)
def test_the_same_completions_and_rewards_come_from_any_number_of_processes(trained, processes):
    """Five prompts a round, so that shares differ in size; one prompt has no label, some answers cannot be scored."""
    found, expected = trained(processes) / "grpo", trained(1) / "grpo"
    assert (found / "rewards.jsonl").read_text() == (expected / "rewards.jsonl").read_text()
    ours, theirs = lines(found / "completions.jsonl"), lines(expected / "completions.jsonl")
    assert len(ours) == 5 * 5 * 3
    for one, other in zip(ours, theirs, strict=True):
        assert one.pop("advantage") == pytest.approx(other.pop("advantage"), abs=TOLERANCE)
        assert one == other
    assert len({line["completion"] for line in ours}) > 40
    scored = [line for line in lines(found / "rewards.jsonl") if "end" not in line]
    assert any(line["parts"]["near"] is None for line in scored)
    assert any(line["faults"] for line in scored)
    assert sum(line["reward"] is not None for line in scored) > 50


@pytest.mark.parametrize("processes", PROCESSES)
def test_a_checkpoint_goes_to_any_mesh_and_number_of_processes(repository, trained, processes):
    """Written by several processes, fsdp 4; every array, moments too, is exactly what was written."""
    done = start(repository, "restored", trained(processes), processes=1, devices=4)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert {name: result["same"] for name, result in found.items()} == {
        name: result["arrays"] for name, result in found.items()
    }
    assert found["one device"]["arrays"] > 30
    assert found["one device"]["cut"] == 0
    assert found["fsdp 4"]["cut"] > 15
    assert found["data 2 fsdp 2"]["cut"] > 15


def test_a_killed_process_ends_the_run_which_goes_on_in_another_number(repository, trained, tmp_path):
    begun = time.monotonic()
    done = start(repository, "killed", tmp_path, processes=4, devices=1)
    said = done.stdout + done.stderr
    assert done.returncode == 137, said[-4000:]
    assert "launch_ssh: process 1 on localhost was ended by SIGKILL" in done.stderr
    # The others ended by themselves, since their connections to it broke; none had to be told.
    assert (
        len(re.findall(r"process [023] on localhost (ended with exit code 75|was ended by SIGABRT)", done.stderr)) == 3
    )
    assert time.monotonic() - begun < 60 + 60, "starting included"
    assert time.time() - float((tmp_path / "killed_at").read_text()) < 60
    # Killed in the fourth update: the second's checkpoint is whole, and the third's line was not written yet.
    assert sorted(path.name for path in (tmp_path / "sft" / "checkpoints").iterdir()) == ["2"]
    assert len(lines(tmp_path / "sft" / "metrics.jsonl")) == 2
    done = start(repository, "sft", tmp_path, processes=2, devices=1)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "sft 1/5" not in done.stdout, "went on, not from the beginning"
    assert_same_metrics(lines(tmp_path / "sft" / "metrics.jsonl"), lines(trained(1) / "sft" / "metrics.jsonl"))
    assert_same_params(tmp_path / "sft" / "params.npz", trained(1) / "sft" / "params.npz")
