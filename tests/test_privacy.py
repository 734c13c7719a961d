"""Does anything that identifies a patient leave the prepared records, and does anything call home?"""

import gzip
import json
import os
import sqlite3
import stat
import subprocess
import sys
import traceback
from ast import literal_eval
from collections.abc import Callable, Iterator
from contextlib import chdir, closing, contextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from behrt.cli import main
from behrt.config import UserError
from behrt.parts import PartNumber
from behrt.prepare import prepare, prepare_part
from behrt.prepare_options import PrepareOptions
from behrt.vocabulary import Vocabulary

from .planted_records import (
    CODE_OF_FOUR,
    DATES,
    FREE_TEXT_CODE,
    MARKED,
    RARE_CODE,
    RARE_VALUE,
    exposed_files,
    identifiers_below,
    identifiers_in,
    moment,
    planted_events,
    planted_tables,
    subject,
    visit,
    write_planted_meds,
    write_planted_tables,
)
from .small_sweeps import write_sweep

ROOT = Path(__file__).resolve().parents[1]

NOTE_ADDRESSES = """
import os, sys

def note(*words):
    with open(os.environ["NOTED_ADDRESSES"], "a") as file:
        file.write(repr(words) + "\\n")

def hook(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        note(event, arguments[1])
    elif event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
        note(event, arguments[0])

note("start", " ".join(sys.orig_argv))
sys.addaudithook(hook)
"""
"""A `sitecustomize` module, which every Python process that inherits `PYTHONPATH` imports first."""

RUN_COMMANDS = """
import json, sys, traceback
from behrt.cli import main

codes = []
for words in json.load(sys.stdin):
    print("$", *words, file=sys.stderr, flush=True)
    try:
        codes.append(main(words))
    except Exception:  # as `--debug` lets it through
        traceback.print_exc()
        codes.append("traceback")
open("codes.json", "w").write(json.dumps(codes))
"""


@contextmanager
def umask(mask: int) -> Iterator[None]:
    former = os.umask(mask)
    try:
        yield
    finally:
        os.umask(former)


def environment_of(root: Path) -> dict[str, str]:
    """Of a process that notes every address that it or a child of it looks up or connects to, in `addresses`.

    Without what tests and their machines set, for libraries keep silent under these by themselves; with a home and a
    folder for temporary files that can be searched.
    """
    (root / "hook").mkdir()
    (root / "hook" / "sitecustomize.py").write_text(NOTE_ADDRESSES)
    quiet = ("CI", "GITHUB_ACTIONS", "PYTEST_CURRENT_TEST", "MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK")
    kept = {name: value for name, value in os.environ.items() if name not in (*quiet, "HF_HUB_DISABLE_TELEMETRY")}
    for name in ("home", "tmp"):
        (root / name).mkdir()
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join([str(root / "hook"), str(ROOT)]),
        "NOTED_ADDRESSES": str(root / "addresses"),
        "HOME": str(root / "home"),
        "TMPDIR": str(root / "tmp"),
        "PYTHONDONTWRITEBYTECODE": "1",
    }


@dataclass(frozen=True)
class Noted:
    """What processes told of themselves: how each was started, and the addresses beyond this machine."""

    started: list[str]
    foreign: list[Any]


def noted(file: Path) -> Noted:
    lines = [literal_eval(line) for line in file.read_text().splitlines()]
    return Noted(
        started=[words[1] for words in lines if words[0] == "start"],
        foreign=[words[1] for words in lines if words[0] != "start" and not is_here(words[1])],
    )


def is_here(address: Any) -> bool:
    """Whether it is an address on this machine: a file, or the loopback interface."""
    host = address[0] if isinstance(address, tuple) else address
    if not isinstance(host, str) or host.startswith(("/", "\0")):
        return True  # of a Unix socket, or of netlink; None is the wildcard
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host in ("", "localhost")


@dataclass(frozen=True)
class Journey:
    """A working folder in which every command has worked on the planted records, in processes of their own."""

    root: Path
    codes: dict[str, Any]
    private: tuple[Path, ...]
    """The records themselves."""


