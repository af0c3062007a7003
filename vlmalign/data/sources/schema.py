"""Label schemas (which findings a data set names, in which order) and the maps between them.

A film's truth is a set of labels of its data set's schema. Models answer in CheXpert names. To score such answers
on a data set with other names, a `LabelMap` takes the truth into CheXpert names and restricts both sides to the
names that the two conventions share.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from vlmalign.quoting import quoted, shown


@dataclass(frozen=True)
class LabelSchema:
    """The labels of a data set, in their printed order, and which of them says that nothing was found."""

    name: str
    labels: tuple[str, ...]
    normal: str | None = "No Finding"

    def __post_init__(self) -> None:
        if len(set(self.labels)) != len(self.labels):
            raise ValueError(f"schema {self.name!r} lists a label twice: {self.labels}")
        if self.normal is not None and self.normal not in self.labels:
            raise ValueError(f"schema {self.name!r} has no label {self.normal!r} to mean a normal film; set normal")

    def __len__(self) -> int:
        return len(self.labels)

    def index(self, label: str) -> int:
        """Position of `label` in the schema; ValueError with the nearest known labels when it is unknown."""
        try:
            return self.labels.index(label)
        except ValueError:
            raise ValueError(unknown_label(label, self.labels, self.name)) from None

    def ordered(self, labels: Iterable[str]) -> tuple[str, ...]:
        """The given labels without repeats, in schema order; ValueError when one is unknown."""
        return tuple(self.labels[i] for i in sorted({self.index(label) for label in labels}))


def unknown_label(label: str, known: Iterable[str], where: str) -> str:
    """The message for a label that `where` does not list: the nearest known labels, and what to do."""
    known = tuple(known)
    near = difflib.get_close_matches(label, known, n=3, cutoff=0.5)
    hint = f"nearest known: {', '.join(map(shown, near))}" if near else f"known: {', '.join(map(shown, known))}"
    return f"unknown label {quoted(label)} in {where} ({hint}); correct the spelling or map the label before use"


CHEXPERT = LabelSchema(
    "chexpert",
    (
        "No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema",
        "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other",
        "Fracture", "Support Devices",
    ),
)  # fmt: skip

NIH14 = LabelSchema(
    "nih14",
    (
        "Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax",
        "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia", "No Finding",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class LabelMap:
    """How the truth of one schema is told in the names of another.

    `mapping` takes source labels to a target label, or to several; one it does not list is dropped. A film whose only
    findings are dropped therefore has an **empty** true set: it is neither "No Finding" nor positive for anything,
    so a metric counts every label predicted on it as a false positive.
    """

    name: str
    source: LabelSchema
    target: LabelSchema
    mapping: Mapping[str, str | tuple[str, ...]]

    def __post_init__(self) -> None:
        for label in self.mapping:
            self.source.index(label)
            self.target.ordered(self.images(label))

    def images(self, label: str) -> tuple[str, ...]:
        """What a source label is called in the target's names; empty for one without a counterpart."""
        found = self.mapping.get(label, ())
        return (found,) if isinstance(found, str) else found

    @property
    def unmapped(self) -> tuple[str, ...]:
        """Source labels that have no counterpart."""
        return tuple(label for label in self.source.labels if label not in self.mapping)

    def map_truth(self, labels: Iterable[str]) -> tuple[str, ...]:
        """True labels in target names and order; ValueError for a label outside the source schema.

        >>> NIH_TO_CHEXPERT9.map_truth(("Nodule", "Mass", "Effusion"))
        ('Lung Lesion',)
        >>> NIH_TO_CHEXPERT9.map_truth(("Effusion",))
        ()
        """
        known = self.source.ordered(labels)
        return self.target.ordered(image for label in known for image in self.images(label))

    def restrict(self, labels: Iterable[str]) -> tuple[str, ...]:
        """Predicted labels (in CheXpert names) that the target also has; ValueError for a name that is neither.

        >>> NIH_TO_CHEXPERT9.restrict(("Edema", "Support Devices"))
        ('Edema',)
        """
        found = set(labels)
        for label in found:
            if label not in self.target.labels:
                CHEXPERT.index(label)
        return self.target.ordered(label for label in found if label in self.target.labels)


@dataclass(frozen=True)
class OpenMap:
    """A map for tables whose list of labels is not closed: any label that it does not list has no counterpart."""

    name: str
    target: LabelSchema
    mapping: Mapping[str, str | tuple[str, ...]]

    def of(self, schema: LabelSchema) -> LabelMap:
        """The map for the labels that a table has; ValueError where it lists none of them."""
        known = {label: self.mapping[label] for label in schema.labels if label in self.mapping}
        if not known:
            raise ValueError(
                f"label_map {self.name!r} knows none of the labels of {schema.name}, such as {', '.join(schema.labels[:5])}"
                "; give a map {their label: our label}"
            )
        return LabelMap(self.name, schema, self.target, known)


def renaming(schema: LabelSchema, names: Mapping[str, str | None]) -> LabelMap:
    """Labels of `schema` under other names, in its order: several may become one, None drops one, the rest stay.

    Raises ValueError for a label that the schema does not have, with the nearest that it has.

    >>> renaming(NIH14, {"Mass": "Nodule", "Hernia": None}).target.labels[4:6]
    ('Nodule', 'Pneumonia')
    """
    for label in names:
        schema.index(label)
    mapping = {label: name for label in schema.labels if (name := names.get(label, label)) is not None}
    normal = None if schema.normal is None else mapping.get(schema.normal)
    target = LabelSchema(f"{schema.name}, renamed", tuple(dict.fromkeys(mapping.values())), normal)
    return LabelMap(target.name, schema, target, mapping)


#: The nine CheXpert names that NIH labels can be told in.
CHEXPERT9 = LabelSchema(
    "chexpert9",
    (
        "No Finding", "Cardiomegaly", "Lung Lesion", "Edema", "Consolidation", "Pneumonia", "Atelectasis",
        "Pneumothorax", "Pleural Other",
    ),
)  # fmt: skip

#: The ChexReason paper names the nine labels but does not print the map; this one is ours. Effusion, Infiltration,
#: Emphysema, Fibrosis and Hernia are unmapped.
NIH_TO_CHEXPERT9 = LabelMap(
    "nih14-to-chexpert9",
    NIH14,
    CHEXPERT9,
    {
        "Mass": "Lung Lesion",
        "Nodule": "Lung Lesion",
        "Pleural_Thickening": "Pleural Other",
        **{label: label for label in CHEXPERT9.labels if label in NIH14.labels},
    },
)

IDENTITY = LabelMap("identity", CHEXPERT, CHEXPERT, {label: label for label in CHEXPERT.labels})

SCHEMAS = {schema.name: schema for schema in (CHEXPERT, NIH14, CHEXPERT9)}
LABEL_MAPS = {table.name: table for table in (IDENTITY, NIH_TO_CHEXPERT9)}
