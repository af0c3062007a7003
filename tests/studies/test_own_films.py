"""A user's own films: 60 images and a CSV with labels nobody has heard of, by the config that the documentation shows."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from test_chain import rows
from tiny_models import checkpoint, gemma3_vision
from tiny_tokenizer import chat_folder

from vlmalign.data.sources.examples import write_table
from vlmalign.evaluation.samples import majority_vote, score_samples
from vlmalign.reporting.image_places import image_places
from vlmalign.studies.engine.chain import load_study
from vlmalign.studies.engine.run import Asked, run

#: the config at a thousandth of its size, in the shapes of test_fork.py, whose compiled programs serve again
SMALL = (
    "stages.base.lora={rank: 2, alpha: 4.0, targets: [q_proj, v_proj]}",
    "stages.sft.epochs=0.2", "stages.sft.batch=4",
    "stages.sft.shapes={rows: 4, prompt_multiple: 64, completion_multiple: 16}",
    "stages.grpo.steps=2", "stages.grpo.prompts=2", "stages.grpo.rollout={rows: 2, group: 2, completion: 16}",
    "stages.grpo.shapes={rows: 4, prompt_multiple: 64, completion_multiple: 16}",
    "answers.test.completion=16", "answers.test.rows=4", "answers.test.prompt_multiple=64", "answers.test.draws=20",
)  # fmt: skip


@pytest.fixture(scope="module")
def study(tmp_path_factory, repository) -> tuple[Path, list[str]]:
    """The config, and where this test's films, model and run are."""
    folder = tmp_path_factory.mktemp("own")
    model = checkpoint(folder / "model", chat_folder(), gemma3_vision(chat_folder()))
    (folder / "data").mkdir()
    table = write_table(folder / "data", films=60, seed=1, size=32)
    places = [
        f"run={folder / 'run'}",
        f"sources.mine.path={table}",
        f"sources.mine.images={table.parent / 'scans'}",
        f"stages.base.path={model}",
    ]
    return repository / "configs" / "own_films.yaml", [*places, *SMALL]


@pytest.fixture(scope="module")
def finished(study) -> Path:
    path, overrides = study
    return run(load_study(path, overrides), path)


#: a further entry: two samples of each film, in the shapes of the rollouts, and subgroups by sex and age
SAMPLED = (
    "answers.sampled={stages: [base, sft], sets: [held-out], completion: 16, rows: 2, prompt_multiple: 64, samples: 2, "
    "temperature: 0.9, top_p: 0.95, draws: 20, subgroups: {sex: values, age: [40, 60]}}",
)


@pytest.mark.full
def test_from_a_csv_to_scores_with_intervals_and_a_report(finished):
    folder = finished
    results = json.loads((folder / "scores" / "test" / "results.json").read_text())
    assert [row["stage"] for row in results["results"]] == ["base", "sft", "grpo"]
    (dataset,) = results["datasets"]
    assert dataset["n"] == 20
    assert dataset["role"] == "in-schema"
    assert dataset["labels"] == ["basal veil", "odd edge", "plain", "round shadow", "soft cloud"]
    for row in results["results"]:
        assert len(row["results"]["blocks"]["all 5"]["per_label"]) == 5
    drawn = [{row["patient"] for row in rows(folder / "sets" / name / "cases.jsonl")} for name in ("train", "held-out")]
    assert not set.intersection(*drawn)
    page = (folder / "report.html").read_text()
    assert "round shadow" in page
    assert "data:image/jpeg" in page, "films are found again by the names that records give them"
    images = {row["image"] for row in rows(folder / "answers" / "test" / "sft" / "held-out" / "predictions.jsonl")}
    images |= {name for row in rows(folder / "stages" / "grpo" / "completions.jsonl") for name in row["images"]}
    assert all(re.fullmatch(r"sources\.mine/[^/]+", name) for name in images)
    assert all(image_places(folder)(name).is_file() for name in images)
    for path in folder.rglob("*.jsonl"):
        assert str(folder.parent) not in path.read_text(), f"{path.name} names a path of the machine"


