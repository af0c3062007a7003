"""Answers without training: a zero-shot table of two bases and anybody's adapter is a study without a trained stage."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from test_chain import rows
from tiny_models import checkpoint, gemma3_text
from tiny_tokenizer import family_folder

from vlmalign.config_yaml import write_yaml
from vlmalign.models.lora import LoraSpec, init_adapter
from vlmalign.models.model import Model
from vlmalign.studies.engine.chain import load_study
from vlmalign.studies.engine.run import Asked, run
from vlmalign.studies.engine.status import status
from vlmalign.weights.checkpoint import load_config, load_params, save_params
from vlmalign.weights.export import export_adapter


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two bases of one shape, an adapter on the first, and eight questions of three patients."""
    folder = tmp_path_factory.mktemp("untrained")
    chat = family_folder("gemma3")
    first = checkpoint(folder / "first", chat, gemma3_text())
    second = checkpoint(folder / "second", chat, gemma3_text())
    plain = Model(load_config(second))
    save_params(second, plain.init(jax.random.key(1)), plain, gemma3_text())
    model = Model(load_config(first), lora=LoraSpec(rank=2, alpha=4.0, targets=("q_proj", "v_proj")))
    base = load_params(first, model)
    adapter = init_adapter(model.shapes, base, key=jax.random.key(2))
    changed = {name: value if ".lora_A." in name else np.ones_like(value) for name, value in adapter.items()}
    export_adapter(folder / "adapter", model, base, changed, base_path=str(first))
    questions = [
        {
            "question": f"Which side is film {i}?",
            "options": {"A": "left", "B": "right"},
            "answer": "AB"[i % 2],
            "patient": i % 3,
        }
        for i in range(8)
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    data = {
        "run": str(folder / "run"),
        "sources": {"exam": {"kind": "rows", "path": str(folder / "questions.jsonl")}},
        "sets": {"exam": {"from": "exam", "role": "test"}},
        "tasks": {"side": {"kind": "choice", "prompt": "{question}"}},
        "stages": {
            "first": {"kind": "model", "path": str(first)},
            "second": {"kind": "model", "path": str(second)},
            "colleague": {"kind": "adapter", "from": "first", "path": str(folder / "adapter")},
        },
        "answers": {
            "zero-shot": {
                "stages": ["second", "first", "colleague"], "sets": ["exam"], "completion": 8, "rows": 4, "draws": 20,
            },
        },
    }  # fmt: skip
    (folder / "study.yaml").write_text(write_yaml(data))
    return folder


def start(folder: Path, *overrides: str, asked: Asked = Asked()) -> Path:
    return run(load_study(folder / "study.yaml", overrides), folder / "study.yaml", asked)


@pytest.fixture(scope="module")
def finished(folder) -> Path:
    return start(folder)


def test_every_model_answers_every_question(finished):
    answers = {}
    for name in ("first", "second", "colleague"):
        found = rows(finished / "answers" / "zero-shot" / name / "exam" / "predictions.jsonl")
        assert [row["truth"] for row in found] == list("ABABABAB")
        answers[name] = [row["completion"] for row in found]
    assert answers["first"] != answers["second"]
    assert answers["first"] != answers["colleague"]


def test_the_table_has_accuracies_with_intervals(finished):
    results = json.loads((finished / "scores" / "zero-shot" / "results.json").read_text())
    assert [row["stage"] for row in results["results"]] == ["second", "first", "colleague"]
    for row in results["results"]:
        assert (row["results"]["n"], row["results"]["patients"]) == (8, 3)
    assert "exam" in (finished / "report.html").read_text()


def test_each_base_is_loaded_once(finished):
    loads = [row["stage"] for row in rows(finished / "timing.jsonl") if row["stage"].startswith(("load", "answers"))]
    assert loads == [
        "load model", "answers/zero-shot/first/exam", "answers/zero-shot/colleague/exam",
        "load model", "answers/zero-shot/second/exam",
    ]  # fmt: skip


def test_other_weights_are_refused_by_name(finished, folder):
    """The checkpoint behind a finished table was changed: what was made from it is named, and nothing else."""
    second = folder / "second"
    before = (second / "model.safetensors").read_bytes()
    try:
        plain = Model(load_config(second))
        save_params(second, plain.init(jax.random.key(3)), plain, gemma3_text())
        with pytest.raises(
            ValueError, match="zero-shot/second/exam was made from something else: stage: the content of"
        ) as error:
            start(folder)
        assert "zero-shot/first" not in str(error.value)
    finally:
        (second / "model.safetensors").write_bytes(before)
    start(folder)
    assert {line.state for line in status(finished)} == {"given", "done"}


def test_an_adapter_of_another_base_is_refused(folder):
    with pytest.raises(ValueError, match=r"stages.colleague.path: "):
        start(folder, "stages.colleague.path=nowhere", f"run={folder / 'other'}")
    assert not (folder / "other").exists()
