"""Layers of difficulty: the rules by truth table, and a classifier that never sees a patient whom it judges."""

import doctest

import numpy as np
import pytest

from vlmalign.data.records import clinic, pyramid
from vlmalign.data.records.features import features, out_of_fold, probabilities
from vlmalign.data.records.pyramid import Layers, Pyramid, above, complexity, confused, draw_layers, layers, rare
from vlmalign.data.sources.ehr import EhrSource


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clinic")
    source = EhrSource(kind="ehr", path="clinic/cycles.csv", phantom={"records": 600, "seed": 2})
    source.invent(lambda path: folder / path)
    return source.open(lambda path: folder / path)


def test_examples_in_the_documentation_hold():
    assert doctest.testmod(pyramid).failed == 0


def test_the_rules():
    probability = np.array([[0.6, 0.3, 0.1], [0.4, 0.45, 0.15], [0.4, 0.4, 0.2], [0.0, 0.0, 1.0]])
    classes = np.array([0, 0, 1, 1])
    assert confused(probability, classes).tolist() == [False, True, True, True]
    assert confused(probability, classes, margin=0.3).tolist() == [True, True, True, True]
    assert confused(probability, classes, margin=-0.1).tolist() == [False, False, False, True]
    assert rare(np.repeat([0, 1, 2], [90, 6, 4]), share=0.05).sum() == 4
    assert above(np.array([1.0, 1, 1, 1, 5]), share=0.2).tolist() == [False] * 4 + [True]
    assert not above(np.ones(10), share=0.2).any()


def test_a_record_is_drawn_for_one_layer():
    found = Layers(np.array([0, 1, 0, 1], bool), np.array([0, 0, 1, 1], bool))
    assert found.general.tolist() == [True, False, False, False]
    assert np.stack([*found.drawn_as().values()]).sum(axis=0).tolist() == [1, 1, 1, 1]
    assert {name: each.tolist() for name, each in draw_layers(found, {"confusion": 1, "enhancement": 2}, seed=0).items()} == {
        "confusion": [1], "enhancement": [2, 3],
    }  # fmt: skip
    with pytest.raises(ValueError, match="layer confusion: 2 records were asked for, it has 1"):
        draw_layers(found, {"confusion": 2}, seed=0)


def test_complexity_counts_fields_decisions_and_cycles(records):
    score = complexity(records, ["earlier_ivf"])
    example = records[7].meta
    told = sum(example[name] is not None for name in records.told)
    decided = len(example["diagnoses"]) + sum(example[name] is not None for name in ("strategy", "protocol", "dose"))
    assert score[7] == told + decided + example["earlier_ivf"]
    assert (complexity(records, []) == score - records.column("earlier_ivf").astype(float)).all()


def test_nobody_is_judged_by_what_was_learnt_from_them():
    """Classes are the patient's own and have nothing to do with the fields but the patient's number: out of fold it is of no
    use, in fold it would tell all."""
    rng = np.random.default_rng(0)
    patients = np.repeat(np.arange(60), 4)
    classes = rng.integers(0, 2, 60)[patients]
    matrix = patients[:, None].astype(float)
    kind = np.array([False])
    inside = probabilities(matrix, classes, matrix, categorical=kind, of=2, seed=0)
    outside = out_of_fold(matrix, classes, patients.astype(str), categorical=kind, of=2, folds=5, seed=0)
    assert (~confused(inside, classes)).mean() > 0.8
    assert (~confused(outside, classes)).mean() < 0.7
    with pytest.raises(ValueError, match="70 folds need as many patients, found 60"):
        out_of_fold(matrix, classes, patients, categorical=kind, of=2, folds=70, seed=0)


def test_a_class_that_a_fold_lacks_gets_nothing():
    matrix = np.arange(40.0)[:, None]
    found = probabilities(matrix, np.repeat([0, 2], 20), matrix, categorical=np.array([False]), of=4, seed=0)
    assert (found[:, [1, 3]] == 0).all()
    assert found.sum(axis=1) == pytest.approx(1)
    alone = probabilities(matrix, np.full(40, 1), matrix[:3], categorical=np.array([False]), of=3, seed=0)
    assert alone.tolist() == [[0, 1, 0]] * 3


def test_features_are_the_fields_that_are_told(records):
    found = features(records)
    assert found.matrix.shape == (600, len(found.names))
    assert set(found.names) <= set(records.told)
    assert not {"centre", "strategy", "dose", "year"} & set(found.names)
    assert found.names[found.categorical.tolist().index(True)] == "partner"
    amh = found.matrix[:, found.names.index("amh")]
    assert np.isnan(amh).tolist() == [value is None for value in records.column("amh")]


def test_layers_of_the_clinic(records):
    rules = Pyramid(decision="strategy", folds=2, rare=0.06, complex=0.05, counts=("earlier_ivf",))
    found, report = layers(records, np.arange(0, 600, 2), rules, seed=0)
    assert report["records"] == 300 == len(found.confusion)
    assert {name: int(getattr(found, name).sum()) for name in pyramid.LAYERS} == report["layers"]
    assert report["confusion and enhancement"] == int((found.confusion & found.enhancement).sum())
    strategy = records.column("strategy")[::2]
    assert found.enhancement[np.isin(strategy, ["PGT-M", "PGT-SR"])].all()
    assert 0.5 < report["trees"]["accuracy"] < 1
    assert report["confused by class"].keys() == set(clinic.STRATEGIES) & set(strategy)
    with pytest.raises(ValueError, match=r"pyramid\.counts: 'partner' is no field of kind number"):
        layers(records, np.arange(9), rules.model_copy(update={"counts": ("partner",)}), seed=0)