@pytest.fixture(scope="module")
def journey(tmp_path_factory: pytest.TempPathFactory) -> Journey:
    """Everything printed is in `stdout` and `stderr`, everything written beside it."""
    root = tmp_path_factory.mktemp("journey")
    environment = environment_of(root)
    records = root / "records"
    write_planted_meds(records / "meds")
    write_planted_tables(records / "mimic")
    damaged = records / "damaged.parquet"
    planted_events().write_parquet(damaged)
    damaged.write_bytes(damaged.read_bytes()[:-50])
    write_sweep(root / "planted.yaml", Path("prepared"), settings={"epochs": 2}, budget={"trials": 2})
    common = ["--data", "prepared", "--epochs", "2", "--force", "--stop-on", "never", "--experiment"]
    commands = {
        "prepare": ["prepare", "records/meds", "--out", "prepared", "--numeric-bins", "4", "--json"],
        "prepare mimic": ["prepare", "records/mimic", "--format", "mimic4", "--labs", "--out", "prepared_mimic"],
        "prepare damaged": ["--debug", "prepare", "records/damaged.parquet", "--out", "nothing"],
        "simulate": ["simulate", "--patients", "40", "--out", "simulated"],
        "params": ["params", "--data", "prepared"],
        "train": ["--debug", "train", *common, "full", "--json"],
        "train lora": ["train", *common, "lora", "--use-lora", "--init-from", "experiments/full"],
        "train lost": ["train", *common, "lost", "--lr", "1e6", "--gradient-clip", "1e9", "--data", "prepared_mimic"],
        "doctor": ["doctor", "experiments/full"],
        "doctor lost": ["doctor", "experiments/lost", "--json"],
        "compare": ["compare", "experiments/full", "experiments/lora"],
        "sweep run": ["--debug", "sweep", "run", "planted.yaml"],
        "sweep status": ["sweep", "status", "planted"],
        "sweep best": ["sweep", "best", "planted", "--json"],
        "sweep plot": ["sweep", "plot", "planted"],
        "sweep export": ["sweep", "export", "planted", "--to", "experiments/exported"],
    }
    with (root / "stdout").open("w") as stdout, (root / "stderr").open("w") as stderr:
        subprocess.run(
            [sys.executable, "-c", RUN_COMMANDS], cwd=root, env=environment, input=json.dumps(list(commands.values())),
            text=True, stdout=stdout, stderr=stderr, check=True,
        )  # fmt: skip
    codes = dict(zip(commands, json.loads((root / "codes.json").read_text()), strict=True))
    return Journey(root, codes, (records, root / "prepared", root / "prepared_mimic"))


def test_the_commands_did_what_they_were_to_do(journey: Journey) -> None:
    """Else they could not have written or said much."""
    fails = {"prepare damaged": "traceback", "train lost": 4}
    assert journey.codes == {name: fails.get(name, 0) for name in journey.codes}, (journey.root / "stderr").read_text()
    written = {str(path.relative_to(journey.root)) for path in journey.root.rglob("*")}
    expected = ["mlruns/mlflow.db", "sweeps/studies.db", "comparison.png", "experiments/full/plots/loss_curve.png"]
    expected += ["experiments/lora/checkpoints/best/adapter_model.safetensors", "sweeps/planted/trials/0001/run.json"]
    assert set(expected) <= written
    assert any(name.startswith("sweeps/planted/workers/") for name in written)
    assert any(name.startswith("mlruns/artifacts/full/") and name.endswith("model.safetensors") for name in written)
    assert "Traceback" in (journey.root / "stderr").read_text()


def test_nothing_that_is_written_or_printed_identifies_a_patient(journey: Journey) -> None:
    assert identifiers_below(journey.root, but=journey.private) == {}


def test_the_records_that_were_trained_on_do(journey: Journey) -> None:
    found = identifiers_below(journey.root / "prepared")
    assert {"subject in little-endian bytes", "time in little-endian bytes"} <= found["train.arrow"]
    assert {"subject in little-endian bytes", "time in little-endian bytes"} <= found["held_out.arrow"]


def test_beside_the_sequences_prepared_records_name_nobody(journey: Journey) -> None:
    for folder in ("prepared", "prepared_mimic"):
        found = identifiers_below(journey.root / folder)
        assert set(found) == {"train.arrow", "tuning.arrow", "held_out.arrow"}


def test_nothing_is_left_of_what_lay_on_the_disk_in_between(journey: Journey) -> None:
    assert [path for path in journey.root.rglob("*") if path.name.endswith((".spill", ".partial", ".former"))] == []
    assert [path for path in (journey.root / "tmp").rglob("*") if path.is_file()] == []


def write_array(path: Path, values: Any) -> None:
    with path.open("wb") as file:
        np.save(file, values)


def write_npy(path: Path) -> None:
    write_array(path, np.array([1, subject(77)]))


def write_floats(path: Path) -> None:
    write_array(path, np.array([1.0, RARE_VALUE]))


