"""Malformed records of runs: one line and exit code 2, or the right handling; never anything else."""

import gzip
import json
import os
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from .bad_input import RARE, SUBJECT, Case, a_file, after, check, each_of, instead

CSV = "epoch,train_loss,val_loss\n1,6.9,6.8\n2,6.5,6.6\n3,6.1,6.4\n"
DIGITS = "9" * 5000
DEEP = "[" * 100_000 + "]" * 100_000


def doctor(name: str, file: str, content: bytes | str, refused: str) -> Case:
    """A file that the doctor refuses."""
    return Case(name, f"doctor --json {file}", refused, make=a_file(file, content))


def read(name: str, file: str, content: bytes | str) -> Case:
    """A file that the doctor reads."""
    return Case(name, f"doctor --json {file}", make=a_file(file, content), handled=lambda: None)


def history(**figures: Any) -> str:
    return json.dumps(figures)


def run_folder(run: bytes | str | None = "{}", figures: bytes | str | None = None) -> Callable[[], None]:
    """A folder `run` with `run.json` and the history of a run, either of them as it may be."""

    def make() -> None:
        Path("run/logs").mkdir(parents=True)
        if run is not None:
            a_file("run/run.json", run)()
        if figures is not None:
            a_file("run/logs/metrics_history.json", figures)()

    return make


GOOD_HISTORY = history(val_loss=[{"epoch": 1, "value": 6.9}, {"epoch": 2, "value": 6.5}])

TABLE_CASES = [
    read("table with a byte order mark", "t.csv", "\ufeff" + CSV),
    read("table in UTF-16", "t.csv", CSV.encode("utf-16")),
    read("table with line breaks of Windows", "t.csv", CSV.replace("\n", "\r\n")),
    read("table with semicolons and decimal commas", "t.csv", CSV.replace(",", ";").replace(".", ",")),
    read("table with infinite losses", "t.csv", CSV + "4,inf,-inf\n5,1e999,nan\n"),
    read("table with negative epochs", "t.csv", CSV + "-5,1,1\n"),
    doctor("table with an epoch far away", "t.csv", CSV + "1e300,1,1\n", r"t\.csv: row 4, the epoch of"),
    doctor("table in UTF-16 without its mark", "t.csv", CSV.encode("utf-16-le"), r"t\.csv: is no text"),
    doctor("table with a header twice", "t.csv", CSV.replace("train", "val"), r"t\.csv: has two columns 'val_loss'"),
    doctor("table with a header and no rows", "t.csv", "epoch,val_loss\n", r"t\.csv: has a header and no rows"),
    doctor("table with rows that are too long", "t.csv", CSV + "4,1,1,1,1\n", r"t\.csv: is no table"),
    doctor("table with a quote that never ends", "t.csv", CSV + '4,"1,1\n', r"t\.csv: "),
    doctor("table with words for numbers", "t.csv", CSV + "4,high,low\n",
           r"t\.csv: row 4, 'train_loss': expected a number"),
    doctor("table with a formula for a number", "t.csv", CSV + "4,=1+2,1\n", r"row 4, 'train_loss': expected a number"),
    doctor("table with infinite epochs", "t.csv", CSV + "inf,1,1\n", r"t\.csv: row 4, the epoch of"),
    doctor("table of records", "t.csv", f"subject_id,code\n{SUBJECT},{RARE}\n",
           r"t\.csv: holds no figure of a training"),
    doctor("table of records without a header", "t.csv", f"{SUBJECT},{RARE}\n{SUBJECT},{RARE}\n",
           r"t\.csv: holds no figure"),
    doctor("table with a record for a loss", "t.csv", f"epoch,val_loss\n1,{SUBJECT}{RARE}\n",
           r"row 1, 'val_loss': expected a n"),
    doctor("table of blanks", "t.csv", " \n\t\n", r"t\.csv: is empty"),
    doctor("table of separators alone", "t.csv", ",,,\n,,,\n", r"t\.csv: holds no figure"),
    doctor("table with a null byte", "t.csv", CSV + "4,\0,1\n", r"t\.csv: is no text"),
    doctor("table in gzip", "t.csv", gzip.compress(CSV.encode() * 50), r"t\.csv: is no text"),
    doctor("table in Latin-1 throughout", "t.csv", b"\xe9\xe8,\xe0\n" * 50, r"t\.csv: is no text"),
    doctor("table with a column of a million characters", "t.csv", "x" * 1_000_000 + ",y\n1,2\n",
           r"t\.csv: holds no figure"),
    doctor("table with ten thousand columns", "t.csv", ",".join(f"a{number}" for number in range(10_000)) + "\n",
           r"t\.csv: "),
    doctor("JSON cut off", "h.json", GOOD_HISTORY[:-9], r"h\.json: is damaged"),
    doctor("JSON nested too deep", "h.json", DEEP, r"h\.json: is damaged"),
    doctor("JSON of a number", "h.json", "5", r"h\.json: is damaged"),
    doctor("JSON of numbers", "h.json", "[1, 2]", r"h\.json: expected a history by figure"),
    doctor("JSON with 5000 digits", "h.json", f'{{"val_loss": [{DIGITS}]}}', r"h\.json: is damaged"),
    doctor("JSON of nothing", "h.json", "{}", r"h\.json: holds no figure"),
    doctor("JSON with lists of lists", "h.json", history(val_loss=[[1], [2]]),
           r"h\.json: row 1, 'val_loss': expected a number"),
    doctor("JSON with truths for losses", "h.json", history(val_loss=[True, False]),
           r"row 1, 'val_loss': expected a number"),
    doctor("JSON with points without values", "h.json", history(val_loss=[{"epoch": 1}]),
           r"row 1, 'val_loss': expected a number"),
    doctor("JSON with epochs that are lists", "h.json", history(val_loss=[{"epoch": [1], "value": 2}]),
           r"row 1, the epoch of"),
    doctor("JSON by patient", "h.json", history(**{str(SUBJECT): [1], RARE: [2]}), r"h\.json: holds no figure"),
    read("JSON with a number beyond all", "h.json", '{"val_loss": [6.9, 1e999, ' + "9" * 400 + "]}"),
    read("JSON with NaN", "h.json", '{"val_loss": [6.9, NaN, Infinity]}'),
    read("JSON with a key twice", "h.json", '{"val_loss": [1], "val_loss": [6.9, 6.8]}'),
    doctor("lines of JSON with one that is none", "h.jsonl", '{"loss": 1}\nnothing\n{"loss": 1}\n',
           r"h\.jsonl: is damaged"),
    doctor("log of other things", "t.log", f"patient {SUBJECT} has {RARE}\n" * 50, r"t\.log: holds no figure"),
    doctor("log of one long line", "t.log", "Epoch" * 200_000, r"t\.log: "),
    doctor("log of numbers without an end", "t.log", "loss: " + "9" * 1_000_000, r"t\.log: "),
    doctor("log of brackets and colons", "t.log", "[(:=" * 100_000, r"t\.log: "),
    read("log with colours and bells", "t.log", "\x1b[31mEpoch 1/2 | Train Loss: 6.9 | Val Loss: 6.8\x1b[0m\a\n"),
    read("log with an epoch of 400 digits", "t.log", f"Epoch 1 | Val Loss: 6.8\nEpoch {'9' * 400} | Val Loss: 6.8\n"),
    read("log with a loss beyond all", "t.log", "Epoch 1 | Val Loss: 1e9999\n"),
]  # fmt: skip

