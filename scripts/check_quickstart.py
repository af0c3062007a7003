"""Does a finished quickstart show what it must? Prints each fact and fails if one does not hold.

    python scripts/check_quickstart.py runs/quickstart

1. On held-out films of the training institution, SFT's macro-F1 exceeds the best of four trivial baselines by at least
   0.15, and their 95 % intervals do not overlap.
2. The mean GRPO reward of the last 20 % of steps exceeds that of the first 20 % by more than two standard errors.
3. On the same held-out films GRPO's greedy answers are not shown to share fewer labels with the truth (mean Jaccard, what is
   rewarded) than those of the SFT it went on from: the paired 95 % interval of the difference does not lie below 0.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

MARGIN = 0.15
STANDARD_ERRORS = 2.0


def facts(results: dict[str, Any], dataset: str, subset: str) -> list[tuple[str, bool]]:
    """(what was found, whether it is enough), for the three claims above."""
    (sft,) = (
        row["results"]["blocks"][subset]["macro"]
        for row in results["results"]
        if row["stage"] == "sft" and row["dataset"] == dataset
    )
    rivals = [
        (row["results"]["blocks"][subset]["macro"], row["name"])
        for row in results["baselines"]
        if row["dataset"] == dataset
    ]
    best, name = max(rivals, key=lambda rival: rival[0]["value"])
    (shared,) = (
        row["jaccard"]
        for row in results["differences"]
        if (row["dataset"], row["subset"], row["from"], row["to"]) == (dataset, subset, "sft", "grpo")
    )
    reward = results["rewards"]["grpo"]
    gain = reward["gain_in_standard_errors"]
    return [
        (
            f"{dataset}, macro-F1 of {subset} labels: SFT {_text(sft)}, best baseline ({name}) {_text(best)}; "
            f"difference {sft['value'] - best['value']:+.3f} (at least +{MARGIN}, without overlap)",
            sft["value"] - best["value"] >= MARGIN and sft["low"] > best["high"],
        ),
        (
            f"GRPO reward {reward['first']['mean']:.3f} -> {reward['last']['mean']:.3f}, "
            f"{gain:+.1f} standard errors (more than {STANDARD_ERRORS:.0f})",
            gain > STANDARD_ERRORS,
        ),
        (
            f"{dataset}, mean Jaccard of greedy answers, GRPO - SFT {shared['value']:+.3f} [{shared['low']:+.3f}, "
            f"{shared['high']:+.3f}] (not below 0)",
            shared["high"] >= 0,
        ),
    ]


def _text(interval: dict[str, Any]) -> str:
    return f"{interval['value']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"


def main(run: Path) -> int:
    results = json.loads((run / "scores" / "test" / "results.json").read_text(encoding="utf-8"))
    found = facts(results, "mimic-like", "all 14")
    for text, holds in found:
        print(("holds: " if holds else "DOES NOT HOLD: ") + text)
    return 0 if all(holds for _, holds in found) else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
