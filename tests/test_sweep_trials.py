"""Is each trial of a study counted once, and as what it is?"""

import math
from typing import Any

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import create_trial

from behrt.sweep.trials import (
    ALL_EPOCHS,
    DIED,
    INTERRUPTED,
    OUT_OF_MEMORY,
    PATIENCE,
    PRUNED,
    TrialRecord,
    TrialState,
    tally,
    trial_record,
)


def frozen(
    state: str, values: dict[int, float], told: float | None = None, **attributes: Any
) -> optuna.trial.FrozenTrial:
    return create_trial(
        state=optuna.trial.TrialState[state],
        value=told,
        params={"lr": 0.1},
        distributions={"lr": FloatDistribution(0, 1)},
        user_attrs=attributes,
        intermediate_values=values,
    )


def record(number: int, state: TrialState, **given: Any) -> TrialRecord:
    empty: dict[str, Any] = {
        "params": {}, "values": {}, "best": None, "epochs": 0, "ended": None, "run_id": None, "folder": None,
        "worker": None, "retry_of": None, "continued_from": 0, "idle_attempts": 0, "started": None, "finished": None,
    }  # fmt: skip
    return TrialRecord(number=number, state=state, **{**empty, **given})


def failed(number: int, ended: str | None = None, **given: Any) -> TrialRecord:
    return record(number, TrialState.FAILED, ended=ended, **given)


def test_the_best_value_of_an_unfinished_trial_is_its_best_finite_one() -> None:
    trial = frozen("PRUNED", {3: math.inf, 1: 2.0, 2: 1.5, 4: math.nan}, told=2.0)
    assert trial_record(trial, "minimize").best == 1.5
    assert trial_record(trial, "maximize").best == 2.0
    assert trial_record(frozen("RUNNING", {1: math.nan}), "minimize").best is None


def test_the_best_value_of_a_complete_trial_is_the_one_told() -> None:
    assert trial_record(frozen("COMPLETE", {1: 0.5}, told=0.75), "minimize").best == 0.75


def test_a_record_holds_what_the_worker_said_of_the_trial() -> None:
    worker = {"host": "pod", "token": "abc"}
    trial = frozen(
        "FAIL", {4: 1.0, 3: 2.0}, ended="error: ValueError", run_id="run", folder="f", worker=worker, retry_of=2,
        continued_from=3, idle_attempts=1,
    )  # fmt: skip
    found = trial_record(trial, "minimize")
    assert found.state is TrialState.FAILED
    assert (found.ended, found.run_id, found.folder, found.worker) == ("error: ValueError", "run", "f", worker)
    assert (found.retry_of, found.continued_from, found.idle_attempts) == (2, 3, 1)
    assert found.params == {"lr": 0.1}
    assert list(found.values) == [3, 4]
    assert (found.epochs, found.trained_epochs) == (4, 1)


def test_a_trial_that_has_not_begun_has_nothing() -> None:
    found = trial_record(frozen("WAITING", {}), "minimize")
    assert found.state is TrialState.WAITING
    assert (found.epochs, found.trained_epochs, found.best, found.worker, found.retry_of) == (0, 0, None, None, None)


def test_a_retry_that_has_not_caught_up_has_trained_nothing() -> None:
    assert record(1, TrialState.RUNNING, epochs=2, continued_from=5).trained_epochs == 0


@pytest.mark.parametrize("state", list(TrialState))
def test_every_state_is_one_of_optunas(state: TrialState) -> None:
    assert (
        trial_record(frozen(state.in_optuna.name, {1: 0.5}, 0.5 if state == "COMPLETE" else None), "minimize").state
        is state
    )


@pytest.mark.parametrize("ended", [None, INTERRUPTED, DIED, ALL_EPOCHS, PATIENCE, PRUNED])
def test_a_trial_that_failed_through_no_fault_of_its_own_is_lost(ended: str | None) -> None:
    assert failed(0, ended).is_lost


@pytest.mark.parametrize("ended", ["error: ValueError", OUT_OF_MEMORY, "refused: empty_data", "lost: diverged"])
def test_a_trial_that_failed_by_itself_is_not_lost(ended: str) -> None:
    assert not failed(0, ended).is_lost


@pytest.mark.parametrize("state", [state for state in TrialState if state is not TrialState.FAILED])
def test_a_trial_that_did_not_fail_is_not_lost(state: TrialState) -> None:
    assert not record(0, state).is_lost


def test_a_lost_trial_counts_once_together_with_its_retries() -> None:
    counts = tally(
        [
            failed(0, DIED, epochs=3),
            failed(1, INTERRUPTED, retry_of=0, epochs=5, continued_from=3),
            record(2, TrialState.COMPLETE, retry_of=1, epochs=9, continued_from=5),
        ]
    )
    assert (counts.finished, counts.complete, counts.failed, counts.replaced) == (1, 1, 0, 2)
    assert counts.to_retry == []
    assert counts.trained_epochs == 9


def test_a_lost_trial_without_a_retry_is_to_be_retried_and_is_not_finished() -> None:
    counts = tally([record(1, TrialState.COMPLETE), failed(0, DIED)])
    assert [lost.number for lost in counts.to_retry] == [0]
    assert (counts.finished, counts.failed, counts.replaced) == (1, 0, 0)


@pytest.mark.parametrize("state", [TrialState.WAITING, TrialState.RUNNING])
def test_a_retry_that_is_still_to_end_replaces_its_trial_already(state: TrialState) -> None:
    counts = tally([failed(0, DIED), record(1, state, retry_of=0)])
    assert (counts.to_retry, counts.replaced, counts.finished) == ([], 1, 0)
    assert counts.waiting + counts.running == 1


def test_states_are_counted_apart() -> None:
    states = [*TrialState, TrialState.PRUNED, TrialState.RUNNING, TrialState.RUNNING]
    counts = tally([record(number, state, ended="error: ValueError") for number, state in enumerate(states)])
    assert (counts.waiting, counts.running, counts.complete, counts.pruned, counts.failed) == (1, 3, 1, 2, 1)
    assert counts.finished == 4
    assert [finished.state for finished in counts.finished_records] == ["COMPLETE", "PRUNED", "FAILED", "PRUNED"]


def test_the_fifth_attempt_in_a_row_without_an_epoch_is_the_last() -> None:
    fifth = failed(4, DIED, idle_attempts=4, epochs=3, continued_from=3)
    assert fifth.is_given_up
    assert tally([fifth]).to_retry == []
    assert tally([fifth]).failed == 1


def test_an_attempt_that_adds_an_epoch_starts_the_count_anew() -> None:
    lost = failed(4, DIED, idle_attempts=4, epochs=4, continued_from=3)
    assert not lost.is_given_up
    assert lost.idle_attempts_after == 0
    assert [retried.number for retried in tally([lost]).to_retry] == [4]


def test_the_fourth_attempt_without_an_epoch_is_not_the_last() -> None:
    assert [retried.number for retried in tally([failed(3, DIED, idle_attempts=3)]).to_retry] == [3]
