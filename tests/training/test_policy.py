"""Rollouts become optimiser batches: advantages by every rule, what is recorded and when, what a checkpoint holds.

Completions, scores of the policy and of the reference, and rewards are given by hand here: nothing is compiled.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from vlmalign.mesh import AXES
from vlmalign.models.config import DecoderConfig, LayerSpec, ModelConfig, Rope
from vlmalign.models.lora import ATTENTION_AND_FEED_FORWARD, LoraSpec
from vlmalign.models.model import Model
from vlmalign.objectives.advantages import combined_advantages, group_advantages, leave_one_out_advantages
from vlmalign.objectives.entropy import AdaptiveEntropy
from vlmalign.objectives.gae import estimate_advantages, token_rewards, whiten
from vlmalign.objectives.grpo import grpo_counts, grpo_loss
from vlmalign.objectives.grpo_settings import GrpoSettings
from vlmalign.rewards.runner import RowFault, ScoredBatch
from vlmalign.rollout.completions import Completion, Generator
from vlmalign.rollout.decode_weights import joined, joins_here
from vlmalign.rollout.sampling import Sampling
from vlmalign.training.best import Best
from vlmalign.training.completion_log import CompletionLog
from vlmalign.training.loop import Stage
from vlmalign.training.merged import merge_program, merged_policy
from vlmalign.training.policy import PolicySource
from vlmalign.training.rollout_settings import RolloutSettings
from vlmalign.training.rollouts import Task
from vlmalign.training.step import Objective, Trainer
from vlmalign.training.supervised import Shapes
from vlmalign.types import Group, Scores, Segment

LONGEST = 6
VOCAB = 32
FIRST = 3  #: prompt i begins with token FIRST + i, which tells it in a batch


def model(lora: LoraSpec | None = None, dtype: str = "float32") -> Model:
    """One layer, never run here."""
    decoder = DecoderConfig(
        vocab=VOCAB, embed=16, ffn=32, heads=2, kv_heads=1, head_dim=8, layers=(LayerSpec(Rope(10_000.0), None),),
        norm_eps=1e-6, norm_offset=1.0, sandwich_norm=True, qk_norm=True, qkv_bias=False, out_bias=False, ffn_bias=False,
        activation="gelu_tanh", query_scale=8**-0.5, embed_scale=4.0, tied_head=True,
    )  # fmt: skip
    return Model(ModelConfig("gemma3", decoder, None, None), lora=lora, dtype=dtype)


def task(number: int) -> Task:
    """Prompts of 2 to 6 tokens."""
    tokens = np.array([FIRST + number, *[4] * (1 + number % 5)], np.int32)
    prompt = Segment(tokens, np.full(tokens.shape, -1, np.int32), np.zeros(tokens.shape, np.float32))
    return Task(Group(number, prompt, (), ()), f"prompt {number}", {})


def answer(prompt: int, sample: int) -> Completion:
    """Of 1 to 6 tokens; the longest ones were cut off."""
    rng = np.random.default_rng([prompt, sample])
    length = int(rng.integers(1, LONGEST + 1))
    tokens = rng.integers(3, VOCAB, length).astype(np.int32)
    logp = -rng.random(length).astype(np.float32)
    return Completion(tokens, logp, logp / 2, stopped=length < LONGEST)


@dataclass(frozen=True)
class Scripted(Generator):
    """Gives `answer`; remembers keys and parameters."""

    seen: tuple[list, list] = ((), ())

    def run(self, params, prompts, key, *, advance=lambda done: None, report=lambda stats: None):
        for found, new in zip(self.seen, (jax.random.key_data(key).tolist(), params), strict=True):
            found.append(new)
        return [[answer(p.id, k) for k in range(self.group)] for p in prompts]


class Told(Trainer):
    """Scores that are a fixed number for every token, and a count of how often they were asked for."""

    def __init__(self, *, reference: bool = False, **objective):
        settings = GrpoSettings(max_completion=LONGEST)
        loss, counts = partial(grpo_loss, settings=settings), partial(grpo_counts, settings=settings)
        self.model, self.objective = model(), Objective("told", loss, counts, **objective)
        self.reference = (model(), {}) if reference else None
        self.mesh = None
        self.asked = {"scores": 0, "reference": 0}

    def scores(self, params, frozen, groups):
        self.asked["scores"] += 1
        return Scores(**{name: told(name, own_tokens(groups)) for name in ("logp", "entropy", "values")})

    def reference_logp(self, frozen, groups):
        self.asked["reference"] += 1
        return told("reference", own_tokens(groups))


def told(what: str, tokens: np.ndarray) -> np.ndarray:
    """A number in (-1, 0) for every token, another one for every field; on padding as well, where none must be used."""
    return -np.random.default_rng([ord(c) for c in what]).random(VOCAB).astype(np.float32)[tokens]


def own_tokens(groups) -> np.ndarray:
    return groups.tokens[:, groups.layout.prompt :].reshape(groups.weight.shape)


def reward(prompt: int, sample: int) -> float | None:
    return float(np.random.default_rng([prompt, sample, 7]).random())


SHAPES = Shapes(rows=3, prompt_multiple=4, completion_multiple=2)


@dataclass(frozen=True)
class Made:
    """A source with its generator and its trainer."""

    policy: PolicySource
    generator: Scripted
    trainer: Told

    def work(self, step: int = 0):
        return self.policy.work(step, {})


def source(
    *, count=4, prompts=4, k=3, reward=reward, parts=None, faults=(), trainer=None, shapes=SHAPES, log=None,
    temperature=1.0, **settings,
) -> Made:  # fmt: skip
    trainer = trainer or Told(needs_values=settings.get("advantage") == "token")
    generator = Scripted(
        model(), None, (2,), rows=4, group=k, completion=LONGEST, sampling=Sampling(temperature), seen=([], [])
    )

    def score(number, keys, *rest):
        columns = {name: [f(*key) for key in keys] for name, f in (parts or {"right": reward}).items()}
        return ScoredBatch([reward(*key) for key in keys], columns, faults)

    policy = PolicySource(
        [task(i) for i in range(count)], generator=generator, trainer=trainer, base={}, score=score, shapes=shapes,
        decode=lambda tokens: str(tokens.tolist()), settings=RolloutSettings(prompts, **settings), log=log,
    )  # fmt: skip
    return Made(policy, generator, trainer)


def completions(work) -> dict[tuple[int, int], dict[str, np.ndarray]]:
    """What a batch holds about each (prompt, sample), over its real tokens; padding must hold nothing."""
    found = {}
    for groups, recorded in work.batches:
        prompt, k, _ = groups.layout
        for row, number in enumerate(groups.group_id):
            if number < 0:
                assert not groups.weight[row].any()
                assert groups.advantage is None or not groups.advantage[row].any()
                assert not any(recorded[n][row].any() for n in ("advantage", "rollout_logp") if n in recorded)
                continue
            start = task(int(groups.tokens[row, 0]) - FIRST).prompt.prompt.tokens
            assert groups.tokens[row, :prompt][groups.segment[row, :prompt] == 0].tolist() == start.tolist()
            for sample in range(k):
                length = int((groups.segment[row, prompt:] == sample + 1).sum())
                here = {name: value[row, sample, :length] for name, value in recorded.items()}
                here |= {"tokens": own_tokens(groups)[row, sample, :length], "truncated": groups.truncated[row, sample]}
                here |= {"weight": groups.weight[row, sample, :length]}
                assert not groups.weight[row, sample, length:].any()
                if groups.advantage is not None:
                    here["completion_advantage"] = groups.advantage[row, sample]
                if groups.entropy_mask is not None:
                    assert not groups.entropy_mask[row, sample, length:].any()
                    here["entropy_mask"] = groups.entropy_mask[row, sample, :length]
                key = (int(start[0]) - FIRST, sample)
                assert key not in found
                found[key] = here
    return found


def table(value, count: int = 4, k: int = 3) -> np.ndarray:
    """[prompts, K] of `value(prompt, sample)`, NaN for None."""
    return np.array([[np.nan if (x := value(p, s)) is None else x for s in range(k)] for p in range(count)], np.float64)


def advantages(work) -> np.ndarray:
    """[prompts, K]"""
    found = completions(work)
    return table(lambda p, s: found[p, s]["completion_advantage"], k=1 + max(sample for _, sample in found))


# ------------------------------------------------------------------------------------------------ what is recorded


def test_tokens_and_what_was_recorded_while_sampling():
    found = completions(source().work())
    assert sorted(found) == [(p, s) for p in range(4) for s in range(3)]
    for (prompt, sample), here in found.items():
        expected = answer(prompt, sample)
        assert here["tokens"].tolist() == expected.tokens.tolist()
        assert here["rollout_logp"].tolist() == expected.logp.tolist()
        assert here["kept_logp"].tolist() == expected.kept_logp.tolist()
        assert here["weight"].tolist() == [1.0] * len(expected.tokens)
        assert here["truncated"] == (len(expected.tokens) == LONGEST)
    assert {bool(here["truncated"]) for here in found.values()} == {True, False}


def test_one_update_asks_for_no_scores():
    """The policy that sampled is the one being trained: `grpo_loss` takes its own log-probabilities as the old ones."""
    made = source(trainer=Told(reference=True, needs_reference=True))
    work = made.work()
    assert made.trainer.asked == {"scores": 0, "reference": 0}
    assert "old_logp" not in work.batches[0].recorded


def test_updates_share_one_rollout_and_what_was_recorded_first():
    made = source(count=8, updates=3, trainer=Told(reference=True, needs_reference=True))
    works = [made.work(step) for step in range(6)]
    batches = len(works[0].batches)
    assert made.trainer.asked == {"scores": 2 * batches, "reference": 2 * batches}, "once per rollout"
    assert len(made.generator.seen[0]) == 2
    assert made.generator.seen[0][0] != made.generator.seen[0][1]
    for first, later in ((0, 1), (0, 2), (3, 4), (3, 5)):
        assert works[first].batches is works[later].batches
    assert works[0].batches is not works[3].batches
    assert [work.metrics["update"] for work in works] == [1, 2, 3, 1, 2, 3]
    for name, what in (("old_logp", "logp"), ("ref_logp", "reference")):
        for here in completions(works[0]).values():
            assert here[name].tolist() == told(what, here["tokens"]).tolist()


def test_the_bonus_of_a_step_is_in_its_loss():
    """The coefficient that `work` names reaches the objective's counts, which divide the entropy's sum."""
    settings = GrpoSettings(max_completion=LONGEST, entropy_coef=1.0)
    batches = [b.groups for b in source().work().batches]
    plain, adapted = (grpo_counts(batches, settings=settings, **more) for more in ({}, {"entropy_coef": 0.25}))
    assert adapted["entropy"] == pytest.approx(plain["entropy"] / 0.25)
    assert {name: n for name, n in adapted.items() if name != "entropy"} == {
        name: n for name, n in plain.items() if name != "entropy"
    }


def test_a_checkpoint_between_updates_is_refused():
    made = source(count=8, updates=2)
    made.policy.get_state()
    made.work(0)
    with pytest.raises(ValueError, match="a checkpoint between the 2 updates"):
        made.policy.get_state()
    made.work(1)
    made.policy.get_state()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({}, None),
        ({"steps": 9}, "steps 9"),
        ({"checkpoint_every": 5}, "checkpoint_every 5"),
        ({"evaluate_every": 5}, None),
        ({"evaluate_every": 5, "best": Best()}, None),
        ({"evaluate_every": 5, "best": Best(patience=2)}, "evaluate_every 5"),
    ],
)
def test_a_stage_that_would_be_saved_between_updates_is_refused_before_it_begins(change, named):
    stage = Stage(
        **{"name": "grpo", "folder": Path(), "steps": 8, "checkpoint_every": 4, "learning_rate": lambda step: 1.0}
        | change
    )
    RolloutSettings(4).check_stage(stage)
    if named is None:
        RolloutSettings(4, updates=2).check_stage(stage)
    else:
        with pytest.raises(ValueError, match=f"make {named} a multiple of 2"):
            RolloutSettings(4, updates=2).check_stage(stage)


# ------------------------------------------------------------------------------------------------ advantages


@pytest.mark.parametrize("scale", ["none", "group", "batch"])
@pytest.mark.parametrize("ddof", [0, 1])
def test_group_advantages(scale, ddof):
    work = source(scale=scale, ddof=ddof).work()
    expected = group_advantages(table(reward), scale=scale, ddof=ddof).value
    assert advantages(work).tolist() == expected.tolist()


def test_leave_one_out_advantages():
    expected = leave_one_out_advantages(table(reward)).value
    assert advantages(source(advantage="leave_one_out").work()).tolist() == expected.tolist()
    assert np.abs(expected - group_advantages(table(reward)).value).max() > 0.1


def other(prompt: int, sample: int) -> float:
    return float((prompt + 2 * sample) % 4)


def test_rewards_normalised_apart():
    work = source(parts={"a": reward, "b": other, "unused": reward}, normalise_first={"b": 0.5, "a": 2.0}).work()
    parts = np.stack([table(other), table(reward)], axis=-1)
    expected = combined_advantages(parts, np.array([0.5, 2.0]), aggregation="normalise_then_sum").value
    np.testing.assert_allclose(advantages(work), expected, rtol=1e-6)


def test_a_completion_of_which_one_reward_failed_is_not_scored_by_the_others():
    """Its total is None; the reward that did work has a number for it."""

    def total(prompt, sample):
        return None if sample == 1 else reward(prompt, sample)

    found = advantages(
        source(reward=total, parts={"a": reward, "b": other}, normalise_first={"a": 1.0, "b": 1.0}).work()
    )
    assert not found[:, 1].any()
    parts = np.stack([table(reward), table(other)], axis=-1)[:, [0, 2]]
    expected = combined_advantages(parts, aggregation="normalise_then_sum").value
    np.testing.assert_allclose(found[:, [0, 2]], expected, rtol=1e-6)


def test_the_length_penalty_is_one_of_the_rewards_normalised_apart():
    made = source(normalise_first={"right": 1.0, "overlong": 3.0}, overlong_buffer=4)
    penalty = table(lambda p, s: min(0.0, (LONGEST - 4 - len(answer(p, s).tokens)) / 4))
    parts = np.stack([table(reward), penalty], axis=-1)
    expected = combined_advantages(parts, np.array([1.0, 3.0]), aggregation="normalise_then_sum").value
    np.testing.assert_allclose(advantages(made.work()), expected, rtol=1e-6)
    with pytest.raises(ValueError, match=r"give the penalty a weight in normalise_first \(overlong: 1.0\)"):
        source(normalise_first={"right": 1.0}, overlong_buffer=4).work()
    with pytest.raises(ValueError, match="found 'rihgt', did you mean right"):
        source(normalise_first={"rihgt": 1.0}).work()


def test_unscored_completions_are_left_out_and_counted():
    def some(prompt, sample):
        return None if (prompt, sample) in {(0, 1), (2, 0), (2, 1), (2, 2)} else reward(prompt, sample)

    work = source(reward=some, faults=(RowFault("right", 1, "timeout", ""),)).work()
    found, rewards = advantages(work), table(some)
    assert found.tolist() == group_advantages(rewards).value.tolist()
    assert found[0, 1] == 0
    assert found[0].sum() == pytest.approx(0, abs=1e-6), "centred on the two that have a reward"
    assert not found[2].any()
    assert work.metrics["unscored"] == 4
    assert work.metrics["reward_faults"] == 1
    assert work.metrics["reward"] == pytest.approx(np.nanmean(rewards))
    assert work.metrics["flat_groups"] == 0.25
    nothing = source(reward=lambda p, s: None).work()
    assert (nothing.metrics["reward"], nothing.metrics["right"], nothing.metrics["unscored"]) == (None, None, 12)
    assert not advantages(nothing).any()


def kl_of(prompt: int, sample: int) -> float:
    tokens = answer(prompt, sample).tokens
    return float((told("logp", tokens).astype(np.float64) - told("reference", tokens)).sum())


def test_kl_in_the_reward():
    """k1 summed over the completion's own tokens: padding has log-probabilities too, and they differ."""
    made = source(kl_in_reward=0.3, trainer=Told(reference=True))
    work = made.work()
    expected = group_advantages(table(reward) - 0.3 * table(kl_of)).value
    np.testing.assert_allclose(advantages(work), expected, atol=1e-6)
    assert work.metrics["reward"] == pytest.approx(table(reward).mean()), "what the task gave"


