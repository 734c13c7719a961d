"""What does a person see in the terminal while a command works, and when it is done?

Everything here goes to stderr. Progress bars are drawn only where stderr is a terminal; lines are written either way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from behrt.batch_size import FEWEST_STEPS, BatchChoice
from behrt.comparison import Comparison, shown
from behrt.doctor.checkup import Checkup
from behrt.doctor.diagnosis import Diagnosis, evidence_text
from behrt.doctor.facts import RunFacts
from behrt.doctor.rule import Finding, Severity
from behrt.hardware import DeviceReport
from behrt.history import Baselines, EpochRecord
from behrt.parameters import ParameterCounts
from behrt.prepare import report_rows
from behrt.run_report import Listener, RunResult, RunStart
from behrt.terminal import best_mark

if TYPE_CHECKING:
    from rich.progress import TaskID


class ProgressBar:
    """One bar with one description at a time; silent where there is no terminal."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task: TaskID | None = None
        self._description = ""

    def show(self, description: str, done: int, total: int) -> None:
        """Draws the bar at `done` of `total`; another description begins a new bar."""
        if self._task is None or description != self._description:
            self.clear()
            self._description = description
            self._task = self._progress.add_task(description, total=total)
            self._progress.start()
        self._progress.update(self._task, completed=done, total=total)

    def clear(self) -> None:
        """Takes the bar off the screen."""
        if self._task is not None:
            self._progress.remove_task(self._task)
            self._progress.stop()
            self._task = None


def batch_lines(choice: BatchChoice) -> str:
    """What `--batch-size auto` has found."""
    found = [
        f"{timing.patients}: "
        + ("no memory" if timing.patients_per_second is None else f"{timing.patients_per_second:,.0f}")
        for timing in choice.timings
    ]
    lines = [f"Batch size {choice.batch_size}" + (", the smallest that is about as fast as any here" if found else "")]
    if found:
        lines.append(f"  patients/s {', '.join(found)}")
    last = choice.timings[-1] if choice.timings else None
    if last is None or last.patients * 2 > choice.most:
        lines.append(f"  not more   than {choice.most}, so that an epoch has {FEWEST_STEPS} steps")
    if last is not None and last.memory_needed is not None and choice.memory_available is not None:
        lines.append(
            f"  memory     {last.memory_needed / 2**30:.1f} GiB for {last.patients} patients a step, of "
            f"{choice.memory_available / 2**30:.1f}"
        )
    return "\n".join(lines)


def device_table(devices: Sequence[DeviceReport]) -> Table:
    """One row a device, the one that a run takes by itself first."""
    table = Table("device", "name", "memory free", "--precision auto", "attention", "--compile")
    for found in devices:
        memory = ["?" if size is None else f"{size / 2**30:.1f}" for size in (found.memory_free, found.memory_total)]
        table.add_row(
            found.device,
            Text(found.name),
            f"{memory[0]} of {memory[1]} GiB",
            f"{found.precision}, {found.reason}",
            found.attention,
            "yes" if found.compiles else "no",
            style="bold" if found.is_chosen else None,
        )
    return table


def epoch_line(record: EpochRecord, *, epochs: int, patience: int, mark: str) -> str:
    """One line per epoch, in the troubleshooting guide's form."""
    number = f"{record.epoch}/{epochs}"
    parts = [
        f"Epoch {number:<{2 * len(str(epochs)) + 1}}",
        f"Train Loss: {record.train_loss:.4f} Acc: {record.train_accuracy:.4f}",
        f"Val Loss: {record.val_loss:.4f} Acc: {record.val_accuracy:.4f}",
    ]
    if patience:
        parts.append(f"Patience: {record.epochs_without_improvement}/{patience}")
    return " | ".join(parts) + (f" {mark}" if record.is_best else "")


