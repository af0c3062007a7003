"""The X-ray archives as sources of a study: settings of each format's reader, and invented archives in its form."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import model_validator

from vlmalign.config import FREE, Config
from vlmalign.data.phantoms.institutions import CHEXPERT_LIKE, INSTITUTIONS, MIMIC_LIKE, NIH_LIKE, Institution
from vlmalign.data.phantoms.traces import write_traces
from vlmalign.data.sources import chexpert, mimic, nih
from vlmalign.data.sources.films import Films
from vlmalign.data.sources.inventing import write_folder
from vlmalign.data.sources.schema import CHEXPERT, NIH14, LabelSchema
from vlmalign.data.sources.settings import FilmSource, Place, Positive, Uncertain, label_map_of

#: beside an invented archive: the reasoning that leads to its labels, told in several ways
TRACES = {"narrative": "traces.jsonl", "steps": "traces-steps.jsonl", "short": "traces-short.jsonl"}


class Phantom(Config):
    """Write an invented archive of this format at `root` first, if nothing is there."""

    films: Positive | dict[str, Positive]  #: in all, or per split
    seed: int = 0
    size: Positive = 128  #: pixels per side
    #: an institution by whose convention the same films are labelled; None: the format's own
    convention: Literal[*INSTITUTIONS] | None = None
    workers: Annotated[Positive, FREE] = 1


class Archive(FilmSource):
    """What the four formats have in common."""

    schema_: ClassVar[LabelSchema]
    splits: ClassVar[tuple[str, ...]] = ()
    write: ClassVar[Any]  #: writes an invented archive
    institution: ClassVar[Institution]  #: whose films it invents

    root: Annotated[Path, FREE]  #: the archive's folder
    phantom: Phantom | None = None

    @model_validator(mode="after")
    def _fits_the_format(self) -> Archive:
        if self.label_map is not None:
            label_map_of(self.label_map, self.schema_)
        films = None if self.phantom is None else self.phantom.films
        unknown = sorted(set(films) - set(self.splits)) if isinstance(films, dict) else []
        own = self.phantom and self.phantom.convention and INSTITUTIONS[self.phantom.convention].convention.schema
        if own and own != self.schema_:
            raise ValueError(
                f"phantom.convention: {self.phantom.convention} labels in {own.name}, and this format holds "
                f"{self.schema_.name}"
            )
        if unknown:
            known = f"its splits are {', '.join(self.splits)}" if self.splits else "it has no splits: give one number"
            raise ValueError(f"phantom.films: this format has no split {unknown[0]!r}; {known}")
        return self

    @property
    def folder(self) -> Path:
        """Where its films lie, as the config says it."""
        return self.root

    def open(self, place: Place) -> Films:
        """The archive's films.

        Raises:
            FileNotFoundError, ValueError: naming the folder, the table, or the film, see `Films`.
        """
        root = place(str(self.root))
        if not root.is_dir():
            raise FileNotFoundError(f"no folder {root} for a {self.kind} archive")
        return self.finished(self.read(root), place)

    def invent(self, place: Place) -> None:
        """Writes the invented archive and its traces, whole or not at all; a folder that exists is left as it is, also
        one that another process has written in the meantime."""
        if (made := self.phantom) is None:
            return
        place_of = self.institution
        if made.convention is not None:
            place_of = replace(place_of, convention=INSTITUTIONS[made.convention].convention)

        def write(beside: Path) -> None:
            rows = type(self).write(
                beside, films=made.films, seed=made.seed, size=made.size, workers=made.workers, institution=place_of
            )
            for telling, name in TRACES.items():
                write_traces(beside / name, rows, telling=telling)

        write_folder(place(str(self.root)), write)


class MimicFilms(Archive):
    """See `mimic.MimicCxrJpg`."""

    schema_ = CHEXPERT
    splits = mimic.SPLITS
    write = mimic.write_synthetic
    institution = MIMIC_LIKE

    kind: Literal["mimic-cxr-jpg"]
    split: Literal["train", "validate", "test"] | None = "train"  #: None: all
    views: tuple[str, ...] = ("AP", "PA")
    labeler: Literal["chexpert", "negbio"] = "chexpert"
    uncertain: Uncertain = "negative"  #: what -1 counts as; also "positive-only", "u-zeros", "u-ones", "u-ignore"
    version: Literal["2.0.0", "2.1.0"] | None = None  #: None: the newest that is there
    patients: Annotated[Path | None, FREE] = None  #: MIMIC-IV's patients.csv: gives films their sex and age

    def read(self, root: Path) -> Films:
        return mimic.MimicCxrJpg(
            root,
            self.split,
            views=self.views,
            labeler=self.labeler,
            uncertain=self.uncertain,
            version=self.version,
            patients=self.patients,
            on_bad=self.on_bad,
        )


class CheXpertFilms(Archive):
    """See `chexpert.CheXpert`."""

    schema_ = CHEXPERT
    splits = ("train", "valid", "test")
    write = chexpert.write_synthetic
    institution = CHEXPERT_LIKE

    kind: Literal["chexpert"]
    split: Literal["train", "valid", "test"] = "train"
    frontal_only: bool = True
    views: tuple[str, ...] | None = None  #: values of `AP/PA` that are taken, such as AP, PA; None: all
    uncertain: Uncertain = "negative"  #: what -1 counts as; also "positive-only", "u-zeros", "u-ones", "u-ignore"

    def read(self, root: Path) -> Films:
        return chexpert.CheXpert(
            root,
            self.split,
            frontal_only=self.frontal_only,
            views=self.views,
            uncertain=self.uncertain,
            on_bad=self.on_bad,
        )


class NihFilms(Archive):
    """See `nih.Nih14`."""

    schema_ = NIH14
    splits = tuple(nih.SPLITS)
    write = nih.write_synthetic
    institution = NIH_LIKE

    kind: Literal["nih-cxr14"]
    split: Literal["train_val", "test"] | None = None  #: None: all
    views: tuple[str, ...] | None = None  #: None: all

    def read(self, root: Path) -> Films:
        return nih.Nih14(root, self.split, views=self.views, on_bad=self.on_bad)


class NihExtractFilms(Archive):
    """See `nih.NihExtract`."""

    schema_ = NIH14
    write = nih.write_synthetic_extract
    institution = NIH_LIKE

    kind: Literal["nih-extract"]
    views: tuple[str, ...] | None = None  #: None: all

    def read(self, root: Path) -> Films:
        return nih.NihExtract(root, views=self.views, on_bad=self.on_bad)
