"""Direct preference optimisation on groups of two: continuation 0 is the chosen answer, 1 the rejected one.

    L = 1/pairs  sum_pairs sum_j w_j l_j(pair)  +  w_sft/tokens  sum_chosen tokens -log p

with the losses l_j of `dpo_losses`, and both divisors taken over the whole optimiser batch. The second part is RPO's and
MPO's `sft` term; TRL averages it per micro-batch, so that its weight there depends on how a batch is cut. A row without
a pair (padding, or a side without loss tokens) counts nowhere. Prompt and images are computed once for both answers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from vlmalign.objectives.dpo_losses import DIVERGENCES, PAIR_LOSSES, Constants, PairLoss, Pairs, divergence_score
from vlmalign.objectives.names import require_known
from vlmalign.shapes import Array, Bool
from vlmalign.types import GroupBatch, LossParts, Scores

SFT = "sft"  #: the one loss that is a mean over tokens, not over pairs


@dataclass(frozen=True)
class DpoSettings:
    """A weighted list of losses and their constants.

    CPO is `losses=("sigmoid", "sft"), reference_free=True`; RPO ("sigmoid", "sft"); ORPO ("orpo", "sft"); MPO
    ("sigmoid", "bco_pair", "sft") with weights (0.8, 0.2, 1.0).
    """

    losses: tuple[str, ...] = ("sigmoid",)  #: names in `PAIR_LOSSES`, or "sft"
    loss_weights: tuple[float, ...] | None = None  #: one per loss, all 1 by default
    beta: float = 0.1  #: strength of the pull to the reference (IPO: tau; ORPO: lambda; SimPO: scale of the reward)
    label_smoothing: float = 0.0  #: [0, 0.5): share of labels taken to be flipped; sigmoid with it is cDPO
    reference_free: bool = False  #: the reference counts as uniform: its log-probabilities as 0
    f_divergence: str = "reverse_kl"  #: name in `DIVERGENCES`
    f_alpha: float = 0.5  #: of alpha_divergence
    ld_alpha: float | None = None  #: LD-DPO (arXiv 2409.06411): weight of tokens beyond the shorter answer's length
    wpo: bool = False  #: WPO (arXiv 2406.11827): pairs weighted by how likely the policy is to write them
    simpo_gamma: float = 0.5  #: target margin of rewards, in units of beta x mean log-probability
    discopop_tau: float = 0.05

    def __post_init__(self) -> None:
        for name in self.losses:
            require_known("preference loss", name, (*PAIR_LOSSES, SFT))
        if not self.losses or len(set(self.losses)) < len(self.losses):
            raise ValueError(f"losses must be named, each once (weigh it by loss_weights); found {self.losses}")
        if self.loss_weights is not None and (
            len(self.loss_weights) != len(self.losses) or not all(w > 0 and math.isfinite(w) for w in self.loss_weights)
        ):
            raise ValueError(f"{len(self.losses)} losses need as many weights > 0; found {self.loss_weights}")
        if not self.beta > 0 or not self.discopop_tau > 0:
            raise ValueError(f"beta and discopop_tau must be > 0; found {self.beta} and {self.discopop_tau}")
        self._check_smoothing()
        require_known("f_divergence", self.f_divergence, DIVERGENCES)
        odd = [name for name, _, loss in self.pair_losses if not loss.of_gap]
        if self.f_divergence != "reverse_kl" and (odd or self.reference_free):
            raise ValueError(
                f"f_divergence {self.f_divergence} leaves beta log Z(x) in every reward, which cancels only between "
                f"chosen and rejected; {', '.join(odd) or 'reference_free'} does not go with it, use reverse_kl"
            )
        if self.ld_alpha is not None and not 0 <= self.ld_alpha <= 1:
            raise ValueError(f"ld_alpha must be in [0, 1] (1: plain DPO), found {self.ld_alpha}")

    def _check_smoothing(self) -> None:
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must be in [0, 0.5), found {self.label_smoothing}")
        if self.label_smoothing == 0 and "exo_pair" in self.losses:
            raise ValueError("exo_pair needs label_smoothing > 0 (its paper uses 1e-3), found 0")
        if self.label_smoothing > 0 and not any(loss.smooths for _, _, loss in self.pair_losses):
            raise ValueError(
                f"label_smoothing {self.label_smoothing} has no effect on {', '.join(self.losses)}; set it to 0"
            )

    @property
    def weights(self) -> dict[str, float]:
        """Loss -> weight."""
        return dict(zip(self.losses, self.loss_weights or (1.0,) * len(self.losses), strict=True))

    @property
    def pair_losses(self) -> list[tuple[str, float, PairLoss]]:
        """(name, weight, loss) of those taken per pair."""
        return [(name, weight, PAIR_LOSSES[name]) for name, weight in self.weights.items() if name != SFT]

    @property
    def needs_reference(self) -> bool:
        """Whether `Scores.ref_logp` must be there; where not, it is not looked at."""
        return not self.reference_free and any(loss.reference for _, _, loss in self.pair_losses)


def dpo_loss(scores: Scores, batch: GroupBatch, *, settings: DpoSettings) -> LossParts:
    """Parts "preference" (a sum over pairs) and "sft" (over the chosen answers' tokens), those that `settings` name.

    Metrics: rewards beta c and beta r (for simpo and orpo per token), their margin, how often the margin is positive
    (a tie counts as wrong), log-probabilities and lengths of the answers, each loss by itself. WPO divides
    probabilities by `scores.collision` (its sampled alignment).

    Raises:
        ValueError: when groups are not pairs, or what the settings need is not among the scores.
    """
    if batch.layout.group != 2:
        raise ValueError(f"preference losses take groups of 2 (chosen, rejected), found {batch.layout.group}")
    if settings.needs_reference and scores.ref_logp is None:
        raise ValueError(
            f"{', '.join(settings.losses)} compares with a reference: record ref_logp, give the trainer a reference, "
            "or set reference_free"
        )
    if settings.wpo and scores.collision is None:
        raise ValueError(
            "wpo weighs pairs by the policy's own probabilities: it needs Scores.collision (Objective.needs_collision)"
        )
    real = _pair_rows(batch)
    weight = jnp.where(real[:, None, None], batch.weight, 0.0)
    kept = weight > 0
    # Whatever stands on padding, infinities too, must not reach a sum: 0 x inf is NaN for the whole batch.
    logp = jnp.where(kept, scores.logp, 0.0)
    counted = weight if settings.ld_alpha is None else weight * _verbosity(kept, settings.ld_alpha)
    total = jnp.sum(counted * logp, axis=-1)  # [n, 2]
    ratio = total
    if settings.needs_reference:
        ratio = total - jnp.sum(counted * jnp.where(kept, scores.ref_logp, 0.0), axis=-1)
    # Rows without a pair get a length and a log-probability at which every formula has a finite gradient.
    length = jnp.where(real[:, None], jnp.sum(weight, axis=-1), 1.0)
    total = jnp.where(real[:, None], total, -1.0)
    score = [divergence_score(ratio[:, i], name=settings.f_divergence, alpha=settings.f_alpha) for i in (0, 1)]
    pairs = Pairs(ratio[:, 0], ratio[:, 1], *score, length[:, 0], length[:, 1], total[:, 0], total[:, 1])
    constants = Constants(settings.beta, settings.label_smoothing, settings.simpo_gamma, settings.discopop_tau)

    per_pair = real.astype(jnp.float32)
    count = jnp.sum(per_pair)
    if settings.wpo:
        per_pair = per_pair * _wpo_weight(logp - jnp.where(kept, scores.collision, 0.0), weight, length)
    sums, metrics = {}, {}
    for name, share, pair_loss in settings.pair_losses:
        value = jnp.sum(per_pair * jnp.where(real, pair_loss.loss(pairs, constants), 0.0))
        sums["preference"] = sums.get("preference", 0.0) + share * value
        metrics[f"loss/{name}"] = (value, count)
    if SFT in settings.weights:
        nll, tokens = -jnp.sum(weight[:, 0] * logp[:, 0]), jnp.sum(weight[:, 0])
        sums[SFT] = settings.weights[SFT] * nll
        metrics[f"loss/{SFT}"] = (nll, tokens)

    reward = settings.beta * (total / length if _per_token(settings) else ratio)
    margin = reward[:, 0] - reward[:, 1]
    columns = {
        "rewards/chosen": reward[:, 0],
        "rewards/rejected": reward[:, 1],
        "rewards/margins": margin,
        "rewards/accuracies": margin > 0,
        "logps/chosen": total[:, 0],
        "logps/rejected": total[:, 1],
        "length/chosen": length[:, 0],
        "length/rejected": length[:, 1],
    }
    metrics |= {name: (jnp.sum(jnp.where(real, value, 0.0)), count) for name, value in columns.items()}
    metrics["entropy"] = (jnp.sum(weight * jnp.where(kept, scores.entropy, 0.0)), jnp.sum(weight))
    return LossParts(sums=sums, metrics=jax.lax.stop_gradient(metrics))


def dpo_counts(batches: list[GroupBatch], *, settings: DpoSettings) -> dict[str, float]:
    """Pairs, and for the sft part loss tokens of chosen answers, of the whole optimiser batch (host arrays)."""
    counts = {}
    if settings.pair_losses:
        counts["preference"] = float(sum(int(_pair_rows(b).sum()) for b in batches))
    if SFT in settings.weights:
        counts[SFT] = float(sum(np.sum(b.weight[_pair_rows(b), 0], dtype=np.float64) for b in batches))
    return counts


def _pair_rows(batch: GroupBatch) -> Bool[Array, "n"] | Bool[np.ndarray, "n"]:
    """Rows that hold a group with loss tokens on both sides."""
    return (batch.group_id >= 0) & (batch.weight > 0).any(axis=-1).all(axis=-1)


def _verbosity(kept: Array, ld_alpha: float) -> Array:
    """[n, 2, c]: 1 up to the length that both answers have, `ld_alpha` beyond."""
    place = jnp.cumsum(kept, axis=-1)
    shared = jnp.min(jnp.sum(kept, axis=-1), axis=-1)[:, None, None]
    return jnp.where(place <= shared, 1.0, ld_alpha)


def _wpo_weight(aligned: Array, weight: Array, length: Array) -> Array:
    """[n]: the product of both answers' exp(mean aligned log-probability), a constant of the gradient (eq. 2)."""
    return jax.lax.stop_gradient(jnp.exp(jnp.sum(jnp.sum(weight * aligned, axis=-1) / length, axis=-1)))


def _per_token(settings: DpoSettings) -> bool:
    return any(loss.per_token for _, _, loss in settings.pair_losses[:1])
