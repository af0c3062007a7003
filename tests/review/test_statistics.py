"""Statistics of the design: the planner's latent model, the two-way error and the blinding index beside their formulas."""

import json
import math
import re

import numpy as np
import pytest
from scipy import stats

from vlmalign import cli
from vlmalign.review.bang import blinding_index
from vlmalign.review.plan import Assumed, Size, agreement, latent, planned, table, write_plan
from vlmalign.review.two_way import two_way_mean


def test_two_way_error_is_the_sandwich_of_cameron_gelbach_and_miller():
    """Beside the definition: a double sum over pairs of votes that share a reader or a case, each part with G / (G - 1)."""
    chance = np.random.default_rng(0)
    seen = chance.random((5, 9)) < 0.7
    values = chance.random((3, 5, 9))
    found = two_way_mean(values, seen)
    rows, columns = np.nonzero(seen)
    n = len(rows)
    for study, mean, error in zip(values, found.mean, found.error, strict=True):
        e = study[rows, columns] - study[rows, columns].mean()
        products = np.outer(e, e)
        same_reader, same_case = rows[:, None] == rows, columns[:, None] == columns
        parts = [
            (products * same).sum() * g / (g - 1)
            for same, g in ((same_reader, 5), (same_case, 9), (same_reader & same_case, n))
        ]
        assert mean == pytest.approx(study[rows, columns].mean())
        assert error**2 == pytest.approx(max(parts[0] + parts[1] - parts[2], parts[0], parts[1]) / n**2)
    assert found.df == 4


def test_one_reader_or_one_case_gives_no_two_way_error():
    with pytest.raises(ValueError, match="at least 2 readers and 2 cases, found 1 and 4"):
        two_way_mean(np.zeros((1, 4)), np.ones((1, 4), dtype=bool))


@pytest.mark.parametrize("rho", [0.0, 0.3, 0.8])
def test_agreement_of_two_classes_has_a_closed_form(rho):
    """P(both on one side of 0) = 1/2 + asin(rho) / pi, so alpha = 2 asin(rho) / pi."""
    assert agreement(0.0, 0.0, rho) == pytest.approx(2 * math.asin(rho) / math.pi, abs=1e-4)


@pytest.mark.parametrize(
    "assumed", [Assumed(0.6, 0.3, 0.1, 0.05), Assumed(0.5, 0.0, 0.0, 0.2), Assumed(0.75, 0.5, 0.3, 0.0)]
)
def test_the_latent_model_gives_what_is_assumed(assumed):
    """By simulation of pairs of readers: share of points, share of ties, alpha."""
    model = latent(assumed)
    n = 200_000
    chance = np.random.default_rng(1)
    case = chance.standard_normal(n) * math.sqrt(model.case)
    z = model.mu + case + chance.standard_normal((2, n)) * math.sqrt(1 - model.case)
    votes = (z > model.tau) + 0.5 * (np.abs(z) <= model.tau)
    assert votes.mean() == pytest.approx(assumed.share, abs=0.005)
    assert (votes == 0.5).mean() == pytest.approx(assumed.ties, abs=0.005)
    expected = 1 - sum((votes == value).mean() ** 2 for value in (0, 0.5, 1))
    assert 1 - (votes[0] != votes[1]).mean() / expected == pytest.approx(assumed.agreement, abs=0.01)


@pytest.mark.parametrize(
    ("assumed", "words"),
    [
        (Assumed(1.0, 0.3, 0.1, 0.05), "share must be above 0 and below 1, found 1"),
        (Assumed(0.6, -0.1, 0.1, 0.05), "agreement must be at least 0 and below 1"),
        (Assumed(0.9, 0.3, 0.3, 0.05), r"with 0\.3 of ties, the share of points cannot be 0\.9"),
        (Assumed(0.6, 0.9, 0.1, 0.4), r"agreement 0\.9 is out of reach: with a reader spread of 0\.4 it is at most"),
    ],
)
def test_assumptions_that_cannot_be_are_refused(assumed, words):
    with pytest.raises(ValueError, match=words):
        latent(assumed)


