"""Which events belong to the same visit?

The first of these that applies to an event decides: the source's own `visit_id`; an admission-to-discharge span around
it, if the codes of both were named; the gap rule, by which a pause longer than so many hours begins a new visit.
"""

from __future__ import annotations

from datetime import timedelta

import polars as pl

from behrt.events import matches_code
from behrt.prepare_options import PrepareOptions


def admission_spans(events: pl.DataFrame, admission_code: str, discharge_code: str) -> tuple[pl.DataFrame, int]:
    """Spans `subject_id, admitted, discharged`, and the number of admissions without a discharge before the next one.

    Args:
        events: with `subject_id`, `time`, `code`, sorted by subject and time.
    """
    admissions = (
        events.filter(matches_code(admission_code))
        .select("subject_id", pl.col("time").alias("admitted"))
        .unique(maintain_order=True)
        .with_columns(pl.col("admitted").shift(-1).over("subject_id").alias("next_admitted"))
    )
    discharges = events.filter(matches_code(discharge_code)).select("subject_id", pl.col("time").alias("discharged"))
    # A discharge at the very moment of the admission closes the stay before it, unless no later one closes this stay.
    for discharged, exact in (("later", False), ("at_once", True)):
        admissions = admissions.join_asof(
            discharges.rename({"discharged": discharged}),
            left_on="admitted",
            right_on=discharged,
            by="subject_id",
            strategy="forward",
            allow_exact_matches=exact,
            check_sortedness=False,
            coalesce=False,
        )

    def within(discharged: str) -> pl.Expr:
        next_admitted = pl.col("next_admitted").fill_null(pl.col(discharged))
        return pl.when(pl.col(discharged) <= next_admitted).then(pl.col(discharged))

    spans = admissions.select(
        "subject_id", "admitted", pl.coalesce(within("later"), within("at_once")).alias("discharged")
    ).drop_nulls("discharged")
    return spans, admissions.height - spans.height


def assign_visits(events: pl.DataFrame, options: PrepareOptions) -> tuple[pl.DataFrame, int]:
    """Adds `visit`, an Int64 key: the `row` of the visit's first event, so that keys sort as visits do.

    Args:
        events: `EVENT_SCHEMA` and `row` (Int64, increasing), sorted by subject and time, no time null.

    Returns:
        The events in their order, and the number of admissions that no discharge closes.

    >>> from datetime import datetime
    >>> times = [datetime(2020, 1, 1, 8), datetime(2020, 1, 1, 20), datetime(2020, 1, 3)]
    >>> events = pl.DataFrame({"row": [0, 1, 2], "subject_id": [7, 7, 7], "time": times, "visit_id": [None] * 3},
    ...                       schema_overrides={"visit_id": pl.String})
    >>> assign_visits(events, PrepareOptions(visit_gap_hours=24))[0]["visit"].to_list()
    [0, 0, 2]
    """
    first_row = pl.col("row").min()
    named = pl.col("visit_id").is_not_null()
    parts = [events.filter(named).with_columns(first_row.over("subject_id", "visit_id").alias("visit"))]
    rest = events.filter(~named)

    unclosed = 0
    if options.admission_code is not None and options.discharge_code is not None:
        spans, unclosed = admission_spans(events, options.admission_code, options.discharge_code)
        placed = rest.join_asof(
            spans, left_on="time", right_on="admitted", by="subject_id", strategy="backward", check_sortedness=False,
            coalesce=False,
        ).with_columns((pl.col("time") <= pl.col("discharged")).fill_null(False).alias("inside"))  # fmt: skip
        inside = placed.filter("inside").with_columns(first_row.over("subject_id", "admitted").alias("visit"))
        parts.append(inside.select(*events.columns, "visit"))
        rest = placed.filter(~pl.col("inside")).select(events.columns)

    pause = pl.col("time").diff() > timedelta(hours=options.visit_gap_hours)
    begins = (pl.col("subject_id") != pl.col("subject_id").shift(1)) | pause
    gaps = begins.fill_null(True).cast(pl.Int64).cum_sum()
    parts.append(rest.with_columns(first_row.over(gaps).alias("visit")))
    parts = [part for part in parts if not part.is_empty()] or parts[:1]
    return (parts[0] if len(parts) == 1 else pl.concat(parts).sort("row")), unclosed
