"""Ready rewards as a study's stage names them: sets by their parts, what the task gives, labels counted in its films."""

from __future__ import annotations

import pytest
from pydantic import ValidationError
from test_graph import fork, load

from vlmalign.config import ConfigError
from vlmalign.rewards.rewards import REWARDS, REWARDS_WITH_MEMORY, SET_PARTS
from vlmalign.studies.engine.reward_config import TableReward
from vlmalign.studies.engine.rewards import build_rewards, count_labels
from vlmalign.tasks.labels import LabelsTask

TASK = LabelsTask(prompt="Findings?", labels=("Clear", "Edema", "Fracture"), normal="Clear")
TRUTH = [["Edema"], ["Edema", "Fracture"], ["Clear"], [], None]
SHARES = {"Clear": 0.25, "Edema": 0.5, "Fracture": 0.25}


def stage(tmp_path, rewards: dict):
    data = fork()
    data["stages"]["hard"]["rewards"] = rewards
    return load(tmp_path, data).stages["hard"]


@pytest.mark.parametrize("kind", [*REWARDS, *REWARDS_WITH_MEMORY, *SET_PARTS])
def test_it_builds_the_rewards_that_it_names(kind):
    options = {
        "json": {"schema": {"type": "object"}},
        "pattern": {"pattern": "x"},
        "robust": {"conventions": {"merged": {"Fracture": "Edema"}}},
        "nv_reason_ct": {"normal": "Clear"},
    }
    section = TableReward(kind=kind, weight=2.0, options=options.get(kind, {}))
    built = section.build("mine", TASK)
    assert list(built) == section.names("mine")
    assert {weight for _, weight in built.values()} == {2.0}


def test_rewards_of_a_set_stand_by_name_where_rewards_are_named(tmp_path):
    found = stage(tmp_path, {"nv": {"kind": "nv_reason_cxr"}, "form": {"kind": "format", "weight": 0.0}})
    assert found.reward_names == ["nv_labels", "nv_length", "form"]
    assert list(build_rewards(found, TASK, "stages.hard", trusted=True).rewards) == found.reward_names
    with pytest.raises(ConfigError, match=r"two rewards are called 'nv_length'.*rename one"):
        stage(tmp_path, {"nv": {"kind": "nv_reason_ct"}, "nv_length": {"kind": "length", "options": {"low": 9}}})


def test_the_task_gives_the_label_that_excludes_others():
    ((reward, _),) = TableReward(kind="contradiction").build("r", TASK).values()
    assert reward.normal == "Clear"
    without = LabelsTask(prompt="Findings?", labels=("Edema", "Fracture"))
    with pytest.raises(ValueError, match=r"reward contradiction needs options.normal"):
        TableReward(kind="contradiction").build("r", without)


def test_labels_are_counted_where_the_films_decide_and_nowhere_else(tmp_path):
    given = [0.1, 0.2, 0.3]
    found = stage(
        tmp_path,
        {
            "hard": {"kind": "hard"},
            "weighted": {"kind": "hard", "options": {"frequency": "training"}},
            "gain": {"kind": "macro_f1"},
            "given": {"kind": "macro_f1", "options": {"frequency": given}},
            "all": {"kind": "chexreason_nuanced"},
        },
    )
    waiting = build_rewards(found, TASK, "stages.hard", trusted=True)
    built = count_labels(waiting, found, TASK, TRUTH, "stages.hard").rewards
    assert list(built) == found.reward_names
    frequencies = {name: getattr(reward, "frequency", None) for name, (reward, _) in built.items()}
    assert frequencies == {
        "hard": None, "weighted": SHARES, "gain": SHARES, "given": tuple(given), "all_nuanced": SHARES, "all_collapse": None,
    }  # fmt: skip
    assert built["hard"] is waiting.rewards["hard"]
    with pytest.raises(ValueError, match=r"stages.hard.rewards.weighted: frequency: training needs films"):
        count_labels(waiting, found, TASK, [None], "stages.hard")


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("hard", {"frequency": "train"}, r"options.frequency: expected .* or 'training', found 'train'"),
        ("hard", {"frequency": {"Edema": None}}, r"options.frequency: expected a valid number"),
        ("labels", {"labels": 5}, r"options.labels: expected a valid tuple, found 5"),
        ("labels", {"labels": ["Edema"], "frequency": [0.1, 0.2]}, r"a share in \[0, 1\] for each of \('Edema',\)"),
        ("robust", {"conventions": {"a": 5}}, r"options.conventions: expected a valid string or a valid dictionary"),
        ("nv_reason_ct", {"norma": "x"}, r"options.norma: reward nv_reason_ct has no such option.*'normal'"),
    ],
)
def test_a_wrong_option_is_named(kind, options, message):
    with pytest.raises(ValidationError, match=message):
        TableReward(kind=kind, options=options)
