"""Rewards of a stage that survive it: written to disk before they are used, and read there when a round comes again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlmalign.rewards.outcomes import OutcomeFile, score_or_replay
from vlmalign.rewards.runner import RewardRunner, ScoredBatch


class RecordedRewards:
    """`score` and `memory` of a `PolicySource`: the runner's rewards, each round of them kept in `outcomes`.

    A round that a continued run samples again has its rewards read, not asked for again: a judge may change its mind.
    """

    def __init__(self, runner: RewardRunner, outcomes: OutcomeFile):
        self._runner, self._outcomes = runner, outcomes

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
            ValueError: when the file holds that round for other completions or other rewards.
        """
        return score_or_replay(
            self._runner,
            self._outcomes,
            step=number,
            keys=keys,
            prompts=prompts,
            completions=completions,
            columns=columns,
        )

    def get_state(self) -> dict[str, Any]:
        """The memory of the rewards, for a checkpoint. All rounds so far are on the disk when this returns."""
        self._outcomes.sync()
        return self._runner.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        self._runner.set_state(state)
