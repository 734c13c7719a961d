"""Malformed MIMIC-IV tables: one line and exit code 2, or the right handling; never anything else."""

import gzip
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pytest

from .bad_input import SUBJECT, Case, after, check, each_of, has_code, instead, report
from .test_mimic import TABLES

MIMIC = "prepare in --out out --format mimic4 --min-patients 1 --split 100/0/0"


def mimic(**content: str | bytes) -> Callable[[], None]:
    """The tables, some of them with another content: text as plain CSV, bytes as what is called csv.gz."""

    def make() -> None:
        Path("in").mkdir()
        for name, text in {**TABLES, **content}.items():
            if isinstance(text, bytes):
                Path(f"in/{name}.csv.gz").write_bytes(text)
            else:
                Path(f"in/{name}.csv").write_bytes(text.encode("utf-8", "surrogateescape"))

    return make


def patients(*rows: str, header: str = "subject_id,gender,anchor_age,anchor_year,anchor_year_group,dod") -> str:
    return "\n".join([header, *(row.replace("ID", str(SUBJECT)) for row in rows), ""])


PATIENTS = TABLES["patients"].replace("1,F", f"{SUBJECT},F")
ZIPPED = gzip.compress(PATIENTS.encode())
BAD_YEARS = patients("1,F,52,2180,x,", "2,M,30,2150,x,", "7,F,52,999999999,x,", "8,F,-999999,2100,x,", "9,F,a,b,x,c")


def zip_archive() -> bytes:
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("patients.csv", PATIENTS)
    return buffer.getvalue()


