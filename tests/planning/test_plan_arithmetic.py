"""Costs and sizes that are counted: against sums done by hand, published figures, and each other."""

import math
from dataclasses import replace

import pytest
from small_plan import medgemma, small_workload

from vlmalign.mesh import MeshSettings
from vlmalign.models import sizes
from vlmalign.models.decoder import REMAT
from vlmalign.planning import cost
from vlmalign.planning.batches import base_of, split
from vlmalign.planning.cost import Cost
from vlmalign.planning.devices import DEVICES, THIS, find_device
from vlmalign.planning.jobs import changed_names
from vlmalign.planning.memory import MARGIN, phases, usable
from vlmalign.planning.plan import make_plan
from vlmalign.planning.record import record
from vlmalign.planning.schedule import times
from vlmalign.planning.search import SCALED, Candidate, Choice, changed, choose_all, choose_rows, rows_to_try
from vlmalign.planning.target import Target
from vlmalign.types import Layout

A100 = find_device("a100-80")


@pytest.fixture(scope="module")
def real():
    return medgemma("stages.grpo.rollout.completion=512")


def test_every_rematerialisation_has_its_cost():
    assert list(cost.FORWARD_AGAIN) == list(cost.ATTENTION_AGAIN) == list(REMAT)


def test_published_sizes_of_medgemma(real):
    """3.880 B text parameters of which 0.671 B are the table; 139 kB of cache and 7.8 GB of weights a token; 5.46 TFLOP."""
    model = real.model
    config = model.config.decoder
    assert sizes.head_weights(config) == 262_208 * 2560
    assert sizes.layer_weights(config) + sizes.head_weights(config) == pytest.approx(3.880e9, rel=1e-3)
    assert sizes.cache_bytes(model) == 2 * 34 * 4 * 256 * 2
    assert cost.encode(model, 1).flops == pytest.approx(5.46e12, rel=0.01)
    # Rank 16 on seven projections: 16 x (in + out) each.
    per_layer = 2 * (2560 + 2048) + 2 * (2560 + 1024) + 3 * (2560 + 10_240)
    assert cost.adapter_weights(model) == 34 * 16 * per_layer


def test_forward_is_two_operations_per_weight_and_token():
    layout = Layout(1, 0, 0)
    workload = medgemma()
    base = base_of(workload.model)
    config = base.config.decoder
    found = cost.forward(base, layout, 3, head=False)
    assert found.flops == 3 * (2 * sizes.layer_weights(config) + 4 * 34 * 8 * 256)
    assert found.bytes == 2 * sizes.layer_weights(config)


def test_lora_trains_in_four_operations_per_weight_or_six_with_rematerialisation(real):
    """Attention, head and adapter aside, which the same difference takes away."""
    update = real["grpo"]
    none = cost.gradients(changed(real, "grpo", Candidate("none", 8)).model, update, 1)
    full = cost.gradients(changed(real, "grpo", Candidate("full", 8)).model, update, 1)
    config = real.model.config.decoder
    attention = cost._attention(config, update.layout)
    layers = 2 * (sizes.layer_weights(config) + cost.adapter_weights(real.model)) * update.layout.row
    assert full.flops - none.flops == pytest.approx(layers + attention)
    frozen = 2 * sizes.layer_weights(config) * update.layout.row
    rest = 6 * cost.adapter_weights(real.model) * update.layout.row + 3 * attention
    rest += 4 * sizes.head_weights(config) * 4 * 512  # forward, and the gradient of its input
    assert none.flops == pytest.approx(2 * frozen + rest)
    dots, attended = (cost.gradients(changed(real, "grpo", Candidate(n, 8)).model, update, 1) for n in list(REMAT)[1:3])
    assert dots.flops - none.flops == pytest.approx(attention)
    assert attended.flops == full.flops


