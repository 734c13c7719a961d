"""What does a curve of epochs do: fall, rise, stand still, jump?"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

INFINITE = 1e30
"""From here on a number counts as infinite; MLflow, for one, stores 1.8e308 for infinity."""


@dataclass(frozen=True)
class Curve:
    """One figure over the epochs of a run.

    Attributes:
        epochs: float64 [n], strictly ascending, numbered as the record numbers them; gaps are allowed.
        values: float64 [n]; NaN where the record says that the figure was not finite.
    """

    epochs: NDArray[np.float64]
    values: NDArray[np.float64]

    @classmethod
    def of(cls, points: Iterable[tuple[float, float | None]]) -> Curve:
        """From (epoch, value) in any order; None is "not finite", and of an epoch told twice the later value counts.

        >>> Curve.of([(2, 6.5), (1, 7.0), (2, 6.4)]).values
        array([7. , 6.4])
        """
        by_epoch = {float(epoch): np.nan if value is None else float(value) for epoch, value in points}
        epochs = sorted(by_epoch)
        values = np.array([by_epoch[epoch] for epoch in epochs], np.float64)
        values[~(np.abs(values) < INFINITE)] = np.nan
        return cls(np.array(epochs, np.float64), values)

    def __len__(self) -> int:
        return len(self.epochs)

    @property
    def finite(self) -> Curve:
        """The same without its points that are not finite."""
        return self.where(np.isfinite(self.values))

    def where(self, chosen: NDArray[np.bool_]) -> Curve:
        """The chosen points, bool [n]."""
        return Curve(self.epochs[chosen], self.values[chosen])

    def at(self, epoch: float) -> float:
        """The value at an epoch, between two of the record by a straight line."""
        return float(np.interp(epoch, self.epochs, self.values))


def curves_of_history(history: Mapping[str, Iterable[Mapping[str, Any]]]) -> dict[str, Curve]:
    """The curves of a `metrics_history.json`: `{"train_loss": [{"epoch": 1, "value": 6.9}, …], …}`."""
    return {name: Curve.of((point["epoch"], point["value"]) for point in points) for name, points in history.items()}


@dataclass(frozen=True)
class Movement:
    """What a loss curve did, in levels that single jumps do not move.

    Attributes:
        start: the first value.
        low, low_epoch: least mean of `width` values in a row, and the epoch in their middle.
        end: mean of the last `width` values.
        last_epoch: where the curve ends.
        noise: standard deviation around the best curve that only falls up to `low_epoch` and only rises after it.
        width: values in a mean: an eighth of the curve, 1 to 8.
        count: values of the curve.
    """

    start: float
    low: float
    low_epoch: float
    end: float
    last_epoch: float
    noise: float
    width: int
    count: int

    @property
    def fall(self) -> float:
        """From the start to the end; negative where the loss rose."""
        return self.start - self.end

    @property
    def rise(self) -> float:
        """From the lowest level to the end, never negative."""
        return self.end - self.low


def movement(curve: Curve) -> Movement:
    """Reads a curve of at least one value, all of them finite.

    >>> moved = movement(Curve.of(enumerate([7.0, 6.5, 6.4, 6.6, 6.8], 1)))
    >>> moved.low_epoch, round(moved.fall, 2), round(moved.rise, 2), moved.noise
    (3.0, 0.2, 0.4, 0.0)
    """
    values = curve.values
    assert len(values)
    assert np.isfinite(values).all()
    width = min(max(len(values) // 8, 1), 8)
    levels = np.convolve(values, np.full(width, 1 / width), mode="valid")  # [n - width + 1]
    low = int(levels.argmin())
    middle = low + width // 2
    return Movement(
        start=float(values[0]),
        low=float(levels[low]),
        low_epoch=float(curve.epochs[middle]),
        end=float(levels[-1]),
        last_epoch=float(curve.epochs[-1]),
        noise=_noise(values, middle),
        width=width,
        count=len(values),
    )


def _noise(values: NDArray[np.float64], turn: int) -> float:
    """Standard deviation around the best curve that falls up to the value `turn` and rises after it."""
    from scipy.optimize import isotonic_regression

    parts = [(values[: turn + 1], False), (values[turn + 1 :], True)]
    squares = sum(
        float(np.square(part - isotonic_regression(part, increasing=increasing).x).sum())
        for part, increasing in parts
        if len(part)
    )
    return math.sqrt(squares / len(values))


def slope(curve: Curve) -> tuple[float, float]:
    """Change per epoch by least squares, and its standard error; (0, inf) for fewer than three points.

    >>> slope(Curve.of([(1, 7.0), (2, 6.0), (3, 5.0)]))
    (-1.0, 0.0)
    """
    if len(curve) < 3:
        return 0.0, math.inf
    x = curve.epochs - curve.epochs.mean()
    spread = float((x * x).sum())
    rate = float((x * (curve.values - curve.values.mean())).sum()) / spread
    rest = curve.values - curve.values.mean() - rate * x
    return rate, math.sqrt(float((rest * rest).sum()) / (len(x) - 2) / spread)
