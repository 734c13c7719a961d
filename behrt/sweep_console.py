"""What does a person see of a study while it goes on, and afterwards?"""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from behrt.sweep.summary import StudySummary
from behrt.sweep.trials import TrialRecord, TrialState
from behrt.terminal import best_mark

ROWS_SHOWN = 15

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
    ended = record.ended or ("worker died" if record.state is TrialState.FAILED else "")
    next_number = summary.replaced_by.get(record.number)
    if record.is_lost and next_number is not None:
        return f"{ended}, continued as {next_number}"
    if record.retry_of is not None:
        return f"{ended}{', ' if ended else ''}continues {record.retry_of}"
    return ended


def heading(summary: StudySummary) -> str:
    """How far the study has come, in one line."""
    counts = summary.tally
    parts = [f"Study {summary.name}: {counts.finished}/{summary.asked} trials"]
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


def trials_table(summary: StudySummary, *, rows: int | None = ROWS_SHOWN, mark: str = "*") -> Table:
    """A row a trial, the latest last; `rows` of them, or all."""
    shown = summary.records if rows is None else summary.records[-rows:]
    names = sorted({name for record in shown for name in record.params})
    table = Table(title=heading(summary), title_justify="left", title_style="")
    left_out = len(summary.records) - len(shown)
    if left_out:
        table.caption, table.caption_justify = f"{left_out} earlier ones not shown", "left"
    table.add_column("trial", justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("epochs", justify="right", no_wrap=True)
    table.add_column(summary.objective, justify="right", no_wrap=True)
    for name in names:
        table.add_column(name, justify="right", overflow="fold")
    table.add_column("why it ended", overflow="fold")
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
        self._is_first = True

    def show(self, summary: StudySummary) -> None:
        """Brings what is shown up to date."""
        if self._console.is_terminal:
            if self._live is None:
                self._live = Live(console=self._console, auto_refresh=False)
                self._live.start()
            self._live.update(trials_table(summary, mark=self._mark), refresh=True)
            return
        ended = [record for record in summary.records if record.state not in (TrialState.RUNNING, TrialState.WAITING)]
        if self._is_first:  # of a study that goes on, the old ones are not told again
            self._told = {record.number for record in ended}
            self._is_first = False
            self._console.print(heading(summary), markup=False)
        for record in ended:
            if record.number not in self._told:
                self._told.add(record.number)
                self._console.print(trial_line(record, summary, mark=self._mark), markup=False)

    def close(self) -> None:
        """Leaves the last state on the screen."""
        if self._live is not None:
            self._live.stop()
