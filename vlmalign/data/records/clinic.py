"""An invented fertility clinic with three centres: plausible records of couples before a cycle, and what was decided.

The rules are ours, after public guidance (ESHRE's on ovarian stimulation, WHO's limits of semen), simplified; they are no
medical advice. Each holds for the values as recorded, so that a decision follows from what the doctor saw.

| decision | rule, the first that applies |
|---|---|
| diagnoses | every finding beyond its limit, see `_diagnoses`; "unexplained infertility" where there is none |
| strategy | monogenic disorder: PGT-M; structural rearrangement: PGT-SR; no male partner, under 40, a tube open, fewer than 4 DI: DI; |
| | from the centre's age, or after 3 losses, in 7 of 10: PGT-A; under 5 million/ml, motility under 20 %, or fertilisation failed: ICSI; |
| | 5 to 16 million/ml: ICSI as often as the centre does; otherwise ICSI as often as the centre does without a reason, or IVF |
| protocol | none with DI; risk of hyperstimulation: antagonist; poor reserve: short or mild, by centre, AMH under 0.2: natural; |
| | endometriosis III-IV: long agonist; otherwise the centre's own, in 9 of 10 |
| dose | 150 IU at 30 years and AMH 2.5; more with age, with BMI from 30, with low AMH and after a poor response; the centre's habit |

One decision in 30 departs from its rule. What `FORBIDDEN` lists never occurs. Ages, AMH, sperm, earlier cycles, losses and
duration have long tails; PGT-M, PGT-SR and the natural cycle are rare. A third of the couples come for several cycles.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from vlmalign.data.records.fields import AnyRecordField, CodeField, FlagField, ListField, NumberField

Record = dict[str, Any]

ID, PATIENT = "cycle", "couple"
#: what a doctor learns only after the decision
AFTER = ("eggs", "live_birth")


class Centre(NamedTuple):
    """How a centre's patients and habits differ."""

    share: float  #: of all couples
    age: float  #: years, mean
    icsi: float  #: chance of ICSI where nothing asks for it
    border: float  #: chance of ICSI from 5 to 16 million/ml
    pgt_a_from: int  #: years
    protocol: str  #: for those whose response should be normal
    short: float  #: chance of the short protocol, not the mild, where the reserve is poor
    dose: int  #: IU, beside the common rule
    unmeasured: float  #: chance that AMH is not recorded


CENTRES = {
    "north": Centre(0.45, 34.2, 0.05, 0.45, 44, "antagonist", 0.3, 0, 0.05),  # ICSI with reason only
    "south": Centre(0.35, 35.4, 0.85, 0.95, 41, "long agonist", 0.9, 50, 0.15),  # ICSI for nearly all, high doses
    "west": Centre(0.20, 36.8, 0.30, 0.75, 38, "antagonist", 0.05, -25, 0.02),  # PGT-A early, mild stimulation
}
STRATEGIES = ("IVF", "ICSI", "PGT-A", "PGT-M", "PGT-SR", "DI")
PROTOCOLS = ("antagonist", "long agonist", "short agonist", "mild", "natural cycle")
MONOGENIC, REARRANGED = "monogenic disorder", "structural rearrangement"
DIAGNOSES = (
    "tubal factor", "polycystic ovary syndrome", "ovulatory disorder", "endometriosis", "diminished ovarian reserve",
    "azoospermia", "male factor", MONOGENIC, REARRANGED, "recurrent pregnancy loss", "recurrent implantation failure",
    "no male partner", "unexplained infertility",
)  # fmt: skip


