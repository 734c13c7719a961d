"""What does a task know of the patients of one shard?

Events, visits and deaths come from `clean_events`, as those of the prepared sequences do, but for the patterns and
codings that choose tokens: an outcome need not be a token. Stays in hospital are made of visits:

- a stay is a visit with an admission code, from its first admission code to its last discharge code (where it has none,
  to its last event); or any visit, by option;
- stays of which the later begins before the end of the earlier, or on the same calendar day, are one: a transfer.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import polars as pl

from behrt.cleaning import CALENDAR, clean_events, deaths
from behrt.events import matches_code
from behrt.prepare_options import PrepareOptions

ADMISSION, DISCHARGE = "ADMISSION", "DISCHARGE"
"""Codes of admissions and discharges, as the readers of tables write them, where the options name none."""

DIED = r"(?i)(?:^|[^a-z])(?:died|expired|deceased|dead)(?:[^a-z]|$)"
"""In the code of a discharge, that it was a death: a word between anything but letters, as in `DIED_IN_HOSPITAL`."""


@dataclass(frozen=True)
class Timelines:
    """The patients of one shard.

    Attributes:
        events: `subject_id`, `time`, `code`, `visit`, sorted by subject and time.
        visits: `subject_id`, `visit`, `begin`, `end`, sorted by subject and begin.
        stays: `subject_id`, `begin`, `end`, `planned` (bool), `died` (bool), sorted by subject and begin.
        subjects: `subject_id`, `first` and `last` (of the events), `death` (null: not known), sorted.
        counts: what cleaning counted, and `admissions`.
    """

    events: pl.DataFrame
    visits: pl.DataFrame
    stays: pl.DataFrame
    subjects: pl.DataFrame
    counts: Counter[str]


def timelines(
    events: pl.DataFrame,
    options: PrepareOptions,
    splits: pl.DataFrame | None = None,
    *,
    every_visit_is_a_stay: bool = False,
    planned: tuple[str, ...] = (),
) -> Timelines:
    """The timelines of the events of one shard.

    Args:
        events: `EVENT_SCHEMA`, whole subjects, in any order.
        splits: `subject_id` and `split`; subjects outside it are left out. None: the source has no splits.
        planned: codes of planned admissions; a stay is planned if its first admission has one.
    """
    everything = options.model_copy(
        update={
            "include": (), "exclude": (), "icd_digits": None, "numeric_bins": None, "min_tokens": 1,
            "missing_birth": "keep", "static_codes": "drop",
        }
    )  # fmt: skip
    cleaned, counts = clean_events(events, everything, splits)
    cleaned = cleaned.select("subject_id", "time", "code", "visit").sort("subject_id", "time", maintain_order=True)
    time = pl.col("time")
    visits = cleaned.group_by("subject_id", "visit").agg(time.min().alias("begin"), time.max().alias("end"))
    visits = visits.sort("subject_id", "begin", "visit")
    in_time = events.filter(time.is_between(*CALENDAR) & (pl.col("code").str.strip_chars() != ""))
    subjects = cleaned.group_by("subject_id").agg(time.min().alias("first"), time.max().alias("last"))
    subjects = subjects.join(deaths(in_time, options.death_code), on="subject_id", how="left").sort("subject_id")

    admission, discharge = options.admission_code or ADMISSION, options.discharge_code or DISCHARGE
    admitted = cleaned.filter(matches_code(admission))
    counts["admissions"] = admitted.height
    if every_visit_is_a_stay:
        stays = visits.with_columns(planned=pl.lit(False), died=pl.lit(False))
    else:
        stays = _stays(admitted, cleaned.filter(matches_code(discharge)), visits, planned)
    return Timelines(cleaned, visits, merged(stays.drop("visit")), subjects, counts)


def _stays(
    admitted: pl.DataFrame, discharged: pl.DataFrame, visits: pl.DataFrame, planned: tuple[str, ...]
) -> pl.DataFrame:
    """One a visit with an admission."""
    key, time = ["subject_id", "visit"], pl.col("time")
    is_planned = pl.any_horizontal(pl.lit(False), *(matches_code(code) for code in planned))
    begins = admitted.group_by(key).agg(
        time.min().alias("begin"), is_planned.filter(time == time.min()).any().alias("planned")
    )
    ends = discharged.group_by(key).agg(
        time.max().alias("discharged"), pl.col("code").str.contains(DIED).any().alias("died")
    )
    found = begins.join(ends, on=key, how="left").join(visits.select(*key, last="end"), on=key)
    return found.select(
        *key,
        "begin",
        # a discharge code ahead of the admission, as of an earlier stay at the same moment, ends nothing
        pl.max_horizontal("begin", pl.coalesce("discharged", "last")).alias("end"),
        "planned",
        pl.col("died").fill_null(False),
    )


def merged(stays: pl.DataFrame) -> pl.DataFrame:
    """Stays that overlap, or begin on the day on which an earlier one ends, as one.

    Planned is what the first was; a death in any of them counts.

    >>> from datetime import datetime
    >>> days = [datetime(2020, 1, 1), datetime(2020, 1, 5, 18), datetime(2020, 1, 7)]
    >>> stays = pl.DataFrame({"subject_id": [1, 1, 1], "begin": days, "planned": [False] * 3, "died": [False] * 3,
    ...                       "end": [datetime(2020, 1, 5, 9), datetime(2020, 1, 6), datetime(2020, 1, 8)]})
    >>> [(stay["begin"].day, stay["end"].day) for stay in merged(stays).to_dicts()]
    [(1, 6), (7, 8)]
    """
    stays = stays.sort("subject_id", "begin", "end")
    last_day = pl.col("end").dt.date().to_physical().cum_max().shift(1).over("subject_id")
    begins = (pl.col("begin").dt.date().to_physical() > last_day).fill_null(True)
    return (
        stays.with_columns(begins.cum_sum().alias("stay"))
        .group_by("subject_id", "stay", maintain_order=True)
        .agg(pl.col("begin").first(), pl.col("end").max(), pl.col("planned").first(), pl.col("died").any())
        .drop("stay")
    )
