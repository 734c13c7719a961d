"""Which of several conditions does a patient have?

A label for each code set. From inside a stay (`each-admission`): whether a code of the set stands in the rest of the
stay, where discharge diagnoses are. At other moments: whether one falls into the window, for patients who are observed
to its end; the others get no label at all, so that all labels of a moment are known together. Unlike a disease that
begins, a condition that was known before counts again.
"""

from __future__ import annotations

from collections import Counter

import polars as pl

from behrt.tasks.codesets import CodeSets
from behrt.tasks.moments import moments
from behrt.tasks.task_options import PhenotypingOptions
from behrt.tasks.timelines import Timelines
from behrt.tasks.windows import around


def phenotypes(found: Timelines, options: PhenotypingOptions, sets: CodeSets) -> tuple[pl.DataFrame, Counter[str]]:
    """Labels `subject_id`, `prediction_time`, `boolean_value`, `categorical_value` (the name of the set)."""
    at, counts = moments(found, options)
    pairs = around(at, sets.occurrences(found.events), list(sets), options)
    pairs = pairs.with_columns(pl.coalesce("until", "closes").alias("closes"))
    # to the end of a stay everybody is observed, who was there
    whole = pl.col("until").is_not_null() | (pl.col("observed") >= pl.col("closes"))
    known = pairs.filter(whole)
    counts["not_observed_to_the_end"] = (pairs.height - known.height) // max(1, len(sets))
    counts["observed_to_the_end"] = known.height // max(1, len(sets))
    counts["pairs"] = known.height
    present = (pl.col("next") <= pl.col("closes")).fill_null(False)
    return known.select("subject_id", "prediction_time", boolean_value=present, categorical_value="name"), counts
