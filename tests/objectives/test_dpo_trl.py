"""Preference losses against TRL's own code: value, gradient with respect to every token, metrics; and cuts of a batch."""

import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tiny_checkpoints import assert_close
from trl import DPOConfig
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl_preference import Accelerator, Scored, trl_dpo_loss

from vlmalign.objectives.dpo import DpoSettings, dpo_counts, dpo_loss
from vlmalign.objectives.dpo_losses import PAIR_LOSSES
from vlmalign.types import GroupBatch, Scores

N, C, P = 8, 7, 3  # pairs, tokens of a completion, tokens of a prompt

RNG = np.random.default_rng(0)
LENGTHS = RNG.integers(1, C + 1, size=(N, 2))
LENGTHS[0] = [C, 4]
WEIGHT = (np.arange(C) < LENGTHS[..., None]).astype(np.float32)
WEIGHT[0, 0, 2] = 0.0  # a token of another turn
LOGP = (-2 * RNG.random((N, 2, C))).astype(np.float32)
REF = (LOGP + 0.7 * RNG.normal(size=LOGP.shape)).astype(np.float32)
ENTROPY = RNG.random((N, 2, C)).astype(np.float32)
LOG_SUM_SQ = (-RNG.random((N, 2, C))).astype(np.float32)


def batch_of(rows=slice(None), group_id=None) -> GroupBatch:
    weight = WEIGHT[rows]
    empty = np.zeros((len(weight), P + 2 * C), np.int32)
    ids = np.arange(len(weight)) if group_id is None else np.asarray(group_id)
    return GroupBatch(*(empty,) * 6, weight=weight, group_id=ids.astype(np.int32))


def ours(settings: DpoSettings, *, rows=slice(None), batch=None, logp=LOGP, ref=REF, counts=None):
    """(loss, gradient [n, 2, c], metrics as (sum, count))."""
    batch = batch_of(rows) if batch is None else batch
    counts = counts or dpo_counts([batch], settings=settings)

    def total(logp):
        scores = Scores(
            logp=logp, entropy=jnp.asarray(ENTROPY[rows]), ref_logp=None if ref is None else jnp.asarray(ref[rows])
        )
        parts = dpo_loss(scores._replace(collision=jnp.asarray(LOG_SUM_SQ[rows])), batch, settings=settings)
        assert parts.sums.keys() == counts.keys()
        return sum(value / counts[name] for name, value in parts.sums.items()), parts.metrics

    (value, metrics), gradient = jax.value_and_grad(total, has_aux=True)(jnp.asarray(logp[rows]))
    return float(value), np.asarray(gradient), jax.tree.map(float, metrics)


def as_trl(values: np.ndarray) -> torch.Tensor:
    """[n, 2, c] -> [2n, p + c - 1]: chosen rows first, zero where there is no label, as TRL's head gives them."""
    values = np.where(WEIGHT > 0, values, 0.0).astype(np.float32)
    flat = np.concatenate([values[:, 0], values[:, 1]])
    return torch.from_numpy(np.pad(flat, ((0, 0), (P - 1, 0))))


def from_trl(values: torch.Tensor) -> np.ndarray:
    """Back to [n, 2, c]. TRL sums the zeros where no label is too: those are no function of the model."""
    flat = values.numpy()[:, P - 1 :]
    return np.where(WEIGHT > 0, np.stack([flat[:N], flat[N:]], axis=1), 0.0)


def trls(**options):
    logp = as_trl(LOGP).requires_grad_()
    extra = (as_trl(ENTROPY), as_trl(LOG_SUM_SQ))
    mask = torch.from_numpy(np.pad(np.concatenate([WEIGHT[:, 0], WEIGHT[:, 1]]), ((0, 0), (P, 0)))).long()
    inputs = {"input_ids": torch.zeros_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask}
    loss, metrics = trl_dpo_loss(Scored(logp, *extra), Scored(as_trl(REF), *extra), inputs, **options)
    loss.backward()
    return loss.item(), from_trl(logp.grad), metrics


#: our name -> TRL's, where they differ
NAMES = {
    "losses": "loss_types",
    "f_divergence": "f_divergence_type",
    "f_alpha": "f_alpha_divergence_coef",
    "wpo": "use_weighting",
}
OF_GAP = [name for name, loss in PAIR_LOSSES.items() if loss.of_gap]
SMOOTHED = {"robust": 0.2, "exo_pair": 0.01}
TRLS = [name for name, loss in PAIR_LOSSES.items() if loss.reference]


