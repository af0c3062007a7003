"""Sets of records: by centre, by the hash of what is told, apart from twins, balanced, by layer; and the domain by YAML alone."""

from __future__ import annotations

import io
import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from vlmalign.config import ConfigError, load_config
from vlmalign.config_yaml import read_yaml, write_yaml
from vlmalign.data.records import clinic
from vlmalign.progress import Progress
from vlmalign.studies.engine.config import StudyConfig
from vlmalign.studies.engine.files import Hashes
from vlmalign.studies.engine.graph import build_graph
from vlmalign.studies.engine.opened import Opened
from vlmalign.studies.engine.overlaps import _marks
from vlmalign.studies.engine.sets import draw, open_cases, patients_of

STUDY = read_yaml("""
run: run
sources:
  clinic: {kind: ehr, path: "{run}/sources/clinic/cycles.csv", phantom: {records: 700, seed: 10}, labels: [strategy]}
sets:
  held-out: {from: clinic, draw: patients, size: 80, role: test}
  train: {from: clinic, apart: [held-out]}
  north: {from: clinic, where: {centre: [north]}, role: test}
  others: {from: clinic, where: {centre: [south, west]}, apart: [north]}
  low: {from: clinic, hash: [0.0, 0.25], role: test}
  high: {from: clinic, hash: [0.25, 1.0]}
  small: {from: clinic, draw: balanced, parts: {sft: 30, rl: 15}, floor: 0.03, apart: [held-out]}
  layered:
    from: clinic
    draw: pyramid
    parts: {general: 40, confusion: 30, enhancement: 20}
    pyramid: {decision: strategy, folds: 2, rare: 0.06, complex: 0.05, counts: [earlier_ivf]}
    apart: [held-out]
tasks:
  plan:
    kind: fields
    prompt: "{summary}\\nStrategy, protocol and dose as JSON."
    fields:
      strategy: {kind: single, options: [IVF, ICSI, PGT-A, PGT-M, PGT-SR, DI]}
      protocol: {kind: single, options: [antagonist, long agonist, short agonist, mild, natural cycle], required: false}
      dose: {kind: number, unit: IU, units: {IU/day: 1}, relative_tolerance: 0.2, required: false}
stages:
  base: {kind: model, path: configs/models/tiny-llama}
  sft: {kind: sft, from: base, data: layered, epochs: 1, batch: 8, shapes: {rows: 8}, optimiser: {learning_rate: 1.0e-3}}
answers:
  test: {stages: [sft], sets: [held-out], completion: 32}
""")


