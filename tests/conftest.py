"""Set before anything of vlmalign is imported: shape checks on every annotated call, CPU, exact float32, one compile cache."""

import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jaxtyping import install_import_hook

# is_pep484_tower: an int is good enough for a float, as everywhere in Python's typing.
install_import_hook("vlmalign", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

REPOSITORY = Path(__file__).resolve().parent.parent

# In the environment rather than in jax.config, so that the processes which tests start run under the same settings.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # torch's idle threads must not spin on JAX's cores
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="vlmalign-compiled-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


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
