"""A chain of stages: SFT, DPO, GRPO and PPO on a user's files, killed and continued; whose code runs; and bad input, said
before any work starts."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file
from tiny_models import checkpoint, gemma3_text, gemma3_vision, qwen_vision
from tiny_tokenizer import chat_folder, family_folder

from vlmalign.config import ConfigError
from vlmalign.config_yaml import write_yaml
from vlmalign.exporting.sources import find_base, open_adapter
from vlmalign.models.model import Model
from vlmalign.objectives.dpo import DpoSettings
from vlmalign.objectives.entropy import AdaptiveEntropy
from vlmalign.objectives.grpo_settings import GrpoSettings
from vlmalign.objectives.ppo import PpoSettings
from vlmalign.objectives.rollout_correction import RolloutCorrection
from vlmalign.progress import Progress
from vlmalign.studies.engine.base import State, base_devices, open_base
from vlmalign.studies.engine.chain import load_study
from vlmalign.studies.engine.files import Hashes
from vlmalign.studies.engine.objective_config import Adaptive, Correction, DpoObjective, GrpoObjective, PpoObjective
from vlmalign.studies.engine.opened import Opened
from vlmalign.studies.engine.run import Asked, run
from vlmalign.studies.engine.stage_config import TAKEN, Policy
from vlmalign.weights.adapter import load_adapter
from vlmalign.weights.checkpoint import load_config as load_model_config
from vlmalign.weights.checkpoint import load_params
from vlmalign.weights.whole import export_whole

REWARD = """
from vlmalign.rewards.contract import MemoryReward

def length(prompts, completions, *, goal, scale=1.0, **columns):
    return [-scale * abs(len(text) - wanted) / wanted for text, wanted in zip(completions, goal)]

def _count(rows, state):
    return [state["seen"] + 0.0] * len(rows), {"seen": state["seen"] + len(rows)}

count = MemoryReward(lambda: {"seen": 0}, _count)
"""
SHAPES = {"rows": 4, "prompt_multiple": 64, "completion_multiple": 16}
OPTIMISER = {"learning_rate": 1e-2}


# ---------------------------------------------------------------- checkpoints and files


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """Gemma 3 text: one layer, 16 wide."""
    return checkpoint(tmp_path_factory.mktemp("model") / "text", family_folder("gemma3"), gemma3_text())


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, found: list) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in found))
    return path


def user(content) -> dict:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict:
    return {"role": "assistant", "content": content}


def conversation(i: int) -> dict:
    return {"messages": [user(f"Is film {i} clear?"), assistant("Yes." if i % 2 else "No effusion is seen.")]}


def pair(i: int) -> dict:
    return {"prompt": f"Is film {i} clear?", "chosen": "Yes, it is.", "rejected": f"The heart {i} is large."}


def prompt(i: int) -> dict:
    return {"messages": [user(f"Is film {i} clear?")], "goal": 4 + i}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A folder with conversations, pairs, prompts and a user's reward."""
    folder = tmp_path_factory.mktemp("files")
    write(folder / "conversations.jsonl", [conversation(i) for i in range(8)])
    write(folder / "pairs.jsonl", [pair(i) for i in range(8)])
    write(folder / "prompts.jsonl", [prompt(i) for i in range(8)])
    for name, make in (("conversations", conversation), ("pairs", pair), ("prompts", prompt)):
        write(folder / f"{name}-held-out.jsonl", [make(i) for i in range(20, 23)])
    (folder / "my_rewards.py").write_text(REWARD)
    return folder


def sft(files: Path, **changes) -> dict:
    held_out = {"data": {"path": str(files / "conversations-held-out.jsonl")}, "every": 1, "best": "loss"}
    return {
        "kind": "sft", "data": {"path": str(files / "conversations.jsonl")}, "steps": 3, "batch": 4, "shapes": SHAPES,
        "optimiser": OPTIMISER, "checkpoint_every": 2, "validation": held_out, **changes,
    }  # fmt: skip


def dpo(files: Path, **changes) -> dict:
    held_out = {"data": {"path": str(files / "pairs-held-out.jsonl")}, "every": 2}
    return {
        "kind": "dpo", "data": {"path": str(files / "pairs.jsonl")}, "epochs": 1, "batch": 4, "shapes": SHAPES,
        "optimiser": OPTIMISER, "validation": held_out, **changes,
    }  # fmt: skip


def rewards(files: Path, **changes) -> dict:
    own = {"kind": "file", "path": str(files / "my_rewards.py"), "function": "length", "options": {"scale": 0.5}}
    remembers = {"kind": "file", "path": str(files / "my_rewards.py"), "function": "count", "weight": 0.001}
    ready = {"kind": "pattern", "options": {"pattern": "e"}, "weight": 0.1}
    return {"near": {**own, **changes}, "seen": ready, "count": remembers}


