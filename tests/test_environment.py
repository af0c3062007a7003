"""What is installed: pins and ranges agree for every supported Python, and the scripts say clearly what is wrong."""

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

REPOSITORY = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LINES = [line for line in (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines() if line.strip()]
PINS = [Requirement(line) for line in LINES if not line.startswith("#")]
SCRIPTS = [*sorted((REPOSITORY / "scripts").glob("*.sh")), REPOSITORY / ".ci" / "run"]


def pinned(python: str) -> dict[str, Version]:
    """The one version of each package that the constraints allow on this Python."""
    versions: dict[str, Version] = {}
    for pin in PINS:
        if pin.marker is None or pin.marker.evaluate({"python_version": python, "python_full_version": f"{python}.0"}):
            (specifier,) = pin.specifier
            assert specifier.operator == "==", f"{pin}: a constraint is one exact version"
            name = canonicalize_name(pin.name)
            assert name not in versions, f"{name} is pinned twice for Python {python}"
            versions[name] = Version(specifier.version)
    return versions


@pytest.mark.parametrize("python", ["3.11", "3.12"])
def test_every_dependency_has_a_pin_within_its_range(python):
    versions = pinned(python)
    for text in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["test"]:
        requirement = Requirement(text)
        version = versions[canonicalize_name(requirement.name)]
        assert version in requirement.specifier, f"{requirement.name} {version} is outside {requirement.specifier}"


def test_each_python_has_its_jax():
    old, new = pinned("3.11"), pinned("3.12")
    assert (old["jax"], new["jax"]) == (Version("0.10.2"), Version("0.11.2"))
    assert old["jax"] == old["jaxlib"]
    assert new["jax"] == new["jaxlib"]
    assert {name for name in old if old[name] != new.get(name)} == {"jax", "jaxlib", "flax"}
    assert old.keys() == new.keys()


def test_constraints_name_versions_only():
    for line in LINES:
        assert line.startswith("#") or re.fullmatch(r"[\w.-]+==[\w.]+(; python_version (<|>=) \"3\.12\")?", line), line


def test_licence_is_the_one_declared():
    assert PROJECT["license"] == "Apache-2.0"
    assert "Apache License" in (REPOSITORY / "LICENSE").read_text(encoding="utf-8")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_parses(script):
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def source_environment(command: str, **variables: str) -> subprocess.CompletedProcess:
    """Run `command` in a shell that has scripts/_environment.sh, with no virtual environment active."""
    environment = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    return subprocess.run(
        ["bash", "-c", f'set -euo pipefail; source "{REPOSITORY}/scripts/_environment.sh"; {command}'],
        env=environment | variables,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def old_python(tmp_path):
    """An environment whose interpreter is too old: it fails every version check and says 3.9."""
    path = tmp_path / "bin" / "python"
    path.parent.mkdir()
    path.write_text('#!/bin/sh\n[ "$1" = --version ] && { echo Python 3.9.1; exit 0; }\nexit 1\n')
    path.chmod(0o755)
    return path


def test_an_old_python_is_refused_by_name(old_python):
    done = source_environment("find_python", PYTHON=str(old_python))
    assert done.returncode == 1
    assert f"error: vlmalign needs Python 3.11 or newer; {old_python} is: Python 3.9.1." in done.stderr


def test_an_old_active_environment_is_refused(old_python):
    done = source_environment("environment run", VIRTUAL_ENV=str(old_python.parent.parent))
    assert done.returncode == 1
    assert f"the active environment {old_python.parent.parent} has Python 3.9.1. Leave it" in done.stderr


def test_a_newer_python_beside_an_old_one_is_found(tmp_path, old_python):
    (old_python.parent / "python3").symlink_to(old_python)
    recent = old_python.parent / "python3.12"
    recent.write_text("#!/bin/sh\nexit 0\n")
    recent.chmod(0o755)
    done = source_environment("find_python", PYTHON="", PATH=f"{old_python.parent}{os.pathsep}{os.environ['PATH']}")
    assert done.stdout.strip() == "python3.12"


@pytest.mark.parametrize(("asked", "expected"), [("1", "unset /a folder/bytecode"), ("", "unset unset")])
def test_byte_code_is_kept_with_the_environment_where_it_may_not_lie_beside_the_sources(asked, expected):
    shown = 'echo "${PYTHONDONTWRITEBYTECODE:-unset} ${PYTHONPYCACHEPREFIX:-unset}"'
    done = source_environment(
        f'unset PYTHONPYCACHEPREFIX; keep_byte_code "/a folder/bytecode"; {shown}', PYTHONDONTWRITEBYTECODE=asked
    )
    assert done.stdout.strip() == expected