class TerminalListener(Listener):
    """Prints a training run as it goes on."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = ProgressBar(console)
        self._mark = best_mark(console.encoding)
        self._start: RunStart | None = None
        self._epoch = 1

    @property
    def has_started(self) -> bool:
        """Whether the run has a folder of its own by now, from which it can go on."""
        return self._start is not None

    def _print(self, message: str) -> None:
        self._console.print(message, markup=False)

    def preparing(self, stage: str, done: int, total: int) -> None:
        if done >= total:
            self._bar.clear()
        else:
            self._bar.show(stage, done, total)

    def started(self, start: RunStart) -> None:
        self._start = start
        settings, patients = start.settings, start.patients
        lines = [
            f"Experiment {start.experiment}, run {start.run_id or 'not in MLflow yet'}",
            f"  records    {patients['train']:,} training and {patients['tuning']:,} validation patients, "
            f"vocabulary {start.vocab_size:,}, up to {start.max_position} positions"
            + (f" ({start.truncated_share:.1%} of the tokens beyond)" if start.truncated_share >= 0.001 else ""),
            f"  model      {settings.model.model_size}, {parameter_summary(start.counts)}",
            f"  training   {settings.training.epochs} epochs of {start.steps_per_epoch:,} steps, "
            f"lr {settings.training.lr:g}, on {start.device} in {start.precision}"
            + (f", {start.ranks} processes" if start.ranks > 1 else ""),
            f"  baselines  {baseline_summary(start)}",
            f"  context    {context_summary(start.baselines)}" if start.task is None else task_summary(start.task),
        ]
        if start.transplant is not None:
            given = start.transplant
            lines.append(
                f"  start      {given.shared_codes:,} codes from {settings.adaptation.init_from}, "
                f"{given.new_codes:,} new codes and {given.new_positions:,} new positions at random"
            )
        self._print("\n".join(lines))

    def examined(self, checkup: Checkup) -> None:
        if self._start is None or self._start.task is None:
            self._print(f"  predicted  {prediction_summary(checkup.facts)}")
        if checkup.diagnosis.findings:
            self._console.print(findings_table("Pre-flight", checkup.diagnosis.findings))

    def found(self, finding: Finding) -> None:
        if finding.severity == "info":
            return  # the result says it
        self._console.print(findings_table(None, [finding]))

    def resumed(self, changes: Sequence[str]) -> None:
        self._print("\n".join([f"  changed    {change}" for change in changes]) or "  changed    nothing")

    def went_on(self, epochs: Sequence[EpochRecord]) -> None:
        best = min(epochs, key=lambda record: record.val_loss)
        self._epoch = epochs[-1].epoch + 1
        self._print(
            f"  goes on    after epoch {epochs[-1].epoch}; best so far {best.val_loss:.4f} at epoch {best.epoch}"
        )

    def recovered(self, lost_epoch: int, record: EpochRecord | None, rate_factor: float) -> None:
        self._bar.clear()
        after = "the start" if record is None else f"the checkpoint after epoch {record.epoch}"
        self._print(
            f"Epoch {lost_epoch}: a loss is no number; back to {after}, with learning rates times {rate_factor:g}"
        )

    def memory_short(self, accumulation_steps: int) -> None:
        self._bar.clear()
        self._print(
            f"Memory ran out: each step is computed in {accumulation_steps} micro-batches from here on, of as many "
            f"patients together as before (--accumulation-steps {accumulation_steps})"
        )

    def step(self, step: int, steps: int) -> None:
        self._bar.show(f"Epoch {self._epoch}", step, steps)

    def epoch(self, record: EpochRecord) -> None:
        assert self._start is not None
        training = self._start.settings.training
        self._bar.clear()
        self._epoch = record.epoch + 1
        self._print(
            epoch_line(record, epochs=training.epochs, patience=training.early_stopping_patience, mark=self._mark)
        )

    def stop(self) -> None:
        """Leaves no bar on the screen."""
        self._bar.clear()


SEVERITY_STYLES: dict[Severity, str] = {"info": "blue", "warning": "yellow", "error": "bold red"}


def prediction_summary(facts: RunFacts) -> str:
    """What the first batch tells of an epoch's time and of memory."""
    parts = []
    if facts.epoch_seconds_predicted is not None:
        parts.append(f"{facts.epoch_seconds_predicted:,.1f} s an epoch")
    if facts.memory_needed is not None:
        free = "" if facts.memory_available is None else f" of {facts.memory_available / 2**30:,.1f}"
        parts.append(f"{facts.memory_needed / 2**30:,.2f}{free} GiB of memory")
    return ", ".join(parts) or "nothing: no token of the first batches is scored"


def findings_table(title: str | None, findings: Sequence[Finding]) -> Table:
    """A row a finding: how severe, and what was found, seen and advised."""
    table = Table.grid("severity", "finding", padding=(0, 2))
    table.title, table.title_justify = title, "left"
    for finding in findings:
        lines = [f"{finding.title} ({finding.rule})", f"  {evidence_text(finding.evidence)}"]
        if finding.remedies:
            lines.append(f"  what helps: {'; then '.join(finding.remedies)}")
        table.add_row(Text(finding.severity, style=SEVERITY_STYLES[finding.severity]), Text("\n".join(lines)))
    return table


