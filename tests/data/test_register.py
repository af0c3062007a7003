"""The real register of fertility treatment: what its config takes, that no twin crosses, and that the excluded columns leak."""

import sys
from pathlib import Path

import numpy as np
import pytest

from vlmalign.config import ConfigError, load_config
from vlmalign.studies.engine.config import StudyConfig

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts"))

from register_ceiling import CONFIG, scored, twin_share, with_after

#: records that the classifiers of the test see
FEW = 8000


@pytest.fixture(scope="module")
def register(shared_data):
    """The records with the excluded columns beside them, and their names."""
    path = shared_data / "hfea_art" / "FertilityTreatmentData.csv.gz"
    if not path.is_file():
        pytest.skip("the register, hfea_art/FertilityTreatmentData.csv.gz, is not in the folder of public data")
    study = load_config(StudyConfig, CONFIG, [f"sources.register.path={path}"])
    return with_after(study.sources["register"], study.place)


@pytest.fixture(scope="module")
def held_out(register):
    """The same split of the same few records for every classifier: bool [records], None outside."""
    rng = np.random.default_rng(0)
    few = np.zeros(len(register[0]), bool)
    few[rng.choice(len(few), FEW, replace=False)] = True
    return few, rng.random(FEW) < 0.25


def few_of(records, few):
    """The records at these places."""
    import copy

    found = copy.copy(records)
    found._ids, found._patients = records._ids[few], records._patients[few]
    found._values = {name: column[few] for name, column in records._values.items()}
    return found


def test_which_cycles_are_taken(register):
    records, after = register
    counts = dict(zip(records.schema.labels, records.label_matrix().sum(axis=0).tolist(), strict=True))
    assert counts == {
        "strategy: PGT-M": 1414, "strategy: PGT-A": 1991, "strategy: ICSI": 59_800, "strategy: IVF": 58_480, "strategy: DI": 11_282,
    }  # fmt: skip
    assert len(records) == sum(counts.values())
    reasons = "; ".join(records.notes)
    assert "36649 of 169616 records are left out: strategy: unknown code 'Unknown'" in reasons
    assert "are not declared" not in reasons  # each of the 61 columns is a field or in the list
    assert len(after) == 43
    assert twin_share(records) == pytest.approx(0.88, abs=0.005)


def test_the_excluded_columns_leak(register, held_out):
    """What the list is for: with these columns the same trees tell far more of the strategy."""
    (records, after), (few, test) = register, held_out
    part = few_of(records, few)
    honest, _, most_frequent = scored(part, part.told, test, seed=0)
    leaked, _, _ = scored(part, [*part.told, *after], test, seed=0)
    assert most_frequent + 0.1 < honest < 0.75
    assert leaked > honest + 0.1


def test_blanks_leak_as_well(register):
    """Ten columns are blank exactly in donor insemination."""
    records, after = register
    di = records.column("strategy") == "DI"
    exactly = [name for name in after if np.array_equal([value is None for value in records.column(name)], di)]
    assert len(exactly) == 10
    for name in records.told:
        blank = np.array([value is None for value in records.column(name)])
        assert not blank[di].all() or not blank.any(), name


def test_an_excluded_column_as_input_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="the column 'Sperm source' stands in `after`, and an input must be known"):
        load_config(StudyConfig, CONFIG, ["sources.register.fields.sperm={kind: code, column: Sperm source}"])
