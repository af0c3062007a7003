"""Set before anything of vlmalign is imported: shape checks on every annotated call, CPU, exact float32, one compile cache."""

import atexit
import ctypes
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from jaxtyping import install_import_hook

# is_pep484_tower: an int is good enough for a float, as everywhere in Python's typing.
install_import_hook("vlmalign", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

REPOSITORY = Path(__file__).resolve().parent.parent

#: for processes whose numbers are compared with those of processes compiled alike: less time, other rounding
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"

# In the environment rather than in jax.config, so that the processes which tests start run under the same settings.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # torch's idle threads must not spin on JAX's cores
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="vlmalign-compiled-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


#: bytes; above this much a process gives up what it has compiled before it begins another test file
MOST_RESIDENT = 3 << 29


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--half", type=int, choices=(0, 1), help="run this half of the tests marked `full`, and no others")


def half_of(file: str) -> int:
    """0 or 1, always the same for one file of tests: its tests share what is compiled and trained for them."""
    return zlib.crc32(file.encode()) % 2


#: Rooms whose files take longest come first, lest one process be left alone with a long one at the end.
LONG = ("studies", "training", "objectives", "rollout", "models", "planning", "parity")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.parent.name) if item.path.parent.name in LONG else len(LONG))
    if (half := config.getoption("--half")) is None:
        return
    kept, others = [], []
    for item in items:
        mine = item.get_closest_marker("full") and half_of(item.path.relative_to(REPOSITORY).as_posix()) == half
        (kept if mine else others).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=others)


@pytest.fixture(scope="module", autouse=True)
def bounded_memory() -> Iterator[None]:
    """Compiled programs of earlier files are dropped once they fill the memory; what is needed again is in the cache on disk."""
    yield
    statm = Path("/proc/self/statm")
    if "jax" not in sys.modules or not statm.exists():
        return
    if int(statm.read_text().split()[1]) * os.sysconf("SC_PAGESIZE") > MOST_RESIDENT:
        sys.modules["jax"].clear_caches()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # glibc keeps freed pages between those that are in use


@pytest.fixture
def optimised() -> Iterator[None]:
    """What is compiled in this test is compiled as for users, where the tests' command asks for less (scripts/test.sh)."""
    jax = sys.modules["jax"]
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def on_eight_devices() -> Callable[..., Any]:
    """Runs a program of the tests with eight CPU devices (this process has one): the JSON of its last line."""

    def run(program: str, *arguments: object) -> Any:
        done = subprocess.run(
            [sys.executable, REPOSITORY / "tests" / program, *map(str, arguments)],
            env={
                **os.environ,
                "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
                "PYTHONPATH": os.pathsep.join(map(str, (REPOSITORY, REPOSITORY / "tests"))),
            },
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run


@pytest.fixture(scope="session")
def cpu_seconds() -> Callable[[Callable[[], Any]], float]:
    """CPU seconds a call takes: the least of three, of the calling thread alone, so that what else runs in this process
    or on this machine, and a visit of the garbage collector to all that the tests hold, is not taken for the call's.
    """

    def measure(call: Callable[[], Any]) -> float:
        least = float("inf")
        for _ in range(3):
            start = time.thread_time()
            call()
            least = min(least, time.thread_time() - start)
        return least

    return measure


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real public tables and films, kept beside the checkout; tests that need them are skipped where they are not."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the folder of public data, ../shared/data beside the checkout, is not there")
    return folder
