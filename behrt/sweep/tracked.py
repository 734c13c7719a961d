"""How does a study stand in MLflow?

The study is a run, each trial a run below it. What a worker could not tell any more, because it died, is told here
from the study's storage; telling it again changes nothing.
"""

from __future__ import annotations

from behrt.run_report import STATUS_OF_OUTCOME, TrialOutcome
from behrt.sweep.settings import Sweep
from behrt.sweep.trials import TrialRecord, TrialState, in_order_of_their_ends, tally
from behrt.tracking import TrackedRun

BEST_VALUE = {"val_loss": "best_val_loss", "val_accuracy": "best_val_accuracy"}
"""Metric of the study's run, by objective; its steps count finished trials."""

OUTCOMES: dict[TrialState, TrialOutcome] = {
    TrialState.COMPLETE: "COMPLETE",
    TrialState.PRUNED: "PRUNED",
    TrialState.FAILED: "FAILED",
}


def begin_study_run(sweep: Sweep) -> str:
    """Creates the run of a study; its id."""
    params = {
        **{f"base.{name}": value for name, value in sweep.base.flat().items()},
        **{f"space.{name}": parameter.model_dump(mode="json") for name, parameter in sweep.space.items()},
        "sampler": sweep.sampler.name,
        "pruner": sweep.pruner.name,
        "seed": sweep.seed,
        "objective": sweep.objective,
        "budget": sweep.budget.model_dump(mode="json", exclude_none=True),
    }
    tracked = TrackedRun(
        experiment=sweep.name,
        params=params,
        tags={"study": sweep.name, "mlflow.note.content": sweep.note.strip()},
        name=f"study {sweep.name}",
    )
    return tracked.run_id


def improvements(records: list[TrialRecord], *, minimize: bool) -> dict[int, float]:
    """The best value so far, by the number of trials that had finished when it was found."""
    finished = in_order_of_their_ends(tally(records).finished_records)
    found: dict[int, float] = {}
    best: float | None = None
    for step, record in enumerate(finished, start=1):
        value = record.best if record.state is TrialState.COMPLETE else None
        if value is not None and (best is None or (value < best if minimize else value > best)):
            found[step] = best = value
    return found


def tell_improvements(run: TrackedRun, sweep: Sweep, records: list[TrialRecord]) -> None:
    """The best value as it improved, where the run does not have it yet."""
    metric = BEST_VALUE[sweep.objective]
    told = run.steps_of(metric)
    for step, value in improvements(records, minimize=sweep.direction == "minimize").items():
        if step not in told:
            run.log_figures({metric: value}, step=step)


def settle_trials(run: TrackedRun, records: list[TrialRecord]) -> None:
    """Gives every trial's run the state that the storage has, where its own process did not."""
    outcomes = {record.number: OUTCOMES[record.state] for record in records if record.state in OUTCOMES}
    for trial in run.trials():
        outcome = outcomes.get(trial.number)
        if outcome is not None and (trial.state, trial.status) != (outcome, STATUS_OF_OUTCOME[outcome]):
            run.settle(trial, status=STATUS_OF_OUTCOME[outcome], state=outcome)
