"""The section `sets`: cases drawn from a source."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from vlmalign.config import Config
from vlmalign.data.records.pyramid import LAYERS, Pyramid
from vlmalign.studies.engine.sections import Bound, Positive, Share


class Set(Config):
    """Cases of a source. Sets of one draw share no case and no patient."""

    from_: str = Field(alias="from")  #: a source
    #: whole: all of it; random: cases at random; patients: whole patients at random; balanced: every label has enough;
    #: pyramid: records by layer (`data.records.pyramid`)
    draw: Literal["whole", "random", "patients", "balanced", "pyramid"] = "whole"
    #: column -> values that are taken
    where: dict[str, tuple[str | int | float | bool, ...]] = Field(default_factory=dict)
    #: of records: a stretch [from, to) of 0..1, in which the hash of what a record tells must lie; twins lie together
    hash: tuple[Share, Share] | None = None
    size: Positive | None = None  #: cases; of one set
    #: of several balanced sets drawn at once: name -> cases; of a pyramid: layer -> cases, in sum one set, also known by layer
    parts: dict[str, Positive] = Field(default_factory=dict)
    pyramid: Pyramid | None = None  #: the rules of its layers
    floor: Bound = 0.05  #: balanced: what every label has at least, a share of the set (0.05) or cases (100)
    floors: dict[str, Bound] = Field(default_factory=dict)  #: balanced: of single labels, instead of `floor`
    cap: Bound | None = None  #: balanced: what every label has at most, likewise
    caps: dict[str, Bound] = Field(default_factory=dict)  #: balanced: of single labels, instead of `cap`
    films_per_patient: Positive | None = None  #: balanced: most cases of one patient
    apart: tuple[str, ...] = ()  #: sets of the same source whose patients, and twins of whose records, are left out
    seed: int | None = None  #: null: the study's
    role: Literal["validation", "watch", "test"] | None = None  #: test: answered once per state, never chosen by
    peek: bool = False  #: allow a test set to choose, or to be watched; every page says so
    may_overlap: tuple[str, ...] = ()  #: sets with which it may share patients or cases
    on_bad: Literal["error", "skip"] = (
        "error"  #: a film that cannot be decoded stops the run, or is left out and listed
    )

    @model_validator(mode="after")
    def _sizes_fit_the_draw(self) -> Set:
        if (self.draw == "pyramid") != (self.pyramid is not None):
            raise ValueError(f"draw: pyramid and the section pyramid belong together, found draw: {self.draw}")
        if self.draw == "pyramid":
            if not self.parts or self.size is not None or self.parts.keys() - set(LAYERS):
                raise ValueError(f"a pyramid needs parts: cases of {', '.join(LAYERS)}, and no size")
        elif self.draw == "balanced":
            if (self.size is None) == (not self.parts):
                raise ValueError("a balanced draw needs either size (one set) or parts (several: name -> cases)")
        elif given := [name for name in ("parts", "floors", "cap", "caps") if getattr(self, name)]:
            raise ValueError(
                f"{given[0]} belong{'s' * (given[0] == 'cap')} to a balanced draw, found draw: {self.draw}"
            )
        elif (self.size is None) != (self.draw == "whole"):
            raise ValueError(f"draw: {self.draw} {'takes no size' if self.draw == 'whole' else 'needs a size'}")
        return self
