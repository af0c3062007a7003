"""What a teacher is asked about one film, and what is wrong with an answer."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vlmalign.tasks.mentions import label_faults
from vlmalign.tasks.prompts import fill
from vlmalign.teaching.films import Film
from vlmalign.teaching.forms import FORMS, form_faults
from vlmalign.teaching.leaks import leaks

_AGAIN = "This cannot be used: {faults}. Write the whole text again, by the same rules, without a word about this one."


class Teacher(NamedTuple):
    """How traces are asked for."""

    instruction: str  #: may hold {findings}, the film's true labels, and {labels}, all labels
    format: str  #: a name of `FORMS`
    labels: tuple[str, ...]  #: all labels, in order

    @property
    def digest(self) -> str:
        """First digits of the instruction's SHA-256."""
        return hashlib.sha256(self.instruction.encode()).hexdigest()[:12]

    def question(self, film: Film, image: str) -> list[dict[str, Any]]:
        """The messages that ask about a film; `image` is its address (a data URI)."""
        columns = {
            "findings": ", ".join(film.labels) or "none of the listed findings",
            "labels": ", ".join(self.labels),
        }
        parts = [
            {"type": "image_url", "image_url": {"url": image}},
            {"type": "text", "text": fill(self.instruction, columns)},
        ]
        return [{"role": "user", "content": parts}]

    def again(
        self, question: Sequence[Mapping[str, Any]], answer: str, faults: Sequence[str]
    ) -> list[Mapping[str, Any]]:
        """The messages after an answer that cannot be used."""
        sent = answer.encode("utf-8", "replace").decode()  # half of a character cannot be sent back
        said = {"role": "assistant", "content": sent or "(no text)"}
        return [*question, said, {"role": "user", "content": _AGAIN.format(faults="; ".join(faults))}]

    def faults(self, text: str, film: Film) -> list[str]:
        """What is wrong with a trace of this film, in words that quote none of it; empty for one that can be taught."""
        return text_faults(text, self.format) + label_faults(text, film.labels, self.labels)


def text_faults(text: str, format: str | None) -> list[str]:
    """What is wrong with a text as a trace of any film; with a format, its form is looked at too."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return ["holds half of a character"]
    if not text.strip():
        return ["no text"]
    form = [] if format is None else form_faults(text, FORMS[format])
    return form + [f"tells that the labels were known ({kind})" for kind in leaks(text)]


def read_instruction(path: Path) -> str:
    """The text of an instruction; ValueError for one that does not say what the film shows."""
    try:
        text = path.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text") from None
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; name the text with --instruction") from None
    if "{findings}" not in text:
        raise ValueError(f"{path}: expected {{findings}} in it, the place of a film's true labels; found none")
    return text
