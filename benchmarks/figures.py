"""Medians and percentiles."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any


def percentile(values: Sequence[float], share: float) -> float:
    """A percentile by the nearest-rank method.

    :param share: 0 to 1.
    """
    if not values:
        raise ValueError("no values, no percentile")
    return sorted(values)[max(0, math.ceil(len(values) * share) - 1)]


def medians(runs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The median of each figure over the runs that have it, without values that are not numbers."""
    found: dict[str, list[float]] = {}
    for run in runs:
        for name, value in run.items():
            if isinstance(value, int | float):
                found.setdefault(name, []).append(value)
    return {name: statistics.median(values) for name, values in found.items()}
