"""A completion's text -> its labels: is its form valid, what was reasoned, which labels are predicted."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from vlmalign.tasks.blocks import Form, read_blocks
from vlmalign.tasks.label_list import Synonyms, label_index, read_label_list


@dataclass(frozen=True)
class Parsed:
    """What one completion says. An invalid completion says nothing: its sets are empty, `reason` tells why."""

    valid: bool  #: the completion has its form (see `read_blocks`)
    reasoning: str  #: text of the think block, trimmed
    predicted: tuple[str, ...]  #: known labels, spelled as in the schema, in its order, each once
    unknown: tuple[str, ...]  #: every mention of a name that is not in the schema, in the order written
    duplicates: int  #: mentions of a known label after its first
    outside: str  #: what stands before, between and after the blocks, trimmed, one piece per line
    reason: str | None  #: in words, why the completion is not valid; None if it is

    @property
    def says_nothing(self) -> bool:
        """A valid completion whose list is empty. One of unknown names only says something, and it is wrong."""
        return self.valid and not self.predicted and not self.unknown


@dataclass(frozen=True)
class LabelReader:
    """How the label rewards and the task `labels` read completions. It is plain data: it pickles and can be compared.

    Raises ValueError for labels and synonyms that could not be read back (see `label_index`).
    """

    labels: tuple[str, ...]  #: the label schema
    synonyms: Synonyms = ()
    form: Form = "think"

    def __post_init__(self) -> None:
        label_index(self.labels, self.synonyms)

    def read(self, text: str) -> Parsed:
        """What `text` predicts. For the form see `read_blocks`, for the list `read_label_list`.

        An empty list is valid and predicts the empty set. So does one of unknown names only, but it is not the same:
        rewards and metrics do not count it as right where the true set is empty (`says_nothing`). Empty reasoning is
        valid: its length is the reward's affair. Linear in the length of the text.

        >>> LabelReader(("Fracture", "Edema")).read("<think>Fluid.</think><solution>edema; Edema, flu</solution>")
        Parsed(valid=True, reasoning='Fluid.', predicted=('Edema',), unknown=('flu',), duplicates=1, outside='', reason=None)
        """
        blocks = read_blocks(text, self.form)
        if blocks.reason is not None:
            return Parsed(
                valid=False, reasoning="", predicted=(), unknown=(), duplicates=0, outside="", reason=blocks.reason
            )
        found = read_label_list(blocks.solution, self.labels, self.synonyms)
        return Parsed(
            valid=True,
            reasoning=blocks.reasoning,
            predicted=found.labels,
            unknown=found.unknown,
            duplicates=found.duplicates,
            outside=blocks.outside,
            reason=None,
        )

    def true_set(self, truth: Iterable[str]) -> frozenset[str]:
        """The true labels as a set. Raises ValueError for one outside the schema."""
        true = frozenset(truth)
        if unlisted := sorted(true - set(self.labels)):
            raise ValueError(
                f"truth must hold labels of the schema {self.labels}, found {unlisted}; map or drop them when reading"
            )
        return true


def label_reader(labels: tuple[str, ...] | LabelReader) -> LabelReader:
    """A reader of these labels with think and solution block; a reader itself is returned as it is."""
    return labels if isinstance(labels, LabelReader) else LabelReader(labels)
