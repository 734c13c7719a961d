"""Is a patient admitted again within 30 days of a discharge?

A moment is the end of a stay (`timelines.py`: transfers are part of it) that did not end in death. Days are those of
the calendar: records of dates and records of times give the same labels. The first stay that begins 1 to `horizon` days
after the day of discharge decides: true, unless it is planned. Without such a stay: false, if the patient is observed
to the end of the last of these days; who is not, or dies within them, gets no label.
"""

from __future__ import annotations

from collections import Counter

import polars as pl

from behrt.tasks.moments import moments
from behrt.tasks.task_options import ReadmissionOptions
from behrt.tasks.timelines import Timelines


def readmissions(found: Timelines, options: ReadmissionOptions) -> tuple[pl.DataFrame, Counter[str]]:
    """Labels `subject_id`, `prediction_time`, `boolean_value`, and what became of each moment."""
    indices, counts = moments(found, options)
    later = found.stays.select("subject_id", pl.col("begin").alias("next"), "planned")
    pairs = indices.join_asof(
        later, left_on="prediction_time", right_on="next", by="subject_id", strategy="forward",
        allow_exact_matches=False, check_sortedness=False, coalesce=False,
    )  # fmt: skip
    discharged = pl.col("prediction_time").dt.date()
    within = (pl.col("next").dt.date() - discharged).dt.total_days() <= options.horizon
    within = (within & (pl.col("next") <= pl.col("observed"))).fill_null(False)
    # a record that ends on the last day shows the whole of it, whatever the hour of its last event
    whole = (pl.col("observed").dt.date() - discharged).dt.total_days() >= options.horizon
    died = (pl.col("death").dt.date() - discharged).dt.total_days() <= options.horizon
    pairs = pairs.join(found.subjects.select("subject_id", "death"), on="subject_id", how="left", maintain_order="left")
    fate = (
        pl.when(within & pl.col("planned")).then(pl.lit("planned_readmissions"))
        .when(within).then(pl.lit("readmissions"))
        .when(died.fill_null(False)).then(pl.lit("died_within_the_window"))
        .when(whole).then(pl.lit("not_readmitted"))
        .otherwise(pl.lit("not_observed_to_the_end"))
    )  # fmt: skip
    pairs = pairs.with_columns(fate.alias("fate"))
    counts.update(dict(pairs["fate"].value_counts().iter_rows()))
    labelled = pairs.filter(pl.col("fate").is_in(["readmissions", "planned_readmissions", "not_readmitted"]))
    return labelled.select("subject_id", "prediction_time", boolean_value=pl.col("fate") == "readmissions"), counts
