"""`vlmalign review plan`: how many cases and readers a stated effect needs, by simulation.

A vote of reader r on case c for one arm against another follows a latent score

    z = mu + a_r + b_c + e,   var(a) + var(b) + var(e) = 1,   all normal
    win if z > tau, loss if z < -tau, else a tie (1, 0 and 1/2 points)

mu and tau follow from the stated share of points and of ties; var(b) from the stated agreement (Krippendorff's alpha of two
readers' nominal votes); var(a) is stated. A simulated study is tested by the mean of its points against 1/2 with the two-way
error of two_way.py, two-sided at 5 %.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import optimize, stats

from vlmalign.review.blocks import reader_blocks
from vlmalign.review.two_way import two_way_mean

LEVEL = 0.05
CHUNK = 2_000_000  #: votes that are simulated at once


class Assumed(NamedTuple):
    share: float  #: of points for the first arm, in (0, 1)
    agreement: float  #: alpha, in [0, 1)
    ties: float  #: share of votes, in [0, 1)
    reader_spread: float  #: var(a), in [0, 1)


class Latent(NamedTuple):
    mu: float
    tau: float
    case: float  #: var(b)
    reader: float  #: var(a)


class Size(NamedTuple):
    """A size of study, and what simulated studies of it gave."""

    readers: int
    cases: int
    per_case: int
    votes: int
    power: float
    low: float  #: 95 % interval of the power, for the number of draws
    high: float
    size: float  #: share of tests that reject where there is no difference
    width: float  #: mean width of the 95 % interval of the share


def latent(assumed: Assumed) -> Latent:
    """The latent model of what is assumed.

    Raises:
        ValueError: for numbers outside their range, or an agreement that the spread of readers leaves no room for.
    """
    for name, value in assumed._asdict().items():
        low_open = name == "share"
        if not (0 < value < 1 if low_open else 0 <= value < 1):
            raise ValueError(
                f"{name.replace('_', '-')} must be {'above' if low_open else 'at least'} 0 and below 1, found {value:g}"
            )
    if assumed.ties / 2 >= min(assumed.share, 1 - assumed.share):
        raise ValueError(
            f"with {assumed.ties:g} of ties, the share of points cannot be {assumed.share:g}; state fewer ties"
        )
    # win + tie/2 = share: the thresholds follow from the shares of wins and losses.
    win, loss = assumed.share - assumed.ties / 2, 1 - assumed.share - assumed.ties / 2
    upper, lower = stats.norm.isf(win), stats.norm.ppf(loss)  # tau - mu and -tau - mu
    most = 1 - assumed.reader_spread
    highest = agreement(lower, upper, most)
    if assumed.agreement > highest:
        raise ValueError(
            f"agreement {assumed.agreement:g} is out of reach: with a reader spread of {assumed.reader_spread:g} it is at most "
            f"{highest:.2f}; state less of either"
        )
    case = optimize.brentq(lambda rho: agreement(lower, upper, rho) - assumed.agreement, 0.0, most, xtol=1e-6)
    return Latent(-(upper + lower) / 2, (upper - lower) / 2, float(case), assumed.reader_spread)


def agreement(lower: float, upper: float, rho: float) -> float:
    """Alpha of two votes whose latent scores correlate by `rho`: 1 - observed / expected disagreement.

    >>> round(agreement(0.0, 0.0, 0.5), 4)  # two classes of 1/2: 2 asin(rho) / pi
    0.3333
    """
    bounds = np.array([-np.inf, lower, upper, np.inf])
    shares = np.diff(stats.norm.cdf(bounds))
    same = sum(_square(low, high, rho) for low, high in pairwise(bounds) if low < high)
    return float(1 - (1 - same) / (1 - (shares**2).sum()))


def _square(low: float, high: float, rho: float) -> float:
    """Probability that two normal scores of correlation `rho` both lie between `low` and `high`."""
    if rho >= 1:
        return float(stats.norm.cdf(high) - stats.norm.cdf(low))

    def both(x: float, y: float) -> float:
        x, y = (min(max(value, -9.0), 9.0) for value in (x, y))
        return float(stats.multivariate_normal.cdf([x, y], cov=[[1, rho], [rho, 1]]))

    return both(high, high) - 2 * both(low, high) + both(low, low)


def planned(
    assumed: Assumed,
    readers: Sequence[int],
    cases: Sequence[int],
    *,
    per_case: int | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> list[Size]:
    """Every size of study, simulated `draws` times under what is assumed and as often without a difference.

    `per_case`: readers of each case, all of them by default, in balanced incomplete blocks as the study itself uses them.
    """
    if min(*readers, *cases) < 2:
        raise ValueError("readers and cases must be at least 2: one alone says nothing of the others")
    if draws < 100:
        raise ValueError(f"draws must be at least 100 to tell a power, found {draws}")
    if per_case is not None and not 1 <= per_case <= min(readers):
        raise ValueError(f"readers-per-case must be between 1 and the fewest readers, {min(readers)}, found {per_case}")
    model = latent(assumed)
    null = latent(assumed._replace(share=0.5))
    null = null._replace(case=model.case)
    found = []
    for count in readers:
        for number in cases:
            seen = np.zeros((count, number), dtype=bool)
            for case, block in enumerate(reader_blocks(number, count, per_case or count, seed)):
                seen[list(block), case] = True
            # The same draws for every assumption, so that curves are smooth and sizes comparable.
            rejected, width = _simulated(model, seen, draws, np.random.default_rng([seed, count, number]))
            wrongly, _ = _simulated(null, seen, draws, np.random.default_rng([seed, count, number, 1]))
            interval = stats.binomtest(rejected, draws).proportion_ci(method="wilson")
            found.append(
                Size(
                    count,
                    number,
                    per_case or count,
                    int(seen.sum()),
                    rejected / draws,
                    interval.low,
                    interval.high,
                    wrongly / draws,
                    width,
                )
            )
    return found


def _simulated(model: Latent, seen: np.ndarray, draws: int, chance: np.random.Generator) -> tuple[int, float]:
    """(studies that find a difference, mean width of the interval)."""
    readers, cases = seen.shape
    at_once = max(1, CHUNK // seen.size)
    rejected, width = 0, 0.0
    for start in range(0, draws, at_once):
        n = min(at_once, draws - start)
        z = chance.standard_normal((n, readers, cases)) * np.sqrt(max(0.0, 1 - model.case - model.reader)) + model.mu
        z += chance.standard_normal((n, readers, 1)) * np.sqrt(model.reader)
        z += chance.standard_normal((n, 1, cases)) * np.sqrt(model.case)
        points = (z > model.tau) + 0.5 * (np.abs(z) <= model.tau)
        test = two_way_mean(points, seen)
        reach = stats.t.ppf(1 - LEVEL / 2, test.df) * test.error
        rejected += int((np.abs(test.mean - 0.5) > reach).sum())
        width += float(2 * reach.sum())
    return rejected, width / draws


def table(assumed: Assumed, sizes: Sequence[Size], power: float) -> str:
    """The sizes as a table, and the smallest of each number of readers that has the power."""
    lines = [
        f"share {assumed.share:g}, agreement {assumed.agreement:g}, ties {assumed.ties:g}, reader spread {assumed.reader_spread:g}; "
        f"two-sided test at {LEVEL:g}, simulated",
        "readers  cases  votes  power             no difference  width of interval",
    ]
    for size in sizes:
        lines.append(
            f"{size.readers:7d}  {size.cases:5d}  {size.votes:5d}  {size.power:.2f} [{size.low:.2f}, {size.high:.2f}]"
            f"  {size.size:13.3f}  {size.width:17.2f}"
        )
    lines += [_enough(readers, sizes, power) for readers in dict.fromkeys(size.readers for size in sizes)]
    return "\n".join(lines)


def _enough(readers: int, sizes: Sequence[Size], power: float) -> str:
    own = sorted((size for size in sizes if size.readers == readers), key=lambda size: size.cases)
    enough = next((size for size in own if size.power >= power), None)
    few = "; below 5 readers no interval over readers can be trusted" if readers < 5 else ""
    if enough is None:
        return f"{readers} readers: power {power:g} is not reached with up to {own[-1].cases} cases{few}"
    return f"{readers} readers: {enough.cases} cases ({enough.votes} votes) reach power {power:g}{few}"


def write_plan(folder: Path, assumed: Assumed, sizes: Sequence[Size], power: float) -> list[Path]:
    """plan.json and the curve of power over cases, plan.svg; their paths."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    record = {"assumed": assumed._asdict(), "power": power, "level": LEVEL, "sizes": [size._asdict() for size in sizes]}
    (folder / "plan.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    with matplotlib.rc_context({"svg.hashsalt": "plan", "font.size": 10}):
        figure, axes = plt.subplots(figsize=(6.4, 4))
        for readers in dict.fromkeys(size.readers for size in sizes):
            own = sorted((size for size in sizes if size.readers == readers), key=lambda size: size.cases)
            low, high = ([size.power - size.low for size in own], [size.high - size.power for size in own])
            axes.errorbar(
                [s.cases for s in own],
                [s.power for s in own],
                yerr=[low, high],
                marker="o",
                capsize=3,
                label=f"{readers} readers",
            )
        axes.axhline(power, color="0.5", linestyle="--", linewidth=1)
        axes.set(
            xlabel="cases",
            ylabel="power",
            ylim=(0, 1.02),
            title=f"share {assumed.share:g}, agreement {assumed.agreement:g}",
        )
        axes.legend(frameon=False)
        figure.savefig(folder / "plan.svg", metadata={"Date": None}, bbox_inches="tight")
        plt.close(figure)
    return [folder / "plan.json", folder / "plan.svg"]