def diagnosis_table(diagnosis: Diagnosis) -> Table:
    """A whole diagnosis, with what could not be checked."""
    table = findings_table(f"Diagnosis: {diagnosis.verdict}", diagnosis.findings)
    if diagnosis.not_checked:
        skipped = ", ".join(skipped.rule for skipped in diagnosis.not_checked)
        table.add_row(Text("not checked", style="dim"), Text(f"{skipped} (--json says what they lack)", style="dim"))
    return table


RESULT_ROWS = {
    "best_val_loss": ("best val_loss", "{:.4f}"),
    "best_epoch": ("  at epoch", "{:,}"),
    "best_val_accuracy": ("  accuracy there", "{:.4f}"),
    "closed_gap": ("  gap closed", "{:.1%}"),
    "epochs": ("epochs trained", "{:,}"),
    "seconds": ("  seconds", "{:,.1f}"),
    "trainable_percent": ("trainable percent", "{:.1f}"),
}
"""Label and form of each result of a comparison."""


def comparison_table(comparison: Comparison) -> Table:
    """A column a run: verdict, results, and the parameters that differ."""
    table = Table(caption="-: not set, or not known", caption_justify="left")
    table.add_column("", no_wrap=True)
    for run in comparison.runs:
        table.add_column(Text(run.name), justify="right", overflow="fold")
    diagnoses = [run.diagnosis for run in comparison.runs]
    table.add_row("verdict", *(one.verdict for one in diagnoses))
    table.add_row("severity", *(Text(one.severity, style=SEVERITY_STYLES[one.severity]) for one in diagnoses))
    table.add_section()
    for name, (label, form) in RESULT_ROWS.items():
        values = [run.results[name] for run in comparison.runs]
        table.add_row(label, *("-" if value is None else form.format(value) for value in values))
    table.add_section()
    for name, told in comparison.different.items():
        table.add_row(name, *map(Text, shown(told)))
    if not comparison.different:
        table.add_row("no known parameter differs")
    return table


def parameter_summary(counts: ParameterCounts) -> str:
    """Counts as in the guide: total, trainable with its share, LoRA with its share."""
    summary = f"{counts['total']:,} parameters, {counts['trainable']:,} trainable ({counts['trainable_percent']:.1f}%)"
    if counts["lora"]:
        summary += f", LoRA {counts['lora']:,} ({counts['lora_percent']:.1f}%)"
    return summary


def baseline_summary(start: RunStart) -> str:
    """The lines that the losses are read against."""
    baselines = start.baselines
    if baselines.prevalence_loss is not None:
        return f"the same prediction for everybody {baselines.prevalence_loss:.4f}"
    summary = f"chance {baselines.chance_loss:.4f}, unigram {baselines.unigram_loss:.4f}"
    if baselines.copying_loss is not None:
        summary += f", with copying {baselines.copying_loss:.4f}"
    if baselines.floor_loss is not None:
        summary += f", floor {baselines.floor_loss:.4f} (accuracy {baselines.floor_accuracy:.4f})"
    return summary


def task_summary(task: Mapping[str, Any]) -> str:
    """What is predicted, and from how many labels."""
    labels, share = task["labels"], task["true_share"]["train"]
    seen = "events" if task["kind"] == "survival" else "true"
    dropped = sum(task["dropped"].values())
    return (
        f"  task       {task['name']} ({task['kind']}): {labels['train']:,} training and {labels['tuning']:,} tuning "
        f"labels{'' if share is None else f', {share:.1%} {seen}'}"
        + (f"; {dropped:,} rows are left out: of no patient here, or before any event" if dropped else "")
    )


def context_summary(baselines: Baselines) -> str:
    """What a patient's other codes tell of a masked one, beyond counting."""
    gain, low, high = baselines.cooccurrence_gain, baselines.cooccurrence_gain_low, baselines.cooccurrence_gain_high
    if gain is None or low is None:
        return "too little to measure what codes tell of each other"
    upper = "" if high is None else f" ({low:.3f} to {high:.3f})"
    return f"a patient's other codes tell {gain:.3f}{upper} nats of a masked one"


