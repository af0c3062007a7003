"""Plans of `vlmalign align`: which numbers its stages become, and full fine-tuning cut over devices."""

import json
from collections.abc import Sequence

import pytest

from vlmalign.cli import main
from vlmalign.models import sizes
from vlmalign.objectives.ppo import RECORDED
from vlmalign.planning import cost
from vlmalign.planning.batches import places, size, split, update_batch, whole
from vlmalign.planning.devices import find_device
from vlmalign.planning.jobs import micro_job
from vlmalign.planning.memory import phases
from vlmalign.planning.study import read_study
from vlmalign.training.value_head import BIAS, WEIGHT

TEXT = {
    "model_type": "qwen2",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "max_position_embeddings": 1024,
}
CONFIG = """
run: runs/x
model: {path: nowhere, dtype: bfloat16, remat: full, lora: %s}
stages:
  - kind: sft
    data: {path: a.jsonl, max_prompt: 30, max_completion: 20}
    steps: 10
    batch: 16
    shapes: {rows: 8, prompt_multiple: 16, completion_multiple: 16}
    optimiser: {learning_rate: 1.0e-4}
  - kind: grpo
    data: {path: q.jsonl, max_prompt: 40}
    steps: 20
    prompts: 16
    rollout: {rows: 16, group: 4, completion: 32}
    rewards: {right: {kind: choice, options: {letters: AB}}}
    objective: {beta: %s}
    shapes: {rows: 8, prompt_multiple: 16, completion_multiple: 16}
    optimiser: {learning_rate: 1.0e-5}
"""


@pytest.fixture
def read(tmp_path, monkeypatch):
    monkeypatch.setattr("vlmalign.planning.target.PLUG_INS", (("no-such-wheel",),))
    (tmp_path / "config.json").write_text(json.dumps(TEXT))

    def run(lora: str = "null", beta: float = 0.0, count: int = 8, kind: str = "grpo", overrides: Sequence[str] = ()):
        path = tmp_path / "study.yaml"
        path.write_text((CONFIG % (lora, beta)).replace("kind: grpo", f"kind: {kind}"))
        device = find_device("a100-80")
        return read_study(path, overrides, lambda dtype: device, count, model_config=tmp_path / "config.json")

    return run


def test_stages_become_numbers(read):
    workload, target = read()
    sft, grpo, rollout = workload.sft, workload.grpo, workload.rollout
    assert (sft.layout, sft.rows, sft.groups, sft.steps) == ((48, 1, 32), 8, 16, 10)
    assert (grpo.layout, grpo.rows, grpo.groups, grpo.steps) == ((48, 4, 32), 8, 16, 20)
    assert (rollout.rows, rollout.group, rollout.completion, rollout.prompt, rollout.count) == (16, 4, 32, 48, 20)
    assert target.axes.fsdp == -1, "a whole decoder is cut"
    assert read("{rank: 2, alpha: 4}")[1].axes.fsdp == 1, "an adapter is not"


