"""Imports point one way, and the numerical rooms import with nothing but JAX, Flax, optax, NumPy and safetensors."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "vlmalign"

RECORDS = {"types", "shapes"}
CONFIGS = {"config", "config_tree", "config_yaml"}
CORE = RECORDS | {"randomness", "mesh"}
NUMPY_SIDE = {"data", "tasks", "rewards"}
MODELS = {"models", "weights"}
NUMERICS = {"rollout", "objectives", "control"}
RECORDING = {"log", "progress", "machine"}
BELOW_TRAINING = CORE | CONFIGS | RECORDING | NUMPY_SIDE | MODELS | NUMERICS | {"judges"}

# room (a package, or a module beside them) -> the rooms it may import, at any depth of its code
ALLOWED: dict[str, set[str]] = {
    "": {"api"},  # the package itself names what is public
    "types": set(),
    "shapes": set(),
    "config_yaml": set(),
    "quoting": set(),
    "config_tree": set(),
    "overrides": {"config_yaml"},
    "config": {"config_yaml", "config_tree", "overrides", "quoting"},
    "log": set(),
    "progress": set(),
    "machine": set(),
    "host_memory": set(),
    "randomness": RECORDS,
    "mesh": RECORDS,
    "distributed": set(),
    "exchange": CORE | {"distributed"},
    "stopping": {"distributed"},
    "data": {"types", "config", "quoting"},  # not shapes: without jaxtyping it imports JAX
    "tasks": {"types", "config", "quoting", "data"},
    "rewards": {"types", "data", "tasks", "log", "quoting"},
    "models": CORE,
    "weights": CORE | {"models", "quoting"},
    "inspection": RECORDS | {"data", "reporting"} | MODELS,
    "rollout": CORE | {"data"} | MODELS,
    "objectives": CORE | MODELS,
    "control": CORE,
    "judges": CORE | NUMPY_SIDE | MODELS | NUMERICS,
    "evaluation": BELOW_TRAINING,
    "training": BELOW_TRAINING | {"distributed", "exchange", "stopping"},
    "reporting": {"config_yaml"},
    "review": CONFIGS | {"data", "reporting"},
    "preview": {"types", "data", "models", "weights", "reporting"},
    "exporting": RECORDS | {"config_yaml", "quoting", "training", "reporting"} | MODELS,
    "studies": BELOW_TRAINING | {"distributed", "exchange", "stopping", "training", "evaluation", "reporting"},
    "planning": CORE
    | CONFIGS
    | {"data", "tasks", "distributed", "exchange", "training", "studies"}
    | MODELS
    | NUMERICS,
    "api": BELOW_TRAINING | {"training", "evaluation", "exporting"},
    "sampling": {"data", "studies", "reporting"},
    "teaching": {"config", "data", "tasks", "progress", "studies"},
    "answering": {"types", "api", "data", "weights", "progress", "reporting"},
    "doctor": {"studies", "inspection", "reporting"},
    "cli": RECORDING
    | {
        "doctor",
        "answering",
        "distributed",
        "stopping",
        "host_memory",
        "planning",
        "config",
        "studies",
        "training",
        "evaluation",
        "exporting",
        "inspection",
        "reporting",
        "review",
        "preview",
        "sampling",
        "teaching",
    },
}
NO_JAX = NUMPY_SIDE | {"reporting", "review", "teaching", "cli", "log", "progress"}
NO_JAX |= {"config", "config_yaml", "config_tree", "overrides"}
JAX = {"jax", "jaxlib", "flax", "optax", "orbax"}
# What a GPU image may lack. The rooms in LIGHT must import without it.
LIGHT = ("models", "objectives", "rollout", "weights")
MAY_BE_MISSING = {"beartype", "datasets", "grain", "jaxtyping", "matplotlib", "orbax", "pandas", "PIL"}
MAY_BE_MISSING |= {"pydantic", "rich", "scipy", "sklearn", "tokenizers", "torch", "transformers", "yaml"}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    """The package or the top-level module a file belongs to; "" for the package's own __init__."""
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import in a file, those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: relative import; write the full name"
            # `from vlmalign import x` and `from vlmalign.x import y` both lead to room x
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def test_every_room_is_in_the_table():
    assert {room(path) for path in modules()} - {""} <= set(ALLOWED)


def test_the_table_points_one_way():
    """No room can reach itself: the table is a partial order, whatever is later added to it."""
    reachable = {name: set(edges) for name, edges in ALLOWED.items()}
    for _ in ALLOWED:
        for edges in reachable.values():
            edges.update(*(reachable[other] for other in tuple(edges)))
    assert [name for name, edges in reachable.items() if name in edges] == []
    assert "training" not in reachable["evaluation"]
    assert ALLOWED["reporting"] == {"config_yaml"}  # which imports nothing: a page is made from files alone


def test_imports_follow_the_table():
    wrong = []
    for path in modules():
        here = room(path)
        for line, name in imported(path):
            parts = name.split(".")
            there = parts[1] if parts[0] == "vlmalign" and len(parts) > 1 else None
            if there is None or there.startswith("__") or there == here:
                continue
            if there not in ALLOWED.get(here, set()):
                wrong.append(f"{path.relative_to(PACKAGE.parent)}:{line}: {here or 'vlmalign'} imports {there}")
    assert wrong == []


def test_the_numpy_side_imports_no_jax():
    wrong = [
        f"{path.relative_to(PACKAGE.parent)}:{line}: {name}"
        for path in modules()
        if room(path) in NO_JAX
        for line, name in imported(path)
        if name.split(".")[0] in JAX
    ]
    assert wrong == []


def test_nothing_is_imported_by_a_string():
    wrong = [
        f"{path.relative_to(PACKAGE.parent)}:{node.lineno}"
        for path in modules()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Name | ast.Attribute)
        and (node.id if isinstance(node, ast.Name) else node.attr) in ("__import__", "import_module")
    ]
    assert wrong == []


BLOCKED_PROGRAM = """
import sys
import flax.nnx, jax, numpy, optax, safetensors.numpy

blocked = set(sys.argv[1].split(","))

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise ModuleNotFoundError(f"{name} may be missing here", name=name)

# Flax and optax bring some of these along for themselves; vlmalign must not lean on that.
for name in [name for name in sys.modules if name.split(".")[0] in blocked]:
    del sys.modules[name]
sys.meta_path.insert(0, Blocker())

import importlib
failed = []
for name in sys.argv[2:]:
    try:
        importlib.import_module(name)
    except ImportError as error:
        failed.append(f"{name}: {error}")
sys.exit("\\n".join(failed) or 0)
"""


def run_blocked(names: list[str]) -> str:
    """What a process without MAY_BE_MISSING says when it imports `names`: "" when all is well."""
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED_PROGRAM, ",".join(MAY_BE_MISSING), *names],
        cwd=PACKAGE.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return "" if done.returncode == 0 else done.stderr


@pytest.fixture(scope="module")
def light_modules() -> list[str]:
    names = []
    for path in modules():
        if room(path) in LIGHT:
            parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
            names.append(".".join(parts).removesuffix(".__init__"))
    return names


def test_numerical_rooms_import_on_a_bare_gpu_image(light_modules):
    assert run_blocked(light_modules) == ""


def test_the_blocker_blocks():
    """The test above can fail: a module that does need one of these is caught."""
    assert "vlmalign.config: pydantic may be missing here" in run_blocked(["vlmalign.config"])


def test_a_plan_does_not_wait_for_torch():
    """transformers and torch take seconds to import; a plan needs neither."""
    program = (
        "import sys, vlmalign.planning.plan, vlmalign.planning.study; print({'torch', 'transformers'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