def write_times(path: Path) -> None:
    write_array(path, np.array([moment(MARKED[1], 2)], dtype="datetime64[ms]"))


def write_gz(path: Path) -> None:
    path.write_bytes(gzip.compress(f"INFO reading {subject(5)}\n".encode()))


def write_database(value: Any) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with closing(sqlite3.connect(path)) as database, database:
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("CREATE TABLE tags (value)")
            database.execute("INSERT INTO tags VALUES (?)", (value,))

    return write


def write_png(path: Path) -> None:
    from matplotlib.figure import Figure

    Figure(figsize=(1, 1)).savefig(path, format="png", metadata={"Title": FREE_TEXT_CODE})


def write_in(text: str) -> Callable[[Path], None]:
    return lambda path: path.write_text(text) and None


PLANTED: dict[str, tuple[Callable[[Path], None], str]] = {
    "an id in a log": (write_in(f"WARNING behrt: {subject(9)} has no birth"), "subject as text"),
    "an id for readers": (write_in(f"patient {subject(9):,}"), "subject as text"),
    "an id in hexadecimal": (write_in(f"{subject(9):#x}"), "subject in hexadecimal"),
    "a visit": (write_in(f"visit {visit(9)} is empty"), "visit as text"),
    "a day": (write_in(f"up to {DATES[0]:%d.%m.%Y}"), "date as text"),
    "a day without hyphens": (write_in(f"dump_{DATES[5]:%Y%m%d}.csv"), "date as compact text"),
    "a time since 1970": (write_in(f'"at": {DATES[5].replace(tzinfo=None):%Y-%m-%dT%H:%M:%S}'), "date as text"),
    "a code": (write_in(json.dumps({"tokens": [[RARE_CODE + "3", 1]]})), "rare code"),
    "a code of four": (write_in(CODE_OF_FOUR), "rare code"),
    "a value": (write_in(f"largest {RARE_VALUE:.2f}"), "rare value"),
    "an array of ids": (write_npy, "subject in little-endian bytes"),
    "an array of values": (write_floats, "rare value"),
    "an array of times": (write_times, "time in little-endian bytes"),
    "a compressed log": (write_gz, "subject as text"),
    "text in a database": (write_database(f"{subject(9)}"), "subject as text"),
    "a number in a database": (write_database(subject(9)), "subject as text"),
    "bytes in a database": (write_database(subject(9).to_bytes(8, "little")), "subject in little-endian bytes"),
    "a picture's title": (write_png, "rare code"),
    "a table": (lambda path: planted_events().write_parquet(path), "date as text"),
}


@pytest.mark.parametrize(("write", "expected"), PLANTED.values(), ids=PLANTED.keys())
def test_the_search_finds(write: Callable[[Path], None], expected: str, tmp_path: Path) -> None:
    assert identifiers_below(tmp_path) == {}
    write(tmp_path / "file")
    assert expected in identifiers_below(tmp_path)["file"]


def test_the_search_finds_names_of_files(tmp_path: Path) -> None:
    (tmp_path / f"{subject(3)}.log").touch()
    assert list(identifiers_below(tmp_path).values()) == [{"subject as text"}]


def test_the_search_finds_nothing_in_what_is_no_record() -> None:
    """Not the digits of a loss, nor numbers near the planted ones."""
    losses = "".join(f'{{"epoch": {n}, "value": 0.{DATES[0]:%Y%m%d}}},' for n in range(3))
    assert identifiers_in(f"{losses} {subject(0) - 1000} 1983 {DATES[0].year}".encode()) == set()


def test_codes_of_too_few_patients_are_in_no_vocabulary(tmp_path: Path) -> None:
    source = write_planted_meds(tmp_path / "meds")
    for least, known in ((5, False), (4, True)):
        prepare(source, tmp_path / str(least), PrepareOptions(min_patients=least, numeric_bins=4))
        vocabulary = Vocabulary.load(tmp_path / str(least) / "vocabulary.json")
        assert (CODE_OF_FOUR in vocabulary.tokens) is known
        assert min(vocabulary.patients[5:]) >= least
        assert set(vocabulary.bin_edges) <= {token.rpartition("//")[0] for token in vocabulary.tokens}


# What can be wrong with records, and the command that meets it.


def headerless(folder: Path) -> list[str]:
    planted_events().filter(pl.col("subject_id") == subject(0)).write_csv(folder / "x.csv", include_header=False)
    return ["doctor", "x.csv"]


