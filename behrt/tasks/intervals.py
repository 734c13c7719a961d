"""How sure is a metric, given who happened to be among the patients?

A bootstrap over patients: whole patients are drawn with replacement, with all of their rows. Rows of one patient are
alike, and an interval over rows would be too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

DRAWS = 1000
LEAST_SHARE_OF_DRAWS = 0.9
"""Where fewer draws give a number, as with two positives in all, there is no interval: the other draws flatter it."""


@dataclass(frozen=True)
class Estimate:
    """A metric and its interval; NaN where it is not defined."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


def patient_bootstrap(
    metric: Callable[[NDArray[np.int64]], float],
    patients: NDArray[Any],
    *,
    generator: np.random.Generator,
    draws: int = DRAWS,
    level: float = 0.95,
) -> Estimate:
    """The metric of all rows, and the percentile interval over draws of patients.

    Args:
        metric: of some rows, given by their indices, which repeat; NaN where it is not defined.
        patients: of each row, [rows].

    >>> values, patients = np.array([0.0, 0.0, 1.0, 1.0]), np.array([7, 7, 8, 8])
    >>> estimate = patient_bootstrap(lambda rows: values[rows].mean(), patients, generator=np.random.default_rng(0))
    >>> print(estimate)
    0.500 (0.000 to 1.000)
    """
    assert 0 < level < 1
    assert draws >= 1
    rows = np.argsort(patients, kind="stable")
    _, starts, counts = np.unique(patients[rows], return_index=True, return_counts=True)
    value = metric(np.arange(len(patients)))
    found = np.full(draws, math.nan)
    for draw in range(draws):
        chosen = generator.integers(len(starts), size=len(starts)) if len(starts) else np.zeros(0, np.int64)
        lengths = counts[chosen]
        within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        found[draw] = metric(rows[np.repeat(starts[chosen], lengths) + within])
    defined = found[np.isfinite(found)]
    if not math.isfinite(value) or len(defined) < LEAST_SHARE_OF_DRAWS * draws:
        return Estimate(value, math.nan, math.nan)
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(value, float(low), float(high))
