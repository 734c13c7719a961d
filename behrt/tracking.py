"""How does a run reach the MLflow store, and how is it found there again?

The only file that imports MLflow. The store is `mlruns/mlflow.db` (SQLite) with artifacts in `mlruns/artifacts`, below
the working folder; `MLFLOW_TRACKING_URI` names another one. The client is used directly, never the fluent interface:
that one keeps a run open in global state and ends it FAILED on any exception.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from behrt.config import UserError
from behrt.files import locked

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]

for _name in ("MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
    os.environ.setdefault(_name, "true")  # read by mlflow when it is imported

MAX_PARAM_LENGTH = 6000
"""Longest parameter value that every MLflow backend stores."""


def store_folder() -> Path:
    """`mlruns/` below the working folder."""
    return Path.cwd() / "mlruns"


def tracking_uri() -> str:
    """Where runs are tracked."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{store_folder() / 'mlflow.db'}"


def connect() -> MlflowClient:
    """A client of an initialised store.

    Several processes that open an empty SQLite store at once break it for good: MLflow creates its tables without a
    lock. The first opening therefore happens under one, which dies with its process.

    Raises:
        UserError: the store cannot be opened.
    """
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError  # MLflow lets those of a damaged database through

    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.WARNING)  # making the tables is nothing to report

    uri = tracking_uri()
    try:
        if uri.startswith("sqlite:///"):
            database = Path(uri.removeprefix("sqlite:///"))
            with locked(database.with_name(f".{database.name}.lock")):
                client = MlflowClient(tracking_uri=uri)
                client.search_experiments(max_results=1)
            return client
        client = MlflowClient(tracking_uri=uri)
        client.search_experiments(max_results=1)
    except (MlflowException, SQLAlchemyError, OSError) as error:
        reason = str(error).splitlines()[0][:200]
        raise UserError(f"MLFLOW_TRACKING_URI: {uri}: the store cannot be opened: {reason}") from None
    return client


def experiment_id(client: MlflowClient, name: str) -> str:
    """The id of the MLflow experiment of that name, created where there is none."""
    from mlflow.exceptions import MlflowException

    existing = client.get_experiment_by_name(name)
    if existing is None:
        local = "MLFLOW_TRACKING_URI" not in os.environ
        location = (store_folder() / "artifacts" / name).as_uri() if local else None
        try:
            return str(client.create_experiment(name, artifact_location=location))
        except MlflowException:  # another process was faster
            existing = client.get_experiment_by_name(name)
            if existing is None:
                raise
    if existing.lifecycle_stage == "deleted":
        raise UserError(f"--experiment: {name} was deleted in MLflow; restore it there or choose another name")
    return str(existing.experiment_id)


class TrackedRun:
    """One MLflow run, from its first parameter to its final status.

    Args:
        experiment: name of the folder under `experiments/`, and of the MLflow experiment.
        params: every setting, flattened with dots.
        tags: what the run is filtered by.
    """

    def __init__(self, *, experiment: str, params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        from mlflow.entities import Param, RunTag

        self._client = connect()
        self.experiment_id = experiment_id(self._client, experiment)
        run = self._client.create_run(self.experiment_id, tags=dict(tags))
        self.run_id: str = run.info.run_id
        self._client.log_batch(
            self.run_id,
            params=[Param(key, str(value)[:MAX_PARAM_LENGTH]) for key, value in params.items()],
            tags=[RunTag("mlflow.source.name", "behrt train"), *_commit_tag(RunTag)],
        )

    def log_figures(self, figures: Mapping[str, float], *, step: int = 0) -> None:
        """Metrics of one step, in one request."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self.run_id, metrics=[Metric(key, value, now, step) for key, value in figures.items()])

    def log_dataset(self, *, name: str, digest: str, context: str) -> None:
        """The data set that the run used, by name and digest (at most 36 characters)."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        # the source is what made it: the place of the records on a disk is nobody's business
        dataset = Dataset(name, digest, source_type="code", source=json.dumps({"tags": {"made_by": "behrt prepare"}}))
        self._client.log_inputs(self.run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", context)])])

    def log_artifacts(self, path: Path, *, under: str | None = None) -> None:
        """A file, or everything in a folder, below the artifact folder `under`."""
        if path.is_dir():
            self._client.log_artifacts(self.run_id, str(path), under)
        else:
            self._client.log_artifact(self.run_id, str(path), under)

    def log_text(self, text: str, name: str) -> None:
        """A small text file at the top of the artifacts."""
        self._client.log_text(self.run_id, text, name)

    def tag(self, tags: Mapping[str, str]) -> None:
        for key, value in tags.items():
            self._client.set_tag(self.run_id, key, value)

    def finish(self, status: RunStatus) -> None:
        self._client.set_terminated(self.run_id, status)


def _commit_tag(run_tag: type[Any]) -> list[Any]:
    """The git commit of the code, where it runs from a checkout."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=5, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return []
    return [run_tag("mlflow.source.git.commit", commit)]


def download_checkpoints(run_id: str) -> Path:
    """The checkpoints of a run, from its artifacts.

    Raises:
        UserError: the store has no such run, or the run has no checkpoints.
    """
    from mlflow.exceptions import MlflowException

    client = connect()
    destination = store_folder() / "downloads" / run_id
    destination.mkdir(parents=True, exist_ok=True)
    try:
        client.download_artifacts(run_id, "checkpoints", str(destination))
    except (MlflowException, OSError):
        raise UserError(f"{run_id}: {tracking_uri()} has no such run, or the run has no checkpoints") from None
    return destination


def ui_address(port: int, experiment: str | None = None) -> str:
    """The address of the list of runs, charts beside each other."""
    charts = "compareRunsMode=CHART&workflowType=machine_learning"
    return f"http://127.0.0.1:{port}/#/experiments/{experiment or 0}/runs?{charts}"


def serve_ui(port: int) -> NoReturn:
    """Becomes MLflow's own server over the local store, on this machine's loopback address."""
    connect()
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", tracking_uri()]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    os.execve(sys.executable, command, {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"})
