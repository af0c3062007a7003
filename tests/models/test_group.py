"""A group equals its continuations run alone: log-probabilities and gradients, and transformers' log-probabilities.

Prompt and images are computed once per group; here is the proof that nothing else changes. Windows of three tokens
bind inside images of four and across the end of every prompt.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tiny_checkpoints import (
    SOFT_TOKENS,
    Checkpoint,
    adapted,
    assert_close,
    group,
    occurrences,
    pictures,
    put,
    scores,
    scores_and_gradients,
    torch_logits,
)

from vlmalign.models.attention import IMPLEMENTATIONS, cudnn_refusal
from vlmalign.models.decoder import REMAT
from vlmalign.models.siglip import SiglipTower
from vlmalign.types import Group, GroupBatch, Layout

LAYOUT = Layout(16, 3, 9)
ALONE = LAYOUT._replace(group=1)

#: different prompt and completion lengths; images in prompts and in later turns, twice in a row, shared between rows
GROUPS = (
    group(10, [2, 5, "a", 8, 9], [11, 12, 13, 14, 15, 16, 17, 18, 19], [20, "a", 21], [22]),
    group(11, [2, "b", "a", 7, 30, 31], [33, 34], ["c", 36, 37], [38, 39, 40, 41]),
    group(12, [2, 50, 51], [52, 53, 54, 55, 56, 57], [58, "b"], [59, 60, 61]),
)


def implementations(full: tuple[str, ...] = ()) -> list:
    """Every implementation that can run in float32 here, some in the full tests; the others as skips that say why."""
    return [
        pytest.param(
            name,
            marks=[
                pytest.mark.skipif(reason is not None, reason=f"attention {name!r}: {reason}"),
                *([pytest.mark.full] if name in full else []),
            ],
        )
        for name in IMPLEMENTATIONS
        for reason in (cudnn_refusal(16, np.dtype("float32")) if name == "cudnn" else None,)
    ]


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of five queries: the prompt is cut into four pieces, each completion into two."""
    monkeypatch.setitem(IMPLEMENTATIONS, "chunked", partial(IMPLEMENTATIONS["chunked"], chunk=5))


def weights_of(groups: tuple[Group, ...], seed: int = 0, rows: int | None = None) -> np.ndarray:
    """A random weight for every real continuation token, 0 on padding."""
    shape = (rows or len(groups), len(groups[0].continuations), LAYOUT.completion)
    weight = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    for row in range(shape[0]):
        for k in range(shape[1]):
            real = len(groups[row].continuations[k]) if row < len(groups) else 0
            weight[row, k, real:] = 0.0
    return weight


def only(item: Group, k: int) -> Group:
    return replace(item, continuations=(item.continuations[k],))


def run_alone(checkpoint: Checkpoint, groups: tuple[Group, ...], weight: np.ndarray):
    """Each prompt + continuation as a batch of its own: {(row, k): logp} and the summed gradients."""
    found, total = {}, None
    for row, item in enumerate(groups):
        for k, continuation in enumerate(item.continuations):
            batch = put([only(item, k)], ALONE)
            logp, gradients = scores_and_gradients(
                checkpoint.model, checkpoint.params, batch, weight[row : row + 1, k : k + 1]
            )
            found[row, k] = np.asarray(logp)[0, 0, : len(continuation)]
            gradients = {name: np.asarray(g, np.float64) for name, g in gradients.items()}
            total = gradients if total is None else {n: total[n] + gradients[n] for n in total}
    return found, total


@pytest.fixture(scope="module")
def alone():
    return run_alone(adapted(), GROUPS, weights_of(GROUPS))


def transformers_logp(checkpoint: Checkpoint, item: Group, k: int) -> np.ndarray:
    tokens = np.concatenate([item.prompt.tokens, item.continuations[k].tokens])
    z = torch.from_numpy(torch_logits(checkpoint.torch, tokens, occurrences(item, k)))
    every = torch.log_softmax(z[:-1], dim=-1).numpy()
    logp = every[np.arange(len(tokens) - 1), tokens[1:]]
    return logp[len(item.prompt) - 1 :]


def check_logp(logp: np.ndarray, groups: tuple[Group, ...], expected, tolerance: float = 1e-5) -> None:
    for row, item in enumerate(groups):
        for k, continuation in enumerate(item.continuations):
            assert_close(logp[row, k, : len(continuation)], expected(row, k), tolerance, f"row {row}, k {k}")


