"""What .ci/run runs, by the clock and the commit: its script in a repository of stand-ins that only say that they ran."""

import os
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import half_of, pytest_collection_modifyitems

REPOSITORY = Path(__file__).resolve().parent.parent
ALWAYS = ["tests", "quickstart", "check"]
STUDIES = ["configs/a/small.yaml", "configs/b/small.yaml", "configs/c/small.yaml"]

#: each says its name, then does what the environment tells it: sleep, fail, or nothing
STAND_INS = {
    "scripts/_environment.sh": 'environment() { python="scripts/python"; }\nbrowser() { :; }\n',
    "scripts/test.sh": 'bash scripts/say tests "$@"\n',
    "scripts/quickstart.sh": "bash scripts/say quickstart\n",
    "scripts/check_quickstart.py": "import os; os.execvp('bash', ['bash', 'scripts/say', 'check'])\n",
    "scripts/python": '#!/bin/bash\nbash scripts/say "$4"\n',
    "scripts/say": 'echo "ran: $*"\n[[ "$*" == "${SLOW:-}" ]] && sleep 30\n[[ "$*" != "${BROKEN:-}" ]] || exit 3\n',
}


@pytest.fixture
def clone(tmp_path) -> Path:
    for name, text in {**STAND_INS, ".ci/run": (REPOSITORY / ".ci" / "run").read_text()}.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    (tmp_path / "scripts" / "python").chmod(0o755)
    for study in STUDIES:
        (tmp_path / study).parent.mkdir(parents=True)
        (tmp_path / study).touch()
    git(tmp_path, "init", "--quiet")
    return tmp_path


def git(folder: Path, *arguments: str) -> str:
    own = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *own, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def commit(clone: Path, *, digits: int, modulo: int) -> None:
    """Commits until the first seven digits of the hash, as a number, leave `digits` when divided by `modulo`."""
    for n in range(1000):
        git(
            clone,
            "commit",
            "--quiet",
            "--allow-empty",
            "--amend" if n else "--message=0",
            *[f"--message={n}"] * bool(n),
        )
        if int(git(clone, "rev-parse", "HEAD")[:7], 16) % modulo == digits:
            return
    raise AssertionError("no commit of a thousand has such a hash")


def run(clone: Path, **variables: str) -> tuple[int, list[str], list[str], list[str]]:
    """(exit code, what ran, what is said to have passed, what is said to have been left out)"""
    kept = {name: value for name, value in os.environ.items() if name not in ("ALL", "BEGIN_BEFORE", "END_AT")}
    done = subprocess.run(
        ["bash", ".ci/run"], cwd=clone, env={**kept, **variables}, capture_output=True, text=True, check=False
    )
    lists = [re.findall(rf"^{name}: (.+)$", done.stdout, re.MULTILINE) for name in ("ran", "passed", "left out")]
    return done.returncode, *lists


@pytest.mark.parametrize("digits", range(6))
def test_a_commit_decides_which_half_and_which_study(clone, digits):
    commit(clone, digits=digits, modulo=6)
    code, ran, passed, left_out = run(clone)
    study = digits // 2
    assert code == 0
    assert ran == [*ALWAYS, f"tests half {digits % 2}", STUDIES[study]]
    assert len(passed) == len(ran)
    others = [f"scripts/test.sh half {1 - digits % 2}", *(s for s in STUDIES if s != STUDIES[study])]
    assert left_out == [f"{name} (the turn of other commits)" for name in others]


def test_all(clone):
    commit(clone, digits=0, modulo=1)
    code, ran, passed, left_out = run(clone, ALL="1", BEGIN_BEFORE="0")
    assert (code, left_out) == (0, [])
    assert ran == [*ALWAYS, "tests half 0", "tests half 1", *STUDIES]
    assert len(passed) == len(ran)


def test_nothing_is_begun_too_late(clone):
    commit(clone, digits=0, modulo=6)
    code, ran, passed, left_out = run(clone, BEGIN_BEFORE="0")
    assert (code, ran, len(passed)) == (0, ALWAYS, 3)
    assert "scripts/test.sh half 0 (not begun: 0 minutes had passed)" in left_out
    assert f"{STUDIES[0]} (not begun: 0 minutes had passed)" in left_out
    assert len(left_out) == 5


@pytest.mark.full
def test_what_the_clock_ends_has_not_passed(clone):
    commit(clone, digits=0, modulo=6)
    code, ran, passed, left_out = run(clone, SLOW="tests half 0", BEGIN_BEFORE="6", END_AT="7")
    assert (code, ran, len(passed)) == (0, [*ALWAYS, "tests half 0"], 3)
    assert "scripts/test.sh half 0 (ended by the clock after 0 minutes)" in left_out
    assert f"{STUDIES[0]} (not begun: 0 minutes had passed)" in left_out


@pytest.mark.parametrize("broken", [*ALWAYS, "tests half 1", STUDIES[1]])
def test_a_part_that_fails_fails_the_run(clone, broken):
    commit(clone, digits=3, modulo=6)
    code, ran, passed, _ = run(clone, BROKEN=broken)
    assert code == 3
    assert ran[-1] == broken
    assert passed == [], "said at the end alone"


def test_halves_are_of_whole_files():
    """Every test marked `full` is in one half, with all others of its file; what is not marked is in neither."""

    def item(n: int, full: bool) -> SimpleNamespace:
        return SimpleNamespace(path=REPOSITORY / f"tests/{n}.py", get_closest_marker={"full": full}.get)

    items = [item(n, full) for n in range(20) for full in (True, True, False)]
    halves = []
    for half in (0, 1):
        left, dropped = list(items), []
        hook = SimpleNamespace(pytest_deselected=lambda items, dropped=dropped: dropped.extend(items))
        pytest_collection_modifyitems(SimpleNamespace(getoption=lambda name, half=half: half, hook=hook), left)
        assert len(left) + len(dropped) == len(items)
        assert all(each.get_closest_marker("full") for each in left)
        files = {each.path for each in left}
        assert len(left) == 2 * len(files)
        halves.append(files)
    assert halves[0] | halves[1] == {each.path for each in items}
    assert not halves[0] & halves[1]
    assert min(map(len, halves)) >= 5
    # By a hash that is the same in every process and on every Python.
    assert [half_of(f"tests/{n}.py") for n in range(6)] == [1, 0, 0, 1, 0, 1]


def test_long_rooms_come_first_and_files_stay_together():
    names = ["data/a", "training/b", "data/c", "studies/d"]
    items = [SimpleNamespace(path=REPOSITORY / f"tests/{name}.py", test=n) for name in names for n in range(3)]
    pytest_collection_modifyitems(SimpleNamespace(getoption=lambda name: None), items)
    assert [item.path.stem + str(item.test) for item in items] == [f"{file}{n}" for file in "dbac" for n in range(3)]
