"""The house's rules that a machine can check: format, lint, docstrings and their examples, the list of modules, configs."""

import ast
import doctest
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
MODULES = sorted((REPOSITORY / "vlmalign").rglob("*.py"))
CONFIGS = sorted((REPOSITORY / "configs").rglob("*.yaml"))


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


def ids(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


@pytest.mark.parametrize("arguments", [["format", "--check"], ["check"]], ids=" ".join)
def test_ruff_is_clean(arguments):
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *arguments, "--quiet", "--output-format", "concise", "."],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_module_says_what_it_is_for():
    silent = [ids(path) for path in MODULES if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))]
    assert silent == []


@pytest.mark.parametrize("path", [path for path in MODULES if ">>> " in path.read_text(encoding="utf-8")], ids=ids)
def test_examples_in_docstrings(path):
    # Collected from the source: doctest's own finder passes over functions that the shape checks have wrapped.
    module = importlib.import_module(name_of(path))
    runner, failures = doctest.DocTestRunner(), []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        name, text = getattr(node, "name", "module"), ast.get_docstring(node, clean=False) or ""
        example = doctest.DocTestParser().get_doctest(text, vars(module).copy(), name, str(path), 0)
        runner.run(example, out=failures.append)
    assert runner.tries > 0
    assert not failures, "".join(failures)


def test_the_architecture_page_lists_the_modules_as_they_are():
    done = subprocess.run(
        [sys.executable, "scripts/list_modules.py", "--check"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def kept_texts() -> dict[str, str]:
    """The text files that are, or would be, under version control."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=REPOSITORY,
        capture_output=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("not a git checkout: which files belong to the project is not known")
    texts = {}
    for name in listed.stdout.decode().split("\0"):
        path = REPOSITORY / name
        if name and path.is_file():
            content = path.read_bytes()
            if b"\0" not in content[:8192]:
                texts[name] = content.decode("utf-8", errors="replace")
    return texts


# A path on somebody's machine; a package registry's address: installing is the reader's own pip's business.
MACHINE_PATH = re.compile(r"(?<![\w.~})$/-])/(?:home|root|work|opt|Users|mnt|scratch)/[\w.]")
REGISTRY = re.compile(r"(?i)\b(?:pypi\.(?:org|python\.org)|pythonhosted\.org|download\.pytorch\.org|anaconda\.org)\b")


@pytest.mark.parametrize("pattern", [MACHINE_PATH, REGISTRY], ids=["machine path", "registry"])
def test_no_machine_is_named(kept_texts, pattern):
    found = [
        f"{name}:{number}: {line.strip()[:120]}"
        for name, text in kept_texts.items()
        if Path(name).suffix != ".json" or len(text) < 1_000_000  # a tokenizer's vocabulary is not prose
        for number, line in enumerate(text.splitlines(), 1)
        if pattern.search(line)
    ]
    assert found == []


def test_the_patterns_find_what_they_are_for():
    slash = "/"
    assert MACHINE_PATH.search(f"root: {slash}home/ada/films")
    assert MACHINE_PATH.search(f'"{slash}opt/wheels"')
    assert not MACHINE_PATH.search("../work/films and films/root/x")
    assert REGISTRY.search("https://" + "pypi." + "org/simple")


@pytest.mark.parametrize("path", CONFIGS, ids=ids)
def test_config_begins_with_command_hardware_and_expected_result(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    block = "\n".join(lines[: next((n for n, line in enumerate(lines) if not line.startswith("#")), len(lines))])
    assert ids(path) in block or "scripts/" in block, "the command that runs this file"
    assert re.search(r"(?i)\bhardware\b", block), "the hardware the result was got on"
    assert re.search(r"(?i)\bexpect", block), "the expected result"
