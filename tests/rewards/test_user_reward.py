"""A user's reward file runs as it was hashed, here and in workers, and never out of a run folder or a checkpoint."""

import hashlib

import pytest

from vlmalign.rewards.contract import MemoryReward
from vlmalign.rewards.runner import RewardRunner
from vlmalign.rewards.user_file import TURNS, OnMessages, load_user_reward

SOURCE = """
from __future__ import annotations
from dataclasses import dataclass
from vlmalign.rewards.contract import MemoryReward

@dataclass
class Weight:  # dataclasses look their module up by name
    value: float

def dose(prompts, completions, *, units, **columns):
    return [Weight(float(u)).value for u in units]

def trl_style(completions, **kwargs):
    return [float(len(c)) for c in completions]

async def judge(prompts, completions, **columns):
    return [1.0] * len(completions)

remembers = MemoryReward(lambda: {}, lambda rows, state: ([2.0] * len(rows), state))
closed = lambda prompts, completions: []
number = 3

if __name__ == "__main__":
    raise SystemExit("not for you")
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "my_rewards.py"
    path.write_text(SOURCE)
    return path


def test_it_is_known_by_its_hash(file):
    digest = hashlib.sha256(SOURCE.encode()).hexdigest()
    found = load_user_reward(file, "dose")
    assert (found.sha256, found.path) == (digest, file)
    assert load_user_reward(str(file), "dose", digest.upper()).sha256 == digest
    with pytest.raises(ValueError, match=f"has SHA-256 {digest}, expected 0000: .*look at what changed"):
        load_user_reward(file, "dose", "0000")


def test_workers_run_what_was_hashed_whatever_becomes_of_the_file(file):
    rewards = {name: (load_user_reward(file, name).reward, 1.0) for name in ("dose", "trl_style", "judge", "remembers")}
    file.write_text("raise RuntimeError('edited while the run was under way')")
    with RewardRunner(rewards, workers=1) as runner:
        scored = runner.score(["p", "p"], ["a", "bb"], {"units": [75, 150]})
        assert scored.faults == ()
        assert scored.rewards == [75.0 + 1 + 1 + 2, 150.0 + 2 + 1 + 2]
        with pytest.raises(ValueError, match=r"reward 'dose' needs the columns \['units'\]"):
            runner.score(["p"], ["a"], {})


def test_a_file_may_import_modules_beside_it(tmp_path):
    (tmp_path / "units_of_these_rewards.py").write_text("FACTOR = 3.0\n")
    path = tmp_path / "scaled.py"
    path.write_text(
        "from units_of_these_rewards import FACTOR\n"
        "def scaled(prompts, completions, **columns):\n    return [FACTOR * len(c) for c in completions]\n"
    )
    with RewardRunner({"scaled": (load_user_reward(path, "scaled").reward, 1.0)}, workers=1) as runner:
        assert runner.score(["p"], ["ab"], {}).rewards == [6.0]


def test_a_reward_of_trl_s_conversations_is_called_as_trl_calls_it(tmp_path):
    path = tmp_path / "conversational.py"
    path.write_text(
        "def reward(prompts, completions, *, factor, **columns):\n"
        "    assert 'prompt_messages' not in columns\n"
        "    return [f * (len(p[-1]['content']) + len(c[0]['content']) + (c[0]['role'] == 'assistant'))"
        " for p, c, f in zip(prompts, completions, factor)]\n"
    )
    plain = load_user_reward(path, "reward").reward
    columns = {"factor": [1], TURNS: [[{"role": "system", "content": "?"}, {"role": "user", "content": "abc"}]]}
    with RewardRunner({"r": (OnMessages(plain), 1.0)}, workers=1) as runner:
        assert runner.score(["system: ?\nuser: abc"], ["four"], columns).rewards == [8.0]
        assert runner.score(["ab"], ["four"], {"factor": [1]}).rewards == [7.0], "without turns, a prompt is the user's"


def test_a_pair_with_memory_may_come_from_a_file(file):
    assert isinstance(load_user_reward(file, "remembers").reward, MemoryReward)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", r"has no reward 'nothing', found .*'dose'.*name one"),
        ("closed", r"my_rewards.py:closed'.*found \(prompts, completions\); add \*\*columns"),
        ("number", "must be a function or a MemoryReward, found int"),
    ],
)
def test_mistakes_in_a_file_are_told(file, name, message):
    with pytest.raises(ValueError, match=message):
        load_user_reward(file, name)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def (", "cannot be run: SyntaxError"),
        ("import no_such_module", "cannot be run: ModuleNotFoundError"),
        ("raise SystemExit('bye')", "cannot be run: SystemExit: bye"),
    ],
)
def test_a_file_that_cannot_be_run_is_told(file, source, message):
    file.write_text(source)
    with pytest.raises(ValueError, match=message):
        load_user_reward(file, "dose")


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(ValueError, match="found no file at"):
        load_user_reward(tmp_path / "none.py", "dose")


UNTRUSTED = {
    "run folder": ["config.yaml", "environment.json"],
    "run folder of a study": ["study.yaml", "timing.jsonl"],
    "run folder without its record": ["config.yaml", "metrics.jsonl"],
    "checkpoint of training": ["_CHECKPOINT_METADATA"],
    "checkpoint of a model": ["config.json", "model.safetensors"],
    "checkpoint of an adapter": ["adapter_model.safetensors"],
}


@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize("kind", UNTRUSTED)
def test_code_is_never_run_from_a_run_folder_or_a_checkpoint(tmp_path, kind, linked):
    folder = tmp_path / "received"
    (folder / "deep" / "er").mkdir(parents=True)
    for name in UNTRUSTED[kind]:
        (folder / name).touch()
    path = folder / "deep" / "er" / "rewards.py"
    path.write_text("raise RuntimeError('it ran')")
    if linked:
        link = tmp_path / "innocent.py"
        link.symlink_to(path)
        path = link
    with pytest.raises(
        ValueError, match=f"lies in the {kind.split(' of')[0].split(' without')[0]} .*code is never run from there"
    ):
        load_user_reward(path, "dose")
    with pytest.raises(ValueError, match="it ran"):
        load_user_reward(path, "dose", trusted=True)


def test_a_config_alone_makes_no_run_folder(file):
    (file.parent / "config.yaml").touch()
    assert load_user_reward(file, "dose").path == file
