"""The table of sources: the one place that names them all. A new kind is one file and one line here."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from vlmalign.data.sources.ehr import EhrSource
from vlmalign.data.sources.rows import RowSource
from vlmalign.data.sources.table import TableFilms
from vlmalign.data.sources.xray import CheXpertFilms, MimicFilms, NihExtractFilms, NihFilms

#: kind -> its settings; each has `open(place) -> Films | Rows | Records`
SOURCES = {
    "mimic-cxr-jpg": MimicFilms,
    "chexpert": CheXpertFilms,
    "nih-cxr14": NihFilms,
    "nih-extract": NihExtractFilms,
    "table": TableFilms,
    "rows": RowSource,
    "ehr": EhrSource,
}

#: a source in a config, told by its `kind`
AnySource = Annotated[
    MimicFilms | CheXpertFilms | NihFilms | NihExtractFilms | TableFilms | RowSource | EhrSource,
    Field(discriminator="kind"),
]