# ------------------------------------------------------------------------------------------------ tokens: PPO


def by_hand(rewards: np.ndarray, beta: float = 0.0, **gae) -> dict[tuple[int, int], dict[str, np.ndarray]]:
    """Each completion alone, then whitened over all tokens together."""
    found = {}
    for prompt, sample in np.argwhere(np.isfinite(rewards)).tolist():
        tokens = answer(prompt, sample).tokens
        weight = np.ones((1, 1, len(tokens)), np.float32)
        kl = (told("logp", tokens).astype(np.float64) - told("reference", tokens))[None, None]
        per_token = token_rewards(rewards[prompt, sample][None, None], weight, kl=kl, beta=beta)
        found[prompt, sample] = estimate_advantages(per_token, told("values", tokens)[None, None], weight, **gae)
    every = np.concatenate([x.advantage for x in found.values()], axis=-1)
    whole = whiten([every], [np.ones_like(every)])[0][0, 0]
    ends = np.cumsum([x.advantage.size for x in found.values()])
    split = np.split(whole, ends[:-1])
    return {
        key: {"advantage": a, "returns": x.returns[0, 0]}
        for (key, x), a in zip(found.items(), split, strict=True)
    }  # fmt: skip


@pytest.mark.parametrize("beta", [0.0, 0.2])
def test_token_advantages(beta):
    trainer = Told(reference=True, needs_values=True)
    work = source(advantage="token", gamma=0.9, lam=0.8, kl_in_reward=beta, trainer=trainer).work()
    expected = by_hand(table(reward), beta, gamma=0.9, lam=0.8)
    for key, here in completions(work).items():
        np.testing.assert_allclose(here["advantage"], expected[key]["advantage"], atol=1e-6)
        np.testing.assert_allclose(here["returns"], expected[key]["returns"], atol=1e-6)
        assert here["old_logp"].tolist() == told("logp", here["tokens"]).tolist()
        assert here["old_values"].tolist() == told("values", here["tokens"]).tolist()


