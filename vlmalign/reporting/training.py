"""What a stage of training did, in plain sentences and curves: which numbers of its metrics are shown, and how."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from vlmalign.reporting import curves
from vlmalign.reporting.boards import Board, verdict
from vlmalign.reporting.record import Stage
from vlmalign.reporting.styles import Style
from vlmalign.reporting.words import bounds, count, measured, number, p_value, share, signed

#: kind -> numbers told first, those that were measured
HEADLINE = {
    "sft": ("loss", "validation/loss", "validation/macro_f1"),
    "dpo": ("objective", "rewards/accuracies", "rewards/margins", "validation/loss", "validation/accuracy"),
}
POLICY = ("reward", "validation/reward", "valid", "unknown", "length", "kl", "entropy", "flat_groups")

#: what else is drawn, behind reward parts and validation; every other number stands in the table alone
DRAWN = (
    *("objective", "rewards/chosen", "rewards/rejected", "stopped", "reward_std", "unscored", "clipped"),
    *("value_error", "rollout_gap", "grad_norm"),
)
MEANING = {
    "loss": "cross-entropy of the answer, nat per token",
    "objective": "the loss that is minimised",
    "reward": "mean over the sampled answers of an update",
    "reward_std": "standard deviation of the rewards of an update",
    "validation/loss": "held-out rows",
    "validation/reward": "greedy answers to held-out prompts",
    "validation/accuracy": "held-out pairs with the chosen answer ahead",
    "rewards/accuracies": "share of pairs with the chosen answer ahead",
    "rewards/margins": "reward of chosen minus rejected answer",
    "valid": "share of sampled answers in the required form",
    "unknown": "share of answers with a name that is no label",
    "length": "mean length of an answer, tokens",
    "stopped": "share of answers that ended by themselves",
    "kl": "nat per token: how far from the reference model",
    "entropy": "nat per token: how undecided the model is",
    "flat_groups": "share of groups whose rewards are all equal",
    "unscored": "answers without a reward",
    "rollout_gap": "log-probability, sampled against trained",
    "grad_norm": "norm of the gradient before clipping",
}
OPEN = 6  # curves of a stage that show; more unfold
CLEAR = 2.0  # standard errors; a smaller change of the mean reward is said to be unclear


class Sentence(NamedTuple):
    """One thing that happened; `tone` is "good", "bad" or empty."""

    text: str
    tone: str = ""


def sentences(stage: Stage, found: Sequence[Board]) -> list[Sentence]:
    """What a stage of training did: to what it optimises, and to the scores of the stage it goes on from."""
    if not stage.metrics:
        return [Sentence("No update has been recorded.", "bad")]
    said = [*_learnt(stage), *(each for board in found if (each := _scored(stage, board)) is not None)]
    return said if stage.done else [Sentence(f"Under way: {_updates(stage.updates)} so far."), *said]


def figures(stage: Stage, style: Style, parts: Sequence[str], but: Collection[str] = ()) -> list[dict[str, Any]]:
    """The curves of a stage, what matters most first, without those that are drawn elsewhere (`but`)."""
    found = []
    for column in _shown(stage, parts):
        if column in but:
            continue
        line = curves.curve(stage.metrics, column)
        svg = curves.curve_figure(line, f"{stage.name}: {column}", style.css)
        meaning = MEANING.get(column, "a reward by itself, before its weight" if column in parts else "")
        found.append({"title": column, "meaning": meaning, "svg": svg})
    return found


def headline_numbers(stage: Stage) -> dict[str, curves.Fifths]:
    """First and last fifth of the numbers that matter most."""
    return {
        name: curves.fifths(line)
        for name in HEADLINE.get(stage.kind, POLICY)
        if (line := curves.curve(stage.metrics, name)) is not None
    }


def recorded(stage: Stage) -> dict[str, curves.Fifths]:
    """First and last fifth of every number."""
    return {name: curves.fifths(curves.curve(stage.metrics, name)) for name in curves.columns(stage.metrics)}


def window(stage: Stage) -> int:
    """How many updates the rolling mean of a stage's curves takes."""
    return min(len(stage.metrics), curves.rolling_window(len(stage.metrics)))