def test_power_grows_with_cases_and_readers_and_the_test_keeps_its_level():
    sizes = planned(Assumed(0.65, 0.3, 0.1, 0.02), [6, 12], [20, 60], draws=400, seed=3)
    power = {(size.readers, size.cases): size.power for size in sizes}
    assert power[6, 20] < power[6, 60] < power[12, 60]
    assert power[6, 20] < power[12, 20]
    assert power[12, 60] > 0.8
    # Rejections without a difference: at most 5 %, within what 400 draws can tell.
    assert all(size.size <= stats.binom.ppf(0.9995, 400, 0.05) / 400 for size in sizes)
    assert all(size.low <= size.power <= size.high for size in sizes)
    words = table(Assumed(0.65, 0.3, 0.1, 0.02), sizes, 0.8)
    assert "12 readers: 60 cases (720 votes) reach power 0.8" in words


def test_a_plan_uses_the_blocks_of_the_study_and_says_what_is_too_few(capsys):
    arguments = ["--readers", "3", "--cases", "10", "--readers-per-case", "2", "--draws", "100"]
    assert cli.main(["review", "plan", *arguments]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^ +3 +10 +20 ", said, re.MULTILINE)  # 3 readers, 10 cases, 20 votes
    assert (
        "power 0.8 is not reached with up to 10 cases; below 5 readers no interval over readers can be trusted" in said
    )
    assert cli.main(["review", "plan", "--readers", "1"]) == 2
    assert "readers and cases must be at least 2" in capsys.readouterr().err


@pytest.mark.full  # matplotlib takes its time to import
def test_a_plan_is_written_with_its_curve(tmp_path):
    assumed = Assumed(0.6, 0.3, 0.1, 0.05)
    sizes = [Size(5, 20, 5, 100, 0.2, 0.1, 0.3, 0.05, 0.4), Size(5, 40, 5, 200, 0.4, 0.3, 0.5, 0.05, 0.3)]
    paths = write_plan(tmp_path, assumed, sizes, 0.8)
    written = json.loads(paths[0].read_text())
    assert [Size(**size) for size in written["sizes"]] == sizes
    assert written["assumed"] == assumed._asdict()
    assert "<svg" in paths[1].read_text()
    again = write_plan(tmp_path / "again", assumed, sizes, 0.8)
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in paths]


def test_the_blinding_index_of_one_guess_a_reader_is_that_of_bang_ni_and_davis():
    """BI = p_right - p_wrong; variance [p_r (1 - p_r) + p_w (1 - p_w) + 2 p_r p_w] / n, here with n - 1 for n."""
    right, wrong, unknown = 12, 5, 8
    answers = [True] * right + [False] * wrong + [None] * unknown
    index = blinding_index([(f"R{i}", answer) for i, answer in enumerate(answers)], choices=2)
    n = len(answers)
    p, q = right / n, wrong / n
    assert index.value == pytest.approx(p - q)
    error = math.sqrt((p * (1 - p) + q * (1 - q) + 2 * p * q) / (n - 1))
    reach = stats.t.ppf(0.975, n - 1) * error
    assert (index.low, index.high) == pytest.approx((p - q - reach, p - q + reach))
    assert (index.guesses, index.right, index.wrong, index.unknown, index.readers) == (25, 12, 5, 8, 25)


@pytest.mark.parametrize(
    ("answers", "value"), [([True] * 4, 1.0), ([False] * 4, -0.5), ([None] * 4, 0.0), ([True, False, False], 0.0)]
)
def test_the_blinding_index_is_zero_for_chance(answers, value):
    """Of three choices: one right guess and two wrong ones are chance."""
    index = blinding_index([("R1", answer) for answer in answers], choices=3)
    assert index.value == pytest.approx(value)
    assert (index.low, index.high) == (None, None)  # one reader says nothing of others


def test_guesses_of_one_reader_are_not_counted_as_many_readers():
    one_each = [(f"R{i}", i % 3 > 0) for i in range(12)]
    clustered = [(f"R{i // 4}", i >= 4) for i in range(12)]
    narrow, wide = blinding_index(one_each, 2), blinding_index(clustered, 2)
    assert narrow.value == wide.value
    assert wide.high - wide.low > narrow.high - narrow.low
