"""`vlmalign sample`: sets of any table, with policies, views and bounds; and what it says of tables that it cannot read."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from vlmalign.cli import main

LABELS = ["Normal", "Edema", "Fracture"]


@pytest.fixture
def table(tmp_path, monkeypatch):
    """120 films of 50 patients in three views; some Edema is uncertain."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(rng.random((120, 3)) < [0.6, 0.25, 0.15], columns=LABELS).astype(int)
    frame.loc[rng.random(120) < 0.15, "Edema"] = -1
    frame.insert(0, "file", [f"{i}.png" for i in range(120)])
    frame["patient"] = [f"p{i}" for i in rng.integers(0, 50, 120)]
    frame["view"] = rng.choice(["AP", "PA", "LL"], 120)
    frame.to_csv("films.csv", index=False)
    return frame


def sample(*arguments):
    return main(["sample", *map(str, arguments)])


COLUMNS = ("--labels", ",".join(LABELS), "--patient", "patient")


def test_sets_keep_bounds_views_and_patients(table, capsys):
    bounds = ("--floor", 0.2, "Fracture=3", "--cap", 0.6, "Normal=11")
    views = ("--view", "view", "--views", "AP,PA")
    assert sample("films.csv", *COLUMNS, *views, *bounds, "--size", "sft=15", "rl=10", "--out", "out") == 0
    sets = {name: pd.read_csv(f"out/{name}.csv") for name in ("sft", "rl")}
    assert [len(films) for films in sets.values()] == [15, 10]
    assert not set(sets["sft"]["patient"]) & set(sets["rl"]["patient"])
    for films in sets.values():
        assert set(films["view"]) <= {"AP", "PA"}
        assert list(films) == list(table)
        counts = (films[LABELS] == 1).sum()
        assert (counts >= [0.2 * len(films), 0.2 * len(films), 3]).all()
        assert (counts <= [11, 0.6 * len(films), 0.6 * len(films)]).all()
    found = pd.read_csv("out/coverage.csv").set_index("label")
    frontal = table[table["view"] != "LL"]
    assert found["pool"].tolist() == (frontal[LABELS] == 1).sum().tolist()
    assert found["sft"].tolist() == (sets["sft"][LABELS] == 1).sum().tolist()
    assert found["floor"].tolist() == pytest.approx([0.2, 0.2, 3 / 15])
    assert found["cap"].tolist() == pytest.approx([11 / 15, 0.6, 0.6])
    # iterative stratification keeps the pool's shares, to within a film of 25
    assert (found["stratified share"] - found["pool share"]).abs().max() <= 1.5 / 25
    svg = Path("out/coverage.svg").read_text()
    assert all(f">{word}<" in svg for word in ("Fracture", "sft", "random", "stratified", "pool"))
    assert "Fracture" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("policy", "edema"),
    [("positive-only", (1,)), ("u-zeros", (1,)), ("u-ones", (1, -1)), ("u-ignore", (1,))],
)
def test_policies_of_uncertain_labels(table, policy, edema, capsys):
    assert sample("films.csv", *COLUMNS, "--uncertain", policy, "--size", 20, "--out", "out") == 0
    kept = table[table["Edema"] != -1] if policy == "u-ignore" else table
    found = pd.read_csv("out/coverage.csv").set_index("label")
    assert found.loc["Edema", "pool"] == kept["Edema"].isin(edema).sum()
    assert found.loc["Normal", "pool"] == (kept["Normal"] == 1).sum()
    drawn = pd.read_csv("out/sample.csv")
    assert found.loc["Edema", "sample"] == drawn["Edema"].isin(edema).sum()
    left_out = f"left out: {(table['Edema'] == -1).sum()} rows" in capsys.readouterr().out
    assert left_out == (policy == "u-ignore")


