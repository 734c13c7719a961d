"""What does a person see of a study while it goes on, and afterwards?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from behrt.config import UserError
from behrt.history import read_run
from behrt.sweep.summary import StudySummary
from behrt.sweep.trials import DIED, TrialRecord, TrialState
from behrt.terminal import best_mark

LINES_AROUND = 8
"""Of the live table: heading, borders, caption, and a line for the prompt."""
NARROWEST = 62
"""Columns of the table without parameters."""
LINES = ("chance", "unigram", "floor")

STATE_STYLES = {
    TrialState.RUNNING: "cyan",
    TrialState.COMPLETE: "green",
    TrialState.PRUNED: "yellow",
    TrialState.FAILED: "red",
    TrialState.WAITING: "dim",
}


def short(value: Any) -> str:
    """A parameter as a table shows it.

    >>> short(0.00312345), short(True), short(16)
    ('0.00312', 'yes', '16')
    """
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def why(record: TrialRecord, summary: StudySummary) -> str:
    """Why the trial ended, and which one continues it."""
    ended = record.ended or (DIED if record.state is TrialState.FAILED else "")
    next_number = summary.replaced_by.get(record.number)
    if record.is_lost and next_number is not None:
        return f"{ended}, continued as {next_number}"
    if record.retry_of is not None:
        return f"{ended}{', ' if ended else ''}continues {record.retry_of}"
    return ended


def heading(summary: StudySummary) -> str:
    """How far the study has come, in one line."""
    counts = summary.tally
    asked = f"/{summary.asked}" if counts.finished <= summary.asked else ""
    parts = [f"Study {summary.name}: {counts.finished}{asked} trials"]
    parts += [
        f"{count} {name}"
        for name, count in (
            ("running", counts.running),
            ("complete", counts.complete),
            ("pruned", counts.pruned),
            ("failed", counts.failed),
            ("to be continued", len(counts.to_retry) + counts.waiting),
        )
        if count
    ]
    parts.append(f"{counts.trained_epochs:,} epochs")
    if summary.best is not None:
        parts.append(f"best {summary.objective} {summary.best.best:.4f} (trial {summary.best.number})")
    return ", ".join(parts)


def trials_table(summary: StudySummary, *, width: int, rows: int | None = None, mark: str = "*") -> Table:
    """A row a trial, in the order of their numbers.

    Args:
        width: columns of the terminal; where the parameters do not fit, they are left out.
        rows: so many at the most: those that run, the best one, and then the latest. All, and long texts in full, if
            None.
    """
    shown = summary.records if rows is None else _most_telling(summary, rows)
    names = sorted({name for record in shown for name in record.params})
    notes = []
    if len(shown) < len(summary.records):
        notes.append(f"{len(summary.records) - len(shown)} more; all: behrt sweep status {summary.name}")
    if names and width < NARROWEST + sum(max(len(name), 8) + 3 for name in names):
        names = []
        notes.append("too narrow for the parameters; they are in --json")
    table = Table(title=heading(summary), title_justify="left", title_style="")
    if notes:
        table.caption, table.caption_justify = "; ".join(notes), "left"
    table.add_column("trial", justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("epochs", justify="right", no_wrap=True)
    table.add_column(summary.objective, justify="right", no_wrap=True)
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("why it ended", no_wrap=rows is not None, overflow="fold" if rows is None else "ellipsis")
    for record in shown:
        is_best = summary.best is not None and record.number == summary.best.number
        value = "" if record.best is None else f"{record.best:.4f}"
        table.add_row(
            str(record.number),
            Text(record.state.value, style=STATE_STYLES[record.state]),
            f"{record.epochs}/{summary.epochs_each}",
            f"{value} {mark}" if is_best else value,
            *(short(record.params[name]) if name in record.params else "" for name in names),
            Text(why(record, summary)),
        )
    return table


def _most_telling(summary: StudySummary, rows: int) -> list[TrialRecord]:
    """Trials for which there is room: first those that run, then the best one, then the latest."""
    best = None if summary.best is None else summary.best.number

    def rank(record: TrialRecord) -> tuple[bool, bool, int]:
        return (record.state.has_ended, record.number != best, -record.number)

    return sorted(sorted(summary.records, key=rank)[:rows], key=lambda record: record.number)


def context(summary: StudySummary) -> str | None:
    """What the best trial's loss is to be read against, in one line; None where its folder is not at hand."""
    folder = None if summary.best is None else summary.best.folder
    try:
        run = None if folder is None else read_run(Path(folder))
    except UserError:
        return None
    if run is None:
        return None
    lines = [f"{name} {run['baselines'][f'{name}_loss']:.4f}" for name in LINES if f"{name}_loss" in run["baselines"]]
    gap = (
        ""
        if run["closed_gap"] is None
        else f"; trial {run['trial']['number']} closes {run['closed_gap']:.1%} of the gap"
    )
    return f"val_loss: {', '.join(lines)}{gap}; its verdict: {run['verdict']}"


def trial_line(record: TrialRecord, summary: StudySummary, *, mark: str) -> str:
    """One trial that has ended, for a log."""
    value = "" if record.best is None else f": {summary.objective} {record.best:.4f}"
    is_best = summary.best is not None and record.number == summary.best.number
    params = ", ".join(f"{name} {short(value)}" for name, value in sorted(record.params.items()))
    return (
        f"Trial {record.number} {record.state} after {record.epochs} epochs ({why(record, summary)}){value}"
        f"{f' {mark}' if is_best else ''} | {params}"
    )


class StudyView:
    """Shows a study as it goes on: a live table on a terminal, else a line for each trial that has ended."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._mark = best_mark(console.encoding)
        self._told: set[int] = set()
        self._live: Live | None = None
        self.times_shown = 0

    def show(self, summary: StudySummary) -> None:
        """Brings what is shown up to date."""
        self.times_shown += 1
        if self._console.is_terminal:
            if self._live is None:
                self._live = Live(console=self._console, auto_refresh=False)
                self._live.start()
            room = max(3, self._console.height - LINES_AROUND)
            table = trials_table(summary, width=self._console.width, rows=room, mark=self._mark)
            self._live.update(table, refresh=True)
            return
        ended = [record for record in summary.records if record.state.has_ended]
        if self.times_shown == 1:  # of a study that goes on, the old ones are not told again
            self._told = {record.number for record in ended}
            self._console.print(heading(summary), markup=False, soft_wrap=True)
        for record in ended:
            if record.number not in self._told:
                self._told.add(record.number)
                self._console.print(trial_line(record, summary, mark=self._mark), markup=False, soft_wrap=True)

    def close(self) -> None:
        """Leaves the last state on the screen."""
        if self._live is not None:
            self._live.stop()
