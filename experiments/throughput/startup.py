"""How long does a person wait for help, and for the first step of a training?

`measure` starts real processes and watches them from outside. Help is started again and again; trainings run on
prepared records, in a folder of their own, behind a terminal: what they print there tells when a stage is over, and the
bar that counts steps when the first one is. They are interrupted after it. Wall times are those of a person, and noise
where the machine does other work; CPU times (user and system, all threads) are beside them. The rows go to
`startup.json` beside this file; `table` prints them.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import pty
import re
import resource
import select
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "startup.json"

HELPS = ("--help", "train --help", "prepare --help", "sweep run --help")
IMPORTS = {
    "imports: torch and behrt": (
        "from behrt.imports import first_import\nwith first_import('torch'): import behrt.console, behrt.pretrain"
    ),
    "imports: MLflow and its store": (
        "from behrt.imports import first_import\n"
        "with first_import('mlflow'): import mlflow.store.tracking.sqlalchemy_store"
    ),
}
MARKS = {
    "records, baselines and MLflow's run": re.compile(rb"Experiment "),
    "pre-flight": re.compile(rb"predicted "),
    "first step": re.compile(rb"Epoch 1 [^\r\n]*?\d+/\d"),
}
"""What a training prints when a stage is over, in their order; all imports are part of the first."""
ESCAPES = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]")
PATIENCE = 120.0
"""Seconds that a training is waited for."""


def behrt(arguments: str) -> list[str]:
    return [sys.executable, "-m", "behrt", *arguments.split()]


def timed(command: list[str]) -> tuple[float, float]:
    """Wall and CPU seconds of a process from its start to its end."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def cpu_so_far(process: int) -> float | None:
    """CPU seconds of a running process; None where the system does not say (macOS)."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def training(data: Path, folder: Path, arguments: list[str]) -> dict[str, tuple[float, float | None]]:
    """Starts a training in `folder` and ends it after its first step: wall and CPU seconds at which each stage is over.

    Raises:
        click.ClickException: it ended by itself, or took too long.
    """
    terminal, its_end = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "160"}
    command = [*behrt("train --epochs 1"), "--data", str(data), *arguments]
    started = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=its_end, stdin=subprocess.DEVNULL
    )
    os.close(its_end)
    printed, over = b"", {}
    try:
        for stage, mark in MARKS.items():
            while not mark.search(ESCAPES.sub(b"", printed)):
                left = started + PATIENCE - time.perf_counter()
                if process.poll() is not None or not select.select([terminal], [], [], max(0.0, left))[0]:
                    said = ESCAPES.sub(b"", printed).decode(errors="replace")[-500:]
                    raise click.ClickException(f"no training got to: {stage}; it said: {said}")
                printed += os.read(terminal, 65536)
            over[stage] = (time.perf_counter() - started, cpu_so_far(process.pid))
        return over
    finally:
        process.send_signal(signal.SIGINT)
        deadline = time.monotonic() + PATIENCE
        while process.poll() is None and time.monotonic() < deadline:
            if select.select([terminal], [], [], 0.1)[0]:
                try:
                    os.read(terminal, 65536)  # or it waits for somebody to read
                except OSError:  # it has closed its end
                    break
        process.wait(PATIENCE)
        os.close(terminal)


def row(what: str, seconds: list[tuple[float, float | None]]) -> dict[str, Any]:
    """Median and least of some repetitions."""
    walls, cpus = [wall for wall, _ in seconds], [cpu for _, cpu in seconds if cpu is not None]
    figures: dict[str, Any] = {"what": what, "repetitions": len(seconds)}
    for name, values in (("wall", walls), ("cpu", cpus)):
        if values:
            figures |= {
                f"{name}_median": round(statistics.median(values), 3),
                f"{name}_least": round(min(values), 3),
            }
    return figures


def trainings(data: Path, repeats: int, arguments: list[str], *, first_in_folder: bool) -> list[dict[str, Any]]:
    """A row a stage, of trainings that find MLflow's store there, or are the first in their folder and make it."""
    found: dict[str, list[tuple[float, float | None]]] = {stage: [] for stage in MARKS}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if not first_in_folder:
            training(data, folder, arguments)
        for _ in range(repeats):
            shutil.rmtree(folder / "experiments", ignore_errors=True)
            if first_in_folder:
                shutil.rmtree(folder / "mlruns", ignore_errors=True)
            for stage, seconds in training(data, folder, arguments).items():
                found[stage].append(seconds)
    kind = "first run in a folder" if first_in_folder else "a later run"
    return [row(f"{kind}: until the end of {stage}", seconds) for stage, seconds in found.items()]


@click.group()
def main() -> None:
    """Time help and the first step of a training."""


@main.command()
@click.option("--data", type=click.Path(path_type=Path, exists=True, file_okay=False), required=True)
@click.option("--repeats", type=click.IntRange(min=1), default=5, show_default=True, help="Of each training.")
@click.option("--help-repeats", type=click.IntRange(min=1), default=15, show_default=True, help="Of each help.")
@click.argument("arguments", nargs=-1)
def measure(data: Path, repeats: int, help_repeats: int, arguments: tuple[str, ...]) -> None:
    """Start processes, and keep how long they took; ARGUMENTS (after --) are handed to `behrt train`."""
    info = json.loads((data / "dataset.json").read_text(encoding="utf-8"))
    timed(behrt("--help"))  # warms the file caches
    rows = [row(f"behrt {help}", [timed(behrt(help)) for _ in range(help_repeats)]) for help in HELPS]
    rows += [row(what, [timed([sys.executable, "-c", code]) for _ in range(repeats)]) for what, code in IMPORTS.items()]
    for first_in_folder in (False, True):
        rows += trainings(data.resolve(), repeats, list(arguments), first_in_folder=first_in_folder)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "mlflow", "polars", "pydantic")}
    result = {
        "records": {
            "name": info["name"],
            "patients": {name: info["splits"][name]["patients"] for name in info["splits"]},
        },
        "arguments": list(arguments),
        "machine": {"cores": os.cpu_count(), "python": platform.python_version(), **versions},
        "load": round(os.getloadavg()[1], 2) if hasattr(os, "getloadavg") else None,
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print_rows(result)


@main.command()
def table() -> None:
    """Print what was measured last, as Markdown."""
    print_rows(json.loads(RESULTS.read_text(encoding="utf-8")))


def print_rows(result: dict[str, Any]) -> None:
    lines = ["| what | wall, median | wall, least | CPU, median | CPU, least |", "|---|---|---|---|---|"]
    for figures in result["rows"]:
        names = ("wall_median", "wall_least", "cpu_median", "cpu_least")
        seconds = [f"{figures[name]:.2f} s" if name in figures else "" for name in names]
        lines.append(f"| {figures['what']} | {' | '.join(seconds)} |")
    click.echo("\n".join(lines))


if __name__ == "__main__":
    main()
