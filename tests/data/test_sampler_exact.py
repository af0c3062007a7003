"""Where the search finds no sets, integer programming does, or proves that there are none; floors and caps of labels."""

import itertools

import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp

from vlmalign.data.sampling import exact, refusals, sampler, search
from vlmalign.data.sampling.bounds import bounds_of
from vlmalign.data.sampling.exact import Programme
from vlmalign.data.sampling.refusals import ShortfallError
from vlmalign.data.sampling.sampler import balanced_sample

#: a pool in which the greedy picks may give all patients to one set; films 0, 1, 4 and 2, 3, 6 have each label once
LABELS = np.array([[1, 0], [0, 1], [1, 0], [1, 1], [1, 0], [0, 1], [1, 1], [0, 1]], bool)
PATIENTS = np.array([2, 2, 1, 0, 2, 2, 3, 2])


@pytest.fixture
def hasty(monkeypatch):
    """A search that gives up early, so that integer programming has more to do and the tests take less time."""
    monkeypatch.setattr(search, "_KICKED", 100)
    monkeypatch.setattr(search, "_PATIENCE", 1)


def tightest_floor(labels, patients, sizes, per_patient):
    """The greatest share that every label can have in every set, by a program of single films and patients; None: no sets."""
    owners, owner = np.unique(patients, return_inverse=True)
    films, sets, number = len(labels), len(sizes), len(owners)
    holds = np.eye(number)[owner].T  # [patients, films]
    each = np.eye(sets)
    zero = np.zeros((number * sets, 1))
    # x by film and set, y by patient and set, t
    rows = [
        (np.hstack([np.kron(np.ones((1, films)), each), np.zeros((sets, number * sets + 1))]), sizes, sizes),
        (np.hstack([np.kron(holds, each), -per_patient * np.eye(number * sets), zero]), -np.inf, 0),
        (
            np.hstack([np.zeros((number, films * sets)), np.kron(np.eye(number), np.ones((1, sets))), zero[:number]]),
            0,
            1,
        ),
        (
            np.hstack(
                [
                    np.kron(labels.T, each),
                    np.zeros((labels.shape[1] * sets, number * sets)),
                    -np.tile(sizes, labels.shape[1])[:, None],
                ]
            ),
            0,
            np.inf,
        ),
    ]
    unknowns = films * sets + number * sets + 1
    solved = milp(
        -np.eye(unknowns)[-1],
        constraints=[LinearConstraint(*row) for row in rows],
        integrality=np.append(np.ones(unknowns - 1), 0),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0},
    )
    if solved.status == 2:
        return None
    assert solved.success
    counts = labels.T @ np.rint(solved.x[: films * sets]).reshape(films, sets)
    return (counts / sizes).min()


