"""Does MLflow get everything that a run keeps, once, whatever becomes of MLflow meanwhile?"""

import json
import shutil
import socket
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from behrt.cli import main
from behrt.config import UserError
from behrt.feeder import Feeder
from behrt.feeding import FolderFeed, TrackingRecord, new_record
from behrt.files import FolderLock, write_json
from behrt.history import EPOCH_FIGURES, read_history, read_run
from behrt.sync import mark_dead, sync_folder
from behrt.tracking import StoredRun, StoreUnavailable, connect, experiment_id

from .conftest import Workspace


def flags_of(workspace: Workspace, *more: str) -> list[str]:
    common = ["train", "--data", str(workspace.prepared), "--max-patients", "60", "--lr", "3e-3", "--epochs", "3"]
    return [*common, "--experiment", "run", *more]


def run_in(root: Path) -> Path:
    return root / "experiments" / "run"


def client_of(root: Path) -> MlflowClient:
    return MlflowClient(tracking_uri=f"sqlite:///{root}/mlruns/mlflow.db")


def assert_all_in_mlflow_once(root: Path, folder: Path) -> None:
    run_id, history = read_run(folder)["run_id"], read_history(folder)
    client = client_of(root)
    for name in EPOCH_FIGURES:
        told = sorted((point.step, point.value) for point in client.get_metric_history(run_id, name))
        assert told == [(point["epoch"], point["value"]) for point in history[name]]
    tracked = client.get_run(run_id)
    assert tracked.info.status == read_run(folder)["status"]
    assert tracked.data.params["training.lr"] == "0.003"
    assert {file.path for file in client.list_artifacts(run_id, "plots")} >= {"plots/loss_curve.png"}