def _shown(stage: Stage, parts: Sequence[str]) -> list[str]:
    names = curves.columns(stage.metrics)
    held_out = [name for name in names if "/" in name and not name.endswith(("/n", "_se"))]
    held_out = [name for name in held_out if not name.startswith(("rewards/", "logps/", "length/", "loss/"))]
    wanted = [*HEADLINE.get(stage.kind, POLICY), *parts, *held_out, *DRAWN]
    # With one loss the objective is that loss.
    twice = {"objective"} if "loss" in names else set()
    return [name for name in dict.fromkeys(wanted) if name in names and name not in twice]


def _learnt(stage: Stage) -> list[Sentence]:
    over = f"over {_updates(stage.updates)}"
    found = headline_numbers(stage)
    if stage.kind == "sft" and "loss" in found:
        return [Sentence(f"Loss {_moved(found['loss'])} {over}.")]
    if stage.kind == "dpo" and "rewards/accuracies" in found:
        first, last = found["rewards/accuracies"]
        pairs = f"{share(first, 0)} of pairs at first, in {share(last, 0)} in the end"
        margin = f"; margin {_moved(found['rewards/margins'])}" if "rewards/margins" in found else ""
        return [Sentence(f"The chosen answer had the higher reward in {pairs}{margin}, {over}.")]
    if "reward" not in found:
        return [Sentence(f"{_updates(stage.updates)}.")]
    return [_reward(stage, found["reward"], over), *_flat(stage)]


def _reward(stage: Stage, found: curves.Fifths, over: str) -> Sentence:
    errors = curves.gain_in_errors(curves.curve(stage.metrics, "reward"))
    text = f"Mean reward {_moved(found)} {over}"
    if errors is None:
        return Sentence(f"{text}.")
    if abs(errors) < CLEAR:
        return Sentence(f"{text}: no clear change ({signed(errors, 1)} standard errors).")
    return Sentence(f"{text} ({signed(errors, 1)} standard errors).", "good" if errors > 0 else "bad")


def _flat(stage: Stage) -> list[Sentence]:
    """Said when a quarter of the updates or more had no two rewards of a group to compare."""
    shares = [row["flat_groups"] for row in stage.metrics if row.get("flat_groups") is not None]
    idle = sum(value >= 1 for value in shares)
    if not shares or 4 * idle < len(shares):
        return []
    text = f"{count(idle)} of {_updates(len(shares))} had nothing to compare: in every group all rewards were equal."
    return [Sentence(text, "bad")]


def _scored(stage: Stage, board: Board) -> Sentence | None:
    """How the macro-F1 on one data set compares with the nearest stage before this one that was answered too."""
    for row in board.differences:
        if row["to"].partition("@")[0] == stage.name and board.lines and row["subset"] == board.lines[0].subset:
            gap, said = row["macro"], verdict(row["macro"])
            if gap["value"] is None:
                return None
            if moved := {"higher": "rose by", "lower": "fell by"}.get(said):
                text = f"macro-F1 {moved} {number(abs(gap['value']))} against {row['from']} ({bounds(gap, sign=True)})"
            else:
                text = f"macro-F1: {said} against {row['from']} ({signed(gap['value'])}, {bounds(gap, sign=True)})"
            if gap.get("p_holm") is not None:
                text += f", adjusted p {p_value(gap['p_holm'])}"
            return Sentence(f"{board.title}: {text}.", {"higher": "good", "lower": "bad"}.get(said, ""))
    return None


def _moved(found: curves.Fifths) -> str:
    return f"{measured(found.first)} → {measured(found.last)}"


def _updates(number_of: int) -> str:
    return f"{count(number_of)} update{'s' if number_of != 1 else ''}"
