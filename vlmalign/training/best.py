"""The best evaluation of a stage: which it was, the parameters it was of, and when to stop looking for a better one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from vlmalign.exchange import from_first
from vlmalign.training.checkpoints import Checkpoints
from vlmalign.training.step import TrainState

MODES = ("min", "max")


@dataclass(frozen=True)
class Best:
    """Which number decides, and how long to wait for a better one."""

    metric: str = "validation/loss"
    mode: str = "min"  #: "min": lower is better
    patience: int | None = None  #: evaluations in a row without a better one before the stage ends; None: never

    def __post_init__(self) -> None:
        if self.mode not in MODES or (self.patience is not None and self.patience < 1):
            raise ValueError(
                f"best needs mode {' or '.join(MODES)} and patience >= 1 (or none); "
                f"found {self.mode!r} and {self.patience}"
            )


@dataclass(frozen=True)
class Record:
    """What a checkpoint remembers: the best value, the step it was measured at, and evaluations since."""

    value: float | None = None
    step: int | None = None
    since: int = 0


class BestSoFar:
    """Keeps the state of the best evaluation in `folder`; does nothing without a rule."""

    def __init__(self, folder: Path, rule: Best | None, say: Callable[[str], None] = print):
        self._rule = rule
        self._kept = None if rule is None else Checkpoints(folder, keep=1, say=say)
        self.record = Record()

    @property
    def exhausted(self) -> bool:
        """True once `patience` evaluations in a row were no better."""
        return self._rule is not None and self._rule.patience is not None and self.record.since >= self._rule.patience

    def see(self, step: int, line: Mapping[str, Any], state: TrainState) -> None:
        """Compare the evaluation after `step` updates; a number that is not finite is no better than any."""
        if self._rule is None:
            return
        if self._rule.metric not in line:
            names = ", ".join(name for name in line if "/" in name)
            raise ValueError(f"no evaluation is called {self._rule.metric!r}; there are: {names or 'none'}")
        value, best = line[self._rule.metric], self.record.value
        better = value is not None and math.isfinite(value)
        if better and best is not None:
            better = value < best if self._rule.mode == "min" else value > best
        if better:
            self._kept.save(state, {})
            self.record = Record(float(value), step, 0)
        else:
            self.record = Record(best, self.record.step, self.record.since + 1)

    def rewind(self, record: Mapping[str, Any] | None) -> None:
        """Go back to what a checkpoint remembers (None: the start); later bests will be found again.

        Raises:
            ValueError: when the best so far is lost, and not for a later one that will be found again.
        """
        self.record = Record() if record is None else Record(**record)
        if self._kept is None:
            return
        steps = from_first(self._kept.steps)
        if self.record.step is not None and max(steps, default=0) <= self.record.step:
            self._require(self.record.step)
        self._kept.drop_after(self.record.step or 0)

    def _require(self, step: int) -> None:
        """Raises ValueError when the state after `step` updates is lost or damaged."""
        lost = step not in from_first(self._kept.steps)
        problem = f"{self._kept.folder / str(step)} is missing" if lost else self._kept.problem(step)
        if problem is not None:
            raise ValueError(
                f"the best state so far, of update {step}, is lost: {problem}; restore it, or set the stage aside and "
                f"train it anew with --redo {self._kept.folder.parent.name}"
            )

    def params(self, like: TrainState) -> dict[str, jax.Array] | None:
        """The parameters of the best evaluation; None without a rule or without any evaluation that was a number.

        Raises:
            ValueError: when they were kept and are gone.
        """
        if self._kept is None or self.record.step is None:
            return None
        self._require(self.record.step)
        return self._kept.restore(like).state.params

    def close(self) -> None:
        if self._kept is not None:
            self._kept.close()

    def __enter__(self) -> BestSoFar:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
