"""What does a task show of each labelled patient, and what is to be predicted?

Label files are joined to prepared records: a row is a patient of a split at a prediction time. It sees the tokens whose
times the rule of `features.visible` allows, and nothing after them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import polars as pl

from behrt.batches import FlatSequences
from behrt.config import UserError
from behrt.events import SPLITS
from behrt.labels import Labels, read_labels
from behrt.masking import Stream, stream
from behrt.sequences import PreparedData, PreparedSplit
from behrt.tasks.features import visible
from behrt.vocabulary import SEP

PREDICTED = ("binary", "multilabel", "survival")
"""Kinds of labels that a model is trained on."""
NAMES = {"binary": ("outcome",), "survival": ("event",)}
"""What the single label of a row is called."""


@dataclass(frozen=True, kw_only=True)
class Examples:
    """The rows of one split, sorted by subject and time.

    Attributes:
        split: the prepared records that `patients` counts in.
        kind: `binary`, `multilabel`, `survival`, or `moments`: prediction times alone.
        names: of the labels, as many as `targets` has columns; `outcome` of binary labels, `event` of survival.
        subjects: int64 [rows], source ids.
        times: datetime64[us] [rows], of the predictions.
        patients: int64 [rows], index in the split.
        visible: int64 [rows], how many tokens may be seen, at least 2. They are the first ones of the sequence unless
            visits overlap; `seen` says which.
        targets: float32 [rows, names], 1 true, 0 false, NaN not known; of survival, whether the event was seen.
        days: float32 [rows], of survival: to the event, or to the end of observation.
        gap: days before the prediction that are hidden.
    """

    split: PreparedSplit
    kind: str
    names: tuple[str, ...]
    subjects: npt.NDArray[np.int64]
    times: npt.NDArray[np.datetime64]
    patients: npt.NDArray[np.int64]
    visible: npt.NDArray[np.int64]
    targets: npt.NDArray[np.float32]
    days: npt.NDArray[np.float32] | None = None
    gap: float = 0.0

    def __len__(self) -> int:
        return len(self.subjects)

    @property
    def seen_events(self) -> npt.NDArray[np.bool_]:
        """Of survival: whether the event was seen, bool [rows]."""
        assert self.kind == "survival"
        events: npt.NDArray[np.bool_] = self.targets[:, 0] == 1
        return events

    def seen(self, row: int) -> npt.NDArray[np.bool_]:
        """Which tokens of the row's patient may be seen, bool [tokens of the patient]."""
        return seen_tokens(self.split, int(self.patients[row]), self.times[row], gap=self.gap)

    def take(self, rows: npt.NDArray[Any]) -> Self:
        """Only these rows, given by index or by a mask, in that order."""
        arrays = {
            field.name: value[rows]
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), np.ndarray)
        }
        return replace(self, **arrays)

    def subsample(self, number: int, *, seed: int) -> Self:
        """So many rows by chance, in their order; a smaller number of the same seed is a part of a larger one."""
        order = stream(seed, Stream.LABELS).permutation(len(self))
        return self.take(np.sort(order[:number]))

    def sequences(self, rows: Sequence[int] | npt.NDArray[Any]) -> FlatSequences:
        """All tokens that these rows may see, end to end."""
        parts = []
        for row in rows:
            codes, ages, visits = self.split.sequence(int(self.patients[row]))
            seen = self.seen(row)
            parts.append((codes[seen], ages[seen], visits[seen]))
        offsets = np.zeros(len(parts) + 1, np.int64)
        np.cumsum([len(codes) for codes, _, _ in parts], out=offsets[1:])
        codes, ages, visits = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return FlatSequences(codes=codes, ages=ages, visits=visits, offsets=offsets)


def seen_tokens(
    split: PreparedSplit, patient: int, prediction_time: np.datetime64, *, gap: float = 0.0
) -> npt.NDArray[np.bool_]:
    """Which tokens of a patient may be seen, bool [tokens].

    `[SEP]` has the time of the last event of its visit, so that it would tell whether anything else is to come in this
    one: it is seen as soon as anything of the visit is.
    """
    codes, _, visits = split.sequence(patient)
    closes = codes == SEP
    told = visible(split.times(patient), prediction_time, gap=gap) & ~closes
    seen: npt.NDArray[np.bool_] = told | (closes & np.isin(visits, visits[told]))
    return seen


@dataclass(frozen=True)
class LabelledRecords:
    """The examples of a label file.

    Attributes:
        splits: by name of the split; one may be empty.
        counts: `rows` of the file (moments, whatever number of names they have), and of them those left out:
            `no_patient` in any split, and `nothing_visible` at the prediction time.
        task: which the labels are of, where the file says so.
    """

    splits: dict[str, Examples]
    counts: dict[str, int]
    task: str | None = None

    def __getitem__(self, split: str) -> Examples:
        return self.splits[split]


