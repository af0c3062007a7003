"""Records of patients: what the schema reads, what a summary tells, and every bad record counted or named."""

import gzip
import json

import numpy as np
import pandas as pd
import pytest
from pydantic import Field

from vlmalign.config import Config, ConfigError, dump_config, load_config
from vlmalign.config_yaml import read_yaml
from vlmalign.data.sources.formats import AnySource
from vlmalign.tasks.fields import FieldsTask

SCHEMA = read_yaml("""
kind: ehr
path: cycles.csv
id: cycle
patient: couple
missing: [NA]
fields:
  age: {kind: number, unit: years, low: 18, high: 55, required: true}
  amh: {kind: number, label: AMH, unit: ng/ml, low: 0, high: 25, missing: ["-1"]}
  ethnicity: {kind: code, codes: {1: White, 2: Black}}
  tubal: {kind: flag, label: tubal disease}
  history: {kind: text, longest: 40}
  centre: {kind: code, role: group}
  strategy:
    kind: code
    role: decision
    required: true
    first_of:
      - {column: pgt, codes: {1: PGT-M}}
      - {column: type, codes: {I: ICSI, V: IVF}}
  dose: {kind: number, role: decision, unit: IU}
  diagnoses: {kind: list, role: decision, separator: "|"}
after: [births]
""")
COLUMNS = "cycle couple age amh ethnicity tubal history centre pgt type dose diagnoses births"
ROWS = [
    ("a", "p1", "34", "1.50", "1", "0", "two losses", "north", "0", "I", "225", "tubal factor| PCOS", "1"),
    ("b", "p1", "36.0", "NA", "2.0", "yes", "", "south", "1.0", "I", "", "", "0"),
    ("c", "p2", "41", "-1", "", "", "", "north", "0", "V", "150", "PCOS", ""),
]


class Study(Config):
    sources: dict[str, AnySource] = Field(default_factory=dict)


def source(tmp_path, **settings):
    path = tmp_path / "study.yaml"
    path.write_text(json.dumps({"sources": {"clinic": {**SCHEMA, **settings}}}))
    study = load_config(Study, path)
    (tmp_path / "again.yaml").write_text(dump_config(study))
    assert load_config(Study, tmp_path / "again.yaml") == study
    return study.sources["clinic"]


def table(rows=ROWS):
    return pd.DataFrame(rows, columns=COLUMNS.split(), dtype=str)


def opened(tmp_path, rows=ROWS, **settings):
    table(rows).to_csv(tmp_path / "cycles.csv", index=False)
    return source(tmp_path, **settings).open(lambda path: tmp_path / path)


def changed(**cells):
    """The first row with other cells."""
    return tuple(cells.get(name, cell) for name, cell in zip(COLUMNS.split(), ROWS[0], strict=True))


def test_cells_become_values_and_a_summary(tmp_path):
    records = opened(tmp_path)
    first, second, third = records
    assert (first.id, first.patient, second.patient, first.image) == ("a", "p1", "p1", None)
    assert first.meta["summary"] == (
        "Age: 34 years\nAMH: 1.5 ng/ml\nEthnicity: White\nTubal disease: no\nHistory: two losses"
    )
    assert {name: second.meta[name] for name in ("age", "amh", "ethnicity", "tubal", "strategy", "dose", "diagnoses")} == {
        "age": 36, "amh": None, "ethnicity": "Black", "tubal": True, "strategy": "PGT-M", "dose": None, "diagnoses": None,
    }  # fmt: skip
    assert (third.meta["strategy"], third.meta["amh"], third.meta["diagnoses"]) == ("IVF", None, ["PCOS"])
    assert "AMH: not recorded" in third.meta["summary"]
    assert "births" not in first.meta
    assert records.column("centre").tolist() == ["north", "south", "north"]
    json.dumps(dict(first.meta))


def test_templates_and_missing_values(tmp_path):
    template = "A {age} old woman, AMH {amh}.\nTubal disease: {tubal}."
    told = opened(tmp_path, summary={"template": template, "missing": "unknown"})
    assert told[0].meta["summary"] == "A 34 years old woman, AMH 1.5 ng/ml.\nTubal disease: no."
    assert told[2].meta["summary"] == "A 41 years old woman, AMH unknown.\nTubal disease: unknown."
    left_out = opened(tmp_path, summary={"template": template, "missing": None})
    assert left_out[1].meta["summary"] == "Tubal disease: yes."  # what is not known says nothing, not even its name
    assert opened(tmp_path, summary={"missing": None})[2].meta["summary"] == "Age: 41 years"


@pytest.mark.parametrize("form", ["csv.gz", "parquet", "jsonl", "saved"])
def test_every_format_gives_the_same_records(tmp_path, form):
    expected = [dict(each.meta) for each in opened(tmp_path)]
    path = tmp_path / f"cycles.{form}"
    if form == "csv.gz":
        with gzip.open(path, "wt") as file:
            table().to_csv(file, index=False)
    else:
        typed = table()
        for name in ("age", "amh", "ethnicity", "pgt", "dose"):  # as databases write them: numbers, with gaps
            typed[name] = pd.to_numeric(typed[name], errors="coerce")
        typed["diagnoses"] = [[name.strip() for name in cell.split("|") if name] for cell in typed["diagnoses"]]
        if form == "parquet":
            typed.to_parquet(path, index=False)
        elif form == "jsonl":
            typed.to_json(path, orient="records", lines=True)
        else:
            import datasets

            path = tmp_path / "cycles"
            datasets.Dataset.from_pandas(typed, preserve_index=False).save_to_disk(str(path))
    records = source(tmp_path, path=path.name).open(lambda path: tmp_path / path)
    found = [dict(each.meta) for each in records]
    for row in (*found, *expected):
        row["diagnoses"] = row["diagnoses"] or []  # an empty list says that there are none, a blank that none is known
    assert found == expected


