"""How sure is a metric, given who happened to be among the patients?

A bootstrap over patients: whole patients are drawn with replacement, with all of their rows. Rows of one patient are
alike, and an interval over rows would be too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

DRAWS = 1000
LEAST_SHARE_OF_DRAWS = 0.9
"""Where fewer draws give a number, as with two positives in all, there is no interval: the other draws flatter it."""

CELLS_AT_ONCE = 5_000_000
"""Weights of draws that are held in memory at once."""


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
    return estimate(value, found, level=level)


def estimate(value: float, found: NDArray[np.float64], *, level: float = 0.95) -> Estimate:
    """The percentile interval of what each draw gave, [draws], around the value of all rows."""
    assert 0 < level < 1
    defined = found[np.isfinite(found)]
    if not math.isfinite(value) or len(defined) < LEAST_SHARE_OF_DRAWS * len(found):
        return Estimate(value, math.nan, math.nan)
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(value, float(low), float(high))


def patient_weights(
    patients: NDArray[Any], *, generator: np.random.Generator, draws: int = DRAWS
) -> Iterator[NDArray[np.float32]]:
    """The same draws of patients as `patient_bootstrap`, as how often each row is in them: [some draws, rows].

    The first block is no draw: every row counts once there. Predictors that are asked in one pass see the same draws,
    so that their differences are paired.

    >>> blocks = patient_weights(np.array([7, 7, 8]), generator=np.random.default_rng(0), draws=2)
    >>> np.concatenate(list(blocks)).tolist()
    [[1.0, 1.0, 1.0], [0.0, 0.0, 2.0], [1.0, 1.0, 1.0]]
    """
    assert draws >= 1
    distinct, place = np.unique(patients, return_inverse=True)
    yield np.ones((1, len(patients)), np.float32)
    if not len(distinct):
        return
    at_once = max(1, CELLS_AT_ONCE // len(patients))
    for first in range(0, draws, at_once):
        chosen = [generator.integers(len(distinct), size=len(distinct)) for _ in range(min(at_once, draws - first))]
        counts = np.stack([np.bincount(own, minlength=len(distinct)) for own in chosen])
        yield counts.astype(np.float32)[:, place]
