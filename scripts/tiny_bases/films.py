"""What the tiny vision-language bases are taught: invented films of an institution of their own ("base"), in its wording.

To report a film in sentences, and to list what is on it, however asked. A base has never seen the films, the label
conventions or the answer format of the institutions it is later aligned on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from vlmalign.data.chat.messages import Message
from vlmalign.data.phantoms.institutions import BASE, WIDE_MEDIASTINUM
from vlmalign.data.phantoms.phantom import PREVALENCE, Case, draw_case, render
from vlmalign.data.phantoms.synthetic import Study, truth_row
from vlmalign.data.phantoms.traces import WORDINGS, reason, spoken
from vlmalign.data.sources.schema import CHEXPERT, NIH14
from vlmalign.types import Layout

SIDE = 64  #: pixels

#: what the base institution asks for, in which words, and how many tokens question and answer may take
LIST, REPORT = "list", "report"
LAYOUTS: Mapping[str, Layout] = {LIST: Layout(56, 1, 24), REPORT: Layout(56, 1, 72)}
QUESTIONS = {
    LIST: (
        "List the findings.",
        "What is on this film?",
        "Findings?",
        "Look at the film and list the findings.",
        "Name what you see and where it is.",
        "Please read the chest film, then list every finding with its side and zone.",
    ),
    REPORT: (
        "Report the film.",
        "Describe the film in sentences.",
        "Report.",
        "Please read the chest film and write a report.",
        "Look at the film, then say what you see and why you call it so.",
    ),
}
#: said before every other question: a model that has met one length of prompt only would be lost in another
CONTEXT = (
    "The patient is an old woman.",
    "The patient is a young man.",
    "The patient has a cough.",
    "Earlier films are not at hand.",
    "The film was taken in bed.",
    "This is a chest film.",
)

#: findings are drawn more evenly than in life, so that a short training sees enough of the rare ones
PREVALENCE_TAUGHT = {
    **PREVALENCE,
    "normal": 0.12, "cardiomegaly": 0.20, "mediastinum": 0.12, "opacity": 0.17, "lesion": 0.16, "edema": 0.14,
    "consolidation": 0.12, "pneumonia": 0.14, "atelectasis": 0.18, "pneumothorax": 0.15, "effusion": 0.22,
    "rind": 0.12, "fracture": 0.14, "device": 0.32, "emphysema": 0.04, "fibrosis": 0.04, "hernia": 0.04,
}  # fmt: skip


def make_case(number: int, seed: int) -> Case:
    """What is wrong with patient `number` of the base institution."""
    return draw_case(np.random.default_rng([seed, number]), PREVALENCE_TAUGHT)


def make_film(number: int, seed: int) -> np.ndarray:
    """The patient's film, [64, 64] uint8, its look varied as from one machine of the house to the next."""
    rng = np.random.default_rng([seed, number, 1])
    look = replace(
        BASE.look,
        contrast=rng.uniform(0.82, 1.25),
        brightness=rng.uniform(-0.07, 0.07),
        gamma=rng.uniform(0.82, 1.22),
        noise=rng.uniform(0.01, 0.03),
        blur=int(rng.integers(0, 3)),
        border=rng.uniform(0.0, 0.06),
        scale=rng.uniform(0.93, 1.06),
    )
    film = render(make_case(number, seed), look, rng, 2 * SIDE).reshape(SIDE, 2, SIDE, 2).mean(axis=(1, 3))
    return (film + 0.5).astype(np.uint8)


def make_answers(number: int, seed: int) -> dict[str, str]:
    """What the base institution answers to each of its questions about the film."""
    case = make_case(number, seed)
    study = Study("train", number, number, 0, ("PA",), case, BASE.convention.labels(case), "F", 60)
    row = truth_row(f"base-{number}", study, BASE)
    return {REPORT: " ".join(reason(row)), LIST: _list(row)}


def make_question(number: int, task: str, seed: int) -> str:
    """How the question about film `number` is put."""
    rng = np.random.default_rng([seed, number, 2])
    before = rng.choice(CONTEXT, size=rng.integers(0, 2), replace=False)
    return " ".join([*before, rng.choice(QUESTIONS[task])])


def conversation(number: int, task: str, seed: int) -> list[Message]:
    """One question about film `number`, which is its image's key, and the answer."""
    parts = [{"type": "image", "image": str(number)}, {"type": "text", "text": make_question(number, task, seed)}]
    answer = {"role": "assistant", "content": make_answers(number, seed)[task]}
    return [{"role": "user", "content": parts}, answer]


def _list(row: dict) -> str:
    """What is on the film and where, in the fewest words."""
    found = []
    if "Cardiomegaly" in row["labels"]:
        found.append("heart")
    if row["mediastinum"] >= WIDE_MEDIASTINUM:
        found.append("middle")
    for finding in row["findings"]:
        word = finding["style"] or finding["kind"]
        found.append(" ".join(part for part in (word, finding["side"], finding["zone"]) if part))
    return "; ".join(found or ["clear"])


def words(seed: int) -> list[str]:
    """What the tokenizer learns from: the words of the invented radiologists, label names and answer tags."""
    texts = [text for number in range(4000) for text in make_answers(number, seed).values()]
    for wording in WORDINGS.values():
        texts += 200 * [wording.opening, wording.short, wording.implied, wording.normal]
        texts += 200 * [*wording.evidence.values(), *wording.ratios.values(), *wording.absent.values()]
    labels = [*CHEXPERT.labels, *NIH14.labels]
    texts += 200 * [*labels, *map(spoken, labels), f"<solution>{', '.join(labels)}</solution>"]
    texts += 200 * [*CONTEXT, *(question for asked in QUESTIONS.values() for question in asked)]
    texts += 200 * ["<think>", "</think>", "user\n", "model\n", "Read this film. Give your reasoning, then the labels."]
    return texts


def task_of(step: int, total: int) -> str:
    """Lists first, since they teach the eye fastest; then more and more reports (at the end one in three)."""
    return REPORT if (step * 7919) % 100 < 5 + 30 * step / total else LIST
