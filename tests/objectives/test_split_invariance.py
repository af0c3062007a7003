"""Cutting an optimiser batch into micro-batches differently changes neither loss, gradient norm nor parameters.

And the two references a policy can be held against: the adapter switched off, or an earlier adapter kept frozen.
"""

from copy import copy
from functools import cache, partial
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_checkpoints import (
    QUICK,
    assert_close,
    group,
    put,
    random_adapter,
    read,
    scores,
    text_model,
    write,
)

from vlmalign.models.lora import LoraSpec, is_adapter
from vlmalign.models.model import Model
from vlmalign.objectives.grpo import GrpoSettings, grpo_counts, grpo_loss
from vlmalign.objectives.sft import sft_counts, sft_loss
from vlmalign.studies.engine.objective import objective_beside
from vlmalign.studies.engine.stage_config import SftBeside
from vlmalign.training.step import MicroBatch, Objective, StepMetrics, Trainer, token_scores
from vlmalign.types import GroupBatch, Layout

LAYOUT = Layout(8, 2, 6)
TEMPERATURE = 0.8
SFT = Objective("sft", sft_loss, sft_counts)
SETTINGS = GrpoSettings(clip_low=0.1, clip_high=0.2, beta=0.2, max_completion=6)
GRPO = Objective(
    "grpo",
    partial(grpo_loss, settings=SETTINGS),
    partial(grpo_counts, settings=SETTINGS),
    temperature=TEMPERATURE,
    needs_reference=True,
)


@cache
def base():
    """One layer, all this needs."""
    module = text_model(5, num_hidden_layers=1, layer_types=["sliding_attention"])
    return read(write(module, "one-layer"), module)


@cache
def model() -> Model:
    return Model(base().model.config, lora=LoraSpec(rank=2, alpha=4.0))


@cache
def adapter(seed: int):
    return random_adapter(model(), seed=seed)


@cache
def groups():
    """Eight groups of two, all of different lengths."""
    rng = np.random.default_rng(0)

    def words(low: int, high: int) -> list[int]:
        return rng.integers(3, 90, int(rng.integers(low, high + 1))).tolist()

    return tuple(group(i, words(1, 8), words(1, 6), words(1, 6)) for i in range(8))


def batch_of(some, rows: int | None = None) -> GroupBatch:
    batch = put(some, LAYOUT, rows=rows, images=None)
    advantage = np.zeros(batch.weight.shape[:2], np.float32)
    for row, item in enumerate(some):
        advantage[row] = [1.0 - 0.3 * item.id, 0.2 * item.id - 0.9]
    return batch._replace(advantage=advantage)


#: eight of one, four of two, one of eight, and an uneven cut whose last micro-batch is padded
SPLITS = {
    "8x1": ([1] * 8, 1),
    "4x2": ([2] * 4, 2),
    "1x8": ([8], 8),
    "8 + padding": ([2, 2, 2, 1, 1], 2),
}


def micro_batches(split: str, recorded) -> list[MicroBatch]:
    sizes, rows = SPLITS[split]
    found, at = [], 0
    for size in sizes:
        own = {}
        for name, value in recorded().items():
            own[name] = np.zeros((rows, *value.shape[1:]), np.float32)
            own[name][:size] = value[at : at + size]
        found.append(MicroBatch(batch_of(groups()[at : at + size], rows), own))
        at += size
    assert at == 8
    return found


def nothing() -> dict:
    return {}


@cache
def old_logp() -> dict[str, np.ndarray]:
    """A policy some steps back, so that ratios differ from 1."""
    found = scores(model(), {**base().params, **adapter(3)}, batch_of(groups()), temperature=TEMPERATURE)
    return {"old_logp": np.asarray(found.logp)}


TRAINERS = {
    "sft": (SFT, nothing, None),
    "grpo, adapter off": (GRPO, old_logp, "off"),
    "grpo, frozen adapter": (GRPO, old_logp, "frozen"),
}


@cache
def trainer(kind: str) -> Trainer:
    objective, _, reference = TRAINERS[kind]
    policy = {
        None: None,
        "off": (model().without_lora(), {}),
        "frozen": (model(), adapter(2)),
    }[reference]
    # The trainer's own programs, compiled without LLVM's optimisations.
    with patch.object(jax, "jit", partial(jax.jit, compiler_options=QUICK)):
        return Trainer(model(), objective, optax.sgd(0.5), reference=policy)


@cache
def stepped(kind: str, split: str) -> tuple[dict, StepMetrics]:
    state = trainer(kind).init({name: jnp.array(value) for name, value in adapter(1).items()})
    state, metrics = trainer(kind).step(state, base().params, micro_batches(split, TRAINERS[kind][1]))
    assert int(state.step) == 1
    return jax.device_get((state.params, metrics))


