"""What a study's config says of its graph: order, states, arms; and every mistake in it, named by its place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from vlmalign.config import ConfigError, dump_config, load_config
from vlmalign.config_yaml import write_yaml
from vlmalign.studies.engine.chain import load_study
from vlmalign.studies.engine.config import StudyConfig
from vlmalign.studies.engine.graph import Edge, ancestors, build_graph, descendants, find_nodes
from vlmalign.studies.engine.identity import BEFORE, _own
from vlmalign.studies.engine.opened import _extreme
from vlmalign.studies.engine.record import Record, differences
from vlmalign.studies.engine.sets import _bounds
from vlmalign.studies.engine.texts import Texts
from vlmalign.types import Example, Group, Segment

SHAPES = {"rows": 4, "prompt_multiple": 64, "completion_multiple": 16}
TRAIN = {"shapes": SHAPES, "optimiser": {"learning_rate": 1e-2}}


def fork() -> dict:
    """base -> SFT -> {GRPO hard, GRPO nuanced, DPO}, two answered sets."""
    policy = {
        "kind": "grpo", "from": "sft", "data": "train.rl", "steps": 2, "prompts": 2, **TRAIN,
        "rollout": {"rows": 2, "group": 2, "completion": 16},
    }  # fmt: skip
    return {
        "run": "run",
        "sources": {
            "mine": {"kind": "mimic-cxr-jpg", "root": "{run}/sources/mine", "split": "train", "phantom": {"films": 40}},
            "test": {"kind": "mimic-cxr-jpg", "root": "{run}/sources/mine", "split": "test"},
        },
        "sets": {
            "train": {"from": "mine", "draw": "balanced", "parts": {"sft": 8, "rl": 4}, "floor": 0.0, "apart": ["held"]},
            "held": {"from": "mine", "draw": "patients", "size": 4, "role": "validation"},
            "near": {"from": "test", "role": "test"},
            "far": {"from": "test", "draw": "random", "size": 2, "role": "test"},
        },
        "tasks": {"findings": {"kind": "labels", "labels": "chexpert", "prompt": "Which findings?"}},
        "stages": {
            "nuanced": {**policy, "rewards": {"r": {"kind": "nuanced"}}},
            "dpo": {"kind": "dpo", "from": "sft@last", "data": {"path": "pairs.jsonl"}, "steps": 2, "batch": 2, **TRAIN},
            "base": {"kind": "model", "path": "models/tiny"},
            "sft": {
                "kind": "sft", "from": "base", "data": "train.sft", "steps": 2, "batch": 4, **TRAIN,
                "validation": {"data": "held", "every": 1, "best": "loss"},
            },
            "hard": {**policy, "rewards": {"r": {"kind": "hard"}}},
        },
        "answers": {"test": {"stages": ["base", "sft", "hard"], "sets": ["near", "far"], "completion": 16}},
    }  # fmt: skip


def load(folder: Path, data: dict, *overrides: str) -> StudyConfig:
    path = folder / "study.yaml"
    path.write_text(write_yaml(data))
    return load_config(StudyConfig, path, overrides)


@pytest.fixture
def config(tmp_path) -> StudyConfig:
    return load(tmp_path, fork())


def test_parents_come_first_and_stages_of_a_base_together(config):
    names = list(build_graph(config))
    assert names[:5] == ["sources/mine", "sets/held", "sets/train", "sets/near", "sets/far"]
    assert names[5:10] == ["stages/base", "stages/sft", "stages/nuanced", "stages/dpo", "stages/hard"]
    assert names[-2:] == ["scores/test", "report"]
    for node in build_graph(config).values():
        assert all(names.index(edge.node) < names.index(node.name) for edge in node.parents.values())


def test_a_stage_goes_on_from_the_best_state_where_there_is_one(config):
    nodes = build_graph(config)
    assert nodes["stages/hard"].parents["from"] == Edge("stages/sft", "best")
    assert nodes["stages/dpo"].parents["from"] == Edge("stages/sft", "last")
    assert nodes["answers/test/hard/near"].parents["stage"] == Edge("stages/hard", "last")
    assert nodes["answers/test/base/near"].parents["stage"] == Edge("stages/base")


def test_a_split_of_an_invented_set_waits_for_it(config):
    assert build_graph(config)["sets/near"].parents["from"] == Edge("sources/mine")


def test_what_follows_from_what(config):
    nodes = build_graph(config)
    assert {name for name in descendants(nodes, "stages/hard") if name.startswith("stages/")} == {"stages/hard"}
    assert "answers/test/sft/near" in descendants(nodes, "stages/sft")
    assert "answers/test/base/near" not in descendants(nodes, "stages/sft")
    needed = ancestors(nodes, ["answers/test/base/far"])
    assert needed == {"answers/test/base/far", "stages/base", "sets/far", "sources/mine"}


def test_names_that_users_give(config):
    nodes = build_graph(config)
    assert find_nodes(nodes, "sft") == ["stages/sft"]
    assert find_nodes(nodes, "stages/sft/") == ["stages/sft"]
    assert find_nodes(nodes, "answers/test/sft") == ["answers/test/sft/near", "answers/test/sft/far"]
    with pytest.raises(ValueError, match=r"no artefact 'stf'; the nearest is 'sft'"):
        find_nodes(nodes, "stf")


def test_a_study_reads_back_as_it_was_written(config, tmp_path):
    from vlmalign.config import dump_config

    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(StudyConfig, tmp_path / "again.yaml") == config


def test_several_answers_have_scores_where_there_is_a_vote(tmp_path):
    sampled = {"answers.test.samples=4", "answers.test.temperature=0.7"}
    assert "scores/test" in build_graph(load(tmp_path, fork(), *sampled))
    free = {**fork(), "tasks": {"talk": {"kind": "free"}}}
    assert "scores/test" in build_graph(load(tmp_path, free))
    assert "scores/test" not in build_graph(load(tmp_path, free, *sampled))


def test_subgroups_read_back_as_they_were_written(tmp_path):
    override = "answers.test.subgroups={age: [40, 60.5], sex: values}"
    config = load(tmp_path, fork(), override)
    assert config.answers["test"].subgroups == {"age": (40.0, 60.5), "sex": "values"}
    written = config.model_dump(mode="json", by_alias=True)
    assert load(tmp_path, written) == config


def test_a_list_of_stages_is_a_chain(tmp_path):
    stage = {"kind": "sft", "data": {"path": "rows.jsonl"}, "steps": 2, "batch": 2, **TRAIN}
    path = tmp_path / "chain.yaml"
    path.write_text(
        write_yaml({"run": "run", "model": {"path": "models/tiny", "adapter": "old"}, "stages": [stage, stage]})
    )
    found = load_study(path)
    assert list(found.stages) == ["base", "adapter", "01-sft", "02-sft"]
    assert [found.stages[name].from_ for name in ("adapter", "01-sft", "02-sft")] == ["base", "adapter", "01-sft"]
    assert [found.depth_of(name) for name in ("01-sft", "02-sft")] == [0, 1]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("stages.sft.from=hard", r"stages.sft: a circle, sft -> hard -> sft; nothing of it can come first"),
        ("stages.sft.from=bsae", r"stages.sft.from: no stage is called 'bsae'; the nearest is 'base'"),
        ("stages.sft.from=null", r"stages.sft.from: required, but not given"),
        ("stages.hard.from=sft@first", r"stages.hard.from: 'sft@first' names the state 'first'"),
        ("stages.sft.data=trian.sft", r"stages.sft.data: no set is called 'trian'; the nearest is 'train'"),
        ("stages.sft.data=train", r"stages.sft.data: 'train' is no part of set train, which has train.sft, train.rl"),
        ("stages.sft.data=near", r"stages.sft.data: near is a test set"),
        ("stages.sft.validation.data=far", r"stages.sft.validation.data: far is a test set"),
        ("stages.sft.validation.watch=[far]", r"stages.sft.validation.watch: far is a test set"),
        ("sets.near.from=tset", r"sets.near.from: no source is called 'tset'; the nearest is 'test'"),
        ("sets.held.apart=[train.sft]", r"sets.\w+: a circle, "),
        ("sets.near.size=3", r"sets.near: draw: whole takes no size"),
        ("sets.train.parts={}", r"a balanced draw needs either size \(one set\) or parts"),
        ("sets.near.role=tset", r"sets.near.role: expected .*found 'tset'"),
        ("tasks={}", r"stages.\w+.task: required, but not given: what is asked about the set"),
        ("stages.sft.task=labels", r"stages.sft.task: no task is called 'labels'; the nearest is 'findings'"),
        ("answers.test.stages=[base, best]", r"answers.test.stages: no stage is called 'best'"),
        ("answers.test.sets=[nera]", r"answers.test.sets: no set is called 'nera'; the nearest is 'near'"),
        ("answers.test.samples=4", r"4 greedy answers are all the same; set a temperature"),
        ("stages.dpo.reference=elsewhere", r"stages.dpo.reference: no stage is called 'elsewhere'"),
        ("stages.a/b={kind: model, path: x}", r"stages: 'a/b' cannot be a name"),
        (
            "sources.mine.kind=mimic",
            r"sources.mine.kind: expected one of .*found 'mimic'; the nearest is 'mimic-cxr-jpg'",
        ),
        ("stages.sft.data={set: train.sft, path: x}", r"give either set .* or path .*, found both"),
    ],
)
def test_bad_graph(tmp_path, override, expected):
    with pytest.raises(ConfigError, match=expected):
        load(tmp_path, fork(), override)


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("choice", {"letters": 5}, "options.letters: expected a valid string, found 5"),
        ("json", {"schema": 5}, "options.schema: expected a valid dictionary, found 5"),
        ("json", {"schema": {"required": [[]]}}, r"schema: required must hold names of properties, found \[\]"),
        ("hard", {"min_tokens": "x"}, "options.min_tokens: expected a valid integer, found 'x'"),
        ("labels", {"labels": [None]}, r"options.labels.0: expected a valid string, found \[None\]"),
        ("labels", {"measure": 3}, "options.measure: expected a valid string, found 3"),
        ("pattern", {"pattern": 5}, "options.pattern: expected a valid string, found 5"),
        ("repetition", {"n": "x"}, "options.n: expected a valid integer, found 'x'"),
        ("nuanced", {"frequency": [None]}, r"options.frequency.0: expected a valid number, found \[None\]"),
        ("collapse", {"window": "x"}, "options.window: expected a valid integer, found 'x'"),
    ],
)
def test_a_wrong_option_of_a_reward_is_named(tmp_path, kind, options, expected):
    data = fork()
    data["stages"]["hard"]["rewards"] = {"r": {"kind": kind, "options": options}}
    with pytest.raises(ConfigError, match=rf"stages.hard.rewards.r: {expected}"):
        load(tmp_path, data)


@pytest.mark.parametrize("stages", [[], {}])
def test_a_study_without_stages_is_told_once(tmp_path, stages):
    path = tmp_path / "study.yaml"
    path.write_text(write_yaml({**fork(), "stages": stages}))
    with pytest.raises(ConfigError, match=r"1 problem\n.*stages: expected at least one stage, found none"):
        load_study(path)


def test_weights_have_a_bound(tmp_path):
    data = fork()
    data["stages"]["hard"]["rewards"]["r"]["weight"] = 1e308
    with pytest.raises(ConfigError, match=r"stages.hard.rewards.r.weight: expected less than or equal to 1000000"):
        load(tmp_path, data)


def test_yaml_that_is_nested_too_deeply_is_told(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text("run: " + "[" * 900 + "]" * 900)
    with pytest.raises(ConfigError, match="nested too deeply"):
        load_study(path)


def test_a_row_that_widens_every_batch_is_told_of():
    def texts(*lengths: int) -> Texts:
        def segment(length: int) -> Segment:
            return Segment(np.zeros(length, np.int32), np.full(length, -1, np.int32), np.ones(length, np.float32))

        groups = [Group(i, segment(length - 2), (segment(2), segment(1)), ()) for i, length in enumerate(lengths)]
        return Texts(groups, [Example(f"rows:{i + 1}", "p", None, (), {}) for i in range(len(lengths))], [])

    assert _extreme("sft", texts(10, 20, 30, 199)) is None
    said = _extreme("sft", texts(10, 20, 20, 30, 200))
    assert "stage sft: the longest row has 200 tokens, the median one 20," in said
    assert "the longest prompt is that of rows:5." in said


def test_floors_and_caps_are_shares_or_cases(tmp_path):
    bounds = {"floor": 2, "floors": {"Fracture": 0.1}, "cap": 0.5, "caps": {"Edema": 3}}
    data = fork()
    data["sets"]["train"] |= bounds
    study = load(tmp_path, data)
    found = study.sets["train"]
    assert (found.floor, found.floors, found.cap, found.caps) == tuple(bounds.values())
    assert [type(value) for value in (found.floor, found.cap)] == [int, float]
    assert study == load_config(StudyConfig, Path(_written(tmp_path, study)))
    assert _bounds(found, ["Edema", "Fracture"]) == {
        "floor": 2 / 8,
        "floors": {"Fracture": 0.1},
        "caps": {"Edema": 3 / 8, "Fracture": 0.5},
    }
    with pytest.raises(ConfigError, match=r"sets\.train\.floor"):
        load(tmp_path, fork(), "sets.train.floor=1.5")
    with pytest.raises(ConfigError, match=r"caps belong to a balanced draw, found draw: random"):
        load(tmp_path, fork(), "sets.far.caps={Edema: 3}")


def test_a_set_drawn_before_there_were_bounds_of_labels_is_the_same(config):
    settings = _own(config.sets["train"])
    then = {key: value for key, value in settings.items() if key not in ("floors", "cap", "caps")}
    record = Record("sets/train", "set", settings)
    earlier = Record("sets/train", "set", then).as_json()
    assert differences(record, earlier, under_way=False, before=BEFORE["set"]) == []
    other = Record("sets/train", "set", settings | {"caps": {"Edema": 0.5}})
    assert differences(other, earlier, under_way=False, before=BEFORE["set"]) != []


def _written(folder: Path, study: StudyConfig) -> str:
    path = folder / "again.yaml"
    path.write_text(dump_config(study))
    return str(path)