def test_unscored_completions_have_no_weight_among_token_advantages():
    def some(prompt, sample):
        return None if prompt == 1 and sample != 2 else reward(prompt, sample)

    work = source(advantage="token", reward=some).work()
    expected = by_hand(table(some), gamma=1.0, lam=0.95)
    for key, here in completions(work).items():
        assert here["weight"].tolist() == [float(key in expected)] * len(here["tokens"])
        if key in expected:
            np.testing.assert_allclose(here["advantage"], expected[key]["advantage"], atol=1e-6)
        else:
            assert not here["advantage"].any()
    with pytest.raises(ValueError, match="no completion of this optimiser batch could be scored"):
        source(advantage="token", reward=lambda p, s: None).work()


def test_a_value_head_needs_no_group():
    work = source(advantage="token", k=1).work()
    assert len(completions(work)) == 4
    assert work.metrics["flat_groups"] == 0


# ------------------------------------------------------------------------------------------------ top entropy


@pytest.mark.parametrize("mask_truncated", [False, True])
def test_the_most_uncertain_tokens_of_the_whole_batch(mask_truncated):
    """A quantile over all micro-batches; with mask_truncated only over completions that stopped by themselves."""
    work = source(top_entropy=0.4, mask_truncated=mask_truncated, shapes=replace(SHAPES, rows=1)).work()
    assert len(work.batches) == 4
    found = completions(work)
    counted = [here for here in found.values() if not (mask_truncated and here["truncated"])]
    every = np.concatenate([told("entropy", here["tokens"]) for here in counted])
    threshold = np.quantile(every, 0.6)
    assert abs(np.sort(every) - threshold).min() > 1e-4 or (every == threshold).any()
    for here in found.values():
        expected = told("entropy", here["tokens"]) >= threshold
        if mask_truncated and here["truncated"]:
            expected[:] = False
        assert here["entropy_mask"].tolist() == expected.tolist()


