"""What is one part of a preparation, which another machine made, and do these parts make a whole?

A part is a private folder: the cleaned events of its share of the files (`spill.py`), what the vocabulary is fitted on,
the subjects of each file, and `part.json`. SHA-256 sums of all of it stand beside.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from behrt import __version__
from behrt.config import UserError
from behrt.files import read_json, verify_checksums, write_checksums, write_json
from behrt.fingerprint import SourceFile
from behrt.prepare_options import PrepareOptions
from behrt.sequences import PART_FILE, is_prepared
from behrt.sources.meds import refuse_shared_subjects
from behrt.spill import Spilled

FORMAT = "behrt-prepared-part"
FORMAT_VERSION = 1
SUMS_FILE = "SHA256SUMS"
SUBJECTS_FILE, PATIENTS_FILE, VALUES_FILE = "subjects.arrow", "patients.arrow", "values.arrow"
MOST_PARTS = 100_000


@dataclass(frozen=True)
class PartNumber:
    """One of several parts.

    Attributes:
        number: from 1.
        parts: how many there are.

    >>> PartNumber.parse("2/3")
    PartNumber(number=2, parts=3)
    """

    number: int
    parts: int

    @classmethod
    def parse(cls, text: str) -> PartNumber:
        """Reads `i/n`. Raises `UserError` unless 1 <= i <= n."""
        found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text.strip(), re.ASCII)
        number, parts = (int(found[1]), int(found[2])) if found else (0, 0)
        if not 1 <= number <= parts <= MOST_PARTS:
            raise UserError(f"--shard: expected i/n with i from 1 to n, as in 2/3, found {text[:40]!r}")
        return cls(number, parts)

    def __str__(self) -> str:
        return f"{self.number}/{self.parts}"


@dataclass(frozen=True)
class Part:
    """One part of a preparation.

    Attributes:
        folder: where it is.
        name: of the data set.
        files: of the whole source; those that another part read have no digest.
        subjects: ids in each file of events, int64, distinct; empty for those that another part read.
    """

    folder: Path
    place: PartNumber
    name: str
    files: tuple[SourceFile, ...]
    options: PrepareOptions
    subjects: tuple[npt.NDArray[np.int64], ...]
    spilled: Spilled


def save_part(part: Part) -> dict[str, Any]:
    """Writes all but the events, which are in its folder already. The contents of `part.json`."""
    numbers = np.repeat(np.arange(len(part.subjects)), [len(own) for own in part.subjects])
    pl.DataFrame(
        {"file": numbers, "subject_id": np.concatenate([np.zeros(0, np.int64), *part.subjects])},
        schema={"file": pl.UInt32, "subject_id": pl.Int64},
    ).write_ipc(part.folder / SUBJECTS_FILE, compression="lz4")
    if part.options.numeric_bins is None:
        pl.DataFrame(
            sorted(part.spilled.patients.items()), schema={"code": pl.String, "patients": pl.Int64}, orient="row"
        ).write_ipc(part.folder / PATIENTS_FILE, compression="lz4")
    else:
        part.spilled.values.table().write_ipc(part.folder / VALUES_FILE, compression="lz4")
    info = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "behrt": __version__,
        "name": part.name,
        "part": part.place.number,
        "parts": part.place.parts,
        "files": [[file.name, file.size, file.sha256] for file in part.files],
        "files_of_events": len(part.subjects),
        "options": part.options.recorded(),
        "report": part.spilled.report(),
        "events": [path.name for path in part.spilled.files],
    }
    write_json(part.folder / PART_FILE, info)
    write_checksums(part.folder, SUMS_FILE, [file for file in part.folder.iterdir() if file.name != ".lock"])
    return info


def is_part(folder: Path) -> bool:
    """Whether the folder holds a part, of any version."""
    try:
        return read_json(folder / PART_FILE, missing="").get("format") == FORMAT
    except UserError:
        return False


def read_info(folder: Path) -> dict[str, Any]:
    """The contents of `part.json`. Raises `UserError` if the folder holds no part that this version can join."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected a part, made by `behrt prepare SOURCE --shard i/n`")
    if not (folder / PART_FILE).is_file():
        found = "prepared records, no part of them" if is_prepared(folder) else f"no {PART_FILE}"
        raise UserError(f"{folder}: holds {found}; --join expects folders made by `behrt prepare SOURCE --shard i/n`")
    info = read_json(folder / PART_FILE, missing=remedy(folder))
    if info.get("format") != FORMAT:
        raise UserError(f"{folder / PART_FILE}: is not of a part; {remedy(folder)}")
    made_by = (info.get("format_version"), info.get("behrt"))
    if made_by != (FORMAT_VERSION, __version__):
        raise UserError(
            f"{folder}: was made by behrt {str(made_by[1])[:20]}, this is {__version__}; make all parts and join them "
            "with the same version"
        )
    return info