MIMIC_CASES = [
    Case("a byte order mark", MIMIC, make=mimic(patients="\ufeff" + TABLES["patients"]),
         handled=report(subjects_read=2)),
    Case("UTF-16", MIMIC, make=mimic(patients=PATIENTS.encode("utf-16").decode("utf-8", "surrogateescape")),
         refused=r"patients\.csv: "),
    Case("Latin-1 in a column that is not read", MIMIC,
         make=mimic(patients=PATIENTS.replace("2014 - 2016", "caf\udce9")),
         refused=r"patients\.csv: .*is not UTF-8 text"),
    Case("semicolons between columns", MIMIC, make=mimic(patients=PATIENTS.replace(",", ";")),
         refused=r"patients\.csv: no column 'subject_id'; .*semicolon"),
    Case("tabs between columns", MIMIC, make=mimic(patients=PATIENTS.replace(",", "\t")),
         refused=r"patients\.csv: no column 'subject_id'; .*tab"),
    Case("no header", MIMIC, make=mimic(patients=PATIENTS.split("\n", 1)[1]),
         refused=r"patients\.csv: no column 'subject_id'; .*header"),
    Case("a header in capitals", MIMIC, make=mimic(patients=PATIENTS.replace("subject_id", "SUBJECT_ID")),
         refused=r"patients\.csv: no column 'subject_id'; it has "),
    Case("a header twice", MIMIC, make=mimic(patients=PATIENTS.replace("anchor_year_group", "anchor_year")),
         refused=r"patients\.csv: two columns 'anchor_year'"),
    Case("a header and no rows", MIMIC,
         make=mimic(**{name: text.split("\n")[0] + "\n" for name, text in TABLES.items()}),
         refused=r"in: the MIMIC-IV tables hold no events"),
    Case("line breaks of Windows", MIMIC,
         make=mimic(**{name: text.replace("\n", "\r\n") for name, text in TABLES.items()}),
         handled=lambda: (report(subjects_read=2, events_kept=10)(), has_code("ADMISSION//URGENT")())),
    Case("line breaks of old Macs", MIMIC, make=mimic(patients=PATIENTS.replace("\n", "\r")),
         refused=r"patients\.csv: "),
    Case("a quote that never ends", MIMIC, make=mimic(patients=PATIENTS + f'{SUBJECT},"F,1,1,,\n'),
         refused=r"patients\.csv: cannot be read as CSV"),
    Case("rows that are too long", MIMIC, make=mimic(patients=TABLES["patients"] + "3,F,50,2100,x,,,,\n"),
         handled=report(subjects_read=3, birth_events=3)),
    Case("rows that are too short", MIMIC, make=mimic(patients=TABLES["patients"] + f"{SUBJECT},F\n"),
         refused=r"1 of 3 subjects have no MEDS_BIRTH"),
    Case("null bytes in a table", MIMIC, make=mimic(prescriptions=TABLES["prescriptions"].replace("Tartrate", "T\0e")),
         handled=has_code("MEDICATION//METOPROLOL T\0E")),
    Case("nothing but null bytes", MIMIC, make=mimic(patients="\0" * 5000), refused=r"patients\.csv: "),
    Case("years that no calendar has", MIMIC + " --missing-birth drop", make=mimic(patients=BAD_YEARS),
         handled=report(subjects_read=5, subjects_without_birth=3)),
    Case("a death in the thirteenth month", MIMIC, make=mimic(patients=TABLES["patients"].replace("05-07", "13-07")),
         handled=report(unparsed_rows_of_patients=1, death_events=0)),
    Case("deaths in years 1 and 9999", MIMIC,
         make=mimic(patients=patients("1,F,52,2180,x,9999-12-31", "2,M,30,2150,x,0001-01-01")),
         handled=report(subjects_kept=1, death_events=2)),
    Case("subjects that are no numbers", MIMIC,
         make=mimic(patients=TABLES["patients"] + f"{SUBJECT}x,F,1,2000,,\n1e3,F,1,2000,,\n,F,1,2000,,\n"),
         handled=report(subjects_read=2, unparsed_rows_of_patients=6)),
    Case("subjects beyond 64 bits", MIMIC, make=mimic(patients=TABLES["patients"] + "9223372036854775808,F,1,2000,,\n"),
         handled=report(subjects_read=2, unparsed_rows_of_patients=2)),
    Case("discharge before admission", MIMIC,
         make=mimic(admissions=TABLES["admissions"].replace("2180-05-07 20", "2180-04-07 20")),
         handled=report(subjects_kept=2)),
    Case("an admission that stands there twice", MIMIC,
         make=mimic(admissions=TABLES["admissions"] + TABLES["admissions"].split("\n", 1)[1]),
         handled=report(duplicate_events=5, subjects_kept=2)),
    Case("a drug of ten million characters", MIMIC,
         make=mimic(prescriptions=TABLES["prescriptions"].replace("Metoprolol", "(" * 10_000_000)),
         handled=report(subjects_kept=2)),
    Case("a drug that a spreadsheet would run", MIMIC,
         make=mimic(prescriptions=TABLES["prescriptions"].replace("Metoprolol", "=1+2")),
         handled=has_code("MEDICATION//=1+2 TARTRATE")),
    Case("gzip in several members", MIMIC,
         make=mimic(patients=b"".join(gzip.compress(line.encode()) for line in TABLES["patients"].splitlines(True))),
         handled=report(subjects_read=2)),
    Case("gzip with a wrong checksum", MIMIC, make=mimic(patients=ZIPPED[:-8] + bytes(8)),
         refused=r"patients\.csv\.gz: cannot be read as CSV"),
    Case("gzip cut off behind its header", MIMIC, make=mimic(patients=ZIPPED[:12]),
         refused=r"patients\.csv\.gz: "),
    Case("two bytes of gzip", MIMIC, make=mimic(patients=b"\x1f\x8b"), refused=r"patients\.csv\.gz: "),
    Case("gzip of nothing", MIMIC, make=mimic(patients=gzip.compress(b"")), refused=r"patients\.csv\.gz: is empty"),
    Case("zip named gzip", MIMIC, make=mimic(patients=zip_archive()), refused=r"patients\.csv\.gz: not gzip data"),
    Case("a folder in the place of a table", MIMIC, make=after(mimic(), lambda: instead("in/patients.csv", "folder")),
         refused=r"in: no patients\.csv\.gz or patients\.csv"),
    Case("a pipe in the place of a table", MIMIC, make=after(mimic(), lambda: instead("in/patients.csv", "pipe")),
         refused=r"in: no patients\.csv\.gz or patients\.csv"),
    Case("a device in the place of a table", MIMIC, make=after(mimic(),
         lambda: instead("in/patients.csv", "/dev/zero")),
         refused=r"in: no patients\.csv\.gz or patients\.csv"),
    Case("a link to itself in the place of a table", MIMIC,
         make=after(mimic(), lambda: instead("in/patients.csv", "loop")),
         refused=r"in: no patients\.csv\.gz or patients\.csv"),
]  # fmt: skip


@each_of(MIMIC_CASES)
def test_malformed_tables_are_refused_in_one_line_or_handled(
    case: Case, tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(case, tmp_path, capfd, monkeypatch)