def tiny_pool(seed):
    rng = np.random.default_rng(seed)
    films, width = int(rng.integers(8, 17)), int(rng.integers(2, 5))
    labels = rng.random((films, width)) < rng.uniform(0.2, 0.6, width)
    labels[np.flatnonzero(~labels.any(1)), rng.integers(width)] = True
    patients = rng.integers(0, rng.integers(3, films // 2 + 2), films)
    sizes = rng.integers(2, 5, int(rng.integers(1, 4)))
    limit = [None, 1, 2][seed % 3]
    return labels, patients, sizes, limit


def check_sets(drawn, labels, patients, sizes, floor, limit):
    owners = []
    for films, size in zip(drawn.sets.values(), sizes, strict=True):
        held = patients[films.indices]
        assert len(set(films.indices.tolist())) == size
        assert (labels[films.indices].sum(0) >= floor * size - 1e-9).all()
        assert limit is None or np.unique(held, return_counts=True)[1].max() <= limit
        owners.append(set(held.tolist()))
    assert not any(one & other for one, other in itertools.combinations(owners, 2))


def test_patients_that_greedy_gave_away(hasty):
    drawn = [
        balanced_sample(LABELS, PATIENTS, ["a", "b"], sizes={"x": 3, "y": 3}, seed=seed, floor=1 / 3)
        for seed in range(8)
    ]
    for each in drawn:
        check_sets(each, LABELS, PATIENTS, [3, 3], 1 / 3, None)
    assert {each.exact for each in drawn} == {False, True}  # with some seeds the search alone finds sets


def sweep(seeds):
    """(pools, those that needed integer programming); each at the tightest floor, and refused a film above it."""
    pools = helped = 0
    for seed in seeds:
        labels, patients, sizes, limit = tiny_pool(seed)
        best = tightest_floor(labels, patients, sizes, limit or sizes.max())
        names, asked = [f"label {i}" for i in range(labels.shape[1])], dict(zip("abc", sizes.tolist(), strict=False))

        def draw(floor, labels=labels, patients=patients, names=names, asked=asked, seed=seed, limit=limit):
            return balanced_sample(
                labels, patients, names, sizes=asked, seed=seed, floor=floor, films_per_patient=limit
            )

        if best is None:
            with pytest.raises(ValueError, match="reduce sizes"):
                draw(0.0)
            continue
        pools += 1
        drawn = draw(float(best))
        helped += drawn.exact
        check_sets(drawn, labels, patients, sizes, best, limit)
        if best < 1:
            largest = refusals._down(best)
            with pytest.raises(ShortfallError, match=rf"The largest floor that can be had is {largest}\."):
                draw(float(best) + 1e-3)
    return pools, helped


def test_no_tiny_pool_is_refused_at_its_tightest_floor(hasty):
    pools, helped = sweep(range(24))
    assert pools >= 15
    assert helped >= 1


@pytest.mark.full
def test_no_tiny_pool_of_many_is_refused_at_its_tightest_floor(hasty):
    pools, helped = sweep(range(1000, 1240))
    print(f"{pools} pools, {helped} by integer programming")
    assert pools >= 161


def test_row_order_does_not_matter(hasty):
    order = np.random.default_rng(0).permutation(8)
    for seed in range(4):
        given = {"label_names": ["a", "b"], "sizes": {"x": 3, "y": 3}, "seed": seed, "floor": 1 / 3}
        here = balanced_sample(LABELS, PATIENTS, **given)
        there = balanced_sample(LABELS[order], PATIENTS[order], **given)
        for name in ("x", "y"):
            mine, theirs = here.sets[name].indices, order[there.sets[name].indices]
            assert sorted(zip(PATIENTS[mine], LABELS[mine].tolist(), strict=True)) == sorted(
                zip(PATIENTS[theirs], LABELS[theirs].tolist(), strict=True)
            )


# --- refusals


def test_a_proof_names_label_set_and_the_largest_floor(hasty):
    with pytest.raises(ShortfallError) as caught:
        balanced_sample(LABELS, PATIENTS, ["a", "b"], sizes={"x": 3, "y": 3}, seed=0, floor=0.5)
    (short,) = caught.value.shortfalls
    assert (short.label, short.where, short.needed, short.available) == ("b", "set y", 2, 1)
    assert "There are no sets that do" in str(caught.value)
    assert "The largest floor that can be had is 0.3333." in str(caught.value)
    assert "films_per_patient" not in str(caught.value)  # no limit was set, so there is none to raise


def test_floors_of_several_labels_are_reached_in_part(hasty):
    with pytest.raises(ShortfallError, match=r"All floors can be had at 0\.5 times what they are"):
        balanced_sample(LABELS, PATIENTS, ["a", "b"], sizes={"x": 3, "y": 3}, seed=0, floor=2, floors={"b": 2})


def test_no_sets_of_these_sizes():
    labels = np.ones((6, 1), bool)
    with pytest.raises(ValueError, match=r"no sets of sizes .*, whatever their labels; reduce sizes$"):
        balanced_sample(labels, [0, 0, 0, 1, 1, 1], ["a"], sizes={"x": 4, "y": 2}, seed=0)
    with pytest.raises(ValueError, match=r"at most 2 films of a patient.*; reduce sizes, or raise films_per_patient$"):
        balanced_sample(labels, [0, 0, 0, 1, 1, 1], ["a"], sizes={"x": 3, "y": 1}, seed=0, films_per_patient=2)


def test_what_is_not_settled_is_not_called_impossible(hasty, monkeypatch):
    given = {"label_names": ["a", "b"], "sizes": {"x": 3, "y": 3}, "seed": 0, "floor": 1 / 3}
    monkeypatch.setattr(exact, "SECONDS", 0.0)
    with pytest.raises(ValueError, match="there may be some"):
        balanced_sample(LABELS, PATIENTS, **given)
    monkeypatch.setattr(sampler, "MOST_UNKNOWNS", 3)
    with pytest.raises(ValueError, match="too large to settle it by integer programming"):
        balanced_sample(LABELS, PATIENTS, **given)


# --- floors and caps


@pytest.mark.parametrize("seed", range(6))
def test_floors_and_caps_of_labels_are_kept(seed):
    rng = np.random.default_rng(seed)
    labels = rng.random((300, 5)) < [0.6, 0.4, 0.2, 0.1, 0.05]
    patients = rng.integers(0, 150, 300)
    names = list("abcde")
    drawn = balanced_sample(
        labels,
        patients,
        names,
        sizes={"x": 40, "y": 20},
        seed=seed,
        floor=0.05,
        floors={"d": 4},
        cap=0.5,
        caps={"a": 9},
    )
    for name, size in (("x", 40), ("y", 20)):
        counts = drawn.sets[name].counts
        assert (counts >= [0.05 * size, 0.05 * size, 0.05 * size, 4, 0.05 * size]).all()
        assert (counts <= [9, *[0.5 * size] * 4]).all()
        assert (drawn.sets[name].goal.target <= drawn.sets[name].goal.cap).all()


def test_caps_agree_with_all_sets_that_there_are(hasty):
    """Every cap of one label on the tiny pool: sets are drawn where enumeration finds some, and refused where not."""
    sizes = {"x": 3, "y": 3}
    pairs = [
        (one, other)
        for one in itertools.combinations(range(8), 3)
        for other in itertools.combinations(range(8), 3)
        if not set(PATIENTS[list(one)]) & set(PATIENTS[list(other)])
    ]
    for cap in range(4):
        there = any(max(LABELS[list(films), 0].sum() for films in pair) <= cap for pair in pairs)
        given = {"label_names": ["a", "b"], "sizes": sizes, "seed": 0, "floor": 0.0, "caps": {"a": cap}}
        if there:
            drawn = balanced_sample(LABELS, PATIENTS, **given)
            assert max(films.counts[0] for films in drawn.sets.values()) <= cap
        else:
            with pytest.raises(ShortfallError, match=r"a may have .*raise cap") as caught:
                balanced_sample(LABELS, PATIENTS, **given)
            assert {excess.label for excess in caught.value.excesses} == {"a"}


def test_the_programme_deals_films_out_to_patients():
    """Two patients of one kind, three patterns: a set of six at three a patient, whatever the patterns' counts."""
    labels = np.eye(3, dtype=bool)[[0, 0, 1, 1, 2, 2] * 2]
    patients = np.repeat([0, 1], 6)
    programme = Programme(labels, patients, sizes=[6], per_patient=3)
    for counts in itertools.product(range(5), repeat=3):
        if sum(counts) == 6:
            bound = np.array(counts)[:, None]
            (films,) = programme.draw(bound, bound, np.random.default_rng(0)).films
            assert labels[films].sum(0).tolist() == list(counts)
            assert np.bincount(patients[films]).tolist() == [3, 3]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"floor": -1}, "floor of a must be a share"),
        ({"floors": {"b": 1.5}}, "floor of b must be a share"),
        ({"cap": -0.5}, "cap of a must be a share"),
        ({"floors": {"bb": 1}}, "floors: no label is called 'bb'; the nearest label is 'b'"),
        ({"caps": {"z": 1}}, "caps: no label is called 'z'"),
        ({"floor": 11}, r"floor of a is 11 films of set s, more than its cap or the set's size, 10"),
        ({"floors": {"b": 0.5}, "cap": 4}, r"floor of b is 5 films of set s, more than its cap or the set's size, 4"),
    ],
)
def test_bounds_that_cannot_be(change, match):
    given = {"floor": 0.05, "floors": {}, "cap": None, "caps": {}} | change
    with pytest.raises(ValueError, match=match):
        bounds_of(["a", "b"], {"s": 10}, **given)
