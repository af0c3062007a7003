"""The probe `pairs`: which labels answers name together, beside their truth and a training table (evaluation/label_pairs)."""

from __future__ import annotations

from typing import Any

from vlmalign.evaluation.f1 import label_matrix
from vlmalign.evaluation.label_pairs import LabelTable, pair_odds
from vlmalign.studies.engine.files import read_rows
from vlmalign.studies.engine.make import PREDICTIONS
from vlmalign.studies.engine.opened import Opened
from vlmalign.studies.engine.probe_config import PairsProbe, folder_of
from vlmalign.studies.engine.score import voted

INTERVALS = ("answers", "truth", "training", "from_truth", "from_training")


def results(study: Opened, name: str) -> list[dict[str, Any]]:
    """For each state and set the odds of every pair of the labels that it shares with the training table."""
    config = study.config
    probe: PairsProbe = config.probes[name]
    entry = config.answers[probe.answers]
    taught = study.cases(probe.training)
    found = []
    for ref in entry.sets:
        labels = tuple(label for label in study.cases(ref).labels if label in taught.labels)
        if len(labels) < 2:
            raise ValueError(
                f"probes.{name}: sets {ref} and {probe.training} share {len(labels)} labels, and a pair needs two; name a "
                "training set whose labels are told in the same names"
            )
        training = _table([row["labels"] for row in taught.rows], [row["patient"] for row in taught.rows], labels)
        for stage in entry.stages:
            rows = voted(read_rows(config.run / "answers" / probe.answers / folder_of(stage, ref) / PREDICTIONS), entry)
            patients = [row["patient"] for row in rows]
            answers = _table([row["predicted"] for row in rows], patients, labels)
            truth = _table([row["truth"] for row in rows], patients, labels)
            pairs = pair_odds(answers, truth.named, training, draws=probe.draws, seed=config.seed)
            found.append(
                {
                    "stage": stage,
                    "dataset": ref,
                    "training": probe.training,
                    "pairs": [
                        {
                            "labels": [labels[pair.first], labels[pair.second]],
                            "fewest": pair.fewest,
                            **{each: getattr(pair, each)._asdict() for each in INTERVALS},
                        }
                        for pair in pairs
                    ],
                }
            )
    return found


def _table(rows: list[list[str]], patients: list[str], labels: tuple[str, ...]) -> LabelTable:
    return LabelTable(label_matrix([[label for label in row if label in labels] for row in rows], labels), patients)