HUGE = {"facts": {"total_parameters": 10**400, "trainable_parameters": 10**4, "vocab_size": 10**300}}

FOLDER_CASES = [
    Case("run that is a list", "doctor --json run", r"run\.json: is damaged", make=run_folder("[]")),
    Case("run nested too deep", "doctor --json run", r"run\.json: is damaged", make=run_folder(DEEP)),
    Case("run in UTF-16", "doctor --json run", r"run\.json: is damaged", make=run_folder("{}".encode("utf-16"))),
    Case("run without anything", "doctor --json run", r"run: holds no run", make=run_folder(None)),
    Case("run with huge counts", "doctor --json run", make=run_folder(json.dumps(HUGE)), handled=lambda: None),
    Case("run with facts of other types", "doctor --json run", handled=lambda: None,
         make=run_folder(json.dumps({"facts": [1], "settings": {"model": 5, "training": {"lr": [], "epochs": True}},
                                     "parameters": {"total": "many"}, "status": 7, "patients": {"train": -5.5}}))),
    Case("history that is a list of numbers", "doctor --json run", r"metrics_history\.json: expected a history",
         make=run_folder("{}", "[1]")),
    Case("history that is empty", "doctor --json run", r"metrics_history\.json: is empty", make=run_folder("{}", "")),
    Case("history nested too deep", "doctor --json run", r"metrics_history\.json: is damaged",
         make=run_folder("{}", DEEP)),
    Case("history of binary data", "doctor --json run", r"metrics_history\.json: is no text",
         make=run_folder("{}", b"\0\1" * 500)),
    Case("history beside a damaged run", "doctor --json run", handled=lambda: None,
         make=run_folder("[]", GOOD_HISTORY)),
    Case("a pipe in the place of the run", "doctor --json run", r"run\.json: is damaged",
         make=after(run_folder(None), lambda: instead("run/run.json", "pipe"))),
    Case("a pipe in the place of the history", "doctor --json run", r"metrics_history\.json: is no file",
         make=after(run_folder(), lambda: instead("run/logs/metrics_history.json", "pipe"))),
    Case("a device in the place of the history", "doctor --json run", r"metrics_history\.json: is no file",
         make=after(run_folder(), lambda: instead("run/logs/metrics_history.json", "/dev/zero"))),
    Case("a folder in the place of the history", "doctor --json run", r"metrics_history\.json: is no file",
         make=after(run_folder(), lambda: instead("run/logs/metrics_history.json", "folder"))),
    Case("a link to itself in the place of the history", "doctor --json run", r"run\.json|run: holds no run",
         make=after(run_folder(None), lambda: instead("run/logs/metrics_history.json", "loop"))),
]  # fmt: skip

