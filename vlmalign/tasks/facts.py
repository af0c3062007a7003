"""What a task reads in one completion. Rewards, predictions and metrics look at nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Facts:
    """`values` is JSON and depends on the kind of task: labels, option letters, fields, which constraints hold."""

    valid: bool  #: the completion has the form that the task asks for
    values: Any  #: what it says; of an invalid completion, what can be said without guessing
    unknown: tuple[str, ...] = ()  #: names it gives that the task does not know, in the order written
    reasoning: str = ""  #: text of the think block, trimmed
    reason: str | None = None  #: in words, why it is not valid; None if it is. Never quotes the completion
    notes: Mapping[str, Any] = field(default_factory=dict)  #: whatever else the kind of task counts
