"""Is a trial that could not be trained through no fault of its own continued, from where it stood?"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from mlflow import MlflowClient

from behrt import pretrain as recipe
from behrt.config import UserError
from behrt.feeder import Feeder
from behrt.files import write_json
from behrt.history import read_history, read_run
from behrt.records import RecordsCache
from behrt.stopper import Stopper
from behrt.sweep.liveness import WorkerToken
from behrt.sweep.settings import load_sweep
from behrt.sweep.storage import StorageLost, open_storage
from behrt.sweep.study import Done, Report, SweepStudy, Wait
from behrt.sweep.tracked import begin_study_run, settle_trials
from behrt.sweep.trial import run_trial
from behrt.sweep.trials import PARENT_RUN_ID
from behrt.tracking import StoreUnavailable, TrackedRun

from .small_sweeps import write_sweep


class Trials:
    """A study of one trial, whose attempts are trained in this process."""

    def __init__(self, root: Path, prepared: Path) -> None:
        sweep = load_sweep(write_sweep(root / "s.yaml", prepared, budget={"trials": 1}))
        self.study = SweepStudy.begin(sweep, open_storage(None))
        self.study.note_once(PARENT_RUN_ID, lambda: begin_study_run(sweep))
        self.cache = RecordsCache()

    def train(self, stopper: Stopper | None = None) -> optuna.Trial:
        with WorkerToken(Path("sweeps/s")) as token:
            trial = self.study.claim(token.worker, is_alive=lambda worker: False)
            assert not isinstance(trial, Wait | Done)
            stopper = stopper or Stopper(listens=False)
            run_trial(self.study, trial, folder=Path("sweeps/s"), records_cache=self.cache, stopper=stopper)
        return trial

    def ended(self) -> list[tuple[str, str | None, int]]:
        return [(record.state.value, record.ended, record.continued_from) for record in self.study.records()]


@pytest.fixture
def trials(tmp_path: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch) -> Trials:
    (tmp_path / "sweeps").mkdir()
    monkeypatch.chdir(tmp_path)
    return Trials(tmp_path, prepared)


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (StoreUnavailable("MLFLOW_TRACKING_URI: no answer"), StoreUnavailable),
        (StorageLost("no answer"), StorageLost),
        (OSError(28, "No space left on device"), UserError),
    ],
)
def test_what_would_fail_every_trial_fails_none(
    trials: Trials, monkeypatch: pytest.MonkeyPatch, error: Exception, raised: type[Exception]
) -> None:
    def fails(*given: Any, **named: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(recipe, "save_checkpoint", fails)
        with pytest.raises(raised):
            trials.train()
    assert trials.ended() == [("FAILED", "interrupted", 0)]
    assert trials.study.tally().finished == 0
    trials.train()
    assert trials.ended()[1] == ("COMPLETE", "all epochs", 0)


def lose_before_it_is_told(trials: Trials, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trains the trial to its end; its worker dies before it can tell the study."""

    def dies(*given: Any, **named: Any) -> bool:
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(trials.study, "tell", dies)
        with pytest.raises(SystemExit):
            trials.train()
    trials.study.reap(lambda worker: False)


def test_a_trial_whose_worker_dies_before_it_can_tell_the_end_is_not_trained_again(
    trials: Trials, monkeypatch: pytest.MonkeyPatch
) -> None:
    lose_before_it_is_told(trials, monkeypatch)
    trials.train()
    lost, retry = trials.ended()
    assert (lost[0], retry) == ("FAILED", ("COMPLETE", "all epochs", 3))
    folders = [Path(record.folder or "") for record in trials.study.records()]
    assert read_history(folders[0]) == read_history(folders[1])
    assert not list(folders[1].rglob("optimizer.safetensors"))


def without_a_state(folder: Path) -> None:
    for state in folder.glob("checkpoints/*/training_state.json"):
        state.write_text("{")


def of_another_study(folder: Path) -> None:
    write_json(folder / "run.json", {**read_run(folder), "trial": {"study_run_id": "another", "number": 0}})


@pytest.mark.parametrize("spoil", [without_a_state, of_another_study])
def test_an_attempt_whose_folder_does_not_serve_is_passed_over(
    trials: Trials, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Path], None]
) -> None:
    lose_before_it_is_told(trials, monkeypatch)
    (folder,) = (Path(record.folder or "") for record in trials.study.records() if record.folder)
    spoil(folder)
    trials.train()
    assert trials.ended()[1] == ("COMPLETE", "all epochs", 0)


def test_the_state_of_the_optimizer_is_not_given_to_mlflow(trials: Trials) -> None:
    trials.train()
    client = MlflowClient(tracking_uri=f"sqlite:///{Path.cwd()}/mlruns/mlflow.db")
    (record,) = trials.study.records()
    names = {file.path for file in client.list_artifacts(record.run_id, "checkpoints/last")}
    assert "checkpoints/last/checkpoint.json" in names
    assert not any("optimizer" in name for name in names)


def test_a_run_that_had_no_time_for_its_parameters_is_settled(trials: Trials, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a worker that dies right after it made its run in MLflow."""

    whole = Feeder.wait_for_run

    def dies(feeder: Feeder) -> None:
        whole(feeder)
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(Feeder, "wait_for_run", dies)
        with pytest.raises(SystemExit):
            trials.train()
    trials.study.reap(lambda worker: False)
    parent = TrackedRun.existing(trials.study.noted(PARENT_RUN_ID))
    assert [trial.status for trial in parent.trials()] == ["RUNNING"]
    settle_trials(parent, trials.study.records())
    assert [(trial.status, trial.state) for trial in parent.trials()] == [("FAILED", "FAILED")]


def test_a_signal_after_the_last_epoch_does_not_cut_off_what_is_kept(
    trials: Trials, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopper, whole = Stopper(listens=False), Feeder.finish

    def finish(feeder: Feeder, **named: Any) -> bool:
        stopper._stop(2, None)
        return whole(feeder, **named)

    monkeypatch.setattr(Feeder, "finish", finish)
    trials.train(stopper)
    assert stopper.is_asked
    assert trials.ended() == [("COMPLETE", "all epochs", 0)]


def test_an_epoch_that_was_kept_and_not_yet_reported_is_counted_once(
    trials: Trials, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(*given: Any, epoch: int, **named: Any) -> Report:
        if epoch == 2:
            raise SystemExit
        return Report.KEEP

    with monkeypatch.context() as patch:
        patch.setattr(trials.study, "report", dies)
        with pytest.raises(SystemExit):
            trials.train()
    trials.study.reap(lambda worker: False)
    trials.train()
    assert trials.ended()[1] == ("COMPLETE", "all epochs", 0)  # here not even the first was reported
    assert trials.study.tally().trained_epochs == 3
