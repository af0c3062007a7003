"""Rewards of a stage that survive it: written to disk before they are used, and read there when a round comes again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from vlmalign.rewards.outcomes import OutcomeFile, score_or_replay
from vlmalign.rewards.runner import RewardRunner, ScoredBatch

#: beside the record: what rewards printed, up to a bound
PRINTED = "rewards-output.txt"


class RecordedRewards:
    """`score` and `memory` of a `PolicySource`: the runner's rewards, each round of them kept in `outcomes`.

    A round that a continued run samples again has its rewards read, not asked for again: a judge may change its mind.
    """

    def __init__(self, runner: RewardRunner, outcomes: OutcomeFile):
        self._runner, self._outcomes = runner, outcomes
        self._unproven = set(runner.weighted)  # rewards that have given nobody a number yet

    def __call__(
        self,
        number: int,
        keys: Sequence[tuple[int, int]],
        prompts: list[str],
        completions: list[str],
        columns: dict[str, list[Any]],
    ) -> ScoredBatch:
        """The rewards of round `number`.

        Raises:
            ValueError: when the file holds that round for other completions or other rewards; and when a reward with a
                weight fails for every completion of its first round: nothing would ever be learnt from it.
        """
        scored = score_or_replay(
            self._runner,
            self._outcomes,
            step=number,
            keys=keys,
            prompts=prompts,
            completions=completions,
            columns=columns,
        )
        self._require_numbers(scored)
        return scored

    def _require_numbers(self, scored: ScoredBatch) -> None:
        for name in sorted(self._unproven):
            faults = [fault for fault in scored.faults if fault.reward == name]
            if faults and len(faults) == len(scored.rewards):
                (kind, reason), count = Counter((fault.kind, fault.reason) for fault in faults).most_common(1)[0]
                raise ValueError(
                    f"reward {name!r} gave no number to any of the {len(faults)} completions of its first round: {kind}, "
                    f"{reason} ({count} times). Nothing would be learnt; correct it and start again. What it printed, and "
                    f"its exceptions, are in {self._outcomes.path.with_name(PRINTED)}; one written for TRL's conversations "
                    "(completion[0]['content']) needs `form: messages`"
                )
        self._unproven -= {name for name, column in scored.parts.items() if any(x is not None for x in column)}

    def get_state(self) -> dict[str, Any]:
        """The memory of the rewards and the place in the file, for a checkpoint. All rounds so far are on the disk when
        this returns."""
        return {"memory": self._runner.get_state(), "file": self._outcomes.position()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Raises ValueError when the file does not begin as it did then."""
        self._outcomes.require(state["file"])
        self._runner.set_state(state["memory"])
