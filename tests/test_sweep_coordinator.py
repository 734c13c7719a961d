"""Does the coordinator tell a study in trouble from one that is unlucky, and whose folder is whose?"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow import MlflowClient

from behrt.config import UserError
from behrt.feeding import new_record
from behrt.sweep.coordinator import Crashes, Workers, draw_what_is_new, feed_trials, keep_folder
from behrt.sweep.trials import TrialRecord, TrialState, tally

from .test_sweep_trials import record


def test_workers_that_die_all_at_once_are_one_look() -> None:
    crashes = Crashes(limit=3)
    assert [crashes.are_too_many(tally([])) for _ in range(3)] == [False, False, True]


def test_a_study_that_gets_on_between_crashes_goes_on() -> None:
    crashes = Crashes(limit=3)
    for epochs in range(1, 20):
        assert not crashes.are_too_many(tally([record(0, TrialState.RUNNING, epochs=epochs)]))


def test_a_trial_that_is_given_up_is_getting_on() -> None:
    crashes = Crashes(limit=3)
    given_up = [record(number, TrialState.FAILED, ended="error: any") for number in range(20)]
    for count in range(20):
        assert not crashes.are_too_many(tally(given_up[:count]))


def test_a_folder_belongs_to_the_study_that_made_it(tmp_path: Path) -> None:
    keep_folder(tmp_path / "s", "one")
    keep_folder(tmp_path / "s", "one")
    with pytest.raises(UserError, match="belongs to another study of this name"):
        keep_folder(tmp_path / "s", "other")


def test_the_logs_of_workers_are_told_apart_by_their_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The coordinators of several containers have the same process id, and one folder."""
    monkeypatch.setattr(Workers, "start", lambda self, index: None)
    logs = []
    for host in ("one", "two"):
        monkeypatch.setattr("socket.gethostname", lambda host=host: host)
        logs.append(Workers(url="", study="s", count=1, deadline=None).log_file(0))
    assert logs[0] != logs[1]


def test_a_trial_that_was_stopped_before_it_wrote_of_itself_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It left what MLflow is to hold of it, and no `run.json`: its worker was stopped while it waited for MLflow."""
    monkeypatch.chdir(tmp_path)
    new_record(experiment="s", params={"trial_number": 3}, tags={"trial_number": "3"}).save(Path("trials/3"))
    feed_trials([record(3, TrialState.FAILED, folder="trials/3")])
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlruns/mlflow.db")
    experiment = client.get_experiment_by_name("s")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.params["trial_number"] == "3"


def test_a_study_is_drawn_again_only_where_there_is_something_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    drawn: list[int] = []

    def draw(records: list[TrialRecord], sweep: Any, folder: Path) -> list[Path]:
        drawn.append(len(records))
        folder.mkdir(parents=True, exist_ok=True)
        return [folder / "history.png"]

    monkeypatch.setattr("behrt.sweep.coordinator.draw_study", draw)
    sweep: Any = SimpleNamespace(name="s", definition=dict)
    tracked: Any = SimpleNamespace(run_id="a", log_artifacts=lambda folder, under: None)
    trials = [record(0, TrialState.COMPLETE, values={1: 0.5}, best=0.5)]
    for records in (trials, trials, [*trials, record(1, TrialState.FAILED)], trials):
        draw_what_is_new(records, sweep, tracked)
    assert drawn == [1, 2, 1]
    tracked.log_artifacts = None  # MLflow is away: the next one gives it the figures
    with pytest.raises(TypeError):
        draw_what_is_new([], sweep, tracked)
    tracked.log_artifacts = lambda folder, under: None
    draw_what_is_new([], sweep, tracked)
    assert drawn == [1, 2, 1, 0, 0]
