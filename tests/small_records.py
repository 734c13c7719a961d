"""Small records for the tests: tables written by hand, or drawn at random."""

from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl

BIRTH, DEATH = "MEDS_BIRTH", "MEDS_DEATH"


def day(number: float) -> datetime:
    """Noon of the day with this number, counted from 1 January 2020."""
    return datetime(2020, 1, 1, 12) + timedelta(days=number)


def events(*rows: tuple, visit_id: bool = False) -> pl.DataFrame:
    """Events of rows `(subject, time, code[, value[, visit_id]])`."""
    full = [(*row, *[None] * (5 - len(row))) for row in rows]
    frame = pl.DataFrame(
        full,
        schema={
            "subject_id": pl.Int64,
            "time": pl.Datetime("us"),
            "code": pl.String,
            "numeric_value": pl.Float32,
            "visit_id": pl.String,
        },
        orient="row",
    )
    return frame if visit_id else frame.with_columns(pl.lit(None, dtype=pl.String).alias("visit_id"))


def random_events(subjects: range, seed: int, codes: int = 12) -> pl.DataFrame:
    """Random histories with every oddity that cleaning knows, in random order."""
    generator = np.random.default_rng(seed)
    rows: list[tuple] = []
    for subject in subjects:
        rows.append((subject, datetime(1950 + subject % 40, 3, 4), BIRTH, None, None))
        if generator.random() < 0.3:
            hour = int(generator.integers(0, 2)) * 7
            rows.append((subject, datetime(2020, 2, 20, hour), DEATH, None, None))
        if generator.random() < 0.5:
            rows.append((subject, None, "GENDER//F", None, None))
        for _ in range(int(generator.integers(0, 30))):
            code = f"C{int(generator.integers(codes)):02}" if generator.random() > 0.05 else None
            time = datetime(2020, 1, 1) + timedelta(hours=int(generator.integers(0, 60)) * 24 + 8)
            if generator.random() < 0.03:
                time = datetime(1900, 1, 1)
            visit = str(int(generator.integers(3))) if generator.random() < 0.4 else None
            value = float(generator.integers(5)) if generator.random() < 0.5 else None
            rows.append((subject, time, code, value, visit))
    frame = events(*rows, visit_id=True)
    return frame[generator.permutation(len(frame)).tolist()]


def write_meds(folder: Path, *shards: pl.DataFrame, splits: dict[int, str] | None = None, ordered: bool = True) -> Path:
    """A MEDS data set with one file per shard; returns its folder."""
    (folder / "data").mkdir(parents=True)
    for number, shard in enumerate(shards):
        frame = shard.sort("subject_id", "time", maintain_order=True) if ordered else shard
        frame.write_parquet(folder / "data" / f"{number}.parquet")
    if splits is not None:
        (folder / "metadata").mkdir()
        pl.DataFrame(
            {"subject_id": list(splits), "split": list(splits.values())},
            schema={"subject_id": pl.Int64, "split": pl.String},
        ).write_parquet(folder / "metadata" / "subject_splits.parquet")
    return folder


def plain_events(subjects: int = 20, codes: int = 4, per_subject: int = 6) -> pl.DataFrame:
    """Subjects from 1, born in 1950, one event a month; nothing odd."""
    rows: list[tuple] = []
    for subject in range(1, subjects + 1):
        rows.append((subject, datetime(1950, 1, 1), BIRTH))
        rows += [(subject, day(30 * number), f"C{(subject + number) % codes}") for number in range(per_subject)]
    return events(*rows)
