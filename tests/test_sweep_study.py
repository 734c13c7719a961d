"""Do the processes of a study together begin exactly its trials, and is none of them lost with its worker?"""

import json
import math
import signal
import time
from pathlib import Path
from typing import Any

import optuna
import pytest

from behrt.config import UserError, load_experiment
from behrt.sweep.settings import Budget, PrunerSettings
from behrt.sweep.storage import open_storage
from behrt.sweep.study import DEFINITION, Done, Report, SweepStudy, Wait
from behrt.sweep.trials import (
    ALL_EPOCHS,
    DIED,
    INTERRUPTED,
    MAX_IDLE_ATTEMPTS,
    OUT_OF_MEMORY,
    PARENT_RUN_ID,
    PRUNED,
    REFUSED,
    WORKER,
    TrialState,
)
from tests.sweep_worker import (
    answer,
    everybody_lives,
    grid_sweep,
    new_worker,
    nobody_can_tell,
    nobody_lives,
    open_briskly,
    small_sweep,
    start,
    train_all,
)


def begin(tmp_path: Path, **changes: Any) -> SweepStudy:
    return SweepStudy.begin(small_sweep(**changes), open_storage(f"sqlite:///{tmp_path}/a.db"))


def claimed(study: SweepStudy, **options: Any) -> optuna.Trial:
    trial = study.claim(new_worker(), **{"is_alive": everybody_lives, **options})
    assert not isinstance(trial, Wait | Done)
    return trial


def states(study: SweepStudy) -> list[str]:
    return [record.state.value for record in study.records()]


# Together


def test_processes_that_begin_at_once_share_the_trials_between_them(url: str) -> None:
    own = [answer(process) for process in [start(url, "work") for _ in range(4)]]
    assert sorted(number for numbers in own for number in numbers) == list(range(20))
    study = SweepStudy.open("small", open_storage(url))
    assert states(study) == ["COMPLETE"] * 20


def test_no_more_trials_are_begun_than_were_asked_for(tmp_path: Path) -> None:
    study = begin(tmp_path, budget=Budget(trials=2))
    first, _ = claimed(study), claimed(study)
    assert isinstance(study.claim(new_worker(), is_alive=everybody_lives), Wait)
    study.tell(first, TrialState.COMPLETE, 1.0, ended=ALL_EPOCHS)
    assert isinstance(study.claim(new_worker(), is_alive=everybody_lives), Wait)


def test_a_budget_of_epochs_ends_the_study(tmp_path: Path) -> None:
    study = begin(tmp_path, budget=Budget(trials=20, total_epochs=5))
    train_all(study)
    assert study.tally().trained_epochs == 6  # three trials of two epochs: the one that runs then is finished
    done = study.claim(new_worker(), is_alive=everybody_lives)
    assert done == Done("all 5 epochs")


def test_a_trial_that_is_lost_when_the_epochs_are_used_up_is_still_finished(tmp_path: Path) -> None:
    study = begin(tmp_path, budget=Budget(trials=20, total_epochs=3))
    lost = claimed(study)
    for epoch in (1, 2, 3):
        study.report(lost, epoch=epoch, value=1.0)
    study.reap(nobody_lives)
    assert claimed(study).params == lost.params
    assert isinstance(study.claim(new_worker(), is_alive=everybody_lives), Done)


def test_a_larger_budget_continues_a_study_that_was_over(tmp_path: Path) -> None:
    assert len(train_all(begin(tmp_path, budget=Budget(trials=3)))) == 3
    assert train_all(begin(tmp_path, budget=Budget(trials=5))) == [3, 4]
    assert train_all(begin(tmp_path, budget=Budget(trials=2))) == []


