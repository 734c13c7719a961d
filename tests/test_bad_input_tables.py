"""Malformed tables of OMOP and of Synthea: one line and exit code 2, or the right handling; never anything else."""

import gzip
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from . import test_omop, test_synthea
from .bad_input import SUBJECT, Case, after, check, each_of, has_code, instead, report

OMOP = "prepare in --out out --format omop --min-patients 1 --split 100/0/0"
SYNTHEA = "prepare in --out out --format synthea --min-patients 1 --split 100/0/0"
PATIENT = f"{SUBJECT}-c0de-4000"


def tables(named: Mapping[str, str | bytes], **content: str | bytes | None) -> Callable[[], None]:
    """Tables, some with another content: text as plain CSV, bytes as what is called csv.gz, None as no table."""

    def make() -> None:
        Path("in").mkdir()
        for name, text in {**named, **content}.items():
            if isinstance(text, bytes):
                Path(f"in/{name}.csv.gz").write_bytes(text)
            elif text is not None:
                Path(f"in/{name}.csv").write_bytes(text.encode("utf-8", "surrogateescape"))

    return make


def omop(**content: str | bytes | None) -> Callable[[], None]:
    return tables(OMOP_TABLES, **content)


def synthea(**content: str | bytes | None) -> Callable[[], None]:
    return tables(
        {name: text.replace(test_synthea.BOB, PATIENT) for name, text in test_synthea.TABLES.items()}, **content
    )


OMOP_TABLES = {
    name: text.replace("\n3,", f"\n{SUBJECT},").replace(",3,", f",{SUBJECT},")
    for name, text in test_omop.TABLES.items()
}  # fmt: skip
PERSON, CONDITIONS, CONCEPTS = (OMOP_TABLES[name] for name in ("person", "condition_occurrence", "concept"))
SYNTHEA_TABLES = {name: text.replace(test_synthea.BOB, PATIENT) for name, text in test_synthea.TABLES.items()}
PATIENTS = SYNTHEA_TABLES["patients"]
MEDICATIONS = test_synthea.TABLES["medications"]


def many_rows() -> bytes:
    """A table that no decompressor holds in one block."""
    header, row = CONDITIONS.split("\n")[:2]
    return gzip.compress("\n".join([header, *[row] * 100_000]).encode())