@pytest.mark.parametrize("name", implementations(full=("chunked",)))
def test_values_and_gradients_equal_each_continuation_alone(name, alone, small_chunks):
    model = replace(adapted().model, attention=name)
    logp, gradients = scores_and_gradients(model, adapted().params, put(GROUPS, LAYOUT), weights_of(GROUPS))
    values, sums = alone
    check_logp(np.asarray(logp), GROUPS, lambda row, k: values[row, k])
    assert gradients.keys() == adapted().params.keys()
    for part in ("lora_A", "lora_B", "vision_tower", "multi_modal_projector", "embed_tokens", "q_proj.weight"):
        assert any(part in name and np.abs(g).max() > 1e-2 for name, g in gradients.items()), part
    for parameter, gradient in gradients.items():
        assert_close(gradient, sums[parameter], 1e-5, parameter)


@pytest.mark.parametrize("k", [1, pytest.param(3, marks=pytest.mark.full)])
def test_values_equal_transformers(k):
    """On the concatenated sequence, with the adapter merged into the torch model. K = 1 takes each group's k-th."""
    checkpoint = adapted()
    if k == 3:
        logp = np.asarray(scores(checkpoint.model, checkpoint.params, put(GROUPS, LAYOUT)).logp)
        check_logp(logp, GROUPS, lambda row, k: transformers_logp(checkpoint, GROUPS[row], k))
        return
    for pick in range(3):
        for item in GROUPS:
            single = (only(item, pick),)
            logp = np.asarray(scores(checkpoint.model, checkpoint.params, put(single, ALONE)).logp)
            check_logp(logp, single, lambda row, k, single=single: transformers_logp(checkpoint, single[row], k))


def random_group(rng: np.random.Generator, number: int) -> Group:
    def piece(room: int, least: int) -> list[int | str]:
        parts: list[int | str] = []
        length = int(rng.integers(least, room + 1))
        while length > 0:
            if length >= SOFT_TOKENS + 2 and rng.random() < 0.5:
                parts.append(str(rng.choice(["a", "b", "c"])))
                length -= SOFT_TOKENS + 2
            else:
                parts.append(int(rng.integers(3, 90)))
                length -= 1
        return parts

    return group(number, piece(LAYOUT.prompt, 1), *(piece(LAYOUT.completion, 1) for _ in range(3)))


@pytest.mark.parametrize("seed", range(4))
def test_random_layouts(seed):
    rng = np.random.default_rng(seed)
    groups = tuple(random_group(rng, number) for number in range(3))
    weight = weights_of(groups, seed)
    values, sums = run_alone(adapted(), groups, weight)
    logp, gradients = scores_and_gradients(adapted().model, adapted().params, put(groups, LAYOUT), weight)
    check_logp(np.asarray(logp), groups, lambda row, k: values[row, k])
    for parameter, gradient in gradients.items():
        assert_close(gradient, sums[parameter], 1e-5, parameter)


def logp_of(batch: GroupBatch) -> np.ndarray:
    return np.asarray(scores(adapted().model, adapted().params, batch).logp)


def test_padding_changes_nothing():
    """Neither what stands in padding nor whether a row is padding moves a bit of the real rows."""
    batch = put(GROUPS, LAYOUT)
    real = batch.segment[:, LAYOUT.prompt :].reshape(batch.weight.shape) > 0
    expected = logp_of(batch)
    rng = np.random.default_rng(3)

    def scramble(x: np.ndarray, low: int, high: int) -> np.ndarray:
        return np.where(batch.segment < 0, rng.integers(low, high, x.shape).astype(x.dtype), x)

    garbage = batch._replace(
        tokens=scramble(batch.tokens, 0, 96),
        order=scramble(batch.order, 0, 60),
        position=scramble(batch.position, 0, 60),
        image=scramble(batch.image, -1, 12),
        block=scramble(batch.block, -1, 3),
    )
    assert not np.array_equal(garbage.tokens, batch.tokens)
    assert np.array_equal(logp_of(garbage)[real], expected[real])

    fewer = put(GROUPS[:2], LAYOUT, rows=3)
    assert (fewer.segment[2] == -1).all()
    assert np.array_equal(logp_of(fewer)[:2][real[:2]], expected[:2][real[:2]])
    assert np.isfinite(logp_of(fewer)).all()


