"""Rollouts: what greedy decoding, recorded log-probabilities, derived keys and stop tokens promise."""

from dataclasses import replace
from functools import cache

import jax
import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from tiny_checkpoints import (
    QUICK,
    SOFT,
    SOFT_TOKENS,
    assert_close,
    group,
    logits,
    occurrences,
    pictures,
    put,
    scores,
    torch_logits,
    vlm,
)

from vlmalign.rollout import engine
from vlmalign.rollout.engine import BLOCK, Rollout, block_length, generate
from vlmalign.rollout.sampling import Sampling
from vlmalign.types import Group, GroupBatch, Layout, Segment

#: the engine's own program, compiled without LLVM's optimisations
STATIC = ("model", "group", "completion", "stop_ids", "sampling")
sample = jax.jit(generate.__wrapped__, static_argnames=STATIC, compiler_options=QUICK)

PROMPT = 16
GREEDY, COOL, PLAIN = Sampling(temperature=0.0), Sampling(temperature=0.7, top_p=0.8), Sampling(temperature=0.7)
#: text that fills the row, an image prompt, two images; window 3 binds in all
PROMPTS = (
    group(70, list(range(3, 3 + PROMPT))),
    group(71, [2, 40, "a", 41, 42, 43]),
    group(72, [2, "b", "c", 44]),
)


@cache
def encoded(key: str) -> np.ndarray:
    return np.asarray(jax.jit(vlm().model.encode)(vlm().params, pictures([key])))


def batch_of(prompts: tuple[Group, ...] | list[Group], *, rows: int = 3, width: int = PROMPT) -> GroupBatch:
    """A prompt batch with features for up to three images."""
    batch = put(prompts, Layout(width, 0, 0), rows=rows)
    keys = list(dict.fromkeys(key for item in prompts for key in item.images))
    features = np.zeros((3, SOFT_TOKENS, 32), np.float32)
    for i, key in enumerate(keys):
        features[i] = encoded(key)
    return batch._replace(pixels=None, features=features.reshape(-1, 32))


def roll(
    batch: GroupBatch, *, sampling: Sampling, completion: int, stop: tuple[int, ...], key: int = 0, **more
) -> Rollout:
    found = sample(
        vlm().model,
        vlm().params,
        batch,
        jax.random.key(key),
        completion=completion,
        stop_ids=stop,
        sampling=sampling,
        **{"group": 3, "first_sample": 0, **more},
    )
    return jax.device_get(found)


def cool(batch: GroupBatch, **more) -> Rollout:
    return roll(batch, sampling=COOL, completion=16, stop=(1, 50, 51, 52, 53), **more)


def plain(batch: GroupBatch, **more) -> Rollout:
    # Id 0 is also what stands after the end: decoding past the limit must not take it for a stop token.
    return roll(batch, sampling=PLAIN, completion=5, stop=(0, 1), **more)


def check_ends(found: Rollout, stop: tuple[int, ...]) -> None:
    """The stop token is kept and counted, none comes earlier, nothing comes after, the rest ran to the limit."""
    n, k, c = found.tokens.shape
    for i in range(n):
        for j in range(k):
            length, tokens = found.length[i, j], found.tokens[i, j]
            ended = bool(np.isin(tokens[length - 1], stop)) if length else True
            assert found.stopped[i, j] == ended
            assert ended or length == c
            assert not np.isin(tokens[: max(length - 1, 0)], stop).any()
            for rest in (tokens, found.logp[i, j], found.kept_logp[i, j]):
                assert (rest[length:] == 0).all()


def answered(prompts, found: Rollout) -> list[Group]:
    """The prompts with their sampled completions."""
    groups = []
    for i, item in enumerate(prompts):
        pieces = [found.tokens[i, j, : found.length[i, j]] for j in range(found.tokens.shape[1])]
        segments = (Segment(t, np.full(len(t), -1, np.int32), np.ones(len(t), np.float32)) for t in pieces)
        groups.append(replace(item, continuations=tuple(segments)))
    return groups


# ------------------------------------------------------------------------------------------------- greedy

TOKENS = 21  # not a multiple of the block of 16 that is decoded between two looks


def transformers_greedy(item: Group, stop: list[int] | None) -> list[int]:
    ids = torch.from_numpy(item.prompt.tokens.astype(np.int64))[None]
    options = {"token_type_ids": (ids == SOFT).long()}
    if item.images:
        options["pixel_values"] = torch.from_numpy(pictures(occurrences(item)))
    with torch.no_grad():
        out = vlm().torch.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=TOKENS,
            eos_token_id=stop,
            pad_token_id=0,
            **options,
        )
    return out[0, ids.shape[1] :].tolist()


