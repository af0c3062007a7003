#!/usr/bin/env python3
"""Damage valid files of every reader, at size, and count what became of them.

    scripts/fuzz.py --cases 10000                             # every reader
    scripts/fuzz.py --cases 2000 --reader "DICOM" --seed 3    # those whose name holds the text
    scripts/fuzz.py --minutes 5 --kept /tmp/unhandled

A case is read, skipped (a row or film left out and listed), refused by a clear error, or unhandled (`tests/fuzz/bench.py`
says what counts). Prints one JSON object a reader: cases, read, skipped, refused, unhandled, seconds, and the smallest
case of every kind that was not handled, whose file is kept under --kept. The exit code is 1 where there is one.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), *(str(REPOSITORY / "tests" / room) for room in ("fuzz", "reporting"))]
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from bench import Bench, Found, run  # noqa: E402
from readers import READERS, Reader  # noqa: E402

#: a file system in memory, where there is one: a case is a few files, written and read once
MEMORY = "/dev/shm"


def fuzz(reader: Reader, cases: int, number: int, minutes: float, work: Path) -> tuple[Found, float]:
    """The cases of one reader, told on stderr as they come; ends early after `minutes`."""
    started = told = time.monotonic()

    def tell(done: int) -> None:
        nonlocal told
        if time.monotonic() - told > 10:
            told = time.monotonic()
            print(f"{reader.name}: {done} of {cases}", file=sys.stderr, flush=True)

    found = run(Bench(reader, work), cases, number=number, seconds=60 * minutes, tell=tell)
    return found, time.monotonic() - started


def keep(found: Found, folder: Path) -> list[dict[str, object]]:
    """The smallest cases, as files."""
    told = []
    for number, (kind, (case, what)) in enumerate(sorted(found.unhandled.items())):
        path = folder / str(number) / Path(case.file).name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(case.content)
        told.append(
            {"kind": kind, "what": what, "file": case.file, "content": repr(case.content[:200]), "kept": str(path)}
        )
    return told


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=10_000, help="a reader (10,000)")
    parser.add_argument("--reader", default=[""], nargs="+", help="only those whose name holds one of these")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=10.0, help="the most for one reader (10)")
    parser.add_argument("--kept", type=Path, default=Path("fuzz-unhandled"), help="folder for what is not handled")
    arguments = parser.parse_args()
    chosen = [reader for reader in READERS if any(part.lower() in reader.name.lower() for part in arguments.reader)]
    if not chosen:
        parser.error(f"no reader is called {arguments.reader!r}; known: {', '.join(reader.name for reader in READERS)}")
    bad = 0
    for reader in chosen:
        with tempfile.TemporaryDirectory(
            prefix="vlmalign-fuzz-", dir=MEMORY if os.path.isdir(MEMORY) else None
        ) as work:
            found, seconds = fuzz(
                reader, min(arguments.cases, reader.most), arguments.seed, arguments.minutes, Path(work) / "files"
            )
        kept = keep(found, arguments.kept / reader.name.replace(" ", "-").replace(":", ""))
        bad += found.counts["unhandled"]
        line = {"reader": reader.name, "seed": arguments.seed, "cases": sum(found.counts.values()), **found.counts}
        print(json.dumps(line | {"seconds": round(seconds, 1), "smallest": kept}), flush=True)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
