"""Is anything lost, begun twice or left running when processes of a study die, are stopped, or start all at once?"""

import signal
from collections.abc import Callable
from contextlib import ExitStack, chdir, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import optuna
import pytest

from behrt.cli import main
from behrt.sweep.liveness import WorkerToken
from behrt.sweep.settings import load_sweep
from behrt.sweep.storage import Storage, open_storage
from behrt.sweep.study import SweepStudy
from behrt.sweep.trials import ALL_EPOCHS, TrialState, tally, trial_record

from .postgres_server import PASSWORD, PostgresServer
from .small_sweeps import (
    assert_optuna_and_mlflow_agree,
    behrt,
    children_of,
    client_of,
    ended,
    kill,
    runs_of,
    start,
    trials_of,
    until,
    write_sweep,
)


def counts(root: Path, study: str = "s") -> Any:
    return tally(trial_record(trial, "minimize") for trial in trials_of(root, study))


def an_epoch_was_trained(root: Path, epochs: int = 2) -> Callable[[], bool]:
    """Whether a trial that runs has come so far."""
    return lambda: any(
        trial.state.name == "RUNNING" and len(trial.intermediate_values) >= epochs for trial in trials_of(root, "s")
    )


def epochs_in_mlflow(root: Path, trial: Any) -> list[int]:
    metrics = client_of(root).get_metric_history(trial.user_attrs["run_id"], "val_loss")
    return sorted(metric.step for metric in metrics)


def assert_every_epoch_once(root: Path) -> None:
    """A trial that continues another has that one's epochs, and in MLflow each once."""
    by_number = {trial.number: trial for trial in trials_of(root, "s")}
    for trial in by_number.values():
        if trial.state.name == "COMPLETE":
            assert epochs_in_mlflow(root, trial) == sorted(trial.intermediate_values)
        if trial.user_attrs.get("continued_from"):
            former = by_number[trial.user_attrs["retry_of"]]
            # killed between checkpoint and report, a worker leaves an epoch of which the study has not heard
            assert trial.user_attrs["continued_from"] - len(former.intermediate_values) in (0, 1)
            assert former.intermediate_values.items() <= trial.intermediate_values.items()


def test_a_killed_workers_trial_is_continued_and_counted_once(tmp_path: Path, prepared: Path) -> None:
    write_sweep(tmp_path / "s.yaml", prepared, settings={"epochs": 8}, budget={"trials": 2})
    run = start(tmp_path, "sweep", "run", "s.yaml", "--workers", "2")
    until(an_epoch_was_trained(tmp_path))
    kill(children_of(run)[0])
    ended(run)
    found = counts(tmp_path)
    assert (found.finished, found.complete, found.running, found.waiting) == (2, 2, 0, 0)
    lost = [trial for trial in trials_of(tmp_path, "s") if trial.state.name == "FAIL"]
    assert [trial.user_attrs["ended"] for trial in lost] == ["worker died"]
    (retry,) = [trial for trial in trials_of(tmp_path, "s") if "retry_of" in trial.user_attrs]
    assert retry.params == lost[0].params
    assert retry.user_attrs["retry_of"] == lost[0].number
    assert_every_epoch_once(tmp_path)
    assert_optuna_and_mlflow_agree(tmp_path, "s")


@pytest.mark.slow
def test_a_worker_that_is_stopped_by_itself_is_replaced(tmp_path: Path, prepared: Path) -> None:
    write_sweep(tmp_path / "s.yaml", prepared, settings={"epochs": 6}, budget={"trials": 1})
    run = start(tmp_path, "sweep", "run", "s.yaml")
    until(an_epoch_was_trained(tmp_path, epochs=1))
    kill(children_of(run)[0], signal.SIGTERM)
    ended(run)
    assert [trial.state.name for trial in trials_of(tmp_path, "s")] == ["FAIL", "COMPLETE"]
    assert_optuna_and_mlflow_agree(tmp_path, "s")


def test_a_dead_workers_trial_does_not_stay_running_where_no_more_are_asked_for(tmp_path: Path, prepared: Path) -> None:
    sweep = load_sweep(write_sweep(tmp_path / "s.yaml", prepared, budget={"trials": 2}))
    with chdir(tmp_path):
        study = SweepStudy.begin(sweep, open_storage(None))
        with WorkerToken(Path("sweeps/s")) as token:
            ended, _ = (study.claim(token.worker, is_alive=lambda worker: True) for _ in range(2))
            study.tell(ended, TrialState.COMPLETE, 1.0, ended=ALL_EPOCHS)
    behrt(tmp_path, "sweep", "run", "s.yaml", "--trials", "1")
    assert [trial.state.name for trial in trials_of(tmp_path, "s")] == ["COMPLETE", "FAIL"]


def test_ctrl_c_keeps_what_was_trained_and_the_same_command_goes_on(tmp_path: Path, prepared: Path) -> None:
    write_sweep(tmp_path / "s.yaml", prepared, settings={"epochs": 8}, budget={"trials": 1})
    run = start(tmp_path, "sweep", "run", "s.yaml")
    until(an_epoch_was_trained(tmp_path))
    run.send_signal(2)
    said = ended(run, code=130)
    assert "run the same command again" in said
    stopped, *in_line = trials_of(tmp_path, "s")
    assert [trial.state.name for trial in in_line] == ["WAITING"]
    assert (stopped.state.name, stopped.user_attrs["ended"]) == ("FAIL", "interrupted")
    assert len(stopped.intermediate_values) < 8
    assert runs_of(tmp_path, "s")[0].info.status == "KILLED"
    assert_optuna_and_mlflow_agree(tmp_path, "s")

    told = behrt(tmp_path, "sweep", "run", "s.yaml")
    assert (told["finished"], told["complete"]) == (1, 1)
    assert told["trained_epochs"] == 8
    _, retry = trials_of(tmp_path, "s")
    assert retry.params == stopped.params
    assert retry.user_attrs["continued_from"] == len(stopped.intermediate_values)
    assert_every_epoch_once(tmp_path)
    assert_optuna_and_mlflow_agree(tmp_path, "s")


