"""Log-probabilities and entropies of given tokens: exact, chunked, in float32, never [tokens, vocab] at once."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tiny_checkpoints import QUICK, assert_close

from vlmalign.objectives.logprobs import token_logprobs

RNG = np.random.default_rng(0)
STATES = RNG.normal(size=(2, 3, 7, 8)).astype(np.float32)
HEAD = RNG.normal(size=(50, 8)).astype(np.float32)
TOKENS = RNG.integers(0, 50, size=(2, 3, 7)).astype(np.int32)


def reference(temperature: float = 1.0, softcap: float | None = None):
    states = torch.tensor(STATES, dtype=torch.float64, requires_grad=True)
    head = torch.tensor(HEAD, dtype=torch.float64, requires_grad=True)
    z = states @ head.T
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    every = torch.log_softmax(z / temperature, dim=-1)
    logp = every.gather(-1, torch.from_numpy(TOKENS.astype(np.int64))[..., None])[..., 0]
    entropy = -(every.exp() * every).sum(-1)
    (logp * torch.arange(42).reshape(2, 3, 7) + 0.5 * entropy).sum().backward()
    return logp.detach(), entropy.detach(), states.grad, head.grad


# 42 tokens: in one piece, in pieces that divide them, in pieces that do not.
@pytest.mark.parametrize(
    ("chunk", "options"),
    [
        (1024, {}),
        (42, {}),
        (14, {}),
        (5, {}),
        (1, {}),
        (5, {"temperature": 0.7}),
        (5, {"temperature": 0.7, "softcap": 1.5}),
        (1024, {"softcap": 1.5}),
    ],
)
def test_values_and_gradients_equal_torch(chunk, options):
    @partial(jax.jit, compiler_options=QUICK)
    def run(states, head):
        def total(states, head):
            found = token_logprobs(states, head, jnp.asarray(TOKENS), chunk=chunk, **options)
            weight = jnp.arange(42.0).reshape(2, 3, 7)
            return jnp.sum(weight * found.logp + 0.5 * found.entropy), found

        return jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(states, head)

    (_, found), gradients = run(STATES, HEAD)
    logp, entropy, *expected = reference(**options)
    assert_close(found.logp, logp, 1e-5)
    assert_close(found.entropy, entropy, 1e-5)
    for gradient, known in zip(gradients, expected, strict=True):
        assert_close(gradient, known, 1e-5)


@pytest.mark.parametrize("chunk", [64, 1000])
def test_bfloat16_states_are_summed_in_float32(chunk):
    """Over 4,096 tokens, a log-sum-exp held in bfloat16 would be off by up to 0.03 and a logit by as much."""
    rng = np.random.default_rng(1)
    states, head = (jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in ((100, 32), (4096, 32)))
    tokens = jnp.asarray(rng.integers(0, 4096, 100), jnp.int32)
    found = token_logprobs(states, head, tokens, chunk=chunk)
    assert found.logp.dtype == found.entropy.dtype == jnp.float32
    z = np.asarray(states, np.float64) @ np.asarray(head, np.float64).T
    every = z - np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1, keepdims=True)) - z.max(-1, keepdims=True)
    assert_close(found.logp, every[np.arange(100), tokens], 1e-5)
    assert_close(found.entropy, -(np.exp(every) * every).sum(-1), 1e-5)


def test_extreme_logits_stay_finite():
    states = jnp.asarray([[1e4], [-1e4], [0.0]])
    found = token_logprobs(states, jnp.asarray([[1.0], [-1.0], [0.5]]), jnp.asarray([0, 0, 1]))
    assert_close(found.logp, [0.0, -2e4, -np.log(3)], 1e-6)
    assert_close(found.entropy, [0.0, 0.0, np.log(3)], 1e-6)


def test_no_array_holds_all_tokens_by_vocabulary():
    """In the compiled forward and backward pass, at 4,000 tokens in chunks of 500 and a vocabulary of 3,000."""

    @jax.jit
    @partial(jax.grad, argnums=(0, 1))
    def run(states, head, tokens):
        found = token_logprobs(states, head, tokens, chunk=500)
        return jnp.sum(found.logp + found.entropy)

    shapes = (
        jax.ShapeDtypeStruct(s, t) for s, t in (((4000, 16), "float32"), ((3000, 16), "float32"), ((4000,), "int32"))
    )
    text = run.lower(*shapes).compile().as_text()
    sizes = {int(np.prod([int(d) for d in dims.split(",")])) for dims in re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", text)}
    assert 500 * 3000 in sizes, "a chunk's logits are there under the size that is looked for"
    assert max(sizes) <= 500 * 3000


def test_collision_is_the_probability_of_drawing_the_same_token_twice():
    """log sum_v p(v)^2 of the tempered distribution, with chunks as without; None unless asked for."""
    rng = np.random.default_rng(5)
    states, head = rng.normal(size=(7, 4)).astype(np.float32), rng.normal(size=(11, 4)).astype(np.float32)
    tokens = jnp.asarray(rng.integers(0, 11, 7), jnp.int32)
    z = states.astype(np.float64) @ head.T.astype(np.float64) / 0.7
    p = np.exp(z - z.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    for chunk in (3, 100):
        found = token_logprobs(
            jnp.asarray(states), jnp.asarray(head), tokens, temperature=0.7, chunk=chunk, collision=True
        )
        np.testing.assert_allclose(found.collision, np.log((p**2).sum(-1)), atol=1e-5)
    assert token_logprobs(jnp.asarray(states), jnp.asarray(head), tokens).collision is None


def slopes(what: str, *, frozen: bool, chunk: int, **options):
    """d/d states of a weighted sum: of log-probabilities, with entropies, or with collisions."""

    def total(states, head):
        found = token_logprobs(states, head, jnp.asarray(TOKENS), chunk=chunk, collision=True, **options)
        weight = jnp.arange(42.0).reshape(2, 3, 7)
        more = {"logp": 0.0, "entropy": found.entropy, "collision": found.collision}[what]
        # Measured beside, as metrics are: this must not count as a gradient.
        return jnp.sum(weight * found.logp + 0.5 * more), jax.lax.stop_gradient(found.entropy.sum())

    return jax.grad(total, argnums=0 if frozen else (0, 1), has_aux=True)


@pytest.mark.parametrize("what", ["logp", "entropy", "collision"])
@pytest.mark.parametrize("options", [{"chunk": 1024}, {"chunk": 5, "temperature": 0.7, "softcap": 1.5}])
def test_a_frozen_head_gives_the_same_gradient(what, options):
    found, expected = (
        jax.jit(slopes(what, frozen=frozen, **options), compiler_options=QUICK)(STATES, HEAD)[0]
        for frozen in (True, False)
    )
    assert_close(found, expected[0], 1e-6)


@pytest.mark.parametrize(("what", "frozen", "most"), [("logp", True, 2), ("entropy", True, 3), ("logp", False, 4)])
def test_products_with_the_head(what, frozen, most):
    """Logits and d logp / d state, once each; with another gradient the logits again; with a trained head its own."""
    width = 512  # so that products outweigh what is done with each logit
    states, head = (jax.ShapeDtypeStruct((*x.shape[:-1], width), x.dtype) for x in (STATES, HEAD))
    compiled = jax.jit(slopes(what, frozen=frozen, chunk=1024)).lower(states, head).compile()
    one = 2 * TOKENS.size * len(HEAD) * width
    assert 2 * one <= compiled.cost_analysis()["flops"] < (most + 0.5) * one


@pytest.mark.full
def test_gradients_under_vmap_and_checkpoint():
    """The rule of the frozen head composes with both."""
    states = jnp.stack([STATES[0], STATES[1]])

    def total(states):
        return token_logprobs(states, jnp.asarray(HEAD), jnp.asarray(TOKENS[0]), chunk=5).logp.sum()

    one_by_one = jnp.stack([jax.grad(total)(x) for x in states])
    assert_close(jax.vmap(jax.grad(total))(states), one_by_one, 1e-6)
    assert_close(jax.grad(lambda x: jax.checkpoint(total)(x))(states[0]), one_by_one[0], 1e-6)
