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
from vlmalign.reporting.image_places import image_places
from vlmalign.studies.engine.chain import load_study
from vlmalign.studies.engine.run import run

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


def test_from_a_csv_to_scores_with_intervals_and_a_report(study):
    path, overrides = study
    folder = run(load_study(path, overrides), path)
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


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("sources.mine.image=flie", r"sources.mine: .*'flie'.*file"),
        ("sources.mine.labels.column=finding", r"sources.mine: .*'finding'.*findings"),
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