def as_parquet(frame: pl.DataFrame, *options: str) -> Callable[[Path], list[str]]:
    def write(folder: Path) -> list[str]:
        frame.write_parquet(folder / "events.parquet")
        return ["prepare", "events.parquet", "--out", "out", *options]

    return write


def shared_subjects(folder: Path) -> list[str]:
    for name in ("train", "tuning"):
        (folder / "meds" / name).mkdir(parents=True)
        planted_events().write_parquet(folder / "meds" / name / "0.parquet")
    return ["prepare", "meds", "--out", "out"]


def with_splits(**columns: Any) -> Callable[[Path], list[str]]:
    def write(folder: Path) -> list[str]:
        write_planted_meds(folder / "meds")
        pl.DataFrame(columns).write_parquet(folder / "meds" / "metadata" / "subject_splits.parquet")
        return ["prepare", "meds", "--out", "out"]

    return write


def tables(**changed: str) -> Callable[[Path], list[str]]:
    def write(folder: Path) -> list[str]:
        write_planted_tables(folder / "mimic", **changed)
        return ["prepare", "mimic", "--out", "out", "--format", "mimic4", "--labs"]

    return write


def not_settings(folder: Path) -> list[str]:
    planted_events().head(200).write_csv(folder / "x.yaml", include_header=False)
    return ["train", "x.yaml"]


def not_a_sweep(folder: Path) -> list[str]:
    planted_events().head(200).write_csv(folder / "x.yaml")
    return ["sweep", "run", "x.yaml"]


def not_code_sets(folder: Path) -> list[str]:
    write_planted_meds(folder / "meds")
    planted_events().write_csv(folder / "x.yaml")
    return ["labels", "disease", "meds", "--out", "x.parquet", "--code-sets", "x.yaml"]


def nothing_to_label(folder: Path) -> list[str]:
    write_planted_meds(folder / "meds")
    return ["labels", "survival", "meds", "--out", "x.parquet", "--min-visits", "9999"]