@pytest.mark.parametrize(
    ("kind", "split"),
    [
        pytest.param("sft", "8x1", marks=pytest.mark.full),
        pytest.param("sft", "4x2", marks=pytest.mark.full),
        ("sft", "8 + padding"),
        pytest.param("grpo, adapter off", "4x2", marks=pytest.mark.full),
        pytest.param("grpo, adapter off", "8 + padding", marks=pytest.mark.full),
    ],
)
def test_every_split_is_the_same_step(kind, split):
    params, metrics = stepped(kind, split)
    expected, known = stepped(kind, "1x8")
    assert_close(metrics.loss, known.loss, 1e-5)
    assert_close(metrics.grad_norm, known.grad_norm, 1e-5)
    assert metrics.parts.keys() == known.parts.keys()
    for name in metrics.parts:
        for i in (0, 1):
            assert_close(metrics.parts[name][i], known.parts[name][i], 1e-5, name)
    for name, value in params.items():
        assert_close(value, expected[name], 1e-5, name)
        assert np.abs(value - np.asarray(adapter(1)[name])).max() > 1e-5, f"{name} did not move"


@cache
def whole_batch() -> GroupBatch:
    return batch_of(groups())


@pytest.mark.parametrize(
    "kind", [kind if kind == "sft" else pytest.param(kind, marks=pytest.mark.full) for kind in TRAINERS]
)
def test_the_step_is_the_gradient_of_the_whole_formula(kind):
    """Written out at once: one pass over all groups, one division, one gradient."""
    objective, recorded, reference = TRAINERS[kind]
    batch, known = whole_batch(), dict(recorded())
    if reference is not None:
        other = (
            scores(base().model, base().params, batch, temperature=TEMPERATURE)
            if reference == "off"
            else scores(model(), {**base().params, **adapter(2)}, batch, temperature=TEMPERATURE)
        )
        known["ref_logp"] = other.logp

    @partial(jax.jit, compiler_options=QUICK)
    def run(params, frozen, batch, known):
        def loss(params):
            found = token_scores(model(), {**frozen, **params}, batch, objective.temperature)
            w, logp = batch.weight, found.logp
            if objective.name == "sft":
                return jnp.sum(-logp * w) / jnp.sum(w)
            ratio = jnp.exp(logp - known["old_logp"])
            a = batch.advantage[..., None]
            gain = jnp.minimum(ratio * a, jnp.clip(ratio, 0.9, 1.2) * a)
            gap = known["ref_logp"] - logp
            return -jnp.sum(w * (gain - 0.2 * (jnp.exp(gap) - gap - 1))) / (8 * 2 * 6)

        return jax.value_and_grad(loss)(params)

    value, gradients = run(adapter(1), base().params, batch, known)
    params, metrics = stepped(kind, "1x8")
    assert_close(metrics.loss, value, 1e-5)
    assert_close(metrics.grad_norm, optax.tree.norm(gradients), 1e-5)
    for name, gradient in gradients.items():
        assert_close(params[name], adapter(1)[name] - 0.5 * gradient, 1e-5, name)


@pytest.mark.full
@pytest.mark.parametrize("split", ["1x8", "8 + padding"])
def test_a_second_objective_adds_its_own_gradient(split):
    """Each over counts of its own, however it is cut: with SGD, what the two steps move by themselves."""
    first, second = "grpo, adapter off", "sft"
    weight = 0.25
    mix = objective_beside(SftBeside(data="any", batch=8, weight=weight))
    mixed = copy(trainer(first))
    with patch.object(jax, "jit", partial(jax.jit, compiler_options=QUICK)):
        mixed.beside = Trainer(model(), mix, optax.sgd(0.5))
    state = mixed.init({name: jnp.array(value) for name, value in adapter(1).items()})
    state, metrics = mixed.step(
        state, base().params, micro_batches("1x8", old_logp), beside=micro_batches(split, nothing)
    )
    (alone, known), (taught, loss) = stepped(first, "1x8"), stepped(second, "1x8")
    assert_close(metrics.loss, known.loss + weight * loss.loss, 1e-5)
    assert metrics.parts.keys() == known.parts.keys() | {"sft/loss", "sft/entropy"}
    assert_close(metrics.parts["sft/loss"][0], loss.parts["loss"][0], 1e-5)
    for name, value in state.params.items():
        expected = alone[name] + weight * (taught[name] - np.asarray(adapter(1)[name]))
        assert_close(value, expected, 1e-5, name)


def test_the_two_references_differ():
    assert abs(stepped("grpo, adapter off", "1x8")[1].loss - stepped("grpo, frozen adapter", "1x8")[1].loss) > 1e-3


def test_a_policy_equal_to_its_reference_has_no_penalty():
    """The start of training: B is zero, the reference is the adapter switched off."""
    state = trainer("grpo, adapter off").init(
        {name: value * (".lora_A." in name) for name, value in adapter(1).items()}
    )
    _, metrics = trainer("grpo, adapter off").step(state, base().params, [MicroBatch(whole_batch(), old_logp())])
    total, count = metrics.parts["kl"]
    assert float(total) <= 1e-9 * float(count)


def test_an_objective_that_needs_a_reference_says_so():
    with pytest.raises(ValueError, match="grpo compares with a reference"):
        Trainer(model(), GRPO, optax.sgd(1.0))


def test_only_the_trained_parameters_are_in_the_state():
    assert all(map(is_adapter, stepped("sft", "1x8")[0]))
    assert set(stepped("sft", "1x8")[0]) == set(adapter(1))