def test_a_matrix_and_a_column_of_names_are_the_same_table(table):
    matrix = (table[LABELS] == 1).to_numpy(int)
    np.save("labels.npy", matrix)
    np.savetxt("labels.csv", matrix, fmt="%d", delimiter=",")
    pd.DataFrame(matrix, columns=LABELS).to_csv("only.csv", index=False)
    names = ["|".join(np.array(LABELS)[row == 1]) for row in matrix]
    pd.DataFrame({"row": range(120), "seen": names}).to_csv("names.csv", index=False)
    assert sample("labels.npy", "--labels", ",".join(LABELS), "--size", 20, "--out", "array") == 0
    assert sample("labels.csv", "--size", 20, "--out", "headless") == 0
    assert sample("only.csv", "--size", 20, "--out", "only") == 0
    assert sample("names.csv", "--labels", "seen", "--separator", "|", "--size", 20, "--out", "names") == 0
    drawn = pd.read_csv("array/sample.csv")
    assert (drawn[LABELS].to_numpy() == matrix[drawn["row"]]).all()
    assert drawn["row"].tolist() == pd.read_csv("headless/sample.csv")["row"].tolist()
    assert drawn[LABELS].equals(pd.read_csv("only/sample.csv"))
    counts = pd.read_csv("names/coverage.csv").set_index("label")["pool"]
    assert counts[LABELS].tolist() == matrix.sum(0).tolist()


@pytest.mark.full  # opening a study imports the whole package
def test_a_source_of_a_study(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from vlmalign.data.sources.mimic import write_synthetic

    truth = write_synthetic("mimic", films={"train": 60, "validate": 4, "test": 4}, seed=0, size=32)
    study = "run: runs/x\nsources: {mimic: {kind: mimic-cxr-jpg, root: mimic, split: train, views: [AP]}}\n"
    study += "stages: {base: {kind: model, path: nowhere, dtype: float32}}\n"
    (tmp_path / "study.yaml").write_text(study)
    assert sample("study.yaml", "--source", "mimic", "--size", 10, "--floor", 0, "--out", "out") == 0
    drawn = pd.read_csv("out/sample.csv")
    assert len(drawn) == 10
    assert set(drawn["id"]) <= {row["id"] for row in truth}
    assert sample("study.yaml", "--source", "other", "--size", 10, "--out", "more") == 2
    assert sample("study.yaml", "--source", "mimic", "--patient", "x", "--size", 10, "--out", "more") == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("films.csv",), "give --labels A,B; columns that hold only 1, 0, -1 and blanks: Normal, Edema, Fracture;"),
        (("films.csv", "--labels", "Edemaa"), "no column 'Edemaa'"),
        (("films.csv", *COLUMNS, "--views", "AP"), "give --view COLUMN"),
        (("films.csv", *COLUMNS, "--view", "view", "--views", "XX"), "no row has 'XX'"),
        (("films.csv", *COLUMNS, "--floor", "much"), "--floor much: expected a share"),
        (("films.csv", *COLUMNS, "--cap", "Edem=0.5"), "the nearest label is 'Edema'"),
        (("films.csv", *COLUMNS, "--floor", "0.9"), "largest floor that can be had"),
        (("films.csv", "--labels", "file,view", "--separator", ";"), "one column of names"),
        (("films.csv", *COLUMNS, "--source", "x"), "--source is for the YAML file of a study"),
        (("absent.npy",), "no file absent.npy"),
        (("cube.npy",), "expected 0 and 1 in rows and columns"),
        (("flat.npy", "--patient", "p"), "--patient is for tables"),
    ],
)
def test_mistakes_are_named_and_nothing_is_written(table, capsys, arguments, said):
    np.save("cube.npy", np.zeros((2, 2, 2)))
    np.save("flat.npy", np.ones((9, 2)))
    assert sample(*arguments, "--size", 20, "--out", "out") == 2
    assert said in capsys.readouterr().err
    assert not Path("out").exists()


def test_a_folder_with_files_is_not_written_into(table, capsys):
    assert sample("films.csv", *COLUMNS, "--size", 20, "--out", ".") == 2
    assert "not an empty folder" in capsys.readouterr().err
    assert sample("films.csv", *COLUMNS, "--size", "pool=20", "--out", "out") == 2