# ------------------------------------------------------------------------------------------------ any cut


CUTS = {
    "one by one": Shapes(rows=1, prompt_multiple=1, completion_multiple=1),
    "threes, the last padded": SHAPES,
    "all at once, wide": Shapes(rows=8, prompt_multiple=16, completion_multiple=8),
    "by tokens": Shapes(rows=4, tokens=40, prompt_multiple=4, completion_multiple=2),
}
RULES = {
    "group": {"scale": "group"},
    "batch": {"scale": "batch"},
    "kl": {"kl_in_reward": 0.3},
    "entropy": {"top_entropy": 0.3},
    "apart": {"normalise_first": {"right": 1.0}},
    "token": {"advantage": "token", "kl_in_reward": 0.1},
}


@pytest.mark.parametrize("rule", RULES)
def test_cuts_and_buckets_change_nothing(rule):
    """Bit for bit: everything that is recorded about a completion is the same however rows are cut and padded."""
    settings, found, cut = RULES[rule], {}, []
    for name, shapes in CUTS.items():
        trainer = Told(reference=True, needs_values=settings.get("advantage") == "token")
        work = source(count=7, prompts=7, shapes=shapes, trainer=trainer, **settings).work()
        found[name] = completions(work)
        cut.append([b.groups.tokens.shape for b in work.batches])
    assert len({str(shapes) for shapes in cut}) == len(CUTS), "four different cuts"
    expected = found.pop("one by one")
    for name, these in found.items():
        assert these.keys() == expected.keys()
        for key, here in these.items():
            assert here.keys() == expected[key].keys()
            for field, value in here.items():
                assert np.array_equal(value, expected[key][field]), (name, key, field)


