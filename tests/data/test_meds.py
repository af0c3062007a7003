"""MEDS event data as records: values by declared codes at each prediction time, and nothing from after it."""

from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from vlmalign.config_yaml import read_yaml
from vlmalign.data.records.meds import Event, MedsColumn, write_meds
from vlmalign.data.sources.ehr import EhrSource

EVENTS = [
    Event(7, None, "GENDER//F"),
    Event(7, "1986-03-01", "MEDS_BIRTH"),
    Event(7, "2019-05-01", "LAB//AMH", 1.5),
    Event(7, "2020-01-10T09:00", "VISIT"),
    Event(7, "2020-01-10T09:00", "LAB//AMH", 1.1),  # at the prediction time itself: may be used
    Event(7, "2020-01-10T09:00", "PLAN//ICSI"),  # what is decided then
    Event(7, "2020-02-01", "CYCLE"),
    Event(7, "2020-03-01", "LAB//AMH", 0.1),
    Event(7, "2020-06-01", "VISIT"),
    Event(7, "2020-06-02", "PLAN//PGT-A"),
    Event(7, "2020-09-01", "OUTCOME", None, "live birth"),
    Event(3, "1990-01-01", "MEDS_BIRTH"),
    Event(3, "2021-01-01", "VISIT"),
    Event(3, "2021-01-01", "PLAN//IVF"),
    Event(5, "2021-01-01", "LAB//AMH", 3.0),  # never seen: no record
]
SETTINGS = read_yaml("""
kind: ehr
meds:
  at: VISIT
  columns:
    age: {code: MEDS_BIRTH, take: years}
    sex: {code: GENDER//*}
    amh: {code: LAB//AMH}
    first_amh: {code: LAB//AMH, take: first}
    highest: {code: LAB//AMH, take: max, days: 300}
    tests: {code: LAB//AMH, take: count}
    cycles: {code: CYCLE, take: count}
    earlier_plan: {code: PLAN//*, when: before}
    plan: {code: PLAN//*, take: first, when: from}
    outcome: {code: OUTCOME, take: first, when: from}
fields:
  age: {kind: number, unit: years, low: 0, high: 120}
  sex: {kind: code, codes: {F: female, M: male}}
  amh: {kind: number}
  first_amh: {kind: number}
  highest: {kind: number}
  tests: {kind: number}
  cycles: {kind: number}
  earlier_plan: {kind: code}
  plan: {kind: code, role: decision}
  outcome: {kind: text, role: after}
""")


def opened(folder, **settings):
    return EhrSource(path=folder, **{**SETTINGS, **settings}).open(Path)


@pytest.fixture
def folder(tmp_path):
    write_meds(tmp_path / "events", EVENTS, subjects=2)
    assert [path.name for path in sorted((tmp_path / "events" / "data").iterdir())] == ["0.parquet", "1.parquet"]
    return tmp_path / "events"


def test_a_record_for_each_subject_and_prediction_time(folder):
    records = opened(folder)
    frame = pd.DataFrame([dict(each.meta) for each in records]).drop(columns="summary").astype(object)
    frame = frame.where(frame.notna(), None)
    names = ["age", "sex", "amh", "first_amh", "highest", "tests", "cycles", "earlier_plan", "plan", "outcome"]
    assert frame[names].to_numpy().tolist() == [
        [31, None, None, None, None, 0, 0, None, "IVF", None],
        [33.8, "female", 1.1, 1.5, 1.5, 2, 0, None, "ICSI", "live birth"],
        [34.2, "female", 0.1, 1.5, 1.1, 3, 1, "ICSI", "PGT-A", "live birth"],
    ]
    assert [(each.id, each.patient) for each in records] == [
        ("3@2021-01-01T00:00:00", "3"), ("7@2020-01-10T09:00:00", "7"), ("7@2020-06-01T00:00:00", "7"),
    ]  # fmt: skip
    assert all("PGT" not in each.meta["summary"] and "birth" not in each.meta["summary"] for each in records)
    assert [path.name for path in records.files] == ["0.parquet", "1.parquet", "codes.parquet"]


