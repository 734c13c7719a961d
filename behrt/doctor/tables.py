"""What does a file with the figures of a run say, whatever tool wrote it?

A history or rows in JSON, a table of epochs (CSV), or printed lines. Its form is found out from its contents.
"""

from __future__ import annotations

import io
import json
import logging
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from behrt.config import UserError, refuse_what_is_no_file
from behrt.doctor.curves import Curve
from behrt.doctor.facts import RunFacts, known_facts
from behrt.doctor.logs import Point, Points, curves_of, figure_named, names_of, plain, read_lines, shown
from behrt.history import EPOCH_FIGURES

log = logging.getLogger(__name__)

OPENED = ("/dev/fd/", "/proc/self/fd/", "/dev/stdin")
"""Pipes that the shell has opened, as in `behrt doctor <(zcat log.gz)`; others may have no writer, and never end."""

UTF_16 = (b"\xff\xfe", b"\xfe\xff")
"""How a text begins that is UTF-16: PowerShell redirects its output so."""


def read_text_file(path: Path) -> bytes:
    """The file, or only its beginning where that is binary: checkpoints are large."""
    if not str(path).startswith(OPENED):
        refuse_what_is_no_file(path)
    with path.open("rb") as file:
        return read_text_stream(file)


def read_text_stream(file: BinaryIO) -> bytes:
    """All that can be read, or only the beginning where that is binary: a device may have no end."""
    start = file.read(65536)
    is_binary = b"\0" in start and not start.startswith(UTF_16)
    return start if is_binary else start + file.read()


def read_log(data: bytes, *, where: str, columns: Mapping[str, str]) -> RunFacts:
    """The facts of a log that any tool may have written: JSON, a table or text, told apart by their contents.

    Args:
        where: the file, for errors; `.json`, `.jsonl`, `.csv` and `.tsv` say what it must be.
        columns: our name of a figure, or `epoch`, to the log's own.

    Raises:
        UserError: empty, binary or damaged; a value that is no number; nothing in it that is known; a wrong `columns`.
    """
    text = decode(data, where)
    suffix = Path(where).suffix.lower()
    facts: dict[str, Any] = {}
    value = parse_json(text)
    if value is not None:
        points = points_of_json(value, where, columns)
    elif suffix in (".json", ".jsonl", ".ndjson"):
        raise UserError(f"{where}: is damaged; expected JSON, or one JSON object a line")
    elif separator := table_separator(text, columns, is_table=suffix in (".csv", ".tsv")):
        points = points_of_table(text, separator, where, columns)
    else:
        points, facts = read_lines(text)
    curves = curves_of(points, where, columns)
    if not curves and not facts:
        raise nothing_known(points, where)
    return RunFacts(curves=curves, finished=_is_over(curves, facts), **known_facts(facts))


def _is_over(curves: Mapping[str, Curve], facts: Mapping[str, Any]) -> bool | None:
    """Whether a training has ended, as far as its log tells; None where it stands before its last epoch."""
    epochs, last = facts.get("epochs"), max((curve.epochs[-1] for curve in curves.values() if len(curve)), default=0)
    return None if epochs and last < epochs and not facts.get("stopped_early") else True


def decode(data: bytes, where: str) -> str:
    """The text of a file, or `UserError` where it is none; UTF-8, or UTF-16 with its mark."""
    text = data.decode("utf-16" if data.startswith(UTF_16) else "utf-8-sig", errors="replace")
    if not text.strip():
        raise UserError(f"{where}: is empty; expected a training log: text, CSV or JSON")
    if "\0" in text or text.count("\ufffd") > len(text) // 20:
        raise UserError(f"{where}: is no text; expected a training log: text, CSV or JSON")
    return text


def nothing_known(names: Collection[str], where: str) -> UserError:
    """What is said of a record that has names, but no figure under any of them."""
    return UserError(
        f"{where}: holds no figure of a training; found {shown(names)}; recognised are {', '.join(EPOCH_FIGURES)} and "
        "their usual synonyms; name others with --map NAME=COLUMN"
    )


def parse_json(text: str) -> Any | None:
    """The JSON object or list of a text, or the list of its lines where each is an object; None where it is neither.

    The last of several lines may be cut off, as where a run is still writing.
    """
    if text.lstrip()[:1] not in ("{", "["):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    lines = [line for line in text.splitlines() if line.strip()]
    rows: list[Any] = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError):
            if len(rows) < max(len(lines) - 1, 1):
                return None
            log.warning("the last of %d lines of JSON is cut off, and left out", len(lines))
    return rows if all(isinstance(row, dict) for row in rows) else None


def points_of_json(value: Any, where: str, columns: Mapping[str, str]) -> Points:
    """The points of any of these: `{"loss": [{"epoch": 1, "value": 6.9}, …]}`, the history of a run of ours;
    `{"loss": [6.9, …]}` as Keras keeps it; `[{"epoch": 1, "loss": 6.9}, …]`; `{"log_history": [{…}, …]}` as
    Hugging Face's `trainer_state.json` has it.
    """
    if isinstance(value, dict) and isinstance(value.get("log_history"), list):
        value = value["log_history"]
    if isinstance(value, dict):
        lists = {name: items for name, items in value.items() if isinstance(items, list)}
        return _points_of_lists(lists, columns) if lists else points_of_rows([value], where, columns)
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        found = "a list of other things" if isinstance(value, list) else type(value).__name__
        raise UserError(f"{where}: expected a history by figure, or a list of rows with named values; found {found}")
    return points_of_rows(value, where, columns)