#: the schema of the records
FIELDS: Mapping[str, AnyRecordField] = {
    "age": NumberField(kind="number", unit="years", low=18, high=55, required=True),
    "partner": CodeField(kind="code", codes=["male", "female", "none"], required=True),
    "duration": NumberField(kind="number", label="trying to conceive for", unit="years", low=0, high=30),
    "bmi": NumberField(kind="number", label="BMI", unit="kg/m2", low=12, high=70),
    "births": NumberField(kind="number", label="live births", low=0, high=15),
    "losses": NumberField(kind="number", label="pregnancy losses", low=0, high=15),
    "periods": CodeField(kind="code", codes=["regular", "irregular", "absent"]),
    "amh": NumberField(kind="number", label="AMH", unit="ng/ml", low=0, high=40),
    "afc": NumberField(kind="number", label="antral follicles", low=0, high=100),
    "fsh": NumberField(kind="number", label="FSH", unit="IU/l", low=0, high=150),
    "tubes": CodeField(kind="code", codes=["both open", "one blocked", "both blocked"]),
    "endometriosis": CodeField(kind="code", codes=["none", "stage I-II", "stage III-IV"]),
    "sperm": NumberField(kind="number", label="sperm concentration", unit="million/ml", low=0, high=500),
    "motility": NumberField(kind="number", label="progressive motility", unit="%", low=0, high=100),
    "genetics": CodeField(kind="code", codes=["none known", MONOGENIC, REARRANGED]),
    "earlier_ivf": NumberField(kind="number", label="earlier IVF or ICSI cycles", low=0, high=20, required=True),
    "earlier_di": NumberField(kind="number", label="earlier donor inseminations", low=0, high=20, required=True),
    "response": CodeField(kind="code", label="response in the last cycle", codes=["poor", "normal", "high"]),
    "failed": FlagField(kind="flag", label="fertilisation failed before"),
    "centre": CodeField(kind="code", role="group", codes=[*CENTRES], required=True),
    "year": NumberField(kind="number", role="group", low=2015, high=2030, required=True),
    "diagnoses": ListField(kind="list", role="decision", codes=[*DIAGNOSES], required=True),
    "strategy": CodeField(kind="code", role="decision", codes=[*STRATEGIES], required=True),
    "protocol": CodeField(kind="code", role="decision", codes=[*PROTOCOLS]),
    "dose": NumberField(kind="number", role="decision", label="starting dose of FSH", unit="IU/day", low=75, high=450),
}


def _known(record: Record, name: str, default: float) -> float:
    """A number as recorded."""
    return default if record[name] is None else record[name]


def poor_reserve(record: Record) -> bool:
    """AMH under 1.1 ng/ml or fewer than 5 antral follicles (Bologna criteria)."""
    return _known(record, "amh", 9) < 1.1 or _known(record, "afc", 9) < 5


def overresponds(record: Record) -> bool:
    """A risk of hyperstimulation: AMH from 5 ng/ml, or 24 antral follicles."""
    return _known(record, "amh", 0) >= 5 or _known(record, "afc", 0) >= 24


#: what no doctor combines -> whether a record does
FORBIDDEN: Mapping[str, Callable[[Record], bool]] = {
    "DI with a protocol or dose": lambda r: r["strategy"] == "DI" and bool(r["protocol"] or r["dose"]),
    "stimulation without a protocol": lambda r: r["strategy"] != "DI" and not r["protocol"],
    "a natural cycle with a dose, or another without": lambda r: (
        bool(r["protocol"]) and (r["protocol"] == "natural cycle") != (r["dose"] is None)
    ),
    "DI with a male partner or both tubes blocked": lambda r: (
        r["strategy"] == "DI" and (r["partner"] == "male" or r["tubes"] == "both blocked")
    ),
    "conventional IVF under 1 million/ml": lambda r: r["strategy"] == "IVF" and _known(r, "sperm", 50) < 1,
    "PGT-M without a monogenic disorder": lambda r: r["strategy"] == "PGT-M" and r["genetics"] != MONOGENIC,
    "PGT-SR without a rearrangement": lambda r: r["strategy"] == "PGT-SR" and r["genetics"] != REARRANGED,
    "an agonist with a risk of hyperstimulation": lambda r: (
        overresponds(r) and r["protocol"] in ("long agonist", "short agonist")
    ),
    "more than 225 IU with a risk of hyperstimulation": lambda r: overresponds(r) and (r["dose"] or 0) > 225,
    "more than 150 IU in the mild protocol": lambda r: r["protocol"] == "mild" and (r["dose"] or 0) > 150,
}


def violations(record: Record) -> list[str]:
    """What of `FORBIDDEN` a record does; it needs the fields of `FIELDS`, None where nothing is known."""
    return [name for name, does in FORBIDDEN.items() if does(record)]


def draw(records: int, *, seed: int) -> list[Record]:
    """Records in order, with `ID`, `PATIENT`, the fields and what came after; the first ones are the same whatever the number."""
    found: list[Record] = []
    couple = 0
    while len(found) < records:
        rng = np.random.default_rng([seed, couple])
        centre = _pick(rng, {name: each.share for name, each in CENTRES.items()})
        record = _couple(rng, CENTRES[centre]) | {"centre": centre, "year": int(rng.integers(2019, 2024))}
        for _ in range(_pick(rng, {1: 0.67, 2: 0.23, 3: 0.10})):
            _decide(record, CENTRES[centre], rng)
            assert not violations(record), violations(record)
            found.append({ID: f"c{len(found):06d}", PATIENT: f"p{couple:06d}", **record, **_after(record, rng)})
            record = _next_cycle(record, rng)
        couple += 1
    return found[:records]