def test_full_fine_tuning_holds_an_eighth_and_samples_from_the_whole(read):
    workload, target = read()
    model = workload.model
    assert split(model).frozen == {}
    assert all(value.dtype == "float32" for value in split(model).trained.values())
    where = places(target, model)
    matrices = sum(v.size for v in split(model).trained.values() if len(v.shape) == 2)
    vectors = sum(v.size for v in split(model).trained.values() if len(v.shape) == 1)
    trained = size(where.trained(split(model).trained))
    assert trained == 4 * (matrices // 8 + vectors)
    found = {phase.name: phase for phase in phases(workload, {}, target)}
    gradients, decode = found["grpo gradients"], found["rollout decode"]
    assert (gradients.parameters, gradients.adapter) == (0, 2 * trained)
    assert gradients.optimiser == pytest.approx(2 * trained, abs=64)
    assert decode.parameters == 2 * sum(v.size for v in whole(model).values())
    assert "encode" not in found
    assert "grpo reference" not in found
    with_reference = {phase.name: phase for phase in phases(*read(beta=0.1)[:1], {}, target)}
    assert with_reference["grpo gradients"].adapter == 2 * trained + trained // 2


def test_full_fine_tuning_takes_eight_operations_with_rematerialisation(read):
    workload, _ = read()
    config, update = workload.model.config.decoder, workload.grpo
    attention = cost._attention(config, update.layout)
    expected = 8 * sizes.layer_weights(config) * update.layout.row + 4 * attention
    expected += 8 * sizes.head_weights(config) * 4 * 32
    assert cost.gradients(workload.model, update, 1).flops == pytest.approx(expected)


def test_the_command_reads_both_studies(read, tmp_path, capsys):
    read()
    arguments = ["plan", str(tmp_path / "study.yaml"), "--model-config", str(tmp_path / "config.json")]
    out = tmp_path / "plan.json"
    assert main([*arguments, "--device", "a100-80", "--count", "8", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["device"]["axes"] == {"replica": 1, "data": 1, "fsdp": 8, "tensor": 1}
    assert found["fits"]
    assert found["proposed"]["remat"] == "none"
    assert found["planned_in"]["cpu_seconds"] > 0
    assert "Fits:" in capsys.readouterr().out


def test_ppo_trains_a_value_head_too(read):
    """Beside the adapter: a vector as wide as the states and a bias, their gradients and their moments."""
    one = read("{rank: 2, alpha: 4}", count=1)
    workload, target = read("{rank: 2, alpha: 4}", count=1, kind="ppo")
    head = 4 * (64 + 1)
    grpo, ppo = ({phase.name: phase for phase in phases(each[0], {}, target)} for each in (one, (workload, target)))
    assert ppo["ppo gradients"].adapter == grpo["grpo gradients"].adapter + 2 * head
    assert ppo["ppo gradients"].optimiser == grpo["grpo gradients"].optimiser + 2 * head
    assert ppo["rollout decode"].parameters == grpo["rollout decode"].parameters, "the head is not sampled with"
    batch, recorded = update_batch(workload.model, workload.grpo)
    assert set(RECORDED) <= set(recorded)
    assert recorded["returns"].shape == batch.weight.shape
    sums, params, *_ = micro_job(workload.model, workload.grpo, places(target, workload.model), target).arguments
    assert set(params) - set(split(workload.model).trained) == {WEIGHT, BIAS}
    assert set(sums) == set(params)


def test_rollouts_that_cut_the_weights(read):
    """Over two devices: half of every matrix, the caches of twice the rows with half of the heads, on each."""
    whole_each, halves = (
        read("{rank: 2, alpha: 4}"),
        read("{rank: 2, alpha: 4}", overrides=["stages.1.rollout.tensor=2"]),
    )
    one, two = (
        {phase.name: phase for phase in phases(*each[:1], {}, each[1])}["rollout decode"]
        for each in (whole_each, halves)
    )
    assert (halves[1].sampling_shares, whole_each[1].sampling_shares) == (4, 8)
    assert one.cache == two.cache
    shapes = whole(halves[0].model)
    matrices = sum(v.size for v in shapes.values() if len(v.shape) == 2)
    frozen = size(split(halves[0].model).frozen)
    assert two.parameters - frozen == pytest.approx(2 * matrices / 2, rel=0.05), "a copy cut in two"
    assert one.parameters - frozen > 0


def test_axes_that_do_not_fit_are_refused(read, tmp_path, capsys):
    read()
    arguments = [
        "plan",
        str(tmp_path / "study.yaml"),
        "--model-config",
        str(tmp_path / "config.json"),
        "--device",
        "h100",
    ]
    assert main([*arguments, "--count", "6", "--set", "mesh.data=4"]) == 2
    assert "does not fit 6 devices" in capsys.readouterr().err