def test_nothing_after_the_prediction_time_changes_what_is_told(folder, tmp_path):
    """The property that makes it a prediction: later events may be anything."""
    cut = [e for e in EVENTS if e.subject != 7 or e.time is None or e.time <= "2020-01-10T09:00"]
    later = [
        Event(7, "2020-04-01", "LAB//AMH", 99.0),
        Event(7, "2020-04-01", "CYCLE"),
        Event(7, "2021-01-01", "PLAN//DI"),
    ]
    write_meds(tmp_path / "cut", cut)
    write_meds(
        tmp_path / "more", [*cut, *later, Event(7, "2020-02-01", "OUTCOME", None, "x"), Event(7, "2020-02-02", "CYCLE")]
    )
    told = [each.meta["summary"] for each in opened(folder, meds={**SETTINGS["meds"], "which": "first"})]
    columns = {k: v for k, v in SETTINGS["meds"]["columns"].items() if k != "outcome"}
    fields = {k: v for k, v in SETTINGS["fields"].items() if k != "outcome"}
    known = {"meds": {"at": "VISIT", "columns": {k: v for k, v in columns.items() if k != "cycles"}}}
    for name in ("cut", "more"):
        again = opened(tmp_path / name, **known, fields={k: v for k, v in fields.items() if k != "cycles"})
        lines = [line for line in told[1].split("\n") if not line.startswith("Cycles")]
        assert again[1].meta["summary"].split("\n") == lines


def test_which_times(folder):
    ids = {w: [e.id for e in opened(folder, meds={**SETTINGS["meds"], "which": w})] for w in ("first", "last", "every")}
    assert ids["first"] == [ids["every"][0], ids["every"][1]]
    assert ids["last"] == [ids["every"][0], ids["every"][2]]


def changed(**columns):
    return {"meds": {**SETTINGS["meds"], "columns": {**SETTINGS["meds"]["columns"], **columns}}}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (changed(amh={"code": "LAB//AMH", "when": "from"}), "column 'amh' takes events from the prediction time on"),
        (changed(earlier_plan={"code": "PLAN//*"}), "'earlier_plan' may take the event of the decision itself"),
        (changed(earlier_plan={"code": "PLAN//ICSI", "take": "count"}), "may take the event of the decision itself"),
        (changed(age={"code": "MEDS_BIRTH", "take": "years", "when": "from"}), "take: years counts from an event"),
        (changed(record={"code": "VISIT"}), "'record' is made anyway"),
        ({"patient": "subject_id"}, "leave id, patient and phantom out"),
    ],
)
def test_what_would_look_ahead_is_refused(tmp_path, settings, said):
    with pytest.raises(ValidationError, match=said):
        EhrSource(path=tmp_path, **{**SETTINGS, **settings})


def test_codes_that_may_be_the_same():
    def overlap(one, two):
        found = MedsColumn(code=one).overlaps(MedsColumn(code=two))
        assert found == MedsColumn(code=two).overlaps(MedsColumn(code=one))
        return found

    assert overlap("A", "A")
    assert overlap("A//*", "A//B")
    assert overlap("A*", "A//*")
    assert not overlap("A", "B")
    assert not overlap("A//*", "A")
    assert not overlap("A//*", "B//*")


def test_what_is_no_meds_is_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no data/\*\.parquet"):
        opened(tmp_path)
    with pytest.raises(ValueError, match="no event has the code 'LAB//AMHH'; the nearest is LAB//AMH"):
        opened(folder, **changed(amh={"code": "LAB//AMHH"}))
    with pytest.raises(ValueError, match="no prediction time"):
        opened(folder, meds={**SETTINGS["meds"], "at": "GENDER//F"})
    with pytest.raises(ValueError, match="missing column 'weight'"):
        opened(folder, fields={**SETTINGS["fields"], "weight": {"kind": "number"}})
    pq.write_table(pa.table({"subject_id": [1], "time": [None], "code": ["A"]}), folder / "data" / "0.parquet")
    with pytest.raises(ValueError, match=r"0\.parquet: .*no column 'numeric_value'"):
        opened(folder)
    (folder / "data" / "0.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="not a Parquet file that can be read"):
        opened(folder)