def cases() -> list:
    found = {name: {"losses": (name,)} for name in [*TRLS, "sft"]}
    found |= {f"{n}, large beta": {"losses": (n,), "beta": 2.5} for n in TRLS}
    found |= {f"{n}, js": {"losses": (n,), "f_divergence": "js_divergence"} for n in OF_GAP}
    found |= {f"{n}, forward": {"losses": (n,), "f_divergence": "forward_kl"} for n in ("sigmoid", "sigmoid_norm")}
    for alpha in (0.5, 1.0, 1.7):
        options = {"f_divergence": "alpha_divergence", "f_alpha": alpha}
        found[f"alpha {alpha}"] = {"losses": ("sigmoid", "ipo", "sft"), **options}
    found |= {f"ld {a}": {"losses": ("sigmoid", "ipo", "apo_zero"), "ld_alpha": a} for a in (0.0, 0.3, 1.0)}
    found |= {f"wpo, {n}": {"losses": (n,), "wpo": True} for n in ("sigmoid", "sppo_hard")}
    found["discopop, tau"] = {"losses": ("discopop",), "discopop_tau": 0.5}
    found["mpo"] = {"losses": ("sigmoid", "bco_pair", "sft"), "loss_weights": (0.8, 0.2, 1.0)}
    for options in found.values():
        options.setdefault("beta", 0.3)
        smoothing = max((SMOOTHED.get(name, 0.0) for name in options["losses"]), default=0.0)
        options["label_smoothing"] = smoothing
    return [pytest.param(options, id=name) for name, options in found.items()]


@pytest.mark.parametrize("options", cases())
def test_value_gradient_and_metrics_are_trls(options):
    value, gradient, metrics = ours(DpoSettings(**options))
    theirs = {NAMES.get(k, k): list(v) if isinstance(v, tuple) else v for k, v in options.items()}
    expected, slope, logged = trls(**theirs)
    assert_close(value, expected, 1e-6)
    assert_close(gradient, slope, 1e-6)
    assert np.abs(slope).max() > 1e-5, "a loss without a gradient proves nothing"
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "entropy"):
        if "sft" in options["losses"] and len(options["losses"]) == 1 and name != "entropy":
            continue  # no reference is needed then, and none is looked at
        total, count = metrics[name]
        assert_close(total / count, logged[name], 1e-6, name)
    for name in ("logps/chosen", "logps/rejected"):
        assert_close(metrics[name][0] / metrics[name][1], logged[name], 1e-6, name)


def test_every_loss_of_trl_is_here_but_those_that_sort_a_micro_batch():
    text = DPOConfig.__dataclass_fields__["loss_type"].metadata["help"].split("If multiple")[0]
    theirs = set(re.findall(r"`'(\w+)'`", text))
    assert theirs - {"aot", "aot_unpaired"} == {*TRLS, "sft"}


def test_smoothed_sigmoid_is_cdpo_where_trl_passes_over_smoothing():
    plain, smoothed = (ours(DpoSettings(label_smoothing=eps))[0] for eps in (0.0, 0.2))
    assert_close(trls(label_smoothing=0.2)[0], plain, 1e-6)
    assert abs(plain - smoothed) > 1e-3
    flipped = ours(
        DpoSettings(), batch=batch_of()._replace(weight=WEIGHT[:, ::-1]), logp=LOGP[:, ::-1], ref=REF[:, ::-1]
    )
    assert_close(smoothed, 0.8 * plain + 0.2 * flipped[0], 1e-6)


@pytest.mark.parametrize("name", ["sigmoid", "hinge", "simpo", "orpo"])
def test_losses_without_a_reference_are_trls_cpo_simpo_and_orpo(name):
    smoothing, beta, gamma = (0.1 if name in ("sigmoid", "simpo") else 0.0), 0.7, 0.4
    settings = DpoSettings((name,), None, beta, smoothing, reference_free=True, simpo_gamma=gamma)
    value, gradient, metrics = ours(settings, ref=None)
    logp = as_trl(LOGP).requires_grad_()
    kept = as_trl(WEIGHT)
    total = (kept * logp).sum(dim=1)
    if name in ("simpo", "orpo"):
        total = total / kept.sum(dim=1)
    trainer = SimpleNamespace(
        alpha=0.0, beta=beta, loss_type=name, simpo_gamma=gamma, label_smoothing=smoothing, accelerator=Accelerator()
    )
    if name == "orpo":
        losses, chosen, rejected, *_ = ORPOTrainer.odds_ratio_loss(trainer, *total.chunk(2))
        losses = -losses  # TRL subtracts them
    else:
        losses, chosen, rejected = CPOTrainer.cpo_loss(trainer, *total.chunk(2))
    losses.mean().backward()
    assert_close(value, losses.mean().item(), 1e-6)
    assert_close(gradient, from_trl(logp.grad), 1e-6)
    for side, rewards in (("chosen", chosen), ("rejected", rejected)):
        assert_close(metrics[f"rewards/{side}"][0] / N, rewards.mean().item(), 1e-6)
    assert settings.needs_reference is False


def test_without_a_reference_its_log_probabilities_count_as_zero():
    free, zero = ours(DpoSettings(reference_free=True)), ours(DpoSettings(), ref=np.zeros_like(REF))
    assert free[0] == zero[0]
    assert np.array_equal(free[1], zero[1])


SETTINGS = DpoSettings(("sigmoid", "ipo", "sft"), (1.0, 0.5, 2.0), ld_alpha=0.5, wpo=True)