def _points_of_lists(lists: Mapping[str, Sequence[Any]], columns: Mapping[str, str]) -> Points:
    numbers: Sequence[Any] = next((lists[name] for name in names_of("epoch", lists, columns)), ())
    points: Points = {}
    for name, items in lists.items():
        epochs = numbers if len(numbers) == len(items) else range(1, len(items) + 1)
        points[name] = [
            Point(row, *(_point_of_history(item) if isinstance(item, dict) else (epoch, item)))
            for row, (epoch, item) in enumerate(zip(epochs, items, strict=True), 1)
        ]
    return points


def _point_of_history(item: Mapping[str, Any]) -> tuple[object, object]:
    """Epoch and value; a null is a value that was not finite, and counts as one even beside a number."""
    value = item.get("value", "no value")
    return item.get("epoch", item.get("step", "no epoch")), math.nan if value is None else value


def points_of_rows(rows: Sequence[Mapping[str, Any]], where: str, columns: Mapping[str, str]) -> Points:
    """The points of rows of named values, numbered from 1 where they have no epoch; optimizer steps by their order."""
    names = dict.fromkeys(name for row in rows for name in row)
    epoch_name = next(iter(names_of("epoch", names, columns)), None)
    points: Points = {name: [] for name in names}
    without = 0
    for place, row in enumerate(rows, 1):
        epoch = place if epoch_name is None else row.get(epoch_name)
        if epoch is None:
            without += 1
            continue
        for name, value in row.items():
            points[name].append(Point(place, epoch, value))
    if without:
        log.warning("%s: %d of %d rows have no epoch, and are left out", where, without, len(rows))
    counts_steps = epoch_name is not None and not plain(epoch_name).endswith(("epoch", "epochs"))
    return _numbered(points) if counts_steps and "epoch" not in columns else points


def _numbered(points: Points) -> Points:
    """Points whose epochs are optimizer steps, with the number of each distinct step in its place."""
    steps = {point.epoch for rows in points.values() for point in rows}
    if not all(type(step) in (int, float) and abs(float(str(step))) < math.inf for step in steps):
        return points  # what is no number is refused where curves are made
    numbers = {step: number for number, step in enumerate(sorted(steps, key=lambda step: float(str(step))), 1)}
    return {name: [point._replace(epoch=numbers[point.epoch]) for point in rows] for name, rows in points.items()}


def table_separator(text: str, columns: Mapping[str, str], *, is_table: bool) -> str | None:
    """What separates the columns of a table: a tab, a semicolon or a comma; None where the text is no table.

    Args:
        is_table: whether it must be one; else its first line has to name a known figure.
    """
    header = next(line for line in text.splitlines() if line.strip())
    separator = max("\t;,", key=header.count)
    cells = [cell.strip().strip('"') for cell in header.split(separator)]
    if is_table or (len(cells) > 1 and any(figure_named(cell, columns) for cell in cells)):
        return separator
    return None


def points_of_table(text: str, separator: str, where: str, columns: Mapping[str, str]) -> Points:
    """The points of a table whose first row names its columns; blank cells are left out.

    Raises:
        UserError: rows that do not fit the header, or none; two columns of one name.
    """
    import pandas as pd

    try:
        table = pd.read_csv(
            io.StringIO(text), sep=separator, header=None, dtype=str, keep_default_na=False, skipinitialspace=True
        ).fillna("")
    except ValueError as error:  # a ParserError names the line
        raise UserError(f"{where}: is no table: {' '.join(str(error).split())[:120]}") from None
    names, *cells = table.to_numpy().tolist()
    names = [str(name).strip() for name in names]
    repeated = {name for name in names if names.count(name) > 1 and figure_named(name, columns)}
    if repeated:
        raise UserError(f"{where}: has two columns {min(repeated)!r}; rename one")
    # where semicolons separate columns, a comma is often the decimal one
    rows = [
        {
            name: number_in_cell(cell, decimal="," if separator == ";" else ".")
            for name, cell in zip(names, row, strict=True)
            if cell.strip() not in ("", "NA", "N/A")
        }
        for row in cells
    ]
    if not rows:
        raise UserError(f"{where}: has a header and no rows; expected one row an epoch")
    return {**{name: [] for name in names}, **points_of_rows(rows, where, columns)}


def number_in_cell(cell: str, *, decimal: str = ".") -> float | str | None:
    """The number that a cell holds, None for null, or the cell itself where it holds something else.

    >>> number_in_cell("6.9"), number_in_cell("6,9", decimal=","), number_in_cell("null"), number_in_cell("1_0")
    (6.9, 6.9, None, '1_0')
    """
    text = cell.strip()
    if text.lower() in ("null", "none"):
        return None
    try:
        return float(text.replace(decimal, ".")) if "_" not in text else text
    except ValueError:
        return text
