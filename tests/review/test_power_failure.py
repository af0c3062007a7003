"""A power failure: the database cut back to what was last synced to the disk still holds every vote that was acknowledged.

A library that is loaded before libc keeps, beside each file, a copy of it as it was at its last fsync: what a disk without
power is sure to hold. SQLite's own file is followed through all its steps, checkpoints too.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>
static void keep(int fd) {
  char link[64], path[4096], copy[4200], block[65536];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t n = readlink(link, path, sizeof path - 1);
  if (n <= 0) return;
  path[n] = 0;
  if (!strstr(path, "reader_study.sqlite")) return;
  snprintf(copy, sizeof copy, "%s.synced", path);
  int to = open(copy, O_CREAT | O_WRONLY | O_TRUNC, 0600);
  off_t at = 0;
  while ((n = pread(fd, block, sizeof block, at)) > 0) { if (write(to, block, n) != n) _exit(9); at += n; }
  close(to);
}
int fsync(int fd) { int (*real)(int) = dlsym(RTLD_NEXT, "fsync"); int done = real(fd); if (!done) keep(fd); return done; }
int fdatasync(int fd) { int (*real)(int) = dlsym(RTLD_NEXT, "fdatasync"); int done = real(fd); if (!done) keep(fd); return done; }
"""

PROGRAM = """
import os, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from reader_studies import begin
from vlmalign.review import votes
study, record, _ = begin(Path(sys.argv[2]))
with record.reading() as connection:
    connection.execute("PRAGMA wal_autocheckpoint = 20")  # several checkpoints in these few votes
    if sys.argv[3] == "off":
        connection.execute("PRAGMA synchronous = OFF")
judged = {"criteria": dict.fromkeys(study.protocol.form.criteria, 1), "harm_extent": 0, "harm_likelihood": 0}
whole = {"preference": "A", "confidence": 0, "answers": {"A": judged, "B": judged}, "comment": "x" * 3000}
for number in range(30):
    page = votes.current(record, "R01")
    change = votes.Change(page.place.position, page.revision, f"key-{number:08}", 10, whole)
    votes.close(record, study, "R01", change)
    print(page.place.position, flush=True)
os._exit(0)  # nothing is closed, nothing is tidied up
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs Linux and a C compiler, to see what is synced")
    folder = tmp_path_factory.mktemp("shim")
    (folder / "shim.c").write_text(SHIM)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", "shim.so", "shim.c", "-ldl"], cwd=folder, check=True)
    return folder / "shim.so"


def acknowledged_and_kept(folder: Path, shim: Path, synchronous: str) -> tuple[list[int], list[int]]:
    """Positions that were answered, and those that the synced copies hold as closed."""
    from reader_studies import write_study

    from vlmalign.review import audit
    from vlmalign.review.database import open_database
    from vlmalign.review.outcomes import votes

    path = write_study(folder, cases=40, design={"guesses": 0})
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(Path(__file__).parent), str(path), synchronous],
        env={**os.environ, "LD_PRELOAD": str(shim)},
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    after = folder / "after"
    after.mkdir()
    for file in (folder / "record").glob("*.synced"):
        if not file.with_name(file.name.removesuffix(".synced")).exists():
            continue  # a journal that was deleted when it was done with
        shutil.copy(file, after / file.name.removesuffix(".synced"))
    assert {file.name for file in after.iterdir()} == {"reader_study.sqlite", "reader_study.sqlite-wal"}
    record = open_database(after)
    audit.events(record)
    kept = [vote.place.position for vote in votes(record) if vote.closed_at is not None]
    return [int(line) for line in done.stdout.split()], kept


@pytest.mark.full
def test_every_acknowledged_vote_outlives_a_power_failure(tmp_path, shim):
    answered, kept = acknowledged_and_kept(tmp_path, shim, "full")
    assert answered == list(range(1, 31))
    assert kept == answered


@pytest.mark.full
def test_the_test_sees_votes_that_were_not_synced(tmp_path, shim):
    """With synchronous=OFF, which the record never uses, nothing of them would be left."""
    answered, kept = acknowledged_and_kept(tmp_path, shim, "off")
    assert len(answered) == 30
    assert kept == []