def test_a_stop_changes_no_parameters(tmp_path: Path) -> None:
    """Seeded by the trial's number, draws are not repeated by a process that begins anew."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    train_all(begin(tmp_path / "a", budget=Budget(trials=6)))
    for trials in (2, 6):
        train_all(begin(tmp_path / "b", budget=Budget(trials=trials)))
    one, other = ([r.params for r in begin(tmp_path / name).records()] for name in ("a", "b"))
    assert one == other
    assert len({json.dumps(params) for params in one}) == 6


def test_a_grid_is_shared_out_without_repetition(tmp_path: Path) -> None:
    study = SweepStudy.begin(grid_sweep(), open_storage(f"sqlite:///{tmp_path}/a.db"))
    running = [claimed(study) for _ in range(4)]
    assert len({json.dumps(trial.params, sort_keys=True) for trial in running}) == 4


# Workers that die


def test_a_dead_workers_trial_is_tried_again_with_the_same_parameters(url: str) -> None:
    process = start(url, "hang")
    assert process.stdout is not None
    lost = json.loads(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    process.communicate()
    study = SweepStudy.open("small", open_storage(url))
    study.reap(nobody_lives)
    assert states(study) == ["FAILED", "WAITING"]
    retry = claimed(study)
    assert retry.params == lost["params"]
    old, new = study.records()
    assert (old.ended, new.retry_of, new.number) == (DIED, lost["number"], retry.number)
    study.tell(retry, TrialState.COMPLETE, 1.0, ended=ALL_EPOCHS)
    assert len(train_all(study)) == 19
    assert (study.tally().finished, study.tally().replaced) == (20, 1)


def test_a_silent_worker_of_another_machine_counts_as_dead_after_a_while(url: str) -> None:
    process = start(url, "hang")
    assert process.stdout is not None
    process.stdout.readline()
    study = SweepStudy.open("small", open_briskly(url))
    time.sleep(3)  # longer than the grace; its heart beats
    study.reap(nobody_can_tell)
    assert states(study) == ["RUNNING"]
    process.send_signal(signal.SIGKILL)
    process.communicate()
    study.reap(nobody_can_tell)
    assert states(study) == ["RUNNING"]  # it may be alive still
    time.sleep(4)
    study.reap(nobody_can_tell)
    assert states(study) == ["FAILED", "WAITING"]


def test_a_worker_that_lives_is_never_reaped_however_silent(tmp_path: Path) -> None:
    """A machine that slept: here no heartbeat is sent at all."""
    study = SweepStudy.begin(small_sweep(), open_briskly(f"sqlite:///{tmp_path}/a.db"))
    claimed(study)
    claimed(study)
    tokens = [record.worker for record in study.records()]
    time.sleep(4)
    study.reap(lambda worker: True if worker == tokens[0] else None)
    assert states(study) == ["RUNNING", "FAILED", "WAITING"]


def test_two_who_reap_at_once_put_a_trial_back_once(tmp_path: Path) -> None:
    study = begin(tmp_path)
    claimed(study)
    study.reap(nobody_lives)
    begin(tmp_path).reap(nobody_lives)
    assert states(study) == ["FAILED", "WAITING"]


def test_a_worker_that_dies_while_it_claims_leaves_a_trial_that_is_put_back(tmp_path: Path) -> None:
    """Between Optuna's `ask` and the worker's name: a running trial without a worker, seen under the lock."""
    study = begin(tmp_path)
    with pytest.warns(UserWarning, match="Heartbeat"):
        study.study.ask()
    study.reap(everybody_lives)
    assert states(study) == ["FAILED", "WAITING"]
    assert claimed(study).params.keys() == {"lr", "dropout"}


def test_a_reaper_that_dies_before_it_puts_a_trial_back_loses_nothing(tmp_path: Path) -> None:
    """Whoever comes next finds the failed trial without a retry."""
    study = begin(tmp_path)
    lost = claimed(study)
    study.storage.rdb.set_trial_user_attr(lost._trial_id, "ended", DIED)
    study.study.tell(lost.number, state=optuna.trial.TrialState.FAIL)
    assert claimed(begin(tmp_path)).params == lost.params


def test_a_lost_trial_that_is_not_asked_for_any_more_is_not_put_back(tmp_path: Path) -> None:
    train_all(begin(tmp_path, budget=Budget(trials=2)))
    claimed(begin(tmp_path, budget=Budget(trials=3)))
    study = begin(tmp_path, budget=Budget(trials=2))
    study.reap(nobody_lives)
    assert states(study) == ["COMPLETE", "COMPLETE", "FAILED"]


def test_a_retry_of_a_retry_has_the_parameters_of_the_first(tmp_path: Path) -> None:
    study = begin(tmp_path)
    first = claimed(study)
    for _ in range(2):
        study.reap(nobody_lives)
        again = claimed(study)
    assert again.params == first.params
    assert [record.retry_of for record in study.records()] == [None, 0, 1]


def test_a_trial_that_dies_again_and_again_without_an_epoch_is_given_up(tmp_path: Path) -> None:
    study = begin(tmp_path, budget=Budget(trials=1))
    for _ in range(MAX_IDLE_ATTEMPTS):
        claimed(study)
        study.reap(nobody_lives)
    assert states(study) == ["FAILED"] * MAX_IDLE_ATTEMPTS
    assert study.tally().finished == 1
    assert isinstance(study.claim(new_worker(), is_alive=everybody_lives), Done)


def test_to_be_stopped_again_and_again_is_no_failure(tmp_path: Path) -> None:
    study = begin(tmp_path, budget=Budget(trials=1))
    for _ in range(MAX_IDLE_ATTEMPTS + 1):
        study.tell(claimed(study), TrialState.FAILED, None, ended=INTERRUPTED)
    assert study.tally().finished == 0
    assert claimed(study).number == MAX_IDLE_ATTEMPTS + 1


def test_a_grids_retry_has_the_point_of_the_lost_trial(tmp_path: Path) -> None:
    study = SweepStudy.begin(grid_sweep(), open_storage(f"sqlite:///{tmp_path}/a.db"))
    lost = claimed(study)
    study.reap(nobody_lives)
    running = [claimed(study) for _ in range(4)]
    assert running[0].params == lost.params
    assert len({json.dumps(trial.params, sort_keys=True) for trial in running}) == 4


def test_a_worker_that_was_held_to_be_dead_learns_that_its_trial_is_anothers(tmp_path: Path) -> None:
    study = begin(tmp_path)
    trial = claimed(study)
    study.reap(nobody_lives)
    assert study.report(trial, epoch=1, value=1.0) is Report.TAKEN_OVER
    assert study.set_attributes(trial, {"run_id": "a"}) is False
    assert study.tell(trial, TrialState.COMPLETE, 1.0, ended=ALL_EPOCHS) is False
    assert states(study) == ["FAILED", "WAITING"]


def test_telling_the_same_end_twice_is_telling_it_once(tmp_path: Path) -> None:
    """As after a storage that went away before it could answer."""
    study = begin(tmp_path)
    trial = claimed(study)
    assert study.tell(trial, TrialState.COMPLETE, 1.0, ended=ALL_EPOCHS)
    assert study.tell(trial, TrialState.COMPLETE, 1.0, ended=ALL_EPOCHS)
    assert study.tell(trial, TrialState.FAILED, None, ended=INTERRUPTED) is False
    assert states(study) == ["COMPLETE"]


def test_values_that_are_not_finite_are_kept_and_are_no_best(tmp_path: Path) -> None:
    study = begin(tmp_path)
    trial = claimed(study)
    study.report(trial, epoch=1, value=2.0)
    study.report(trial, epoch=2, value=math.nan)
    study.tell(trial, TrialState.PRUNED, None, ended="lost: not_finite")
    (record,) = study.records()
    assert (record.epochs, record.best) == (2, 2.0)
    assert math.isnan(record.values[2])


# What a study is


def test_a_study_goes_on_when_there_are_settings_that_its_definition_does_not_know(tmp_path: Path) -> None:
    claimed(begin(tmp_path))
    stored = optuna.load_study(study_name="small", storage=f"sqlite:///{tmp_path}/a.db")
    definition = stored.user_attrs[DEFINITION]
    del definition["base"]["training"]["table_rate"]
    stored.set_user_attr(DEFINITION, definition)
    assert len(begin(tmp_path).records()) == 1


def test_another_definition_is_refused_with_what_differs(tmp_path: Path) -> None:
    claimed(begin(tmp_path))
    with pytest.raises(UserError, match=r"--study small: was begun with another definition: seed: 7 there, 8 here"):
        begin(tmp_path, seed=8)


def test_a_study_that_has_come_to_nothing_takes_another_definition(tmp_path: Path) -> None:
    begin(tmp_path).note_once(PARENT_RUN_ID, lambda: "of the first definition")
    study = begin(tmp_path, seed=8)
    assert SweepStudy.open("small", study.storage).sweep.seed == 8
    assert study.noted(PARENT_RUN_ID) is None


def test_a_study_that_is_asked_for_more_trials_prunes_as_it_began(tmp_path: Path) -> None:
    """With 40 trials and more, `auto` would be hyperband."""
    changes = {"pruner": PrunerSettings(), "base": load_experiment(flags={"epochs": 20})}
    assert begin(tmp_path, budget=Budget(trials=10), **changes).sweep.pruner.name == "median"
    study = begin(tmp_path, budget=Budget(trials=80), **changes)
    assert study.sweep.pruner.name == "median"
    assert isinstance(study.study.pruner, optuna.pruners.MedianPruner)
    assert isinstance(SweepStudy.open("small", study.storage).study.pruner, optuna.pruners.MedianPruner)


def test_a_study_is_opened_as_it_was_begun(tmp_path: Path) -> None:
    study = begin(tmp_path, budget=Budget(trials=7, hours=2))
    opened = SweepStudy.open("small", open_storage(study.storage.url))
    assert opened.sweep.definition() == study.sweep.definition()
    assert opened.sweep.budget == study.sweep.budget


def test_an_unknown_study_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    study = begin(tmp_path)
    with pytest.raises(UserError, match=r"smal: no such study .*small"):
        SweepStudy.open("smal", study.storage)
    with pytest.raises(UserError, match="no such study"):
        SweepStudy.begin(small_sweep(name="smal"), study.storage, must_exist=True)


def test_anybody_elses_study_is_refused(tmp_path: Path) -> None:
    study = begin(tmp_path)
    foreign = optuna.create_study(study_name="foreign", storage=study.storage.rdb)
    foreign.add_trial(optuna.trial.create_trial(value=1.0))
    for use in (
        lambda: SweepStudy.open("foreign", study.storage),
        lambda: SweepStudy.begin(small_sweep(name="foreign"), study.storage),
    ):
        with pytest.raises(UserError, match="was not begun by"):
            use()
    assert len(foreign.get_trials()) == 1


def test_a_note_is_made_by_one_process_alone(tmp_path: Path) -> None:
    assert begin(tmp_path).note_once("run", lambda: "a") == "a"
    assert begin(tmp_path).note_once("run", lambda: pytest.fail("made twice")) == "a"


def end_all(study: SweepStudy, ends: list[tuple[TrialState, str]]) -> None:
    for state, ended in ends:
        study.tell(claimed(study), state, 1.0 if state is TrialState.COMPLETE else None, ended=ended)


@pytest.mark.parametrize(
    ("ends", "said"),
    [
        ([(TrialState.PRUNED, REFUSED + "silent_adapters")] * 5, "all refused (refused: silent_adapters)"),
        ([(TrialState.FAILED, OUT_OF_MEMORY)] * 5, "all failed (out of memory)"),
        ([(TrialState.FAILED, OUT_OF_MEMORY)] * 4, None),
        ([(TrialState.PRUNED, PRUNED)] * 6, None),
        ([(TrialState.FAILED, OUT_OF_MEMORY)] * 4 + [(TrialState.COMPLETE, ALL_EPOCHS)], None),
        ([(TrialState.COMPLETE, ALL_EPOCHS)] + [(TrialState.FAILED, OUT_OF_MEMORY)] * 6, None),
    ],
)
def test_a_study_is_hopeless_if_its_first_trials_all_ended_alike_without_a_result(
    tmp_path: Path, ends: list[tuple[TrialState, str]], said: str | None
) -> None:
    study = begin(tmp_path)
    end_all(study, ends)
    found = study.hopeless()
    assert found is None if said is None else said in (found or "")


def test_trials_from_before_somebody_mended_the_cause_do_not_make_a_study_hopeless(tmp_path: Path) -> None:
    study = begin(tmp_path)
    end_all(study, [(TrialState.FAILED, OUT_OF_MEMORY)] * 5)
    before = {record.number for record in study.records()}
    assert study.hopeless(but=before) is None
    end_all(study, [(TrialState.FAILED, OUT_OF_MEMORY)] * 5)
    assert study.hopeless(but=before) is not None


def test_a_workers_name_stands_with_its_trial(tmp_path: Path) -> None:
    study, worker = begin(tmp_path), new_worker()
    study.claim(worker, is_alive=everybody_lives)
    assert study.study.get_trials()[0].user_attrs[WORKER] == worker