@pytest.mark.parametrize("size", [1, *(pytest.param(size, marks=pytest.mark.full) for size in (2, 4))])
def test_every_cut_of_the_batch_adds_up_to_the_same(size):
    whole = ours(SETTINGS)
    cuts = [slice(i, i + size) for i in range(0, N, size)]
    counts = dpo_counts([batch_of(rows) for rows in cuts], settings=SETTINGS)
    assert counts == {"preference": N, "sft": float(WEIGHT[:, 0].sum())}
    parts = [ours(SETTINGS, rows=rows, counts=counts) for rows in cuts]
    assert_close(sum(p[0] for p in parts), whole[0], 1e-6)
    assert_close(np.concatenate([p[1] for p in parts]), whole[1], 1e-6)
    for name, pair in whole[2].items():
        assert_close([sum(p[2][name][i] for p in parts) for i in (0, 1)], pair, 1e-6, name)


@pytest.mark.parametrize("names", [(n,) for n in PAIR_LOSSES] + [SETTINGS.losses], ids=" ".join)
def test_rows_without_a_pair_and_padding_count_nowhere(names):
    """Row 1 is padding, row 2 lost its rejected answer; garbage stands wherever no token does."""
    settings = DpoSettings(names, beta=0.3, label_smoothing=SMOOTHED.get(names[0], 0.0), wpo=names == SETTINGS.losses)
    batch = batch_of(group_id=[0, -1, 2, 3, 4, 5, 6, 7])
    weight = WEIGHT.copy()
    weight[2, 1] = 0.0
    kept = [0, 3, 4, 5, 6, 7]
    expected = ours(settings, rows=kept)
    logp, ref = (np.where(WEIGHT > 0, x, bad).astype(np.float32) for x, bad in ((LOGP, -np.inf), (REF, np.nan)))
    value, gradient, metrics = ours(settings, batch=batch._replace(weight=weight), logp=logp, ref=ref)
    assert_close(value, expected[0], 1e-6)
    assert_close(gradient[kept], expected[1], 1e-6)
    assert not gradient[[1, 2]].any()
    assert not gradient[WEIGHT == 0].any()
    for name, pair in metrics.items():
        assert_close(pair, expected[2][name], 1e-6, name)


@pytest.mark.parametrize(
    ("options", "logp", "ref"),
    [
        ({"losses": ("discopop",), "beta": 1.0}, -20.0, 0.0),  # TRL: 0 x inf
        ({"f_divergence": "forward_kl"}, -20.0, 0.0),  # TRL: inf - inf
        ({"losses": ("orpo",)}, 0.0, 0.0),  # a certain answer: infinite odds
    ],
    ids=["discopop", "forward_kl", "orpo"],
)
def test_far_from_the_reference_values_stay_finite(options, logp, ref):
    shift = np.full_like(LOGP, logp)
    shift[:, 1] *= 0.9
    value, gradient, _ = ours(DpoSettings(**options), logp=shift, ref=np.full_like(REF, ref))
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"losses": ("sigmod",)}, "did you mean sigmoid"),
        ({"losses": ()}, "losses must be named"),
        ({"losses": ("ipo", "ipo")}, "each once"),
        ({"losses": ("ipo", "sft"), "loss_weights": (1.0,)}, "2 losses need as many weights"),
        ({"loss_weights": (-1.0,)}, "weights > 0"),
        ({"beta": 0.0}, "beta"),
        ({"label_smoothing": 0.5}, "label_smoothing must be in"),
        ({"losses": ("exo_pair",)}, "needs label_smoothing > 0"),
        ({"losses": ("ipo",), "label_smoothing": 0.1}, "no effect on ipo"),
        ({"f_divergence": "kl"}, "f_divergence must be one of"),
        ({"f_divergence": "js_divergence", "reference_free": True}, "reference_free does not go with it"),
        ({"ld_alpha": 1.1}, "ld_alpha must be in"),
    ],
)
def test_wrong_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DpoSettings(**options)


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_only_losses_of_the_difference_take_another_divergence(name):
    options = {"losses": (name,), "f_divergence": "forward_kl", "label_smoothing": SMOOTHED.get(name, 0.0)}
    if name in OF_GAP:
        assert DpoSettings(**options).f_divergence == "forward_kl"
    else:
        with pytest.raises(ValueError, match=f"{name} does not go with it"):
            DpoSettings(**options)


def test_what_the_scores_lack_is_named():
    scores = Scores(logp=jnp.asarray(LOGP), entropy=jnp.asarray(ENTROPY))
    with pytest.raises(ValueError, match="sigmoid compares with a reference"):
        dpo_loss(scores, batch_of(), settings=DpoSettings())
    with pytest.raises(ValueError, match=r"needs Scores\.collision"):
        dpo_loss(scores, batch_of(), settings=DpoSettings(reference_free=True, wpo=True))
    single = batch_of()._replace(weight=WEIGHT[:, :1], tokens=np.zeros((N, P + C), np.int32))
    with pytest.raises(ValueError, match="groups of 2"):
        dpo_loss(scores, single, settings=DpoSettings())
