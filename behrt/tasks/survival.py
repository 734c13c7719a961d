"""How many days pass until death, or until a code set?

Time is counted from the opening of the window. It ends with the event, or censored: at the last moment at which the
patient is observed (for a code set, also at death), or at the horizon. Who has the code set by the opening gets no
label, nor does who is not observed after it.
"""

from __future__ import annotations

from collections import Counter

import polars as pl

from behrt.tasks.codesets import CodeSets
from behrt.tasks.moments import moments
from behrt.tasks.task_options import SurvivalOptions
from behrt.tasks.timelines import Timelines
from behrt.tasks.windows import around

MICROSECONDS_PER_DAY = 86_400_000_000


def survival_times(
    found: Timelines, options: SurvivalOptions, sets: CodeSets | None
) -> tuple[pl.DataFrame, Counter[str]]:
    """Labels `subject_id`, `prediction_time`, `boolean_value` (whether the event was seen), `float_value` (days).

    Args:
        sets: one code set, or None for death.
    """
    at, counts = moments(found, options)
    if sets is None:
        died = pl.col("death").is_not_null()
        occurrences = found.subjects.filter(died).select("subject_id", time="death", name=pl.lit("death"))
        names = ["death"]
    else:
        assert len(sets) == 1
        occurrences, names = sets.occurrences(found.events), list(sets)
    pairs = around(at, occurrences, names, options)
    is_event = (pl.col("next") <= pl.col("closes")).fill_null(False)
    end = pl.when(is_event).then("next").otherwise(pl.min_horizontal("observed", "closes"))
    days = (end - pl.col("opens")).dt.total_microseconds() / MICROSECONDS_PER_DAY
    fate = (
        pl.when("before").then(pl.lit("had_it_before"))
        .when(days <= 0).then(pl.lit("not_observed_after"))
        .when(is_event).then(pl.lit("events"))
        .otherwise(pl.lit("censored"))
    )  # fmt: skip
    pairs = pairs.with_columns(days.cast(pl.Float32).alias("days"), fate.alias("fate"))
    counts.update(dict(pairs["fate"].value_counts().iter_rows()))
    labelled = pairs.filter(pl.col("fate").is_in(["events", "censored"]))
    return labelled.select(
        "subject_id", "prediction_time", boolean_value=pl.col("fate") == "events", float_value="days"
    ), counts