def policy(kind: str, files: Path, **changes) -> dict:
    held_out = {"data": {"path": str(files / "prompts-held-out.jsonl")}, "every": 2}
    return {
        "kind": kind, "data": {"path": str(files / "prompts.jsonl")}, "steps": 4, "prompts": 2, "shapes": SHAPES,
        "optimiser": OPTIMISER, "checkpoint_every": 2, "rollout": {"rows": 2, "group": 2, "completion": 16},
        "rewards": rewards(files), "objective": {"beta": 0.1}, "scoring": {"workers": 0}, "validation": held_out,
        **changes,
    }  # fmt: skip


def write_config(path: Path, model: Path, stages: list[dict], **section) -> Path:
    """A config whose run folder is beside it."""
    lora = {"rank": 2, "alpha": 4.0, "targets": ["v_proj", "q_proj"]}
    data = {"run": str(path.parent / "run"), "model": {"path": str(model), "lora": lora, **section}, "stages": stages}
    path.write_text(write_yaml(data))
    return path


def align(path: Path, *overrides: str, asked: Asked = Asked()) -> Path:
    return run(load_study(path, overrides), path, asked)


def stage_of(run: Path, name: str) -> Path:
    return run / "stages" / name


def made(folder: Path) -> dict:
    return json.loads((folder / "made.json").read_text())


# ---------------------------------------------------------------- a whole run


@pytest.fixture(scope="module")
def config_file(tmp_path_factory, text, files) -> Path:
    stages = [sft(files), dpo(files), policy("grpo", files)]
    return write_config(tmp_path_factory.mktemp("whole") / "align.yaml", text, stages)


@pytest.fixture(scope="module")
def finished(config_file) -> Path:
    """The run folder of SFT, then DPO, then GRPO."""
    found = align(config_file)
    assert found == config_file.parent / "run"
    return found


def metrics(folder: Path) -> dict[int, dict]:
    return {row["step"]: row for row in rows(folder / "metrics.jsonl")}


@pytest.mark.full
def test_run_folder_holds_every_stage(finished):
    assert sorted(path.name for path in finished.iterdir()) == [
        ".hashes.json", "environment.json", "report.html", "stages", "study.yaml", "timing.jsonl",
    ]  # fmt: skip
    assert [row["stage"] for row in rows(finished / "timing.jsonl")] == [
        "load model", "stages/01-sft", "stages/02-dpo", "stages/03-grpo", "report",
    ]  # fmt: skip
    assert {name: list(metrics(stage_of(finished, name))) for name in ("01-sft", "02-dpo", "03-grpo")} == {
        "01-sft": [1, 2, 3], "02-dpo": [1, 2], "03-grpo": [1, 2, 3, 4],
    }  # fmt: skip
    digest = hashlib.sha256(REWARD.encode()).hexdigest()
    inputs = made(stage_of(finished, "03-grpo"))["inputs"]
    assert {name: inputs[name] for name in inputs if name.startswith("rewards.")} == {
        "rewards.near": digest, "rewards.count": digest,
    }  # fmt: skip


@pytest.mark.full
def test_a_finished_stage_keeps_its_states_alone(finished):
    for name, states in (("01-sft", {"best", "last"}), ("02-dpo", {"last"}), ("03-grpo", {"last"})):
        folder = stage_of(finished, name)
        assert {path.stem for path in (folder / "states").iterdir()} == states
        assert not (folder / "checkpoints").exists()
        record = made(folder)
        assert record["content"] == {which: digest_of(folder / "states" / f"{which}.safetensors") for which in states}


def digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.full
def test_each_stage_begins_where_the_one_before_ended(finished):
    """Best state of SFT; its policy is DPO's reference, and DPO's is GRPO's."""
    losses = {step: row["validation/loss"] for step, row in metrics(stage_of(finished, "01-sft")).items()}
    sft, second = made(stage_of(finished, "01-sft")), made(stage_of(finished, "02-dpo"))
    assert sft["steps"]["best_step"] == min(losses, key=losses.get)
    assert second["parents"]["from"] == {"node": "stages/01-sft", "which": "best", "id": sft["content"]["best"]}
    first = metrics(stage_of(finished, "02-dpo"))[1]
    assert abs(first["rewards/margins"]) < 1e-5
    assert first["objective"] == pytest.approx(np.log(2), abs=1e-5)
    assert abs(metrics(stage_of(finished, "02-dpo"))[2]["rewards/margins"]) > 1e-3
    assert abs(metrics(stage_of(finished, "03-grpo"))[1]["kl"]) < 1e-9 < metrics(stage_of(finished, "03-grpo"))[4]["kl"]


