"""A number measured once a seed: its mean over seeds and the interval of Student's t.

Seeds are the units here: each gives one value, and films of several seeds are never pooled. What the interval covers is
training anew with other draws on the same films; how films differ is told by the patients' bootstrap within a seed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.stats import t


def over_seeds(values: Mapping[int, float | None], *, level: float = 0.95) -> dict[str, Any]:
    """{"value": mean, "low", "high", "n": seeds with a value, "seeds": seed -> value}; None for what is undefined.

    mean +- t(1 - (1 - level) / 2; n - 1) s / sqrt(n), s with n - 1; no interval of a single seed. For a difference of two
    arms pass the differences seed by seed: the paired interval.

    >>> over_seeds({0: 0.25, 1: 0.75})["value"], over_seeds({0: 0.25, 1: None})["low"] is None
    (0.5, True)
    """
    known = np.array([value for value in values.values() if value is not None], float)
    found: dict[str, Any] = {"value": None, "low": None, "high": None, "n": len(known)}
    if len(known):
        found["value"] = float(known.mean())
    if len(known) > 1:
        half = float(t.ppf((1 + level) / 2, len(known) - 1) * known.std(ddof=1) / np.sqrt(len(known)))
        found |= {"low": found["value"] - half, "high": found["value"] + half}
    return {**found, "seeds": {str(seed): value for seed, value in values.items()}}
