"""Two sources as one: a policy's rollouts, and at every step a batch of given answers beside them.

The gradients of both are added in one update (`Trainer.step`), each divided by counts of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmalign.models.model import Params
from vlmalign.training.loop import Source, Work


class BesideSource:
    """Batches of `first`, with those of `second` as `Work.beside` and its numbers as "PREFIX/NAME".

    `second` must not wait for what the step before has learnt. Both places are in every checkpoint.
    """

    def __init__(self, first: Source, second: Source, *, prefix: str):
        assert not second.waits
        self.waits = first.waits
        self._first, self._second, self._prefix = first, second, prefix

    def work(self, step: int, params: Params) -> Work:
        own, more = self._first.work(step, params), self._second.work(step, params)
        numbers = {f"{self._prefix}/{name}": value for name, value in more.metrics.items()}
        return own._replace(beside=more.batches, metrics={**own.metrics, **numbers})

    def observe(self, line: Mapping[str, Any]) -> None:
        self._first.observe(line)

    def get_state(self) -> dict[str, Any]:
        return {"first": self._first.get_state(), "second": self._second.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        self._first.set_state(state["first"])
        self._second.set_state(state["second"])
