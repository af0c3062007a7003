"""Drawing tokens: the distribution is the stated one, edge cases never pick an impossible token."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from tiny_checkpoints import QUICK, assert_close

from vlmalign.rollout.sampling import BLOCK, Sampling, _search, draw, in_blocks, inverse_cdf, keep, top_p_threshold

LAST = float(np.nextafter(np.float32(1), np.float32(0)))


def reference_kept(p: np.ndarray, top_p: float) -> np.ndarray:
    """By sorting, in float64: the fewest most likely tokens that hold top_p of the mass, and all their equals."""
    order = np.argsort(-p, kind="stable")
    mass = np.cumsum(p[order].astype(np.float64))
    last = order[min(int(np.searchsorted(mass, top_p * mass[-1])), len(p) - 1)]
    return p >= p[last]


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(0, 6), min_size=12, max_size=12).filter(any),
    top_p=st.sampled_from([0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99]),
)
def test_top_p_keeps_what_a_sort_would_keep(counts, top_p):
    """Small counts make ties the rule."""
    p = np.asarray(counts, np.float32) / np.float32(64)
    kept = p >= np.asarray(top_p_threshold(jnp.asarray(p)[None], top_p))[0]
    mass = p.astype(np.float64)
    # The boundary may fall on a sum that float32 cannot tell from the goal: then either set is right.
    assert mass[kept].sum() >= top_p * mass.sum() - 1e-6
    without_last = mass[kept & (mass > mass[kept].min())].sum()
    assert without_last < top_p * mass.sum() + 1e-6
    if abs(without_last - top_p * mass.sum()) > 1e-6 and abs(mass[kept].sum() - top_p * mass.sum()) > 1e-6:
        assert np.array_equal(kept, reference_kept(p, top_p))


def test_top_p_over_a_large_vocabulary():
    rng = np.random.default_rng(0)
    p = np.asarray(jax.nn.softmax(jnp.asarray(3 * rng.normal(size=(16, 5000)), jnp.float32), axis=-1))
    threshold = np.asarray(top_p_threshold(jnp.asarray(p), 0.9))
    for row in range(16):
        kept = p[row] >= threshold[row]
        assert np.array_equal(kept, reference_kept(p[row], 0.9)) or abs(p[row][kept].sum() - 0.9) < 1e-5
        assert 1 < kept.sum() < 2000


def test_the_search_for_a_gpu_finds_the_same_threshold():
    """Without a loop and four ways at once, as on a GPU, to the bit; ties, zeros and sums that round included."""
    rng = np.random.default_rng(1)
    rows = [jax.nn.softmax(jnp.asarray(scale * rng.normal(size=(8, 700)), jnp.float32)) for scale in (0.01, 1, 8, 60)]
    p = jnp.concatenate([*rows, jnp.asarray(rng.integers(0, 4, (8, 700)) / 1024, jnp.float32)])

    def found(ways: int, unrolled: bool) -> np.ndarray:
        goals = [0.05, 0.5, 0.95, 1 - 1e-6]

        @partial(jax.jit, compiler_options=QUICK)
        def one(goal):
            held = goal * jnp.sum(p, axis=-1, keepdims=True)
            return _search(
                p,
                enough=lambda kept: jnp.sum(jnp.where(kept, p, 0.0), axis=-1, keepdims=True) >= held,
                ways=ways,
                unrolled=unrolled,
            )

        return np.stack([one(jnp.float32(goal)) for goal in goals])

    assert np.array_equal(found(2, False), found(4, True))


def test_top_p_always_keeps_the_most_likely():
    p = jnp.asarray([[0.98, 0.01, 0.01], [0.0, 0.0, 1.0], [1 / 3] * 3])
    for top_p in (1e-6, 0.5):
        kept = np.asarray(p >= top_p_threshold(p, top_p))
        assert kept.tolist() == [[True, False, False], [False, False, True], [True] * 3]


@pytest.mark.parametrize("vocab", [3, BLOCK, 2 * BLOCK + 7])
def test_inverse_cdf_never_picks_weight_zero(vocab):
    """Whole blocks of zeros at the front, in the middle and at the end; both ends of the unit interval."""
    rng = np.random.default_rng(vocab)
    weights = rng.random((200, vocab), np.float32) * (rng.random((200, vocab)) < 0.05)
    weights[:50] = 0.0
    weights[np.arange(50), rng.integers(0, vocab, 50)] = 1e-30
    if vocab > BLOCK:
        weights[50:90, :BLOCK] = 0.0
        weights[90:130, BLOCK:] = 0.0
    weights[weights.sum(1) == 0, vocab // 2] = 1.0
    for uniform in (0.0, LAST, 0.5, None):
        u = rng.random(200, np.float32) if uniform is None else np.full(200, uniform, np.float32)
        picked = np.asarray(inverse_cdf(*in_blocks(jnp.asarray(weights)), jnp.asarray(u)))
        assert (picked >= 0).all()
        assert (picked < vocab).all()
        assert (weights[np.arange(200), picked] > 0).all()
    first, last = (
        np.asarray(inverse_cdf(*in_blocks(jnp.asarray(weights)), jnp.full(200, u, jnp.float32))) for u in (0.0, LAST)
    )
    assert np.array_equal(first, (weights > 0).argmax(1))
    assert np.array_equal(last, vocab - 1 - (weights > 0)[:, ::-1].argmax(1)) or vocab > BLOCK


@settings(max_examples=50, deadline=None)
@given(
    weights=st.lists(st.sampled_from([0.0, 0.0, 1e-20, 0.25, 1.0, 3.0]), min_size=9, max_size=9).filter(any),
    uniform=st.one_of(st.sampled_from([0.0, LAST]), st.floats(0, LAST, width=32)),
)
def test_inverse_cdf_is_the_inverse(weights, uniform):
    w = np.asarray(weights, np.float64)
    picked = int(inverse_cdf(*in_blocks(jnp.asarray([weights], jnp.float32)), jnp.asarray([uniform], jnp.float32))[0])
    assert w[picked] > 0
    total, slack = w.sum(), 1e-6 * w.sum()
    assert w[:picked].sum() <= uniform * total + slack
    assert w[: picked + 1].sum() >= uniform * total - slack


ROWS = 20_000
#: seven tokens of a vocabulary of three blocks carry all the mass
PLACES = np.array([0, 5, 511, 512, 700, 1023, 1060])
LOGITS = np.array([1.0, 0.0, 2.0, 0.5, -1.0, 1.5, 0.2], np.float32)


@partial(jax.jit, static_argnames="sampling")
def draws(key, sampling):
    z = jnp.full((1061,), -1e4).at[PLACES].set(LOGITS)
    return draw(jnp.broadcast_to(z, (ROWS, 1061)), jax.random.split(key, ROWS), sampling)


@pytest.mark.full
@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=0.7), Sampling(temperature=1.3, top_p=0.8)], ids=str
)
def test_draws_follow_the_stated_distribution(sampling):
    found = draws(jax.random.key(5), sampling)
    z = LOGITS.astype(np.float64) / sampling.temperature
    full = np.exp(z) / np.exp(z).sum()
    kept = np.ones(7, bool) if sampling.top_p == 1 else reference_kept(full, sampling.top_p)
    assert kept.sum() == (7 if sampling.top_p == 1 else 4)
    expected = np.where(kept, full, 0) / full[kept].sum()
    counts = np.array([(np.asarray(found.token) == place).sum() for place in PLACES])
    assert counts.sum() == ROWS, "nothing else is ever drawn"
    assert (counts[~kept] == 0).all()
    assert chisquare(counts[kept], ROWS * expected[kept]).pvalue > 1e-3
    index = np.searchsorted(PLACES, found.token)
    assert_close(found.logp, np.log(full)[index], 1e-5)
    assert_close(found.kept_logp, np.log(expected[index]), 1e-5)


def test_greedy_takes_the_first_most_likely_and_reports_temperature_one():
    z = jnp.asarray([[0.0, 3.0, 1.0], [2.0, 2.0, 0.0]])
    found = draw(z, jax.random.split(jax.random.key(0), 2), Sampling(temperature=0.0, top_p=0.3))
    assert found.token.tolist() == [1, 0]
    assert_close(found.logp, jax.nn.log_softmax(z)[jnp.arange(2), found.token], 1e-6)


@pytest.mark.full
def test_bfloat16_logits_are_drawn_in_float32():
    z = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3000)), jnp.bfloat16)
    found = draw(z, jax.random.split(jax.random.key(0), 4), Sampling())
    exact = jax.nn.log_softmax(z.astype(jnp.float32))[jnp.arange(4), found.token]
    assert found.logp.dtype == jnp.float32
    assert_close(found.logp, exact, 1e-6)


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.2}], ids=str)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValueError, match="temperature >= 0 and 0 < top_p <= 1"):
        Sampling(**wrong)


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(0, 6), min_size=12, max_size=12).filter(any),
    top_k=st.integers(1, 14),
    min_p=st.sampled_from([0.0, 0.2, 0.5, 1.0]),
)
def test_top_k_and_min_p_keep_what_a_sort_would_keep(counts, top_k, min_p):
    """Ties with the last kept token are kept; min-p compares with the most likely token."""
    p = np.asarray(counts, np.float32) / np.float32(64)
    found = np.asarray(keep(jnp.asarray(p)[None], Sampling(top_k=top_k, min_p=min_p)))[0]
    kth = np.sort(p)[::-1][min(top_k, len(p)) - 1]
    kept = (p >= kth) & (p >= np.float32(min_p) * p.max())
    assert np.array_equal(found, np.where(kept, p, 0))


def test_top_p_is_of_the_mass_that_top_k_left():
    p = jnp.asarray([[0.4, 0.3, 0.2, 0.1]])
    assert (np.asarray(keep(p, Sampling(top_p=0.75)))[0] > 0).tolist() == [True, True, True, False]
    assert (np.asarray(keep(p, Sampling(top_p=0.55, top_k=2)))[0] > 0).tolist() == [True, False, False, False]


@pytest.mark.full
def test_kept_log_probability_under_top_k():
    z = jnp.asarray([[2.0, 1.0, 0.0, -1.0]] * 64)
    found = draw(z, jax.random.split(jax.random.key(1), 64), Sampling(top_k=2))
    assert set(np.asarray(found.token).tolist()) == {0, 1}
    pair = jax.nn.log_softmax(z[0, :2])
    assert_close(found.kept_logp, pair[found.token], 1e-6)
    assert_close(found.logp, jax.nn.log_softmax(z[0])[found.token], 1e-6)


@pytest.mark.parametrize("wrong", [{"top_k": -1}, {"min_p": -0.1}, {"min_p": 1.1}], ids=str)
def test_wrong_cuts_are_refused(wrong):
    with pytest.raises(ValueError, match="top_k >= 0 and 0 <= min_p <= 1"):
        Sampling(**wrong)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(top_p=0.9), Sampling(temperature=0.0), Sampling(top_k=3)])
def test_ids_that_may_not_be_drawn_never_are(sampling):
    """However likely they are; the log-probability over all tokens stays that of the model."""
    sampling = replace(sampling, never=((2, 5), (7, 8)))
    z = np.zeros((200, 9), np.float32)
    z[:, 3] = 3.0
    found = draw(jnp.asarray(z), jax.random.split(jax.random.key(0), 200), sampling)
    drawn = set(np.asarray(found.token).tolist())
    allowed = {0, 1, 5, 6, 8}
    assert drawn <= allowed
    assert sampling.temperature == 0 or drawn == allowed
    np.testing.assert_allclose(found.logp, -np.log(8 + np.exp(3.0)), rtol=1e-5)
    if sampling.temperature:
        np.testing.assert_allclose(found.kept_logp, -np.log(5), rtol=1e-5)
