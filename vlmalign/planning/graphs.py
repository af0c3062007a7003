"""How a GPU program is launched, read off XLA's listing of its thunks: CUDA graphs, and what runs outside of them.

A host that launches a thousand kernels a token one by one takes longer than the GPU that runs them; within a CUDA graph
(a `kCommandBuffer`) they are launched at once.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

#: what XLA calls the file that lists the thunks as they are run
LISTING = "*thunk_sequence_after_thunk_passes.txt"
#: a thunk of the body of the outermost loop: those within it are indented further
_IN_BODY = re.compile(r"^    \d+: k(\w+)")


def launches_per_round(listing: str) -> tuple[str, ...]:
    """What the host launches in each round of a program's first outermost loop, in order: "CommandBuffer" a CUDA graph.

    Raises:
        ValueError: when no loop stands at the top of the program.
    """
    inside, found = False, []
    for line in listing.splitlines():
        if line.startswith("  body:"):
            inside = True
        elif inside and line[:1].isdigit():
            break
        elif inside and (thunk := _IN_BODY.match(line)) is not None:
            found.append(thunk[1])
    if not inside:
        raise ValueError("expected a loop at the top of the program's thunks, found none; is it a decode program?")
    return tuple(found)


def compile_with_listing(lowered: jax.stages.Lowered, options: Mapping[str, Any]) -> tuple[jax.stages.Compiled, str]:
    """The compiled program, and the listing of its thunks."""
    with tempfile.TemporaryDirectory() as folder:
        dump = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        compiled = lowered.compile(compiler_options={**options, **dump})
        (file,) = Path(folder).glob(LISTING)
        return compiled, file.read_text(encoding="utf-8")
