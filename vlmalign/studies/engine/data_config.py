"""What a stage reads: a set of the study, or a file of rows of its own, with limits on lengths in tokens.

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
    """A set by its name (short: `data: NAME`), or a file of rows: JSON Lines, Parquet or a saved `datasets` folder."""

    set: str | None = None  #: NAME or NAME.PART
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
        return {"set": given} if isinstance(given, str) else given

    @model_validator(mode="after")
    def _one_origin(self) -> Data:
        if (self.set is None) == (self.path is None):
            found = "neither" if self.set is None else "both"
            raise ValueError(f"give either set (a set of this study) or path (a file of rows), found {found}")
        if self.set is not None and self.images is not None:
            raise ValueError("images is the root of the image paths of a file; a set has its source's")
        if self.path is not None and self.traces is not None:
            raise ValueError("traces go with a set; rows of a file hold their own answers")
        return self
