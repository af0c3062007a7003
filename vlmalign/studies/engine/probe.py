"""Makes the artefacts of a probe: what is measured of a state on a set, and the results that follow from it.

measured/PROBE/STAGE/SET/rows.jsonl    a row a case; the probe's module says what it holds
probes/PROBE/results.json              {"kind", "level", "draws", "seed", "rows"}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from vlmalign.exchange import from_first
from vlmalign.studies.engine.base import Base
from vlmalign.studies.engine.files import write_json, write_rows
from vlmalign.studies.engine.make import RESULTS, Making
from vlmalign.studies.engine.probe_config import ROWS
from vlmalign.studies.probes import altered, institution, occlusion, pairs


class Kind(NamedTuple):
    """How one kind of probe is made."""

    measure: Callable[[Making, Base], list[dict[str, Any]]] | None  #: None: it goes on from answers alone
    results: Callable[..., list[dict[str, Any]]]  #: (study, name of the probe) -> rows


KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "altered": Kind(altered.measure, altered.results),
        "pairs": Kind(None, pairs.results),
        "institution": Kind(institution.measure, institution.results),
        "occlusion": Kind(occlusion.measure, occlusion.results),
    }
)


def make_measured(making: Making, base: Base) -> None:
    """Measure a state on a set; several processes share the cases out."""
    rows = KINDS[making.study.config.probes[making.node.key].kind].measure(making, base)
    from_first(lambda: making.keep("rows", ROWS, lambda path: write_rows(path, rows)))


def make_probe(making: Making) -> None:
    """The results of a probe; process 0 makes them."""
    study, name = making.study, making.node.key
    probe = study.config.probes[name]

    def write() -> None:
        rows = KINDS[probe.kind].results(study, name)
        settings = {"level": 0.95, "draws": probe.draws, "seed": study.config.seed}
        found = {"kind": probe.kind, **settings, "rows": rows}
        making.keep("results", RESULTS, lambda path: write_json(path, found))

    from_first(write)