@pytest.mark.full
def test_adapter_is_what_the_last_stage_ended_with(finished, text):
    expected = load_file(stage_of(finished, "03-grpo") / "states" / "last.safetensors")
    found = load_adapter(stage_of(finished, "03-grpo") / "adapter", load_model_config(text))
    assert found.params.keys() == expected.keys()
    assert all(np.array_equal(found.params[name], value) for name, value in expected.items())
    # `vlmalign export` reads a stage by its own record.
    again = open_adapter(stage_of(finished, "03-grpo"), load_model_config(text))
    assert again.spec == found.spec
    assert find_base(stage_of(finished, "03-grpo")) == text


@pytest.mark.full
def test_validation_scores_greedy_answers_with_the_rewards(finished):
    """The mean and its error are those of the rewards on disk; memory and training see nothing of them."""
    found = metrics(stage_of(finished, "03-grpo"))
    assert [step for step, row in found.items() if "validation/reward" in row] == [2, 4]
    for step in (2, 4):
        own = [
            r
            for r in rows(stage_of(finished, "03-grpo") / "validation-rewards.jsonl")
            if r["step"] == step and "reward" in r
        ]
        values = [row["reward"] for row in own]
        assert found[step]["validation/n"] == len(values) == 3
        assert found[step]["validation/reward"] == pytest.approx(np.mean(values))
        assert found[step]["validation/reward_se"] == pytest.approx(np.std(values, ddof=1) / np.sqrt(3))
        # Four completions were sampled for every update so far, and validation's own are not among them.
        assert [row["parts"]["count"] for row in own] == [4.0 * step] * 3
        assert found[step]["validation/near"] == pytest.approx(np.mean([row["parts"]["near"] for row in own]))
    done = metrics(stage_of(finished, "02-dpo"))[2]
    assert done["validation/n"] == 3
    assert 0 <= done["validation/accuracy"] <= 1
    assert done["validation/loss"] < np.log(2)


@pytest.mark.full
def test_the_users_reward_judges_every_completion(finished):
    found = rows(stage_of(finished, "03-grpo") / "completions.jsonl")
    assert len(found) == 4 * 2 * 2
    for row in found:
        goal = 3 + row["prompt_id"]  # the line, counted from 1, holds film i = line - 1
        assert row["parts"]["near"] == pytest.approx(-0.5 * abs(len(row["completion"]) - goal) / goal)
        assert row["parts"]["count"] == 4 * (row["step"] - 1)
        weighted = (1.0, "near"), (0.1, "seen"), (0.001, "count")
        assert row["reward"] == pytest.approx(sum(weight * row["parts"][name] for weight, name in weighted))
        assert row["prompt"] == f"Is film {row['prompt_id'] - 1} clear?"


@pytest.mark.full
def test_names_that_rewards_cannot_have_are_those_of_the_metrics(finished):
    for row in metrics(stage_of(finished, "03-grpo")).values():
        assert {name for name in row if "/" not in name} - {"near", "seen", "count"} <= set(TAKEN)


@pytest.mark.full
def test_finished_run_does_nothing_again(finished, config_file):
    before = {path: path.read_bytes() for path in finished.rglob("*.jsonl") if path.name != "timing.jsonl"}
    align(config_file)
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.full
def test_killed_run_continues_with_the_same_command(finished, config_file, tmp_path):
    """Kill -9 in the middle of GRPO; the same command ends with the same metrics, completions, rewards and adapter."""
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "vlmalign.cli", "run", str(config_file), "--run", str(folder)]
    lines = stage_of(folder, "03-grpo") / "metrics.jsonl"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 240
        while not (lines.exists() and lines.read_bytes().count(b"\n") >= 1):
            assert process.poll() is None, process.stderr.read().decode()[-2000:]
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert not (stage_of(folder, "03-grpo") / "adapter").exists()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert str(stage_of(folder, "03-grpo") / "adapter") in done.stdout.replace("\n", "")
    assert same_files(folder, finished) == []


#: what a run folder holds of time and place; pages show them
RECORDS = {".hashes.json", "environment.json", "timing.jsonl", "study.yaml", "model_card.md"}


def same_files(one: Path, other: Path) -> list[str]:
    """Files of two runs that differ, but for the records of time and place."""
    names = {
        path.relative_to(folder).as_posix()
        for folder in (one, other)
        for path in folder.rglob("*")
        if path.is_file() and path.name not in RECORDS and path.suffix != ".html"
    }
    return sorted(
        name
        for name in names
        if not ((one / name).exists() and (other / name).exists())
        or (one / name).read_bytes() != (other / name).read_bytes()
    )


# ---------------------------------------------------------------- whose code runs, and what a run is continued with


@pytest.mark.full
def test_a_run_folders_config_never_runs_code(finished, config_file, text, tmp_path):
    """Neither by its name nor through a link; without Python files among its rewards it is a config like any other."""
    link = tmp_path / "link.yaml"
    link.symlink_to(finished / "study.yaml")
    for source in (finished / "study.yaml", link):
        with pytest.raises(ValueError, match=r"names Python files as rewards.*give the config it was started with"):
            align(source)
    inside = shutil.copy(config_file, text / "align.yaml")
    with pytest.raises(ValueError, match=r"lies in the checkpoint .*names Python files as rewards"):
        align(Path(inside))
    Path(inside).unlink()
    ready = '{seen: {kind: pattern, options: {pattern: "e"}}}'
    with pytest.raises(ValueError, match="03-grpo was made from something else: rewards"):
        align(finished / "study.yaml", f"stages.03-grpo.rewards={ready}")


