"""A study in numbers: which workloads its stages and answers become, how long their texts are, full fine-tuning cut over
devices."""

import json
from collections.abc import Sequence

import pytest
from small_plan import CONFIG as FILMS
from small_plan import REPOSITORY, only_workload

from vlmalign.models import sizes
from vlmalign.objectives.ppo import RECORDED
from vlmalign.planning import cost
from vlmalign.planning.batches import places, size, split, update_batch, whole
from vlmalign.planning.devices import SHARE, find_device
from vlmalign.planning.inputs import KNOWN_MODELS
from vlmalign.planning.jobs import micro_job
from vlmalign.planning.lengths import Given
from vlmalign.planning.memory import phases
from vlmalign.planning.plan import jobs
from vlmalign.planning.schedule import times
from vlmalign.planning.study import hours, workloads_of
from vlmalign.planning.target import Target
from vlmalign.studies.engine.chain import load_study
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


A100 = find_device("a100-80")


@pytest.fixture
def read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TEXT))

    def run(
        lora: str = "null",
        beta: float = 0.0,
        count: int = 8,
        kind: str = "grpo",
        overrides: Sequence[str] = (),
        text: str = "",
        only: Sequence[str] = (),
    ):
        path = tmp_path / "study.yaml"
        path.write_text((text or CONFIG % (lora, beta)).replace("kind: grpo", f"kind: {kind}"))
        return workloads_of(
            load_study(path, overrides), lambda dtype: A100, count, only=only,
            model_configs={"": str(tmp_path / "config.json")}, compiles=False,
        )  # fmt: skip

    return run


@pytest.fixture
def read_one(read):
    def run(*arguments, **settings):
        (found,) = read(*arguments, **settings)
        return found

    return run


def test_stages_become_numbers(read_one):
    workload, target = read_one()
    sft, grpo = workload.stages
    rollout = grpo.rollout
    assert (sft.stages, grpo.stages, workload.bases) == (("01-sft",), ("02-grpo",), ("base",))
    assert (sft.layout, sft.rows, sft.groups, sft.steps) == ((32, 1, 32), 8, 16, 10)
    assert (grpo.layout, grpo.rows, grpo.groups, grpo.steps) == ((48, 4, 32), 8, 16, 20)
    assert (rollout.rows, rollout.group, rollout.completion, rollout.prompt, rollout.count) == (16, 4, 32, 48, 20)
    assert target.axes.fsdp == -1, "a whole decoder is cut"
    assert read_one("{rank: 2, alpha: 4}")[1].axes.fsdp == 1, "an adapter is not"