def result_lines(result: RunResult) -> list[str]:
    """What came of a run, beside what was possible, and where to look at it."""
    start = result.start
    if result.refused:
        lines = ["Not trained."]
    elif result.best is None:
        lines = ["No epoch gave a finite validation loss."]
    else:
        stopped = f", stopped early after {result.last.epoch}" if result.last and result.stopped_early else ""
        lines = [
            f"Best epoch {result.best.epoch}{stopped}: val_loss {result.best.val_loss:.4f}, "
            f"accuracy {result.best.val_accuracy:.4f}, in {result.seconds:.0f} s",
            f"  {baseline_summary(start)}",
        ]
        if start.task is not None:
            lines += [f"  {name.replace('_', '-')} on tuning {value:.3f}" for name, value in result.tuning.items()]
            if result.best.val_loss >= (start.baselines.prevalence_loss or 0):
                lines.append("  not below the same prediction for everybody: nothing was learned")
        elif result.best.val_loss >= (start.baselines.copying_loss or start.baselines.unigram_loss):
            lines.append("  not below what counting and copying codes reaches: nothing else was learned yet")
        elif result.closed_gap is not None:
            lines.append(f"  {result.closed_gap:.1%} of the gap between unigram and floor is closed")
    lines += [
        f"  {parameter_summary(start.counts)}",
        f"  diagnosis: {result.diagnosis.verdict}; all of it: behrt doctor {start.folder}",
        f"  history, figures and checkpoints: {start.folder}",
        f"  MLflow run {result.run_id} in {result.tracking_uri}; to open it: behrt ui"
        if result.tracking_complete
        else f"  not all of it is in MLflow at {result.tracking_uri}; to send the rest: behrt sync {start.folder}",
    ]
    return lines


def fates_table(info: Mapping[str, Any]) -> Table:
    """What became of the events and subjects."""
    fates = Table("what became of the records", "count")
    fates.columns[1].justify = "right"
    for name, count in report_rows(info["report"]):
        fates.add_row(name, f"{count:,}")
    return fates


def prepared_tables(info: Mapping[str, Any]) -> list[Table]:
    """What became of the events and subjects, and what each split holds."""
    splits = Table("split", "patients", "visits", "tokens", "mean", "median", "99%", "longest", r"\[UNK]")
    for column in splits.columns[1:]:
        column.justify = "right"
    for name, counts in info["splits"].items():
        length = counts["sequence_length"]
        lengths = ["", "", "", ""]
        if length is not None:
            lengths = [f"{length['mean']:.1f}", *(f"{length[key]:,}" for key in ("p50", "p99", "max"))]
        numbers = [f"{counts[key]:,}" for key in ("patients", "visits", "tokens")]
        splits.add_row(name, *numbers, *lengths, f"{counts['unk_share']:.1%}")
    splits.caption = f"sequence lengths in tokens; vocabulary {info['vocab_size']:,}"
    return [fates_table(info), splits]


def labels_table(found: Mapping[str, Any]) -> Table:
    """How many labels there are, of each code set and of all, and what became of the moments that have none."""
    table = Table(f"labels: {found['task']}", "labels", "patients", "positive", "share")
    for column in table.columns[1:]:
        column.justify = "right"
    rows = found["sets"] if len(found["sets"]) > 1 else {}
    for name, figures in {**rows, "all": found}.items():
        share = "" if figures["prevalence"] is None else f"{figures['prevalence']:.1%}"
        numbers = [f"{figures[key]:,}" for key in ("labels", "subjects", "positives")]
        table.add_row(name, *numbers, share)
    fates = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in found["counts"].items() if count)
    unmatched = [name for name, figures in found["sets"].items() if not figures["codes"]]
    table.caption = fates + (f"; no code of the records is in {', '.join(unmatched)}" if unmatched else "")
    return table


def parameter_table(counts: ParameterCounts) -> Table:
    """The accounting, group by group."""
    table = Table("group", "total", "trainable", "frozen")
    for column in table.columns[1:]:
        column.justify = "right"
    for group, total, trainable in (
        ("embeddings", counts["embeddings"], counts["embeddings_trainable"]),
        ("encoder", counts["encoder"], counts["encoder_trainable"]),
        ("head", counts["head"], counts["head_trainable"]),
        ("lora", counts["lora"], counts["lora_trainable"]),
    ):
        table.add_row(group, f"{total:,}", f"{trainable:,}", f"{total - trainable:,}")
    table.add_section()
    table.add_row("total", f"{counts['total']:,}", f"{counts['trainable']:,}", f"{counts['frozen']:,}")
    return table