BAD = {
    "age: missing, and required": changed(age=" "),
    "age: not a number": changed(age="old"),
    "age: out of range (18 to 55 years)": changed(age="999"),
    "amh: out of range (0 to 25 ng/ml)": changed(amh="nan"),
    "ethnicity: unknown code '3'": changed(ethnicity="3"),
    "tubal: neither yes nor no": changed(tubal="2"),
    "history: longer than 40 characters": changed(history="x" * 41),
    "strategy: unknown code 'II' (the nearest is I)": changed(type="II"),
    "strategy: missing, and required": changed(type="", pgt=""),
    "there is no patient": changed(couple=""),
    "cycle: the id is there twice, first in row 2": changed(age="30"),
}


@pytest.mark.parametrize("reason", BAD)
def test_a_bad_record_is_named_or_counted(tmp_path, reason):
    bad = BAD[reason] if "twice" in reason else ("z", *BAD[reason][1:])
    with pytest.raises(ValueError, match=r"cycles\.csv, row 5: .*set on_bad to skip") as caught:
        opened(tmp_path, [*ROWS, bad])
    assert reason in str(caught.value)
    records = opened(tmp_path, [*ROWS, bad, bad], on_bad="skip")
    assert len(records) == 3
    assert [row["id"] for row in records.skipped] == ["cycles.csv:5", "cycles.csv:6"]
    assert reason in records.skipped[0]["reason"]
    assert "2 of 5 records are left out" in records.notes[-1]


def test_what_is_not_read_is_said(tmp_path):
    records = opened(tmp_path, after=[])
    assert records.notes == [f"{tmp_path / 'cycles.csv'}: 1 columns are not declared and not read, such as 'births'"]
    taken = opened(tmp_path, take={"type": ["I"], "centre": ["north", "west"]})
    assert [each.id for each in taken] == ["a"]
    assert "2 of 3 rows are not taken" in taken.notes[0]
    with pytest.raises(ValueError, match=r"no record is left; .*3 of 3 rows are not taken"):
        opened(tmp_path, take={"type": ["X"]})
    table().drop(columns="amh").to_csv(tmp_path / "cycles.csv", index=False)
    with pytest.raises(ValueError, match="missing column 'amh'"):
        source(tmp_path).open(lambda path: tmp_path / path)


def field(name, **settings):
    return {"fields": {**SCHEMA["fields"], name: settings}}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"summary": {"template": "{age} {strategy}"}}, "'strategy' has the role decision, and only inputs may be told"),
        ({"summary": {"template": "{agee}"}}, "there is no field 'agee'"),
        ({"summary": {"template": "A woman."}}, "it tells no field"),
        (field("plan", kind="code", column="type"), "fields.plan: the column 'type' is read by 'strategy', whose role is dec"),
        (field("born", kind="flag", column="births"), "fields.born: the column 'births' stands in `after`"),
        (field("eggs", kind="number", role="after") | {"summary": {"template": "{eggs}"}}, "'eggs' has the role after"),
        (field("who", kind="text", column="couple"), "the column 'couple' is the patient"),
        (field("summary", kind="text"), "'summary' cannot be a field's name"),
        ({"labels": ["dose"]}, "'dose' is no decision of kind code or list; those are strategy, diagnoses"),
        ({"fields": {}}, "name the fields"),
        (field("age", kind="nunber"), "expected one of .*; the nearest is 'number'"),
    ],
)  # fmt: skip
def test_a_schema_that_gives_the_decision_away_is_refused(tmp_path, settings, said):
    with pytest.raises(ConfigError, match=said):
        source(tmp_path, **settings)


def test_labels_and_twins(tmp_path):
    records = opened(tmp_path, [*ROWS, ("d", "p9", *changed(centre="west", dose="75", births="0")[2:])])
    assert records.schema.labels == (
        "strategy: PGT-M", "strategy: ICSI", "strategy: IVF", "diagnoses: PCOS", "diagnoses: tubal factor",
    )  # fmt: skip
    assert records.label_matrix().astype(int).tolist() == [
        [0, 1, 0, 1, 1],
        [1, 0, 0, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 1, 0, 1, 1],
    ]
    twins = records.twins()
    assert twins[0] == twins[3]  # they differ in centre, dose and outcome only
    assert len(set(twins)) == 3


def test_the_fields_task_reads_what_it_writes(tmp_path):
    task = FieldsTask(
        prompt="{summary}\nAnswer as JSON.",
        fields={
            "strategy": {"kind": "single", "options": ("PGT-M", "ICSI", "IVF")},
            "dose": {"kind": "number", "unit": "IU", "required": False},
            "diagnoses": {"kind": "list", "required": False},
        },
    )
    for record in opened(tmp_path):
        assert record.meta["summary"] in task.ask(record)[0]["content"]
        facts = task.read(task.write(record), task.columns(record))
        assert facts.valid
        assert facts.values == task.truth(record)


def test_a_table_of_a_hundred_thousand_cells_is_read_once_per_distinct_cell(tmp_path, monkeypatch):
    from vlmalign.data.records.fields import NumberField

    calls = []
    monkeypatch.setattr(NumberField, "read", lambda self, cell: calls.append(cell) or 1)
    rows = [(f"r{i}", *changed(age=str(20 + i % 30))[1:]) for i in range(3000)]
    assert len(opened(tmp_path, rows)) == 3000
    assert len(calls) == 30 + 1 + 1
    assert np.unique(calls).size == len(calls)
