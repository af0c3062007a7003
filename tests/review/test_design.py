"""The design: balance of readers, arms and sides; repetitions, attention cases and guesses; and that names decide nothing."""

import re
from collections import Counter
from itertools import permutations

import pytest
from reader_studies import write_rows, write_study

from vlmalign.review.assignment import assign
from vlmalign.review.blocks import arm_blocks, reader_blocks, shared_cases
from vlmalign.review.reading import load_study


@pytest.mark.parametrize(
    ("readers", "cases", "per_case", "shared"),
    [(7, 7, 3, 1), (6, 10, 3, 2), (5, 10, 2, 1), (4, 4, 3, 2), (6, 15, 2, 1), (5, 8, 5, 8)],
)
def test_known_balanced_incomplete_block_designs_are_found(readers, cases, per_case, shared):
    """lambda = cases r (r - 1) / (R (R - 1)): the same for every pair of readers."""
    blocks = reader_blocks(cases, readers, per_case, seed=1)
    assert all(len(set(block)) == per_case for block in blocks)
    assert set(shared_cases(blocks, readers).values()) == {shared}


@pytest.mark.parametrize(("readers", "cases", "per_case"), [(15, 40, 3), (20, 101, 2), (3, 5, 1)])
def test_loads_differ_by_one_and_overlaps_by_little(readers, cases, per_case):
    blocks = reader_blocks(cases, readers, per_case, seed=2)
    loads = Counter(reader for block in blocks for reader in block)
    assert max(loads.values()) - min(loads.values()) <= 1
    assert len(loads) == min(readers, cases * per_case)
    shared = shared_cases(blocks, readers).values()
    assert max(shared) - min(shared) <= 2


def test_every_combination_of_arms_is_shown_equally_often():
    cases = [f"c{i}" for i in range(46)]
    readers = reader_blocks(len(cases), 6, 2, seed=0)
    combos = arm_blocks(cases, readers, arms=4, shown=2, seed=0)
    overall = Counter(combos)
    assert len(overall) == 6
    assert max(overall.values()) - min(overall.values()) <= 1
    own = Counter((reader, combo) for block, combo in zip(readers, combos, strict=True) for reader in block)
    assert max(own.values()) - min(own[reader, combo] for reader in range(6) for combo in overall) <= 3


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("design")
    known = [
        {"id": f"known-{i}", "record": f"Plain {i}", "answers": ["right", "wrong"], "expected": 0} for i in range(5)
    ]
    write_rows(folder / "attention.jsonl", known)
    design = {
        "readers_per_case": 3,
        "repeats": 4,
        "guesses": 2,
        "attention": {"path": str(folder / "attention.jsonl"), "each": 3},
    }
    readers = [f"R{i:02}" for i in range(1, 5)]
    return load_study(write_study(folder, cases=48, arms=3, readers=readers, design=design))


def test_a_reader_sees_each_arm_on_each_side_equally_often(study):
    for pages in assign(study).values():
        sides = Counter(place.shown for place in pages if place.purpose == "case")
        for pair in permutations(range(3), 2):
            assert abs(sides[pair] - sides[pair[::-1]]) <= 1
            assert sides[pair] > 0


def test_order_and_side_differ_between_readers(study):
    first, second, *_ = assign(study).values()
    both = {place.case for place in first if place.purpose == "case"} & {p.case for p in second if p.purpose == "case"}
    orders = [
        [place.case for place in pages if place.purpose == "case" and place.case in both] for pages in (first, second)
    ]
    assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0] != orders[1]
    sides = [{place.case: place.shown for place in pages if place.purpose == "case"} for pages in (first, second)]
    assert 0 < sum(sides[0][case] != sides[1][case] for case in both) < len(both)
    assert all(sorted(sides[0][case]) == sorted(sides[1][case]) for case in both)  # the same arms: readers can agree


def test_repeated_cases_come_late_with_sides_exchanged(study):
    for pages in assign(study).values():
        first = {place.case: place for place in pages if place.purpose == "case"}
        again = [place for place in pages if place.purpose == "repeat"]
        assert len(again) == len({place.case for place in again}) == 4
        for place in again:
            assert place.shown == first[place.case].shown[::-1]
            assert place.position - first[place.case].position >= len(first) // 2


def test_attention_cases_are_spread_and_guesses_come_last(study):
    for pages in assign(study).values():
        purposes = [place.purpose for place in pages]
        assert purposes[-2:] == ["guess", "guess"]
        assert purposes.count("guess") == 2
        where = [i for i, purpose in enumerate(purposes) if purpose == "attention"]
        assert len(where) == 3
        assert where[0] < len(pages) / 2 < where[2]
        assert [place.position for place in pages] == list(range(1, len(pages) + 1))
        # The cases to guess cover the arms: two pairs of three arms.
        assert {slot for place in pages[-2:] for slot in place.shown} == {0, 1, 2}


def test_names_of_arms_decide_nothing_and_the_seed_does(tmp_path):
    path = write_study(tmp_path, cases=12, arms=3)
    plain = load_study(path)
    text = path.read_text()
    first, second = re.findall(r"^  ([\w-]+):$\n    kind: file|^  ([\w-]+): \{kind: file", text, re.MULTILINE)[:2]
    first, second = max(first), max(second)
    path.write_text(text.replace(first, "xx").replace(second, first).replace("xx", second))
    other = load_study(path)
    assert [slot.name for slot in plain.material.slots] != [slot.name for slot in other.material.slots]
    assert assign(plain) == assign(other)
    assert plain.hash != other.hash  # the record still knows that they are different studies
    path.write_text(text.replace("seed: 3", "seed: 4"))
    assert assign(load_study(path)) != assign(plain)


def test_the_order_of_rows_decides_nothing(tmp_path):
    study = load_study(path := write_study(tmp_path, cases=9))
    for file in tmp_path.glob("*.jsonl"):
        file.write_text("".join(reversed(file.read_text().splitlines(keepends=True))))
    assert load_study(path).hash == study.hash
    assert assign(load_study(path)) == assign(study)


def test_a_reader_with_too_few_cases_is_an_error(tmp_path):
    study = load_study(write_study(tmp_path, cases=4, design={"readers_per_case": 1, "repeats": 2}))
    with pytest.raises(ValueError, match=r"R01 has 2 cases, too few for design.repeats 2"):
        assign(study)


def test_a_replacement_reads_the_cases_of_the_one_who_left(tmp_path):
    study = load_study(
        write_study(
            tmp_path, cases=8, readers=["R01", "R02"], replacements={"R09": "R02"}, design={"readers_per_case": 1}
        )
    )
    pages = assign(study)
    assert {p.case for p in pages["R09"]} == {p.case for p in pages["R02"]}
    assert [p.case for p in pages["R09"]] != [p.case for p in pages["R02"]]
