"""How well does a risk order who has an event first?"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray


def harrell_c(events: NDArray[np.bool_], days: NDArray[Any], risks: NDArray[Any]) -> float:
    """Harrell's concordance: of pairs of whom one is known to have had the event first, the share ranked so by risk.

    Ties of risk count half; of two at the same time, an event comes before an end of observation. NaN without any pair.

    >>> harrell_c(np.array([True, False, True]), np.array([1.0, 2.0, 3.0]), np.array([0.9, 0.1, 0.9]))
    0.75
    """
    from sksurv.exceptions import NoComparablePairException
    from sksurv.metrics import concordance_index_censored

    if len(events) < 2 or not events.any():
        return math.nan
    try:
        return float(concordance_index_censored(events, days, risks)[0])
    except NoComparablePairException:
        return math.nan
