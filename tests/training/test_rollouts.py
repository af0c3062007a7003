"""Sampling for an optimiser batch: which prompts, how many rounds, what is scored, what a killed run finds again."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest

from vlmalign.objectives.advantages import group_advantages
from vlmalign.rewards.contract import MemoryReward
from vlmalign.rewards.outcomes import OutcomeFile
from vlmalign.rewards.runner import RewardRunner, RowFault, ScoredBatch
from vlmalign.rollout.completions import Completion
from vlmalign.training.completion_log import CompletionLog
from vlmalign.training.recorded_rewards import RecordedRewards
from vlmalign.training.rollouts import Prompts, Rollout, Sampled, Sampler, Task
from vlmalign.types import Group, Segment

GROUP = 2


def task(number: int, **columns) -> Task:
    tokens = np.full(3 + number % 4, 5, np.int32)
    prompt = Segment(tokens, np.full(tokens.shape, -1, np.int32), np.zeros(tokens.shape, np.float32))
    return Task(Group(number, prompt, (), ()), f"prompt {number}", columns)


def completion(*tokens: int, stopped: bool = True) -> Completion:
    logp = np.full(len(tokens), -0.5, np.float32)
    return Completion(np.array(tokens, np.int32), logp, logp, stopped)


class Fake:
    """Answers prompt p in round r with tokens (p, r, sample); a reward by hand; remembers what it was asked."""

    def __init__(self, reward, *, length=None):
        self.reward, self.length = reward, length or (lambda prompt, sample: 3)
        self.rounds: dict[int, list[int]] = {}
        self.asked: list[tuple] = []

    def generate(self, prompts, number):
        assert number not in self.rounds, "every round has draws of its own"
        self.rounds[number] = [p.id for p in prompts]
        return [[self.answer(p.id, number, k) for k in range(GROUP)] for p in prompts]

    def answer(self, prompt, number, sample):
        return completion(prompt, number, *[sample] * (self.length(prompt, sample) - 2))

    def score(self, number, keys, prompts, completions, columns):
        self.asked.append((number, list(keys), prompts, completions, columns))
        values = [self.reward(prompt, sample) for prompt, sample in keys]
        return ScoredBatch(values, {"right": values}, ())

    def sampler(self, *, wanted=4, attempts=1, longest=10, buffer=None):
        return Sampler(
            generate=self.generate,
            decode=lambda tokens: " ".join(map(str, tokens)),
            score=self.score,
            flat=lambda rollouts: group_advantages(np.stack([r.rewards for r in rollouts])).flat,
            wanted=wanted,
            attempts=attempts,
            longest=longest,
            overlong_buffer=buffer,
        )


def prompts(count=12, most=4, seed=0) -> Prompts:
    return Prompts([task(i, truth=f"truth {i}") for i in range(count)], most=most, seed=seed)


def ids(sampled: Sampled) -> list[int]:
    return [r.task.prompt.id for r in sampled.rollouts]


# ------------------------------------------------------------------------------------------------------------ prompts


def test_a_pass_holds_every_prompt_once_and_passes_differ():
    source = prompts(count=8)
    passes = [[t.prompt.id for _ in range(2) for t in source.take(4)] for _ in range(3)]
    assert all(sorted(one) == list(range(8)) for one in passes)
    assert passes[0] != passes[1] != passes[2]


def test_prompts_taken_together_are_of_one_pass():
    """Ten prompts, four at a time: two are left out of every pass, and the next four come from the next one."""
    source = prompts(count=10)
    taken = [[t.prompt.id for t in source.take(count)] for count in (4, 4, 4, 3, 3, 4, 1, 4, 4)]
    assert all(len(set(batch)) == len(batch) for batch in taken)
    for one in (taken[:2], taken[2:5], taken[5:8], taken[8:]):
        together = list(chain(*one))
        assert len(set(together)) == len(together)


@pytest.mark.parametrize("before", [0, 1, 3, 5])
def test_prompts_go_on_from_a_saved_place(before):
    counts = [4, 2, 4, 3, 4, 1, 4]
    whole = prompts(count=9)
    expected = [[t.prompt.id for t in whole.take(count)] for count in counts]
    first = prompts(count=9)
    for count in counts[:before]:
        first.take(count)
    state = json.loads(json.dumps(first.get_state()))
    second = prompts(count=9)
    second.set_state(state)
    assert [[t.prompt.id for t in second.take(count)] for count in counts[before:]] == expected[before:]


def test_too_few_prompts_are_refused():
    with pytest.raises(ValueError, match="a batch of 4 prompts needs at least as many, found 3"):
        prompts(count=3)


# ---------------------------------------------------------------------------------------------------- one round


def test_one_round_scores_every_completion_with_its_columns():
    fake = Fake(lambda prompt, sample: float(sample))
    sampled = fake.sampler().draw(7, prompts())
    (number, keys, asked, texts, columns), order = fake.asked[0], ids(sampled)
    assert (number, sampled.attempts, sampled.drawn, sampled.faults) == (7, 1, 4, 0)
    assert keys == [(p, k) for p in order for k in range(GROUP)]
    assert asked == [f"prompt {p}" for p in order for _ in range(GROUP)]
    assert columns["truth"] == [f"truth {p}" for p in order for _ in range(GROUP)]
    assert columns["completion_ids"] == [[p, 7, k] for p in order for k in range(GROUP)]
    assert columns["completion_tokens"] == [3] * 8
    assert texts == [f"{p} 7 {k}" for p in order for k in range(GROUP)]
    for rollout in sampled.rollouts:
        assert rollout.texts == [" ".join(map(str, c.tokens)) for c in rollout.completions]
        assert rollout.rewards.tolist() == rollout.parts["right"].tolist() == [0.0, 1.0]


def test_none_becomes_nan_and_faults_count_completions_once():
    fake = Fake(lambda prompt, sample: None if sample else 1.0)
    faults = tuple(RowFault(name, row, "timeout", "") for name, row in (("right", 1), ("other", 1), ("right", 3)))
    score = fake.score
    fake.score = lambda *a: score(*a)._replace(faults=faults)
    sampled = fake.sampler().draw(0, prompts())
    assert sampled.faults == 2
    assert all(np.array_equal(r.rewards, [1.0, np.nan], equal_nan=True) for r in sampled.rollouts)


def test_overlong_penalty_is_in_tokens():
    """Limit 10, buffer 4: 6 tokens cost nothing, 8 half, 10 all. The texts have other lengths."""
    lengths = {0: 6, 1: 8, 2: 10, 3: 3}
    fake = Fake(lambda prompt, sample: 1.0, length=lambda prompt, sample: lengths[prompt % 4] if sample else 6)
    sampled = fake.sampler(buffer=4).draw(0, prompts(count=4))
    cost = {0: 0.0, 1: -0.5, 2: -1.0, 3: 0.0}
    for rollout in sampled.rollouts:
        expected = [0.0, cost[rollout.task.prompt.id % 4]]
        assert rollout.parts["overlong"].tolist() == expected
        assert rollout.rewards.tolist() == [1.0 + x for x in expected]
        assert rollout.parts["right"].tolist() == [1.0, 1.0]
    # What length alone tells apart is worth learning from.
    assert sampled.flat.tolist() == [cost[i % 4] == 0 for i in ids(sampled)]


def test_a_reward_of_the_penaltys_name_is_refused():
    fake = Fake(lambda prompt, sample: 1.0)
    fake.score = lambda number, keys, *rest: ScoredBatch([0.0] * len(keys), {"overlong": [0.0] * len(keys)}, ())
    with pytest.raises(ValueError, match="a reward is called 'overlong'"):
        fake.sampler(buffer=4).draw(0, prompts())


def test_prompts_must_be_told_apart_and_alike():
    fake = Fake(lambda prompt, sample: 1.0)
    with pytest.raises(ValueError, match="two prompts have the id 1 and would get the same completions"):
        fake.sampler(wanted=2).draw(0, Prompts([task(1), task(1)], most=2, seed=0))
    with pytest.raises(ValueError, match=r"differ in the columns \['truth'\]"):
        fake.sampler(wanted=2).draw(0, Prompts([task(1), task(2, truth=3)], most=2, seed=0))


# ---------------------------------------------------------------------------------------------------- dynamic sampling


def test_flat_groups_are_replaced_and_the_size_stays():
    """Prompts of even number give equal rewards."""
    fake = Fake(lambda prompt, sample: float(prompt % 2 and sample))
    sampled = fake.sampler(attempts=6).draw(3, prompts(count=40))
    assert len(sampled.rollouts) == 4
    assert all(number % 2 for number in ids(sampled))
    assert not sampled.flat.any()
    rounds = sorted(fake.rounds)
    assert rounds == list(range(18, 18 + sampled.attempts)), "rounds count up over the stage: step 3 of 6 attempts each"
    missing = 4
    for number in rounds:
        assert len(fake.rounds[number]) == missing, "as many prompts as groups are missing"
        missing -= sum(p % 2 for p in fake.rounds[number])
    assert missing == 0
    asked = list(chain(*fake.rounds.values()))
    assert len(set(asked)) == len(asked) == sampled.drawn, "other prompts, not the same again, and none in vain"


def test_attempts_are_bounded_and_flat_groups_fill_the_batch():
    """One prompt of the second round teaches something: it comes first, then those that were sampled first."""
    fake = Fake(lambda prompt, sample: float(len(fake.rounds) > 1 and prompt == fake.rounds[1][2] and sample))
    sampled = fake.sampler(attempts=3).draw(0, prompts(count=40))
    asked = list(chain(*fake.rounds.values()))
    assert [len(fake.rounds[number]) for number in range(3)] == [4, 4, 3]
    assert (sampled.attempts, sampled.drawn) == (3, 11)
    assert ids(sampled) == [fake.rounds[1][2], *asked[:3]]
    assert sampled.flat.tolist() == [False, True, True, True]


def test_an_informative_batch_takes_one_round():
    fake = Fake(lambda prompt, sample: float(sample))
    assert fake.sampler(attempts=5).draw(0, prompts()).attempts == 1


def test_rewards_equal_but_for_rounding_are_flat():
    """0.1 + 0.2 and 0.3: their advantages are exactly 0, so there is nothing to keep the group for."""
    fake = Fake(lambda prompt, sample: 0.1 + 0.2 if sample else 0.3)
    sampled = fake.sampler(attempts=2).draw(0, prompts(count=40))
    assert sampled.attempts == 2
    assert sampled.flat.all()


def test_a_prompt_met_twice_has_two_sets_of_answers():
    """Four prompts only: what replaces a flat group comes from the next pass."""
    fake = Fake(lambda prompt, sample: 0.0)
    sampler = fake.sampler(attempts=3)
    sampled = sampler.draw(0, prompts(count=4))
    assert len(sampled.rollouts) == 4
    answers = {number: fake.answer(2, number, 0).tokens.tolist() for number in fake.rounds}
    assert len({tuple(tokens) for tokens in answers.values()}) == 3


# ---------------------------------------------------------------------------------------------------- log


def rollout(number: int, rewards, texts=("a", "b")) -> Rollout:
    rewards = np.array(rewards)
    return Rollout(task(number), [completion(1, 2), completion(3, stopped=False)], list(texts), rewards, {"x": rewards})


def test_one_line_for_every_completion(tmp_path):
    log = CompletionLog(tmp_path / "completions.jsonl")
    log.write(1, [rollout(4, [1.0, np.nan]), rollout(9, [0.5, 0.0])], np.array([[0.0, 0.0], [0.25, -0.25]]))
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "completions.jsonl").read_text().splitlines()]
    assert [(x["step"], x["prompt_id"], x["sample"]) for x in lines] == [(1, 4, 0), (1, 4, 1), (1, 9, 0), (1, 9, 1)]
    assert [x["reward"] for x in lines] == [x["parts"]["x"] for x in lines] == [1.0, None, 0.5, 0.0]
    assert [x["advantage"] for x in lines] == [0.0, 0.0, 0.25, -0.25]
    assert [(x["tokens"], x["stopped"]) for x in lines] == [(2, True), (1, False)] * 2
    assert lines[2]["prompt"] == "prompt 9"
    assert lines[2]["completion"] == "a"


def test_images_have_their_names_in_the_log_wherever_they_stand(tmp_path):
    films = ("/data/a.png", "/data/b.png")
    columns = {"image": films[0], "images": list(films), "truth": "/data"}
    shown = Task(replace(task(4).prompt, images=films), "Look.", columns)
    log = CompletionLog(tmp_path / "completions.jsonl", lambda path: path.replace("/data", "sources.mine"))
    log.write(1, [rollout(4, [1.0, 0.0])._replace(task=shown)], np.zeros((1, 2)))
    log.close()
    line = json.loads((tmp_path / "completions.jsonl").read_text().splitlines()[0])
    assert line["images"] == ["sources.mine/a.png", "sources.mine/b.png"]
    assert line["columns"] == {"image": "sources.mine/a.png", "images": line["images"], "truth": "/data"}


def test_a_rewound_log_has_every_line_once(tmp_path):
    path, zeros = tmp_path / "completions.jsonl", np.zeros((1, 2))
    log = CompletionLog(path)
    log.write(1, [rollout(1, [0.0, 1.0])], zeros)
    place = log.position()
    log.write(2, [rollout(2, [0.0, 1.0])], zeros)
    whole = path.read_bytes()
    log.write(3, [rollout(3, [0.0, 1.0])], zeros)
    log.close()
    again = CompletionLog(path)
    again.rewind(place)
    again.write(2, [rollout(2, [0.0, 1.0])], zeros)
    again.close()
    assert path.read_bytes() == whole


# ---------------------------------------------------------------------------------------------------- rewards on file


def moody():
    """A judge that never says the same twice, and a reward that remembers how many completions it has seen."""
    calls = iter(range(1000))

    def judge(prompts, completions, **columns):
        return [float(next(calls)) for _ in completions]

    def update(rows, state):
        return [float(state["seen"])] * len(rows), {"seen": state["seen"] + len(rows)}

    rewards = {"judge": (judge, 1.0), "memory": (MemoryReward(lambda: {"seen": 0}, update), 0.5)}
    return RewardRunner(rewards, workers=0)


def ask(rewards: RecordedRewards, number: int, words=("a", "b")) -> ScoredBatch:
    keys = [(number, k) for k in range(len(words))]
    return rewards(number, keys, ["p"] * len(words), list(words), {"completion_tokens": [1] * len(words)})


def test_a_round_that_comes_again_is_read(tmp_path):
    path = tmp_path / "outcomes.jsonl"
    first = RecordedRewards(moody(), OutcomeFile(path))
    told = [ask(first, number) for number in range(2)]
    saved = json.loads(json.dumps(first.get_state()))
    told += [ask(first, number) for number in range(2, 4)]
    assert told[0] != told[1]
    # Killed here, and continued from the checkpoint after two rounds.
    second = RecordedRewards(moody(), OutcomeFile(path))
    second.set_state(saved)
    assert [ask(second, number) for number in (2, 3)] == told[2:]
    assert second.get_state() == first.get_state()
    assert second.get_state()["memory"] == {"memory": {"seen": 8}}
    assert ask(second, 4).parts["memory"] == [8.0, 8.0]
    for damaged in (path.read_bytes().replace(b'"reward": 0.0', b'"reward": 1.0', 1), b""):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="restore the file, or start in a new run folder"):
            RecordedRewards(moody(), OutcomeFile(path)).set_state(saved)


def test_rounds_of_a_run_without_a_checkpoint_are_read_too(tmp_path):
    path = tmp_path / "outcomes.jsonl"
    told = ask(RecordedRewards(moody(), OutcomeFile(path)), 0)
    again = RecordedRewards(moody(), OutcomeFile(path))
    assert ask(again, 0) == told
    with pytest.raises(ValueError, match="holds step 0 for other completions"):
        ask(again, 0, ("a", "c"))


def test_a_checkpoint_waits_for_the_disk(tmp_path, monkeypatch):
    outcomes = OutcomeFile(tmp_path / "outcomes.jsonl")
    synced = []
    monkeypatch.setattr(outcomes, "sync", lambda: synced.append(True))
    rewards = RecordedRewards(moody(), outcomes)
    ask(rewards, 0)
    assert synced == []
    rewards.get_state()
    assert synced == [True]
