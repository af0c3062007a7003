"""Structured answers: 1 where the answer is JSON that conforms to a schema, else 0."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlmalign.rewards.contract import aligned
from vlmalign.rewards.json_schema import check_schema, read_json, violations
from vlmalign.rewards.parse import answer_of

_FENCE = re.compile(r"```(?:json)?[ \t]*\n(.*)\n[ \t]*```", re.DOTALL)


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
        answer = answer_of(completion)
        fenced = _FENCE.fullmatch(answer)
        try:
            value = read_json(fenced.group(1) if fenced else answer)
        except ValueError:
            return 0.0
        return float(not violations(value, self.schema))

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        del prompts, columns
        return [self.score(text) for (text,) in aligned(completions)]
