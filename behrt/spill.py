"""Where do cleaned events wait until the vocabulary is known?

In one Arrow file a shard, beside what the vocabulary is fitted on: the training patients of each code or, where values
become bins, a sample of the values. All of it adds up over shards, so that it can be made on several machines.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl

from behrt.cleaning import EVENT_FATES, NOTES, SUBJECT_FATES, clean_events
from behrt.coding import ValueSample, append_bins, hashed_values
from behrt.config import UserError
from behrt.events import EventSource, Shard, is_in_order, split_by_hash
from behrt.parallel import in_order
from behrt.prepare_options import PrepareOptions

Progress = Callable[[str, int, int], None]
"""Called with a stage, the steps done and all steps of that stage."""

SPILLED_COLUMNS = ("subject_id", "time", "code", "visit", "age", "split")
"""Of a spilled event, with `numeric_value` where values become bins; `split` (Int8) is an index into `SPLITS`."""


@dataclass
class Spilled:
    """Cleaned events on disk, and what the vocabulary is fitted on.

    Attributes:
        files: one Arrow file a shard, in the order of the shards.
        counts: what became of the events and subjects.
        patients: training patients of each code; empty where bins are fitted first.
        values: of the codes of training patients, where bins are fitted.
    """

    files: list[Path] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    patients: Counter[str] = field(default_factory=Counter)
    values: ValueSample = field(default_factory=ValueSample)

    def report(self) -> dict[str, int]:
        """The counts in the order of `dataset.json`."""
        names = ("events_read", *EVENT_FATES, "subjects_read", *SUBJECT_FATES, *NOTES)
        others = {name: count for name, count in self.counts.items() if name not in names}
        return {name: self.counts[name] for name in names} | others


@dataclass(frozen=True)
class _Cleaned:
    """What became of one shard."""

    path: Path
    counts: Counter[str]
    patients: pl.DataFrame | None = None
    values: pl.DataFrame | None = None


def clean_and_spill(
    source: EventSource, folder: Path, options: PrepareOptions, report: Progress, *, workers: int
) -> Spilled:
    """Cleans each shard and writes it into `folder`.

    Raises:
        UserError: a shard cannot be read, or subjects have no birth, and the options do not say what then.
    """

    def clean(shard: Shard) -> _Cleaned:
        return _clean_shard(shard, source, folder, options)

    spilled = Spilled()
    report("cleaning", 0, len(source.shards))
    for done, cleaned in enumerate(in_order(clean, source.shards, workers=workers), 1):
        spilled.files.append(cleaned.path)
        spilled.counts.update(cleaned.counts)
        if cleaned.patients is not None:
            add_patients(spilled.patients, cleaned.patients)
        if cleaned.values is not None:
            spilled.values.add_hashed(cleaned.values)
        report("cleaning", done, len(source.shards))
    spilled.counts.update(source.counts)
    without, subjects = spilled.counts["subjects_without_birth"], spilled.counts["subjects_read"]
    if options.missing_birth == "refuse" and without:
        raise UserError(
            f"{without} of {subjects} subjects have no {options.birth_code} event, so their ages are unknown; name the "
            "right code with --birth-code, leave them out with --missing-birth drop, or keep them without ages with "
            "--missing-birth keep"
        )
    return spilled


def _clean_shard(shard: Shard, source: EventSource, folder: Path, options: PrepareOptions) -> _Cleaned:
    events = shard.collect()
    unsorted = source.in_order and not is_in_order(events)
    splits = None if source.splits is None else source.splits.among(events["subject_id"])
    cleaned, counts = clean_events(events, options, splits)
    counts["unsorted_shards"] += unsorted
    path = folder / "events-{:06}-{:06}.arrow".format(*shard.place)
    if options.missing_birth == "refuse" and counts["subjects_without_birth"]:
        return _Cleaned(path, counts)  # only their number still matters
    cleaned = _with_split(cleaned, splits, options)
    if options.numeric_bins is None:
        cleaned.select(SPILLED_COLUMNS).write_ipc(path, compression="lz4")
        return _Cleaned(path, counts, patients=patients_of_codes(cleaned))
    cleaned.select(*SPILLED_COLUMNS, "numeric_value").write_ipc(path, compression="lz4")
    return _Cleaned(path, counts, values=hashed_values(cleaned.filter(pl.col("split") == 0)))


def _with_split(events: pl.DataFrame, splits: pl.DataFrame | None, options: PrepareOptions) -> pl.DataFrame:
    """Adds `split`, Int8, by the source's own splits or by the hash of the subject."""
    if splits is None:
        index = split_by_hash(events["subject_id"].to_numpy(), options.shares, options.split_seed)
        return events.with_columns(pl.Series("split", index, dtype=pl.Int8))
    return events.join(splits, on="subject_id", how="left", maintain_order="left")


def read_spilled(path: Path, edges: Mapping[str, list[float]]) -> pl.DataFrame:
    """The events of one shard, their codes with the bins of their values."""
    return append_bins(pl.read_ipc(path), edges)


def patients_of_codes(events: pl.DataFrame) -> pl.DataFrame:
    """Training patients of each code of a shard: `code`, `patients`."""
    train = events.filter(pl.col("split") == 0)
    return train.group_by("code").agg(pl.col("subject_id").n_unique().alias("patients"))


def add_patients(total: Counter[str], found: pl.DataFrame) -> None:
    """Adds what `patients_of_codes` found. A subject lies in one shard, so that patients per code add up.

    A dictionary rather than a table: strings that stem from many tables would keep all of them in memory.
    """
    total.update(dict(zip(found["code"].to_list(), found["patients"].to_list(), strict=True)))


def count_patients(
    files: list[Path], edges: Mapping[str, list[float]], report: Progress, *, workers: int
) -> Counter[str]:
    """Training patients of each code, once it is known which values fall into which bin."""

    def count(path: Path) -> pl.DataFrame:
        return patients_of_codes(read_spilled(path, edges))

    patients: Counter[str] = Counter()
    for done, found in enumerate(in_order(count, files, workers=workers), 1):
        add_patients(patients, found)
        report("counting codes", done, len(files))
    return patients
