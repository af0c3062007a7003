"""One process at a time works on an artefact: a dead one's lock is taken at once, another machine's after two minutes, and
whoever was taken over stops before it writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from vlmalign.studies.engine import owner
from vlmalign.studies.engine.owner import OWNERS, Lost, Owners

NAME = "stages/sft"
HOLDER = """
import sys, time
from pathlib import Path
from vlmalign.studies.engine.owner import Owners
owners = Owners(Path(sys.argv[1])).__enter__()
print(owners.claim(sys.argv[2]), flush=True)
time.sleep(600)
"""


@pytest.fixture
def other(tmp_path):
    """Another process that holds `NAME`."""
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path), NAME], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"None\n"
        yield process
        process.kill()


def lock_of(run: Path) -> Path:
    return run / OWNERS / NAME


def from_elsewhere(run: Path, *, silent: float) -> None:
    """The lock of a process on another machine, not touched for `silent` seconds."""
    found = json.loads(lock_of(run).read_text()) | {"host": "node7", "machine": "another boot", "token": "theirs"}
    lock_of(run).write_text(json.dumps(found))
    then = time.time() - silent
    os.utime(lock_of(run), (then, then))


def test_what_is_claimed_is_given_up_at_the_end_and_nothing_is_left(tmp_path):
    with Owners(tmp_path) as owners:
        assert owners.claim(NAME) is None
        assert owners.claim(NAME) is None, "it is this run's already"
        owners.check(NAME)
        assert json.loads(lock_of(tmp_path).read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_a_second_start_is_told_who_has_it(tmp_path, other):
    with Owners(tmp_path) as owners:
        held = owners.claim(NAME)
        assert held.here
        assert str(held) == f"process {other.pid} on {held.owner.host}"
        assert owners.claim("stages/dpo") is None, "other artefacts are free"
    assert lock_of(tmp_path).exists()


def test_a_dead_process_is_seen_at_once(tmp_path, other):
    other.kill()
    time.sleep(0.2)  # it is a zombie now: nobody has asked for its exit code
    with Owners(tmp_path) as owners:
        assert owners.claim(NAME) is None


def test_a_process_id_that_is_used_again_is_another_process(tmp_path, other):
    found = json.loads(lock_of(tmp_path).read_text()) | {"started": "1"}
    lock_of(tmp_path).write_text(json.dumps(found))
    with Owners(tmp_path) as owners:
        assert owners.claim(NAME) is None


@pytest.mark.parametrize(("silent", "taken"), [(0, False), (100, False), (130, True)])
def test_another_machine_is_given_two_minutes(tmp_path, silent, taken):
    with Owners(tmp_path) as first:
        first.claim(NAME)
        from_elsewhere(tmp_path, silent=silent)
        with Owners(tmp_path) as second:
            held = second.claim(NAME)
            assert (held is None) == taken
            if not taken:
                assert not held.here
                assert abs(held.silent - silent) < 5
                assert str(held).startswith("process ")
                assert "on node7, last seen" in str(held)


def test_the_age_of_a_lock_is_told_by_the_clock_of_the_files(tmp_path, monkeypatch):
    with Owners(tmp_path) as first:
        first.claim(NAME)
        from_elsewhere(tmp_path, silent=0)
        monkeypatch.setattr(owner.time, "time", lambda: 1e10)  # this machine's clock is far ahead
        assert Owners(tmp_path).claim(NAME) is not None


def test_take_over_and_the_one_that_was_taken_over(tmp_path, other):
    with Owners(tmp_path) as first:
        first.claim("stages/dpo")
        with Owners(tmp_path, take_over=True) as second:
            assert second.claim(NAME) is None
            assert second.claim("stages/dpo") is None
            with pytest.raises(Lost, match=rf"stages/dpo is no longer this process's: process {os.getpid()} on"):
                first.check("stages/dpo")
            first.release("stages/dpo")
            second.check("stages/dpo")


def test_a_lock_that_is_gone_is_not_this_process_s(tmp_path):
    with Owners(tmp_path) as owners:
        owners.claim(NAME)
        lock_of(tmp_path).unlink()
        with pytest.raises(Lost, match="its lock is gone"):
            owners.check(NAME)


def test_a_lock_is_touched_while_it_is_held(tmp_path, monkeypatch):
    monkeypatch.setattr(owner, "TOUCH_SECONDS", 0.05)
    with Owners(tmp_path) as owners:
        owners.claim(NAME)
        os.utime(lock_of(tmp_path), (0, 0))
        deadline = time.monotonic() + 10
        while lock_of(tmp_path).stat().st_mtime == 0:
            assert time.monotonic() < deadline
            time.sleep(0.02)


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("left", [False, True])
def test_of_many_that_try_at_once_one_gets_it(tmp_path, monkeypatch, links, left):
    """Also where the lock of a dead process lies there, and on file systems without hard links."""
    if left:
        with Owners(tmp_path) as first:
            first.claim(NAME)
            dead = lock_of(tmp_path).read_text()
        lock_of(tmp_path).parent.mkdir(parents=True)
        lock_of(tmp_path).write_text(json.dumps(json.loads(dead) | {"started": "1"}))
    if not links:

        def refuse(*names):
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(owner.os, "link", refuse)
    everyone = [Owners(tmp_path) for _ in range(8)]
    gate = threading.Barrier(len(everyone))
    found = [None] * len(everyone)

    def run(index: int) -> None:
        gate.wait()
        found[index] = everyone[index].claim(NAME)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(everyone))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = []
    for index, each in enumerate(everyone):
        if found[index] is None:
            try:
                each.check(NAME)
                winners.append(index)
            except Lost:
                pass
    assert len(winners) == 1
    for each in everyone:
        each.__exit__()
    assert not (tmp_path / OWNERS).exists()


def test_a_lock_that_is_not_written_yet_is_somebody_s(tmp_path):
    lock_of(tmp_path).parent.mkdir(parents=True)
    lock_of(tmp_path).touch()
    with Owners(tmp_path) as owners:
        assert str(owners.claim(NAME)).startswith("process 0 on an unknown machine")


def test_starts_that_end_at_once_do_not_trip_over_each_other(tmp_path):
    """One tidies up what another is looking through; a process that held nothing leaves all as it is."""
    for _ in range(20):
        everyone = [Owners(tmp_path) for _ in range(8)]
        for number, each in enumerate(everyone):
            each.claim(f"stages/{number}")
        failed: list[BaseException] = []

        def end(each: Owners, failed: list[BaseException] = failed) -> None:
            try:
                each.__exit__()
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=end, args=(each,)) for each in everyone]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failed == []
        assert not (tmp_path / OWNERS).exists()
    with Owners(tmp_path) as held:
        held.claim(NAME)
        Owners(tmp_path).__exit__()
        held.check(NAME)
