"""What does counting see of a patient's history?

Age at the last visible event, length of the history (tokens, visits, years) and how often each code is in it; not what
stands together, nor in which order. Of a history that is longer than BEHRT has positions for it sees all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from behrt.tasks.examples import Examples
from behrt.vocabulary import FIRST_CODE, UNK

if TYPE_CHECKING:
    from scipy.sparse import csr_array

NUMBERS = ("age", "tokens", "visits", "years")
"""What is known of a history beside its codes: the age is that of the last visible event."""

MOST_CODES = 256
"""Codes of trees and of the Cox regression, whose tables are dense: those of most training rows."""

Matrix = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class History:
    """What is seen of rows.

    Attributes:
        numbers: float64 [rows, `NUMBERS`]; NaN is not known.
        counts: float32 [rows, vocab_size], sparse: how often each code is there, `[UNK]` among them.
    """

    numbers: Matrix
    counts: csr_array

    def __len__(self) -> int:
        return len(self.numbers)

    def take(self, rows: NDArray[Any]) -> History:
        return History(self.numbers[rows], self.counts[rows])


def history_of(examples: Examples, vocab_size: int) -> History:
    """Of the visible tokens of each row, and of no other."""
    from scipy.sparse import csr_array

    numbers = np.full((len(examples), len(NUMBERS)), np.nan)
    parts = []
    lengths = np.zeros(len(examples), np.int64)
    for row in range(len(examples)):
        patient = int(examples.patients[row])
        codes, ages, visits = examples.split.sequence(patient)
        seen = examples.seen(row)
        own, times = codes[seen], examples.split.times(patient)[seen]
        lived = ages[seen] != 0  # some sources date the sex at the birth, where no history begins
        if not lived.any():
            lived[:] = True
        visited = np.unique(visits[seen][lived])
        years = np.ptp(times[lived]) / np.timedelta64(1, "D") / 365.25
        numbers[row] = ages[seen].max(), len(own), (visited > 0).sum(), years  # [CLS] is in visit 0
        own = own[(own >= FIRST_CODE) | (own == UNK)]
        parts.append(own)
        lengths[row] = len(own)
    columns = np.concatenate([np.zeros(0, np.int32), *parts])
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    counts = csr_array((np.ones(len(columns), np.float32), columns, bounds), shape=(len(examples), vocab_size))
    counts.sum_duplicates()
    return History(numbers, counts)


class Scaled:
    """Numbers, the longer ones as logarithms, on one scale; NaN becomes the mean, and a column says so."""

    def __init__(self, history: History) -> None:
        values = self._values(history)
        known = ~np.isnan(values)
        rows = np.maximum(known.sum(0), 1)
        self._mean = np.where(known, values, 0).sum(0) / rows
        spread = np.sqrt(np.where(known, (values - self._mean) ** 2, 0).sum(0) / rows)
        self._spread = np.where(spread > 0, spread, 1.0)

    @staticmethod
    def _values(history: History) -> Matrix:
        values = history.numbers.copy()
        values[:, 1:] = np.log1p(values[:, 1:])
        return values

    def __call__(self, history: History) -> Matrix:
        scaled = (self._values(history) - self._mean) / self._spread
        unknown = np.isnan(scaled[:, :1])
        squared = np.nan_to_num(scaled[:, :1]) ** 2  # risk need not rise evenly with age
        return np.concatenate([np.nan_to_num(scaled), squared, unknown], axis=1)


class Dense:
    """Numbers, and the counts of the codes that most rows have."""

    def __init__(self, history: History, most: int = MOST_CODES) -> None:
        rows_with = np.asarray((history.counts > 0).sum(axis=0)).ravel()
        common = np.argsort(-rows_with, kind="stable")[:most]
        self.codes = np.sort(common[rows_with[common] > 0])

    def counts(self, history: History) -> Matrix:
        return np.asarray(history.counts[:, self.codes].toarray())

    def __call__(self, history: History) -> Matrix:
        return np.concatenate([history.numbers.astype(np.float32), self.counts(history)], axis=1)
