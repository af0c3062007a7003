"""Settings left to the plan: what "auto" becomes, that it fits, and that what a config states is kept."""

import json
import re
from dataclasses import replace

import pytest
from small_plan import CONFIG, SMALL

from vlmalign.config import dump_config, load_config
from vlmalign.models.decoder import REMAT
from vlmalign.planning.auto import AUTO, as_before, choose, concrete, leaves_open, settle, settled
from vlmalign.planning.devices import Device, find_device
from vlmalign.planning.study import workload_of
from vlmalign.planning.target import Target
from vlmalign.studies.chexreason.config import ChexReasonConfig

LARGE = find_device("h200")


def opened(*names: str) -> ChexReasonConfig:
    """The ChexReason config with "auto" at these places: "remat", "sft", "grpo", "rollout"."""
    config = load_config(ChexReasonConfig, CONFIG)
    if "remat" in names:
        config = config.model_copy(update={"model": config.model.model_copy(update={"remat": AUTO})})
    for stage in ("sft", "grpo"):
        if stage in names:
            section = getattr(config, stage)
            shapes = section.shapes.model_copy(update={"rows": AUTO})
            config = config.model_copy(update={stage: section.model_copy(update={"shapes": shapes})})
    if "rollout" in names:
        rollout = config.grpo.rollout.model_copy(update={"rows": AUTO})
        config = config.model_copy(update={"grpo": config.grpo.model_copy(update={"rollout": rollout})})
    return config


@pytest.fixture
def model_config(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SMALL))
    return path


def chosen(config, device, model_config, count=1):
    said = []
    workload, _ = workload_of(concrete(config), lambda dtype: device, count, model_config=model_config, prompt=12)
    # Nothing is compiled: the order of choices is what is looked at here.
    return choose(config, workload, Target(device, count), said.append), said


def of_memory(memory: float) -> Device:
    return replace(LARGE, memory=int(memory))


def test_with_room_everything_is_kept_and_done_at_once(model_config):
    config = opened("remat", "sft", "grpo", "rollout")
    assert leaves_open(config)
    found, said = chosen(config, LARGE, model_config)
    assert (found.remat, found.rows, found.rollout_rows) == ("none", {"sft": 8, "grpo": 8}, {"grpo": 8})
    settled = settle(config, found)
    assert not leaves_open(settled)
    assert (settled.model.remat, settled.grpo.shapes.rows, settled.grpo.rollout.rows) == ("none", 8, 8)
    assert any("rollout" in text for text in said)


def test_what_is_stated_stands(model_config):
    """Only the rows of GRPO are open: the file's remat, and the rows of SFT and of rollouts, are not touched."""
    config = opened("grpo")
    found, _ = chosen(config, LARGE, model_config)
    settled = settle(config, found)
    assert settled.grpo.shapes.rows == 8
    original = load_config(ChexReasonConfig, CONFIG)
    assert settled.model == original.model
    assert settled.sft == original.sft
    assert settled.grpo.rollout == original.grpo.rollout
    assert settle(original, found) == original
    assert not leaves_open(original)


def test_less_memory_takes_fewer_rows_then_recomputes_then_refuses(model_config):
    """The smaller the device, the later in the order (none, 8), (none, 4) ... (full, 1), and every choice fits."""
    config = opened("remat", "sft", "grpo", "rollout")
    order = [(remat, rows) for remat in REMAT for rows in (8, 4, 2, 1)]
    places, refused = [], False
    for memory in (4e9, 1.5e9, 0.8e9, 0.4e9, 0.2e9, 4e6):
        try:
            found, _ = chosen(config, of_memory(memory), model_config)
        except ValueError as error:
            refused = True
            assert re.search("nothing fits|lower rollout.rows", str(error)), error  # noqa: PT017
            continue
        assert not refused, "what is too small for a config is not large enough with less"
        places.append(order.index((found.remat, found.rows["grpo"])))
        taken = [choice.tried[-1] for choice in found.tried if choice.taken is not None]
        assert all(t.fits for t in taken[-2:])
    assert places == sorted(places)
    assert len(set(places)) > 1
    assert refused


def test_rows_share_out_over_devices(model_config):
    found, _ = chosen(opened("sft", "grpo", "rollout"), LARGE, model_config, count=4)
    assert found.rows == {"sft": 8, "grpo": 8}
    assert found.rollout_rows == {"grpo": 8}


def test_a_run_goes_on_with_what_other_devices_chose_before(model_config, tmp_path):
    """A run folder holds the choice of the first start; a start on other devices chooses anew, and is no other run."""
    config = opened("remat", "sft", "grpo", "rollout").model_copy(update={"run": tmp_path})
    eight = settle(config, chosen(config, LARGE, model_config, count=8)[0])
    one = settle(config, chosen(config, of_memory(0.8e9), model_config)[0])
    assert one != eight
    assert as_before(config, one) == one, "the folder is empty"
    (tmp_path / "config.yaml").write_text(dump_config(eight))
    assert as_before(config, one) == eight
    other = config.model_copy(update={"seed": config.seed + 1})
    assert as_before(other, one) != eight, "another run"
    assert as_before(eight, eight) == eight, "nothing is open"


def test_a_file_that_says_auto_is_settled_for_the_devices_here(repository, tmp_path):
    """From YAML to numbers, as `vlmalign chexreason` does it, with programs compiled for this device."""
    path = repository / "configs" / "chexreason" / "quickstart.yaml"
    auto = ["model.remat=auto", "sft.shapes.rows=auto", "grpo.shapes.rows=auto", "grpo.rollout.rows=auto"]
    config = load_config(ChexReasonConfig, path, [*auto, f"run={tmp_path}"])
    said = []
    found = settled(config, said.append)
    assert found == load_config(ChexReasonConfig, path, [f"run={tmp_path}", "model.remat=none"])
    assert any("tried grpo remat none, 16 rows" in text for text in said)
    assert not leaves_open(found)
