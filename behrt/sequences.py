"""What is a patient's token sequence, and how is it read from disk?

One patient: `[CLS] codes of visit 1 [SEP] codes of visit 2 [SEP] …`. Prepared records are a folder with `dataset.json`,
`vocabulary.json` and one Arrow IPC file per split, a row a patient. The files are mapped into memory, and a sequence is
a view of them.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from behrt.config import UserError, refuse_what_is_no_file
from behrt.events import SPLITS
from behrt.vocabulary import CLS, SEP, Vocabulary

FORMAT = "behrt-prepared"
FORMAT_VERSION = 1
INFO_FILE = "dataset.json"
VOCABULARY_FILE = "vocabulary.json"
PART_FILE = "part.json"
"""Describes one part of a preparation (`parts.py`), which is no prepared data yet."""

SEQUENCE_SCHEMA = pa.schema(
    [
        ("subject_id", pa.int64()),
        ("codes", pa.list_(pa.int32())),
        ("ages", pa.list_(pa.float32())),
        ("visits", pa.list_(pa.int32())),
        ("times", pa.list_(pa.timestamp("us"))),
    ]
)
"""A row a patient; the four lists of a row are equally long, an entry a token."""

SHORTEST = 3
"""Tokens of the shortest sequence: `[CLS]`, a code, `[SEP]`."""
AGAIN = "it is damaged, or belongs to another folder; prepare the records again"


def build_sequences(events: pl.DataFrame, ids: npt.NDArray[np.int32]) -> pa.RecordBatch:
    """The sequences of whole subjects.

    Args:
        events: rows sorted by subject, visit and time, with `subject_id`, `time`, `visit` (from 1), `age`.
        ids: int32 [events], the id of each event's code.

    Returns:
        A record batch of `SEQUENCE_SCHEMA`, patients in the order of `events`. `[CLS]` has visit 0 and the age and time
        of the token after it, `[SEP]` visit, age and time of the token before it.

    >>> from datetime import datetime
    >>> events = pl.DataFrame({"subject_id": [7, 7], "time": [datetime(2020, 1, 1), datetime(2021, 1, 1)],
    ...                        "visit": [1, 2], "age": [50.0, 51.0]})
    >>> batch = build_sequences(events, np.array([5, 6], np.int32))
    >>> batch.column("codes").to_pylist(), batch.column("visits").to_pylist()
    ([[2, 5, 3, 6, 3]], [[0, 1, 1, 2, 2]])
    """
    subjects = events["subject_id"].to_numpy()
    visits = events["visit"].to_numpy()
    count = len(subjects)
    first_of_subject = np.ones(count, bool)  # [events]
    first_of_subject[1:] = subjects[1:] != subjects[:-1]
    last_of_visit = np.ones(count, bool)  # [events]
    last_of_visit[:-1] = first_of_subject[1:] | (visits[1:] != visits[:-1])

    # Place of each event among the tokens: a [CLS] went ahead per subject begun, a [SEP] per visit ended.
    ended = np.cumsum(last_of_visit) - last_of_visit
    places = np.arange(count) + np.cumsum(first_of_subject) + ended
    cls_places = places[first_of_subject] - 1
    sep_places = places[last_of_visit] + 1
    origin = np.empty(count + len(cls_places) + len(sep_places), np.int64)  # [tokens], the event each token stems from
    origin[places] = np.arange(count)
    origin[cls_places] = np.flatnonzero(first_of_subject)
    origin[sep_places] = np.flatnonzero(last_of_visit)

    codes = ids[origin]
    codes[cls_places], codes[sep_places] = CLS, SEP
    token_visits = visits.astype(np.int32)[origin]
    token_visits[cls_places] = 0
    assert len(origin) < 2**31, "a shard is far smaller"
    offsets: Any = pa.array(np.append(cls_places, len(origin)).astype(np.int32))
    flat: dict[str, Any] = {
        "codes": pa.array(codes, pa.int32()),
        "ages": pa.array(events["age"].to_numpy().astype(np.float32)[origin], pa.float32()),
        "visits": pa.array(token_visits, pa.int32()),
        "times": pa.array(events["time"].to_physical().to_numpy()[origin], pa.int64()).cast(pa.timestamp("us")),
    }
    columns: list[Any] = [pa.array(subjects[first_of_subject], pa.int64())]
    columns += [pa.ListArray.from_arrays(offsets, flat[name]) for name in SEQUENCE_SCHEMA.names[1:]]
    return pa.record_batch(columns, schema=SEQUENCE_SCHEMA)


class PreparedSplit:
    """The patients of one split, in the order of the file.

    Attributes:
        lengths: int32 [patients], tokens of each sequence.
    """

    def __init__(self, path: Path) -> None:
        """Maps the file. Raises `UserError` if it is missing or damaged."""
        refuse_what_is_no_file(path)
        try:
            with pa.memory_map(str(path)) as source:  # the buffers keep the mapping alive
                reader = pa.ipc.open_file(source)
                if reader.schema != SEQUENCE_SCHEMA:
                    raise UserError(f"{path}: its columns are not those of prepared records; prepare the records again")
                batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
                for batch in batches:
                    batch.validate(full=True)
        except FileNotFoundError:
            raise UserError(f"{path}: no such file; the folder holds no prepared records, or lost a file") from None
        except (pa.ArrowException, OSError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path}: truncated or damaged; prepare the records again") from None
        self._path = path
        self._batches = batches
        self._arrays = [_flat_arrays(batch, path) for batch in batches]
        rows = np.array([batch.num_rows for batch in batches], np.int64)
        self._firsts: list[int] = (np.cumsum(rows) - rows).tolist()
        self.lengths: npt.NDArray[np.int32] = np.concatenate(
            [np.zeros(0, np.int32), *(np.diff(offsets) for offsets, *_ in self._arrays)]
        )

    def check(self, vocab_size: int) -> None:
        """Reads every token once. Raises `UserError` where they cannot be sequences of codes of the vocabulary."""
        for offsets, codes, ages, visits, _ in self._arrays:
            if not len(offsets) > 1:
                continue
            codes, ages, visits = (array[offsets[0] : offsets[-1]] for array in (codes, ages, visits))
            starts = offsets[:-1] - offsets[0]
            if np.diff(offsets).min() < SHORTEST:
                raise UserError(f"{self._path}: a patient has no token; {AGAIN}")
            if codes.min() < 0 or codes.max() >= vocab_size:
                raise UserError(f"{self._path}: has codes outside the vocabulary beside it; {AGAIN}")
            if (codes[starts] != CLS).any():
                raise UserError(f"{self._path}: a patient does not begin with [CLS]; {AGAIN}")
            if visits.min() < 0 or visits[starts].any() or not visits[starts + 1].all():
                raise UserError(f"{self._path}: visits are not counted from 1; {AGAIN}")
            if (ages < 0).any() or np.isinf(ages).any():
                raise UserError(f"{self._path}: has ages that are no ages; {AGAIN}")

    def __len__(self) -> int:
        return len(self.lengths)

    def _place(self, index: int) -> tuple[tuple[npt.NDArray[Any], ...], int, int]:
        """The flat arrays that hold a patient, and the bounds of its tokens there."""
        number = bisect_right(self._firsts, index) - 1
        arrays = self._arrays[number]
        row = index - self._firsts[number]
        start, stop = arrays[0][row : row + 2].tolist()  # plain integers slice faster than numpy's
        return arrays, start, stop

    def sequence(self, index: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32], npt.NDArray[np.int32]]:
        """`codes` (int32), `ages` (float32 years), `visits` (int32) of one patient, each [tokens]: read-only views."""
        (_, codes, ages, visits, _), start, stop = self._place(index)
        return codes[start:stop], ages[start:stop], visits[start:stop]

    def times(self, index: int) -> npt.NDArray[np.datetime64]:
        """Time of each token of one patient, datetime64[us] [tokens]: a read-only view."""
        arrays, start, stop = self._place(index)
        return arrays[4][start:stop]

    def subject_ids(self) -> npt.NDArray[np.int64]:
        """Source id of each patient, int64 [patients]."""
        ids = [batch.column("subject_id").to_numpy(zero_copy_only=True) for batch in self._batches]
        return np.concatenate([np.zeros(0, np.int64), *ids])


def _flat_arrays(batch: pa.RecordBatch, path: Path) -> tuple[npt.NDArray[Any], ...]:
    """Offsets [rows + 1], and codes, ages, visits and times [tokens] of a batch, without a copy."""
    lists: list[Any] = [batch.column(name) for name in SEQUENCE_SCHEMA.names[1:]]
    if any(column.null_count or not column.offsets.equals(lists[0].offsets) for column in lists):
        raise UserError(f"{path}: the lists of a patient differ in length; prepare the records again")
    if any(column.values.null_count for column in lists):
        raise UserError(f"{path}: a token of a patient is null; {AGAIN}")
    offsets = lists[0].offsets.to_numpy(zero_copy_only=True)
    return offsets, *(column.values.to_numpy(zero_copy_only=True) for column in lists)


class PreparedData:
    """A folder of prepared records.

    Attributes:
        folder: where it is.
        info: the contents of `dataset.json`.
        vocabulary: fitted on the training patients.
    """

    def __init__(self, folder: Path, info: dict[str, Any], vocabulary: Vocabulary) -> None:
        self.folder = folder
        self.info = info
        self.vocabulary = vocabulary
        self._splits = {name: PreparedSplit(folder / f"{name}.arrow") for name in SPLITS}

    @property
    def name(self) -> str:
        """The name of the source."""
        return str(self.info["name"])

    @property
    def digest(self) -> str:
        """SHA-256 over the source's fingerprint, the options and the counts: hexadecimal, 64 digits."""
        return hashlib.sha256(json.dumps(self.info, sort_keys=True).encode()).hexdigest()

    def split(self, name: str) -> PreparedSplit:
        """The split of that name, one of `train`, `tuning`, `held_out`."""
        return self._splits[name]


