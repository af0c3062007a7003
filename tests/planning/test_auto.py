"""Settings left to the plan: what "auto" becomes, that it fits, that what a config states is kept, and what a run keeps."""

import json
from dataclasses import replace

import pytest
from small_plan import CONFIG, SMALL

from vlmalign.models.decoder import REMAT
from vlmalign.planning import auto
from vlmalign.planning.auto import CHOSEN, NothingFits, choose, leaves_open, settled
from vlmalign.planning.devices import Device, find_device
from vlmalign.planning.lengths import Given
from vlmalign.planning.memory import phases, usable
from vlmalign.planning.study import workloads_of
from vlmalign.planning.target import Target
from vlmalign.studies.engine.chain import load_study
from vlmalign.studies.engine.config import StudyConfig

LARGE = find_device("h200")
PLACES = {
    "remat": "stages.base.remat=auto",
    "sft": "stages.sft.shapes.rows=auto",
    "grpo": "stages.grpo.shapes.rows=auto",
    "rollout": "stages.grpo.rollout.rows=auto",
}


def opened(*names: str, more: tuple[str, ...] = ()) -> StudyConfig:
    """The study of films with "auto" at these places."""
    return load_study(CONFIG, [*(PLACES[name] for name in names or PLACES), *more])


@pytest.fixture
def model_config(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SMALL))
    return path


def chosen(config, device, model_config, count=1):
    said = []
    ((workload, _),) = workloads_of(
        config, lambda dtype: device, count, model_configs={"": str(model_config)}, given=Given(prompt=12),
        compiles=False,
    )  # fmt: skip
    # Nothing is compiled: the order of choices is what is looked at here.
    return choose(workload, Target(device, count), said.append), said


def of_memory(memory: float) -> Device:
    return replace(LARGE, memory=int(memory))


def rows_of(workload) -> tuple[str, int, int, int]:
    sft, grpo = workload.stages
    return workload.model.remat, sft.rows, grpo.rows, grpo.rollout.rows


def test_with_room_everything_is_kept_and_done_at_once(model_config):
    config = opened()
    assert leaves_open(config)
    found, said = chosen(config, LARGE, model_config)
    assert rows_of(found) == ("none", 8, 8, 8)
    assert any("rollouts of grpo" in text for text in said)


def test_what_is_stated_stands(model_config):
    """Only the rows of GRPO are open: the file's remat, and the rows of SFT and of rollouts, are not touched."""
    stated = ("stages.sft.shapes.rows=2", "stages.grpo.rollout.rows=4")
    found, _ = chosen(opened("grpo", more=stated), LARGE, model_config)
    assert rows_of(found) == ("full", 2, 8, 4)
    assert not leaves_open(load_study(CONFIG))


def test_less_memory_takes_fewer_rows_then_recomputes_then_refuses(model_config):
    """The smaller the device, the later in the order (none, 8), (none, 4) ... (full, 1), and every choice fits."""
    config = opened()
    order = [(remat, rows) for remat in REMAT for rows in (8, 4, 2, 1)]
    places, refused = [], False
    for memory in (4e9, 1.5e9, 0.8e9, 0.4e9, 0.2e9, 4e6):
        try:
            found, _ = chosen(config, of_memory(memory), model_config)
        except NothingFits:
            refused = True
            continue
        assert not refused, "what is too small for a config is not large enough with less"
        places.append(order.index((found.model.remat, found["grpo"].rows)))
        of_training = [phase for phase in phases(found, {}, Target(of_memory(memory), 1)) if "grpo" in phase.name]
        assert max(phase.peak for phase in of_training) <= usable(int(memory))
    assert places == sorted(places)
    assert len(set(places)) > 1
    assert refused


def test_rows_share_out_over_devices(model_config):
    found, _ = chosen(opened("sft", "grpo", "rollout"), LARGE, model_config, count=4)
    assert rows_of(found) == ("full", 8, 8, 8)


def test_settings_are_kept_for_the_same_devices_and_the_same_stages(tmp_path, monkeypatch):
    """A start on other devices, or of a stage with other settings, chooses anew; an arm that is added takes nothing away."""
    asked = []

    def stand_in(config, say):
        names = [name for name, stage in config.stages.items() if auto._open(stage)]
        asked.append(names)
        own = {"base": {"remat": "dots"}, "sft": {"rows": 4}, "grpo": {"rows": 2, "rollout_rows": 8}}
        return {name: own.get(name, {"rows": 1, "rollout_rows": 1}) for name in names}

    monkeypatch.setattr(auto, "_chosen", stand_in)
    config = opened(more=(f"run={tmp_path}",))
    found = settled(config, print)
    assert (found.stages["base"].remat, found.stages["sft"].shapes.rows) == ("dots", 4)
    assert (found.stages["grpo"].shapes.rows, found.stages["grpo"].rollout.rows) == (2, 8)
    assert not leaves_open(found)
    kept = json.loads((tmp_path / CHOSEN).read_text())
    assert kept["devices"] == "1 x cpu (cpu)"
    assert {name: set(each) for name, each in kept["stages"].items()} == {
        "base": {"remat", "of"}, "sft": {"rows", "of"}, "grpo": {"rows", "rollout_rows", "of"}
    }  # fmt: skip
    assert settled(config, print) == found
    assert asked == [["base", "sft", "grpo"], []]
    arm = config.model_copy(update={"stages": {**config.stages, "arm": config.stages["grpo"]}})
    assert settled(arm, print).stages["arm"].shapes.rows == 1
    assert asked[-1] == ["arm"]
    other = opened(more=(f"run={tmp_path}", "stages.grpo.rollout.group=8"))
    settled(other, print)
    assert asked[-1] == ["grpo"]
    (tmp_path / CHOSEN).write_text(json.dumps(kept | {"devices": "8 x NVIDIA H200"}))
    settled(config, print)
    assert asked[-1] == ["base", "sft", "grpo"]


def test_what_was_kept_gives_way_where_an_arm_does_not_fit_beside_it(tmp_path, monkeypatch):
    config, said = opened(more=(f"run={tmp_path}",)), []
    monkeypatch.setattr(auto, "_chosen", lambda config, say: {"base": {"remat": "none"}})
    settled(config, said.append)

    def stand_in(config, say):
        if config.stages["base"].remat == "none":
            raise NothingFits("too large")
        return {"base": {"remat": "full"}, "sft": {"rows": 1}, "grpo": {"rows": 1, "rollout_rows": 1}}

    monkeypatch.setattr(auto, "_chosen", stand_in)
    assert settled(config, said.append).stages["base"].remat == "full"
    assert "everything is chosen anew" in said[-1]


@pytest.mark.full
def test_a_file_that_says_auto_is_settled_for_the_devices_here(repository, tmp_path):
    """From YAML to numbers, as `vlmalign run` does it, with programs compiled for this device."""
    head, *_, grpo = (repository / "configs" / "align" / "tiny_text.yaml").read_text().split("\n  - kind: ")
    stated, left = tmp_path / "stated.yaml", tmp_path / "auto.yaml"
    stated.write_text(f"{head}\n  - kind: {grpo}")
    left.write_text(stated.read_text().replace("rows: 8,", "rows: auto,"))
    config = load_study(left, [f"run={tmp_path}", "model.remat=auto"])
    said = []
    found = settled(config, said.append)
    assert found == load_study(stated, [f"run={tmp_path}"])
    assert any("tried 01-grpo remat none, 8 rows" in text for text in said)
    assert settled(config, said.append) == found
