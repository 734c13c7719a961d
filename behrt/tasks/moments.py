"""When is a prediction made, and until when would the record show what it is about?

A moment is a patient and a prediction time. No prediction is made on the day of death or later, nor at the end of a
stay that ended in death: there would be nothing to predict.
"""

from __future__ import annotations

from collections import Counter
from datetime import datetime, time, timedelta

import numpy as np
import polars as pl

from behrt.cleaning import CALENDAR
from behrt.events import mix64
from behrt.tasks.task_options import TaskOptions
from behrt.tasks.timelines import Timelines


def moments(found: Timelines, options: TaskOptions) -> tuple[pl.DataFrame, Counter[str]]:
    """The moments of a shard, by `options.at`.

    Returns:
        `subject_id`, `prediction_time`, `until` (the end of the stay of `each-admission`, else null) and `observed`
        (until when an outcome would be seen), distinct, sorted by subject and time. Candidates that were left out are
        counted by reason, first reason first; with the moments they sum to `candidates`.
    """
    candidates = _candidates(found, options)
    counts: Counter[str] = Counter(candidates=candidates.height)

    def keep(condition: pl.Expr, otherwise: str) -> None:
        nonlocal candidates
        kept = candidates.filter(condition.fill_null(True))
        counts[otherwise] += candidates.height - kept.height
        candidates = kept

    at = pl.col("prediction_time")
    candidates = candidates.join(found.subjects, on="subject_id", how="left", maintain_order="left")
    keep(~pl.col("died"), "stays_that_ended_in_death")
    keep(at.dt.date() < pl.col("death").dt.date(), "on_or_after_the_day_of_death")
    if options.at == "each-admission":
        keep(at < pl.col("until"), "stays_that_ended_before")
    candidates = _with_visits_seen(candidates, found.visits)
    keep(pl.col("seen") >= options.min_visits, "fewer_visits_than_min_visits")
    keep(at - pl.col("first") >= timedelta(days=options.min_days), "shorter_history_than_min_days")
    selected = _selected(candidates, options)
    counts["not_the_visit_that_was_asked_for"] += candidates.height - selected.height
    counts["moments"] = selected.height
    selected = selected.with_columns(_observed(options).alias("observed"))
    return selected.select("subject_id", "prediction_time", "until", "observed"), counts


def _candidates(found: Timelines, options: TaskOptions) -> pl.DataFrame:
    """`subject_id`, `prediction_time`, `until`, `died`, before anybody is left out."""
    key = ["subject_id", "prediction_time"]
    no_end = pl.lit(None, dtype=pl.Datetime("us")).alias("until")
    if options.at == "each-discharge":
        chosen = found.stays.select("subject_id", no_end, "died", prediction_time="end")
    elif options.at == "each-admission":
        moment = pl.col("begin") + timedelta(hours=options.hours)
        chosen = found.stays.select("subject_id", "died", prediction_time=moment, until="end")
        chosen = chosen.with_columns(died=pl.lit(False))  # death later in the stay is no reason not to predict
    else:
        deadly = found.stays.filter("died").select("subject_id", stop="end")
        deadly = found.visits.join(deadly, on="subject_id").filter(pl.col("stop").is_between("begin", "end"))
        deadly = deadly.select("subject_id", "visit", died=pl.lit(True)).unique()
        visits = found.visits.join(deadly, on=["subject_id", "visit"], how="left")
        died = pl.col("died").fill_null(False)
        # of two visits that end at once, the one that says so
        chosen = visits.select("subject_id", no_end, died, prediction_time="end").sort("died", descending=True)
    return chosen.select("subject_id", "prediction_time", "until", "died").unique(key, keep="first").sort(key)


def _with_visits_seen(candidates: pl.DataFrame, visits: pl.DataFrame) -> pl.DataFrame:
    """Adds `seen`, the visits that began at or before the moment."""
    begun = visits.select("subject_id", "begin").sort("subject_id", "begin")
    begun = begun.with_columns(pl.int_range(1, pl.len() + 1).over("subject_id").alias("seen"))
    return candidates.join_asof(
        begun, left_on="prediction_time", right_on="begin", by="subject_id", strategy="backward",
        check_sortedness=False, coalesce=False,
    ).with_columns(pl.col("seen").fill_null(0))  # fmt: skip


def _selected(candidates: pl.DataFrame, options: TaskOptions) -> pl.DataFrame:
    """One of a patient's moments where the options ask for one."""
    if options.at == "first-visit":
        return candidates.unique("subject_id", keep="first", maintain_order=True)
    if options.at == "last-visit":
        assert options.by is not None
        in_time = candidates.filter(pl.col("prediction_time").dt.date() <= options.by)
        return in_time.unique("subject_id", keep="last", maintain_order=True)
    if options.at == "one-visit":
        # by the hash of the subject: the same one, whoever else is in the data set
        subjects = candidates["subject_id"].to_numpy().astype(np.int64).view(np.uint64)
        drawn = mix64(mix64(subjects) ^ mix64(np.array([options.seed], np.uint64))) >> np.uint64(1)
        place = pl.int_range(pl.len()).over("subject_id")
        chosen = pl.Series("drawn", drawn.astype(np.int64)) % pl.len().over("subject_id")
        return candidates.filter(place == chosen)
    return candidates


def _observed(options: TaskOptions) -> pl.Expr:
    """The moment after which the record shows nothing more: by the options, and never after death."""
    if options.observed_until == "always":
        end = pl.lit(CALENDAR[1], dtype=pl.Datetime("us"))
    elif options.observed_until == "last-event":
        end = pl.max_horizontal("last", "death")  # a death is an event, too
    else:
        end = pl.lit(datetime.combine(options.observed_until, time.max), dtype=pl.Datetime("us"))
    return pl.min_horizontal(end, pl.coalesce("death", end))