@pytest.fixture
def begun(config_file, finished, files, tmp_path, monkeypatch):
    """A copy of the run, its config and its files, which may be changed; paths are relative to the working directory."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(files, "files", ignore=shutil.ignore_patterns("films"))
    shutil.copytree(finished, "run")
    own = Path("align.yaml")
    own.write_text(config_file.read_text().replace(str(files), "files").replace(str(finished), "run"))
    return own


@pytest.mark.full
@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("my_rewards.py", REWARD + "\n", r"stages/03-grpo was made from something else: rewards.count has changed"),
        ("pairs.jsonl", None, r"stages/02-dpo was made from something else: data has changed"),
    ],
)
def test_a_changed_file_is_refused(begun, file, content, expected):
    align(begun)
    path = Path("files", file)
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))) if content is None else content)
    with pytest.raises(ValueError, match=expected):
        align(begun)


@pytest.mark.full
def test_a_changed_setting_is_refused_by_name_and_redo_makes_what_follows_again(begun):
    """Only the stage that differs is named; setting it aside sets what was made from it aside, and nothing else."""
    sft = made(stage_of(Path("run"), "01-sft"))
    rate = "stages.1.optimiser.learning_rate=0.02"
    with pytest.raises(
        ValueError, match=r"stages/02-dpo was made from .*: optimiser.learning_rate: 0.01 then, 0.02 now"
    ):
        align(begun, rate)
    align(begun, rate, asked=Asked(redo=("02-dpo",)))
    assert made(stage_of(Path("run"), "01-sft")) == sft
    assert made(stage_of(Path("run"), "02-dpo"))["settings"]["optimiser"]["learning_rate"] == 0.02
    assert sorted(path.name for path in Path("run/set-aside/1/stages").iterdir()) == ["02-dpo", "03-grpo"]


@pytest.mark.full
def test_a_free_setting_makes_nothing_stale(begun):
    """Rows of micro-batches change nothing but rounding; a finished run has nothing to do."""
    align(begun)  # the report is made again by every run
    before = {path: path.stat().st_mtime_ns for path in Path("run").glob("*/*/**/made.json")}
    assert len(before) >= 3
    align(begun, "stages.0.shapes.rows=2", "stages.2.rollout.rows=1")
    assert {path: path.stat().st_mtime_ns for path in Path("run").glob("*/*/**/made.json")} == before
    assert not Path("run/set-aside").exists()


@pytest.mark.full
def test_an_earlier_layout_is_refused(begun):
    Path("old").mkdir()
    Path("old/config.yaml").write_text("run: old\n")
    with pytest.raises(ValueError, match=r"old holds a run of vlmalign 0.1 \(config.yaml\), which only that version"):
        align(begun, "run=old")


@pytest.mark.full
def test_a_folder_of_another_study_is_refused(begun):
    Path("run/stages").rename("run/sets")
    with pytest.raises(ValueError, match=r"run holds another study: sets/01-sft, .*choose another run folder"):
        align(begun)


# ---------------------------------------------------------------- other models, other stages


@pytest.mark.full
def test_full_fine_tuning_ends_in_a_checkpoint(text, files, tmp_path):
    """The whole decoder by PPO, two updates a rollout: a folder that loads, without the value head."""
    ppo = policy(
        "ppo",
        files,
        steps=2,
        updates=2,
        kl_in_reward=0.05,
        validation=None,
        rollout={"rows": 2, "group": 1, "completion": 16},
    )
    path = write_config(tmp_path / "align.yaml", text, [ppo], lora=None)
    stage = align(path) / "stages" / "01-ppo"
    folder = stage / "model"
    expected = load_file(stage / "states" / "last.safetensors")
    model = Model(load_model_config(folder))
    found, before = load_params(folder, model), load_params(text, model)
    assert set(expected) == set(found), "without the value head"
    assert all(np.array_equal(found[name], expected[name]) for name in found)
    assert all(not np.array_equal(found[name], before[name]) for name in found), "every matrix and norm was trained"
    assert {path.name for path in folder.iterdir()} == {path.name for path in text.iterdir()}
    line = metrics(tmp_path / "run" / "stages" / "01-ppo")
    assert {name for row in line.values() for name in row} - {"near", "seen", "count"} <= set(TAKEN)
    assert line[1]["ratio"] == pytest.approx(1.0, abs=1e-5)
    assert line[2]["ratio"] != line[1]["ratio"]


@pytest.fixture(scope="module")
def films(files) -> Path:
    """Rows with images beside them: none, one, or two of other sizes."""
    folder = files / "films"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, size in (("a", (56, 84)), ("b", (84, 56)), ("c", (56, 56))):
        Image.fromarray(rng.integers(0, 255, size, np.uint8)).save(folder / f"{name}.png")

    def seen(question: str, *names: str) -> dict:
        parts = [{"type": "image", "image": f"{name}.png"} for name in names]
        return user([*parts, {"type": "text", "text": question}])

    turns = [seen("Clear?", "a"), seen("Which is clear?", "b", "c"), user("What is a film?"), seen("And this?", "a")]
    write(folder / "conversations.jsonl", [{"messages": [turn, assistant("Yes.")]} for turn in turns])
    write(folder / "pairs.jsonl", [{"prompt": [turn], "chosen": "Yes.", "rejected": "No effusion."} for turn in turns])
    write(folder / "prompts.jsonl", [{"messages": [turn], "goal": 5} for turn in turns])
    return folder


@pytest.mark.full
def test_sampling_with_images(files, films, tmp_path, capfd):
    """MedGemma's architecture: none to two images in a prompt, in rollouts as in training; read ahead, and kept resized."""
    model = checkpoint(tmp_path / "model", chat_folder(), gemma3_vision(chat_folder()))
    stage = policy("grpo", films, steps=1, checkpoint_every=1, prompts=4, validation=None, rewards=rewards(files))
    path = write_config(tmp_path / "align.yaml", model, [stage])
    reading = "reading={workers: 1, ahead: 4, resize_cache: '{run}/resized'}"
    adapter = load_adapter(align(path, reading) / "stages" / "01-grpo" / "adapter", load_model_config(model)).params
    said = capfd.readouterr()
    assert "images: 3 films, waited" in said.out + said.err
    assert len([path for path in (tmp_path / "run" / "resized").rglob("*") if path.is_file()]) >= 3
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("film reader")]
    assert all(np.isfinite(value).all() for value in adapter.values())
    assert any(np.asarray(value).any() for name, value in adapter.items() if ".lora_B." in name)
    # What the sampler recorded is what the trainer computes: images stand where they should in both.
    assert metrics(tmp_path / "run" / "stages" / "01-grpo")[1]["rollout_gap_max"] < 1e-4
    found = rows(tmp_path / "run" / "stages" / "01-grpo" / "completions.jsonl")
    shown = {row["prompt_id"]: [Path(image).name for image in row["images"]] for row in found}
    assert shown == {1: ["a.png"], 2: ["b.png", "c.png"], 3: [], 4: ["a.png"]}


