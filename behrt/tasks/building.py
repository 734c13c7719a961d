"""How do the records of a source become the label file of a task?

Shard by shard, as `behrt prepare` reads them, so that the visits are the same. Each moment at which a prediction could
be made is counted once, as labelled or under the reason why not.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl

from behrt.config import UserError
from behrt.events import EventSource, Shard
from behrt.files import clear_spills, remains_beside, spill_beside
from behrt.fingerprint import fingerprint, reading
from behrt.labels import write_labels
from behrt.parallel import default_workers, in_order
from behrt.prepare import open_source, silent
from behrt.prepare_options import PrepareOptions
from behrt.spill import Progress
from behrt.tasks.codesets import CodeSets
from behrt.tasks.disease import first_occurrences, next_visits
from behrt.tasks.phenotyping import phenotypes
from behrt.tasks.readmission import readmissions
from behrt.tasks.survival import survival_times
from behrt.tasks.task_options import (
    DiseaseOptions,
    NextVisitOptions,
    PhenotypingOptions,
    ReadmissionOptions,
    SurvivalOptions,
    TaskOptions,
)
from behrt.tasks.timelines import ADMISSION, Timelines, timelines

OPTIONS: dict[str, type[TaskOptions]] = {
    "readmission": ReadmissionOptions,
    "disease": DiseaseOptions,
    "next-visit": NextVisitOptions,
    "survival": SurvivalOptions,
    "phenotyping": PhenotypingOptions,
}
"""The tasks, and what their options are."""

SETS_AT_ONCE = 20
"""Every moment is paired with every code set: with more of them, fewer patients are labelled at a time."""

Labelling = Callable[[Timelines], tuple[pl.DataFrame, Counter[str]]]


@dataclass(frozen=True)
class Task:
    """What is asked of the records.

    Attributes:
        name: one of `OPTIONS`.
        options: of its type.
        sets: the code sets; None for a readmission, and for survival where the event is death.
    """

    name: str
    options: TaskOptions
    sets: CodeSets | None = None

    def __post_init__(self) -> None:
        assert type(self.options) is OPTIONS[self.name]
        if self.name == "readmission" and self.sets is not None:
            raise UserError("labels readmission: --code-sets have no effect; leave them out")
        if self.name in ("disease", "next-visit", "phenotyping") and not self.sets:
            raise UserError(f"labels {self.name}: expected code sets, name a file with --code-sets")
        if self.name == "survival" and self.sets is not None and len(self.sets) != 1:
            raise UserError(
                f"labels survival: expected one code set, found {len(self.sets)}; name one with --code-set, or "
                "leave out --code-sets for death"
            )

    @property
    def values(self) -> tuple[str, ...]:
        """The value columns. One code set needs no name beside each label, and the file is that of a binary task."""
        if self.name == "survival":
            return "boolean_value", "float_value"
        if self.name == "readmission" or (self.name == "disease" and self.sets is not None and len(self.sets) == 1):
            return ("boolean_value",)
        return "boolean_value", "categorical_value"

    @property
    def needs_admissions(self) -> bool:
        """Whether moments are those of stays, and stays those of admissions."""
        return self.options.at in ("each-discharge", "each-admission") and self.options.stays == "admissions"

    def labelling(self) -> Labelling:
        """What turns the timelines of a shard into labels and counts."""
        options: Any = self.options
        if self.name == "readmission":
            return partial(readmissions, options=options)
        build: Any = {
            "disease": first_occurrences, "next-visit": next_visits, "survival": survival_times,
            "phenotyping": phenotypes,
        }[self.name]  # fmt: skip
        labelling: Labelling = partial(build, options=options, sets=self.sets)
        return labelling


def label_source(
    source: Path,
    out: Path,
    task: Task,
    options: PrepareOptions,
    *,
    prepared_from: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    workers: int | None = None,
) -> dict[str, Any]:
    """Writes the labels of the records under `source` to the file `out`; what was found, as `label_events`.

    Args:
        prepared_from: what prepared records say of the source whose `options` are theirs; it has to be this one.

    Raises:
        UserError: the source cannot be read, `out` is in the way, or there is nothing to label.
    """
    if not source.exists():
        raise UserError(f"{source}: no such file or folder; expected the records to label")
    if out.suffix != ".parquet":
        raise UserError(f"--out: expected a file that ends in .parquet, found {str(out)!r}")
    if out.resolve().is_relative_to(source.resolve()):  # a source can be one file, which --overwrite would replace
        raise UserError(f"--out {out}: is the source or lies inside it; name a file elsewhere")
    if out.is_dir() or (out.exists() and not overwrite):
        raise UserError(f"--out {out}: is there already; replace it with --overwrite, or name another")
    report = progress or silent
    with _place_to_work(out) as scratch:
        report("indexing", 0, 1)
        events = open_source(source, scratch, options)
        report("indexing", 1, 1)
        if prepared_from is not None:
            report("comparing", 0, 1)
            if not _is_prepared_from(prepared_from, events, source):
                raise UserError(f"--data: was prepared from another source than {source}, or before that was changed")
            report("comparing", 1, 1)
        return label_events(events, out, task, options, progress=report, workers=workers)


def _is_prepared_from(prepared: Mapping[str, Any], events: EventSource, source: Path) -> bool:
    """Whether the files are the same, by number and content; the folder may have been moved."""
    if prepared.get("files") != len(events.files):
        return False
    with reading(events.files, events.files, source if source.is_dir() else source.parent) as digested:
        return fingerprint(digested.result()) == prepared.get("sha256")


@contextmanager
def _place_to_work(out: Path) -> Iterator[Path]:
    """A private folder beside `out` for converted tables; what a process that was killed has left there goes."""
    clear_spills(out, "behrt labels", "file")
    for left in remains_beside(out, "partial"):
        left.unlink(missing_ok=True)
    with spill_beside(out) as scratch:
        yield scratch


def label_events(
    source: EventSource,
    out: Path,
    task: Task,
    options: PrepareOptions,
    *,
    progress: Progress = silent,
    workers: int | None = None,
) -> dict[str, Any]:
    """Writes the labels of an open source.

    Returns:
        `task`; `labels`, `subjects`, `positives` and `prevalence` of all rows and, under `sets`, of each code set (with
        `codes`, of the records, that it matched); `counts`, what became of the moments.

    Raises:
        UserError: no label is left, no admission is found where the task needs one, no code set matches anything.
    """
    labelling, totals = task.labelling(), _Totals(task)
    blocks = math.ceil(len(task.sets or "1") / SETS_AT_ONCE)

    def label(part: tuple[Shard, int]) -> _Labelled:
        shard, block = part
        of_block = pl.col("subject_id").hash(seed=0) % blocks == block
        events = shard.collect() if blocks == 1 else shard.collect().filter(of_block)
        splits = None if source.splits is None else source.splits.among(events["subject_id"])
        found = timelines(
            events, options, splits, every_visit_is_a_stay=task.options.stays == "visits",
            planned=getattr(task.options, "planned", ()),
        )  # fmt: skip
        labels, counts = labelling(found)
        counts["admissions"] = found.counts["admissions"]
        return _Labelled(labels, counts, _matched(found.events, task.sets))

    def tables() -> Iterator[pl.DataFrame]:
        parts = [(shard, block) for shard in source.shards for block in range(blocks)]
        progress("labelling", 0, len(parts))
        for done, labelled in enumerate(in_order(label, parts, workers=workers or default_workers()), 1):
            totals.add(labelled)
            progress("labelling", done, len(parts))
            yield labelled.labels
        totals.refuse_nothing(options)

    name = ", ".join([task.name, *sorted(task.sets or ())])
    write_labels(out, tables(), task.values, task=name)
    return totals.report()


@dataclass(frozen=True)
class _Labelled:
    """One shard: its labels, what became of its moments, and which codes each set matched."""

    labels: pl.DataFrame
    counts: Counter[str]
    matched: dict[str, set[str]]


def _matched(events: pl.DataFrame, sets: CodeSets | None) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {name: set() for name in sets or ()}
    if sets is not None:
        for code in events["code"].unique().to_list():
            for name in sets.names_of(code):
                found[name].add(code)
    return found


class _Totals:
    """What adds up over shards."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._counts: Counter[str] = Counter()
        self._rows: Counter[str] = Counter()
        self._positives: Counter[str] = Counter()
        self._subjects: Counter[str] = Counter()
        self._matched: dict[str, set[str]] = {name: set() for name in task.sets or ()}

    def add(self, found: _Labelled) -> None:
        self._counts.update(found.counts)
        for name, codes in found.matched.items():
            self._matched[name] |= codes
        self._add("", found.labels)
        if "categorical_value" in found.labels.columns:
            for (name,), own in found.labels.group_by("categorical_value"):
                self._add(str(name), own)

    def _add(self, name: str, labels: pl.DataFrame) -> None:
        self._rows[name] += labels.height
        self._positives[name] += int(labels["boolean_value"].sum())
        self._subjects[name] += labels["subject_id"].n_unique()  # a subject lies in one shard

    def refuse_nothing(self, options: PrepareOptions) -> None:
        """Raises `UserError` where nothing was labelled, with the reason that counts most."""
        where = f"labels {self._task.name}"
        if self._task.needs_admissions and not self._counts["admissions"]:
            raise UserError(
                f"{where}: no event has the admission code {options.admission_code or ADMISSION!r}; name it with "
                "--admission-code and --discharge-code, or take all visits for stays with --stays visits"
            )
        if self._task.sets and not any(self._matched.values()):
            raise UserError(
                f"{where}: no code of the records is in a code set ({', '.join(self._task.sets)}); compare their codes "
                "with those of the file"
            )
        if not self._rows[""]:
            reasons = [(count, name) for name, count in self._counts.items() if name not in _NO_REASON and count]
            most = f"; most of the {self._counts['candidates']} moments: {max(reasons)[1].replace('_', ' ')}"
            raise UserError(
                f"{where}: no label is left{most if reasons else ''}; change the options, see docs/tasks.md"
            )

    def report(self) -> dict[str, Any]:
        """As `label_events` returns it."""
        sets = {
            name: {"codes": len(codes), **self._figures(name if name in self._rows else "")}
            if name in self._rows or len(self._matched) == 1
            else {"codes": len(codes), **_figures(0, 0, 0)}
            for name, codes in self._matched.items()
        }
        return {
            "task": self._task.name,
            **self._figures(""),
            "sets": sets,
            "counts": dict(self._counts),
        }

    def _figures(self, name: str) -> dict[str, Any]:
        return _figures(self._rows[name], self._subjects[name], self._positives[name])


_NO_REASON = ("candidates", "moments", "admissions", "pairs")


def _figures(rows: int, subjects: int, positives: int) -> dict[str, Any]:
    return {
        "labels": rows,
        "subjects": subjects,
        "positives": positives,
        "prevalence": round(positives / rows, 6) if rows else None,
    }