@contextmanager
def silent_server() -> Iterator[str]:
    """A server that takes connections and never answers, as a process that was stopped."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(64)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def dead_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def test_a_server_that_is_down_costs_no_epoch_and_sync_brings_all_of_it(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", dead_address().replace("//", "//me:hunter2@"))
    assert main(flags_of(workspace)) == 0
    said = capsys.readouterr().err
    assert "to send the rest: behrt sync experiments/run" in said
    assert "hunter2" not in said
    about = read_run(run_in(tmp_path))
    assert (about["status"], about["epochs"], about["tracking_complete"], about["run_id"]) == (
        "FINISHED",
        3,
        False,
        None,
    )
    assert main(["sync"]) == 2  # it is still down
    assert "could not be sent" in capsys.readouterr().err
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert main(["sync", "experiments/run"]) == 0
    assert "sent 3 epochs" in capsys.readouterr().err
    assert_all_in_mlflow_once(tmp_path, run_in(tmp_path))
    assert main(["sync", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"experiments/run": "complete"}
    assert_all_in_mlflow_once(tmp_path, run_in(tmp_path))
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and b"hunter2" in file.read_bytes()]


def test_a_server_that_never_answers_is_left_after_its_patience(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("behrt.feeder.SECONDS_FOR_A_RUN", 0.5)
    monkeypatch.setattr(Feeder.wait_for_run, "__defaults__", (0.5,))
    monkeypatch.setattr("behrt.lifecycle.SECONDS_OF_SILENCE", 0.5)
    with silent_server() as uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        began = time.monotonic()
        assert main(flags_of(workspace)) == 0
        assert time.monotonic() - began < 9.5  # one request alone would wait for 10 s
    assert read_run(run_in(tmp_path))["tracking_complete"] is False


def test_a_store_that_will_not_take_the_run_is_said_before_it_trains(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    client = connect()
    client.delete_experiment(experiment_id(client, "run"))
    assert main(flags_of(workspace)) == 2
    assert "--experiment: run was deleted in MLflow" in capsys.readouterr().err
    assert not list(run_in(tmp_path).glob("[!.]*"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run that says something of every kind."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run"
    points = {name: [{"epoch": epoch, "value": 1 / epoch} for epoch in (1, 2)] for name in EPOCH_FIGURES}
    write_json(folder / "logs" / "metrics_history.json", points)
    new_record(
        experiment="mine",
        params={"training.lr": 0.003},
        tags={"device": "cpu"},
        figures={"floor_loss": 2.5},
        dataset={"name": "records", "digest": "d" * 64},
    ).save(folder)
    return folder


def steps_in_mlflow(folder: Path, metric: str = "val_loss") -> list[int]:
    run_id = TrackingRecord.load(folder).run_id
    assert run_id is not None
    return sorted(point.step for point in connect().get_metric_history(run_id, metric))


@pytest.mark.parametrize("request_name", ["of", "log_params", "log_dataset", "tag", "log_points", "set_status"])
@pytest.mark.parametrize("arrives", [True, False], ids=["arrived", "lost"])
def test_a_request_that_fails_is_made_up_for_and_nothing_is_sent_twice(
    folder: Path, monkeypatch: pytest.MonkeyPatch, request_name: str, arrives: bool
) -> None:
    """Its answer may be lost after the store has done what it was asked."""
    whole: Any = getattr(StoredRun, request_name)
    FolderFeed(folder).update(lambda record: TrackingRecord(**{**vars(record), "status": "FINISHED", "ended": 1}))

    def fails(*given: Any, **named: Any) -> None:
        if arrives:
            whole(*given, **named)
        raise ConnectionError("gone")

    feed = FolderFeed(folder)
    with monkeypatch.context() as patch:
        patch.setattr(StoredRun, request_name, fails)
        with pytest.raises(ConnectionError):
            feed.feed()
    feed.feed()
    client = connect()
    (run,) = client.search_runs([experiment_id(client, "mine")])
    assert steps_in_mlflow(folder) == [1, 2]
    assert steps_in_mlflow(folder, "floor_loss") == [0]
    assert run.data.params["training.lr"] == "0.003"
    assert (run.data.tags["device"], run.info.status) == ("cpu", "FINISHED")
    assert len(run.inputs.dataset_inputs) == 1
    assert not FolderFeed(folder).feed().anything


def test_another_store_gets_the_whole_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FolderFeed(folder).feed()
    first = TrackingRecord.load(folder).run_id
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder.parent}/other.db")
    FolderFeed(folder).feed()
    assert TrackingRecord.load(folder).run_id != first
    assert steps_in_mlflow(folder) == [1, 2]


def test_a_run_that_was_deleted_in_mlflow_is_left_alone(folder: Path) -> None:
    FolderFeed(folder).feed()
    connect().delete_run(TrackingRecord.load(folder).run_id)
    with pytest.raises(UserError, match="was deleted in MLflow"):
        sync_folder(folder)


def test_the_feeder_catches_up_when_the_store_comes_back(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("behrt.feeder.FIRST_BACKOFF", 0.05)
    came_back = threading.Event()
    whole = connect

    def away() -> MlflowClient:
        if not came_back.is_set():
            raise StoreUnavailable("away")
        return whole()

    monkeypatch.setattr("behrt.feeding.connect", away)
    feeder = Feeder(folder)
    assert feeder.wait_for_run() is None
    came_back.set()
    assert feeder.finish()
    assert steps_in_mlflow(folder) == [1, 2]


def test_an_ended_feeder_does_not_wait_for_a_store_in_silence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asleep = threading.Event()
    monkeypatch.setattr("behrt.feeding.connect", lambda: asleep.wait(30))
    feeder = Feeder(folder)
    began = time.monotonic()
    assert not feeder.finish(silence=0.2)
    assert time.monotonic() - began < 5
    asleep.set()


def test_a_link_in_a_runs_folder_is_not_followed_to_mlflow(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("not the run's")
    (folder / "plots").mkdir()
    (folder / "plots" / "link.png").symlink_to(tmp_path / "secret")
    FolderFeed(folder).update(lambda record: TrackingRecord(**{**vars(record), "status": "FINISHED", "ended": 1}))
    FolderFeed(folder).feed()
    run_id = TrackingRecord.load(folder).run_id
    assert run_id is not None
    assert not connect().list_artifacts(run_id, "plots")


def test_a_run_that_died_is_marked_by_the_next_command_that_meets_it(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with chdir(tmp_path):
        assert main(flags_of(workspace)) == 0
        folder = run_in(tmp_path)
        revive(folder)
        assert main(["doctor", str(folder)]) == 0
        assert (read_run(folder)["status"], read_run(folder)["died"]) == ("KILLED", True)
        tracked = client_of(tmp_path).get_run(read_run(folder)["run_id"])
        assert (tracked.info.status, tracked.data.tags["ended"]) == ("KILLED", "died")
        revive(folder)
        assert main(flags_of(workspace)) == 0
        assert "died without a word" in capsys.readouterr().err
        (former,) = (folder / "earlier").iterdir()
        assert read_run(former)["status"] == "KILLED"


def revive(folder: Path) -> None:
    """As if the process had been killed before it could tell the end."""
    write_json(folder / "run.json", {**read_run(folder), "status": "RUNNING"})
    FolderFeed(folder).update(lambda record: TrackingRecord(**{**vars(record), "status": "RUNNING", "ended": None}))


def test_a_run_whose_process_lives_is_not_taken_for_dead(folder: Path) -> None:
    lock = FolderLock(folder)
    try:
        assert not mark_dead(folder)
        assert main(["sync", str(folder)]) == 0
    finally:
        lock.release()
    assert mark_dead(folder)
    assert not mark_dead(folder)


@pytest.mark.parametrize(
    ("target", "expected"),
    [("nowhere", "no such folder"), ("f" * 32, "no such folder"), (".", "holds no run that was tracked")],
)
def test_what_is_no_run_is_not_synced(folder: Path, capsys: pytest.CaptureFixture, target: str, expected: str) -> None:
    assert main(["sync", target]) == 2
    assert expected in capsys.readouterr().err


def test_a_folder_that_was_copied_is_the_same_run(folder: Path) -> None:
    FolderFeed(folder).feed()
    copy = folder.with_name("copy")
    shutil.copytree(folder, copy)
    FolderFeed(copy).feed()
    assert steps_in_mlflow(copy) == [1, 2]
    assert len(connect().search_runs([experiment_id(connect(), "mine")])) == 1


def test_a_store_that_was_made_anew_at_its_old_address_gets_the_whole_run(folder: Path) -> None:
    FolderFeed(folder).feed()
    with sqlite3.connect(folder.parent / "mlruns" / "mlflow.db") as database:
        for table in ("metrics", "latest_metrics", "params", "tags", "inputs", "runs"):
            database.execute(f"DELETE FROM {table}")
    FolderFeed(folder).feed()
    assert steps_in_mlflow(folder) == [1, 2]


def test_an_epoch_that_was_lost_is_not_told_for_it_is_trained_again(folder: Path) -> None:
    history = read_history(folder)
    history["train_loss"][1]["value"] = None
    write_json(folder / "logs" / "metrics_history.json", history)
    FolderFeed(folder).feed()
    assert steps_in_mlflow(folder, "learning_rate") == [1]


def test_a_run_has_its_tags_as_soon_as_it_is_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial that is stopped right after belongs to its study all the same."""

    def dies(*given: Any) -> None:
        raise SystemExit

    monkeypatch.setattr(StoredRun, "log_params", dies)
    with pytest.raises(SystemExit):
        FolderFeed(folder).feed()
    client = connect()
    (run,) = client.search_runs([experiment_id(client, "mine")])
    assert run.data.tags["device"] == "cpu"
