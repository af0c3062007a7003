"""Outcomes are on disk before they are used: a step is read back whole or not at all, also after a kill."""

import json
from contextlib import closing

import pytest

from vlmalign.rewards.contract import MemoryReward
from vlmalign.rewards.outcomes import OutcomeFile, digest, score_or_replay
from vlmalign.rewards.runner import RewardRunner, RowFault, ScoredBatch
from vlmalign.training.recorded_rewards import RecordedRewards

KEYS = [(17, 0), (17, 1), ("q", 0)]
DIGESTS = ["a", "b", "c"]
SCORED = ScoredBatch(
    [0.1, None, 1 / 3],
    {"labels": [0.1, None, 1 / 3], "judge": [None, 2.0, None]},
    (RowFault("labels", 1, "timeout", "no answer"), RowFault("judge", 0, "crash", "gone")),
)
MEMORY = {"collapse": {"window": [["Edema"]]}}


@pytest.fixture
def path(tmp_path):
    """A file of steps 1, 2 and 5."""
    path = tmp_path / "grpo" / "outcomes.jsonl"
    file = OutcomeFile(path)
    for step in (1, 2, 5):
        file.write(step, KEYS, DIGESTS, SCORED, MEMORY)
    file.close()
    return path


def test_a_step_reads_back_as_it_was_written(path):
    file = OutcomeFile(path)
    assert (file.steps, file.dropped) == ((1, 2, 5), 0)
    for step in file.steps:
        assert file.read(step) == (tuple(KEYS), tuple(DIGESTS), SCORED, MEMORY)
    with pytest.raises(ValueError, match="holds no step 3; found 3 steps"):
        file.read(3)


def test_every_line_is_keyed_and_readable_alone(path):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line.get("prompt"), line.get("sample")) for line in lines[:4]] == [
        (1, 17, 0),
        (1, 17, 1),
        (1, "q", 0),
        (1, None, None),
    ]
    assert lines[1] == {
        "step": 1,
        "prompt": 17,
        "sample": 1,
        "digest": "b",
        "reward": None,
        "parts": {"labels": None, "judge": 2.0},
        "faults": {"labels": ["timeout", "no answer"]},
    }


def test_cut_anywhere_it_opens_with_the_whole_steps_and_continues(path):
    """Wherever a kill cuts the file, whole steps stay; the rest is dropped, counted, and can be written again."""
    data = path.read_bytes()
    lines = data.splitlines(keepends=True)
    assert len(lines) == 12
    bounds = [sum(map(len, lines[:n])) for n in range(13)]
    near = {bound + shift for bound in bounds for shift in (-2, -1, 0, 1)}
    for cut in sorted((near | set(range(0, len(data), 97))) & set(range(len(data)))):
        path.write_bytes(data[:cut])
        file = OutcomeFile(path)
        steps = sum(end <= cut for end in bounds[4::4])
        assert file.steps == (1, 2, 5)[:steps]
        assert file.dropped == len(data[bounds[4 * steps] : cut].splitlines())
        assert path.read_bytes() == data[: bounds[4 * steps]]
        file.close()
    assert file.steps == (1, 2)
    file = OutcomeFile(path)
    file.write(5, KEYS, DIGESTS, SCORED, MEMORY)
    file.close()
    assert path.read_bytes() == data


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: ["{", *lines[1:]], "line 1, is not a line of outcomes"),
        (lambda lines: [*lines[:1], *lines[2:]], "line 3, closes step 1 with 3 completions, found 2"),
        (lambda lines: [*lines[:3], *lines[4:]], "line 4, is of step 2, while step 1 has no end"),
        (lambda lines: lines[:4] + lines[:4], "line 8, closes step 1"),
    ],
)
def test_a_file_that_was_changed_is_refused_and_left_alone(path, change, message):
    lines = change(path.read_text().splitlines())
    path.write_text("\n".join(lines) + "\n")
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message):
        OutcomeFile(path)
    assert path.read_bytes() == before


def test_steps_only_grow_unless_dropped(path):
    file = OutcomeFile(path)
    with pytest.raises(ValueError, match=r"holds steps up to 5, cannot append step 2; read it, or call drop_from\(2\)"):
        file.write(2, KEYS, DIGESTS, SCORED, MEMORY)
    file.drop_from(2)
    file.write(2, KEYS, DIGESTS, SCORED, {})
    file.close()
    file = OutcomeFile(path)
    assert file.steps == (1, 2)
    assert file.read(2).memory == {}


