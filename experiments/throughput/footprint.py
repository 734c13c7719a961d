"""How much memory does a process take, and what does a training cost, seen from outside?"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parents[2]


def memory_mib(field: str, process: int) -> float:
    """A figure of a process from `/proc` (Linux): `VmHWM` is the most that was resident, `RssAnon` what is now, files
    that are mapped left out. 0 where the process is gone.

    `ru_maxrss` would not do: a child begins with its parent's.
    """
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:")), 0.0)


def environment() -> dict[str, str]:
    """This checkout, whatever is installed; runs are tracked in the working folder."""
    inherited = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    return {**inherited, "PYTHONPATH": str(ROOT)}


def train_on(records: Path, *, epochs: int) -> dict[str, float]:
    """One `behrt train`, watched from outside."""
    from behrt.history import read_history

    with tempfile.TemporaryDirectory(prefix="behrt-flat-") as folder:
        # patience and the doctor must not end it early
        flags = ["--epochs", str(epochs), "--early-stopping-patience", "0", "--stop-on", "never", "--out", "run"]
        words = [sys.executable, "-m", "behrt", "train", "--data", str(records), *flags]
        with (Path(folder) / "log").open("w") as log:
            process = subprocess.Popen(words, cwd=folder, env=environment(), stdout=log, stderr=log)
            peak = anonymous = 0.0
            try:
                while process.poll() is None:
                    peak = max(peak, memory_mib("VmHWM", process.pid))
                    anonymous = max(anonymous, memory_mib("RssAnon", process.pid))
                    time.sleep(0.05)
            finally:
                process.kill()  # where this command is stopped, so is the training
                process.wait()
        if process.returncode:
            raise click.ClickException(f"behrt train ended with exit code {process.returncode}")
        rates = [point["value"] for point in read_history(Path(folder) / "run")["tokens_per_second"]]
    return {
        "microseconds_per_token": round(1e6 / statistics.median(rates), 3),
        "peak_mib": round(peak, 1),
        "anonymous_mib": round(anonymous, 1),  # of this, none is a file of records that is mapped
        "records_mib": round(sum(file.stat().st_size for file in records.iterdir()) / 2**20, 1),
    }
