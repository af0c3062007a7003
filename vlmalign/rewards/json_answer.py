"""Structured answers: 1 where the answer is JSON that conforms to a schema, else 0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlmalign.rewards.contract import aligned
from vlmalign.rewards.json_schema import check_schema, violations
from vlmalign.tasks.blocks import answer_of
from vlmalign.tasks.json_text import fenced, read_json


@dataclass(frozen=True)
class JsonReward:
    """1.0 where the answer (see `answer_of`) is one JSON value without violations of `schema`, else 0.0.

    The answer may stand in one Markdown code fence; any other text around it makes it not JSON. For the keywords and
    how strictly JSON is read see `json_schema`. Raises ValueError for a schema outside that subset.
    """

    schema: Mapping[str, Any]

    def __post_init__(self) -> None:
        check_schema(self.schema)

    def score(self, completion: str) -> float:
        """
        >>> JsonReward({"type": "object", "required": ["strategy"]}).score('{"strategy": "ICSI"}')
        1.0
        """
        try:
            value = read_json(fenced(answer_of(completion)))
        except ValueError:
            return 0.0
        return float(not violations(value, self.schema))

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        del prompts, columns
        return [self.score(text) for (text,) in aligned(completions)]
