"""The methods paragraph of a paper, with the numbers of the study in it, and the warnings that belong on every page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmalign.reporting.words import count, listed
from vlmalign.review.analysis.pairs import RULE
from vlmalign.review.protocol import Protocol


def warnings(found: Mapping[str, Any]) -> list[str]:
    """What a reader of the page must know first."""
    said = []
    if found["simulated"]:
        said.append(
            "The votes of this study are simulated: they are not people's, and say nothing of any patient or model."
        )
    if found["readers"] < found["fewest_readers"]:
        said.append(
            f"{_of(found['readers'], 'reader')}: below {found['fewest_readers']} readers no interval over readers can be "
            "trusted, and no p-value that rests on it. Read what follows as a description of these readers."
        )
    given, closed = found["flow"]["pages"]["given"], found["flow"]["pages"]["closed"]
    if closed < given:
        said.append(f"{count(given - closed)} of {count(given)} pages are not closed: this is an interim analysis.")
    if not found["flow"]["protocol"]["frozen"]:
        said.append("The protocol was not frozen.")
    return said


def methods(found: Mapping[str, Any], protocol: Protocol) -> str:
    """One paragraph, ready to be edited."""
    design, people, pages = protocol.design, found["flow"]["people"], found["pages"]
    simulated = "simulated " if found["simulated"] else ""
    text = [
        f"{_of(people['begun'], simulated + 'person', simulated + 'people')} began the study; {_of(found['readers'], 'reader')} "
        f"judged {_of(found['cases'], 'case')}, each assigned to {_of(design.readers_per_case, 'reader')}, on pages of "
        f"{_of(design.answers, 'answer')} out of {_of(len(found['arms']), 'arm')} ({listed(found['arms'])}), blinded to their origin, "
        "in an order and on sides that were drawn for every reader.",
        f"The protocol was frozen at the first vote (SHA-256 {found['hash'][:16]}, version {found['protocol_version']}). "
        f"{_of(pages['analysed'], 'closed page')} were analysed, with {_of(found['ballots'], 'preference')} and "
        f"{_of(found['ratings'], 'rated answer')}.",
    ]
    if away := {name: n for name, n in pages.items() if name != "analysed"}:
        text.append("Kept apart or left out: " + ", ".join(f"{count(n)} {name}" for name, n in away.items()) + ".")
    if found["ballots"]:
        adjusted = [model["name"] for model in found["preference"] if model["name"].startswith("adjusted")]
        text += [
            RULE,
            f"Winning shares, pairwise rates and their differences have 95 % percentile intervals from {count(found['draws'])} "
            "resamplings of readers and cases (pigeonhole bootstrap; Owen 2007).",
            "Strengths are from the Bradley-Terry model with ties (Davidson 1970) and an effect of order, fitted by maximum "
            f"likelihood, unadjusted{' and ' + ' and '.join(adjusted) + ' (doublings)' if adjusted else ''}; standard errors "
            "are two-way cluster sandwiches over readers and cases (Cameron, Gelbach and Miller 2011), with t of the smaller "
            f"number of clusters less one ({max(min(found['readers'], found['cases']) - 1, 0)} degrees of freedom).",
        ]
    if found["ordinal"]:
        text.append(
            f"{_of(len(found['ordinal']), 'ordinal outcome')} were compared by cumulative logit models of arm and side with the "
            "same errors; they are marginal, not mixed models."
        )
    text.append(
        "Wilcoxon signed-rank and sign tests used averages of cases over readers and of readers over cases. P-values were "
        "adjusted by Holm's method within each family. Agreement is Krippendorff's alpha with intervals from resampled cases, "
        "mean Cohen's kappa of pairs of readers (quadratic weights for ratings) and ICC(1). No test of non-inferiority was "
        "made. Analyses were made with vlmalign."
    )
    return " ".join(text)


def _of(n: int, one: str, many: str = "") -> str:
    """`n` things, in words: "1 reader", "2 readers"."""
    return f"{count(n)} {one if n == 1 else many or one + 's'}"
