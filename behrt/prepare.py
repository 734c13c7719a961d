"""How do records become prepared sequences on disk?

Two streaming passes, one shard in memory at a time. The first cleans each shard and spills it; the codes of the
training patients are then counted, the vocabulary (and the value bins) fitted; the second pass turns the spilled events
into sequences. Folders are made beside the output and renamed or removed at the end: no failure leaves half of it.
"""

from __future__ import annotations

import glob
import logging
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from behrt.cleaning import EVENT_FATES, NOTES, SUBJECT_FATES, clean_events
from behrt.coding import ValueSample, append_bins
from behrt.cohort import COHORT_FILES
from behrt.config import UserError, resolved
from behrt.events import SPLITS, EventSource, fingerprint, is_in_order, split_by_hash
from behrt.files import FolderLock, finish_after_a_kill, is_locked, replacing_folder, write_json
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
from behrt.vocabulary import UNK, Vocabulary

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""Called with a stage, the steps done and all steps of that stage."""


def prepare(
    source: Path, out: Path, options: PrepareOptions, *, overwrite: bool = False, progress: Progress | None = None
) -> dict[str, Any]:
    """Prepares the records under `source` into the folder `out` (readable by its owner only).

    Args:
        overwrite: replace `out` if it already holds prepared records.

    Returns:
        The contents of `dataset.json`; the same input and options give the same bytes in every file.

    Raises:
        UserError: the source cannot be read or does not fit the options, or `out` is in the way.
    """
    report = progress or (lambda stage, done, steps: None)
    _clear_remains(out)
    _check_places(source, out, overwrite)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        spill = tempfile.TemporaryDirectory(prefix=f".{out.name}.", suffix=".spill", dir=out.parent)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written beside: {error.strerror}") from None
    with spill as scratch, ExitStack() as stack:
        stack.callback(FolderLock(Path(scratch)).release)  # as long as it is held, this process is alive
        report("indexing", 0, 1)
        if options.format == "mimic4":
            tables = Path(scratch) / "tables"
            tables.mkdir()
            events = open_mimic(source, tables, labs=options.labs)
        else:
            events = open_meds(source, options.column)
        root = source if source.is_dir() else source.parent
        source_info = {"name": events.name, "sha256": fingerprint(events.files, root), "files": len(events.files)}
        report("indexing", 1, 1)
        spilled, counts, sample = _clean_and_spill(events, Path(scratch), options, report)
        vocabulary = _fit_vocabulary(spilled, sample, options, report)
        with replacing_folder(out, mode=0o700) as folder:
            splits = _write_sequences(spilled, folder, vocabulary, report)
            vocabulary.save(folder / VOCABULARY_FILE)
            _copy_cohort(root, folder)
            info = {
                "format": FORMAT,
                "format_version": FORMAT_VERSION,
                "name": events.name,
                "source": source_info,
                "options": options.model_dump(mode="json"),
                "vocab_size": len(vocabulary),
                "splits": splits,
                "report": counts,
            }
            write_json(folder / INFO_FILE, info)
    return info


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
    for spill in out.parent.glob(f".{glob.escape(out.name)}.*.spill"):
        if is_locked(spill):
            raise UserError(f"--out {out}: another behrt prepare is writing there; wait for it, or name another folder")
        shutil.rmtree(spill, ignore_errors=True)
    finish_after_a_kill(out)


def _check_places(source: Path, out: Path, overwrite: bool) -> None:
    """Refuses an output that would destroy, or be mistaken for, something else."""
    if not source.exists():
        raise UserError(f"{source}: no such file or folder; expected the records to prepare")
    here = source.resolve()
    try:
        there = resolved(out)
    except UserError as error:
        raise UserError(f"--out {error}") from None
    if there == here or there.is_relative_to(here):
        raise UserError(f"--out {out}: is the source or lies inside it; name a folder elsewhere")
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"--out {out}: is a file, expected a folder that does not exist yet")
    if not any(out.iterdir()):
        return
    if here.is_relative_to(there):
        raise UserError(f"--out {out}: holds the source; name a folder elsewhere")
    if not is_prepared(out):
        raise UserError(f"--out {out}: holds something other than prepared records; name an empty or a new folder")
    if not overwrite:
        raise UserError(f"--out {out}: already holds prepared records; replace them with --overwrite, or name another")


def _clean_and_spill(
    source: EventSource, scratch: Path, options: PrepareOptions, report: Progress
) -> tuple[list[Path], dict[str, int], ValueSample]:
    """First pass: one file of cleaned events per shard, with `split` (index into `SPLITS`); the counts; the values."""
    counts: Counter[str] = Counter()
    sample = ValueSample()
    spilled: list[Path] = []
    for number, shard in enumerate(source.shards):
        report("cleaning", number, len(source.shards))
        events = shard.collect()
        if source.in_order and not is_in_order(events):
            counts["unsorted_shards"] += 1
        cleaned, fates = clean_events(events, options, source.splits)
        counts.update(fates)
        if options.missing_birth == "refuse" and counts["subjects_without_birth"]:
            continue  # only their number still matters
        cleaned = _with_split(cleaned, source.splits, options)
        if options.numeric_bins is not None:
            sample.add(cleaned.filter(pl.col("split") == 0))
        path = scratch / f"{number:06}.arrow"
        cleaned.write_ipc(path, compression="lz4")
        spilled.append(path)
    report("cleaning", len(source.shards), len(source.shards))
    if options.missing_birth == "refuse" and counts["subjects_without_birth"]:
        raise UserError(
            f"{counts['subjects_without_birth']} of {counts['subjects_read']} subjects have no {options.birth_code} "
            "event, so their ages are unknown; name the right code with --birth-code, leave them out with "
            "--missing-birth drop, or keep them without ages with --missing-birth keep"
        )
    names = ("events_read", *EVENT_FATES, "subjects_read", *SUBJECT_FATES, *NOTES)
    return spilled, {name: counts[name] for name in names} | dict(source.counts), sample


def _with_split(events: pl.DataFrame, splits: pl.DataFrame | None, options: PrepareOptions) -> pl.DataFrame:
    """Adds `split`, Int8, by the source's own splits or by the hash of the subject."""
    if splits is None:
        index = split_by_hash(events["subject_id"].to_numpy(), options.shares, options.split_seed)
        return events.with_columns(pl.Series("split", index, dtype=pl.Int8))
    numbers = {name: number for number, name in enumerate(SPLITS)}
    numbered = splits.with_columns(pl.col("split").replace_strict(numbers, return_dtype=pl.Int8))
    return events.join(numbered, on="subject_id", how="left", maintain_order="left")


