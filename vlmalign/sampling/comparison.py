"""Coverage of labels before and after a draw, beside draws that do not balance: as a table and as a figure's data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from vlmalign.data.sampling.bounds import Bounds
from vlmalign.data.sampling.sampler import SampleResult, random_sample
from vlmalign.data.sampling.stratification import stratify
from vlmalign.sampling.tables import Pool

POOL, RANDOM, STRATIFIED = "pool", "random", "stratified"


def draws(pool: Pool, drawn: SampleResult, *, seed: int) -> dict[str, np.ndarray]:
    """Rows by way of drawing: all of the pool, every balanced set, and as many rows as these have together drawn at
    random and by iterative stratification."""
    number = sum(len(each.indices) for each in drawn.sets.values())
    return {
        POOL: np.arange(len(pool.labels)),
        **{name: each.indices for name, each in drawn.sets.items()},
        RANDOM: random_sample(pool.patients, number, seed=seed),
        STRATIFIED: stratify(pool.labels, [number], seed=seed)[0],
    }


def coverage(pool: Pool, rows: Mapping[str, np.ndarray], bounds: Bounds, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Labels, their floors and caps as the least shares of any set, and the rows with each label, by way of drawing."""
    number = np.array(list(sizes.values()))
    floors, caps = (bounds.asked / number).min(1), (bounds.cap / number).min(1)
    return {
        "labels": list(pool.names),
        "floors": dict(zip(pool.names, floors.tolist(), strict=True)),
        "caps": dict(zip(pool.names, caps.tolist(), strict=True)),
        "sets": {
            name: {
                "films": len(part),
                "patients": len(np.unique(pool.patients[part])),
                "counts": dict(zip(pool.names, pool.labels[part].sum(0).tolist(), strict=True)),
            }
            for name, part in rows.items()
        },
    }


def as_table(found: Mapping[str, Any]) -> pd.DataFrame:
    """A row for each label: floor, cap, and rows and share of each way of drawing."""
    columns: dict[str, Any] = {"label": found["labels"]}
    columns |= {name[:-1]: [found[name][label] for label in found["labels"]] for name in ("floors", "caps")}
    for name, part in found["sets"].items():
        counts = [part["counts"][label] for label in found["labels"]]
        columns |= {name: counts, f"{name} share": [round(count / part["films"], 6) for count in counts]}
    return pd.DataFrame(columns)