@pytest.mark.slow
def test_workers_end_with_the_command_that_started_them_even_when_it_is_killed(tmp_path: Path, prepared: Path) -> None:
    write_sweep(tmp_path / "s.yaml", prepared, settings={"epochs": 40}, budget={"trials": 2})
    run = start(tmp_path, "sweep", "run", "s.yaml")
    until(an_epoch_was_trained(tmp_path, epochs=1))
    run.kill()
    ended(run, code=-9)
    until(lambda: counts(tmp_path).running == 0)
    assert counts(tmp_path).to_retry
    assert runs_of(tmp_path, "s")[0].info.status == "RUNNING"  # nobody was left who could say otherwise
    assert main_in(tmp_path, "sweep", "status", "s") == 0


def main_in(root: Path, *words: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        return main(list(words))


@contextmanager
def several(root: Path, number: int, *words: str) -> Any:
    """The same command several times, at once."""
    with ExitStack() as stack:
        processes = [start(root, *words) for _ in range(number)]
        for process in processes:
            stack.callback(process.kill)
        yield processes


@pytest.mark.slow
def test_four_that_begin_the_same_study_at_once_share_its_trials(tmp_path: Path, prepared: Path) -> None:
    write_sweep(tmp_path / "s.yaml", prepared, settings={"epochs": 1}, budget={"trials": 6})
    with several(tmp_path, 4, "sweep", "run", "s.yaml") as processes:
        for process in processes:
            ended(process)
    assert [trial.state.name for trial in trials_of(tmp_path, "s")] == ["COMPLETE"] * 6
    parent, runs = runs_of(tmp_path, "s")
    assert parent.info.status == "FINISHED"
    assert len(runs) == 6
    assert_optuna_and_mlflow_agree(tmp_path, "s")


def test_a_trial_that_runs_out_of_memory_fails_alone(
    tmp_path: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory of the first trial ends in its second epoch; in this process, so that it can be made to."""
    import torch

    from behrt import pretrain
    from behrt.records import RecordsCache
    from behrt.stopper import Stopper
    from behrt.sweep.tracked import begin_study_run
    from behrt.sweep.trial import run_trial
    from behrt.sweep.trials import PARENT_RUN_ID

    monkeypatch.chdir(tmp_path)
    sweep = load_sweep(write_sweep(tmp_path / "s.yaml", prepared, budget={"trials": 2}))
    study = SweepStudy.begin(sweep, open_storage(None))
    study.note_once(PARENT_RUN_ID, lambda: begin_study_run(sweep))
    whole, cache = pretrain.masked_lm_loss, RecordsCache()
    first_epoch = tmp_path / "sweeps" / "s" / "trials" / "0000" / "checkpoints" / "last"

    def ends(model: torch.nn.Module, batch: Any) -> Any:
        if first_epoch.exists() and not (first_epoch.parents[2] / "0001").exists():
            raise torch.OutOfMemoryError
        return whole(model, batch)

    monkeypatch.setattr(pretrain, "masked_lm_loss", ends)
    with WorkerToken(Path("sweeps/s")) as token:
        for _ in range(2):
            trial = study.claim(token.worker, is_alive=lambda worker: True)
            run_trial(study, trial, folder=Path("sweeps/s"), records_cache=cache, stopper=Stopper(listens=False))
    first, second = study.records()
    assert (first.state, first.ended) == ("FAILED", "out of memory")
    assert (second.state, second.ended) == ("COMPLETE", "all epochs")
    assert study.tally().finished == 2
    assert_optuna_and_mlflow_agree(tmp_path, "s")


@pytest.mark.slow
def test_a_study_on_a_server_goes_on_when_the_server_restarts(
    tmp_path: Path, prepared: Path, server: PostgresServer
) -> None:
    """Two workers, and the server gone at once in the middle of their trials."""
    url = server.create_database("study")
    write_sweep(tmp_path / "s.yaml", prepared, settings={"epochs": 6}, budget={"trials": 2})
    run = start(tmp_path, "sweep", "run", "s.yaml", "--workers", "2", "--storage", url, "--json")
    opened = open_storage(url)
    until(lambda: any(trial.intermediate_values for trial in optuna_trials(opened)))
    server.restart()
    said = ended(run)
    assert [trial.state.name for trial in optuna_trials(opened)] == ["COMPLETE"] * 2
    assert all(len(trial.intermediate_values) == 6 for trial in optuna_trials(opened))
    assert PASSWORD not in said
    assert quote(PASSWORD, safe="") not in said
    _, runs = runs_of(tmp_path, "s")
    assert {run.info.status for run in runs.values()} == {"FINISHED"}


def optuna_trials(storage: Storage) -> list[Any]:
    """Those of the study `s`; none before it is there."""
    if "s" not in storage.patiently(lambda: optuna.get_all_study_names(storage.rdb)):
        return []
    return list(storage.patiently(lambda: optuna.load_study(study_name="s", storage=storage.rdb).get_trials()))
