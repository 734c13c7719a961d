"""Records in which every identifying value is unmistakable, and a search for these values in whatever form."""

import bz2
import gzip
import io
import lzma
import re
import sqlite3
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import polars as pl

from .small_records import BIRTH, DEATH, events, write_meds

FIRST_SUBJECT = 0x428F51C3A700
"""Ids from here to 255 above have five bytes and eleven decimal digits in common: one pattern finds any of them."""
FIRST_VISIT = 0x5D31E2F09C00

RARE_CODE = "ICD10CM//Q87ZXW"
FREE_TEXT_CODE = "Mrs Ottilie Quandt of 7 Lindenweg"
CODE_OF_FOUR = "MEDICATION//QUILLOVARIDE"
"""One fewer than `--min-patients` have it."""
RARE_VALUE = 8675.30947
SUBJECTS = 110
TRAINING = 80


def subject(number: int) -> int:
    return FIRST_SUBJECT + number


def visit(number: int) -> int:
    return FIRST_VISIT + number


def birth(number: int) -> datetime:
    return datetime(1931, 7, 19) + timedelta(days=97 * number)


def moment(number: int, step: int) -> datetime:
    """When a patient's step-th visit began: never twice the same second."""
    return datetime(1983, 5, 11, 3, 17, 41) + timedelta(days=13 * number + 41 * step, seconds=613 * number + 7 * step)


MARKED = (0, 3, TRAINING + 1, SUBJECTS - 1)
"""Patients of each split whose dates are searched for; the others' ids are found by what all ids have in common."""
DATES = [*(birth(number) for number in MARKED), *(moment(number, step) for number in MARKED for step in range(3))]


def planted_events() -> pl.DataFrame:
    """Three visits a patient, of codes that go together; rare codes and a rare value in training and beyond."""
    rows: list[tuple] = []
    for number in range(SUBJECTS):
        rows.append((subject(number), birth(number), BIRTH))
        for step in range(3):
            time, inside = moment(number, step), str(visit(number))
            for code in range(4):
                value = RARE_VALUE if number == 0 and code == 0 else float(code)
                rows.append((subject(number), time, f"COMMON//{number % 4}{code}", value, inside))
            if number in MARKED:
                rows.append((subject(number), time, RARE_CODE + str(number), None, inside))
            if number == 0:
                rows.append((subject(number), time, FREE_TEXT_CODE, None, inside))
            if number < 4:
                rows.append((subject(number), time, CODE_OF_FOUR, None, inside))
    rows.append((subject(3), moment(3, 3), DEATH))
    return events(*rows, visit_id=True)


def write_planted_meds(folder: Path) -> Path:
    names = ["train"] * TRAINING + ["tuning"] * 20 + ["held_out"] * (SUBJECTS - TRAINING - 20)
    splits = {subject(number): name for number, name in enumerate(names)}
    frame = planted_events()
    first = pl.col("subject_id") < subject(50)
    return write_meds(folder, frame.filter(first), frame.filter(~first), splits=splits)


def planted_tables() -> dict[str, str]:
    """The same as MIMIC-IV tables."""
    tables = {
        "patients": ["subject_id,gender,anchor_age,anchor_year,anchor_year_group,dod"],
        "admissions": ["subject_id,hadm_id,admittime,dischtime,admission_type,discharge_location"],
        "diagnoses_icd": ["subject_id,hadm_id,seq_num,icd_code,icd_version"],
        "procedures_icd": [
            "subject_id,hadm_id,seq_num,chartdate,icd_code,icd_version",
            f"{subject(0)},{visit(0)},1,,3961,9",
        ],
        "prescriptions": ["subject_id,hadm_id,starttime,drug_type,drug,ndc"],
        "labevents": ["labevent_id,subject_id,hadm_id,itemid,charttime,valuenum"],
    }
    for number in range(SUBJECTS):
        who, where, time = subject(number), visit(number), moment(number, 0)
        tables["patients"].append(
            f"{who},F,{20 + number % 60},1983,1980 - 1985,{moment(number, 1).date() if number == 3 else ''}"
        )
        tables["admissions"].append(f"{who},{where},{time},{moment(number, 1)},URGENT,HOME")
        for code in range(4):
            tables["diagnoses_icd"].append(f"{who},{where},{code},E1{number % 4}{code},10")
        if number in MARKED:
            tables["diagnoses_icd"].append(f"{who},{where},9,Q87ZXW{number},10")
        tables["prescriptions"].append(f"{who},{where},{time},MAIN,{FREE_TEXT_CODE if number == 0 else 'Aspirin'},0")
        tables["labevents"].append(f"{number},{who},{where},50912,{time},{RARE_VALUE if number == 0 else 1.5}")
    return {name: "\n".join(lines) + "\n" for name, lines in tables.items()}


def write_planted_tables(folder: Path, **changed: str) -> Path:
    (folder / "hosp").mkdir(parents=True)
    for name, text in {**planted_tables(), **changed}.items():
        (folder / "hosp" / f"{name}.csv.gz").write_bytes(gzip.compress(text.encode()))
    return folder


