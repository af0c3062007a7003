"""Rejection sampling: the first sample with the true labels and a text that can be taught, for each film."""

import json

import pytest
from stub import write_study

from vlmalign.cli import main
from vlmalign.teaching.rejection import from_answers
from vlmalign.teaching.trace_file import failed_file, read_failed, read_traces

GOOD = "The film is upright and sharp. What decides is the haze, dense and wide in both lungs: edema."


def row(id, sample, predicted=("Edema",), truth=("Edema",), **other):
    base = {
        "id": id, "sample": sample, "truth": list(truth), "predicted": list(predicted), "valid": True, "unknown": [],
        "reasoning": f"{GOOD} Sample {sample}.", "stopped": True, "image": f"{id}.png", "completion": "", "tokens": 9,
    }  # fmt: skip
    return {**base, **other}


ROWS = [
    row("a", 0, predicted=("Edema", "Fracture")), row("a", 1), row("a", 2),
    row("b", 0, predicted=("Fracture", "Edema"), truth=("Edema", "Fracture")),
    row("c", 0, predicted=()), row("c", 1, valid=False), row("c", 2, unknown=["flu"]), row("c", 3, stopped=False),
    row("d", 0, reasoning=f"{GOOD} As the labels state."), row("d", 1, reasoning=""), row("d", 2, predicted=()),
    row("e", 0, predicted=(), truth=()),
    row("f", 0, reasoning="Edema."),
]  # fmt: skip


@pytest.fixture
def run(tmp_path):
    study = write_study(tmp_path, films=4)
    (tmp_path / "run" / "study.yaml").write_text(study.read_text())
    for ref in ("train", "held"):
        folder = tmp_path / "run" / "answers" / "samples" / "sft" / ref
        folder.mkdir(parents=True)
        (folder / "predictions.jsonl").write_text("".join(json.dumps(each) + "\n" for each in ROWS))
        (folder / "made.json").write_text("{}")
    return tmp_path / "run"


def test_the_first_right_answer_of_each_film_is_kept(run, tmp_path, capsys):
    out = tmp_path / "t.jsonl"
    assert main(["traces", "from-answers", str(run), "samples", "sft", "train", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "answers with the true labels: 7 of 13 (53.8%)" in said
    assert "traces: 4 of 6 films" in said
    traces, failed = read_traces(out), read_failed(failed_file(out))
    assert {id: each.trace for id, each in traces.items()} == {
        "a": f"{GOOD} Sample 1.", "b": f"{GOOD} Sample 0.", "e": f"{GOOD} Sample 0.", "f": "Edema.",
    }  # fmt: skip
    assert (traces["a"].asked, traces["a"].labels, traces["a"].model) == (2, ("Edema",), "sft")
    assert set(failed) == {"c", "d"}
    assert failed["c"].reason == "no answer with the true labels"
    assert failed["d"].reason.startswith("right labels, but: ")
    assert main(["traces", "from-answers", str(run), "samples", "sft", "train", "--out", str(out)]) == 2
    assert "give another --out" in capsys.readouterr().err


def test_a_format_is_held_to(run, tmp_path):
    kept = from_answers(run, "samples", "sft", "train", tmp_path / "t.jsonl", format="free")
    assert (kept.films, kept.traces) == (6, 3)
    assert "expected 15 to 200 words" in read_failed(failed_file(tmp_path / "t.jsonl"))["f"].reason


def test_what_cannot_be_taught_from_is_refused(run, tmp_path):
    out = tmp_path / "t.jsonl"
    with pytest.raises(ValueError, match="held is a test set"):
        from_answers(run, "samples", "sft", "held", out)
    with pytest.raises(FileNotFoundError, match="there are samples/sft/held, samples/sft/train"):
        from_answers(run, "samples", "grpo", "train", out)
    folder = run / "answers" / "samples" / "sft" / "train"
    for rows, words in (
        ([{"id": "a"}], r"line 1: not a line of predictions \(no truth"),
        ([row("a", 0), row("b", 0) | {"truth": "B"}], "line 2: answers to a task of kind labels"),
    ):
        (folder / "predictions.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
        with pytest.raises(ValueError, match=words):
            from_answers(run, "samples", "sft", "train", out)
    (folder / "made.json").unlink()
    with pytest.raises(ValueError, match="is not finished"):
        from_answers(run, "samples", "sft", "train", out)
    assert not out.exists()
