"""On a CPU, memory that a step has freed serves the next one: counted in page faults, not in seconds."""

import subprocess
import sys

import pytest

from vlmalign.host_memory import computes_on_cpu

#: page faults of ten calls of a program with 64 MiB of temporary memory, in the calmest of eight rounds: the heap grows
#: around small pieces that stay, until there is a place of that size among them
PROGRAM = """
import resource, sys
from vlmalign.host_memory import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == "keep" else None
import jax, jax.numpy as jnp
# A product of products: the one in the middle, [4096, 4096], cannot be fused away.
run = jax.jit(lambda x: jnp.tanh(x @ x.T) @ x)
x = jnp.ones((4096, 16))
counts = [resource.getrusage(resource.RUSAGE_SELF).ru_minflt]
for _ in range(8):
    for _ in range(10):
        run(x).block_until_ready()
    counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(kept, min(after - before for before, after in zip(counts, counts[1:])))
"""


def faults(how: str) -> tuple[str, int]:
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True)
    kept, count = done.stdout.split()
    return kept, int(count)


@pytest.mark.full
def test_the_next_step_finds_the_pages_of_the_last_one():
    if not sys.platform.startswith("linux"):
        pytest.skip("only glibc's heap can be told to keep memory")
    kept, found = faults("keep")
    if kept == "False":
        pytest.skip("this C library has no mallopt")
    _, plain = faults("leave")
    pages = 10 * (64 << 20) // 4096
    assert plain > pages / 8, "otherwise there is nothing to keep, and the module should go"
    assert found < plain / 20


@pytest.mark.parametrize(
    ("environment", "nodes", "expected"),
    [
        ({}, [], True),
        ({"JAX_PLATFORMS": "cpu"}, ["nvidia0"], True),
        ({}, ["nvidia0"], False),
        ({}, ["nvidiactl"], True),
        ({"JAX_PLATFORMS": "cuda"}, [], False),
        ({"JAX_PLATFORMS": "cuda,cpu"}, ["nvidia0"], False),
    ],
)
def test_where_jax_will_run(environment, nodes, expected, tmp_path):
    for node in nodes:
        (tmp_path / node).touch()
    assert computes_on_cpu(environment, tmp_path) is expected