TARGET_CASES = [
    Case("target that is a pipe", "doctor pipe", r"pipe: is no file", make=lambda: instead("pipe", "pipe")),
    Case("target that is a device without an end", "doctor /dev/zero", r"/dev/zero: is no file"),
    Case("target that is a device without content", "doctor /dev/null", r"/dev/null: is no file"),
    Case("target that is the memory of a process", "doctor /proc/self/mem", r"/proc/self/mem: cannot be read"),
    Case("target that is a link to itself", "doctor loop", r"loop: ", make=lambda: instead("loop", "loop")),
    Case("target of an empty name", ("doctor", ""), r"holds no run|expected"),
    Case("target above the root", "doctor ../../../../../../../../../../nowhere", r"nowhere: no such file or folder"),
    Case("target with a name too long", ("doctor", "x" * 5000), r"cannot be read: File name too long"),
    Case("target with a name that is no text", ("doctor", os.fsdecode(b"\xff\xfe")), r"no such file or folder"),
    Case("target with a line break in its name", ("doctor", "a\nb"), r"a b: no such file or folder"),
    Case("run id in capitals", "doctor " + "A" * 32, r"no such file or folder, and not an MLflow run id"),
    Case("run id of a path", "doctor ../../" + "a" * 26, r"no such file or folder, and not an MLflow run id"),
    Case("run id that nobody has", "doctor " + "a" * 32, r"has no such run"),
    Case("map of nothing", "doctor t.csv --map =", r"--map: expected NAME=COLUMN", make=a_file("t.csv", CSV)),
    Case("map of no figure of ours", "doctor t.csv --map x=val_loss", r"--map x=val_loss: 'x' is no figure",
         make=a_file("t.csv", CSV)),
    Case("map to no column", "doctor t.csv --map val_loss=x", r"--map val_loss=x: t\.csv has no column 'x'",
         make=a_file("t.csv", CSV)),
    Case("parameters beyond all numbers", ("doctor", "t.csv", "--total-parameters", str(10**400)),
         r"'--total-parameters'",
         make=a_file("t.csv", CSV)),
    Case("rule that is none", "doctor --explain ../../etc", r"\.\./\.\./etc"),
    Case("comparison with itself", "compare t.csv t.csv", r"t\.csv", make=a_file("t.csv", CSV)),
    Case("comparison with a pipe", "compare t.csv pipe", r"pipe: is no file",
         make=after(a_file("t.csv", CSV), lambda: instead("pipe", "pipe"))),
    Case("comparison with a link to itself", "compare t.csv loop", r"loop: ",
         make=after(a_file("t.csv", CSV), lambda: instead("loop", "loop"))),
    Case("comparison drawn into a folder", "compare t.csv u.csv --out f.png",
         r"--out: expected a file that ends in \.png",
         make=after(a_file("t.csv", CSV), a_file("u.csv", CSV), lambda: Path("f.png").mkdir())),
    Case("comparison drawn below a file", "compare t.csv u.csv --out t.csv/f.png", r"t\.csv",
         make=after(a_file("t.csv", CSV), a_file("u.csv", CSV))),
    Case("comparison of histories with huge counts", "compare run t.csv", handled=lambda: None,
         make=after(run_folder(json.dumps(HUGE), GOOD_HISTORY), a_file("t.csv", CSV))),
]  # fmt: skip


@each_of(TABLE_CASES)
def test_malformed_tables_and_logs_are_refused_in_one_line_or_handled(
    case: Case, tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(case, tmp_path, capfd, monkeypatch)


@each_of(FOLDER_CASES)
def test_malformed_folders_of_runs_are_refused_in_one_line_or_handled(
    case: Case, tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(case, tmp_path, capfd, monkeypatch)


@each_of(TARGET_CASES)
def test_targets_that_are_no_runs_are_refused_in_one_line(
    case: Case, tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(case, tmp_path, capfd, monkeypatch)


@pytest.mark.parametrize(
    ("content", "refused"),
    [(b"", r"stdin: is empty"), (b"\0" * 500, r"stdin: is no text"), (b"\xff" * 500, r"stdin: is no text"),
     (b"[[[", r"stdin: holds no figure"), (RARE.encode() * 500, r"stdin: holds no figure")],
)  # fmt: skip
def test_a_malformed_standard_input_is_refused_in_one_line(
    content: bytes, refused: str, tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=BytesIO(content)))
    check(Case("standard input", "doctor -", refused), tmp_path, capfd, monkeypatch)


def test_a_standard_input_without_an_end_is_not_read_to_its_end(
    tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Path("/dev/zero").open("rb") as endless:
        monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=endless))
        check(Case("standard input", "doctor -", r"stdin: is no text"), tmp_path, capfd, monkeypatch)


def test_a_pipe_that_the_shell_opened_is_read(
    tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, writing = os.pipe()
    os.write(writing, CSV.encode())
    os.close(writing)
    try:
        case = Case("process substitution", f"doctor --json /dev/fd/{reading}", handled=lambda: None)
        check(case, tmp_path, capfd, monkeypatch)
    finally:
        os.close(reading)
