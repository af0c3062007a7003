"""Collapse onto one label: a price on the label that fills the last predictions. A reward with memory."""

from __future__ import annotations

from collections import Counter
from typing import Any

from vlmalign.rewards.contract import MemoryReward, Row, text_of
from vlmalign.tasks.label_reader import LabelReader, label_reader


def label_collapse(
    labels: tuple[str, ...] | LabelReader,
    *,
    window: int = 100,
    share: float = 0.7,
    price: float = 50.0,
    excess_price: float = 30.0,
    everyone: bool = False,
) -> MemoryReward:
    """The collapse term of ChexReason's nuanced reward (arXiv 2512.23090), <= 0.

    Over the last `window` predictions, when a label stands in more than `share` of them, completions that predict it
    get -price - excess_price x (its count - share x window). The paper prints 100, 70 %, -50 and -30 "per excess
    repetition". Ours, since it says no more:

    - Predictions are completions of valid form. Until the window is full nothing is judged.
    - All completions of one call are judged by the window as it was before the call: by a window that moves within
      it, a later sample of a group would pay for earlier ones, and the order of sampling would become advantage.
    - Only completions that predict the dominant label pay. With `everyone=True` all of them do, which may be what the
      paper did: the same amount for a whole group cancels in its advantage and has no gradient.
    - Two dominant labels are paid for both. The excess counts as printed, without a cap: a window of one label only
      costs 50 + 30 x 30 = 950.

    State: {"window": the last predictions, each a list of labels, oldest first}.

    Raises ValueError for arguments out of range.
    """
    reader = label_reader(labels)
    if window < 1 or not 0 < share < 1 or not (price >= 0 and excess_price >= 0):
        raise ValueError(
            "label_collapse needs window >= 1, 0 < share < 1 and prices >= 0, found "
            f"window={window}, share={share}, price={price}, excess_price={excess_price}"
        )

    def init() -> dict[str, Any]:
        return {"window": []}

    def update(rows: list[Row], state: dict[str, Any]) -> tuple[list[float | None], dict[str, Any]]:
        past: list[list[str]] = state["window"]
        counts = Counter(label for prediction in past for label in prediction) if len(past) == window else Counter()
        dominant = {label: counts[label] for label in reader.labels if counts[label] > share * window}
        due = {label: price + excess_price * (count - share * window) for label, count in dominant.items()}
        parsed = [reader.read(text_of(row.completion)) for row in rows]
        rewards: list[float | None] = []
        for found in parsed:
            paid = [due[label] for label in reader.labels if label in due and (everyone or label in found.predicted)]
            rewards.append(-float(sum(paid)))
        recent = past + [list(found.predicted) for found in parsed if found.valid]
        return rewards, {"window": recent[-window:]}

    return MemoryReward(init, update)
