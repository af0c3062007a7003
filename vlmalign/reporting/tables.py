"""What the report says in numbers and sentences: the headline, differences, baselines, what training recorded.

Averages over different label sets cannot be compared, so a data set has one line per label subset.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from vlmalign.reporting.run_folder import Evaluation, RunFolder
from vlmalign.reporting.words import STAGE_NAMES, count, duration, listed, number, scored, signed

SHOWN_SKIPS = 50  # rows of the table of skipped films; the file has them all


class StageScores(NamedTuple):
    """One stage on one label subset; intervals as in evaluation/results.py."""

    macro: Mapping[str, Any]
    macro_all: Mapping[str, Any]
    micro: Mapping[str, Any]
    exact_match: float
    fail_rate: float


class Trivial(NamedTuple):
    """A trivial baseline on one label subset."""

    name: str
    macro: Mapping[str, Any]
    micro: Mapping[str, Any]
    exact_match: float


@dataclass(frozen=True)
class Headline:
    """One data set and one label subset: every stage, and the trivial baselines."""

    dataset: str
    role: str
    subset: str
    labels: int  #: in the subset
    supported: int  #: of them, those that some film has: what macro-F1 is taken over
    n: int
    patients: int
    stages: dict[str, StageScores]
    baselines: list[Trivial]

    @property
    def baseline(self) -> Trivial | None:
        """The baseline with the highest macro-F1; of equal ones the first."""
        defined = [baseline for baseline in self.baselines if baseline.macro["value"] is not None]
        return max(defined, key=lambda baseline: baseline.macro["value"], default=None)

    def gain(self, stage: str) -> float | None:
        """Macro-F1 of a stage above that of the best trivial baseline."""
        value = self.stages[stage].macro["value"]
        return None if value is None or self.baseline is None else value - self.baseline.macro["value"]

    @property
    def comparison(self) -> str:
        """How the stages compare with the best trivial baseline, whichever way it came out; empty without one."""
        if self.baseline is None:
            return ""
        verdicts = [
            f"{STAGE_NAMES[stage]} {_verdict(each.macro, self.baseline.macro)}"
            for stage, each in self.stages.items()
            if stage != "base"
        ]
        trivial = f"Best trivial baseline, \u201c{self.baseline.name}\u201d: {scored(self.baseline.macro)}"
        return f"{trivial}; {', '.join(verdicts)}." if verdicts else f"{trivial}."


class Finding(NamedTuple):
    """One data set in the headline."""

    line: Headline  #: the subset with most labels: F1 of a label is the same in every subset
    lines: list[Headline]  #: all subsets, that one first


def findings(lines: list[Headline]) -> list[Finding]:
    """Headlines by data set, in their order, the subset with most labels first."""
    datasets = dict.fromkeys(line.dataset for line in lines)
    grouped = [
        sorted((line for line in lines if line.dataset == name), key=lambda line: -line.labels) for name in datasets
    ]
    return [Finding(group[0], group) for group in grouped]


def headlines(evaluation: Evaluation) -> list[Headline]:
    """A line per data set and label subset on which some stage has been scored."""
    lines = []
    for dataset in evaluation.datasets:
        scores = evaluation.scores[dataset["name"]]
        for subset in dict.fromkeys(name for results in scores.values() for name in results["blocks"]):
            stages = {
                stage: (results, results["blocks"][subset])
                for stage, results in scores.items()
                if subset in results["blocks"]
            }
            results, block = next(iter(stages.values()))
            lines.append(
                Headline(
                    dataset=dataset["name"],
                    role=dataset["role"],
                    subset=subset,
                    labels=len(block["labels"]),
                    supported=block["macro_labels"],
                    n=results["n"],
                    patients=results["patients"],
                    stages={stage: _stage_scores(*pair) for stage, pair in stages.items()},
                    baselines=[
                        Trivial(name, found["macro"], found["micro"], found["exact_match"])
                        for name, trivial in evaluation.baselines[dataset["name"]].items()
                        if (found := trivial["blocks"].get(subset)) is not None
                    ],
                )
            )
    return lines


def difference_verdict(interval: Mapping[str, Any]) -> str:
    """What a paired difference shows, in words."""
    if interval["low"] is None or interval["high"] is None:
        return "not determined"
    if interval["low"] > 0:
        return "higher (interval excludes\u00a00)"
    if interval["high"] < 0:
        return "lower (interval excludes\u00a00)"
    return "no difference shown (interval holds\u00a00)"


def reward_sentence(reward: Mapping[str, Any]) -> str:
    """How the mean GRPO reward moved from the first fifth of the steps to the last."""
    first, last = reward["first"], reward["last"]
    text = f"Mean reward was {_mean(first)} over the first fifth of the steps and {_mean(last)} over the last"
    if reward["gain"] is None:
        return text + "."
    text += f": a change of {signed(reward['gain'])}"
    errors = reward["gain_in_standard_errors"]
    return text + ("." if errors is None else f", {number(abs(errors), 1)} standard errors.")


def facts(run: RunFolder) -> dict[str, str]:
    """What was run, in short phrases; only what the folder knows."""
    known = {}
    if run.coverage is not None:
        sets = run.coverage["sets"]
        for name, title in (("sft", "SFT films"), ("rl", "GRPO films"), ("validation", "Validation films")):
            if name in sets:
                known[title] = count(sets[name]["films"])
    for title, rows in (("SFT steps", run.sft), ("GRPO steps", run.grpo)):
        if rows is not None:
            known[title] = count(rows[-1]["step"])
    if run.evaluation is not None:
        datasets = run.evaluation.datasets
        known["Test films"] = count(sum(dataset["n"] for dataset in datasets))
        known["Test sets"] = count(len(datasets))
    if run.timing is not None:
        known["Time"] = duration(sum(run.timing.values()))
    return known


def reading(evaluation: Evaluation) -> str:
    """How the intervals were made, from what the results say of themselves."""
    made = {
        (results["level"], results["draws"]) for scores in evaluation.scores.values() for results in scores.values()
    }
    return (
        listed([f"{100 * level:g} % intervals from {draws:,} draws" for level, draws in sorted(made)]) if made else ""
    )


def skipped_counts(skipped: list[dict[str, Any]]) -> dict[str, int]:
    """Skipped films per data set, in the order of first mention."""
    return dict(Counter(row["dataset"] for row in skipped))


def flatten(record: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested JSON as dotted names and texts.

    >>> flatten({"python": "3.12", "packages": {"jax": "0.11"}, "devices": [{"kind": "cpu"}, {"kind": "cpu"}]})
    {'python': '3.12', 'packages.jax': '0.11', 'devices.1.kind': 'cpu', 'devices.2.kind': 'cpu'}
    """
    flat: dict[str, str] = {}
    for key, value in record.items():
        name = f"{prefix}{key}"
        if isinstance(value, list):
            value = {str(place): item for place, item in enumerate(value, start=1)}
        if isinstance(value, dict):
            flat |= flatten(value, f"{name}.")
        else:
            flat[name] = "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    return flat


def _stage_scores(results: Mapping[str, Any], block: Mapping[str, Any]) -> StageScores:
    return StageScores(block["macro"], block["macro_all"], block["micro"], block["exact_match"], results["fail_rate"])


def _verdict(model: Mapping[str, Any], baseline: Mapping[str, Any]) -> str:
    """A model against a baseline, by value and by whether the intervals meet."""
    if model["value"] is None:
        return "undefined"
    difference = model["value"] - baseline["value"]
    side = f"{number(abs(difference))} {'above' if difference > 0 else 'below'} it" if difference else "level with it"
    if None in (model["low"], model["high"], baseline["low"], baseline["high"]):
        return f"{side} (no intervals)"
    apart = model["low"] > baseline["high"] or model["high"] < baseline["low"]
    return f"{side} (intervals {'apart' if apart else 'overlap'})"


def _mean(fifth: Mapping[str, Any]) -> str:
    text = number(fifth["mean"])
    if fifth["standard_error"] is not None:
        text += f" (standard error {number(fifth['standard_error'])})"
    return text
