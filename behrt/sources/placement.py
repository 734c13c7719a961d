"""How do converted tables become shards, and to which visit does an event of theirs belong?

Shards are ranges of subjects over the converted tables, and only within a shard are events joined with visits: neither
the events nor the visits of a source are ever in memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from behrt.config import UserError
from behrt.events import EVENT_SCHEMA, MAX_SHARD_EVENTS, EventSource, Shard, subject_counts, subject_ranges


def place_in_visits(events: pl.LazyFrame, visits: pl.LazyFrame) -> pl.LazyFrame:
    """Events whose visit is unknown are grouped by date; a date without a time of day is no earlier than its visit.

    Args:
        events: `EVENT_SCHEMA`.
        visits: `subject_id`, `visit_id` and `begins`, each visit once.

    Returns:
        `EVENT_SCHEMA` and `visit`: "known", "none" where no visit is named, "dangling" where there is no such visit.
    """
    begins, time = pl.col("begins"), pl.col("time")
    joined = events.join(
        visits.select("subject_id", "visit_id", "begins", known=pl.lit(True)),
        on=["subject_id", "visit_id"],
        how="left",
        maintain_order="left",
    )
    known = pl.col("known").fill_null(False)
    only_date = (time.dt.time() == pl.time(0)) & (begins.dt.date() == time.dt.date())
    return joined.select(
        "subject_id",
        pl.when(only_date.fill_null(False)).then(begins).otherwise(time).alias("time"),
        "code",
        "numeric_value",
        pl.when(known).then(pl.col("visit_id")).otherwise(time.dt.strftime("%Y-%m-%d")).alias("visit_id"),
        visit=pl.when(known)
        .then(pl.lit("known"))
        .when(pl.col("visit_id").is_null())
        .then(pl.lit("none"))
        .otherwise(pl.lit("dangling")),
    )


@dataclass(frozen=True)
class Converted:
    """Tables that lie in the scratch folder, as events.

    Attributes:
        before: frames of `EVENT_SCHEMA` that go ahead of all others of the same moment.
        placed: frames whose events are placed in visits.
        after: frames that go behind.
        visits: `subject_id`, `visit_id`, `begins`.
    """

    before: Sequence[pl.LazyFrame]
    placed: Sequence[pl.LazyFrame]
    after: Sequence[pl.LazyFrame]
    visits: pl.LazyFrame

    def of(self, low: int, high: int) -> tuple[pl.LazyFrame, pl.LazyFrame]:
        """The events of a range of subjects; and how those that had to be placed were."""
        inside = pl.col("subject_id").is_between(low, high)
        visits = self.visits.filter(inside).unique(["subject_id", "visit_id"], keep="first", maintain_order=True)
        placed = [place_in_visits(frame.filter(inside), visits) for frame in self.placed]
        names = list(EVENT_SCHEMA)
        events = [frame.filter(inside) for frame in self.before]
        events += [frame.select(names) for frame in placed]
        events += [frame.filter(inside) for frame in self.after]
        kinds = pl.concat([frame.select("visit") for frame in placed]) if placed else pl.LazyFrame({"visit": []})
        return pl.concat(events), kinds.select(
            without=(pl.col("visit") == "none").sum(), dangling=(pl.col("visit") == "dangling").sum()
        )


def sharded(
    source: Path,
    files: Collection[Path],
    converted: Converted,
    counts: Counter[str],
    *,
    kind: str,
    max_shard_events: int = MAX_SHARD_EVENTS,
) -> EventSource:
    """Converted tables as shards of whole subjects.

    Raises:
        UserError: there are no events.
    """
    everything = [*converted.before, *converted.placed, *converted.after]
    per_subject = subject_counts(pl.concat([frame.select("subject_id") for frame in everything]))
    if per_subject.is_empty():
        raise UserError(f"{source}: the tables hold no events that --format {kind} can read; expected rows in them")
    shards = []
    for number, (low, high) in enumerate(subject_ranges(per_subject, max_shard_events)):
        events, kinds = converted.of(low, high)
        shards.append(Shard(events, source, (0, number)))
        without, dangling = kinds.collect(engine="streaming").row(0)
        counts["events_without_visit"] += without
        counts["events_with_unknown_visit"] += dangling
    return EventSource(
        name=source.resolve().name,
        files=tuple(files),
        read=tuple(files),
        shards=tuple(shards),
        counts=dict(counts),
        in_order=False,
    )


def end_of_visit(end: pl.Expr, begin: pl.Expr, *, is_date: pl.Expr) -> pl.Expr:
    """The end of a visit; a date without a time of day is its last moment, so that an end follows what it ends.

    A midnight is such a date if it `is_date`, or if the visit begins at midnight, too.
    """
    midnight = end.dt.time() == pl.time(0)
    no_time_of_day = midnight & (is_date | (begin.dt.time() == pl.time(0)))
    last_moment = end + pl.duration(days=1, microseconds=-1)
    return pl.when(no_time_of_day.fill_null(False)).then(last_moment).otherwise(end)
