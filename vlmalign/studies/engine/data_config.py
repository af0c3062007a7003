"""What a stage reads: sets of the study, or a file of rows of its own, with limits on lengths in tokens.

Paths are relative to the working directory. Limits belong to the stage and not to the set, because sets are text and
tokens are the model's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import model_validator

from vlmalign.config import FREE, Config
from vlmalign.studies.engine.sections import Positive


class Data(Config):
    """A set by its name (short: `data: NAME`), several together (`data: [NAME, NAME]`), or a file of rows: JSON Lines,
    Parquet or a saved `datasets` folder."""

    set: str | tuple[str, ...] | None = None  #: NAME or NAME.PART; of several every case is seen once a pass
    path: Annotated[Path | None, FREE] = None
    images: Annotated[Path | None, FREE] = None  #: root of the image paths in the rows; None: the file's folder
    #: of a set: JSON Lines of {"id": case, "trace": the reasoning that is taught with it}, in place of the source's
    traces: Annotated[Path | None, FREE] = None
    on_bad: Literal["error", "skip"] = "error"  #: a row that cannot be used stops the run, or is left out and listed
    max_prompt: Positive | None = None  #: tokens, soft tokens included; None: no limit
    max_completion: Positive | None = None  #: tokens of the longest answer
    on_long: Literal["error", "skip", "truncate"] = "error"  #: truncate: an answer loses its end; prompts are never cut

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, given: Any) -> Any:
        given = {"set": given} if isinstance(given, str | list | tuple) else given
        if isinstance(given, dict) and isinstance(given.get("set"), list):  # strictly, a list is no tuple
            given = {**given, "set": tuple(given["set"])}
        return given

    @property
    def sets(self) -> tuple[str, ...]:
        """The sets by reference; none for a file."""
        if self.set is None:
            return ()
        return (self.set,) if isinstance(self.set, str) else self.set

    @property
    def parts(self) -> tuple[Data, ...]:
        """The same for each set by itself."""
        return tuple(self.model_copy(update={"set": ref}) for ref in self.sets) or (self,)

    @property
    def origin(self) -> str:
        """What it is called in messages."""
        if self.path is not None:
            return str(self.path)
        return f"set {self.sets[0]}" if len(self.sets) == 1 else f"sets {' + '.join(self.sets)}"

    @model_validator(mode="after")
    def _one_origin(self) -> Data:
        if (self.set is None) == (self.path is None):
            found = "neither" if self.set is None else "both"
            raise ValueError(f"give either set (a set of this study) or path (a file of rows), found {found}")
        if self.set is not None and len(set(self.sets)) < max(1, len(self.sets)):
            raise ValueError(f"set: expected one set, or several that differ, found {self.set!r}")
        if len(self.sets) > 1 and self.traces is not None:
            raise ValueError("traces go with one set; of several give each its source's (sources.NAME.traces)")
        if self.set is not None and self.images is not None:
            raise ValueError("images is the root of the image paths of a file; a set has its source's")
        if self.path is not None and self.traces is not None:
            raise ValueError("traces go with a set; rows of a file hold their own answers")
        return self
