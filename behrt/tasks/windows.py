"""Does an outcome come before, inside or after the window that a task asks about?

A window opens `gap` days after the prediction and closes `horizon` days later: it holds the moments after its opening,
up to and including its close.
"""

from __future__ import annotations

from datetime import timedelta

import polars as pl

from behrt.cleaning import CALENDAR
from behrt.tasks.task_options import TaskOptions


def days_after(moment: pl.Expr, days: float) -> pl.Expr:
    """The moment so many days later, at most the end of the calendar, which years beyond 9999 would overflow."""
    span = timedelta(days=days)
    latest = CALENDAR[1] - span
    return pl.when(moment <= pl.lit(latest)).then(moment + span).otherwise(pl.lit(CALENDAR[1]))


def around(moments: pl.DataFrame, occurrences: pl.DataFrame, names: list[str], options: TaskOptions) -> pl.DataFrame:
    """Each moment with each name, and where its outcome stands.

    Args:
        moments: `subject_id`, `prediction_time`, `until`, `observed`.
        occurrences: `subject_id`, `time`, `name`.

    Returns:
        Sorted by subject, time and name (in the order of `names`): the columns of `moments`, `name`, `opens` and
        `closes`, `before` (whether it occurs up to `opens`) and `next` (its first time after `opens` that is observed).
    """
    named = pl.DataFrame({"name": names}, schema={"name": pl.String}).with_row_index("order")
    at = pl.col("prediction_time")
    opens = days_after(at, options.gap)
    closes = days_after(at, options.gap + options.horizon)
    pairs = moments.join(named, how="cross").with_columns(opens.alias("opens"), closes.alias("closes"))
    key = ["subject_id", "name"]
    first = occurrences.group_by(key).agg(pl.col("time").min().alias("first"))
    pairs = pairs.join(first, on=key, how="left", maintain_order="left").sort("opens")
    pairs = pairs.join_asof(
        occurrences.select(*key, next="time").sort("next"), left_on="opens", right_on="next", by=key,
        strategy="forward", allow_exact_matches=False, check_sortedness=False, coalesce=False,
    )  # fmt: skip
    return (
        pairs.with_columns(
            (pl.col("first") <= pl.col("opens")).fill_null(False).alias("before"),
            pl.when(pl.col("next") <= pl.col("observed")).then("next").alias("next"),
        )
        .sort("subject_id", "prediction_time", "order")
        .drop("first", "order")
    )