@pytest.mark.full
def test_full_fine_tuning_with_images(films, tmp_path):
    """Qwen2.5-VL by DPO on images of several sizes: the decoder is trained, the tower is carried over bit for bit."""
    chat = family_folder("qwen2_5_vl")
    model = checkpoint(tmp_path / "model", chat, qwen_vision(chat))
    run = align(write_config(tmp_path / "align.yaml", model, [dpo(films, validation=None)], lora=None))
    folder = run / "stages" / "01-dpo" / "model"
    assert abs(metrics(tmp_path / "run" / "stages" / "01-dpo")[1]["rewards/margins"]) < 1e-5
    plain = Model(load_model_config(folder))
    found, before = load_params(folder, plain), load_params(model, plain)
    changed = {name for name in found if not np.array_equal(found[name], before[name])}
    assert changed == {name for name in found if not name.startswith("visual.")}


def test_a_whole_model_keeps_names_dtypes_and_files(text, tmp_path):
    """A tied head that the file repeats follows the embedding; values are rounded once; what cannot be held is refused."""
    source = shutil.copytree(text, tmp_path / "source")
    tensors = {name: value.astype(jnp.bfloat16) for name, value in load_file(source / "model.safetensors").items()}
    norm, table = "model.norm.weight", "model.embed_tokens.weight"
    tensors |= {"lm_head.weight": tensors[table], norm: tensors[norm].astype(np.float16)}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    model = Model(load_model_config(source))
    params = {name: value + 1 / 3 for name, value in load_params(source, model).items()}
    export_whole(tmp_path / "out", source, model, params)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: (v.shape, v.dtype) for name, v in found.items()} == {
        n: (v.shape, v.dtype) for n, v in tensors.items()
    }
    wide = np.asarray(params["language_model.embed_tokens.weight"])
    assert np.array_equal(found[table], wide.astype(jnp.bfloat16))
    assert np.array_equal(found["lm_head.weight"], found[table])
    assert np.array_equal(found[norm], np.asarray(params["language_model.norm.weight"]).astype(np.float16))
    with pytest.raises(
        ValueError, match=r"language_model.norm.weight holds a number that model.norm.weight cannot, .*F16"
    ):
        export_whole(tmp_path / "large", source, model, params | {"language_model.norm.weight": jnp.full((16,), 1e5)})
    with pytest.raises(ValueError, match=r"parameters that .*source does not have: value_head.bias"):
        export_whole(tmp_path / "odd", source, model, params | {"value_head.bias": jnp.zeros(())})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