def _patterns() -> dict[str, re.Pattern[bytes]]:
    """A pattern for each form that each planted value could take."""
    literal: dict[str, list[bytes]] = {}
    for what, first in (("subject", FIRST_SUBJECT), ("visit", FIRST_VISIT)):
        assert str(first + 255)[:-3] == str(first)[:-3]
        literal[f"{what} as text"] = [str(first)[:-3].encode(), f"{first:,}"[:-3].encode()]
        literal[f"{what} in hexadecimal"] = [f"{first >> 8:x}".encode(), f"{first >> 8:X}".encode()]
        # a database keeps six bytes of a number of this size, the others eight
        literal[f"{what} in big-endian bytes"] = [(first >> 8).to_bytes(5, "big")]
        literal[f"{what} in little-endian bytes"] = [(first >> 8).to_bytes(5, "little")]
        literal[f"{what} as a float"] = [struct.pack(">d", first)[:5], struct.pack("<d", first)[3:]]
    digits: dict[str, list[bytes]] = {"date as compact text": [], "time as a number of seconds": []}
    for name in ("date as text", "time in little-endian bytes", "time in big-endian bytes", "time as a number"):
        literal[name] = []
    for time in DATES:
        for form in ("%Y-%m-%d", "%Y/%m/%d", "%d/%m/%Y", "%m/%d/%Y", "%d.%m.%Y", "%d %B %Y", "%B %d, %Y", "%d-%b-%Y"):
            literal["date as text"].append(time.strftime(form).encode())
        digits["date as compact text"].append(time.strftime("%Y%m%d").encode())
        seconds = int(time.replace(tzinfo=UTC).timestamp())
        digits["time as a number of seconds"].append(str(seconds).encode())
        for scale in (10**3, 10**6, 10**9):
            literal["time as a number"].append(str(seconds * scale).encode())
            literal["time in little-endian bytes"].append((seconds * scale).to_bytes(8, "little", signed=True))
            literal["time in big-endian bytes"].append((seconds * scale).to_bytes(8, "big", signed=True))
        literal["time in little-endian bytes"].append(seconds.to_bytes(8, "little", signed=True))
    literal["rare code"] = [RARE_CODE.encode(), RARE_CODE.rpartition("/")[2].encode(), CODE_OF_FOUR.encode()]
    literal["rare code"] += [FREE_TEXT_CODE.encode(), FREE_TEXT_CODE.upper().encode(), b"Ottilie", b"QUILLOVARIDE"]
    literal["rare value"] = [b"8675.3", b"8,675.3", struct.pack("<d", RARE_VALUE), struct.pack(">d", RARE_VALUE)]
    found = {name: b"|".join(map(re.escape, sorted(set(values)))) for name, values in literal.items()}
    # short numbers: not as a part of a longer one, such as the decimals of a loss
    found |= {name: rb"(?<![\d.])(?:" + b"|".join(values) + rb")(?!\d)" for name, values in digits.items()}
    return {name: re.compile(pattern) for name, pattern in found.items()}


PATTERNS: Mapping[str, re.Pattern[bytes]] = _patterns()


def identifiers_in(data: bytes) -> set[str]:
    """Which kinds of planted values stand in the data, in which form."""
    return {name for name, pattern in PATTERNS.items() if pattern.search(data)}


def identifiers_below(root: Path, *, but: tuple[Path, ...] = ()) -> dict[str, set[str]]:
    """The same for every file below a folder, its name included, by the file; folders in `but` are left out."""
    found: dict[str, set[str]] = {}
    seen: set[bytes] = set()
    for path in sorted(root.rglob("*")):
        if any(path.is_relative_to(folder) for folder in but):
            continue
        names = identifiers_in(str(path.relative_to(root)).encode())
        if path.is_file():
            content = path.read_bytes()
            if content not in seen:  # artifacts are copies
                seen.add(content)
                names = names.union(*map(identifiers_in, forms(path, content)))
        if names:
            found[str(path.relative_to(root))] = names
    return found


def forms(path: Path, content: bytes) -> Iterator[bytes]:
    """A file's bytes, and what they say where they are compressed or a table."""
    yield content
    if content.startswith(b"\x1f\x8b"):
        yield gzip.decompress(content)
    elif content.startswith(b"BZh"):
        yield bz2.decompress(content)
    elif content.startswith(b"\xfd7zXZ"):
        yield lzma.decompress(content)
    elif content.startswith(b"PK\3\4"):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            for name in archive.namelist():
                yield archive.read(name)
    elif content.startswith(b"SQLite format 3\0"):
        yield from values_of_database(path)
    elif content.startswith(b"PAR1"):
        yield pl.read_parquet(content).write_json().encode()
    elif content.startswith(b"\x89PNG"):
        yield from texts_of_png(content)


def values_of_database(path: Path) -> Iterator[bytes]:
    """Every value of every table, which the bytes of the file may hold in another form, as text."""
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
        names = database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        for (name,) in names:
            for row in database.execute(f'SELECT * FROM "{name}"'):
                yield "\t".join(str(value) for value in row).encode()
                yield from (value for value in row if isinstance(value, bytes))


def texts_of_png(content: bytes) -> Iterator[bytes]:
    """Text chunks, decompressed where they are."""
    place = 8
    while place + 8 <= len(content):
        (length,) = struct.unpack(">I", content[place : place + 4])
        kind, chunk = content[place + 4 : place + 8], content[place + 8 : place + 8 + length]
        if kind in (b"tEXt", b"iTXt", b"eXIf"):
            yield chunk
        elif kind == b"zTXt":
            yield zlib.decompress(chunk.partition(b"\0")[2][1:])
        place += length + 12


def exposed_files(root: Path) -> list[Path]:
    """Files below `root` that others than their owner can reach: no folder on the way keeps them out."""
    return [
        path
        for path in root.rglob("*")
        if path.is_file()
        and not any(
            folder.stat().st_mode & 0o077 == 0 for folder in path.parents if folder == root or root in folder.parents
        )
    ]