def is_prepared(folder: Path) -> bool:
    """Whether the folder holds prepared records, of any format version."""
    try:
        info = json.loads((folder / INFO_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(info, dict) and info.get("format") == FORMAT


def read_info(folder: Path) -> dict[str, Any]:
    """The contents of `dataset.json`. Raises `UserError` if the folder holds no prepared records of this version."""
    path = folder / INFO_FILE
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; make it with `behrt prepare SOURCE --out {folder}`")
    if not path.is_file() and (folder / PART_FILE).is_file():
        raise UserError(
            f"{folder}: is one part of a preparation; join its parts first: `behrt prepare --join PART... --out DIR`"
        )
    if not path.is_file():
        raise UserError(f"{folder}: no {INFO_FILE} in it; expected a folder made by `behrt prepare`")
    if not is_prepared(folder):
        raise UserError(f"{path}: damaged, or not of prepared records; make the folder with `behrt prepare`")
    info: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    version = info.get("format_version")
    if version != FORMAT_VERSION:
        found = repr(version)[:20]
        raise UserError(f"{path}: format version {found}, expected {FORMAT_VERSION}; prepare the records again")
    for key, kind in (("name", str), ("options", dict)):
        if not isinstance(info.get(key), kind):
            raise UserError(f"{path}: no {key} in it; prepare the records again")
    return info


def open_prepared(folder: Path) -> PreparedData:
    """Opens what `behrt prepare` wrote, without reading the sequences.

    Raises:
        UserError: the folder or one of its files is missing, damaged, or of another version.
    """
    info = read_info(folder)
    data = PreparedData(folder, info, Vocabulary.load(folder / VOCABULARY_FILE))
    for name in SPLITS:
        try:
            expected = info["splits"][name]["patients"]
        except (KeyError, TypeError):
            raise UserError(f"{folder / INFO_FILE}: no counts for {name}; prepare the records again") from None
        if len(data.split(name)) != expected:
            found = f"{len(data.split(name))} patients, expected {expected}"
            raise UserError(f"{folder / name}.arrow: {found}; prepare the records again")
    return data