# ------------------------------------------------------------------------------------------------ dynamic sampling


def test_rounds_of_a_step_have_keys_of_their_own():
    """The first round of a step with one attempt has the step's key, as ever."""
    flat = source(count=12, attempts=3, reward=lambda p, s: 0.0)
    flat.work(0), flat.work(1)
    keys = [tuple(key) for key in flat.generator.seen[0]]
    assert len(set(keys)) == len(keys) == 6
    plain = source(count=12)
    plain.work(0), plain.work(1)
    assert [tuple(key) for key in plain.generator.seen[0]] == [keys[0], keys[1]]


def test_a_prompt_that_is_met_twice_is_in_the_batch_twice():
    """Of two prompts one always teaches something: a later pass brings it again, in a row of its own."""
    work = source(count=2, prompts=2, attempts=8, reward=lambda p, s: float(p == 0 and s)).work()
    groups = [b.groups for b in work.batches]
    rows = [(g, row) for g in groups for row in np.flatnonzero(g.group_id >= 0)]
    assert [int(g.tokens[row, 0]) - FIRST for g, row in rows] == [0, 0]
    assert sorted(int(g.group_id[row]) for g, row in rows) == [0, 1]
    for g, row in rows:
        assert g.advantage[row].tolist() == [-1.0, 0.0, 1.0]
    assert work.metrics["groups_drawn"] > 2


