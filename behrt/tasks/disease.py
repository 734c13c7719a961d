"""Does a disease begin within a horizon, and which codes does the next visit bring?

`first_occurrences`: who has a code of the set up to the opening of the window has it already and gets no label; true
where its first code falls into the window; false where the patient is observed to the window's end without; otherwise
no label. `next_visits`: for each code set, whether a code of it stands in the visit that begins next; at discharges, in
the next stay.
"""

from __future__ import annotations

from collections import Counter

import polars as pl

from behrt.tasks.codesets import CodeSets
from behrt.tasks.moments import moments
from behrt.tasks.task_options import DiseaseOptions, NextVisitOptions
from behrt.tasks.timelines import Timelines
from behrt.tasks.windows import around


def first_occurrences(found: Timelines, options: DiseaseOptions, sets: CodeSets) -> tuple[pl.DataFrame, Counter[str]]:
    """Labels `subject_id`, `prediction_time`, `boolean_value`, `categorical_value` (the name of the set).

    Also what became of each moment, and of each pair of a moment and a set.
    """
    at, counts = moments(found, options)
    pairs = around(at, sets.occurrences(found.events), list(sets), options)
    fate = (
        pl.when("before").then(pl.lit("had_it_before"))
        .when((pl.col("next") <= pl.col("closes")).fill_null(False)).then(pl.lit("occurrences"))
        .when(pl.col("observed") >= pl.col("closes")).then(pl.lit("without_occurrence"))
        .otherwise(pl.lit("not_observed_to_the_end"))
    )  # fmt: skip
    pairs = pairs.with_columns(fate.alias("fate"))
    counts["pairs"] = pairs.height
    counts.update(dict(pairs["fate"].value_counts().iter_rows()))
    labelled = pairs.filter(pl.col("fate").is_in(["occurrences", "without_occurrence"]))
    return labelled.select(
        "subject_id", "prediction_time", boolean_value=pl.col("fate") == "occurrences", categorical_value="name"
    ), counts


def next_visits(found: Timelines, options: NextVisitOptions, sets: CodeSets) -> tuple[pl.DataFrame, Counter[str]]:
    """Labels `subject_id`, `prediction_time`, `boolean_value`, `categorical_value` (the name of the set)."""
    at, counts = moments(found, options)
    coded = sets.coded(found.events)
    if options.at == "each-discharge":
        visits, present = found.stays, _codes_of_stays(coded, found.stays)
    else:
        visits = found.visits
        begins = found.visits.select("subject_id", "visit", "begin")
        present = coded.join(begins, on=["subject_id", "visit"]).select("subject_id", "begin", "name")
    visits = visits.select("subject_id", "begin").unique().sort("subject_id", "begin")
    following = at.join_asof(
        visits, left_on="prediction_time", right_on="begin", by="subject_id", strategy="forward",
        allow_exact_matches=False, check_sortedness=False, coalesce=False,
    )  # fmt: skip
    seen = following.filter((pl.col("begin") <= pl.col("observed")).fill_null(False))
    counts["without_a_next_visit"] = following.height - seen.height
    counts["with_a_next_visit"] = seen.height
    names = pl.DataFrame({"name": list(sets)}, schema={"name": pl.String})
    present = present.unique().with_columns(boolean_value=pl.lit(True))
    pairs = seen.join(names, how="cross", maintain_order="left_right")
    pairs = pairs.join(present, on=["subject_id", "begin", "name"], how="left", maintain_order="left")
    counts["pairs"] = pairs.height
    return pairs.select(
        "subject_id", "prediction_time", pl.col("boolean_value").fill_null(False), categorical_value="name"
    ), counts


def _codes_of_stays(coded: pl.DataFrame, stays: pl.DataFrame) -> pl.DataFrame:
    """`subject_id`, `begin` (of the stay) and `name` of what is coded from the beginning of a stay to its end."""
    placed = coded.sort("time").join_asof(
        stays.select("subject_id", "begin", "end").sort("begin"), left_on="time", right_on="begin", by="subject_id",
        strategy="backward", check_sortedness=False, coalesce=False,
    )  # fmt: skip
    return placed.filter(pl.col("time") <= pl.col("end")).select("subject_id", "begin", "name")
