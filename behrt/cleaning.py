"""Which events of a shard become tokens, and what was left out, and why?

Every event read is counted exactly once: as kept, as a birth or death, or under the first reason to leave it out
(`EVENT_FATES`); `account` shows that nothing is missing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from datetime import datetime, timedelta

import polars as pl

from behrt.coding import shorten_icd
from behrt.events import matches_code
from behrt.prepare_options import PrepareOptions
from behrt.visits import assign_visits

EVENT_FATES = (
    "events_kept",
    "birth_events",
    "death_events",
    "events_without_subject",
    "events_without_code",
    "events_of_subjects_without_split",
    "events_outside_the_calendar",
    "events_of_subjects_without_birth",
    "static_events_dropped",
    "events_before_birth",
    "events_after_death",
    "events_not_included",
    "events_excluded",
    "duplicate_events",
    "events_of_subjects_below_min_tokens",
)
"""What can become of an event. Births give ages and deaths end histories; neither is a token."""

SUBJECT_FATES = (
    "subjects_kept",
    "subjects_without_split",
    "subjects_without_birth",
    "subjects_below_min_tokens",
)
"""What can become of a subject; one without a birth is kept if the options say so, and then counted as kept."""

NOTES = ("subjects_without_birth_kept", "unsorted_shards", "admissions_without_discharge", "static_events_kept")
"""Counted beside: not a loss, but a surprise."""

DAYS_PER_YEAR = 365.25

CALENDAR = (datetime(1, 1, 1), datetime(9999, 12, 31, 23, 59, 59, 999999))
"""Times before or after it are no dates but a damaged or a reserved value, and differences of them overflow."""


def account(counts: Mapping[str, int]) -> None:
    """Asserts that the fates sum to what was read, for events and for subjects."""
    assert sum(counts[fate] for fate in EVENT_FATES) == counts["events_read"], dict(counts)
    assert sum(counts[fate] for fate in SUBJECT_FATES) == counts["subjects_read"], dict(counts)


class _Sieve:
    """Takes events out of a frame and notes under which reason."""

    def __init__(self, events: pl.DataFrame) -> None:
        self.events = events
        self.counts: Counter[str] = Counter(events_read=events.height)

    def keep(self, condition: pl.Expr, otherwise: str) -> None:
        """Keeps the events for which `condition` is true (neither false nor null)."""
        keeps = self.events.select(condition.fill_null(False).alias("keeps"))["keeps"]
        left_out = self.events.height - int(keeps.sum())
        self.counts[otherwise] += left_out
        if left_out:  # most reasons occur in few shards, and a filter copies every column
            self.events = self.events.filter(keeps)

    def subjects(self) -> int:
        return self.events["subject_id"].n_unique()


def deaths(events: pl.DataFrame, death_code: str) -> pl.DataFrame:
    """Of those who died: `subject_id` and `death`, the last moment of the history.

    The earliest of several counts. A death at midnight is a date without a time of day, so its whole day still belongs
    to the history; otherwise the last admission of those who died in hospital would be cut off.
    """
    death = pl.col("time").min()
    whole_day = pl.when(death.dt.time() == pl.time(0)).then(death + timedelta(days=1, microseconds=-1))
    died = events.filter(matches_code(death_code)).group_by("subject_id")
    return died.agg(whole_day.otherwise(death).alias("death"))


def _histories(sieve: _Sieve, options: PrepareOptions) -> pl.DataFrame:
    """Takes births and deaths out of the events: `subject_id`, `birth`, `end`, null where unknown.

    The earliest of several births counts, and of deaths.
    """
    events = sieve.events
    is_birth, is_death = matches_code(options.birth_code), matches_code(options.death_code)
    births = events.filter(is_birth).group_by("subject_id").agg(pl.col("time").min().alias("birth"))
    histories = (
        events.select(pl.col("subject_id").unique().sort())
        .join(births, on="subject_id", how="left", maintain_order="left")
        .join(deaths(events, options.death_code), on="subject_id", how="left", maintain_order="left")
        .rename({"death": "end"})
    )
    sieve.keep(~is_birth, "birth_events")
    sieve.keep(~is_death, "death_events")
    return histories


def _add_static(sieve: _Sieve, static: pl.DataFrame) -> None:
    """Static events join the first visit of their subject, ahead of it, at its time."""
    firsts = sieve.events.group_by("subject_id", maintain_order=True).first().drop("row", "code", "numeric_value")
    placed = static.select("row", "subject_id", "code", "numeric_value").join(firsts, on="subject_id", how="inner")
    placed = placed.with_columns(pl.col("row") - sieve.events.height - static.height)  # ahead, in their own order
    sieve.counts["static_events_kept"] += placed.height
    sieve.counts["static_events_dropped"] += static.height - placed.height
    sieve.events = pl.concat([placed.select(sieve.events.columns), sieve.events])


def clean_events(
    events: pl.DataFrame, options: PrepareOptions, splits: pl.DataFrame | None = None
) -> tuple[pl.DataFrame, Counter[str]]:
    """The events of one shard that become tokens, visit by visit, and the count of everything else.

    Args:
        events: `EVENT_SCHEMA`, whole subjects, in any order.
        splits: `subject_id` and `split`; subjects outside it are left out. None: the source has no splits.

    Returns:
        Rows sorted by subject, visit and time: `subject_id`, `time`, `code`, `numeric_value`, `visit` (Int32, counted
        from 1 for each subject, by the time of the first event) and `age` (Float32 years, NaN where birth is unknown).
        Counts by `EVENT_FATES`, `SUBJECT_FATES`, `NOTES`, `events_read` and `subjects_read`.
    """
    sieve = _Sieve(events)
    sieve.keep(pl.col("subject_id").is_not_null(), "events_without_subject")
    counts = sieve.counts
    counts["subjects_read"] = sieve.subjects()
    if splits is not None:
        sieve.keep(pl.col("subject_id").is_in(splits["subject_id"].implode()), "events_of_subjects_without_split")
        counts["subjects_without_split"] = counts["subjects_read"] - sieve.subjects()
    in_split = sieve.subjects()
    sieve.keep(pl.col("code").str.strip_chars() != "", "events_without_code")
    sieve.keep(pl.col("time").is_between(*CALENDAR).fill_null(True), "events_outside_the_calendar")

    histories = _histories(sieve, options)
    without_birth = histories.filter(pl.col("birth").is_null()).height + in_split - histories.height
    sieve.events = sieve.events.join(histories, on="subject_id", how="left", maintain_order="left")
    if options.missing_birth == "keep":
        counts["subjects_without_birth_kept"] = without_birth
        candidates = in_split
    else:  # "refuse" is decided by the caller, who has seen all shards
        sieve.keep(pl.col("birth").is_not_null(), "events_of_subjects_without_birth")
        counts["subjects_without_birth"] = without_birth
        candidates = in_split - without_birth

    sieve.events = sieve.events.with_row_index("row").with_columns(pl.col("row").cast(pl.Int64))
    static = sieve.events.filter(pl.col("time").is_null())
    sieve.events = sieve.events.filter(pl.col("time").is_not_null())
    # An unknown birth or death bounds nothing.
    sieve.keep((pl.col("time") >= pl.col("birth")).fill_null(True), "events_before_birth")
    sieve.keep((pl.col("time") <= pl.col("end")).fill_null(True), "events_after_death")

    # A visit is a fact about the record, not about the codes that were chosen: hence before the patterns.
    ordered = sieve.events.sort("subject_id", "time", "row").drop("row").with_row_index("row")
    sieve.events, unclosed = assign_visits(ordered.with_columns(pl.col("row").cast(pl.Int64)), options)
    counts["admissions_without_discharge"] = unclosed
    if options.static_codes == "keep":
        _add_static(sieve, static)
    else:
        counts["static_events_dropped"] += static.height

    if options.include:
        sieve.keep(pl.any_horizontal(*(pl.col("code").str.contains(p) for p in options.include)), "events_not_included")
    if options.exclude:
        sieve.keep(~pl.any_horizontal(*(pl.col("code").str.contains(p) for p in options.exclude)), "events_excluded")
    if options.icd_digits is not None:
        sieve.events = sieve.events.with_columns(shorten_icd(options.icd_digits).alias("code"))
    same_token = ["subject_id", "time", "code", "visit", *(["numeric_value"] if options.numeric_bins else [])]
    distinct = sieve.events.unique(same_token, keep="first", maintain_order=True)
    counts["duplicate_events"] = sieve.events.height - distinct.height
    sieve.events = distinct
    sieve.keep(pl.len().over("subject_id") >= options.min_tokens, "events_of_subjects_below_min_tokens")
    counts["events_kept"] = sieve.events.height
    counts["subjects_kept"] = sieve.subjects()
    counts["subjects_below_min_tokens"] = candidates - counts["subjects_kept"]

    account(counts)
    return _numbered(sieve.events), counts


def _numbered(events: pl.DataFrame) -> pl.DataFrame:
    """Sorted by subject, visit and time, with visits counted from 1 and ages in years.

    A visit is named by the row of its first event, and rows are in the order of subjects and times (static events ahead
    of the visit that they join): visits sort as subjects do, and rows as the times within them.
    """
    events = events.sort("visit", "row")
    begins = (pl.col("visit") != pl.col("visit").shift(1)).fill_null(True).cast(pl.Int32).cum_sum()  # over all subjects
    of_subject = (pl.col("subject_id") != pl.col("subject_id").shift(1)).fill_null(True)
    before = pl.when(of_subject).then(begins - 1).forward_fill()
    years = (pl.col("time") - pl.col("birth")).dt.total_microseconds() / (86_400e6 * DAYS_PER_YEAR)
    return events.select(
        "subject_id",
        "time",
        "code",
        "numeric_value",
        (begins - before).alias("visit"),
        years.cast(pl.Float32).fill_null(float("nan")).alias("age"),
    )
