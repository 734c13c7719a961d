"""How do records become prepared sequences on disk?

Two streaming passes over the shards, as many in memory at a time as there are threads. The first cleans each shard and
spills it, and counts the codes of the training patients; then the vocabulary (and the value bins) is fitted; the second
pass turns the spilled events into sequences. The first pass can be shared out over machines. Folders are made beside
the output and renamed or removed at the end: no failure leaves half of it.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from behrt.cohort import COHORT_FILES
from behrt.config import UserError, resolved
from behrt.events import SPLITS, EventSource
from behrt.files import clear_spills, finish_after_a_kill, replacing_folder, spill_beside, write_json
from behrt.fingerprint import SourceFile, fingerprint, reading
from behrt.parallel import default_workers, in_order
from behrt.parts import Part, PartNumber, is_part, join, load_part, read_info, save_part
from behrt.prepare_options import PrepareOptions
from behrt.sequences import (
    FORMAT,
    FORMAT_VERSION,
    INFO_FILE,
    SEQUENCE_SCHEMA,
    VOCABULARY_FILE,
    build_sequences,
    is_prepared,
)
from behrt.sources.meds import open_meds
from behrt.sources.mimic import open_mimic
from behrt.sources.omop import open_omop
from behrt.sources.synthea import open_synthea
from behrt.spill import Progress, Spilled, clean_and_spill, count_patients, read_spilled
from behrt.vocabulary import UNK, Vocabulary

logger = logging.getLogger(__name__)


def prepare(
    source: Path,
    out: Path,
    options: PrepareOptions,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    workers: int | None = None,
) -> dict[str, Any]:
    """Prepares the records under `source` into the folder `out` (readable by its owner only).

    Args:
        overwrite: replace `out` if it already holds prepared records.
        workers: shards that are worked on at the same time; as many as there are cores, at most four, by default.

    Returns:
        The contents of `dataset.json`; the same input and options give the same bytes in every file, whatever the
        number of workers.

    Raises:
        UserError: the source cannot be read or does not fit the options, or `out` is in the way.
    """
    report, workers = progress or silent, workers or default_workers()
    _refuse_no_source(source)
    with _place_to_work(out, [source], overwrite) as scratch:
        found, files, spilled = _read(source, scratch, options, None, report, workers)
        origin = _Origin(found.name, files, options, _metadata(source))
        return _write(origin, spilled, out, report, workers)


def prepare_part(
    source: Path,
    out: Path,
    place: PartNumber,
    options: PrepareOptions,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    workers: int | None = None,
) -> dict[str, Any]:
    """Prepares one part of the records, of MEDS files, into the folder `out`: cleaned events for `join_parts`.

    Returns:
        The contents of `part.json`.

    Raises:
        UserError: as of `prepare`; or the source is not MEDS, or has fewer files than there are parts.
    """
    report, workers = progress or silent, workers or default_workers()
    if options.format != "meds":
        raise UserError(f"--shard: is for --format meds; the tables of {options.format} are converted as a whole")
    _refuse_no_source(source)
    with _place_to_work(out, [source], overwrite) as scratch:
        found, files, spilled = _read(source, scratch, options, place, report, workers)
        with replacing_folder(out, mode=0o700) as folder:
            for file in spilled.files:
                file.replace(folder / file.name)
            _copy_cohort(_metadata(source), folder)
            part = Part(folder, place, found.name, tuple(files), options, found.subjects, spilled)
            return save_part(part)


def join_parts(
    folders: Sequence[Path],
    out: Path,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    workers: int | None = None,
) -> dict[str, Any]:
    """Joins all parts of a preparation into the folder `out`: the bytes that `prepare` would have written at once.

    Returns:
        The contents of `dataset.json`.

    Raises:
        UserError: a folder holds no part or a damaged one, they do not make a whole, or `out` is in the way.
    """
    report, workers = progress or silent, workers or default_workers()
    for folder in folders:
        read_info(folder)  # what is no part at all is told before anything else
    with _place_to_work(out, folders, overwrite):
        found = []
        report("checking parts", 0, len(folders))
        for done, part in enumerate(in_order(load_part, folders, workers=workers), 1):
            found.append(part)
            report("checking parts", done, len(folders))
        files, spilled = join(found)
        origin = _Origin(found[0].name, files, found[0].options, found[0].folder)
        return _write(origin, spilled, out, report, workers)


def silent(stage: str, done: int, steps: int) -> None:
    """Shows no progress."""


def report_rows(report: Mapping[str, int]) -> list[tuple[str, int]]:
    """Rows of the table that `behrt prepare` prints: what was read, what was kept, each loss that occurred.

    >>> report_rows({"events_read": 3, "events_kept": 2, "duplicate_events": 1, "events_after_death": 0})
    [('events read', 3), ('events kept', 2), ('duplicate events', 1)]
    """
    always = ("events_read", "events_kept", "subjects_read", "subjects_kept")
    return [(name.replace("_", " "), count) for name, count in report.items() if count or name in always]


def _clear_remains(out: Path) -> None:
    """Removes what a process that was killed has left beside `out`: records, which are nobody's to keep.

    Raises:
        UserError: a process that is alive prepares into `out`.
    """
    clear_spills(out, "behrt prepare", "folder")
    finish_after_a_kill(out)


def _refuse_no_source(source: Path) -> None:
    if not source.exists():
        raise UserError(f"{source}: no such file or folder; expected the records to prepare")


@contextmanager
def _place_to_work(out: Path, sources: Sequence[Path], overwrite: bool) -> Iterator[Path]:
    """A folder beside `out` for what is spilled, private, locked, and removed at the end."""
    _clear_remains(out)
    _check_places(sources, out, overwrite)
    with spill_beside(out) as scratch:
        yield scratch


def _check_places(sources: Sequence[Path], out: Path, overwrite: bool) -> None:
    """Refuses an output that would destroy, or be mistaken for, something else."""
    places = [source.resolve() for source in sources]
    try:
        there = resolved(out)
    except UserError as error:
        raise UserError(f"--out {error}") from None
    if any(there.is_relative_to(here) for here in places):
        raise UserError(f"--out {out}: is the source or lies inside it; name a folder elsewhere")
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"--out {out}: is a file, expected a folder that does not exist yet")
    if not any(out.iterdir()):
        return
    if any(here.is_relative_to(there) for here in places):
        raise UserError(f"--out {out}: holds the source; name a folder elsewhere")
    if not is_prepared(out) and not is_part(out):
        raise UserError(f"--out {out}: holds something other than prepared records; name an empty or a new folder")
    if not overwrite:
        what = "prepared records" if is_prepared(out) else "a part of prepared records"
        raise UserError(f"--out {out}: already holds {what}; replace them with --overwrite, or name another")


def _read(
    source: Path, scratch: Path, options: PrepareOptions, place: PartNumber | None, report: Progress, workers: int
) -> tuple[EventSource, list[SourceFile], Spilled]:
    """First pass: what the source is, its files, and the cleaned events."""
    report("indexing", 0, 1)
    events = open_source(source, scratch, options, place)
    report("indexing", 1, 1)
    root = source if source.is_dir() else source.parent
    with reading(events.files, events.read, root) as digested:
        spilled = clean_and_spill(events, scratch, options, report, workers=workers)
        return events, digested.result(), spilled


def open_source(source: Path, scratch: Path, options: PrepareOptions, place: PartNumber | None = None) -> EventSource:
    """The reader of the format; those of tables convert them in a folder of their own in `scratch`."""
    if options.format == "meds":
        return open_meds(source, options.column, part=None if place is None else (place.number, place.parts))
    tables = scratch / "tables"
    tables.mkdir()
    if options.format == "omop":
        return open_omop(source, tables, measurements=options.measurements, observations=options.observations)
    if options.format == "synthea":
        return open_synthea(source, tables)
    return open_mimic(source, tables, labs=options.labs)


def _metadata(source: Path) -> Path:
    """Where a simulated cohort describes itself."""
    return (source if source.is_dir() else source.parent) / "metadata"


@dataclass(frozen=True)
class _Origin:
    """What prepared records were made of, and how.

    Attributes:
        name: of the data set.
        files: of the source.
        metadata: folder that holds the description of a simulated cohort, if it is one.
    """

    name: str
    files: Sequence[SourceFile]
    options: PrepareOptions
    metadata: Path


def _write(origin: _Origin, spilled: Spilled, out: Path, report: Progress, workers: int) -> dict[str, Any]:
    """Fits the vocabulary and writes the prepared records; the contents of `dataset.json`."""
    vocabulary = _fit_vocabulary(spilled, origin.options, report, workers)
    with replacing_folder(out, mode=0o700) as folder:
        splits = _write_sequences(spilled.files, folder, vocabulary, report, workers)
        vocabulary.save(folder / VOCABULARY_FILE)
        _copy_cohort(origin.metadata, folder)
        info = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "name": origin.name,
            "source": {"name": origin.name, "sha256": fingerprint(origin.files), "files": len(origin.files)},
            "options": origin.options.recorded(),
            "vocab_size": len(vocabulary),
            "splits": splits,
            "report": spilled.report(),
        }
        write_json(folder / INFO_FILE, info)
    return info


def _fit_vocabulary(spilled: Spilled, options: PrepareOptions, report: Progress, workers: int) -> Vocabulary:
    """The vocabulary of the training patients."""
    edges: dict[str, list[float]] = {}
    patients = spilled.patients
    report("counting codes", 0, len(spilled.files))
    if options.numeric_bins is not None:
        edges = spilled.values.bin_edges(options.numeric_bins, options.min_patients)
        patients = count_patients(spilled.files, edges, report, workers=workers)
    report("counting codes", len(spilled.files), len(spilled.files))
    if not patients:
        raise UserError(
            "no training patient is left, so no vocabulary can be fitted; check the splits of the source (or --split), "
            "--include, --exclude and --min-tokens"
        )
    counts = pl.DataFrame(
        {"code": list(patients), "patients": list(patients.values())},
        schema={"code": pl.String, "patients": pl.Int64},
    )
    return Vocabulary.fit(counts, min_patients=options.min_patients, bin_edges=edges)


@dataclass(frozen=True)
class _SplitOfShard:
    """The sequences of one split in one shard: `SEQUENCE_SCHEMA`, and their codes, all and `[UNK]` ones."""

    split: str
    batch: pa.RecordBatch
    codes: int
    unknown: int


def _write_sequences(
    files: Sequence[Path], folder: Path, vocabulary: Vocabulary, report: Progress, workers: int
) -> dict[str, dict[str, Any]]:
    """Second pass: the Arrow files, and the counts of each split."""

    def build(path: Path) -> list[_SplitOfShard]:
        events = read_spilled(path, vocabulary.bin_edges)
        events = events.with_columns(vocabulary.encode(events["code"]).alias("id"))
        built = []
        for index, split in enumerate(SPLITS):
            own = events.filter(pl.col("split") == index)
            if not own.is_empty():
                ids = own["id"].to_numpy()
                built.append(_SplitOfShard(split, build_sequences(own, ids), len(ids), int((ids == UNK).sum())))
        return built

    counted = {split: _SplitCounts() for split in SPLITS}
    with ExitStack() as stack:
        writers = {
            split: stack.enter_context(pa.ipc.new_file(str(folder / f"{split}.arrow"), SEQUENCE_SCHEMA))
            for split in SPLITS
        }
        report("writing", 0, len(files))
        for done, built in enumerate(in_order(build, files, workers=workers), 1):
            for own in built:
                writers[own.split].write_batch(own.batch)
                counted[own.split].add(own)
            report("writing", done, len(files))
    return {split: counts.described() for split, counts in counted.items()}


class _SplitCounts:
    """Counts of one split. Lengths are kept as how many sequences have each, which does not grow with the patients."""

    def __init__(self) -> None:
        self._codes = self._unknown = 0
        self._of_length = np.zeros(0, np.int64)  # [longest + 1], sequences

    def add(self, own: _SplitOfShard) -> None:
        self._codes += own.codes
        self._unknown += own.unknown
        sequences: Any = own.batch.column("codes")
        found = np.bincount(np.diff(sequences.offsets.to_numpy()), minlength=len(self._of_length))
        found[: len(self._of_length)] += self._of_length
        self._of_length = found

    def described(self) -> dict[str, Any]:
        """As in `dataset.json`; lengths are tokens per sequence, special tokens included."""
        patients = int(self._of_length.sum())
        tokens = int(self._of_length @ np.arange(len(self._of_length)))
        visits = tokens - self._codes - patients  # a [SEP] each
        return {
            "patients": patients,
            "visits": visits,
            "tokens": tokens,
            "codes": self._codes,
            "unk_share": round(self._unknown / max(1, self._codes), 6),
            "sequence_length": lengths_described(self._of_length) if patients else None,
        }


def lengths_described(of_length: npt.NDArray[np.int64]) -> dict[str, float]:
    """Mean, quantiles and maximum of lengths, of which `of_length[n]` are `n`.

    Quantiles are the length at rank `ceil(share * (count - 1))`, numpy's method `higher`.

    >>> lengths_described(np.array([0, 0, 0, 2, 1]))
    {'mean': 3.333, 'p50': 3, 'p90': 4, 'p99': 4, 'max': 4}
    """
    up_to = np.cumsum(of_length)
    count = int(up_to[-1])
    ranks = {share: math.ceil(share / 100 * (count - 1)) for share in (50, 90, 99)}
    mean = int(of_length @ np.arange(len(of_length))) / count
    quantiles = {f"p{share}": int(np.searchsorted(up_to, rank, side="right")) for share, rank in ranks.items()}
    return {"mean": round(mean, 3)} | quantiles | {"max": int(np.flatnonzero(of_length)[-1])}


def _copy_cohort(metadata: Path, folder: Path) -> None:
    """Takes a simulated cohort's description along; its floor is computed from it."""
    found = [metadata / name for name in COHORT_FILES]
    if all(path.is_file() for path in found):
        for path in found:
            shutil.copyfile(path, folder / path.name)
