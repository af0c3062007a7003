"""One drawn configuration, both ways: logits, loss, gradients and greedy answers, ours against transformers'."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from configurations import Json, draw, generator, pick
from prompts import Prompts, draw_prompts
from reference import NEVER, Files, Greedy, Scored, build, greedy, score, write
from tiny_checkpoints import QUICK

from vlmalign.data.groups import collate
from vlmalign.models.config import ModelConfig
from vlmalign.models.families import FAMILIES
from vlmalign.models.model import Model, predictors
from vlmalign.models.towers import arrange
from vlmalign.objectives.logprobs import token_logprobs
from vlmalign.objectives.sft import sft_loss
from vlmalign.rollout.engine import generate, output_logits
from vlmalign.rollout.features import FeatureStore, assemble
from vlmalign.rollout.sampling import Sampling
from vlmalign.types import GroupBatch, Layout, Scores
from vlmalign.weights.checkpoint import load_config, load_params

#: largest difference allowed, times max(1, the largest reference value)
TOLERANCE = 1e-4
#: two candidates closer than this in the reference's logits are a tie
TIE = 1e-4
#: tokens of a greedy answer
GREEDY = 32
#: a reference whose logits spread less than this would prove nothing
SPREAD = 0.3


@dataclass
class Outcome:
    """What one configuration showed; `problems` is empty when everything held."""

    family: str
    seed: int
    logits: float = np.nan  #: worst |a - b| / max(1, max|b|) over all real tokens
    gradient: float = np.nan  #: the same over all parameters, and the loss
    relative: float = np.nan  #: worst |a - b| / max|b| of a gradient whose largest entry is above 1e-3
    rounded: int = 0  #: 1 if gradients had to be compared with the reference in float64
    compared: int = 0  #: greedy tokens compared
    equal: int = 0
    ties: int = 0  #: answers that part where the reference's two best candidates tie
    distinct: int = 0  #: different tokens among the greedy answers
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)

    def compare(self, what: str, found: np.ndarray, expected: np.ndarray) -> float:
        """The relative difference; a problem when shapes differ, a value is not finite, or it is above tolerance."""
        found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
        if found.shape != expected.shape or not (np.isfinite(found).all() and np.isfinite(expected).all()):
            self.problems.append(f"{what}: shapes {found.shape} and {expected.shape}, or values that are not finite")
            return np.inf
        gap = float(np.max(np.abs(found - expected), initial=0.0) / max(1.0, np.max(np.abs(expected), initial=0.0)))
        if gap > TOLERANCE:
            self.problems.append(f"{what}: differs by {gap:.2g}")
        return gap


@partial(jax.jit, static_argnames="model", compiler_options=QUICK)
def scored(model: Model, params: Mapping[str, jax.Array], batch: GroupBatch, count: float):
    """Logits [n, t, vocab], the mean negative log-likelihood and its gradient by every parameter."""

    def loss(params):
        # One forward pass for logits and loss: what is compiled twice is what these checks pay for.
        hidden = model.hidden(params, batch)
        prompt, group, completion = batch.layout
        tokens = batch.tokens[:, prompt:].reshape(-1, group, completion)
        softcap = model.config.decoder.logit_softcap
        own = token_logprobs(predictors(hidden, batch), model.head(params), tokens, softcap=softcap)
        nll = sft_loss(Scores(logp=own.logp, entropy=own.entropy), batch).sums["nll"]
        return nll / count, output_logits(model, model.bind(params), hidden)

    (value, logits), gradients = jax.value_and_grad(loss, has_aux=True)(dict(params))
    return logits, value, gradients


#: the engine's own program, compiled without LLVM's optimisations
STATIC = ("model", "group", "completion", "stop_ids", "sampling")
answer = jax.jit(generate.__wrapped__, static_argnames=STATIC, compiler_options=QUICK)


@dataclass(frozen=True)
class Plan:
    """Everything drawn for one configuration besides its weights."""

    config: Json
    files: Files
    padding: str  #: of the reference: each text alone, or all in one batch padded on the left or right
    prompt_padding: str  #: the same for greedy answers, which transformers pads on the left
    attention: str  #: of ours
    remat: str  #: of ours


def plan(family: str, seed: int) -> Plan:
    rng = generator(family, seed, "plan")
    return Plan(
        config=draw(family, seed),
        files=Files.draw(rng),
        padding=pick(rng, "alone", "left", "right"),
        prompt_padding=pick(rng, "alone", "left"),
        attention=pick(rng, "auto", "auto", "chunked"),
        remat=pick(rng, "none", "none", "full"),
    )


def check(family: str, seed: int, folder: Path) -> Outcome:
    """Write the checkpoint of (family, seed) to `folder` with transformers, read it, and compare everything."""
    started = time.perf_counter()
    outcome, drawn = Outcome(family, seed), plan(family, seed)
    folder.mkdir(parents=True)
    # Written first, so that transformers reads the drawn spelling as we do.
    (folder / "config.json").write_text(json.dumps(drawn.config, indent=2))
    module = build(folder, generator(family, seed, "weights"))
    write(module, drawn.config, folder, drawn.files)
    model = Model(load_config(folder), attention=drawn.attention, remat=drawn.remat)
    params = load_params(folder, model)
    prompts = draw_prompts(generator(family, seed, "prompts"), model.config)

    expected = score(module, prompts, drawn.padding)
    if min(row.std() for row in expected.logits) < SPREAD:
        outcome.problems.append("the reference's logits hardly vary: this draw proves nothing")
    found = compute(model, params, prompts)
    compare_logits(outcome, found, expected, prompts)
    settle_gradients(
        outcome, found, expected, lambda: score(copy.deepcopy(module).double(), prompts, "alone"), model.config
    )
    compare_greedy(outcome, greedy(module, prompts, drawn.prompt_padding, GREEDY), model, params, prompts)
    outcome.seconds = time.perf_counter() - started
    return outcome


class Found(NamedTuple):
    """Ours: logits [n, t, vocab], the loss and its gradients by our names."""

    logits: np.ndarray
    loss: np.ndarray
    gradients: Mapping[str, np.ndarray]


def compute(model: Model, params: Mapping[str, jax.Array], prompts: Prompts) -> Found:
    """The groups as one batch, with pixels going through the tower."""
    images = prompts.images
    batch, keys = collate(
        prompts.groups, prompts.layout, rows=len(prompts.groups), grid=None if images is None else images.grid,
        position_axes=model.config.decoder.position_axes,
    )  # fmt: skip
    if images is not None:
        batch = batch._replace(pixels=arrange(model.config.vision, images.read(keys)))
    return Found(*jax.device_get(scored(model, params, batch, float(batch.weight.sum()))))


def compare_logits(outcome: Outcome, found: Found, expected: Scored, prompts: Prompts) -> None:
    """Of every real token: the prompt's stand once in our rows and once per continuation in the reference's."""
    outcome.logits, rows = 0.0, iter(expected.logits)
    prompt, _, completion = prompts.layout
    for n, group in enumerate(prompts.groups):
        for k, own in enumerate(group.continuations):
            first = prompt + k * completion
            ours = [found.logits[n, : len(group.prompt)], found.logits[n, first : first + len(own)]]
            gap = outcome.compare(f"logits of group {n}, continuation {k}", np.concatenate(ours), next(rows))
            outcome.logits = max(outcome.logits, gap)


def compare_gradients(outcome: Outcome, found: Found, expected: Scored, config: ModelConfig) -> None:
    """The loss, and its gradient by every parameter."""
    rename = FAMILIES[config.family].parameter_name
    theirs = {rename(name, config): value for name, value in expected.gradients.items()}
    theirs.pop(None, None)  # known and not used: the tower's pooling head
    if theirs.keys() != found.gradients.keys():
        outcome.problems.append(f"parameters differ: {sorted(theirs.keys() ^ found.gradients.keys())}")
        return
    outcome.gradient, outcome.relative = outcome.compare("loss", found.loss, np.asarray(expected.loss)), 0.0
    for name, value in theirs.items():
        gap = outcome.compare(f"gradient of {name}", found.gradients[name], value)
        outcome.gradient = max(outcome.gradient, gap)
        top = np.max(np.abs(value))
        if top > 1e-3:
            outcome.relative = max(outcome.relative, float(np.max(np.abs(found.gradients[name] - value)) / top))


def settle_gradients(
    outcome: Outcome, found: Found, expected: Scored, finer: Callable[[], Scored], config: ModelConfig
) -> None:
    """`compare_gradients`; where it finds a difference, ours must be as near to the reference in float64.

    Of a badly conditioned draw (a tower whose norms run over five numbers) the reference's own float32 gradients can
    be wrong by more than the tolerance. Such draws are counted and their differences are those to float64.
    """
    trial = Outcome(outcome.family, outcome.seed)
    compare_gradients(trial, found, expected, config)
    if trial.problems:
        again = Outcome(outcome.family, outcome.seed)
        compare_gradients(again, found, finer(), config)
        if not again.problems:
            outcome.rounded, trial = 1, again
    outcome.gradient, outcome.relative = trial.gradient, trial.relative
    outcome.problems += trial.problems


def compare_greedy(
    outcome: Outcome, expected: Greedy, model: Model, params: Mapping[str, jax.Array], prompts: Prompts
) -> None:
    """Greedy answers token for token, with images through the store of features."""
    images = prompts.images
    store = None if images is None else FeatureStore(model, params, images, chunk=1)
    asked = tuple(replace(group, continuations=()) for group in prompts.groups)
    batch = assemble(
        asked, Layout(prompts.layout.prompt, 0, 0), rows=len(asked), images=0 if images is None else len(images.grids),
        features=store,
    )  # fmt: skip
    found = answer(
        model, params, batch, jax.random.key(0), group=1, completion=GREEDY, stop_ids=(NEVER,),
        sampling=Sampling(temperature=0.0), first_sample=jnp.int32(0),
    )  # fmt: skip
    compare_answers(outcome, np.asarray(found.tokens)[:, 0], expected)


def compare_answers(outcome: Outcome, ours: np.ndarray, expected: Greedy) -> None:
    """Token for token up to a first difference, which must be a tie: what follows it answers another text."""
    for n, (mine, theirs, logits) in enumerate(zip(ours, expected.tokens, expected.logits, strict=True)):
        outcome.distinct += len(set(theirs.tolist()))
        different = np.flatnonzero(mine != theirs)
        at = int(different[0]) if len(different) else len(theirs)
        outcome.compared, outcome.equal = outcome.compared + at, outcome.equal + at
        if at == len(theirs):
            continue
        behind = float(logits[at, theirs[at]] - logits[at, mine[at]])
        if behind < TIE:
            outcome.ties += 1
            continue
        outcome.compared += 1
        outcome.problems.append(
            f"greedy answer {n}: token {at} is {mine[at]}, expected {theirs[at]}, whose logit is {behind:.2g} higher"
        )