def test_a_key_given_twice_is_refused(path):
    file = OutcomeFile(path)
    with pytest.raises(ValueError, match=r"step 6: expected every \(prompt, sample\) once, found \(17, 0\)"):
        file.write(6, [(17, 0), (17, 1), (17, 0)], DIGESTS, SCORED, MEMORY)


# Scoring through the file


def moody(answers):
    """A reward that would answer differently if it were asked again, and one that counts."""

    def judge(prompts, completions, **columns):
        return [answers.pop(0) for _ in completions]

    def count(rows, state):
        return [float(state + i) for i in range(len(rows))], state + len(rows)

    return {"judge": (judge, 1.0), "count": (MemoryReward(lambda: 0, count), 0.0)}


def play(path, rewards, step, texts, state=None):
    file = OutcomeFile(path)
    with RewardRunner(rewards, workers=0) as runner:
        if state is not None:
            runner.set_state(state)
        keys = [(0, sample) for sample in range(len(texts))]
        scored = score_or_replay(
            runner, file, step=step, keys=keys, prompts=["p"] * len(texts), completions=texts, columns={}
        )
        file.close()
        return scored, runner.get_state()


def test_a_step_on_file_is_not_asked_again_and_leaves_the_same_memory(tmp_path):
    path, answers = tmp_path / "outcomes.jsonl", [0.5, None, 0.25, 7.0]
    rewards = moody(answers)
    first, state = play(path, rewards, 1, ["a", "b", "c"])
    assert first.rewards == [0.5, None, 0.25]
    assert answers == [7.0]
    assert play(path, rewards, 1, ["a", "b", "c"]) == (first, state)
    assert answers == [7.0]  # nobody was asked
    second, _ = play(path, rewards, 2, ["d"], state)
    assert second.parts == {"judge": [7.0], "count": [3.0]}


def test_a_step_of_other_completions_or_rewards_is_refused(tmp_path):
    path = tmp_path / "outcomes.jsonl"
    play(path, moody([1.0, 2.0]), 1, ["a", "b"])
    with pytest.raises(ValueError, match="holds step 1 for other completions"):
        play(path, moody([1.0, 2.0]), 1, ["a", "x"])
    with pytest.raises(ValueError, match="holds step 1 for other completions"):
        play(path, moody([1.0]), 1, ["a"])
    with pytest.raises(ValueError, match="holds step 1 for other rewards"):
        play(path, {"judge": moody([1.0, 2.0])["judge"]}, 1, ["a", "b"])


def test_a_digest_tells_prompts_and_completions_apart():
    assert len({digest("a", "b"), digest("b", "a"), digest("ab", ""), digest([{"role": "user"}], "b")}) == 4
    assert digest("a", "b") == digest("a", "b")


def test_a_reward_that_never_gives_a_number_ends_the_run_after_its_first_round(tmp_path):
    """One that fails for some completions, or is logged only, does not; nor one that has given numbers before."""

    def fails(prompts, completions, **columns):
        if any("bad" in text for text in completions):
            raise KeyError("a patient's words")
        return [1.0] * len(completions)

    def score(number, texts, weight=1.0):
        with (
            RewardRunner({"r": (fails, weight)}, workers=0) as runner,
            closing(OutcomeFile(tmp_path / "r.jsonl")) as file,
        ):
            recorded = RecordedRewards(runner, file)
            return [
                recorded(i, [(0, k) for k in range(2)], ["p"] * 2, each, {}) for i, each in enumerate(texts, number)
            ]

    with pytest.raises(
        ValueError, match=r"reward 'r' gave no number to any of the 2 .*KeyError .*form: messages"
    ) as told:
        score(0, [["bad", "bad"]])
    assert "patient" not in str(told.value)
    (logged,) = score(1, [["bad", "bad"]], weight=0.0)
    assert logged.parts["r"] == [None, None]
    (some,) = score(2, [["good", "bad"]])
    assert some.rewards == [1.0, None]
    later = score(3, [["good", "good"], ["bad", "bad"]])
    assert later[1].rewards == [None, None]