EVENTS, TABLES = planted_events(), planted_tables()
UNSIGNED = EVENTS.with_columns(pl.lit(2**64 - 1 - (2**63 - subject(0) % 2**63), dtype=pl.UInt64).alias("subject_id"))
MISTAKES: dict[str, Callable[[Path], list[str]]] = {
    "ids as text": as_parquet(EVENTS.with_columns(pl.col("subject_id").cast(pl.String))),
    "times as text": as_parquet(EVENTS.with_columns(pl.col("time").dt.to_string("iso"))),
    "values as text": as_parquet(EVENTS.with_columns(pl.col("numeric_value").cast(pl.String))),
    "ids beyond 64 bits": as_parquet(UNSIGNED),
    "no births": as_parquet(EVENTS, "--birth-code", "BORN"),
    "only rare codes": as_parquet(EVENTS, "--include", "Q87ZXW|Ottilie"),
    "nothing kept": as_parquet(EVENTS, "--min-tokens", "99"),
    "subjects in two splits": shared_subjects,
    "a subject twice among the splits": with_splits(subject_id=[subject(0)] * 2, split=["train", "tuning"]),
    "ids as text among the splits": with_splits(subject_id=[str(subject(0))], split=["train"]),
    "ids beyond 64 bits among the splits": with_splits(
        subject_id=pl.Series([2**63 + subject(0)], dtype=pl.UInt64), split=["train"]
    ),
    "a column of ids for splits": with_splits(subject_id=[1], split=[str(subject(0))]),
    "a longer row in a table": tables(patients=TABLES["patients"] + f"{subject(1)},F,{DATES[0]},1,2,3,4,5,6\n"),
    "text for an id": tables(patients=TABLES["patients"].replace(f"{subject(2)},", f"{subject(2)}{RARE_CODE},")),
    "a quote that never ends": tables(prescriptions=TABLES["prescriptions"] + f'{subject(1)},"{FREE_TEXT_CODE},,,\n'),
    "no header": tables(patients=TABLES["patients"].partition("\n")[2]),
    "no header for the doctor": headerless,
    "records for settings": not_settings,
    "records for a sweep": not_a_sweep,
    "records for code sets": not_code_sets,
    "nothing to label": nothing_to_label,
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
@pytest.mark.parametrize("debug", [[], ["--debug"]], ids=["line", "debug"])
def test_no_error_quotes_a_record(
    mistake: Callable[[Path], list[str]], debug: list[str], tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    words = mistake(tmp_path)
    told = ""
    with chdir(tmp_path):
        try:
            assert main([*debug, *words]) in (0, 2)  # rows that cannot be read are counted
        except UserError as error:
            assert debug
            told = "".join(traceback.format_exception(error))
    printed = capfd.readouterr()
    told += printed.out + printed.err
    assert told
    assert identifiers_in(told.encode()) == set(), told


# Who can read it, while it is made and after.


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
@pytest.mark.parametrize("kind", ["meds", "mimic4", "part"])
def test_prepared_records_are_their_owners_alone_from_the_first_byte_on(kind: str, mask: int, tmp_path: Path) -> None:
    write = write_planted_tables if kind == "mimic4" else write_planted_meds
    source = write(tmp_path / "records")
    place = tmp_path / "place"
    exposed: set[Path] = set()
    files: set[str] = set()

    def look(stage: str, done: int, steps: int) -> None:
        files.update(path.name for path in place.rglob("*") if path.is_file())
        exposed.update(exposed_files(place))

    with umask(mask):
        if kind == "part":
            prepare_part(source, place / "out", PartNumber(1, 1), PrepareOptions(), progress=look)
        else:
            prepare(source, place / "out", PrepareOptions(format=kind, labs=kind == "mimic4"), progress=look)
    assert {"events-000000-000000.arrow"} | ({"train.arrow"} if kind != "part" else set()) <= files
    assert ("labevents.parquet" in files) == (kind == "mimic4")
    assert exposed == set()
    assert [path.name for path in place.iterdir()] == ["out"]
    assert stat.S_IMODE((place / "out").stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in (place / "out").iterdir()} == {0o600}


def test_a_folder_that_others_can_look_into_is_seen_as_exposed(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "file").touch()
    for folder, mode, expected in (("a", 0o755, 1), ("a/b", 0o711, 1), ("a", 0o700, 0)):
        (tmp_path / folder).chmod(mode)
        (tmp_path / "a" / "b").chmod(0o755)
        assert len(exposed_files(tmp_path / "a")) == expected


def test_replacing_prepared_records_exposes_neither_the_old_nor_the_new(tmp_path: Path) -> None:
    source = write_planted_meds(tmp_path / "records")
    with umask(0):
        for overwrite in (False, True):
            prepare(source, tmp_path / "place" / "out", PrepareOptions(), overwrite=overwrite)
            assert exposed_files(tmp_path / "place") == []


# Who is told.


def test_no_command_calls_another_machine(journey: Journey) -> None:
    told = noted(journey.root / "addresses")
    assert any("behrt.sweep.worker" in command for command in told.started)
    assert told.foreign == []


def test_a_call_to_another_machine_would_be_noted(tmp_path: Path) -> None:
    environment = environment_of(tmp_path)
    script = "import socket, subprocess, sys\n"
    script += "try: socket.create_connection(('192.0.2.1', 9), timeout=0.01)\nexcept OSError: pass\n"
    script += "try: socket.getaddrinfo('telemetry.invalid', 443)\nexcept OSError: pass\n"
    script += "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'', ('127.0.0.1', 9))\n"
    script += "if len(sys.argv) == 1: subprocess.run([sys.executable, '-c', open('script').read(), 'child'])\n"
    (tmp_path / "script").write_text(script)
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, check=True)
    told = noted(tmp_path / "addresses")
    assert len(told.started) == 2
    assert told.foreign.count(("192.0.2.1", 9)) == 2
    assert told.foreign.count("telemetry.invalid") == 2


QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true", "HF_HUB_DISABLE_TELEMETRY": "1"}


def test_importing_behrt_turns_telemetry_off_for_what_is_imported_after_it(tmp_path: Path) -> None:
    environment = environment_of(tmp_path)
    code = "import behrt, os, mlflow; from mlflow.telemetry import get_telemetry_client\n"
    code += "from mlflow.telemetry.utils import is_telemetry_disabled\n"
    code += "assert get_telemetry_client() is None and is_telemetry_disabled()\n"
    code += f"assert {{name: os.environ.get(name) for name in {list(QUIET)}}} == {QUIET}"
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_whoever_wants_telemetry_is_left_their_choice(tmp_path: Path) -> None:
    environment = environment_of(tmp_path) | {"DO_NOT_TRACK": "0", "MLFLOW_DISABLE_TELEMETRY": "false"}
    code = "import behrt, os; assert os.environ['DO_NOT_TRACK'] == '0'\n"
    code += "import behrt.tracking; assert os.environ['MLFLOW_DISABLE_TELEMETRY'] == 'false'"
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
