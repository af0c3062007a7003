"""What a model is asked about a film, and how the answer is written: reasoning in think tags, labels in solution tags."""

from __future__ import annotations

from collections.abc import Sequence

from vlmalign.data.chat.chat import Message


def answer_text(trace: str, labels: Sequence[str]) -> str:
    """The completion that is taught.

    >>> answer_text("The heart is wide.", ["Cardiomegaly", "Edema"])
    '<think>The heart is wide.</think><solution>Cardiomegaly, Edema</solution>'
    """
    return f"<think>{trace}</think><solution>{', '.join(labels)}</solution>"


def label_trace(labels: Sequence[str]) -> str:
    """Reasoning for films without a written trace: it names the positive labels and claims no evidence.

    >>> label_trace(["Cardiomegaly", "Edema"])
    'I see cardiomegaly and edema.'
    """
    if not labels:
        return "I see none of the listed findings."
    spoken = [label.replace("_", " ").lower() for label in labels]
    return f"I see {spoken[0] if len(spoken) == 1 else ', '.join(spoken[:-1]) + ' and ' + spoken[-1]}."


def film_question(image: str, prompt: str) -> list[Message]:
    """One user turn: the film, then the prompt."""
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": prompt}]}]


def film_example(image: str, prompt: str, answer: str) -> list[Message]:
    """The question with its answer."""
    return [*film_question(image, prompt), {"role": "assistant", "content": answer}]