def _read_spilled(path: Path, vocabulary_edges: Mapping[str, list[float]]) -> pl.DataFrame:
    return append_bins(pl.read_ipc(path), vocabulary_edges)


def _fit_vocabulary(spilled: list[Path], sample: ValueSample, options: PrepareOptions, report: Progress) -> Vocabulary:
    """The vocabulary of the training patients. A subject lies in one shard, so that patients per code add up."""
    edges = {} if options.numeric_bins is None else sample.bin_edges(options.numeric_bins, options.min_patients)
    counts = pl.DataFrame(schema={"code": pl.String, "patients": pl.Int64})
    for number, path in enumerate(spilled):
        report("counting codes", number, len(spilled))
        train = _read_spilled(path, edges).filter(pl.col("split") == 0).select("subject_id", "code").unique()
        own = train.group_by("code").agg(pl.len().cast(pl.Int64).alias("patients"))
        counts = pl.concat([counts, own]).group_by("code").agg(pl.col("patients").sum())
    report("counting codes", len(spilled), len(spilled))
    if counts.is_empty():
        raise UserError(
            "no training patient is left, so no vocabulary can be fitted; check the splits of the source (or --split), "
            "--include, --exclude and --min-tokens"
        )
    return Vocabulary.fit(counts, min_patients=options.min_patients, bin_edges=edges)


def _write_sequences(
    spilled: list[Path], folder: Path, vocabulary: Vocabulary, report: Progress
) -> dict[str, dict[str, Any]]:
    """Second pass: the Arrow files, and the counts of each split."""
    lengths: dict[str, list[npt.NDArray[np.int64]]] = {split: [] for split in SPLITS}
    totals: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
    with ExitStack() as stack:
        writers = {
            split: stack.enter_context(pa.ipc.new_file(str(folder / f"{split}.arrow"), SEQUENCE_SCHEMA))
            for split in SPLITS
        }
        for number, path in enumerate(spilled):
            report("writing", number, len(spilled))
            events = _read_spilled(path, vocabulary.bin_edges)
            events = events.with_columns(vocabulary.encode(events["code"]).alias("id"))
            for index, split in enumerate(SPLITS):
                own = events.filter(pl.col("split") == index)
                if own.is_empty():
                    continue
                ids = own["id"].to_numpy()
                batch = build_sequences(own, ids)
                sequences: Any = batch.column("codes")
                writers[split].write_batch(batch)
                lengths[split].append(np.diff(sequences.offsets.to_numpy()).astype(np.int64))
                tokens = int(lengths[split][-1].sum())
                patients = batch.num_rows
                totals[split].update(
                    patients=patients,
                    visits=tokens - len(ids) - patients,  # a [SEP] each
                    tokens=tokens,
                    codes=len(ids),
                    unknown=int((ids == UNK).sum()),
                )
    report("writing", len(spilled), len(spilled))
    return {split: _split_counts(totals[split], lengths[split]) for split in SPLITS}


def _split_counts(totals: Mapping[str, int], lengths: list[npt.NDArray[np.int64]]) -> dict[str, Any]:
    """Counts of one split; lengths are tokens per sequence, special tokens included."""
    counts: dict[str, Any] = {name: totals[name] for name in ("patients", "visits", "tokens", "codes")}
    counts["unk_share"] = round(totals["unknown"] / max(1, totals["codes"]), 6)
    every = np.concatenate([np.zeros(0, np.int64), *lengths])
    if len(every):
        counts["sequence_length"] = {"mean": round(float(every.mean()), 3)} | {
            f"p{share}": int(np.quantile(every, share / 100, method="higher")) for share in (50, 90, 99)
        } | {"max": int(every.max())}  # fmt: skip
    else:
        counts["sequence_length"] = None
    return counts


def _copy_cohort(root: Path, folder: Path) -> None:
    """Takes a simulated cohort's description along; its floor is computed from it."""
    found = [root / "metadata" / name for name in COHORT_FILES]
    if all(path.is_file() for path in found):
        for path in found:
            shutil.copyfile(path, folder / path.name)