def write(path: Path, records: int, *, seed: int) -> None:
    """A CSV of invented records: blank where nothing is known, lists joined by ";"."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {name: ";".join(value) if isinstance(value, list) else value for name, value in row.items()}
        for row in draw(records, seed=seed)
    ]
    pd.DataFrame(rows, dtype=object).to_csv(path, index=False)


def _couple(rng: np.random.Generator, centre: Centre) -> Record:
    """What is found before the first cycle here."""
    age = int(_within(round(rng.normal(centre.age, 4.9)), 20, 48))
    polycystic, aged = rng.random() < 0.16, rng.random() < 0.08
    amh = np.exp(rng.normal(np.log(3.4) - 0.075 * (age - 28) + 0.7 * polycystic - 1.4 * aged, 0.5))
    amh = round(float(_within(amh, 0.01, 30)), 2)
    fsh = round(float(_within(np.exp(rng.normal(1.87 + 0.35 * max(0, 1.2 - amh), 0.2)), 2, 80)), 1)
    partner = _pick(rng, {"male": 0.90, "female": 0.06, "none": 0.04})
    impaired = rng.random() < 0.32
    sperm = float(np.exp(rng.normal(np.log(7), 1.1) if impaired else rng.normal(np.log(55), 0.5)))
    sperm = 0.0 if rng.random() < 0.02 else round(min(sperm, 300), 1)
    motility = int(_within(rng.normal(30 if impaired else 50, 11), 1, 90))
    genetics = _pick(rng, {"none known": 0.972, MONOGENIC: 0.018, REARRANGED: 0.010})
    losses = min(int(rng.geometric(0.45 if genetics == REARRANGED else 0.78)) - 1, 8)
    earlier = min(int(rng.geometric(0.58)) - 1, 9)
    periods = "regular"
    if polycystic or rng.random() < 0.05:
        periods = _pick(rng, {"irregular": 0.75, "absent": 0.15, "regular": 0.10})
    afc = int(_within(rng.poisson(2 + 4.4 * amh**0.8), 0, 60))
    own = partner == "male"
    return {
        "age": age,
        "partner": partner,
        "duration": round(float(_within(0.5 + rng.gamma(2, 1.5), 0.5, 20)), 1) if own else None,
        "bmi": _or_none(rng, 0.05, round(float(_within(np.exp(rng.normal(3.18 + 0.08 * polycystic, 0.17)), 15, 55)), 1)),
        "births": min(int(rng.geometric(0.76)) - 1, 6),
        "losses": losses,
        "periods": periods,
        "amh": _or_none(rng, centre.unmeasured, amh),
        "afc": _or_none(rng, 0.04, afc),
        "fsh": _or_none(rng, 0.15, fsh),
        "tubes": _or_none(rng, 0.06, _pick(rng, {"both open": 0.78, "one blocked": 0.13, "both blocked": 0.09})),
        "endometriosis": _pick(rng, {"none": 0.85, "stage I-II": 0.09, "stage III-IV": 0.06}),
        "sperm": sperm if own else None,
        "motility": motility if own and sperm else None,
        "genetics": genetics,
        "earlier_ivf": earlier,
        "earlier_di": 0 if own else min(int(rng.geometric(0.45)) - 1, 8),
        "response": _response(rng, afc) if earlier else None,
        "failed": bool(rng.random() < 0.06) if earlier else None,
    }  # fmt: skip


def _within(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


def _pick(rng: np.random.Generator, chances: Mapping[Any, float]) -> Any:
    """One of them, by their chances, which sum to 1; `rng.choice` is slow for single draws."""
    left = rng.random()
    for value, chance in chances.items():
        left -= chance
        if left < 0:
            return value
    return value


def _or_none(rng: np.random.Generator, chance: float, value: Any) -> Any:
    return None if rng.random() < chance else value


def _response(rng: np.random.Generator, follicles: int) -> str:
    likely = "poor" if follicles < 6 else "high" if follicles > 20 else "normal"
    return likely if rng.random() < 0.8 else _pick(rng, dict.fromkeys(("poor", "normal", "high"), 1 / 3))


def _decide(record: Record, centre: Centre, rng: np.random.Generator) -> None:
    """Fills in the decisions."""
    record |= {"diagnoses": _diagnoses(record), "protocol": None, "dose": None}
    strategy = _strategy(record, centre, rng)
    if rng.random() < 1 / 30 and strategy in ("IVF", "ICSI"):
        strategy = "ICSI" if strategy == "IVF" or _known(record, "sperm", 50) < 1 else "IVF"
    record["strategy"] = strategy
    if strategy == "DI":
        return
    record["protocol"] = protocol = _protocol(record, centre, rng)
    if protocol != "natural cycle":
        record["dose"] = _dose(record, centre, rng)


def _diagnoses(r: Record) -> list[str]:
    found = {
        "tubal factor": r["tubes"] in ("one blocked", "both blocked"),
        "polycystic ovary syndrome": r["periods"] != "regular" and _known(r, "afc", 0) >= 20,
        "ovulatory disorder": r["periods"] != "regular" and _known(r, "afc", 0) < 20,
        "endometriosis": r["endometriosis"] != "none",
        "diminished ovarian reserve": poor_reserve(r),
        "azoospermia": r["sperm"] == 0,
        "male factor": 0 < _known(r, "sperm", 50) < 16 or _known(r, "motility", 50) < 30,
        MONOGENIC: r["genetics"] == MONOGENIC,
        REARRANGED: r["genetics"] == REARRANGED,
        "recurrent pregnancy loss": r["losses"] >= 2,
        "recurrent implantation failure": r["earlier_ivf"] >= 3 and r["births"] == 0,
        "no male partner": r["partner"] != "male",
    }
    return [name for name, holds in found.items() if holds] or ["unexplained infertility"]


def _strategy(r: Record, centre: Centre, rng: np.random.Generator) -> str:
    sperm = _known(r, "sperm", 50)
    if r["genetics"] != "none known":
        return "PGT-M" if r["genetics"] == MONOGENIC else "PGT-SR"
    if r["partner"] != "male" and r["age"] < 40 and r["tubes"] != "both blocked" and r["earlier_di"] < 4:
        return "DI"
    if (r["age"] >= centre.pgt_a_from or r["losses"] >= 3) and rng.random() < 0.7:
        return "PGT-A"
    if sperm < 5 or _known(r, "motility", 50) < 20 or r["failed"]:
        return "ICSI"
    return "ICSI" if rng.random() < (centre.border if sperm < 16 else centre.icsi) else "IVF"


def _protocol(r: Record, centre: Centre, rng: np.random.Generator) -> str:
    if overresponds(r):
        return "antagonist"
    if rng.random() < 1 / 30:
        return _pick(rng, dict.fromkeys(("antagonist", "long agonist", "short agonist", "mild"), 0.25))
    if poor_reserve(r):
        if _known(r, "amh", 9) < 0.2:
            return "natural cycle"
        return "short agonist" if rng.random() < centre.short else "mild"
    if r["endometriosis"] == "stage III-IV":
        return "long agonist"
    other = "long agonist" if centre.protocol == "antagonist" else "antagonist"
    return centre.protocol if rng.random() < 0.9 else other


def _dose(r: Record, centre: Centre, rng: np.random.Generator) -> int:
    """IU a day, in steps of 25."""
    dose = (
        150 + 5 * (r["age"] - 30) + 4 * max(0.0, _known(r, "bmi", 24) - 30) - 70 * np.log(_known(r, "amh", 2.0) / 2.5)
    )
    dose += {"poor": 50, "high": -50}.get(r["response"] or "normal", 0) + centre.dose + rng.normal(0, 12)
    most = 225 if overresponds(r) else 150 if r["protocol"] == "mild" else 450
    return int(_within(25 * round(dose / 25), 75, most))


def _after(r: Record, rng: np.random.Generator) -> Record:
    """What came of it."""
    eggs = None
    if r["protocol"] is not None:
        eggs = int(rng.poisson(1 if r["protocol"] == "natural cycle" else 1 + 0.7 * _known(r, "afc", 10)))
    chance = 1 / (1 + np.exp(0.6 + 0.16 * max(0, r["age"] - 33) - (0 if eggs is None else min(eggs, 12) / 12)))
    return {"eggs": eggs, "live_birth": int(rng.random() < chance)}


def _next_cycle(r: Record, rng: np.random.Generator) -> Record:
    """The couple as they come again, about half a year later."""
    stimulated = r["strategy"] != "DI"
    return r | {
        "age": r["age"] + int(rng.random() < 0.5),
        "year": r["year"] + int(rng.random() < 0.5),
        "duration": None if r["duration"] is None else round(r["duration"] + 0.6, 1),
        "earlier_ivf": r["earlier_ivf"] + stimulated,
        "earlier_di": r["earlier_di"] + (not stimulated),
        "response": _response(rng, int(_known(r, "afc", 10))) if stimulated else r["response"],
        "failed": bool(r["failed"] or rng.random() < 0.05) if stimulated else r["failed"],
    }