@pytest.mark.full
def test_an_adapter_is_gone_on_from(finished, text, files, tmp_path):
    """Its values are the first policy, frozen as the reference; other settings than its own are refused."""
    folder = stage_of(finished, "03-grpo")
    path = write_config(tmp_path / "align.yaml", text, [dpo(files, validation=None)], adapter=str(folder / "adapter"))
    config = load_study(path)
    study = Opened(config, Hashes(tmp_path / "hashes.json"), config)
    expected = load_file(folder / "states" / "last.safetensors")
    found = study.adapters["adapter"].params
    assert all(np.array_equal(found[name], value) for name, value in expected.items())
    with Progress() as progress:
        front = study.front("base")
        devices = base_devices(config.stages["base"], front, None, whole=False)
        base = open_base(front, devices, config.reading, progress)
    model, extra = base.reference(State(found, study.spec("01-dpo")))
    assert model == base.model(study.spec("01-dpo"))
    assert all(np.array_equal(extra[name], value) for name, value in expected.items())
    with pytest.raises(
        ValueError, match=r"stages.adapter.lora must be as in the adapter .*found another rank, magnitude; .*rank: 2"
    ):
        align(path, "model.lora.rank=4", "model.lora.magnitude=true")
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- bad input, said before any work


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("stages.0.epoch=3", r"stages.0.epoch: unknown key; the nearest known key is stages.0.epochs"),
        ("stages.0.kind=stf", r"stages.0.kind: expected one of .* found 'stf'; the nearest is 'sft'"),
        ("stages.0.epochs=1", r"stages.0: give either epochs or steps, found both"),
        ("stages.0.validation.best=null ; stages.0.validation.patience=2", r"patience needs to know what is better"),
        (
            "stages.0.validation.best=accuracy",
            r"stages.0: validation.best: expected 'loss', found 'accuracy'; numbers of answers need",
        ),
        ("stages.1.objective.beta=-0.1", r"stages.1.objective: beta and discopop_tau must be > 0; found -0.1"),
        ("stages.1.objective.losses=[sigmoyd]", r"preference loss must be one of .*did you mean sigmoid"),
        ("stages.2.objective.beta=-1", r"stages.2.objective: beta must be >= 0, found -1"),
        ("stages.2.objective.loss=dappo", r"did you mean dapo"),
        ("stages.2.rollout.group=1", r"rollout.group must be >= 2 to compare completions of a prompt, found 1"),
        ("stages.2.updates=3", r"steps must be a multiple of updates = 3, found 4"),
        ("stages.2.updates=4", r"checkpoint_every must be a multiple of updates = 4, found 2"),
        ("stages.2.overlong_buffer=17", r"overlong_buffer must be <= rollout.completion = 16, found 17"),
        ("stages.2.kl_in_reward=-1", r"stages.2.kl_in_reward: .*greater than or equal to 0"),
        ("stages.2.normalise_first={far: 1.0}", r"normalise_first names 'far', but the rewards are near, seen, count"),
        (
            "stages.2.overlong_buffer=4 ; stages.2.normalise_first={near: 1.0}",
            r"give the penalty a weight .*overlong: 1.0",
        ),
        ("stages.2.rewards={}", r"stages.2.rewards: "),
        ("stages.2.rewards={near: {kind: length, weight: 0, options: {low: 9}}}", r"every reward has weight 0"),
        (
            "stages.2.rewards.kl={kind: pattern, options: {pattern: x}}",
            r"a reward cannot be called 'kl'.*call it my_kl",
        ),
        ("stages.2.rewards.seen.kind=patern", r"found 'patern'; the nearest is 'pattern'"),
        (
            "stages.2.rewards.seen.options={patern: x}",
            r"options.patern: reward pattern has no such option; the nearest is 'pattern'",
        ),
        ("stages.2.rewards.seen.options={}", r"reward pattern needs options.pattern"),
        ("stages.2.rewards.near.sha256=abc", r"sha256 must be 64 hexadecimal digits, found 'abc'"),
        ("stages=[]", r"stages: expected at least one stage, found none"),
        ("seed=-1", r"seed: "),
        ("model.lora=null ; model.adapter=x", r"adapter needs a section lora"),
        ("model.lora.targets=[qkv_proj]", r"write q_proj, k_proj, v_proj"),
        ("model.dtype=float16", r"model.dtype: expected 'float32' or 'bfloat16', found 'float16'"),
    ],
)
def test_bad_config(config_file, override, expected):
    with pytest.raises(ConfigError, match=expected):
        load_study(config_file, override.split(" ; "))