def test_decoding_is_bound_by_weights_and_caches(real):
    """Of 512 steps for 8 x 4: weights 512 times, the prompts' caches 512 times, own caches as long as they are then."""
    from vlmalign.rollout.completions import Generator

    work, model = real["grpo"].rollout, base_of(real.model)
    made = Generator(model, None, (), work.rows, work.group, work.completion, work.sampling)
    assert [s.length for s in made.shapes[:4]] == [64, 128, 256, 512]
    _, decode = cost.rollout(real.model, work, made, rows=8, length=512)
    kv = sizes.cache_bytes(model)
    weights = 2 * (sizes.layer_weights(model.config.decoder) + sizes.head_weights(model.config.decoder))
    own = 64 * 64 + 64 * 128 + 128 * 256 + 256 * 512
    logits = 2 * 4 * 262_208 * 32
    assert decode.bytes == pytest.approx(512 * (weights + logits + 8 * 480 * kv) + 32 * own * kv)
    assert cost.roofline(decode, A100, "bfloat16") == pytest.approx(decode.bytes / A100.bandwidth)
    assert cost.roofline(Cost(312e12, 1.0), A100, "bfloat16") == 1.0


def test_devices_share_the_work(real):
    """Eight devices take an eighth of the rows' operations; weights are read by every one of them."""
    one, eight = times(real, A100, 1), times(medgemma("stages.grpo.rollout.completion=512", count=8), A100, 8)
    by_name = {part.name: part for part in eight.parts}
    for part in one.parts:
        assert by_name[part.name].cost.flops == pytest.approx(part.cost.flops / 8, rel=0.02), part.name
    assert eight.stages[1].step < one.stages[1].step < 8 * eight.stages[1].step
    assert one.hours(1, 0.5) == pytest.approx(2 * one.total / 3600)
    assert one.stages[1].epoch == pytest.approx(1000 / 8 * one.stages[1].step)
    assert one.stages[0].epoch == pytest.approx(2000 / 8 * one.stages[0].step)


def test_phases_hold_what_stays(tmp_path):
    """Base, adapter, reference, gradients and Adam's moments, by hand."""
    workload = small_workload(tmp_path)
    found = {phase.name: phase for phase in phases(workload, {}, Target(A100, 1))}
    model = workload.model
    base = sum(v.size * v.dtype.itemsize for v in split(model).frozen.values())
    adapter = 4 * cost.adapter_weights(model)
    gradients = found["grpo gradients"]
    assert (gradients.parameters, gradients.adapter) == (base, 3 * adapter)
    assert gradients.optimiser == pytest.approx(2 * adapter, abs=64)
    assert found["sft gradients"].adapter == 2 * adapter
    decode = found["grpo decode"]
    changed = sum(v.size * v.dtype.itemsize for n, v in model.shapes.items() if n in changed_names(model))
    assert decode.parameters == base + changed  # the merged copies
    assert decode.cache == 2 * (16 + 4 * 16) * sizes.cache_bytes(model)  # prompts of 12 tokens, padded to 16
    assert decode.peak == sum(decode[1:6])


def test_no_reference_without_penalty(tmp_path):
    workload = small_workload(tmp_path, "stages.grpo.objective.beta=0.0")
    assert "grpo reference" not in {phase.name for phase in phases(workload, {}, Target(A100, 1))}
    assert "ref_logp" not in workload["grpo"].recorded


def test_rows_divide_over_the_devices(tmp_path):
    workload = small_workload(tmp_path, count=8)
    assert (workload["grpo"].rows, workload["sft"].rows, workload["grpo"].rollout.rows) == (8, 8, 8)


def test_the_most_rows_first(real):
    assert list(rows_to_try(real["grpo"], 1)) == [8, 4, 2, 1]
    assert list(rows_to_try(real["grpo"], 8)) == [8]
    assert list(rows_to_try(real["grpo"], 3)) == [9, 6, 3]


