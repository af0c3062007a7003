"""What a person should hear of while training goes on, and not at its end: read off the lines of metrics.

A guard says one thing once. Limits are wide: what is said is worth looking at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

#: updates in a row after which something is no accident
IN_A_ROW = 5
#: evaluations over which the held-out number has fallen while the reward rose
EVALUATIONS = 3
#: mean KL to the reference per token, in nats: at 0.5 an answer of 100 tokens is e^50 times as likely as before
MOST_KL = 0.5
#: of the first updates' entropy
LEAST_ENTROPY = 0.1
#: of a batch that are named
MOST_IDS = 8
#: numbers that say that an answer has the right form, and nothing of what it says
FORM = ("form", "format", "valid", "stopped")

Line = Mapping[str, Any]


@dataclass
class Guards:
    """Looks at each line of metrics; `say` gets the warnings.

    `held_out` names the number that is validated by ("validation/reward"), and `lower` whether lower is better;
    `rewards` are the names of the rewards that are learnt from.
    """

    stage: str
    say: Callable[[str], None]
    held_out: str | None = None
    lower: bool = False
    rewards: Sequence[str] = ()
    _lines: list[dict[str, float]] = field(default_factory=list)
    _said: set[str] = field(default_factory=set)

    def see(self, line: Line) -> None:
        """One line, in order."""
        self._lines.append({k: float(v) for k, v in line.items() if isinstance(v, int | float) and math.isfinite(v)})
        last = self._lines[-IN_A_ROW:]
        step = line["step"]
        if line.get("skipped"):
            ids = line.get("groups", ())
            told = ", ".join(map(str, ids[:MOST_IDS])) + (", ..." if len(ids) > MOST_IDS else "")
            self._warn(
                "skipped",
                step,
                f"the gradient is not finite, and the update was left out; its batch held the cases {told} (all of them in "
                "metrics.jsonl, as those of further such updates): look for a broken one, or lower the learning rate",
            )
        if len(last) == IN_A_ROW:
            if all(each.get("flat_groups", 0.0) == 1.0 for each in last):
                self._warn(
                    "flat",
                    step,
                    f"in {IN_A_ROW} updates in a row all rewards of every group were equal, so nothing was learnt: the task "
                    "is too hard or too easy for the model, or the reward does not tell its answers apart",
                )
            if all(each.get("kl", 0.0) > MOST_KL for each in last):
                self._warn(
                    "kl",
                    step,
                    f"the KL to the reference is {last[-1]['kl']:.3g} nats per token: the model is leaving it; lower the "
                    "learning rate or raise objective.beta",
                )
            first = self._mean("entropy", self._lines[:IN_A_ROW])
            now = self._mean("entropy", last)
            if first and now is not None and len(self._lines) >= 2 * IN_A_ROW and now < LEAST_ENTROPY * first:
                self._warn(
                    "entropy",
                    step,
                    f"the entropy has fallen from {first:.3g} to {now:.3g} nats per token: completions hardly differ any "
                    "more, and there will be little to compare",
                )
        if self.held_out in line:
            self._compare_held_out(step)
        self._compare_form(step)

    def _compare_held_out(self, step: int) -> None:
        """Reward up while the held-out number falls, over the last evaluations."""
        at = [i for i, each in enumerate(self._lines) if self.held_out in each]
        if len(at) <= EVALUATIONS or self._mean("reward", self._lines) is None:
            return
        at = at[-EVALUATIONS - 1 :]
        sign = -1.0 if self.lower else 1.0
        numbers = [sign * self._lines[i][self.held_out] for i in at]
        rewards = [self._mean("reward", self._lines[start + 1 : end + 1]) for start, end in pairwise(at)]
        known = [reward for reward in rewards if reward is not None]
        falls = all(later < earlier for earlier, later in pairwise(numbers))
        if falls and len(known) == EVALUATIONS and known[-1] > known[0]:
            self._warn(
                "held out",
                step,
                f"over the last {EVALUATIONS} evaluations the reward rose from {known[0]:.3g} to {known[-1]:.3g} while "
                f"{self.held_out} went from {sign * numbers[0]:.3g} to {sign * numbers[-1]:.3g}: what is rewarded is not "
                "what is wanted",
            )

    def _compare_form(self, step: int) -> None:
        """Of several rewards only those of form have risen."""
        forms = [name for name in self.rewards if any(word in name.lower() for word in FORM)]
        others = [name for name in self.rewards if name not in forms]
        if not forms or not others or len(self._lines) < 4 * IN_A_ROW:
            return
        quarter = len(self._lines) // 4

        def gain(name: str) -> float | None:
            first, last = self._mean(name, self._lines[:quarter]), self._mean(name, self._lines[-quarter:])
            return None if first is None or last is None else last - first

        gains = {name: gain(name) for name in (*forms, *others)}
        if None in gains.values():
            return
        if max(gains[name] for name in forms) > 0.1 and max(gains[name] for name in others) <= 0.0:
            told = ", ".join(f"{name} {value:+.2f}" for name, value in gains.items())
            self._warn("form", step, f"only the form of the answers has become better so far: {told}")

    def _mean(self, name: str, lines: Sequence[Mapping[str, float]]) -> float | None:
        values = [line[name] for line in lines if name in line]
        return sum(values) / len(values) if values else None

    def _warn(self, what: str, step: int, text: str) -> None:
        if what not in self._said:
            self._said.add(what)
            self.say(f"warning, {self.stage}, update {step}: {text}")