MESSAGES = {"messages": [user("Clear?"), assistant("Yes.")]}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"conversations": ["{"]}, r"conversations.jsonl:1: not a line of JSON .*set on_bad to skip"),
        ({"conversations": [MESSAGES, {"message": []}]}, r"conversations.jsonl:2: expected an object {\"messages\""),
        (
            {"conversations": [{"messages": [user("Clear?")]}]},
            r"conversations.jsonl:1: its messages do not end with an answer",
        ),
        ({"conversations": [MESSAGES] * 3}, r"stages.01-sft: .* gives 3 rows, fewer than batch = 4"),
        (
            {"pairs": [pair(0), {"prompt": "Clear?", "chosen": "Yes.", "rejected": "Yes."}]},
            r"pairs.jsonl:2: .*same tokens",
        ),
        ({"pairs": [pair(0), {"prompt": "Clear?", "chosen": "Yes."}]}, r'pairs.jsonl:2: no "rejected"'),
        ({"prompts": [{"messages": [user("Clear?")]}] * 2}, r"reward 'near' needs the column 'goal', found no columns"),
        (
            {"prompts": [prompt(0), {**prompt(1), "more": 1}]},
            r"prompts.jsonl:2 has a column 'more', prompts.jsonl:1 has not",
        ),
        ({"prompts": [prompt(0) | {"completions": 1}] * 2}, r"a column is called 'completions'.*rename it"),
        ({"prompts": [{**MESSAGES, "goal": 1}] * 2}, r"prompts.jsonl:1: the last turn is an answer"),
        ({"prompts": [prompt(0) | {"scale": 1}] * 2}, r"reward 'near' has an option 'scale', which is also a column"),
        (
            {"prompts-held-out": [{"messages": [user("?")], "gaol": 1}]},
            r"held-out.jsonl: reward 'near' needs the column 'goal', found gaol",
        ),
        ({"prompts-held-out": []}, r"prompts-held-out.jsonl has no row to use"),
        (
            {"my_rewards.py": "def width(prompts, completions, **columns): ..."},
            r"has no reward 'length', found \['width'\]",
        ),
        ({"my_rewards.py": "def length(prompts): ..."}, r"expected reward\(prompts, completions, \*\*columns\)"),
        ({"my_rewards.py": "import nowhere_to_be_found"}, r"cannot be run: ModuleNotFoundError"),
        ({"my_rewards.py": None}, r"found no file at .*my_rewards.py"),
        ({"pairs": None}, r"no file .*pairs.jsonl; the working directory is"),
    ],
)
def test_bad_files(text, files, tmp_path, change, expected):
    """Said in words with file and line, before a run folder is made."""
    copy = shutil.copytree(files, tmp_path / "files", ignore=shutil.ignore_patterns("films"))
    for name, content in change.items():
        path = copy / (name if name.endswith(".py") else f"{name}.jsonl")
        if content is None:
            path.unlink()
        elif isinstance(content, str):
            path.write_text(content)
        else:
            write(path, content)
    path = write_config(tmp_path / "align.yaml", text, [sft(copy), dpo(copy), policy("grpo", copy)])
    with pytest.raises(ValueError, match=expected):
        align(path)
    assert not (tmp_path / "run").exists()


def test_another_file_than_the_config_was_written_for(config_file, tmp_path):
    with pytest.raises(ValueError, match=r"has SHA-256 [0-9a-f]{64}, expected 0{64}"):
        align(config_file, f"stages.2.rewards.near.sha256='{'0' * 64}'", f"run={tmp_path / 'run'}")


def read_all(path: Path, *overrides: str) -> dict:
    """What the stages of a config read, without a run."""
    config = load_study(path, overrides)
    study = Opened(config, Hashes(path.parent / "hashes.json"), config)
    for name, stage in config.trained.items():
        if isinstance(stage, Policy):
            study.build_rewards(name)
        study.open_stage(name, print)
    return study.texts


LONG = "Is the heart enlarged? " * 20


@pytest.fixture
def with_long_rows(text, files, tmp_path) -> Path:
    copy = shutil.copytree(files, tmp_path / "files", ignore=shutil.ignore_patterns("films"))
    asked = [{"messages": [user(LONG), assistant("Yes.")]}, {"messages": [user("Clear?"), assistant(LONG)]}]
    write(copy / "conversations.jsonl", [*asked, *(conversation(i) for i in range(6))])
    write(
        copy / "pairs.jsonl", [{**pair(0), "chosen": LONG}, {**pair(1), "prompt": LONG}, *(pair(i) for i in range(6))]
    )
    write(copy / "prompts.jsonl", [prompt(i) for i in range(3)] + [{"messages": [user(LONG)], "goal": 1}])
    stages = [sft(copy), dpo(copy), policy("grpo", copy)]
    for stage, limits in zip(stages, ({"max_completion": 16}, {"max_completion": 16}, {}), strict=True):
        stage["data"] |= {"max_prompt": 64, **limits}
    return write_config(tmp_path / "align.yaml", text, stages)