def study(tmp_path, change=lambda study: None) -> StudyConfig:
    data = json.loads(json.dumps(STUDY)) | {"run": str(tmp_path / "run")}
    change(data)
    (tmp_path / "study.yaml").write_text(write_yaml(data))
    return load_config(StudyConfig, tmp_path / "study.yaml")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Every set of the study, drawn in order, and what was said."""
    config = study(tmp_path_factory.mktemp("records"))
    source = config.sources["clinic"]
    source.invent(config.place)
    records, said = source.open(config.place), io.StringIO()
    for node in build_graph(config).values():
        if node.kind == "set":
            folder = node.folder(config.run)
            folder.mkdir(parents=True)
            left_out = {one for ref in config.sets[node.key].apart for one in patients_of(config, ref)}
            draw(config, node.key, records, left_out, folder, Progress(stream=said))
    return SimpleNamespace(config=config, source=records, said=said.getvalue())


def cases(drawn, ref):
    return open_cases(drawn.config, ref, drawn.source)


def told(drawn, ref, key):
    return {row[key] for row in cases(drawn, ref).rows}


def test_an_invented_source_is_a_node_and_its_sets_wait_for_it(tmp_path):
    nodes = build_graph(study(tmp_path))
    assert nodes["sets/low"].parents["from"].node == "sources/clinic"


@pytest.mark.full
@pytest.mark.parametrize(("one", "other"), [("held-out", "train"), ("north", "others"), ("held-out", "small.sft")])
def test_sets_apart_share_no_patient_and_no_twin(drawn, one, other):
    assert told(drawn, one, "patient").isdisjoint(told(drawn, other, "patient"))
    assert told(drawn, one, "twin").isdisjoint(told(drawn, other, "twin"))


@pytest.mark.full
def test_leave_one_centre_out(drawn):
    assert set(cases(drawn, "north").column("centre")) == {"north"}
    assert set(cases(drawn, "others").column("centre")) == {"south", "west"}
    assert len(cases(drawn, "north")) + len(cases(drawn, "others")) == len(drawn.source)


@pytest.mark.full
def test_the_hash_divides_all_and_keeps_twins_together(drawn):
    low, high = cases(drawn, "low"), cases(drawn, "high")
    assert sorted([*low.places, *high.places]) == list(range(len(drawn.source)))
    assert told(drawn, "low", "twin").isdisjoint(told(drawn, "high", "twin"))
    assert len(low) / len(drawn.source) == pytest.approx(0.25, abs=0.07)


def test_twins_left_out_are_those_of_the_other_set(tmp_path):
    """Three couples that tell the same, one that does not: with one of them held out the others cannot be trained on."""
    config = study(tmp_path)
    table = pd.DataFrame(clinic.draw(2, seed=1)[:1] * 3 + clinic.draw(30, seed=5)[-1:])
    table["cycle"], table["couple"] = list("abcd"), list("abcd")
    table["diagnoses"] = "male factor"
    path = config.place("{run}/sources/clinic/cycles.csv")
    path.parent.mkdir(parents=True)
    table.to_csv(path, index=False)
    records = config.sources["clinic"].open(config.place)
    (tmp_path / "out").mkdir()
    said = io.StringIO()
    draw(config, "train", records, {"b", records.twins()[1]}, tmp_path / "out", Progress(stream=said))
    rows = [json.loads(line) for line in (tmp_path / "out" / "cases.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == ["d"]
    assert "set train: cases has no record with" in said.getvalue()


@pytest.mark.full
def test_twins_in_two_sets_are_an_overlap(drawn):
    config = drawn.config
    study = Opened(config, Hashes(config.run / "hashes.json"), config, sources={"clinic": drawn.source})
    marks = _marks(study, "low")
    assert marks.origin == _marks(study, "high").origin
    assert {row["question"] for row in marks.rows} == told(drawn, "low", "twin")


@pytest.mark.full
def test_balanced_sets_of_records_have_enough_of_every_strategy(drawn):
    coverage = json.loads((drawn.config.run / "sets" / "small" / "coverage.json").read_text())
    for part, size in (("sft", 30), ("rl", 15)):
        assert min(coverage["sets"][part]["counts"].values()) >= int(np.ceil(0.03 * size))
    pool = coverage["sets"]["pool"]["counts"]
    assert pool["strategy: PGT-SR"] < 0.03 * len(drawn.source)
    assert told(drawn, "small.sft", "patient").isdisjoint(told(drawn, "small.rl", "patient"))


@pytest.mark.full
def test_layers_are_one_set_and_known_by_name(drawn):
    sizes = {layer: len(cases(drawn, f"layered.{layer}")) for layer in ("general", "confusion", "enhancement")}
    assert sizes == {"general": 40, "confusion": 30, "enhancement": 20}
    whole = cases(drawn, "layered")
    assert len(whole) == len(set(whole.places.tolist())) == 90
    report = json.loads((drawn.config.run / "sets" / "layered" / "coverage.json").read_text())["pyramid"]
    layers, both = report["layers"], report["confusion and enhancement"]
    assert sum(layers.values()) - both == report["records"] == len(cases(drawn, "train"))
    assert both > 0
    assert report["confused by class"]["IVF"] > report["confused by class"]["DI"]
    rare = [s for s in cases(drawn, "layered.general").column("strategy") if s in ("PGT-M", "PGT-SR")]
    assert rare == []
    hard = np.mean([s in ("IVF", "ICSI") for s in cases(drawn, "layered.confusion").column("strategy")])
    assert hard > 0.5  # where the centres' habits differ


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda s: s["tasks"]["plan"].update(prompt="{summary} {strategy}"),
            r"task plan names \{strategy\}, which is no input",
        ),
        (lambda s: s["tasks"]["plan"].update(prompt="At {centre}: {summary}"), r"task plan names \{centre\}"),
        (lambda s: s["sets"]["layered"].pop("pyramid"), "draw: pyramid and the section pyramid belong together"),
        (lambda s: s["sets"]["layered"]["parts"].update(hard=3), "a pyramid needs parts: cases of general, confusion"),
        (lambda s: s["stages"]["sft"].update(data="small"), "'small' is no part of set small"),
        (lambda s: s["sets"]["low"].update(hash=[0.5, 1.5]), "less than or equal to 1"),
    ],
)
def test_what_gives_away_or_does_not_fit_is_refused(tmp_path, change, said):
    with pytest.raises(ConfigError, match=said):
        study(tmp_path, change)


@pytest.mark.full
@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"where": {"centre": ["est"]}}, r"sets\.x\.where\.centre: no case has 'est'; found 'north', 'south', 'west'"),
        (
            {"draw": "pyramid", "parts": {"confusion": 3}, "pyramid": {"decision": "dose"}},
            r"sets\.x: pyramid\.decision: 'dose' is no decision of kind code; those are strategy, protocol",
        ),
        (
            {"draw": "pyramid", "parts": {"confusion": 3}, "pyramid": {"decision": "protocol"}},
            r"sets\.x: pyramid: \d+ of 700 records have no 'protocol'",
        ),
    ],
)  # fmt: skip
def test_sets_that_cannot_be_drawn_say_why(drawn, tmp_path, section, said):
    config = study(tmp_path, lambda s: s["sets"].update(x={"from": "clinic", **section}))
    with pytest.raises(ValueError, match=said):
        draw(config, "x", drawn.source, set(), tmp_path, Progress(stream=io.StringIO()))