def test_flat_is_judged_by_the_task_and_not_by_the_kl():
    trainer = Told(reference=True)
    work = source(count=12, attempts=2, kl_in_reward=0.3, reward=lambda p, s: 1.0, trainer=trainer).work()
    assert work.metrics["attempts"] == 2
    assert work.metrics["flat_groups"] == 1


def test_rewards_that_cancel_are_not_flat_where_they_are_normalised_apart():
    parts = {"a": reward, "b": lambda p, s: -reward(p, s)}
    settings = {"normalise_first": {"a": 2.0, "b": 1.0}, "attempts": 3, "count": 12}
    work = source(parts=parts, reward=lambda p, s: 0.0, **settings).work()
    assert (work.metrics["attempts"], work.metrics["flat_groups"]) == (1, 0)


# ------------------------------------------------------------------------------------------------ metrics and log


def test_metrics():
    work = source(count=12, parts={"right": reward, "other": other}, overlong_buffer=2).work()
    rollouts = completions(work)
    lengths = [len(here["tokens"]) for here in rollouts.values()]
    assert work.metrics["length"] == np.mean(lengths)
    assert work.metrics["stopped"] == np.mean([not here["truncated"] for here in rollouts.values()])
    assert work.metrics["other"] == np.mean([other(*key) for key in rollouts])
    penalty = np.mean([min(0.0, (LONGEST - 2 - length) / 2) for length in lengths])
    assert work.metrics["overlong"] == pytest.approx(penalty)
    assert work.metrics["reward"] == pytest.approx(np.mean([reward(*key) for key in rollouts]) + penalty)
    with pytest.raises(ValueError, match="numbers called length already; rename those rewards"):
        source(parts={"length": reward}).work()