OMOP_CASES = [
    Case("a byte order mark", OMOP, make=omop(person="\ufeff" + PERSON), handled=report(subjects_read=3)),
    Case("line breaks of Windows", OMOP, make=omop(person=PERSON.replace("\n", "\r\n")),
         handled=report(subjects_read=3, birth_events=3)),
    Case("no table person", OMOP, make=omop(person=None), refused=r"in: no person\.csv, .* a table that --format omop"),
    Case("nothing but persons", OMOP,
         make=tables({"person": PERSON}), refused=r"in: no table of events beside person; expected one of visit_occ"),
    Case("a table twice", OMOP, make=after(omop(), lambda: Path("in/PERSON.parquet").write_bytes(b"")),
         refused=r"in: the table 'person' is there twice, PERSON\.parquet and person\.csv"),
    Case("tables in two folders", OMOP, make=after(omop(), lambda: [Path("both").mkdir(), Path("in").rename("both/a"),
         Path("both").rename("in"), Path("in/b").mkdir(), Path("in/b/person.csv").write_text(PERSON)]),
         refused=r"in: 2 of its folders hold a table 'person'; name one"),
    Case("a file in the place of the folder", "prepare in/person.csv --out out --format omop", make=omop(),
         refused=r"person\.csv: is a file; --format omop expects the folder"),
    Case("no column for the person", OMOP, make=omop(condition_occurrence=CONDITIONS.replace("person_id", "who", 1)),
         refused=r"condition_occurrence\.csv: no column 'person_id'; it has condition_occurrence_id"),
    Case("no column for the concept", OMOP, make=omop(drug_exposure="person_id,drug_exposure_start_date\n"),
         refused=r"drug_exposure\.csv: no column 'drug_concept_id'"),
    Case("no column for the time", OMOP,
         make=omop(visit_occurrence="visit_occurrence_id,person_id,visit_concept_id,visit_end_date\n"),
         refused=r"visit_occurrence\.csv: no column 'visit_start_date'"),
    Case("a column twice", OMOP, make=omop(person=PERSON.replace("birth_datetime", "year_of_birth", 1)),
         refused=r"person\.csv: two columns 'year_of_birth'"),
    Case("a column twice, once in capitals", OMOP, make=omop(person=PERSON.replace("birth_datetime", "Person_ID", 1)),
         refused=r"person\.csv: two columns 'person_id'"),
    Case("semicolons between columns", OMOP, make=omop(person=PERSON.replace(",", ";")),
         refused=r"person\.csv: no column 'person_id'; .*semicolon"),
    Case("no header", OMOP, make=omop(person=PERSON.split("\n", 1)[1]),
         refused=r"person\.csv: no column 'person_id'; "),
    Case("Latin-1", OMOP, make=omop(concept=CONCEPTS.replace("Home", "caf\udce9")),
         refused=r"concept\.csv: .*is not UTF-8 text"),
    Case("a header and no rows", OMOP,
         make=omop(**{name: text.split("\n")[0] + "\n" for name, text in test_omop.TABLES.items()}),
         refused=r"in: the tables hold no events that --format omop can read"),
    Case("a quote that never ends", OMOP, make=omop(person=PERSON + f'{SUBJECT},"F,1,1,,\n'),
         refused=r"person\.csv: cannot be read as CSV"),
    Case("dates of another country", OMOP,
         make=omop(condition_occurrence=CONDITIONS.replace("2020-03-01", "01.03.2020").replace("2020-01-02", "2.1.20")),
         refused=r"condition_occurrence\.csv: 3 of 4 rows have no readable .* or 'condition_start_date', expected"),
    Case("one date that is none", OMOP,
         make=omop(condition_occurrence=CONDITIONS.replace("2020-01-02,,25000", "2020-13-02,,25000")),
         handled=report(unparsed_rows_of_condition_occurrence=2)),
    Case("births that are none", OMOP, make=omop(person=PERSON.replace(",19", ",x19")),
         refused=r"person\.csv: 3 of 3 rows have no readable time in 'year_of_birth' or .*, expected a year"),
    Case("one person without a year", OMOP,
         make=omop(person=PERSON.replace("8507,1970,5,,1970-05-06 07:08:00", "8507,,,,")),
         refused=r"1 of 3 subjects have no MEDS_BIRTH"),
    Case("events of nobody", OMOP + " --missing-birth drop",
         make=omop(condition_occurrence=CONDITIONS + "7,55,201826,2020-01-01,,x,\n"),
         handled=report(subjects_read=4, subjects_without_birth=1)),
    Case("persons beyond 64 bits", OMOP, make=omop(person=PERSON + "9223372036854775808,8507,1950,,,,\n"),
         handled=report(subjects_read=3, unparsed_rows_of_person=2)),
    Case("a concept beyond 64 bits", OMOP,
         make=omop(concept=CONCEPTS + "9223372036854775808,x,y,z\n"),
         handled=has_code("CONDITION//Type 2 diabetes mellitus")),
    Case("gzip that is cut", OMOP, make=tables(OMOP_TABLES | {"condition_occurrence": many_rows()[:-500]}),
         refused=r"condition_occurrence\.csv\.gz: cannot be read as CSV"),
    Case("two bytes of gzip", OMOP, make=omop(person=b"\x1f\x8b"), refused=r"person\.csv\.gz: "),
    Case("plain text named gzip", OMOP, make=omop(person=None, **{"PERSON": PERSON.encode()}),
         refused=r"PERSON\.csv\.gz: not gzip data; if it is plain text, name it PERSON\.csv"),
    Case("gzip named plain text", OMOP,
         make=omop(person=gzip.compress(PERSON.encode()).decode("utf-8", "surrogateescape")),
         refused=r"person\.csv: gzip data; name it person\.csv\.gz"),
    Case("parquet that is none", OMOP,
         make=after(omop(death=None), lambda: Path("in/death.parquet").write_text("PAR1x")),
         refused=r"death\.parquet: cannot be read as parquet"),
    Case("an empty parquet file", OMOP, make=after(omop(death=None), lambda: Path("in/death.parquet").touch()),
         refused=r"death\.parquet: is empty"),
    Case("a pipe in the place of a table", OMOP, make=after(omop(), lambda: instead("in/person.csv", "pipe")),
         refused=r"in: no person\.csv"),
    Case("a folder in the place of a table", OMOP, make=after(omop(), lambda: instead("in/person.csv", "folder")),
         refused=r"in: no person\.csv"),
    Case("an option of another format", OMOP.replace("omop", "omop --labs"), make=omop(),
         refused=r"--labs is for --format mimic4"),
    Case("a flag for a table that is missing", OMOP + " --observations", make=omop(observation=None),
         refused=r"in: no table 'observation', which --observations asks for"),
    Case("tables of Synthea", OMOP, make=synthea(), refused=r"in: no person\.csv.*use --format synthea"),
    Case("tables of MIMIC-IV", OMOP, make=after(omop(person=None), lambda: [Path(f"in/{name}.csv").touch()
         for name in ("patients", "admissions")]), refused=r"in: no person\.csv.*use --format mimic4"),
]  # fmt: skip

