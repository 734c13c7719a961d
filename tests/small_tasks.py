"""Timelines for the tests of tasks, written by hand."""

from collections import Counter

import polars as pl

from behrt.prepare_options import PrepareOptions
from behrt.tasks.building import OPTIONS, Task
from behrt.tasks.codesets import CodeSets
from behrt.tasks.timelines import timelines

from .small_records import BIRTH, DEATH, day, events

SETS = CodeSets({"heart": ("ICD9CM//428*",), "lung": ("ICD9CM//496", "ICD10CM//J44*")})
HEART, LUNG = "ICD9CM//4280", "ICD10CM//J44.9"
SUBJECT = 40000123
"""The first subject of `hospital_records`."""


def stay(
    begin: float, end: float, *codes: str, subject: int = 1, kind: str = "EMERGENCY", to: str = "HOME"
) -> list[tuple]:
    """The events of a stay, its diagnoses at the discharge."""
    visit = f"{subject}/{begin}"
    rows: list[tuple] = [(subject, day(begin), f"ADMISSION//{kind}", None, visit)]
    rows += [(subject, day(end), code, None, visit) for code in codes]
    return [*rows, (subject, day(end), f"DISCHARGE//{to}", None, visit)]


def visit(when: float, *codes: str, subject: int = 1) -> list[tuple]:
    """A visit of one moment."""
    name = f"{subject}/{when}"
    return [(subject, day(when), code, None, name) for code in (codes or ("VISIT",))]


def label(task: str, *rows: tuple, sets: CodeSets | None = None, **options: object) -> tuple[list[tuple], Counter[str]]:
    """The labels of a task as tuples without subject and, where there is one, with the day instead of the time.

    Days are those since `day(0)`.
    """
    asked = Task(task, OPTIONS[task](**options), sets)
    found = timelines(
        events(*rows, visit_id=True),
        PrepareOptions(),
        every_visit_is_a_stay=asked.options.stays == "visits",
        planned=getattr(asked.options, "planned", ()),
    )
    table, counts = asked.labelling()(found)
    days = (pl.col("prediction_time") - day(0)).dt.total_hours() / 24
    return table.select(days.alias("day"), pl.exclude("subject_id", "prediction_time")).rows(), counts


def hospital_records(subjects: int = 8) -> pl.DataFrame:
    """Patients of two stays and a visit, who die later; some are readmitted within 30 days."""
    rows: list[tuple] = []
    for subject in range(SUBJECT, SUBJECT + subjects):
        rows.append((subject, day(-9000), BIRTH))
        rows += stay(0, 5, *([HEART] if subject % 2 else []), subject=subject)
        rows += stay(20 + 5 * (subject % 4), 40, LUNG, subject=subject)
        rows += visit(500, HEART, subject=subject)
        rows.append((subject, day(600), DEATH))
    return events(*rows, visit_id=True)