@pytest.fixture(scope="module")
def free_running() -> list[list[int]]:
    """What transformers writes when nothing stops it."""
    found = [transformers_greedy(item, [10_000]) for item in PROMPTS]
    assert all(len(set(tokens)) > 2 for tokens in found), "answers that repeat one token prove little"
    return found


@pytest.fixture(scope="module")
def stop_id(free_running) -> int:
    """A token that ends one answer in its middle and never comes in another."""
    for row, other in ((1, 0), (0, 1), (1, 2), (2, 1), (0, 2), (2, 0)):
        for index, token in enumerate(free_running[row]):
            if 3 <= index < 15 and free_running[row].index(token) == index and token not in free_running[other]:
                return token
    raise AssertionError("the tiny model's answers do not differ; change its seed")


@pytest.fixture(scope="module")
def greedy(stop_id) -> Rollout:
    return roll(batch_of(PROMPTS), sampling=GREEDY, completion=TOKENS, stop=(1, stop_id), group=2)


def test_greedy_is_transformers_token_for_token(greedy, stop_id):
    lengths = []
    for row, item in enumerate(PROMPTS):
        expected = transformers_greedy(item, [1, stop_id])
        lengths.append(len(expected))
        for k in range(2):
            assert greedy.tokens[row, k, : greedy.length[row, k]].tolist() == expected
    assert min(lengths) < TOKENS == max(lengths), "one is stopped, one runs to the limit"
    check_ends(greedy, (1, stop_id))


def test_greedy_is_the_argmax_of_a_full_pass(greedy):
    whole = [
        replace(
            item,
            prompt=Segment(
                *(
                    np.concatenate([getattr(item.prompt, f), getattr(item.continuations[0], f)])
                    for f in ("tokens", "image", "weight")
                )
            ),
            continuations=(),
        )
        for item in answered(PROMPTS, greedy)
    ]
    z = np.asarray(logits(vlm().model, vlm().params, put(whole, Layout(40, 0, 0))))
    for row, item in enumerate(PROMPTS):
        start, length = len(item.prompt), greedy.length[row, 0]
        steps = z[row, start - 1 : start - 1 + length]
        assert steps.argmax(-1).tolist() == greedy.tokens[row, 0, :length].tolist()
        logp = jax.nn.log_softmax(steps)[np.arange(length), greedy.tokens[row, 0, :length]]
        assert_close(greedy.logp[row, 0, :length], logp, 1e-4)


# ------------------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize(
    ("run", "length"),
    [pytest.param(cool, 16, id="top-p 0.8"), pytest.param(plain, 5, id="no top-p", marks=pytest.mark.full)],
)
def test_recorded_log_probabilities_are_those_of_the_training_path(run, length):
    """At temperature 0.7, over the whole vocabulary, with and without top-p."""
    found = run(batch_of(PROMPTS))
    groups = answered(PROMPTS, found)
    trained = scores(vlm().model, vlm().params, put(groups, Layout(PROMPT, 3, length)), temperature=0.7)
    real = np.arange(length) < found.length[..., None]
    assert_close(found.logp[real], np.asarray(trained.logp)[real], 1e-4)
    if run is plain:
        assert_close(found.kept_logp[real], found.logp[real], 1e-6)
    else:
        gap = (found.kept_logp - found.logp)[real]
        assert (gap > -1e-6).all()
        assert (gap < -np.log(0.8) + 1e-5).all()
        assert gap.max() > 0.01


def test_stop_tokens_and_limits():
    found = cool(batch_of(PROMPTS))
    check_ends(found, (1, 50, 51, 52, 53))
    assert found.stopped.any()
    assert not found.stopped.all()
    short = plain(batch_of(PROMPTS))
    check_ends(short, (0, 1))
    assert (short.length <= 5).all()


def test_samples_belong_to_prompt_and_sample_not_to_the_slot():
    """Rows swapped, neighbours replaced, padding rows added: every bit of a prompt's samples stays."""
    base = cool(batch_of(PROMPTS))
    swapped = cool(batch_of([PROMPTS[2], PROMPTS[0], PROMPTS[1]]))
    for new, old in enumerate([2, 0, 1]):
        for a, b in zip(swapped, base, strict=True):
            assert np.array_equal(a[new], b[old])
    alone = cool(batch_of([PROMPTS[1]]))
    for a, b in zip(alone, base, strict=True):
        assert np.array_equal(a[0], b[1])
    assert (alone.length[1:] == 0).all()
    assert alone.stopped[1:].all()


