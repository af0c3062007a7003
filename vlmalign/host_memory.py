"""How a process that computes on the CPU deals with memory: what a program has used is kept for the next one.

XLA asks for all the temporary memory of a program in one piece and gives it back when the program ends. glibc returns
pieces of that size to the kernel at once, which hands them out again page by page, each cleared first: for a GRPO step
on a CPU with logits of [1024, 32000], a third of the time that the output matrix takes. Kept in the process's heap, the
same pages serve every step. On a GPU the temporary memory is the GPU's, and nothing is changed.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from pathlib import Path

#: parameters of mallopt(3), as malloc.h numbers them
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
#: bytes at the top of the heap above which memory does go back: the largest that mallopt takes
_MOST_KEPT = 2**31 - 1


def computes_on_cpu(environment: Mapping[str, str] = os.environ, devices: Path = Path("/dev")) -> bool:
    """Whether JAX will run on the CPU, as far as can be told before it starts: told to, or without a GPU to run on."""
    asked = environment.get("JAX_PLATFORMS", "")
    return asked == "cpu" or (not asked and not any(devices.glob("nvidia[0-9]*")))


def keep_freed_memory() -> bool:
    """Keep what is freed in this process's heap. To be called before JAX starts its threads; False: it cannot be told to.

    Only glibc knows how; elsewhere nothing is done. One heap serves all threads, since only the main one can hold
    pieces of any size. The price is resident memory: pieces that are in use keep free ones between them from growing
    together, so that the heap may come to hold the temporary memory of a step a few times over.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # not Linux, or a C library without it
        return False
    settings = {_ARENA_MAX: 1, _MMAP_MAX: 0, _TRIM_THRESHOLD: _MOST_KEPT}
    return all(mallopt(name, value) == 1 for name, value in settings.items())
