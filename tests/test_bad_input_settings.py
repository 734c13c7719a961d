"""Malformed settings, flags and variables: one line and exit code 2, or the right handling; never anything else."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from behrt.config import load_experiment

from .bad_input import Case, a_file, after, check, each_of, instead, records
from .small_records import write_meds

PARAMS = "params --json e.yaml"
TRAIN = "train --num-patients 40 --epochs 1"
RUN = "sweep run s.yaml"
PREPARE = ("prepare", "in", "--out", "out")
DIGITS = "9" * 5000

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{after}: &{after} [{', '.join(f'*{before}' for _ in range(9))}]\n"
    for before, after in zip("abcdefghi", "bcdefghij", strict=True)
)
"""A thousand million values in half a kilobyte."""


def yaml_file(content: str | bytes, name: str = "e.yaml") -> Callable[[], None]:
    return a_file(name, content)


def refused_file(name: str, content: str | bytes, refused: str) -> Case:
    """An experiment file that is refused."""
    return Case(name, PARAMS, refused, make=yaml_file(content))


def dropout_is(value: float) -> Callable[[], None]:
    def handled() -> None:
        assert load_experiment(Path("e.yaml")).model.dropout == value

    return handled


GOOD = "model: {dropout: 0.3}\n"

YAML_CASES = [
    Case("experiment with a byte order mark", PARAMS, make=yaml_file("\ufeff" + GOOD), handled=dropout_is(0.3)),
    Case("experiment with line breaks of Windows", PARAMS, make=yaml_file("model:\r\n  dropout: 0.3\r\n"),
         handled=dropout_is(0.3)),
    Case("experiment with a merge key", PARAMS, make=yaml_file("model: {<<: {dropout: 0.3}}\n"),
         handled=dropout_is(0.3)),
    Case("experiment with a number in quotes", PARAMS, make=yaml_file("model: {dropout: '3e-1'}\n"),
         handled=dropout_is(0.3)),
    Case("experiment of comments alone", PARAMS, make=yaml_file("# nothing\n"), handled=dropout_is(0.1)),
    refused_file("experiment in UTF-16", GOOD.encode("utf-16"), r"e\.yaml: cannot be read: not UTF-8 text"),
    refused_file("experiment in Latin-1", "note: caf\xe9\n".encode("latin-1"), r"e\.yaml: cannot be read: not UTF-8"),
    refused_file("experiment with null bytes", "note: a\0b\n", r"e\.yaml: not valid YAML"),
    refused_file("experiment indented with tabs", "model:\n\tdropout: 0.3\n", r"e\.yaml, line 2: not valid YAML"),
    refused_file("experiment with a key twice", "model: {dropout: 0.1}\nmodel: {dropout: 0.2}\n",
                 r"e\.yaml, line 2: model: stands there twice"),
    refused_file("experiment with a setting twice", "model:\n  dropout: 0.1\n  dropout: 0.2\n",
                 r"e\.yaml, line 3: model\.dropout: stands there twice"),
    refused_file("experiment with aliases that multiply", BOMB, r"e\.yaml, line \d: too many values"),
    refused_file("experiment that refers to itself", "model: &a {dropout: *a}\n",
                 r"e\.yaml, line 1: model: refers to itself"),
    refused_file("experiment nested a hundred levels", "note: " + "[" * 100 + "]" * 100,
                 r"e\.yaml, line 1: note: .*too deep"),
    refused_file("experiment nested a hundred thousand levels", "[" * 100_000, r"e\.yaml: is nested too deep"),
    refused_file("experiment with an object of Python", "note: !!python/object/apply:os.system [touch owned]\n",
                 r"e\.yaml, line 1: not valid YAML: could not determine a constructor"),
    refused_file("experiment with a name of Python", "model: !!python/name:os.system\n",
                 r"e\.yaml, line 1: not valid YAML"),
    refused_file("experiment with a tag of nobody", "note: !mine x\n", r"e\.yaml, line 1: not valid YAML"),
    refused_file("experiment with a date that is none", "note: x\nmodel: {dropout: 2024-13-45}\n",
                 r"e\.yaml, line 2: not valid YAML: a value that looks like a date"),
    refused_file("experiment with a truth that is none", "note: !!bool maybe\n", r"e\.yaml, line 1: not valid YAML"),
    refused_file("experiment with a date tag on text", "note: !!timestamp never\n", r"e\.yaml, line 1: not valid YAML"),
    refused_file("experiment with a list for a key", "? [a, b]\n: c\n", r"e\.yaml, line 1: not valid YAML"),
    refused_file("experiment with numbers for keys", "1: {dropout: 0.1}\n", r"e\.yaml: expected sections"),
    refused_file("experiment that is a list", "- model\n", r"e\.yaml: expected sections .* found list"),
    refused_file("experiment that is text", "model dropout\n", r"e\.yaml: expected sections .* found str"),
    refused_file("experiment of two documents", "note: a\n---\nnote: b\n", r"e\.yaml, line 2: not valid YAML"),
    refused_file("experiment of a megabyte", "note: " + "x" * 1_000_001, r"e\.yaml: is too large"),
    refused_file("experiment with a section that is a list", "model: [dropout]\n",
                 r"e\.yaml: model: expected keys and values"),
    refused_file("experiment with not a number", "training: {lr: .nan}\n",
                 r"training\.lr: input should be a finite number"),
    refused_file("experiment with infinity", "training: {lr: .inf}\n",
                 r"training\.lr: input should be a finite number"),
    refused_file("experiment with a number beyond all", "training: {lr: 1e400}\n",
                 r"training\.lr: input should be a finite"),
    refused_file("experiment with true for a number", "training: {epochs: yes}\n",
                 r"training\.epochs: expected a number"),
    refused_file("experiment with true for a fraction", "model: {dropout: true}\n",
                 r"model\.dropout: expected a number"),
    refused_file("experiment with true for positions", "model: {max_position: true}\n",
                 r"model\.max_position: expected a n"),
    refused_file("experiment with half an epoch", "training: {epochs: 1.5}\n",
                 r"training\.epochs: input should be a valid int"),
    refused_file("experiment with base sixty", "training: {epochs: 1:30:00.5}\n", r"training\.epochs: input should be"),
    refused_file("experiment with 5000 digits", f"training: {{epochs: {DIGITS}}}\n",
                 r"e\.yaml, line 1: not valid YAML"),
    refused_file("experiment with 20000 bits", f"training: {{epochs: 0x{'f' * 5000}}}\n",
                 r"training\.epochs: .*digits"),
    refused_file("experiment with a seed beyond 64 bits", f"training: {{seed: {10**30}}}\n",
                 r"training\.seed: input should be"),
    refused_file("experiment with a huge value in a message", f"model: {{model_size: {'x' * 100_000}}}\n",
                 r"model\.model_size: input should be 'small'"),
    refused_file("experiment with a huge key", f"{'x' * 900}: 1\n", r"unknown key|e\.yaml"),
    refused_file("experiment with a model of a million layers", "model: {num_layers: 1000000}\n",
                 r"model\.num_layers: input"),
    refused_file("experiment with null bytes in a path", 'data: {data: "a\\0b"}\n', r"a.*b.*: no such folder"),
    Case("experiment that is a pipe", PARAMS, r"e\.yaml: is no file", make=lambda: instead("e.yaml", "pipe")),
    Case("experiment that is a device", "params /dev/zero", r"/dev/zero: is no file"),
    Case("experiment that is a link to itself", PARAMS, r"e\.yaml: ", make=lambda: instead("e.yaml", "loop")),
    Case("experiment that is the memory of a process", "params /proc/self/mem", r"/proc/self/mem: cannot be read"),
    Case("experiment below a file", "params file/e.yaml", r"file/e\.yaml: ", make=a_file("file", "")),
    Case("experiment with a name too long", ("params", "x" * 300), r"too long"),
]  # fmt: skip


def flags(*words: str, refused: str, make: Callable[[], object] = lambda: None) -> Case:
    shown = " ".join(word[:30] for word in words)
    return Case(f"{shown}".replace("/", "|"), words, refused, make=make)


def train(*words: str, refused: str) -> Case:
    return flags(*TRAIN.split(), *words, refused=refused)


def meds() -> None:
    write_meds(Path("in"), records())


def prepare(*words: str, refused: str) -> Case:
    return flags(*PREPARE, *words, refused=refused, make=meds)


FLAG_CASES = [
    train("--seed", "-1", refused=r"--seed: input should be greater"),
    train("--seed", str(2**64), refused=r"--seed: input should be less"),
    train("--simulation-seed", str(2**64), refused=r"--simulation-seed: input should be less"),
    train("--lr", "inf", refused=r"--lr: input should be a finite number"),
    train("--lr", "1e400", refused=r"--lr: input should be a finite number"),
    train("--lr", "-0.0", refused=r"--lr: input should be greater than 0"),
    train("--dropout", "-nan", refused=r"--dropout: input should be a finite number"),
    train("--dropout", "", refused=r"'--dropout': '' is not a valid float"),
    train("--epochs", "1e2", refused=r"'--epochs': '1e2' is not a valid integer"),
    train("--compile", "--device", "cpu", refused=r"--compile: is for CUDA"),
    train("--epochs", DIGITS, refused=r"--epochs"),
    train("--batch-size", str(10**12), refused=r"--batch-size: input should be less"),
    train("--max-position", str(10**12), refused=r"--max-position: expected at most 100,000"),
    train("--max-position", DIGITS, refused=r"--max-position: expected a number or auto"),
    train("--max-position", "", refused=r"--max-position: expected a number or auto"),
    train("--lora-targets", "", "--use-lora", refused=r"--lora-targets: "),
    train("--experiment", "", refused=r"--experiment: '' is no folder name"),
    train("--experiment", "../../etc", refused=r"--experiment: '../../etc' is no folder name"),
    train("--experiment", "/etc", refused=r"--experiment: '/etc' is no folder name"),
    train("--experiment", "a\nb", refused=r"--experiment: 'a\\nb' is no folder name"),
    train("--experiment", "x" * 101, refused=r"--experiment: 'xxx.* is no folder name"),
    train("--out", "", refused=r"'--out': expected a path, found nothing"),
    train("--out", "/dev/null/run", refused=r"/dev/null/run: "),
    train("--out", "/proc/nobody/run", refused=r"/proc/nobody"),
    train("--init-from", "../../etc", refused=r"\.\./\.\./etc: no such folder|holds no checkpoint"),
    train("--init-from", "", refused=r"--init-from|holds no checkpoint"),
    train("--init-from", "F" * 32, refused=r"no such folder, and not an MLflow run id"),
    train("--preset", "", refused=r"--preset: '' is unknown"),
    flags("train", "--num-patients", str(10**15), refused=r"--num-patients: input should be less"),
    flags("train", "--data", "", refused=r"no dataset\.json|--data"),
    flags("params", "--vocab-size", str(10**15), refused=r"--vocab-size: input should be less"),
    flags("simulate", "--out", "", refused=r"'--out': expected a path, found nothing"),
    flags("simulate", "--out", "cohort", "--patients", str(10**15),
          refused=r"--patients: found \d+, expected 10,000,000"),
    flags("simulate", "--out", "cohort", "--seed", str(2**64), refused=r"'--seed'.* range"),
    flags("simulate", "--out", "cohort", "--seed", "nan", refused=r"'nan' is not a valid integer"),
    flags("simulate", "--out", "loop", refused=r"loop: ", make=lambda: instead("loop", "loop")),
    flags("simulate", "--out", "pipe", refused=r"pipe: is a file", make=lambda: instead("pipe", "pipe")),
    flags("simulate", "--out", "/dev/null/cohort", refused=r"/dev/null"),
    prepare("--include", "(?<=a)b", refused=r"include: .* is not a valid regular expression"),
    prepare("--include", r"(a)\1", refused=r"include: .* is not a valid regular expression"),
    prepare("--exclude", "a{1000}{1000}{1000}", refused=r"exclude: .* is not a valid regular expression"),
    prepare("--exclude", "(" * 5000 + ")" * 5000, refused=r"exclude: .* is not a valid regular expression"),
    prepare("--exclude", "", refused=r"no training patient is left"),
    prepare("--split-seed", str(2**64), refused=r"split_seed: input should be less"),
    prepare("--min-patients", str(10**30), refused=r"min_patients: input should be less"),
    prepare("--min-tokens", str(10**30), refused=r"min_tokens: input should be less"),
    prepare("--visit-gap-hours", "1e300", refused=r"visit_gap_hours: input should be less"),
    prepare("--visit-gap-hours", "inf", refused=r"visit_gap_hours: input should be"),
    prepare("--visit-gap-hours", "nan", refused=r"visit_gap_hours: input should be"),
    prepare("--split", "1e400/0/0", refused=r"--split: expected three percentages"),
    prepare("--split", "-10/100/10", refused=r"--split: expected three percentages"),
    prepare("--split", "", refused=r"--split: expected three percentages"),
    prepare("--split", "/".join(["1"] * 100), refused=r"--split: expected three percentages"),
    prepare("--birth-code", "", refused=r"birth_code: string should have at least 1 character"),
    prepare("--column", "a=b=c", refused=r"--column: expected SOURCE=MEDS"),
    prepare("--icd-digits", str(10**30), refused=r"icd_digits"),
    flags("prepare", "", "--out", "out", refused=r"expected a path, found nothing"),
    Case("a pattern that makes other engines backtrack for ever", (*PREPARE, "--exclude", "(C+)+$|(C|C)*Z"), make=meds,
         handled=lambda: None),
]  # fmt: skip


def sweep_file(space: str, **others: str) -> Callable[[], None]:
    content = f"settings: {{epochs: 1, num_patients: 40}}\nspace: {{{space}}}\n"
    return yaml_file(content + "".join(f"{key}: {value}\n" for key, value in others.items()), "s.yaml")


def refused_sweep(name: str, space: str, refused: str, **others: str) -> Case:
    return Case(f"sweep {name}", RUN, refused, make=sweep_file(space, **others))


LR = "lr: {type: float, low: 1.0e-4, high: 1.0e-2}"

SWEEP_CASES = [
    refused_sweep("to infinity", "lr: {type: float, low: 0.1, high: .inf}",
                  r"s\.yaml, line 2: space\.lr\.high: .*finite"),
    refused_sweep("from not a number", "lr: {type: float, low: .nan, high: 1}",
                  r"s\.yaml, line 2: space\.lr\.low: .*finite"),
    refused_sweep("with bounds that are true", "lr: {type: float, low: true, high: 2}",
                  r"space\.lr\.low: expected a number"),
    refused_sweep("over all floats", "weight_decay: {type: float, low: -1.0e+308, high: 1.0e+308, step: 1}",
                  r"line 2: space\.weight_decay"),
    refused_sweep("in too small steps", "lr: {type: float, low: 0.1, high: 1, step: 1.0e-300}",
                  r"line 2: space\.lr: .*too many"),
    refused_sweep("in no steps", "lr: {type: float, low: 0.1, high: 1, step: 0}", r"line 2: space\.lr\.step"),
    refused_sweep("over huge integers", f"batch_size: {{type: int, low: 1, high: {10**30}}}",
                  r"line 2: space\.batch_size\.high"),
    refused_sweep("over a wide grid", "batch_size: {type: int, low: 1, high: 9000000000}", r"line 2: space\.batch_size",
                  sampler="grid"),
    refused_sweep("with nothing to choose", "dropout: {type: categorical, choices: []}", r"line 2: space\.dropout"),
    refused_sweep("with lists to choose", "dropout: {type: categorical, choices: [[1], [2]]}",
                  r"line 2: space\.dropout\.choices"),
    refused_sweep("with not a number to choose", "dropout: {type: categorical, choices: [.nan, 0.1]}",
                  r"line 2: space\.dropout"),
    refused_sweep("that searches nothing", "", r"s\.yaml, line 2: space: nothing to search"),
    refused_sweep("with a type that is a list", "lr: {type: [float]}", r"line 2: space\.lr"),
    refused_sweep("with a key twice", f"{LR}, {LR}", r"s\.yaml, line 2: space\.lr: stands there twice"),
    refused_sweep("of minus one trials", LR, r"line 3: budget\.trials", budget="{trials: -1}"),
    refused_sweep("of too many hours", LR, r"line 3: budget\.hours", budget="{hours: .inf}"),
    refused_sweep("of a base outside", LR, r"s\.yaml, line 3: base: no experiment", base="../../../nowhere"),
    refused_sweep("of a base with null bytes", LR, r"s\.yaml, line 3: base: no experiment", base='"a\\0b"'),
    refused_sweep("of a base that is a device", LR, r"/dev/zero: is no file", base="/dev/zero"),
    refused_sweep("with a seed beyond 64 bits", LR, r"line 3: seed", seed=str(10**30)),
    refused_sweep("with a sampler that is a number", LR, r"line 3: sampler", sampler="5"),
    Case("sweep with aliases that multiply", RUN, r"s\.yaml, line \d: too many values", make=yaml_file(BOMB, "s.yaml")),
    Case("sweep that is a list", RUN, r"s\.yaml: expected a sweep", make=yaml_file("- lr\n", "s.yaml")),
    Case("sweep that is empty", RUN, r"s\.yaml: space: nothing to search", make=yaml_file("", "s.yaml")),
    Case("sweep that is a pipe", RUN, r"s\.yaml: is no file", make=lambda: instead("s.yaml", "pipe")),
    Case("sweep that is a folder", RUN, r"s\.yaml: is no file", make=lambda: instead("s.yaml", "folder")),
    Case("sweep named to a folder above", f"{RUN} --study ../../etc", r"--study: '\.\./\.\./etc' is no folder name",
         make=sweep_file(LR)),
    Case("storage that is no address", f"{RUN} --storage nonsense", r"--storage: 'nonsense' is no URL",
         make=sweep_file(LR)),
    Case("storage of another kind", f"{RUN} --storage redis://x", r"--storage: redis://x", make=sweep_file(LR)),
    Case("storage with a port that is none", f"{RUN} --storage postgresql://u@h:port/d", r"--storage: .* is no URL",
         make=sweep_file(LR)),
    Case("storage that is text", f"{RUN} --storage sqlite:///s.db", r"s\.db: .*not a database",
         make=after(sweep_file(LR), a_file("s.db", "not a database at all, but text " * 99))),
    Case("storage that is a device", f"{RUN} --storage sqlite:////dev/zero", r"/dev/zero: is no file",
         make=sweep_file(LR)),
    Case("storage that is a pipe", f"{RUN} --storage sqlite:///pipe", r"pipe: is no file",
         make=after(sweep_file(LR), lambda: instead("pipe", "pipe"))),
    Case("storage in memory", f"{RUN} --storage sqlite://", r"--storage: a study in memory", make=sweep_file(LR)),
    Case("storage of an empty name", ("sweep", "run", "s.yaml", "--storage", ""), r"--storage: '' is no URL",
         make=sweep_file(LR)),
    Case("study that nobody began", "sweep status ../../etc --storage sqlite:///none.db", r"none\.db: no such storage"),
]  # fmt: skip

ENVIRONMENT_CASES = [
    Case(
        f"tracking at {uri}".replace("/", "|"), "doctor " + "0" * 32, refused, environment={"MLFLOW_TRACKING_URI": uri}
    )
    for uri, refused in (
        ("nonsense://x", r"MLFLOW_TRACKING_URI: nonsense://x: the store cannot be opened"),
        ("sqlite:////dev/null/x.db", r"MLFLOW_TRACKING_URI|/dev/null"),
        ("sqlite:///", r"MLFLOW_TRACKING_URI|has no such run"),
        ("mssql://user:secret@h/d", r"MLFLOW_TRACKING_URI: mssql://h/d: the store cannot be opened: (?!.*secret)"),
        ("\n", r"MLFLOW_TRACKING_URI"),
        ("http://[::1", r"MLFLOW_TRACKING_URI: http://\[::1: the store cannot be opened"),
    )
]


@each_of(YAML_CASES)
def test_malformed_experiment_files_are_refused_in_one_line_or_handled(
    case: Case, tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(case, tmp_path, capfd, monkeypatch)


@each_of(FLAG_CASES)
def test_flags_out_of_all_range_are_refused_in_one_line(
    case: Case, tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(case, tmp_path, capfd, monkeypatch)


@each_of(SWEEP_CASES)
def test_malformed_sweeps_are_refused_in_one_line(
    case: Case, tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(case, tmp_path, capfd, monkeypatch)


@each_of(ENVIRONMENT_CASES)
def test_a_tracking_address_that_is_nonsense_is_refused_in_one_line(
    case: Case, tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(case, tmp_path, capfd, monkeypatch)


def test_a_number_of_threads_that_is_nonsense_hinders_nothing(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "many", "POLARS_MAX_THREADS": "", "COLUMNS": "wide"}
    command = [sys.executable, "-m", "behrt", "params", "--json"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["total"] > 0
