"""Malformed prepared records: one line and exit code 2; never anything else."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pytest

from behrt.prepare import prepare
from behrt.prepare_options import PrepareOptions
from behrt.sequences import SEQUENCE_SCHEMA

from .bad_input import RARE, SUBJECT, Case, after, check, each_of, instead, records
from .small_records import write_meds

PARAMS = "params --json --data prepared"
TRAIN = "train --data prepared --epochs 1"


def small_prepared() -> None:
    write_meds(Path("in"), records(60))
    prepare(Path("in"), Path("prepared"), PrepareOptions())


def info(**values: Any) -> Callable[[], None]:
    """`dataset.json` with other values; `...` leaves a key out."""

    def make() -> None:
        small_prepared()
        path = Path("prepared/dataset.json")
        content = {**json.loads(path.read_text()), **values}
        path.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))

    return make


def prepared_file(name: str, content: bytes | str | Callable[[bytes], bytes]) -> Callable[[], None]:
    def make() -> None:
        small_prepared()
        path = Path("prepared") / name
        raw = content(path.read_bytes()) if callable(content) else content
        path.write_bytes(raw.encode("utf-8", "surrogatepass") if isinstance(raw, str) else raw)

    return make


def not_a_file(name: str, kind: str) -> Callable[[], None]:
    return after(small_prepared, lambda: instead(f"prepared/{name}", kind))


def arrow(column: str, change: Callable[[list[Any]], Any], dtype: pa.DataType | None = None) -> Callable[[], None]:
    """`train.arrow`, in which each patient's list in a column is another one."""

    def make() -> None:
        small_prepared()
        table = pa.ipc.open_file(Path("prepared/train.arrow").read_bytes()).read_all()
        place = SEQUENCE_SCHEMA.names.index(column)
        values = [change(value) for value in table[column].to_pylist()]
        field = pa.field(column, dtype or SEQUENCE_SCHEMA.field(column).type)
        table = table.set_column(place, field, pa.chunked_array([pa.array(values, field.type)]))
        with pa.ipc.new_file("prepared/train.arrow", table.schema) as writer:
            writer.write_table(table)

    return make


def vocabulary(content: Any) -> Callable[[], None]:
    return prepared_file("vocabulary.json", json.dumps(content))


