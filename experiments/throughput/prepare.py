"""What do time and memory of `behrt prepare` cost as the records grow?

`enlarge` repeats the shards of a MEDS data set, each copy with subject ids of its own, so that a subject lies in one
file; `measure` makes such sets of several sizes one after the other, prepares each in a process of its own, and keeps
seconds, the largest resident memory, and whether parts that were prepared apart and joined give the same bytes, in
`prepare.json` beside this file.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import polars as pl

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "prepare.json"
PATH = click.Path(path_type=Path)


def copies_of(source: Path, events: int) -> int:
    """Copies of the data set that hold about so many events, at least one."""
    own = sum(pl.scan_parquet(file).select(pl.len()).collect().item() for file in event_files(source))
    return max(1, round(events / own))


def event_files(source: Path) -> list[Path]:
    return sorted((source / "data").rglob("*.parquet"))


def repeat(source: Path, out: Path, copies: int) -> int:
    """Writes the data set `copies` times, in files of their own; the number of events."""
    splits = pl.read_parquet(source / "metadata" / "subject_splits.parquet")
    step = splits["subject_id"].max() - splits["subject_id"].min() + 1
    events = 0
    for file in event_files(source):
        shard = pl.read_parquet(file)
        events += copies * shard.height
        place = out / file.relative_to(source).parent
        place.mkdir(parents=True, exist_ok=True)
        for copy in range(copies):
            own = shard.with_columns(pl.col("subject_id") + copy * step)
            own.write_parquet(place / f"{copy:04}-{file.name}")
    (out / "metadata").mkdir()
    many = [splits.with_columns(pl.col("subject_id") + copy * step) for copy in range(copies)]
    pl.concat(many).write_parquet(out / "metadata" / "subject_splits.parquet")
    return events


def run(*words: str | Path) -> dict[str, float]:
    """Runs `behrt prepare …`: seconds, those of the processors, and the largest resident memory in GB (10^9 bytes)."""
    command = [sys.executable, "-m", "behrt", "prepare", *map(str, words)]
    began = time.perf_counter()
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        told = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - began
    if process.returncode:
        raise click.ClickException(told.strip().splitlines()[-1])
    per_unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes
    return {
        "seconds": round(seconds, 2),
        "processor_seconds": round(usage.ru_utime + usage.ru_stime, 2),
        "peak_gb": round(usage.ru_maxrss * per_unit / 1e9, 3),
    }


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 of each file."""
    found = {}
    for file in sorted(folder.iterdir()):
        with file.open("rb") as stream:
            found[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found


def measure_size(source: Path, work: Path, millions: float, parts: int, repeats: int) -> dict[str, Any]:
    """One row: the set of this size, prepared at once (the run of the median seconds), and in parts that are joined."""
    copies = copies_of(source, round(millions * 1e6))
    large, whole, joined = work / "meds", work / "whole", work / "joined"
    events = repeat(source, large, copies)
    row: dict[str, Any] = {"copies": copies, "events": events, "files": copies * len(event_files(source))}
    row["load_before"] = round(os.getloadavg()[0], 1)  # of other programs, if it was not idle
    runs = sorted((run(large, "--out", whole, "--overwrite") for _ in range(repeats)), key=lambda one: one["seconds"])
    row |= runs[repeats // 2] | {"fastest_seconds": runs[0]["seconds"], "repeats": repeats}
    row["events_per_second"] = round(events / row["seconds"])
    info = json.loads((whole / "dataset.json").read_text())
    row["subjects"] = info["report"]["subjects_read"]
    row["prepared_gb"] = round(sum(file.stat().st_size for file in whole.iterdir()) / 1e9, 3)
    if parts:
        folders = [work / f"part-{number}" for number in range(1, parts + 1)]
        row["parts"] = [
            run(large, "--shard", f"{number}/{parts}", "--out", folder) for number, folder in enumerate(folders, 1)
        ]
        row["join"] = run("--join", *folders, "--out", joined)
        row["join"]["same_bytes"] = contents(joined) == contents(whole)
    return row


def save(row: dict[str, Any]) -> None:
    """Keeps the row in the place of one of the same size."""
    rows = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    rows = sorted([former for former in rows if former["copies"] != row["copies"]] + [row], key=lambda r: r["events"])
    machine = {"cores": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()}
    versions = {"polars": pl.__version__}
    RESULTS.write_text(json.dumps({"machine": machine | versions, "rows": rows}, indent=1) + "\n")


@click.group()
def cli() -> None:
    """Time and memory of `behrt prepare`."""


@cli.command()
@click.argument("source", type=PATH)
@click.argument("out", type=PATH)
@click.option("--millions", type=float, required=True, help="Events, about.")
def enlarge(source: Path, out: Path, millions: float) -> None:
    """Repeat the shards of the MEDS set SOURCE into OUT."""
    click.echo(f"{repeat(source, out, copies_of(source, round(millions * 1e6))):,} events in {out}")


@cli.command()
@click.argument("source", type=PATH)
@click.option("--work", type=PATH, required=True, help="Folder for the sets and what is made of them; emptied again.")
@click.option("--millions", type=float, multiple=True, default=(2.2, 10, 30, 100), show_default=True)
@click.option("--parts", type=int, default=3, show_default=True, help="Prepare in so many parts, too; 0: do not.")
@click.option("--repeats", type=click.IntRange(1), default=1, show_default=True, help="Of preparing at once.")
def measure(source: Path, work: Path, millions: tuple[float, ...], parts: int, repeats: int) -> None:
    """Prepare sets of several sizes, made of the MEDS set SOURCE."""
    for size in millions:
        place = work / f"{size:g}-million"
        place.mkdir(parents=True)
        try:
            row = measure_size(source, place, size, parts, repeats)
        finally:
            shutil.rmtree(place, ignore_errors=True)
        save(row)
        click.echo(json.dumps(row))


if __name__ == "__main__":
    cli()