@pytest.mark.full
def test_a_cut_over_tensor_shares_out_no_rows(real):
    """Two devices that hold one layer between them see the same rows: one row is tried, and counted whole on each."""
    alone, cut = Target(A100, 1), Target(A100, 2, axes=MeshSettings(data=1, tensor=2))
    tried = choose_rows(real, "grpo", "full", replace(cut, device=replace(A100, memory=1)), lambda text: None).tried
    assert min(t.candidate.rows for t in tried) == 1
    (one,) = (p for p in phases(real, {}, alone) if p.name == "grpo gradients")
    (two,) = (p for p in phases(real, {}, cut) if p.name == "grpo gradients")
    assert two.working == one.working


def test_sft_asks_for_the_next_policy_where_none_of_its_rows_fit(tmp_path, monkeypatch):
    """GRPO would keep everything; SFT fits only where everything is made again, and both take that."""
    asked = []

    def choose(workload, stage, remat, target, say, *, rows, known, scale):
        assert rows is None, "what the config states is tried as well as the rest"
        asked.append((stage, remat))
        assert scale == (0.9 if stage == "sft" else None), "SFT hears of what GRPO's program took"
        fits = stage == "grpo" or remat == "full"
        return Choice(stage, Candidate(remat, 2) if fits else None, (), scale=0.9)

    monkeypatch.setattr("vlmalign.planning.search.choose_rows", choose)
    plan = make_plan(small_workload(tmp_path), Target(A100, 1), search=True, say=lambda text: None)
    assert plan.better.workload.model.remat == "full"
    assert asked == [(stage, remat) for remat in ("none", "dots", "attention", "full") for stage in ("grpo", "sft")]
    assert record(plan, share=0.5)["nothing_fits"] == []
    monkeypatch.setattr("vlmalign.planning.search.choose_rows", lambda *a, **k: Choice("grpo", None, ()))
    plan = make_plan(small_workload(tmp_path), Target(A100, 1), search=True, say=lambda text: None)
    assert plan.better is None
    assert record(plan, share=0.5)["nothing_fits"] == ["grpo"]


def test_what_the_other_stage_took_says_what_fits_with_room(real):
    """Half of what arithmetic says, since GRPO's program under the same policy took half of it: nothing is compiled."""
    target = Target(find_device("h200"), 1)
    plain = choose_rows(real, "sft", "full", target, lambda text: None)
    scaled = choose_rows(real, "sft", "full", target, lambda text: None, scale=0.5)
    assert (plain.program, plain.tried[0].how) == (None, "arithmetic")
    assert scaled.taken == plain.taken
    assert scaled.tried[0].how == SCALED
    assert scaled.program.name == "sft gradients"
    assert plain.tried[0].peak - scaled.tried[0].peak == pytest.approx(scaled.program.memory.beyond, abs=1)


def test_the_first_that_fits_is_taken(real):
    said, taken = [], {}
    for device in DEVICES:
        found, tried = choose_all(real, Target(device, 1), said.append)
        taken[device.name] = None if found is None else found.model.remat
        for choice in tried:
            assert [t.fits for t in choice.tried] == [False] * (len(choice.tried) - 1) + [choice.taken is not None]
            assert choice.tried[-1].peak <= usable(device.memory) or choice.taken is None
    assert taken["h200"] == "none"
    assert taken["rtx4090-24"] != "none"
    assert len(said) >= len(DEVICES)


def test_usable_leaves_the_margin():
    assert usable(1000) == round(1000 * (1 - MARGIN))


@pytest.mark.parametrize(("asked", "near"), [("a100", "a100-"), ("H100", "h100"), ("thsi", THIS)])
def test_unknown_device_names_the_nearest(asked, near):
    with pytest.raises(ValueError, match=f"unknown device '{asked}'.*the nearest is {near}"):
        find_device(asked)


def test_device_table_is_plausible():
    for device in DEVICES:
        assert device.flops["bfloat16"] >= device.flops["float32"] > 1e13
        assert 1e12 <= device.bandwidth <= 1e13
        assert math.log2(device.memory / 2**30) > 4
