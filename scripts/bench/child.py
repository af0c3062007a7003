"""A program of its own beside a benchmark, spoken to in lines of JSON; it is ended with the block that opened it."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any, Self


class Child:
    """`file` run by this Python, or another, with these arguments; a context manager."""

    def __init__(self, file: str, *arguments: str, python: str = sys.executable):
        self._name = file
        self._child = subprocess.Popen(
            [python, file, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._child.kill()
        self._child.wait()

    def say(self, what: object) -> None:
        self._child.stdin.write(json.dumps(what) + "\n")
        self._child.stdin.flush()

    def read(self) -> Any:
        """Waits for its next line.

        Raises:
            RuntimeError: when it has ended.
        """
        line = self._child.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._name} ended with exit code {self._child.wait()}; its error stands above")
        return json.loads(line)
