"""How much host memory and time loading a checkpoint takes, as one JSON object.

    python scripts/measure_loading.py runs/large --dtype float32 --devices 8

The folder is loaded in a fresh process, which this one watches from outside every few milliseconds. Counted is
anonymous memory (RssAnon of /proc/PID/status: Linux only): pages of the mapped files, which the system may drop at any
time, are not. On a CPU the parameters are host memory themselves: `excess_bytes` is the peak above what the process
held before, less the parameters; `excess_in_largest_tensors` is the same as a multiple of the largest parameter.
With several (virtual CPU) devices every parameter is divided along the first of its axes that they divide.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

EVERY = 0.002  # seconds between readings


def memory(pid: int | str, field: str) -> int:
    """Bytes of a field of /proc/PID/status: RssAnon, or VmHWM (the largest RSS so far, mapped files included)."""
    text = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return int(re.search(rf"^{field}:\s+(\d+) kB$", text, re.MULTILINE)[1]) * 1024


class Watch:
    """The largest RssAnon of a process while the `with` block lasts."""

    def __init__(self, pid: int):
        self._pid, self._over = pid, threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.peak = 0

    def _run(self) -> None:
        while not self._over.wait(EVERY):
            self.peak = max(self.peak, memory(self._pid, "RssAnon"))

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()


def watched(folder: Path, dtype: str) -> None:
    """The process that loads: says when it is ready, loads when told to, says what it did, ends when told to."""
    import jax
    import jaxlib
    import numpy as np
    import safetensors
    from jax.sharding import NamedSharding, PartitionSpec, Sharding

    from vlmalign.models.model import Model
    from vlmalign.weights.checkpoint import load_config, load_params

    devices = len(jax.devices())
    mesh = jax.make_mesh((devices,), ("fsdp",))

    def divided(name: str, parameter: jax.ShapeDtypeStruct) -> Sharding:
        del name
        axis = next((i for i, n in enumerate(parameter.shape) if n % devices == 0), None)
        dims = ("fsdp" if i == axis else None for i in range(len(parameter.shape)))
        return NamedSharding(mesh, PartitionSpec(*dims))

    model = Model(load_config(folder), dtype=dtype)
    sizes = [p.size * p.dtype.itemsize for p in model.shapes.values()]
    versions = {"jax": jax.__version__, "jaxlib": jaxlib.__version__, "numpy": np.__version__}
    versions |= {"safetensors": safetensors.__version__, "python": sys.version.split()[0]}
    _say({"baseline": memory("self", "RssAnon")})
    sys.stdin.readline()
    start = time.monotonic()
    params = load_params(folder, model, sharding=divided if devices > 1 else None)
    seconds = time.monotonic() - start
    # By address: a buffer that two arrays share is memory once.
    buffers = {s.data.unsafe_buffer_pointer(): s.data.nbytes for p in params.values() for s in p.addressable_shards}
    _say(
        {
            "seconds": round(seconds, 2),
            "model_bytes": sum(buffers.values()),
            "largest_tensor_bytes": max(sizes),
            "tensors": len(sizes),
            "dtype": dtype,
            "devices": devices,
            "versions": versions,
        }
    )
    sys.stdin.readline()


def _say(found: dict[str, Any]) -> None:
    print(json.dumps(found), flush=True)


def measure(folder: Path, dtype: str, devices: int) -> dict[str, Any]:
    """Load `folder` in a process of its own and watch its memory."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    with subprocess.Popen(
        [sys.executable, __file__, str(folder), "--dtype", dtype, "--watched"],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags.strip()},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:

        def answer() -> dict[str, Any]:
            line = process.stdout.readline()
            if not line:
                raise SystemExit(f"the loading process ended with exit code {process.wait()}; its error is above")
            return json.loads(line)

        def go_on() -> None:
            process.stdin.write("\n")
            process.stdin.flush()

        baseline = answer()["baseline"]
        with Watch(process.pid) as watch:
            go_on()
            found = answer()
        peak_rss = memory(process.pid, "VmHWM")
        go_on()
    excess = watch.peak - baseline - found["model_bytes"]
    return {
        "checkpoint_bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        "excess_bytes": excess,
        "excess_in_largest_tensors": round(excess / found["largest_tensor_bytes"], 3),
        "peak_anonymous_bytes": watch.peak,
        "baseline_anonymous_bytes": baseline,
        "peak_rss_with_mapped_files_bytes": peak_rss,
        **found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of the parameters")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--watched", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.watched:
        watched(asked.folder, asked.dtype)
    else:
        print(json.dumps(measure(asked.folder, asked.dtype, asked.devices), indent=2))


if __name__ == "__main__":
    main()