def test_sample_ids_count_from_first_sample():
    base, later = cool(batch_of(PROMPTS)), cool(batch_of(PROMPTS), first_sample=2)
    for a, b in zip(later, base, strict=True):
        assert np.array_equal(a[:, 0], b[:, 2])


def test_keys_differ_by_prompt_sample_and_key():
    base = cool(batch_of(PROMPTS))
    assert len({base.tokens[0, k].tobytes() for k in range(3)}) == 3
    other = cool(batch_of(PROMPTS), key=1)
    assert not np.array_equal(other.tokens, base.tokens)
    assert all(np.array_equal(a, b) for a, b in zip(cool(batch_of(PROMPTS)), base, strict=True))
    # The same text under another id is another prompt.
    twin = cool(batch_of([PROMPTS[0], replace(PROMPTS[0], id=99), PROMPTS[2]]))
    assert np.array_equal(twin.tokens[0], base.tokens[0])
    assert not np.array_equal(twin.tokens[1], twin.tokens[0])


@pytest.mark.full
def test_other_shapes_give_the_same_samples():
    """Another number of rows and wider padding: other sums, so equal up to candidates that tie below 1e-4."""
    base = cool(batch_of(PROMPTS))
    wider = cool(batch_of(PROMPTS[1:], rows=2, width=24))
    assert np.array_equal(wider.tokens, base.tokens[1:])
    assert np.array_equal(wider.length, base.length[1:])
    assert_close(wider.logp, base.logp[1:], 1e-4)


def test_first_tokens_follow_the_model():
    """Chi-square of the first and of the fourth token of many samples against transformers' softmax at 0.7."""
    batch = batch_of(PROMPTS)
    runs = [plain(batch, first_sample=3 * i) for i in range(250)]
    first = np.concatenate([r.tokens[:, :, 0] for r in runs], axis=1)
    for row, item in enumerate(PROMPTS):
        z = torch_logits(vlm().torch, item.prompt.tokens, occurrences(item))[-1].astype(np.float64) / 0.7
        p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
        common = np.flatnonzero(p * first.shape[1] >= 5)
        counts = [(first[row] == token).sum() for token in common]
        expected = p[common] * first.shape[1]
        rest = first.shape[1] - sum(counts)
        assert chisquare([*counts, rest], [*expected, first.shape[1] - expected.sum()]).pvalue > 1e-3


# ------------------------------------------------------------------------------------------------- what is computed


def test_a_batch_whose_answers_all_stop_ends_after_one_block(monkeypatch):
    """Every token is a stop token: one of three blocks of the loop runs."""
    steps = []
    plain_draw = engine.draw

    def counted(z, keys, sampling):
        jax.debug.callback(lambda: steps.append(1))
        return plain_draw(z, keys, sampling)

    monkeypatch.setattr(engine, "draw", counted)
    program = jax.jit(generate.__wrapped__, static_argnames=STATIC, compiler_options=QUICK)
    completion = 2 * BLOCK + 3
    found = program(
        vlm().model,
        vlm().params,
        batch_of(PROMPTS[:2]),
        jax.random.key(0),
        group=1,
        completion=completion,
        stop_ids=tuple(range(96)),
        sampling=PLAIN,
    )
    jax.block_until_ready(found)
    jax.effects_barrier()
    assert len(steps) == block_length(completion) == 12
    assert np.asarray(found.length).tolist() == [[1], [1], [0]]
    assert np.asarray(found.stopped).all()
    assert (np.asarray(found.tokens)[:, :, 1:] == 0).all()


@pytest.mark.parametrize("completion", [1, 5, 15, 16, 17, 21, 64, 500])
def test_blocks_cover_the_completion_with_little_overhang(completion):
    steps = block_length(completion)
    count = -(-completion // steps)
    assert 1 <= steps <= BLOCK
    assert 0 <= count * steps - completion < count


def test_a_batch_with_pixels_but_no_features_is_refused():
    """The tower runs before a rollout; to forget it must not mean to sample without the image."""
    batch = put(PROMPTS, Layout(PROMPT, 0, 0))
    with pytest.raises(ValueError, match="features"):
        plain(batch)
