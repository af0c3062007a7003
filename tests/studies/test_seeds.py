"""`seeds`: siblings of every stage that trains, what each goes on from, and their numbers over seeds."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from test_graph import TRAIN, fork

from vlmalign.config import ConfigError, dump_config
from vlmalign.config_yaml import write_yaml
from vlmalign.evaluation.over_seeds import over_seeds
from vlmalign.studies.engine.chain import load_study
from vlmalign.studies.engine.graph import Edge, build_graph, find_nodes
from vlmalign.studies.engine.score import _differences_over_seeds, _over_seeds
from vlmalign.studies.engine.seeds import families


def load(folder, *overrides: str, **changed):
    path = folder / "study.yaml"
    path.write_text(write_yaml({**fork(), "seeds": [0, 3], **changed}))
    return load_study(path, overrides)


def test_every_stage_that_trains_has_siblings_that_go_on_from_siblings(tmp_path):
    config = load(tmp_path)
    assert set(config.stages) == {
        "base",
        *(f"{name}-s{seed}" for name in ("sft", "nuanced", "dpo", "hard") for seed in (0, 3)),
    }
    nodes = build_graph(config)
    assert nodes["stages/hard-s3"].parents["from"] == Edge("stages/sft-s3", "best")
    assert nodes["stages/dpo-s0"].parents["from"] == Edge("stages/sft-s0", "last")
    assert nodes["stages/sft-s0"].parents["from"] == Edge("stages/base")
    assert nodes["stages/hard-s0"].parents["data"] == nodes["stages/hard-s3"].parents["data"]  # one draw for all
    assert config.answers["test"].stages == ("base", "sft-s0", "sft-s3", "hard-s0", "hard-s3")
    assert [config.seed_of(name) for name in ("base", "sft-s0", "hard-s3")] == [0, 0, 3]
    assert families(config, ("base", "sft-s0", "sft-s3@last", "hard-s3")) == {
        "sft": {0: "sft-s0"}, "sft@last": {3: "sft-s3@last"}, "hard": {3: "hard-s3"},
    }  # fmt: skip


def test_beside_a_paper_stands_the_first_seed(tmp_path):
    rows = {"chexpert": {"ChexReason": "test/hard/near", "MedGemma": "test/base/near"}}
    config = load(tmp_path, report={"beside": "chexreason", "rows": rows})
    assert config.report.rows == {"chexpert": {"ChexReason": "test/hard-s0/near", "MedGemma": "test/base/near"}}


def test_a_study_of_seeds_reads_back_from_its_run_folder(tmp_path):
    config = load(tmp_path)
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_study(tmp_path / "again.yaml") == config


def test_a_stage_stands_for_its_siblings_where_artefacts_are_named(tmp_path):
    nodes = build_graph(load(tmp_path))
    assert find_nodes(nodes, "sft") == ["stages/sft-s0", "stages/sft-s3"]
    assert find_nodes(nodes, "sft-s3") == ["stages/sft-s3"]
    with pytest.raises(ValueError, match="no artefact 'stf'"):
        find_nodes(nodes, "stf")


def test_without_seeds_nothing_changes(tmp_path):
    assert set(load(tmp_path, seeds=[]).stages) == set(fork()["stages"])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seeds": [1, 1]}, r"study\.yaml: 1 problem\n.*seeds: each once, found \[1, 1\]"),
        ({"stages": fork()["stages"] | {"sft-s0": {"kind": "model", "path": "x"}}}, "stages.sft-s0: seeds makes a stage of"),
        (
            {"stages": fork()["stages"] | {"more": {"kind": "sft", "from": "base", "data": "train.sft", "steps": 1,
                                                    "batch": 1, "seed": 4, **TRAIN}}},
            "stages.more.seed: the study has seeds",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_spread_is_named(tmp_path, changed, message):
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, **changed)


def test_the_interval_over_seeds_is_students_t():
    values = {0: 0.5, 1: 0.7, 2: 0.65, 3: None, 4: 0.4}
    found = over_seeds(values)
    known = np.array([value for value in values.values() if value is not None])
    expected = stats.ttest_1samp(known, 0).confidence_interval(0.95)
    assert (found["n"], found["value"]) == (4, pytest.approx(known.mean()))
    assert (found["low"], found["high"]) == pytest.approx(tuple(expected))
    assert found["seeds"] == {"0": 0.5, "1": 0.7, "2": 0.65, "3": None, "4": 0.4}
    assert over_seeds({0: None})["value"] is None
    assert over_seeds({7: 0.5})["low"] is None


def test_differences_are_taken_seed_by_seed_and_films_are_never_pooled(tmp_path):
    config = load(tmp_path)
    macro = {"base": 0.2, "sft-s0": 0.5, "sft-s3": 0.6, "hard-s0": 0.7, "hard-s3": 0.7}

    def block(value):
        return {name: {"value": value} for name in ("macro", "micro", "jaccard")}

    entry = config.answers["test"]
    results = [
        {"stage": stage, "dataset": ref, "results": {"fail_rate": 0.0, "blocks": {"all 14": block(value)}}}
        for stage, value in macro.items()
        for ref in entry.sets
    ]
    sft, hard = [row for row in _over_seeds(config, entry, results) if row["dataset"] == "near"]
    assert (sft["stage"], hard["stage"]) == ("sft", "hard")
    assert sft["numbers"]["macro"]["value"] == pytest.approx(0.55)
    assert hard["numbers"]["macro"]["low"] == pytest.approx(0.7)
    steps = [("base", "sft-s0"), ("base", "sft-s3"), ("sft-s0", "hard-s0"), ("sft-s3", "hard-s3")]
    gaps = [
        {"dataset": "near", "subset": "all 14", "from": one, "to": two, **block(macro[two] - macro[one])}
        for one, two in steps
    ]
    first, second = _differences_over_seeds(config, entry, gaps)
    assert (first["from"], first["to"]) == ("base", "sft")
    assert (second["from"], second["to"]) == ("sft", "hard")
    assert second["numbers"]["macro"] == over_seeds(
        {0: macro["hard-s0"] - macro["sft-s0"], 3: macro["hard-s3"] - macro["sft-s3"]}
    )