def read_examples(
    path: Path,
    data: PreparedData,
    *,
    gap: float = 0.0,
    splits: Sequence[str] = SPLITS,
    kinds: Sequence[str] = PREDICTED,
    names: Sequence[str] | None = None,
) -> LabelledRecords:
    """The rows of a label file, joined to the splits of prepared records.

    Args:
        gap: days before each prediction that are hidden.
        splits: those that are looked at; patients of the others are no `no_patient`.
        kinds: that are allowed.
        names: of a multi-label task, in that order; those of the file have to be the same. None: those of the file.

    Raises:
        UserError: see `read_labels`; labels of another kind or of other names; a patient in two splits; no row of the
            file can be used.
    """
    labels = read_labels(path)
    if labels.kind not in kinds:
        raise UserError(f"{path}: holds {labels.kind} labels; expected {' or '.join(kinds)} ones (docs/tasks.md)")
    columns = NAMES.get(labels.kind, tuple(labels.names))
    if names is not None and set(names) != set(columns):
        odd = sorted(set(names) ^ set(columns))[0]
        raise UserError(f"{path}: its labels are not those of the task: {odd!r} is in one of them only")
    columns = columns if names is None else tuple(names)
    rows = _wide(labels, columns)
    everyone = pl.concat(
        pl.DataFrame({"subject_id": ids, "patient": np.arange(len(ids)), "split": [name] * len(ids)})
        for name in SPLITS
        for ids in [data.split(name).subject_ids()]
    )
    repeated = int(everyone["subject_id"].is_duplicated().sum())
    if repeated:
        raise UserError(
            f"{data.folder}: is damaged: patients stand in more than one of its splits ({repeated} rows); a model "
            "would be judged on patients that it has seen: prepare the records again"
        )
    joined = rows.join(everyone, on="subject_id", how="inner", maintain_order="left")
    counts = {"rows": rows.height, "no_patient": rows.height - joined.height, "nothing_visible": 0}
    found = {}
    for name in splits:
        everything = _examples(joined.filter(pl.col("split") == name), labels.kind, data.split(name), columns, gap)
        found[name] = everything.take(everything.visible > 0)
        counts["nothing_visible"] += len(everything) - len(found[name])
    if not any(map(len, found.values())):
        raise UserError(
            f"{path}: none of its {rows.height} rows can be used: {counts['no_patient']} are of patients outside "
            f"{data.folder}, and {counts['nothing_visible']} see no event; name the labels of these records"
        )
    return LabelledRecords(found, counts, labels.task)


def _wide(labels: Labels, names: tuple[str, ...]) -> pl.DataFrame:
    """A row a moment: `subject_id`, `prediction_time`, `target 0` … in the order of the names, and `days`."""
    key = ["subject_id", "prediction_time"]
    table = labels.table
    if labels.kind not in PREDICTED:
        return table.select(key).unique(maintain_order=True)
    if labels.kind == "multilabel":
        value = pl.col("boolean_value").cast(pl.Float32)
        of_name = [
            value.filter(pl.col("categorical_value") == name).first().alias(f"target {number}")
            for number, name in enumerate(names)
        ]
        return table.group_by(key, maintain_order=True).agg(of_name)
    columns = [pl.col("boolean_value").cast(pl.Float32).alias("target 0")]
    if labels.kind == "survival":
        columns.append(pl.col("float_value").alias("days"))
    return table.select(*key, *columns)


def _examples(rows: pl.DataFrame, kind: str, split: PreparedSplit, names: tuple[str, ...], gap: float) -> Examples:
    """The rows of one split, also those that see nothing."""
    columns = [name for name in rows.columns if name.startswith("target ")]
    times = rows["prediction_time"].to_numpy().astype("datetime64[us]")
    patients = rows["patient"].to_numpy().astype(np.int64)
    targets = np.full((rows.height, len(columns)), np.nan, np.float32)
    for number, name in enumerate(columns):
        targets[:, number] = rows[name].cast(pl.Float32).fill_null(float("nan")).to_numpy()
    seen = [
        int(seen_tokens(split, patient, time, gap=gap).sum())
        for patient, time in zip(patients.tolist(), times, strict=True)
    ]
    return Examples(
        split=split,
        kind=kind,
        names=names,
        subjects=rows["subject_id"].to_numpy().astype(np.int64),
        times=times,
        patients=patients,
        visible=np.array(seen, np.int64),
        targets=targets,
        days=rows["days"].to_numpy().astype(np.float32) if kind == "survival" else None,
        gap=gap,
    )


def last_moments(split: PreparedSplit) -> Examples:
    """The end of each patient's record as the only prediction time, without labels."""
    last = [split.times(patient).max() for patient in range(len(split))]
    return Examples(
        split=split,
        kind="moments",
        names=(),
        subjects=split.subject_ids(),
        times=np.array(last, "datetime64[us]"),
        patients=np.arange(len(split)),
        visible=split.lengths.astype(np.int64),
        targets=np.zeros((len(split), 0), np.float32),
    )
