"""Is the MLflow store safe to open by several runs at once, and does it hold what it was given?"""

import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from behrt import tracking
from behrt.config import UserError
from behrt.tracking import StoredRun, TrackedRun, connect, download_checkpoints, experiment_id, tracking_uri

from .empty_stores import make_store


@pytest.fixture
def _stores_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not copied, as in other tests."""
    monkeypatch.setattr(tracking, "_create_store", make_store)


def open_and_log(folder: str, number: int) -> None:
    with chdir(folder):
        run = TrackedRun(experiment="shared", params={"number": number}, tags={})
        run.log_figures({"val_loss": float(number)}, step=1)
        run.finish("FINISHED")


def test_four_runs_that_start_at_once_on_an_empty_store_all_arrive(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=open_and_log, args=(str(tmp_path), number)) for number in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    assert [process.exitcode for process in processes] == [0, 0, 0, 0]
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlruns/mlflow.db")
    experiment = client.get_experiment_by_name("shared")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert sorted(run.data.metrics["val_loss"] for run in runs) == [0.0, 1.0, 2.0, 3.0]
    assert {run.info.status for run in runs} == {"FINISHED"}


@pytest.mark.usefixtures("_stores_are_made")
def test_a_process_that_dies_while_it_makes_the_store_does_not_break_it(tmp_path: Path) -> None:
    """Its tables are made one after the other; the process ends itself in the middle of that."""
    dies = (
        "import os, sqlalchemy, behrt.tracking as tracking; made = []; "
        "listen = lambda *given: made.append(1) or (len(made) == 40 and os._exit(9)); "
        "sqlalchemy.event.listen(sqlalchemy.Engine, 'before_cursor_execute', listen); tracking.connect()"
    )
    assert subprocess.run([sys.executable, "-c", dies], cwd=tmp_path, check=False).returncode == 9
    with chdir(tmp_path):
        assert experiment_id(connect(), "mine")
    assert sorted(path.name for path in (tmp_path / "mlruns").iterdir()) == [".mlflow.db.lock", "mlflow.db"]


def test_artifacts_stand_below_mlruns(tmp_path: Path) -> None:
    with chdir(tmp_path):
        run = TrackedRun(experiment="a", params={}, tags={"device": "cpu"})
        connect().log_text(run.run_id, "text", "note.txt")
        run.tag({"diagnosis": "healthy"})
        run.finish("KILLED")
        (found,) = (tmp_path / "mlruns" / "artifacts").rglob("note.txt")
        assert found.read_text() == "text"
        client = connect()
        tags = client.get_run(run.run_id).data.tags
    assert (tags["device"], tags["diagnosis"]) == ("cpu", "healthy")
    assert client.get_run(run.run_id).info.status == "KILLED"


@pytest.mark.usefixtures("_stores_are_made")
def test_the_environment_names_another_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = f"sqlite:///{tmp_path}/elsewhere/store.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", other)
    assert tracking_uri() == other
    connect()
    assert (tmp_path / "elsewhere" / "store.db").exists()


def test_a_store_that_cannot_be_opened_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "store.db").write_bytes(b"this is no database" * 100)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/store.db")
    with pytest.raises(UserError, match="cannot be opened") as caught:
        connect()
    assert "\n" not in str(caught.value)


def test_a_deleted_experiment_is_refused_by_name(tmp_path: Path) -> None:
    with chdir(tmp_path):
        client = connect()
        client.delete_experiment(experiment_id(client, "gone"))
        with pytest.raises(UserError, match="--experiment: gone was deleted"):
            experiment_id(client, "gone")


def test_a_run_without_checkpoints_is_refused(tmp_path: Path) -> None:
    with chdir(tmp_path):
        run = TrackedRun(experiment="a", params={}, tags={})
        with pytest.raises(UserError, match="has no such run, or the run has no checkpoints"):
            download_checkpoints(run.run_id)


@pytest.mark.parametrize("text", ["(IntegrityError) UNIQUE constraint failed: datasets.name", "(UniqueViolation) key"])
def test_records_that_another_run_adds_at_the_same_moment_are_logged_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    with chdir(tmp_path):
        client = connect()
        about = {"experiment": "a", "run_id": None, "name": None, "started": 0, "tags": {}}
        first, second = (StoredRun.of(client, key=key, **about) for key in ("1", "2"))
        log_inputs, refusals = client.log_inputs, [MlflowException(text)]

        def be_second(*arguments: object) -> None:
            if refusals:
                raise refusals.pop()
            log_inputs(*arguments)

        first.log_dataset(name="records", digest="d")
        monkeypatch.setattr(client, "log_inputs", be_second)
        second.log_dataset(name="records", digest="d")
        assert [found.dataset.name for found in client.get_run(second.run_id).inputs.dataset_inputs] == ["records"]
        refusals.append(MlflowException("the disk is full"))
        with pytest.raises(MlflowException, match="the disk is full"):
            second.log_dataset(name="records", digest="d")


def test_telemetry_is_off() -> None:
    # in a process of its own, without what tests set: MLflow is silent under pytest and CI anyway
    quiet = ("CI", "PYTEST_CURRENT_TEST", "MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK")
    environment = {name: value for name, value in os.environ.items() if name not in quiet}
    code = "import behrt.tracking, sys; from mlflow.telemetry import get_telemetry_client; "
    code += "sys.exit(get_telemetry_client() is not None)"
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        (
            "API request to endpoint /a failed with error code 401 != 200. Response body: 'You are not",
            "asks for a user",
        ),
        ("failed with error code 403 != 200. Response body: 'Invalid Host header - possible DNS", "--allowed-hosts"),
        (
            "(Caused by NameResolutionError(\"Failed to resolve 'a' ([Errno -2] Name or service not known",
            "correct the name",
        ),
    ],
)
def test_what_a_server_refuses_for_good_is_said_with_what_helps(said: str, meant: str) -> None:
    assert meant in tracking.reason_of(RuntimeError(said))
    assert not tracking.may_pass(RuntimeError(said))


def test_a_server_that_is_not_there_may_come() -> None:
    error = RuntimeError("Max retries exceeded (Caused by NewConnectionError('[Errno 111] Connection refused'))")
    assert tracking.may_pass(error)
    assert "nothing listens there" in tracking.reason_of(error)


@pytest.mark.parametrize(
    "uri",
    ["http://me:hunter2@host:5000", "http://me:hun@ter2@host:5000", "postgresql://host/a?user=me&Password=hunter2"],
)
def test_an_address_is_shown_without_its_password(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert "ter2" not in tracking.shown_uri()
    assert "host" in tracking.shown_uri()


def test_a_run_in_an_image_names_the_commit_that_it_was_built_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "__file__", str(tmp_path / "behrt" / "tracking.py"))
    tracking._commit_tag.cache_clear()
    monkeypatch.setenv("BEHRT_REVISION", "0a1b2c")
    try:
        assert tracking._commit_tag() == {"mlflow.source.git.commit": "0a1b2c"}
    finally:
        tracking._commit_tag.cache_clear()


@contextmanager
def answering(code: int, seen: list[str | None]) -> Iterator[str]:
    """A server that answers whoever gives no password so, and notes what it was given."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.headers["Authorization"])
            self.send_response(code)
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(("code", "warns"), [(200, True), (404, True), (401, False), (403, False), (500, False)])
def test_a_server_that_asks_for_no_password_is_told_of_where_one_is_given(
    code: int, warns: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[str | None] = []
    with answering(code, seen) as address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:hunter2@{address}")
        tracking._look_whether_a_password_is_asked_for(f"http://user:hunter2@{address}")
    assert seen == [None]
    assert ("asks for no password, though one is given" in caplog.text) == warns
    assert "hunter2" not in caplog.text


def test_without_a_password_nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_USERNAME", raising=False)
    seen: list[str | None] = []
    with answering(200, seen) as address:
        tracking._look_whether_a_password_is_asked_for(f"http://{address}")
    assert seen == []