@pytest.mark.full
def test_several_samples_are_scored_by_their_vote_and_by_themselves(study, finished):
    path, overrides = study
    before = (finished / "scores" / "test" / "results.json").read_bytes()
    run(load_study(path, [*overrides, *SAMPLED]), path)  # only the new entry is made
    assert (finished / "scores" / "test" / "results.json").read_bytes() == before
    answers = rows(finished / "answers" / "sampled" / "sft" / "held-out" / "predictions.jsonl")
    assert [row["sample"] for row in answers] == [0, 1] * 20
    assert len({row["completion"] for row in answers}) > 20  # samples of a film differ
    found = json.loads((finished / "scores" / "sampled" / "results.json").read_text())
    assert [row["stage"] for row in found["results"]] == ["base", "sft"]
    results = found["results"][1]["results"]
    assert results["n"] == 20
    assert results["samples"] == score_samples(
        answers, results["blocks"]["all 5"]["labels"], subsets=_subsets(results), draws=20
    )
    votes = majority_vote(answers)
    assert results["fail_rate"] == sum(not vote["valid"] for vote in votes) / 20
    (step,) = found["differences"]
    assert (step["from"], step["to"]) == ("base", "sft")
    # Every film is in one group of each column.
    cases = rows(finished / "sets" / "held-out" / "cases.jsonl")
    for column, names in (("sex", {"F", "M"}), ("age", {"below 40", "40 to below 60", "60 and above"})):
        groups = [row for row in found["subgroups"] if (row["stage"], row["column"]) == ("sft", column)]
        assert {row["group"] for row in groups} <= names
        assert sum(row["results"]["n"] for row in groups) == len(cases)
    page = (finished / "report.html").read_text()
    assert 'id="samples"' in page
    assert "age: 60 and above" in page


def _subsets(results: dict) -> dict:
    return {name: tuple(block["labels"]) for name, block in results["blocks"].items()}


@pytest.mark.full
def test_new_settings_of_scores_leave_older_scores_as_they_are(study, finished):
    """A record of before subgroups, and of fewer settings of tables, counts as one without them; with subgroups, scores
    alone are made again."""
    path, overrides = study
    drawn = finished / "sets" / "held-out" / "made.json"
    made = json.loads(drawn.read_text())
    for name in ("sex", "age", "subfolder"):
        del made["settings"]["source"][name]
    for name in ("lists", "unlabelled", "blank"):
        del made["settings"]["source"]["labels"][name]
    drawn.write_text(json.dumps(made))
    record = finished / "scores" / "test" / "made.json"
    made = json.loads(record.read_text())
    del made["settings"]["subgroups"]
    record.write_text(json.dumps(made))
    written = record.stat().st_mtime_ns
    run(load_study(path, overrides), path, Asked(only=("scores/test",)))
    assert record.stat().st_mtime_ns == written
    run(load_study(path, [*overrides, "answers.test.subgroups={sex: values}"]), path, Asked(only=("scores/test",)))
    again = json.loads((finished / "scores" / "test" / "results.json").read_text())
    assert {row["column"] for row in again["subgroups"]} == {"sex"}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("sources.mine.image=flie", r"sources.mine: .*'flie'.*file"),
        ("sources.mine.labels.column=finding", r"sources.mine: .*'finding'.*findings"),
        (
            "answers.test.subgroups={race: values}",
            r"answers.test.subgroups: no film of its sets has 'race'; known of them: age, direction, part, sex",
        ),
        ("answers.test.subgroups={age: [60, 40]}", "bounds of bands ascend"),
        (
            "tasks.findings.labels=[plain, soft cloud]",
            r"stages.sft.task: set train has labels that task findings does not",
        ),
    ],
)
def test_what_the_table_lacks_is_named_before_any_work(study, tmp_path, override, expected):
    path, overrides = study
    with pytest.raises(ValueError, match=expected):
        run(load_study(path, [*overrides, f"run={tmp_path / 'run'}", override]), path)
    assert not (tmp_path / "run").exists()