SYNTHEA_CASES = [
    Case("no table of patients", SYNTHEA, make=synthea(patients=None),
         refused=r"in: no patients\.csv, .* a table that --format synthea needs"),
    Case("nothing but patients", SYNTHEA, make=tables({"patients": PATIENTS}),
         refused=r"in: no table of events beside patients; expected one of encounters"),
    Case("no column for the birth", SYNTHEA, make=synthea(patients=PATIENTS.replace("BIRTHDATE", "BORN")),
         refused=r"patients\.csv: no column 'birthdate'; it has Id, BORN"),
    Case("no column for the time", SYNTHEA, make=synthea(medications=MEDICATIONS.replace("START", "BEGIN")),
         refused=r"medications\.csv: no column 'start'"),
    Case("no column for the code", SYNTHEA, make=synthea(medications=MEDICATIONS.replace("CODE", "DRUG")),
         refused=r"medications\.csv: no column 'code'"),
    Case("times that are none", SYNTHEA, make=synthea(medications=MEDICATIONS.replace("T0", " at 0")),
         refused=r"medications\.csv: 2 of 2 rows have no readable time in 'start', expected"),
    Case("births that are none", SYNTHEA, make=synthea(patients=PATIENTS.replace("-02-03", "-02-33")),
         refused=r"1 of 2 subjects have no MEDS_BIRTH"),
    Case("a patient without an id", SYNTHEA, make=synthea(patients=PATIENTS + ",1950-01-01,,,,,F\n"),
         handled=report(subjects_read=2, unparsed_rows_of_patients=2)),
    Case("events of nobody", SYNTHEA + " --missing-birth drop",
         make=synthea(medications=MEDICATIONS + "2020-01-01T00:00:00Z,,nobody,x,,1,y\n"),
         handled=report(subjects_read=3, subjects_without_birth=1)),
    Case("a name that is not UTF-8", SYNTHEA, make=synthea(patients=PATIENTS.replace("Lou594", "caf\udce9")),
         refused=r"patients\.csv: .*is not UTF-8 text"),
    Case("gzip that is cut", SYNTHEA, make=synthea(medications=None, careplans=None, conditions=None,
         **{"Medications": gzip.compress(MEDICATIONS.encode())[:-30]}),
         refused=r"Medications\.csv\.gz: cannot be read as CSV"),
    Case("a table of nothing", SYNTHEA, make=synthea(medications=""), refused=r"medications\.csv: is empty"),
    Case("tables of OMOP", SYNTHEA, make=omop(), refused=r"in: no patients\.csv.*use --format omop"),
    Case("tables for the reader of MEDS", "prepare in --out out", make=synthea(),
         refused=r"in: no parquet file inside, .*use --format synthea"),
    Case("a part of it", SYNTHEA + " --shard 1/2", make=synthea(),
         refused=r"--shard: is for --format meds; the tables of synthea"),
    Case("columns renamed", SYNTHEA + " --column code=code", make=synthea(),
         refused=r"--column is for --format meds; the columns of synthea are fixed"),
]  # fmt: skip


@each_of(OMOP_CASES)
def test_malformed_tables_of_omop_are_refused_in_one_line_or_handled(
    case: Case, tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(case, tmp_path, capfd, monkeypatch)


@each_of(SYNTHEA_CASES)
def test_malformed_tables_of_synthea_are_refused_in_one_line_or_handled(
    case: Case, tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(case, tmp_path, capfd, monkeypatch)