@pytest.mark.parametrize(
    ("stage", "line"),
    [
        (0, "conversations.jsonl:1: the prompt"),
        (1, "pairs.jsonl:1: a continuation"),
        (2, "prompts.jsonl:4: the prompt"),
    ],
)
def test_rows_too_long_stop_the_run_by_default(with_long_rows, stage, line):
    others = [f"stages.{i}.data.on_long=skip" for i in range(3) if i != stage]
    with pytest.raises(ValueError, match=rf"{line} has \d+ tokens, more than (64|16); raise the limit"):
        # Bad rows may be skipped, long ones are another matter.
        read_all(with_long_rows, *others, f"stages.{stage}.data.on_bad=skip")


@pytest.mark.parametrize("on_long", ["skip", "truncate"])
def test_rows_too_long_are_left_out_or_cut_and_listed(with_long_rows, on_long):
    overrides = [f"stages.{i}.data.on_long={on_long}" for i in range(2)] + ["stages.2.data.on_long=skip"]
    data = read_all(with_long_rows, *overrides)
    cut = on_long == "truncate"
    left_out = [d.train.left_out for d in data.values()]
    assert [sum(left.what == "skipped" for left in part) for part in left_out] == ([1, 1, 1] if cut else [2, 2, 1])
    assert [sum(left.what == "truncated" for left in part) for part in left_out] == [int(cut), int(cut), 0]
    assert max(len(c) for d in list(data.values())[:2] for g in d.train.items for c in g.continuations) <= 16
    assert [(left.name, left.what) for left in left_out[0]] == [
        ("conversations.jsonl:1", "skipped"), ("conversations.jsonl:2", "truncated" if cut else "skipped"),
    ]  # fmt: skip
    assert "the prompt has" in left_out[0][0].reason


def test_bad_rows_are_skipped_and_listed_where_that_is_asked_for(with_long_rows):
    """A row that is no JSON, one whose image is torn, and two equal answers; again when the run is continued."""
    copy = with_long_rows.parent / "files"
    torn = {
        "messages": [user([{"type": "image", "image": "torn.png"}, {"type": "text", "text": "?"}]), assistant("Yes.")]
    }
    write(copy / "conversations.jsonl", ["{", torn, *(conversation(i) for i in range(6))])
    write(copy / "pairs.jsonl", [pair(0) | {"rejected": "Yes, it is."}, *(pair(i) for i in range(6))])
    write(copy / "prompts.jsonl", [prompt(0), prompt(1) | {"messages": []}, prompt(2)])
    data = read_all(with_long_rows, *(f"stages.{i}.data.on_bad=skip" for i in range(3)))
    assert [[left.name for left in d.train.left_out] for d in data.values()] == [
        ["conversations.jsonl:1", "conversations.jsonl:2"], ["pairs.jsonl:1"], ["prompts.jsonl:2"],
    ]  # fmt: skip
    assert [len(d.train.items) for d in data.values()] == [6, 6, 2]


# ---------------------------------------------------------------- configs


@pytest.mark.parametrize(
    ("section", "settings", "without", "renamed"),
    [
        (DpoObjective, DpoSettings, set(), {}),
        (GrpoObjective, GrpoSettings, {"max_completion"}, {"correction": "rollout"}),
        (PpoObjective, PpoSettings, set(), {}),
        (Correction, RolloutCorrection, set(), {}),
        (Adaptive, AdaptiveEntropy, set(), {}),
    ],
)
def test_sections_have_the_fields_and_defaults_of_what_they_set(section, settings, without, renamed):
    found = {renamed.get(name, name): field.default for name, field in section.model_fields.items()}
    expected = {field.name: field.default for field in dataclasses.fields(settings)}
    assert found == {name: value for name, value in expected.items() if name not in without}


def test_sections_reach_the_settings():
    objective = GrpoObjective(beta=0.3, correction={"mode": "token_mask"}, adaptive_entropy={"target": 0.5})
    found = objective.settings(64)
    assert (found.beta, found.max_completion) == (0.3, 64)
    assert found.rollout == RolloutCorrection("token_mask")
    assert found.adaptive_entropy == AdaptiveEntropy(target=0.5)


@pytest.mark.parametrize("name", ["tiny_text", "medgemma_dpo", "qwen_grpo"])
def test_shipped_configs_are_read(repository, monkeypatch, name):
    monkeypatch.chdir(repository)
    path = Path(f"configs/align/{name}.yaml")
    assert load_study(path, ["seed=7"]).seed == 7
    if name == "tiny_text":  # whose files are here
        data = read_all(path, f"run={repository / 'runs' / 'nowhere'}")
        assert [len(d.train.items) for d in data.values()] == [96, 48, 64]
        assert not any(d.train.left_out or d.validation.left_out for d in data.values())
