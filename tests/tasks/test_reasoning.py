"""Does the reasoning of an answer agree with its labels? By a truth table, and as sums over answers."""

import pytest

from vlmalign.data.sources.schema import CHEXPERT
from vlmalign.tasks.reasoning import agreement, together

#: think block, labels of the solution -> of the solution's labels the named ones, of the claimed labels the kept ones
TABLE = [
    ("The heart is enlarged.", ["Cardiomegaly"], (1, 1), (1, 1)),
    ("The heart is enlarged.", ["Edema"], (0, 1), (0, 1)),
    ("The heart is enlarged, and there is a pleural effusion.", ["Cardiomegaly"], (1, 1), (1, 2)),
    ("The heart is enlarged.", ["Cardiomegaly", "Edema", "Fracture"], (1, 3), (1, 1)),
    # What is denied is not named.
    ("There is no edema.", ["Edema"], (0, 1), (0, 0)),
    ("No evidence of pneumothorax or edema.", ["Edema", "Pneumothorax"], (0, 2), (0, 0)),
    ("There is no evidence of edema, but a fracture of a rib.", ["Edema", "Fracture"], (1, 2), (1, 1)),
    ("Edema is unlikely.", [], (0, 0), (0, 0)),
    # Synonyms: those of the rule, and the task's own.
    ("Pulmonary oedema and a pacemaker.", ["Edema", "Support Devices"], (2, 2), (2, 2)),
    ("Wet lungs.", ["Edema"], (1, 1), (1, 1)),
    ("No wet lungs.", ["Edema"], (0, 1), (0, 0)),
    ("A clear film.", ["No Finding"], (1, 1), (1, 1)),
    # Wide words name a label of the solution, and claim none.
    ("An opacity covers the left base.", ["Lung Opacity"], (1, 1), (0, 0)),
    ("An opacity covers the left base.", ["Pneumonia"], (0, 1), (0, 0)),
    # Nothing reasoned, nothing answered.
    ("", ["Edema"], (0, 1), (0, 0)),
    ("", [], (0, 0), (0, 0)),
    ("There is edema.", [], (0, 0), (0, 1)),
    # No Finding.
    ("No finding.", ["No Finding"], (1, 1), (1, 1)),
    ("No finding.", ["Edema"], (0, 1), (0, 1)),
    ("This is a normal film.", [], (0, 0), (0, 1)),
    ("No finding of the bones is of note. There is edema.", ["Edema"], (1, 1), (1, 1)),
]  # fmt: skip
SYNONYMS = {"Edema": ("wet lungs",), "No Finding": ("clear film",)}


@pytest.mark.parametrize(("think", "solution", "named", "kept"), TABLE)
def test_reasoning_and_solution(think, solution, named, kept):
    found = agreement(think, solution, CHEXPERT.labels, SYNONYMS)
    assert ((found.named, found.solution), (found.kept, found.claimed)) == (named, kept)
    for share, (part, whole) in ((found.named_share, named), (found.kept_share, kept)):
        assert share == (part / whole if whole else None)


def test_only_labels_of_the_vocabulary_count():
    """As on a set of fewer labels, in whose names truth and predictions are told."""
    found = agreement("The heart is enlarged and there is a pacemaker.", ["Cardiomegaly", "Edema"], ["Cardiomegaly"])
    assert found == (1, 1, 1, 1)


def test_counts_of_answers_add_up():
    rows = [agreement(think, solution, CHEXPERT.labels) for think, solution, *_ in TABLE]
    assert together(rows) == tuple(sum(row[i] for row in rows) for i in range(4))
    assert together([]) == (0, 0, 0, 0)
    assert together([]).named_share is None
