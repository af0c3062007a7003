"""A chain on eight devices: the metrics, completions and results of one device; what does not share out is refused."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_tokenizer import family_folder
from transformers import AutoTokenizer, Gemma3TextConfig

from vlmalign.config_yaml import write_yaml
from vlmalign.models.families import read_config
from vlmalign.models.model import Model
from vlmalign.studies.engine.chain import load_study
from vlmalign.studies.engine.run import run
from vlmalign.weights.checkpoint import save_params

pytestmark = pytest.mark.full

TOLERANCE = 1e-5
SHAPES = {"rows": 8, "prompt_multiple": 64, "completion_multiple": 16}


def checkpoint(folder: Path) -> Path:
    """Random weights: one layer, 16 wide, with a vocabulary that eight devices can share."""
    chat = family_folder("gemma3")
    vocab = -(-len(AutoTokenizer.from_pretrained(chat)) // 8) * 8
    config = Gemma3TextConfig(
        vocab_size=vocab, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=512, architectures=["Gemma3ForCausalLM"],
    ).to_dict()  # fmt: skip
    folder.mkdir()
    for path in chat.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    model = Model(read_config(config))
    save_params(folder, model.init(jax.random.key(0)), model, config)
    return folder


def write(path: Path, rows: list[dict]) -> dict:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"path": str(path)}


def question(i: int) -> dict:
    return {"role": "user", "content": f"Is film {i} clear?"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two configs, each for one device and for eight: an adapter through SFT, DPO and GRPO; the whole decoder by SFT."""
    folder = tmp_path_factory.mktemp("chain-mesh")
    model = str(checkpoint(folder / "model"))
    answer = {"role": "assistant", "content": "No effusion is seen."}
    talks = write(folder / "talks.jsonl", [{"messages": [question(i), answer]} for i in range(12)])
    pairs = [
        {"prompt": f"Is film {i} clear?", "chosen": "Yes, it is.", "rejected": f"The heart {i}."} for i in range(8)
    ]
    prompts = write(folder / "prompts.jsonl", [{"messages": [question(i)]} for i in range(12)])
    held_out = write(folder / "held-out.jsonl", [{"messages": [question(i)]} for i in range(20, 25)])
    common = {"shapes": SHAPES, "optimiser": {"name": "sgd", "learning_rate": 0.1}}
    sft = {"kind": "sft", "data": talks, "steps": 2, "batch": 12, **common, "validation": {"data": talks, "every": 1}}
    dpo = {"kind": "dpo", "data": write(folder / "pairs.jsonl", pairs), "steps": 2, "batch": 8, **common}
    grpo = {
        "kind": "grpo", "data": prompts, "steps": 2, "prompts": 8, **common, "objective": {"beta": 0.1},
        "rollout": {"rows": 8, "group": 2, "completion": 16}, "scoring": {"workers": 0},
        "rewards": {"e": {"kind": "pattern", "options": {"pattern": "e"}}},
        "validation": {"data": held_out, "every": 2},
    }  # fmt: skip
    lora = {"rank": 2, "alpha": 4.0, "targets": ["q_proj", "v_proj"], "dropout": 0.1}
    for name, stages, section in (("lora", [sft, dpo, grpo], {"lora": lora}), ("whole", [sft], {"lora": None})):
        for count, mesh in (("one", {}), ("eight", {"mesh": {"data": 8} if name == "lora" else {"fsdp": 8}})):
            config = {"run": str(folder / f"{name}-{count}"), "model": {"path": model, **section}, "stages": stages}
            (folder / f"{name}-{count}.yaml").write_text(write_yaml({**config, **mesh}))
    return folder


@pytest.fixture(scope="module")
def refused(folder, on_eight_devices) -> dict[str, str]:
    """Both configs run on one device here and on eight devices elsewhere; and what those refused."""
    for name in ("lora", "whole"):
        path = folder / f"{name}-one.yaml"
        run(load_study(path), path)
    return on_eight_devices("studies/chain_mesh_program.py", folder)


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_equal_numbers(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=TOLERANCE * max(1.0, abs(value or 0.0))), name


@pytest.mark.parametrize(
    ("name", "stages"), [("lora", ("01-sft", "02-dpo", "03-grpo")), ("whole", ("01-sft",))], ids=["lora", "whole"]
)
def test_metrics_are_those_of_one_device(refused, folder, name, stages):
    """Losses, gradient norms, rewards, and what validation measured, with dropout in SFT."""
    for stage in stages:
        found, expected = (
            rows(folder / f"{name}-{count}" / "stages" / stage / "metrics.jsonl") for count in ("eight", "one")
        )
        assert len(found) == len(expected) == 2
        for ours, theirs in zip(found, expected, strict=True):
            if stage == "02-dpo" and theirs["step"] == 1:
                # Policy and reference are one: which answer is ahead is the sign of rounding.
                assert abs(ours["rewards/margins"]) < 1e-6
                del ours["rewards/accuracies"], theirs["rewards/accuracies"]
            assert_equal_numbers(ours, theirs)


def test_completions_and_rewards_are_those_of_one_device(refused, folder):
    found, expected = (
        rows(folder / f"lora-{count}" / "stages" / "03-grpo" / "completions.jsonl") for count in ("eight", "one")
    )
    assert len(found) == 2 * 8 * 2
    for ours, theirs in zip(found, expected, strict=True):
        assert [ours[key] for key in ("prompt_id", "sample", "completion")] == [
            theirs[key] for key in ("prompt_id", "sample", "completion")
        ]
        assert ours["reward"] == theirs["reward"]
    assert len({row["completion"] for row in found}) > 10


@pytest.mark.parametrize(
    ("name", "file"),
    [("lora", "stages/03-grpo/adapter/adapter_model.safetensors"), ("whole", "stages/01-sft/model/model.safetensors")],
)
def test_results_are_those_of_one_device(refused, folder, name, file):
    found, expected = (load_file(folder / f"{name}-{count}" / file) for count in ("eight", "one"))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert np.max(np.abs(found[key] - value)) <= TOLERANCE * max(1.0, np.max(np.abs(value))), key


def test_a_step_on_the_merged_policy_measures_its_gap(refused, folder):
    """What rollouts cost is in the line, and the merged copy on its mesh is the policy that is trained."""
    for line in rows(folder / "lora-eight" / "stages" / "03-grpo" / "metrics.jsonl"):
        assert 0 <= line["rollout_gap"] <= line["rollout_gap_max"] < 1e-4
        assert 0 < line["decoded_used"] <= 1
        assert 0 < line["prefill_used"] <= 1


def test_what_does_not_share_out_is_refused_before_any_work(refused):
    assert "4 rows cannot be shared out to 8 devices" in refused["stages.0.shapes.rows=4"]
    assert "make stages.01-sft.shapes.rows a multiple of 8" in refused["stages.0.shapes.rows=4"]
    assert "make stages.03-grpo.rollout.rows a multiple of 8" in refused["stages.2.rollout.rows=12"]
    assert "does not fit 8 devices" in refused["mesh.data=3"]
    assert "does not fit 8 devices" in refused["stages.2.rollout.tensor=3"]