def test_the_log_holds_a_line_for_every_completion_of_a_rollout(tmp_path):
    made = source(count=8, updates=2, log=CompletionLog(tmp_path / "completions.jsonl"))
    for step in range(4):
        made.work(step)
    lines = [json.loads(line) for line in (tmp_path / "completions.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1] * 12 + [3] * 12
    assert len({(line["prompt_id"], line["sample"]) for line in lines}) == 24
    for line in lines[:12]:
        expected = answer(line["prompt_id"], line["sample"])
        assert line["completion"] == str(expected.tokens.tolist())
        assert line["reward"] == reward(line["prompt_id"], line["sample"])
    for prompt in {line["prompt_id"] for line in lines}:
        of = [line for line in lines if line["prompt_id"] == prompt]
        expected = group_advantages(np.array([[line["reward"] for line in of]])).value[0]
        assert [line["advantage"] for line in of] == expected.tolist()


def test_the_log_of_token_advantages_holds_their_mean(tmp_path):
    made = source(advantage="token", log=CompletionLog(tmp_path / "completions.jsonl"))
    found = completions(made.work())
    for line in map(json.loads, (tmp_path / "completions.jsonl").read_text().splitlines()):
        here = found[line["prompt_id"], line["sample"]]
        assert line["advantage"] == pytest.approx(here["advantage"].mean(), abs=1e-6)


# ------------------------------------------------------------------------------------------------ state


class Remembers:
    def __init__(self):
        self.state = {"n": 0}

    def get_state(self):
        return dict(self.state)

    def set_state(self, state):
        self.state = dict(state)


def test_a_source_goes_on_where_it_was(tmp_path):
    """Prompts, log, memory of the rewards and an adaptive entropy coefficient."""
    adaptive = AdaptiveEntropy(initial=0.01, target=1.0)

    def new(name):
        made = source(count=10, adaptive_entropy=adaptive, log=CompletionLog(tmp_path / name))
        made.policy._memory = Remembers()
        return made

    def go(made, step):
        work = made.work(step)
        made.policy.observe({"entropy": 0.5 if step < 3 else 2.0})
        made.policy._memory.state["n"] += 1
        return completions(work).keys(), work.options

    whole = new("whole")
    expected = [go(whole, step) for step in range(5)]
    assert [o["entropy_coef"] for _, o in expected] == pytest.approx([0.0, 0.015, 0.02, 0.025, 0.0])
    killed = new("killed")
    for step in range(2):
        go(killed, step)
    state = json.loads(json.dumps(killed.policy.get_state()))
    go(killed, 2)
    again = new("killed")
    again.policy.set_state(state)
    assert [go(again, step) for step in range(2, 5)] == expected[2:]
    assert again.policy._memory.state == {"n": 5}
    assert (tmp_path / "killed").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_run_that_starts_anew_empties_the_log(tmp_path):
    source(log=CompletionLog(tmp_path / "log")).work()
    first = (tmp_path / "log").read_bytes()
    source(log=CompletionLog(tmp_path / "log")).work()
    assert (tmp_path / "log").read_bytes() == first


# ------------------------------------------------------------------------------------------------ the policy


def test_the_policy_is_what_is_trained_in_the_models_dtypes():
    lora = LoraSpec(rank=1, alpha=2.0)
    whole = model(dtype="bfloat16")
    head = {"value_head.weight": jnp.ones(16), "value_head.bias": jnp.ones(())}
    base = {name: jnp.full(shape.shape, 0.5, shape.dtype) for name, shape in whole.shapes.items()}
    name = "language_model.layers.0.mlp.up_proj.weight"
    trained = {name: jnp.full(base[name].shape, 0.25, jnp.float32), **head}
    policy = merged_policy(whole, base, trained)
    assert policy.keys() == whole.shapes.keys()
    assert {n: v.dtype for n, v in policy.items()} == {n: s.dtype for n, s in whole.shapes.items()}
    assert (policy[name] == 0.25).all()
    adapted = model(lora=lora, dtype="bfloat16")
    adapter = {n: jnp.full(s.shape, 0.5) for n, s in adapted.shapes.items() if n not in base}
    merged = merged_policy(adapted, base, adapter | head)
    assert merged.keys() == whole.shapes.keys()
    assert (merged[name] == 0.5 + 2.0 * 0.5 * 0.5).all()
    both = merged_policy(adapted, base, {**adapter, **trained})
    assert (both[name] == 0.25 + 2.0 * 0.5 * 0.5).all()


@pytest.mark.parametrize("targets", [("up_proj", "q_proj"), ATTENTION_AND_FEED_FORWARD])
def test_merged_matrices_come_as_rollouts_read_them(targets):
    """Joined where all that is joined was merged. Nothing is lost, nothing stands twice, the base's own stay its own."""
    adapted = model(lora=LoraSpec(rank=1, alpha=2.0, targets=targets))
    base = adapted.without_lora().init(jax.random.key(0))
    adapter = {n: jnp.full(s.shape, 0.5) for n, s in adapted.shapes.items() if n not in base}
    for frozen, trained in ((base, adapter), ({}, {name: value + 0.5 for name, value in base.items()})):
        trainee = adapted if frozen else adapted.without_lora()
        found = merge_program(trainee, None, None)(frozen, trained)
        wanted = merged_policy(trainee, frozen, trained)
        if targets == ATTENTION_AND_FEED_FORWARD or not frozen:
            wanted = joined(trainee, wanted)
            assert len(wanted) == len(base) - 5 + 2
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert np.allclose(found[name], value, rtol=1e-6, atol=1e-6), name
        assert all(found[name] is frozen[name] for name in found if name in frozen and "norm" in name)
        scored = merge_program(trainee, None, None, decodes=False)(frozen, trained)
        assert scored.keys() == base.keys(), "scoring reads matrices by their own names"


@pytest.mark.parametrize("cut", ["training", "sampling"])
def test_matrices_that_devices_hold_parts_of_are_not_joined(cut):
    mesh = AbstractMesh((1, 1, 1, 2), AXES, axis_types=(AxisType.Auto,) * 4)
    copies = AbstractMesh((1, 2, 1, 1), AXES, axis_types=(AxisType.Auto,) * 4)
    assert joins_here(None, None)
    assert joins_here(copies, copies)
    assert not joins_here(*((mesh, copies) if cut == "training" else (copies, mesh)))


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 1}, "at least 2 completions to compare, found 1; raise rollout.group"),
        ({"k": 1, "advantage": "leave_one_out"}, "at least 2 completions"),
        ({"count": 3}, "a batch of 4 prompts needs at least as many, found 3"),
        ({"kl_in_reward": 0.1}, "kl_in_reward compares with a reference policy"),
        ({"temperature": 0.7}, r"sampled at temperature 0.7, but the objective takes log-probabilities at 1.0"),
        ({"temperature": 0.0}, "sampled at temperature 0.0"),
        ({"advantage": "token", "trainer": Told()}, "token advantages go with an objective that trains a value head"),
        ({"trainer": Told(needs_values=True)}, "only with it; found advantage 'group'"),
    ],
)
def test_parts_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        source(**options)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompts": 0}, "prompts must be >= 1"),
        ({"updates": 0}, "updates must be >= 1"),
        ({"attempts": 0}, "attempts must be >= 1"),
        ({"advantage": "grup"}, "did you mean group"),
        ({"kl": "k4"}, "KL estimator must be one of"),
        ({"kl_in_reward": -1.0}, "kl_in_reward must be >= 0"),
        ({"top_entropy": 1.5}, r"in \[0, 1\]; found 1.5"),
        ({"advantage": "leave_one_out", "scale": "group"}, "belong to group advantages"),
        ({"advantage": "token", "normalise_first": {"a": 1.0}}, "belong to group advantages"),
        ({"advantage": "token", "attempts": 2}, "do not go with token advantages"),
        ({"advantage": "token", "top_entropy": 0.5}, "do not go with token advantages"),
        ({"normalise_first": {}}, "a finite weight for each"),
        ({"normalise_first": {"a": float("nan")}}, "a finite weight for each"),
        ({"normalise_first": {"a": 1.0}, "kl_in_reward": 0.1}, "put the KL into the loss"),
        ({"normalise_first": {"a": 1.0}, "scale": "group"}, "have no place in it"),
    ],
)
def test_settings_that_do_not_go_together(settings, message):
    with pytest.raises(ValueError, match=message):
        RolloutSettings(**{"prompts": 4} | settings)
