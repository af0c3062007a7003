"""Where the time of a program goes on its device, kernel by kernel, as JAX's profiler saw it."""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax


def busiest_kernels(run: Callable[[], Any], *, calls: int, most: int = 25) -> list[dict[str, Any]]:
    """Of `calls` calls of `run`, which must wait for the device: kernels by their time, as microseconds per call.

    Kernels that differ by a number at the end of their name count as one.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(calls):
                run()
        (file,) = Path(folder).glob("**/*.xplane.pb")
        found = jax.profiler.ProfileData.from_file(str(file))
        took, times = Counter(), Counter()
        for plane in found.planes:
            if not plane.name.startswith("/device:"):
                continue
            for line in plane.lines:
                if not line.name.startswith("Stream"):  # the others sum up what is in the streams
                    continue
                for event in line.events:
                    name = re.sub(r"[._]\d+$", "", event.name)[:80]
                    took[name] += event.duration_ns
                    times[name] += 1
    return [
        {"kernel": name, "us": round(spent / 1e3 / calls, 2), "launches": round(times[name] / calls, 2)}
        for name, spent in took.most_common(most)
    ]
