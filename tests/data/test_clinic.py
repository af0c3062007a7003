"""The invented clinic: deterministic, its three centres differ as stated, its tails are long, nothing infeasible occurs."""

from collections import Counter

import numpy as np
import pandas as pd
import pytest

from vlmalign.data.records import clinic
from vlmalign.data.sources.ehr import EhrSource

N = 4000


@pytest.fixture(scope="module")
def records():
    return clinic.draw(N, seed=3)


@pytest.fixture(scope="module")
def frame(records):
    return pd.DataFrame(records)


def share(mask, of):
    return float((mask & of).sum() / of.sum())


def test_the_same_seed_gives_the_same_records(records):
    assert clinic.draw(300, seed=3) == records[:300]
    assert clinic.draw(300, seed=4) != records[:300]
    assert len({row[clinic.ID] for row in records}) == N


def test_it_is_read_by_its_own_schema_without_a_skip(tmp_path):
    config = EhrSource(kind="ehr", path="new/cycles.csv", phantom={"records": 400, "seed": 3})
    config.invent(lambda path: tmp_path / path)
    before = (tmp_path / "new" / "cycles.csv").read_bytes()
    config.invent(lambda path: tmp_path / path)
    assert (tmp_path / "new" / "cycles.csv").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    opened = config.open(lambda path: tmp_path / path)
    assert (len(opened), opened.skipped, opened.notes) == (400, [], [])
    drawn = clinic.draw(400, seed=3)
    for record, row in zip(opened, drawn, strict=True):
        assert {name: record.meta[name] for name in clinic.FIELDS} == {name: row[name] for name in clinic.FIELDS}
        assert record.patient == row[clinic.PATIENT]
        assert all(name not in record.meta["summary"].lower() for name in ("protocol", "dose", "centre", "strategy"))
    longest = max(len(record.meta["summary"]) for record in opened)
    assert longest < 800  # characters


def test_nothing_infeasible_occurs(records):
    assert [clinic.violations(row) for row in records if clinic.violations(row)] == []


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("DI with a protocol or dose", {"strategy": "DI", "partner": "none"}),
        ("stimulation without a protocol", {"protocol": None, "dose": None}),
        ("a natural cycle with a dose, or another without", {"protocol": "natural cycle"}),
        ("DI with a male partner or both tubes blocked", {"strategy": "DI", "protocol": None, "dose": None}),
        ("conventional IVF under 1 million/ml", {"sperm": 0.0}),
        ("PGT-M without a monogenic disorder", {"strategy": "PGT-M"}),
        ("PGT-SR without a rearrangement", {"strategy": "PGT-SR"}),
        ("an agonist with a risk of hyperstimulation", {"amh": 8.0, "protocol": "long agonist"}),
        ("more than 225 IU with a risk of hyperstimulation", {"afc": 30, "dose": 300}),
        ("more than 150 IU in the mild protocol", {"protocol": "mild", "dose": 200}),
    ],
)
def test_what_is_forbidden_is_seen(name, change):
    """Every rule on a record that breaks it alone."""
    plain = dict.fromkeys(clinic.FIELDS) | {
        "partner": "male", "tubes": "both open", "sperm": 60.0, "amh": 2.0, "afc": 12, "genetics": "none known",
        "strategy": "IVF", "protocol": "antagonist", "dose": 150,
    }  # fmt: skip
    assert clinic.violations(plain) == []
    assert clinic.violations(plain | change) == [name]


def test_every_rule_of_feasibility_has_a_case(request):
    cases = next(m for m in test_what_is_forbidden_is_seen.pytestmark if m.name == "parametrize").args[1]
    assert [name for name, _ in cases] == list(clinic.FORBIDDEN)


def test_the_centres_differ_as_stated(frame):
    counts = frame["centre"].value_counts(normalize=True)
    for name, centre in clinic.CENTRES.items():
        own = frame["centre"] == name
        assert counts[name] == pytest.approx(centre.share, abs=0.04)
        assert frame["age"][own].mean() == pytest.approx(centre.age, abs=0.6)
        assert share(frame["amh"].isna(), own) == pytest.approx(centre.unmeasured, abs=0.04)
        plain = own & frame["strategy"].isin(["IVF", "ICSI"]) & (frame["sperm"] >= 16)
        plain &= (frame["motility"] >= 20) & (frame["failed"] != True)  # noqa: E712  (None where there was no cycle)
        expected = centre.icsi * 29 / 30 + (1 - centre.icsi) / 30
        assert share(frame["strategy"] == "ICSI", plain) == pytest.approx(expected, abs=0.05)
        older = (
            own
            & (frame["age"] >= centre.pgt_a_from)
            & (frame["genetics"] == "none known")
            & (frame["partner"] == "male")
        )
        assert share(frame["strategy"] == "PGT-A", older) == pytest.approx(0.7, abs=0.1)
    dose = frame.groupby("centre")["dose"].mean()
    assert dose["west"] < dose["north"] < dose["south"]
    used = {name: Counter(frame["protocol"][frame["centre"] == name]).most_common(1)[0][0] for name in clinic.CENTRES}
    assert used == {name: centre.protocol for name, centre in clinic.CENTRES.items()}


def test_tails_are_long_and_rare_classes_are_rare(frame):
    strategy = frame["strategy"].value_counts(normalize=True)
    assert set(strategy.index) == set(clinic.STRATEGIES)
    assert 0.002 < strategy["PGT-SR"] < strategy["PGT-M"] < 0.04
    assert set(frame["protocol"].dropna()) == set(clinic.PROTOCOLS)
    assert frame["protocol"].value_counts(normalize=True)["natural cycle"] < 0.03
    assert set().union(*frame["diagnoses"]) == set(clinic.DIAGNOSES)
    for name in ("amh", "sperm", "duration", "earlier_ivf", "losses"):
        values = frame[name].dropna().astype(float)
        assert values.skew() > 0.5, name
        assert values.quantile(0.99) > 2 * values.median(), name
    repeated = frame.groupby(clinic.PATIENT).size()
    assert np.mean(repeated > 1) == pytest.approx(0.33, abs=0.04)


def test_what_physiology_says_of_the_values(frame):
    numbers = frame[["age", "amh", "afc", "fsh", "dose", "eggs"]].astype(float)
    found = numbers.corr(method="spearman")
    assert found["age"]["amh"] < -0.3
    assert found["amh"]["afc"] > 0.7
    assert found["amh"]["fsh"] < -0.1
    assert found["amh"]["dose"] < -0.4
    assert found["afc"]["eggs"] > 0.5
    births = frame.groupby(pd.cut(frame["age"].astype(int), [0, 34, 38, 60]))["live_birth"].mean().tolist()
    assert births == sorted(births, reverse=True)
