"""What gradient-boosted trees make of the register's strategy: the ceiling of a model that reads the same columns, and the
leak of the columns that are excluded.

python scripts/register_ceiling.py FertilityTreatmentData.csv.gz
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from sklearn.metrics import accuracy_score, f1_score

from vlmalign.config import load_config
from vlmalign.data.records.features import features, probabilities
from vlmalign.data.records.fields import CodeField
from vlmalign.data.records.records import Records
from vlmalign.data.sources.ehr import EhrSource
from vlmalign.studies.engine.config import StudyConfig

CONFIG = Path(__file__).parent.parent / "configs" / "infertility" / "hfea_art.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    study = load_config(StudyConfig, CONFIG, [f"sources.register.path={given.path}"])
    source = study.sources["register"]
    records, after = with_after(source, study.place)
    console = Console(width=120)
    console.print(f"{len(records)} cycles, {len(set(records.twins()))} of them different in what is told")
    console.print(*records.notes, sep="\n", markup=False)
    share = twin_share(records)
    console.print(f"records with a twin: {share:.1%}")
    low, high = study.sets["test"].hash
    place = np.array([int(twin[:13], 16) / 16**13 for twin in records.twins()])
    year = records.column("year")
    rng = np.random.default_rng(given.seed)
    splits = {
        "at random, 4 : 1": rng.random(len(records)) < 0.2,
        "by hash, without twins (test)": (low <= place) & (place < high),
        "by year, 2017 -> 2018": year == "2018",
    }
    table = Table("split", "fields", "n train", "n test", "accuracy", "macro-F1", "most frequent class")
    for name, test in splits.items():
        table.add_row(name, "inputs", *_row(records, records.told, test, given.seed))
    test = splits["at random, 4 : 1"]
    table.add_row("at random, 4 : 1", "inputs and `after`", *_row(records, [*records.told, *after], test, given.seed))
    console.print(table)


def with_after(source: EhrSource, place) -> tuple[Records, list[str]]:
    """The source's records with the columns of its list `after` as further fields, but for those of the decision itself."""
    own = {each.column for each in source.fields["strategy"].first_of}
    more = {
        f"after{number}": CodeField(kind="code", column=column, role="after")
        for number, column in enumerate(source.after)
        if column not in own
    }
    opened = source.model_copy(update={"fields": {**source.fields, **more}}).open(place)
    return opened, list(more)


def twin_share(records: Records) -> float:
    """Share of records that tell the same as another."""
    _, of, counts = np.unique(records.twins().astype(str), return_inverse=True, return_counts=True)
    return float(np.mean(counts[of] > 1))


def scored(records: Records, names: list[str], test: np.ndarray, seed: int) -> tuple[float, float, float]:
    """Accuracy and macro-F1 of the trees on `test`, trained on all others; and the accuracy of the most frequent class."""
    words, classes = np.unique(records.column("strategy").astype(str), return_inverse=True)
    told = features(records, names)
    probability = probabilities(
        told.matrix[~test], classes[~test], told.matrix[test], categorical=told.categorical, of=len(words), seed=seed
    )
    truth, predicted = classes[test], probability.argmax(axis=1)
    most = np.bincount(classes[~test]).argmax()
    macro = f1_score(truth, predicted, average="macro", zero_division=0)
    return accuracy_score(truth, predicted), macro, float(np.mean(truth == most))


def _row(records: Records, names: list[str], test: np.ndarray, seed: int) -> tuple[str, ...]:
    return (
        str(int((~test).sum())),
        str(int(test.sum())),
        *(f"{value:.3f}" for value in scored(records, names, test, seed)),
    )


if __name__ == "__main__":
    main()
