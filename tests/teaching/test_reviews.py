"""Expert review: a sample as CSV that opens as it should, and verdicts applied all together or not at all."""

import csv
import json

import pytest

from vlmalign.cli import main
from vlmalign.teaching.reviews import COLUMNS, apply, export
from vlmalign.teaching.trace_file import read_traces, rejected_file

TEXT = "The film is upright and sharp. What decides is the haze, dense and wide in both lungs, number {}: edema."


@pytest.fixture
def file(tmp_path):
    rows = [
        {"id": f"f{i}", "trace": TEXT.format(i), "labels": ["Edema"], "image": f"/films/{i}.jpg", "format": "free", "model": "m"}
        for i in range(30)
    ]  # fmt: skip
    rows[5]["trace"] = "=HYPERLINK is how it begins,\n" + rows[5]["trace"]
    path = tmp_path / "traces.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path):
    with path.open(encoding="utf-8-sig", newline="") as opened:
        return list(csv.DictReader(opened))


def save(path, rows, columns=COLUMNS):
    with path.open("w", encoding="utf-8", newline="") as opened:
        written = csv.DictWriter(opened, columns)
        written.writeheader()
        written.writerows(rows)
    return path


def test_the_sample_follows_from_the_seed(file, tmp_path):
    assert export(file, tmp_path / "a.csv", count=10, seed=1) == 10
    assert export(file, tmp_path / "b.csv", count=10, seed=1) == 10
    assert export(file, tmp_path / "c.csv", count=10, seed=2) == 10
    assert export(file, tmp_path / "all.csv", count=100, seed=1) == 30
    a, b, c, every = (read(tmp_path / f"{name}.csv") for name in ("a", "b", "c", "all"))
    assert a == b
    assert {row["id"] for row in a} != {row["id"] for row in c}
    assert {row["id"] for row in every} == set(read_traces(file))
    assert len({row["id"] for row in a}) == 10
    number = a[0]["id"][1:]
    assert (a[0]["image"], a[0]["labels"]) == (f"/films/{number}.jpg", "Edema")
    assert {row[name] for row in every for name in ("verdict", "comment", "correction")} == {""}
    formula = next(row for row in every if row["id"] == "f5")
    assert formula["trace"].startswith("'=HYPER")  # a spreadsheet shows it, and calls nothing
    with pytest.raises(FileExistsError, match="may hold reviews"):
        export(file, tmp_path / "a.csv", count=10, seed=1)


def test_verdicts_are_applied_and_a_second_time_change_nothing(file, tmp_path, capsys):
    out = tmp_path / "reviews.csv"
    assert main(["traces", "review", str(file), "--out", str(out), "--count", "30", "--seed", "3"]) == 0
    rows = {row["id"]: row for row in read(out)}
    rows["f1"]["verdict"], rows["f1"]["comment"] = "Accept ", "good, but long"
    rows["f2"]["verdict"], rows["f2"]["comment"] = "reject", "the side is wrong"
    rows["f3"]["verdict"], rows["f3"]["correction"] = "correct", TEXT.format("three")
    rows["f5"]["verdict"] = "accept"
    for row in rows.values():
        row["trace"] = row["trace"].replace("\n", "\r\n")  # as spreadsheets save it
    save(out, rows.values())
    for _ in range(2):
        assert main(["traces", "import", str(file), str(out)]) == 0
        said = capsys.readouterr().out
        assert "accept 2, reject 1, correct 1, without a verdict 26" in said
        assert f"29 traces are left in {file}" in said
        traces, rejected = read_traces(file), read_traces(rejected_file(file))
        assert len(traces) == 29
        assert set(rejected) == {"f2"}
        assert rejected["f2"].model_extra["review"] == {"verdict": "reject", "comment": "the side is wrong"}
        assert traces["f1"].model_extra["review"]["comment"] == "good, but long"
        assert (traces["f3"].trace, traces["f3"].model_extra["before"]) == (TEXT.format("three"), TEXT.format(3))
        assert traces["f5"].trace.startswith("=HYPERLINK")
        assert "review" not in traces["f4"].model_extra
    # The next sample holds none that was reviewed.
    assert export(file, tmp_path / "next.csv", count=100, seed=0) == 26


def test_rows_that_cannot_be_used_are_named_by_line_and_nothing_changes(file, tmp_path):
    export(file, tmp_path / "all.csv", count=30, seed=0)
    rows = read(tmp_path / "all.csv")[:8]
    next(row for row in rows if row["id"] != "f5")["trace"] += "\nin two lines"  # moves the lines below
    moved = next(i for i, row in enumerate(rows) if "in two lines" in row["trace"])
    for row in rows:
        row["verdict"] = "accept"
    rows[moved]["verdict"] = ""
    others = [i for i in range(8) if i != moved and rows[i]["id"] != "f5"]
    rows[others[0]]["verdict"] = "maybe"
    rows[others[1]]["id"] = "nobody"
    rows[others[2]]["verdict"] = "correct"
    rows[others[3]]["trace"] = "Another text."
    rows[others[4]] |= {"verdict": "correct", "correction": "<think>" + TEXT.format(0)}
    rows[others[5]]["correction"] = "why not"
    before = file.read_bytes()
    save(tmp_path / "bad.csv", [*rows, rows[others[5]]])
    with pytest.raises(ValueError) as error:
        apply(file, tmp_path / "bad.csv")
    said = str(error.value)
    assert "7 rows cannot be used, nothing was changed" in said
    begins = {}
    line = 2
    for i, row in enumerate([*rows, rows[others[5]]]):
        begins[i] = line
        line += 1 + row["trace"].count("\n")
    words = [
        "verdict must be accept, reject, correct or empty, found 'maybe'", "no trace of this id", "needs the text",
        "not the one that was reviewed", "the correction holds a tag", "has a correction, and verdict accept",
    ]  # fmt: skip
    for i, word in zip(others, words, strict=False):
        assert any(each.startswith(f"  line {begins[i]}: ") and word in each for each in said.splitlines())
    assert f"line {begins[8]}: the id of an earlier line again" in said
    assert file.read_bytes() == before
    assert not rejected_file(file).exists()


def test_tables_that_are_none_are_refused(file, tmp_path):
    with pytest.raises(ValueError, match="found no verdict, comment"):
        apply(file, save(tmp_path / "a.csv", [], ("id", "image", "labels", "trace", "correction")))
    (tmp_path / "b.csv").write_bytes("id,trace\né, ü".encode("latin-1"))
    with pytest.raises(ValueError, match="not UTF-8"):
        apply(file, tmp_path / "b.csv")
    with pytest.raises(FileNotFoundError, match=r"no file .*c\.csv"):
        apply(file, tmp_path / "c.csv")
