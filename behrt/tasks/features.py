"""Which events may a model see that predicts at a given time?

Those at or before it; with a gap, those that are at least so many days before it. The rule stands twice, for tables of
events and for the times of prepared sequences; beside it, a search for what slipped through.
"""

from __future__ import annotations

from datetime import timedelta

import numpy as np
import numpy.typing as npt
import polars as pl


def visible(
    times: npt.NDArray[np.datetime64], prediction_time: np.datetime64, *, gap: float = 0.0
) -> npt.NDArray[np.bool_]:
    """Whether each event or token is seen, bool, as long as `times`; one without a time (NaT) is not.

    Where visits overlap, times do not rise from token to token: hence each is asked, not a length found.

    Args:
        gap: days.

    >>> times = np.array(["2020-01-01T12", "2020-01-03", "2020-01-02"], "datetime64[us]")
    >>> visible(times, np.datetime64("2020-01-02")).tolist()
    [True, False, True]
    >>> visible(times, np.datetime64("2020-01-02"), gap=0.5).tolist()
    [True, False, False]
    """
    assert gap >= 0
    seen: npt.NDArray[np.bool_] = times <= prediction_time.astype("datetime64[us]") - np.timedelta64(
        timedelta(days=gap)
    )
    return seen


def features_until(events: pl.DataFrame, moments: pl.DataFrame, *, gap: float = 0.0) -> pl.DataFrame:
    """The events that may be seen at each moment.

    Args:
        events: with `subject_id` and `time`.
        moments: `subject_id` and `prediction_time`; other columns are left out, moments that repeat are one.
        gap: days.

    Returns:
        The columns of `events` and `prediction_time`: an event once for each moment that sees it. A moment that sees
        nothing has no row.
    """
    assert gap >= 0
    key = moments.select("subject_id", "prediction_time").unique(maintain_order=True)
    pairs = events.join(key, on="subject_id", how="inner")
    return pairs.filter(pl.col("time") <= pl.col("prediction_time") - timedelta(days=gap))


def telling_codes(features: pl.DataFrame, labels: pl.DataFrame) -> pl.DataFrame:
    """How well each code alone tells a label: a leak stands at the top, near 1.

    Args:
        features: of `features_until`, with `code`.
        labels: `subject_id`, `prediction_time`, `boolean_value`, one row a moment.

    Returns:
        `code`, `moments` (that have it) and `auroc`, of whether it is there: from 0.5 (tells nothing) to 1, whichever
        way it points. Best first. Empty where all labels are the same.
    """
    key = ["subject_id", "prediction_time"]
    positives = int(labels["boolean_value"].sum())
    negatives = labels.height - positives
    have = features.select(*key, "code").unique().join(labels.select(*key, "boolean_value"), on=key, how="inner")
    true_share = pl.col("boolean_value").sum() / max(1, positives)
    false_share = (~pl.col("boolean_value")).sum() / max(1, negatives)
    found = have.group_by("code").agg(
        pl.len().alias("moments"), (0.5 + (true_share - false_share).abs() / 2).alias("auroc")
    )
    found = found.filter(pl.lit(positives > 0 and negatives > 0))
    return found.sort(["auroc", "moments", "code"], descending=[True, True, False])