def test_full_fine_tuning_holds_an_eighth_and_samples_from_the_whole(read_one):
    workload, target = read_one()
    model = workload.model
    assert split(model).frozen == {}
    assert all(value.dtype == "float32" for value in split(model).trained.values())
    where = places(target, model)
    matrices = sum(v.size for v in split(model).trained.values() if len(v.shape) == 2)
    vectors = sum(v.size for v in split(model).trained.values() if len(v.shape) == 1)
    trained = size(where.trained(split(model).trained))
    assert trained == 4 * (matrices // 8 + vectors)
    found = {phase.name: phase for phase in phases(workload, {}, target)}
    gradients, decode = found["02-grpo gradients"], found["02-grpo decode"]
    assert (gradients.parameters, gradients.adapter) == (0, 2 * trained)
    assert gradients.optimiser == pytest.approx(2 * trained, abs=64)
    assert decode.parameters == 2 * sum(v.size for v in whole(model).values())
    assert "encode" not in found
    assert "02-grpo reference" not in found
    with_reference = {phase.name: phase for phase in phases(*read_one(beta=0.1)[:1], {}, target)}
    assert with_reference["02-grpo gradients"].adapter == 2 * trained + trained // 2


def test_full_fine_tuning_takes_eight_operations_with_rematerialisation(read_one):
    workload, _ = read_one()
    config, update = workload.model.config.decoder, workload["02-grpo"]
    attention = cost._attention(config, update.layout)
    expected = 8 * sizes.layer_weights(config) * update.layout.row + 4 * attention
    expected += 8 * sizes.head_weights(config) * 4 * 32
    assert cost.gradients(workload.model, update, 1).flops == pytest.approx(expected)


def test_ppo_trains_a_value_head_too(read_one):
    """Beside the adapter: a vector as wide as the states and a bias, their gradients and their moments."""
    one = read_one("{rank: 2, alpha: 4}", count=1)
    workload, target = read_one("{rank: 2, alpha: 4}", count=1, kind="ppo")
    head = 4 * (64 + 1)
    grpo, ppo = ({phase.name: phase for phase in phases(each[0], {}, target)} for each in (one, (workload, target)))
    assert ppo["02-ppo gradients"].adapter == grpo["02-grpo gradients"].adapter + 2 * head
    assert ppo["02-ppo gradients"].optimiser == grpo["02-grpo gradients"].optimiser + 2 * head
    assert ppo["02-ppo decode"].parameters == grpo["02-grpo decode"].parameters, "the head is not sampled with"
    batch, recorded = update_batch(workload.model, workload.stages[1])
    assert set(RECORDED) <= set(recorded)
    assert recorded["returns"].shape == batch.weight.shape
    sums, params, *_ = micro_job(workload.model, workload.stages[1], places(target, workload.model), target).arguments
    assert set(params) - set(split(workload.model).trained) == {WEIGHT, BIAS}
    assert set(sums) == set(params)


def test_rollouts_that_cut_the_weights(read_one):
    """Over two devices: half of every matrix, the caches of twice the rows with half of the heads, on each."""
    whole_each, halves = (
        read_one("{rank: 2, alpha: 4}"),
        read_one("{rank: 2, alpha: 4}", overrides=["stages.1.rollout.tensor=2"]),
    )
    one, two = (
        {phase.name: phase for phase in phases(*each[:1], {}, each[1])}["02-grpo decode"]
        for each in (whole_each, halves)
    )
    assert (halves[1].sampling_shares, whole_each[1].sampling_shares) == (4, 8)
    assert one.cache == two.cache
    shapes = whole(halves[0].model)
    matrices = sum(v.size for v in shapes.values() if len(v.shape) == 2)
    frozen = size(split(halves[0].model).frozen)
    assert two.parameters - frozen == pytest.approx(2 * matrices / 2, rel=0.05), "a copy cut in two"
    assert one.parameters - frozen > 0


def test_axes_that_do_not_fit_are_refused(read):
    with pytest.raises(ValueError, match="does not fit 6 devices"):
        read(count=6, overrides=["mesh.data=4"])


FORK = """
run: runs/fork
sources:
  rows: {kind: rows, path: not-here.jsonl}
sets:
  train: {from: rows, draw: random, size: 64}
  rest: {from: rows, draw: whole}
tasks: {talk: {kind: free}}
stages:
  base: {kind: model, path: nowhere, dtype: bfloat16, lora: {rank: 2, alpha: 4}}
  sft:
    kind: sft
    from: base
    data: {set: train, max_prompt: 30, max_completion: 20}
    epochs: 2
    batch: 16
    shapes: &shapes {rows: 8, prompt_multiple: 16, completion_multiple: 16}
    optimiser: {learning_rate: 1.0e-4}
  hard: &hard
    kind: grpo
    from: sft
    data: {set: train, max_prompt: 30}
    steps: 20
    prompts: 16
    rollout: {rows: 16, group: 4, completion: 32}
    rewards: {right: {kind: choice, options: {letters: AB}}}
    shapes: *shapes
    optimiser: {learning_rate: 1.0e-5}
  soft: {<<: *hard, rewards: {right: {kind: choice, weight: 0.5, options: {letters: AB}}}, steps: 10}
  clipped: {<<: *hard, objective: {clip_high: 0.3}}
answers:
  all: {stages: [base, sft, hard], sets: [train, rest], completion: 32, rows: 8}
"""


def test_a_fork_is_read_and_equal_arms_are_planned_once(read_one):
    """Arms that differ in rewards alone run the same programs; another loss is another update, and samples as they do."""
    workload, target = read_one(text=FORK, count=1)
    assert [update.stages for update in workload.stages] == [("sft",), ("hard", "soft"), ("clipped",)]
    sft, arms, clipped = workload.stages
    assert (sft.steps, sft.epoch) == (2 * 64 // 16, 64 / 16)
    assert (arms.steps, arms.rollout.count, clipped.steps) == (30, 30, 20)
    assert workload["soft"] is arms
    made = [job.name for job in jobs(workload, target)]
    assert sorted(made) == sorted(set(made))
    assert [name for name in made if name.endswith("decode")] == ["hard decode"]
    assert [name for name in made if name.endswith("gradients")] == [
        "sft gradients",
        "hard, soft gradients",
        "clipped gradients",
    ]
    assert {"hard, soft decode", "clipped decode"} <= {phase.name for phase in phases(workload, {}, target)}
    found = times(workload, A100, 1)
    assert [each.stages for each in found.stages] == [("sft",), ("hard", "soft"), ("clipped",)]


def test_answers_are_work_where_the_size_of_their_set_is_known(read_one):
    workload, target = read_one(
        text=FORK.replace("sets: [train, rest]", "sets: [train, rest], samples: 2, temperature: 1")
    )
    assert workload.evaluation == ()
    assert "answers all to set train, whose questions' length is not known" in workload.left_out
    assert "answers all to set rest, whose size is not known" in workload.left_out
    config = load_study(FILMS, ["answers.test.samples=2", "answers.test.temperature=0.7"])
    found = only_workload(config, "medgemma-4b")
    assert [(each.name, each.prompts, each.count, each.group) for each in found.evaluation] == [
        ("test chexpert", 518, 3, 2), ("test nih", 488, 3, 2)
    ]  # fmt: skip
    assert [phase.name for phase in phases(found, {}, target)][-2:] == ["answers prefill", "answers decode"]


def test_stages_are_chosen_by_name(read_one, read):
    workload, _ = read_one(text=FORK, only=["soft"])
    assert [update.stages for update in workload.stages] == [("soft",)]
    assert workload["soft"].steps == 10
    with pytest.raises(ValueError, match="no stage is called 'sfot'; the stages are base, sft, hard, soft, clipped"):
        read(text=FORK, only=["sfot"])


def test_two_bases_are_two_workloads_and_a_zero_shot_table_is_one(read, tmp_path):
    second = """
  other: {kind: model, path: elsewhere, lora: {rank: 2, alpha: 4}}
  sft-other:
    kind: sft
    from: other
    data: {path: not-here.jsonl, max_prompt: 30, max_completion: 20}
    steps: 5
    batch: 16
    shapes: {rows: 8}
    optimiser: {learning_rate: 1.0e-4}
answers:"""
    found = read(text=FORK.replace("\nanswers:", second), count=1)
    assert [workload.bases for workload, _ in found] == [("base",), ("other",)]
    assert [workload.model.dtype for workload, _ in found] == ["bfloat16", "float32"]
    zero = load_study(FILMS, [])
    zero = zero.model_copy(update={"stages": {"base": zero.stages["base"]}, "answers": {
        "test": zero.answers["test"].model_copy(update={"stages": ("base",)})
    }})  # fmt: skip
    workload = only_workload(zero, "medgemma-4b")
    assert (workload.stages, workload.model.lora) == ((), None)
    assert workload.evaluation[0].count == 1
    plain = {phase.name: phase for phase in phases(workload, {}, Target(A100, 1))}
    assert list(plain) == ["encode", "answers prefill", "answers decode"], "nothing is merged"
    assert plain["answers decode"].parameters == sum(v.size * 2 for v in whole(workload.model).values())


def test_what_is_counted_and_what_is_limited():
    """The repository's own chain of three stages, with its rows and its tokenizer."""
    config = load_study(REPOSITORY / "configs" / "align" / "tiny_text.yaml")
    ((workload, _),) = workloads_of(config, lambda dtype: A100, 1, compiles=False)
    sft, dpo, grpo = workload.stages
    assert all(update.lengths.known["prompt"].startswith("counted: the longest of") for update in workload.stages)
    assert sft.lengths.prompt <= 96, "the limit that the run keeps"
    assert (sft.layout, dpo.layout, grpo.layout) == ((96, 1, 48), (96, 2, 48), (96, 4, 48))
    assert (sft.steps, dpo.steps) == (round(10 * 96 / 16), round(4 * 48 / 8))
    assert grpo.epoch == 64 / 8
    assert [update.lengths.images for update in workload.stages] == [0, 0, 0]
    assert not workload.encodes, "a vision-language model that is shown no image"
    given = Given(prompt=40, answer=30, completion=20)
    ((workload, _),) = workloads_of(config, lambda dtype: A100, 1, given=given, compiles=False)
    assert {(each.lengths.prompt, each.lengths.answer) for each in workload.stages[:2]} == {(40, 30)}
    assert workload.stages[2].rollout.lengths.completion == 20


def test_lengths_that_nobody_says(read):
    text = FORK.replace("max_prompt: 30, max_completion: 20", "max_prompt: 30")
    (workload, _), *_ = read(text=text)
    assert workload["sft"].lengths.known["answer"] == "the limit of completions"
    with pytest.raises(
        ValueError, match=r"stages.sft: how long prompts are is not known.*tokenizer.json.*--prompt-tokens"
    ):
        read(text=FORK.replace("max_prompt: 30, max_completion: 20", "max_completion: 20"))


def test_images_of_any_size_need_their_tokens():
    """Qwen2.5-VL: given tokens are the prompt's features; encoding is said to be left out."""
    config = load_study(FILMS)
    with pytest.raises(ValueError, match="give --image-tokens"):
        only_workload(config, "qwen2.5-vl-3b", prompt=900)
    workload = only_workload(config, "qwen2.5-vl-3b", prompt=900, image=720)
    batch, _ = update_batch(workload.model, workload["grpo"])
    assert batch.features.shape == (8 * 720, 2048)
    assert (workload.encodes, workload.films) == (False, 0)
    assert any(text.startswith("encoding the images of") for text in workload.left_out)


def test_hours_of_every_stage():
    config = load_study(FILMS, ["stages.base.path=nowhere"])
    found = hours(config, "a100-80", 1, model_configs={"": "medgemma-4b"})
    assert list(found) == ["sft", "grpo"]
    workload = only_workload(config, "medgemma-4b")
    sft, grpo = times(workload, A100, 1).stages
    assert found["sft"] == pytest.approx(1500 * sft.step / SHARE / 3600)
    assert found["grpo"] == pytest.approx(7800 * grpo.step / SHARE / 3600)
    assert hours(config, "a100-80", 8, model_configs={"": "medgemma-4b"})["sft"] < found["sft"] / 4
    with pytest.raises(ValueError, match="unknown device"):
        hours(config, "a100-81", 1)


def test_known_models_by_name():
    assert {"medgemma-4b", "medgemma-27b-text", "llama-3-8b", "openbiollm-8b", "qwen2.5-7b", "qwen2.5-vl-7b"} <= set(
        KNOWN_MODELS
    )
    with pytest.raises(ValueError, match=r"medgemma-5b does not exist.*known: .*medgemma-4b"):
        only_workload(load_study(FILMS), "medgemma-5b")