def test_padding_rows_give_no_gradient():
    weight = weights_of(GROUPS[:2], rows=3)
    gradients = {}
    for name, batch in {
        "padded": put(GROUPS[:2], LAYOUT, rows=3),
        "repeated": put([*GROUPS[:2], GROUPS[0]], LAYOUT),
    }.items():
        gradients[name] = scores_and_gradients(adapted().model, adapted().params, batch, weight)[1]
    for parameter, gradient in gradients["padded"].items():
        assert np.isfinite(gradient).all(), parameter
        assert_close(gradient, gradients["repeated"][parameter], 1e-6, parameter)


def test_rows_do_not_see_each_other():
    batch = put(GROUPS, LAYOUT)
    turned = jax.tree.map(lambda x: x[::-1].copy(), batch._replace(pixels=None))._replace(pixels=batch.pixels)
    assert np.array_equal(logp_of(turned)[::-1], logp_of(batch))


def test_permuting_continuations_permutes_results():
    order = [2, 0, 1]
    permuted = [replace(item, continuations=tuple(item.continuations[k] for k in order)) for item in GROUPS]
    expected = logp_of(put(GROUPS, LAYOUT))
    found = logp_of(put(permuted, LAYOUT))
    real = put(permuted, LAYOUT).weight > 0
    assert np.array_equal(found[real], expected[:, order][real])


def test_features_stand_for_pixels():
    """The frozen tower's features, given instead of pixels, lead to the same log-probabilities."""
    checkpoint = adapted()
    batch = put(GROUPS, LAYOUT)
    features = jax.jit(checkpoint.model.encode)(checkpoint.params, batch.pixels)
    found = logp_of(batch._replace(pixels=None, features=features))
    assert_close(found, logp_of(batch), 1e-5)


def test_each_distinct_image_goes_through_the_tower_once(monkeypatch):
    """Five occurrences of three images in nine sequences: the traced program calls the tower once, on three."""
    seen = []
    forward = SiglipTower.__call__

    def record(self, pixels):
        seen.append(pixels.shape)
        return forward(self, pixels)

    monkeypatch.setattr(SiglipTower, "__call__", record)
    batch = put(GROUPS, LAYOUT)
    jax.eval_shape(adapted().model.states, adapted().params, batch)
    assert seen == [(3, 3, 16, 16)]
    assert np.array_equal(batch.pixels, pictures(["a", "b", "c"]))


def test_no_prompt_key_is_copied_per_continuation():
    """No array of the compiled forward and backward pass holds K x prompt positions of keys."""
    batch = put(GROUPS, LAYOUT)
    compiled = scores_and_gradients.lower(
        replace(adapted().model, attention="joint"), adapted().params, batch, weights_of(GROUPS)
    ).compile()
    n, p, k, heads, h = 3, LAYOUT.prompt, LAYOUT.group, 2, 16
    copies = {f"[{n},{k},{p},{heads},{h}]", f"[{n},{p},{k},{heads},{h}]", f"[{n * k},{p},{heads},{h}]"}
    text = compiled.as_text()
    assert f"[{n},{p},{heads},{h}]" in text, "the shared keys are there under the name that is looked for"
    assert not any(shape in text for shape in copies)


@pytest.mark.parametrize("remat", [pytest.param(remat, marks=pytest.mark.full) for remat in REMAT if remat != "none"])
def test_rematerialisation_changes_no_value_and_no_gradient(remat):
    item = only(GROUPS[0], 1)
    weight = weights_of((item,))
    (values, gradients), (expected, whole) = (
        scores_and_gradients(replace(adapted().model, remat=kind), adapted().params, put([item], ALONE), weight)
        for kind in (remat, "none")
    )
    assert_close(values, expected, 1e-6)
    for parameter in whole:
        assert_close(gradients[parameter], whole[parameter], 1e-5, parameter)


@pytest.mark.full
def test_each_rematerialisation_keeps_less_than_the_one_before():
    """Bytes that the forward pass hands to the backward pass; by shapes alone."""
    batch, base = jax.tree.map(jnp.asarray, put(GROUPS, LAYOUT)), adapted().params

    def kept(remat: str) -> int:
        model = replace(adapted().model, remat=remat)
        backward = jax.eval_shape(lambda p: jax.vjp(lambda p: model.states(p, batch), p)[1], base)
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(backward))

    found = {remat: kept(remat) for remat in REMAT}
    assert list(found) == ["none", "dots", "attention", "full"]
    assert sorted(found.values(), reverse=True) == list(found.values())
    assert len(set(found.values())) == len(found), found
