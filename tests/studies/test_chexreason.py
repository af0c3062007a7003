"""The study of ChexReason as a config: what the paper's tables need is in the graph, and the toy is the same graph."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlmalign.data.sources.schema import CHEXPERT
from vlmalign.studies.engine.chain import load_study
from vlmalign.studies.engine.graph import build_graph

FORMATS = ("narrative", "reasoning-a", "free", "only-label")
PROMPTS = ("narrative", "self-check", "hypothesis", *"abcdef")


@pytest.fixture(scope="module")
def folder(repository) -> Path:
    return repository / "configs" / "chexreason"


@pytest.fixture(scope="module", params=["study", "small"])
def graph(folder, request):
    return build_graph(load_study(folder / f"{request.param}.yaml"))


def test_every_experiment_of_the_paper_is_in_the_graph(graph):
    trained = {name for name, node in graph.items() if node.kind in ("sft", "grpo")}
    assert trained == {f"stages/{model}-{form}" for model in ("medgemma", "qwen") for form in FORMATS} | {
        "stages/grpo-hard", "stages/grpo-nuanced",
    }  # fmt: skip
    answered = {name.removeprefix("answers/") for name in graph if name.startswith("answers/")}
    assert {f"prompt-{prompt}/medgemma/validation" for prompt in PROMPTS} <= answered
    for state in ("", "@last"):
        for test in ("validation", "chexpert", "nih"):
            for model in ("medgemma", "qwen"):
                assert {f"sft-{form}/{model}-{form}{state}/{test}" for form in FORMATS} <= answered
            assert {f"grpo/grpo-{arm}{state}/{test}" for arm in ("hard", "nuanced")} <= answered
    assert {f"base/{model}/{test}" for model in ("medgemma", "qwen") for test in ("chexpert", "nih")} <= answered


def test_grpo_goes_on_from_free_reasoning_and_samples_are_drawn_once(graph):
    for arm in ("hard", "nuanced"):
        parents = {edge.node for edge in graph[f"stages/grpo-{arm}"].parents.values()}
        assert {"stages/medgemma-free", "sets/train"} <= parents
    assert [name for name in graph if name.startswith("sets/")].count("sets/train") == 1


def test_the_toy_is_the_study_but_for_another_groups_model(folder):
    study, small = (set(build_graph(load_study(folder / f"{name}.yaml"))) for name in ("study", "small"))
    others = {name for name in study if "nv-reason" in name}
    assert {name for name in study - others if not name.startswith("sources/")} == {
        name for name in small if not name.startswith("sources/")
    }


def test_texts_ask_for_what_is_read(folder):
    """Nine prompts and four formats, each a file of its own, all of them different."""
    paths = [path for room in ("prompts", "formats") for path in sorted((folder / room).glob("*.txt"))]
    texts = {path: path.read_text(encoding="utf-8") for path in paths}
    assert len(texts) == len(set(texts.values())) == len(PROMPTS) + len(FORMATS)
    config = load_study(folder / "study.yaml")
    for name, task in config.tasks.items():
        question = task.question
        assert "{labels}" not in question
        assert all(label in question for label in CHEXPERT.labels)
        assert ("<think>" in question) == (name != "only-label")
        assert "</solution>" in question


def test_a_prompt_from_a_file_is_kept_as_its_text(folder):
    """So a run can be repeated from its folder, and another text is another study."""
    config = load_study(folder / "small.yaml")
    assert config.tasks["free"].prompt == (folder / "formats" / "free.txt").read_text(encoding="utf-8").strip()
    for given, found in (
        ("{file: gone.txt}", r"tasks.free.*gone.txt: No such file or directory; the working directory is "),
        ("{path: a.txt}", r"tasks.free.*expected a text, or \{file: PATH\}, found a section with path"),
    ):
        with pytest.raises(ValueError, match=found):
            load_study(folder / "small.yaml", [f"tasks.free.prompt={given}"])