def remedy(folder: Path) -> str:
    """What to do about a damaged part."""
    return f"make this part again: `behrt prepare SOURCE --shard i/n --out {folder} --overwrite`"


def load_part(folder: Path) -> Part:
    """Reads what `save_part` wrote, all but the sample of values; every byte is compared with the sums.

    Raises:
        UserError: the folder holds no part, one of another version, or one that is damaged.
    """
    info = read_info(folder)
    verify_checksums(folder, SUMS_FILE, remedy=remedy(folder))
    try:
        options = PrepareOptions(**info["options"])
        spilled = Spilled([folder / Path(name).name for name in info["events"]], Counter(info["report"]))
        fitted_on = PATIENTS_FILE if options.numeric_bins is None else VALUES_FILE
        summed = {line.partition("  ")[2] for line in (folder / SUMS_FILE).read_text(encoding="utf-8").splitlines()}
        if not {PART_FILE, SUBJECTS_FILE, fitted_on, *info["events"]} <= summed:
            raise ValueError("a file without a sum")
        if options.numeric_bins is None:
            table = pl.read_ipc(folder / PATIENTS_FILE)
            spilled.patients.update(dict(zip(table["code"].to_list(), table["patients"].to_list(), strict=True)))
        subjects = pl.read_ipc(folder / SUBJECTS_FILE)
        bounds = np.searchsorted(subjects["file"].to_numpy(), np.arange(1, info["files_of_events"]))
        return Part(
            folder=folder,
            place=PartNumber(info["part"], info["parts"]),
            name=str(info["name"]),
            files=tuple(SourceFile(*file) for file in info["files"]),
            options=options,
            subjects=tuple(np.split(subjects["subject_id"].to_numpy(), bounds)),
            spilled=spilled,
        )
    except (KeyError, TypeError, ValueError, OSError, pl.exceptions.PolarsError):
        raise UserError(f"{folder}: is damaged; {remedy(folder)}") from None


def refuse_what_is_no_whole(parts: Sequence[Part]) -> None:
    """Raises `UserError` unless these are all parts of one preparation, each once."""
    first = parts[0]
    for part in parts[1:]:
        if part.options != first.options:
            ours, theirs = (each.options.model_dump() for each in (first, part))
            name = next(name for name in ours if ours[name] != theirs[name])
            raise UserError(
                f"{part.folder}: was made with another --{name.replace('_', '-')} than {first.folder}; make all parts "
                "with the same options"
            )
        if _without_digests(part) != _without_digests(first):
            raise UserError(
                f"{part.folder}: was made of another source than {first.folder} (other files, or other sizes of them); "
                "make all parts of the same one"
            )
        if part.name != first.name:
            raise UserError(
                f"{part.folder}: its source was named otherwise than that of {first.folder}, and the name goes into "
                "the result; make all parts of a folder of the same name"
            )
        if part.place.parts != first.place.parts:
            raise UserError(
                f"{part.folder}: is part {part.place}, and {first.folder} part {first.place}; make all parts with the "
                "same n in --shard i/n"
            )
    seen: dict[int, Part] = {}
    for part in parts:
        former = seen.setdefault(part.place.number, part)
        if former is not part:
            raise UserError(f"{former.folder} and {part.folder}: are both part {part.place}; name each part once")
    missing = [number for number in range(1, first.place.parts + 1) if number not in seen]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        named = ", ".join(f"{number}/{first.place.parts}" for number in missing[:5])
        raise UserError(f"--join: part {named}{more} is missing; name the folders of all {first.place.parts} parts")


def _without_digests(part: Part) -> tuple[Any, ...]:
    return len(part.subjects), [(file.name, file.size) for file in part.files]


def join(parts: Sequence[Part]) -> tuple[list[SourceFile], Spilled]:
    """The files of the source, each with its digest, and all events, as if they had been prepared at once.

    Raises:
        UserError: the parts do not make a whole, a file changed between them, or a subject is in two files.
    """
    refuse_what_is_no_whole(parts)
    first = parts[0]
    files: list[SourceFile] = []
    for number, file in enumerate(first.files):
        digests = {part.files[number].sha256 for part in parts} - {None}
        if len(digests) != 1:
            raise UserError(f"{first.folder}: {file.name} of its source has changed between the parts; make them again")
        files.append(SourceFile(file.name, file.size, digests.pop()))
    names = [file.name for file in files[: len(first.subjects)]]
    owners = [max((part.subjects[number] for part in parts), key=len) for number in range(len(names))]
    refuse_shared_subjects(owners, names, first.name)

    whole = Spilled()
    for part in parts:
        whole.files += part.spilled.files
        whole.counts.update(part.spilled.counts)
        whole.patients.update(part.spilled.patients)
        if part.options.numeric_bins is not None:
            whole.values.add_hashed(pl.read_ipc(part.folder / VALUES_FILE))
    whole.files.sort(key=lambda path: path.name)
    return files, whole
