"""Settings that every source of films has: names of labels, reasoning traces, films that cannot be read, bits used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from vlmalign.config import FREE, Config
from vlmalign.data.sources.films import Films
from vlmalign.data.sources.json_lines import read_texts
from vlmalign.data.sources.padchest import OPEN_MAPS
from vlmalign.data.sources.schema import LABEL_MAPS, LabelMap, LabelSchema, renaming

Positive = Annotated[int, Field(ge=1)]
#: CheXpert's names (Irvin et al. 2019, arXiv 1901.07031) for what -1, uncertain, counts as
POLICIES = {"positive-only": "negative", "u-zeros": "negative", "u-ones": "positive", "u-ignore": "ignore"}
#: negative: absent, as blank; positive: present; ignore: a film with -1 for any label is left out and listed.
#: Only positives are counted here, so that "positive-only" and "u-zeros" are the same. U-Ignore masks single labels in a
#: loss; an answer that lists labels has no place for one that is neither present nor absent, so the film goes.
Uncertain = Annotated[
    Literal["negative", "positive", "ignore"],
    BeforeValidator(lambda given: POLICIES.get(given, given) if isinstance(given, str) else given),
]
#: fills "{run}", the run folder, into a path of the config
Place = Callable[[str], Path]


class FilmSource(Config):
    """What kinds of films have in common."""

    #: the name of a built-in map, or {their label: our label, or null to drop it}; labels it does not list stay
    label_map: str | dict[str, str | None] | None = None
    #: JSON Lines of {"id": film, "trace": the reasoning that leads to its labels}; becomes `meta["trace"]`
    traces: Annotated[Path | None, FREE] = None
    on_bad: Literal["error", "skip"] = "error"  #: a film that cannot be used stops the run, or is left out and listed
    bits: Annotated[int, Field(ge=9, le=16)] = (
        16  #: that 16-bit grey films use, counted from the lowest: 12 of many detectors
    )

    def finished(self, films: Films, place: Place) -> Films:
        """The films with these settings applied; ValueError as `label_map_of` and `Films.with_traces` say."""
        if self.label_map is not None:
            films = films.in_names_of(label_map_of(self.label_map, films.schema))
        if self.traces is not None:
            path = place(str(self.traces))
            films = films.with_traces(read_texts(path, "id", "trace"), path)
        films.bits = self.bits
        return films


def label_map_of(setting: str | dict[str, str | None], schema: LabelSchema) -> LabelMap:
    """The map that `label_map` means for labels of `schema`; ValueError where it does not fit them."""
    if isinstance(setting, dict):
        return renaming(schema, setting)
    if setting in OPEN_MAPS:
        return OPEN_MAPS[setting].of(schema)
    fitting = [name for name, table in LABEL_MAPS.items() if table.source == schema]
    if setting not in fitting:
        raise ValueError(
            f"label_map must be one of {', '.join(fitting) or 'none that is built in'} for {schema.name} labels, or "
            f"{{their label: our label}}; found {setting!r}"
        )
    return LABEL_MAPS[setting]