SPECIAL = [[token, 0] for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")]
DEEP = "[" * 100_000 + "]" * 100_000

PREPARED_CASES = [
    Case("dataset with a byte order mark", PARAMS, make=prepared_file("dataset.json",
         lambda raw: b"\xef\xbb\xbf" + raw),
         refused=r"dataset\.json: damaged"),
    Case("dataset in UTF-16", PARAMS, make=prepared_file("dataset.json", lambda raw: raw.decode().encode("utf-16")),
         refused=r"dataset\.json: damaged"),
    Case("dataset nested too deep", PARAMS, make=prepared_file("dataset.json", DEEP),
         refused=r"dataset\.json: damaged"),
    Case("dataset with a number of 5000 digits", PARAMS,
         make=prepared_file("dataset.json", '{"format": ' + "9" * 5000 + "}"),
         refused=r"dataset\.json: damaged"),
    Case("dataset of a version that is a list", PARAMS, make=info(format_version=[1]), refused=r"format version \[1\]"),
    Case("dataset of a version of a million characters", PARAMS, make=info(format_version="9" * 1_000_000),
         refused=r"dataset\.json: format version"),
    Case("dataset without splits", PARAMS, make=info(splits=...), refused=r"dataset\.json: no counts for train"),
    Case("dataset with splits in a list", PARAMS, make=info(splits=[1]), refused=r"dataset\.json: no counts for train"),
    Case("dataset with counts that are not the files'", PARAMS,
         make=info(splits={name: {"patients": -1} for name in ("train", "tuning", "held_out")}),
         refused=r"train\.arrow: \d+ patients, expected -1"),
    Case("dataset without a name", TRAIN, make=info(name=...), refused=r"dataset\.json: no name"),
    Case("dataset without options", TRAIN, make=info(options=...), refused=r"dataset\.json: no options"),
    Case("dataset with options in a list", TRAIN, make=info(options=[]), refused=r"dataset\.json: no options"),
    Case("a pipe in the place of the dataset", PARAMS, make=not_a_file("dataset.json", "pipe"),
         refused=r"prepared: no dataset\.json in it"),
    Case("a link to itself in the place of the dataset", PARAMS, make=not_a_file("dataset.json", "loop"),
         refused=r"prepared: no dataset\.json in it"),
    Case("vocabulary nested too deep", PARAMS, make=prepared_file("vocabulary.json", DEEP),
         refused=r"vocabulary\.json: damaged"),
    Case("vocabulary without tokens", PARAMS, make=vocabulary({"tokens": [], "bin_edges": {}}),
         refused=r"vocabulary\.json: damaged"),
    Case("vocabulary of special tokens alone", PARAMS, make=vocabulary({"tokens": SPECIAL, "bin_edges": {}}),
         refused=r"vocabulary\.json: .*code"),
    Case("vocabulary with a code twice", PARAMS,
         make=vocabulary({"tokens": [*SPECIAL, [RARE, 7], [RARE, 7]], "bin_edges": {}}),
         refused=r"vocabulary\.json: damaged"),
    Case("vocabulary with numbers for codes", PARAMS,
         make=vocabulary({"tokens": [*SPECIAL, [SUBJECT, 7]], "bin_edges": {}}),
         refused=r"vocabulary\.json: damaged"),
    Case("vocabulary with counts that are true", PARAMS,
         make=vocabulary({"tokens": [*SPECIAL, [RARE, True]], "bin_edges": {}}), refused=r"vocabulary\.json: damaged"),
    Case("vocabulary with half a character", PARAMS,
         make=prepared_file("vocabulary.json", json.dumps({"tokens": [*SPECIAL, ["A\ud800", 7]], "bin_edges": {}})),
         refused=r"vocabulary\.json: damaged"),
    Case("vocabulary with edges beyond all numbers", PARAMS,
         make=prepared_file("vocabulary.json",
         lambda raw: raw.replace(b'"bin_edges": {}', b'"bin_edges": {"C0": [1e999]}')),
         refused=r"vocabulary\.json: damaged"),
    Case("vocabulary of other records", TRAIN,
         make=vocabulary({"tokens": [*SPECIAL, ["A", 7]], "bin_edges": {}}), refused=r"train\.arrow: .*vocabulary"),
    Case("a pipe in the place of the vocabulary", PARAMS, make=not_a_file("vocabulary.json", "pipe"),
         refused=r"vocabulary\.json: is no file"),
    Case("a device in the place of the vocabulary", PARAMS, make=not_a_file("vocabulary.json", "/dev/zero"),
         refused=r"vocabulary\.json: is no file"),
    Case("a folder in the place of the sequences", PARAMS, make=not_a_file("train.arrow", "folder"),
         refused=r"train\.arrow: "),
    Case("a pipe in the place of the sequences", PARAMS, make=not_a_file("train.arrow", "pipe"),
         refused=r"train\.arrow: is no file"),
    Case("a device in the place of the sequences", PARAMS, make=not_a_file("train.arrow", "/dev/zero"),
         refused=r"train\.arrow: is no file"),
    Case("a link to itself in the place of the sequences", PARAMS, make=not_a_file("train.arrow", "loop"),
         refused=r"train\.arrow: "),
    Case("parquet named arrow", PARAMS,
         make=after(small_prepared, lambda: pl.DataFrame({"codes": [[1]]}).write_parquet("prepared/train.arrow")),
         refused=r"train\.arrow: truncated or damaged"),
    Case("sequences of other types", PARAMS, make=arrow("codes", lambda codes: codes, pa.list_(pa.int64())),
         refused=r"train\.arrow: its columns are not those"),
    Case("sequences of unequal lists", PARAMS, make=arrow("ages", lambda ages: ages[:-1]),
         refused=r"train\.arrow: the lists of a patient differ"),
    Case("sequences with null lists", PARAMS, make=arrow("visits", lambda visits: None),
         refused=r"train\.arrow: the lists of a patient differ"),
    Case("sequences with null codes", TRAIN, make=arrow("codes", lambda codes: [None, *codes[1:]]),
         refused=r"train\.arrow: "),
    Case("codes beyond the vocabulary", TRAIN, make=arrow("codes",
         lambda codes: [2**31 - 1 if code > 4 else code for code in codes]),
         refused=r"train\.arrow: .*vocabulary"),
    Case("negative codes", TRAIN, make=arrow("codes", lambda codes: [-code for code in codes]),
         refused=r"train\.arrow: .*vocabulary"),
    Case("negative visits", TRAIN, make=arrow("visits", lambda visits: [-7] * len(visits)),
         refused=r"train\.arrow: .*visit"),
    Case("ages that are negative or not finite", TRAIN,
         make=arrow("ages", lambda ages: [float("-inf"), float("inf"), *[-5.0] * (len(ages) - 2)]),
         refused=r"train\.arrow: .*age"),
]  # fmt: skip


@each_of(PREPARED_CASES)
def test_malformed_prepared_records_are_refused_in_one_line(
    case: Case, tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(case, tmp_path, capfd, monkeypatch)
