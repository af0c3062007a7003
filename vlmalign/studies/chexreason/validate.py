"""What is measured while a stage trains: the loss of the validation films' answers, and macro-F1 of greedy answers."""

from __future__ import annotations

import numpy as np

from vlmalign.evaluation.f1 import Counts, f1_values, label_matrix, none_if_nan, outcomes
from vlmalign.models.model import Params
from vlmalign.rewards.parse import parse_completion
from vlmalign.rollout.sampling import Sampling
from vlmalign.studies.chexreason.config import ChexReasonConfig, Validation
from vlmalign.studies.chexreason.films import LabelledFilms, draw_patients, open_films
from vlmalign.studies.chexreason.system import System
from vlmalign.training.best import Best
from vlmalign.training.loop import Evaluate
from vlmalign.training.step import MicroBatch, Trainer
from vlmalign.types import Group


def best_of(settings: Validation) -> Best | None:
    """The rule that keeps the best state, if the config names one."""
    return None if settings.best is None else Best(settings.best, settings.mode, settings.patience)


def build_evaluate(
    config: ChexReasonConfig,
    settings: Validation,
    system: System,
    trainer: Trainer,
    films: LabelledFilms,
    rows: np.ndarray,
    answers: list[MicroBatch],
) -> Evaluate | None:
    """The evaluation of a stage (None: none is wanted). `answers` are the validation films with their right answers.

    Raises:
        ValueError: when validation films are wanted and the sample holds none.
    """
    if not settings.every:
        return None
    if (settings.loss or settings.answers) and not len(rows):
        raise ValueError("validation needs films: set data.sample.validation to their number")
    sets = {"validation": (films, rows)} if settings.answers else {}
    for item in settings.sets:
        other = open_films(item.films, config)
        count = len(other) if item.limit is None else min(item.limit, len(other))
        sets[item.films.name] = (other, draw_patients(other.patients, count, seed=config.seed))

    def evaluate(step: int, params: Params) -> dict[str, float | None]:
        del step
        found: dict[str, float | None] = {}
        if settings.loss:
            total, count = trainer.evaluate(params, system.base, answers)["loss"]
            found["validation/loss"] = float(total) / float(count)
        if sets:
            merged = system.policy(params)
            for name, (where, which) in sets.items():
                found |= {
                    f"{name}/{key}": value
                    for key, value in _answer(config, system, merged, where, which, films.labels).items()
                }
        return found

    return evaluate


def _answer(
    config: ChexReasonConfig,
    system: System,
    params: Params,
    films: LabelledFilms,
    rows: np.ndarray,
    vocabulary: tuple[str, ...],
) -> dict[str, float | None]:
    """Macro-F1 in the names of `films`, and the share of answers that can be read. The model answers in `vocabulary`."""
    settings = config.evaluation
    examples = [films.example(int(row)) for row in rows]
    prompts: list[Group] = [system.question(e, int(row)) for e, row in zip(examples, rows, strict=True)]
    generator = system.generator(
        prompts,
        rows=min(settings.rows, len(rows)),
        group=1,
        completion=settings.completion,
        multiple=settings.prompt_multiple,
        sampling=Sampling(temperature=0.0),
    )
    answers = system.answer(generator, params, prompts, seed=config.seed)
    parsed = [parse_completion(answer.text, vocabulary) for answer in answers]
    predicted = label_matrix([[label for label in p.predicted if label in films.labels] for p in parsed], films.labels)
    truth = label_matrix([e.labels for e in examples], films.labels)
    values = f1_values(Counts(*outcomes(truth, predicted).sum(axis=0)))
    return {"macro_f1": none_if_nan(values.macro), "valid": float(np.mean([p.valid for p in parsed])), "n": len(rows)}
