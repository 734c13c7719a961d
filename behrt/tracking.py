"""How does a run reach the MLflow store, and how is it found there again?

The only file that imports MLflow. The store is `mlruns/mlflow.db` (SQLite) with artifacts in `mlruns/artifacts`, below
the working folder; `MLFLOW_TRACKING_URI` names another one. The client is used directly, never the fluent interface:
that one keeps a run open in global state and ends it FAILED on any exception.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import cache
from http import HTTPStatus
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NoReturn, Self
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import urlopen

from behrt.config import UserError
from behrt.files import locked, replacing_file, replacing_folder
from behrt.imports import first_import

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]

# Read by MLflow when it is imported. With its own retries, a server that dies blocks one call for four minutes.
for _name, _value in (
    ("MLFLOW_DISABLE_TELEMETRY", "true"),
    ("DO_NOT_TRACK", "true"),
    ("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false"),
    ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1"),
    ("MLFLOW_HTTP_REQUEST_TIMEOUT", "10"),
):
    os.environ.setdefault(_name, _value)


class StoreUnavailable(UserError):
    """The store cannot be opened. No run is to blame.

    Attributes:
        may_pass: whether it may serve later: a server that is down, a disk that is full; not a wrong password.
    """

    def __init__(self, message: str, *, may_pass: bool = True) -> None:
        super().__init__(message)
        self.may_pass = may_pass


UNKNOWN_HOST = r"Name or service not known|nodename nor servname|No address associated"

LASTING_REASONS = re.compile(
    r"error code 40[0134]\b|not a database|[Uu]nsupported|parse SQLAlchemy URL|Can't load plugin|No module named|"
    + UNKNOWN_HOST
)
"""In the words of MLflow, SQLAlchemy and the system: what waiting does not mend."""

CREDENTIALS = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
MEANINGS = (
    (
        r"error code 401\b",
        f"the server asks for a user and a password, and does not know those given; set {CREDENTIALS}",
    ),
    (r"Invalid Host header", "the server does not answer by this host name; name it in the server's --allowed-hosts"),
    (UNKNOWN_HOST, "no host of this name is known; correct the name"),
    (r"Connection refused", "nothing listens there; start the server, or correct the address"),
)
"""What is meant by errors of the same, and what helps."""


def reason_of(error: Exception) -> str:
    """An error of the store in one line, without a password."""
    text = " ".join(str(error).replace(tracking_uri(), shown_uri()).split())
    return next((meaning for pattern, meaning in MEANINGS if re.search(pattern, text)), text[:200])


def may_pass(error: Exception) -> bool:
    """Whether the store may answer otherwise in a while."""
    if isinstance(error, StoreUnavailable):
        return error.may_pass
    lasting = (UserError, FileExistsError, NotADirectoryError, ValueError)
    return not isinstance(error, lasting) and LASTING_REASONS.search(str(error)) is None


SECONDS_TO_LOOK = 5.0

PARENT_TAG = "mlflow.parentRunId"
"""By which the MLflow UI lays a run under another one."""

TRIAL_STATE = "trial_state"
TRIAL_NUMBER = "trial_number"

MAX_PARAM_LENGTH = 6000
"""Longest parameter value that every MLflow backend stores."""


def store_folder() -> Path:
    """`mlruns/` below the working folder."""
    return Path.cwd() / "mlruns"


def is_local() -> bool:
    """Whether runs are tracked in `mlruns/`, and not where the environment says."""
    return not os.environ.get("MLFLOW_TRACKING_URI")


def tracking_uri() -> str:
    """Where runs are tracked."""
    return f"sqlite:///{store_folder() / 'mlflow.db'}" if is_local() else os.environ["MLFLOW_TRACKING_URI"]


def shown_uri() -> str:
    """The same for people and files: without a password."""
    return re.sub(r"(?i)(password=)[^&]*", r"\1***", re.sub(r"//[^/]*@", "//", tracking_uri()))


def connect() -> MlflowClient:
    """A client of an initialised store.

    Several processes that open an empty SQLite store at once break it for good: MLflow creates its tables without a
    lock. The first opening therefore happens under one, which dies with its process. A process that is killed while it
    creates the tables would break it, too: they are made in a file beside, which then takes the store's place.

    Raises:
        UserError: the store cannot be opened.
    """
    uri = tracking_uri()
    with first_import("mlflow"):
        from mlflow import MlflowClient

        if not uri.startswith("http"):
            import mlflow.store.tracking.sqlalchemy_store  # noqa: F401  (as the client would, a moment later)

    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.WARNING)  # making the tables is nothing to report
    for name in ("sqlalchemy.pool", "mlflow.store.db.utils", "urllib3.connectionpool"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # they print much; that the store failed, we say
    try:
        with ExitStack() as stack:
            if uri.startswith("sqlite:///"):
                database = Path(uri.removeprefix("sqlite:///"))
                stack.enter_context(locked(database.with_name(f".{database.name}.lock")))
                if not database.exists() or not database.stat().st_size:
                    _create_store(database)
            client = MlflowClient(tracking_uri=uri)
            client.search_experiments(max_results=1)
    except Exception as error:  # MLflow's own, SQLAlchemy's, the network's, the disk's
        raise StoreUnavailable(
            f"MLFLOW_TRACKING_URI: {shown_uri()}: the store cannot be opened: {reason_of(error)}",
            may_pass=may_pass(error),
        ) from None
    if uri.startswith("http"):
        _look_whether_a_password_is_asked_for(uri)
    return client


@cache
def _look_whether_a_password_is_asked_for(uri: str) -> None:
    """Warns, once, where a server is given a user and a password and serves whoever gives none."""
    parts = urlsplit(uri)
    if not (parts.username or os.environ.get("MLFLOW_TRACKING_USERNAME")):
        return
    place = parts._replace(netloc=parts.netloc.rpartition("@")[2], path=parts.path.rstrip("/")).geturl()
    try:
        urlopen(f"{place}/api/2.0/mlflow/experiments/get?experiment_id=0", timeout=SECONDS_TO_LOOK).close()
    except HTTPError as error:
        if error.code != HTTPStatus.NOT_FOUND:  # it has no such experiment, and says so to anybody
            return
    except OSError:
        return
    log.warning(
        "MLFLOW_TRACKING_URI: %s asks for no password, though one is given: whoever reaches it can change its runs",
        shown_uri(),
    )


def _create_store(database: Path) -> None:
    """Makes an SQLite store with its tables, whole or not at all."""
    from mlflow import MlflowClient

    for left in database.parent.glob(f".{database.name}.*.partial*"):  # by a process that was killed
        left.unlink(missing_ok=True)
    with replacing_file(database) as beside:
        MlflowClient(tracking_uri=f"sqlite:///{beside}").search_experiments(max_results=1)
        with closing(sqlite3.connect(beside)) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    for rest in ("-wal", "-shm"):  # of the file beside, which MLflow keeps open
        beside.with_name(beside.name + rest).unlink(missing_ok=True)


def experiment_id(client: MlflowClient, name: str) -> str:
    """The id of the MLflow experiment of that name, created where there is none."""
    from mlflow.exceptions import MlflowException

    existing = client.get_experiment_by_name(name)
    if existing is None:
        location = (store_folder() / "artifacts" / name).as_uri() if is_local() else None
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
    """The MLflow run of a study, or one that is told more of; trainings are told by `feeding`.

    Once it exists, a store that fails ends nothing: the first failure is logged as a warning.

    Args:
        experiment: name of the folder under `experiments/`, and of the MLflow experiment.
        params: every setting, flattened with dots.
        tags: what the run is filtered by.
        source: the command that made the run.
        name: of the run; MLflow makes one up if None.

    Raises:
        UserError: the store cannot be opened, or the experiment was deleted there.
    """

    def __init__(
        self,
        *,
        experiment: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        source: str = "behrt sweep run",
        name: str | None = None,
    ) -> None:
        self.is_complete = True
        self._client = connect()
        self.experiment_id = experiment_id(self._client, experiment)
        run = self._client.create_run(
            self.experiment_id,
            tags={**tags, "mlflow.source.name": source, **_commit_tag()},
            run_name=name,
        )
        self.run_id: str = run.info.run_id
        self.log_params(params)

    @classmethod
    def existing(cls, run_id: str) -> Self:
        """A run that is in the store already, to tell more of it.

        Raises:
            UserError: the store cannot be opened, or has no such run.
        """
        tracked = cls.__new__(cls)
        tracked.is_complete = True
        tracked._client = connect()
        try:
            tracked.experiment_id = str(tracked._client.get_run(run_id).info.experiment_id)
        except Exception:  # whatever the store says, there is nothing to tell more of
            raise UserError(f"{run_id}: {shown_uri()} has no such run") from None
        tracked.run_id = run_id
        return tracked

    @contextmanager
    def _tolerated(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # MLflow's own, SQLAlchemy's, the network's, the disk's
            if self.is_complete:
                log.warning("MLflow at %s failed (%s); the study goes on without it", shown_uri(), reason_of(error))
            self.is_complete = False

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Settings, which MLflow keeps as text."""
        from mlflow.entities import Param

        with self._tolerated():
            entities = [Param(key, str(value)[:MAX_PARAM_LENGTH]) for key, value in params.items()]
            self._client.log_batch(self.run_id, params=entities)

    def log_figures(self, figures: Mapping[str, float], *, step: int = 0) -> None:
        """Metrics of one step, in one request; those that are not finite stay out, for MLflow makes 1.8e308 of them."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        entities = [Metric(key, value, now, step) for key, value in figures.items() if math.isfinite(value)]
        with self._tolerated():
            self._client.log_batch(self.run_id, metrics=entities)

    def log_artifacts(self, path: Path, *, under: str | None = None) -> None:
        """A file, or everything in a folder, below the artifact folder `under`."""
        files = [path] if path.is_file() else [file for file in sorted(path.rglob("*")) if file.is_file()]
        files = [file for file in files if not file.is_symlink()]  # what they point to is not the run's
        with self._tolerated():
            for file in files:
                place = PurePosixPath(under or "", file.relative_to(path).parent)
                self._client.log_artifact(self.run_id, str(file), None if str(place) == "." else str(place))

    def tag(self, tags: Mapping[str, str]) -> None:
        """What the run is filtered by."""
        from mlflow.entities import RunTag

        with self._tolerated():
            self._client.log_batch(self.run_id, tags=[RunTag(key, value) for key, value in tags.items()])

    def finish(self, status: RunStatus) -> None:
        """The final status."""
        with self._tolerated():
            self._client.set_terminated(self.run_id, status)

    def reopen(self) -> None:
        """The run goes on."""
        with self._tolerated():
            self._client.update_run(self.run_id, status="RUNNING")

    def steps_of(self, name: str) -> set[int]:
        """The steps at which a metric has been told."""
        steps: set[int] = set()
        with self._tolerated():
            steps = {metric.step for metric in self._client.get_metric_history(self.run_id, name)}
        return steps

    def trials(self) -> list[TrackedTrial]:
        """The runs that are trials of this one, a study; those that were deleted in the UI are left out."""
        found: list[TrackedTrial] = []
        with self._tolerated():
            token = None
            while True:
                page = self._client.search_runs(
                    [self.experiment_id], f"tags.`{PARENT_TAG}` = '{self.run_id}'", page_token=token
                )
                found += [
                    TrackedTrial(
                        run_id=run.info.run_id,
                        number=int(run.data.tags[TRIAL_NUMBER]),
                        status=run.info.status,
                        state=run.data.tags.get(TRIAL_STATE),
                    )
                    for run in page
                    if TRIAL_NUMBER in run.data.tags
                ]
                token = page.token
                if not token:
                    break
        return found

    def settle(self, trial: TrackedTrial, *, status: RunStatus, state: str) -> None:
        """Makes a trial of this study, whose own process cannot say it any more, what it became."""
        with self._tolerated():
            self._client.set_tag(trial.run_id, TRIAL_STATE, state)
            self._client.set_terminated(trial.run_id, status)


RUN_KEY = "run_key"
"""Tag that names a run by the id that its folder gave it, whatever id the store gave it."""


class RunPoint(NamedTuple):
    """One value of a metric; `timestamp` in milliseconds since 1970."""

    name: str
    value: float
    timestamp: int
    step: int


class StoredRun:
    """One run as it stands in the store; every method is one request, and raises what the store raises.

    Raises:
        UserError: the store cannot be opened, the experiment or the run was deleted there.
    """

    def __init__(self, client: MlflowClient, run_id: str, *, is_new: bool) -> None:
        self._client = client
        self.run_id = run_id
        self.is_new = is_new

    @classmethod
    def of(
        cls,
        client: MlflowClient,
        *,
        experiment: str,
        key: str,
        run_id: str | None,
        name: str | None,
        started: int,
        tags: Mapping[str, str],
    ) -> Self:
        """The run of this key, created where the store has none.

        Args:
            run_id: under which this store has it, if that is known.
            started: milliseconds since 1970.
            tags: that a new run has as soon as it is there.
        """
        from mlflow.entities import ViewType
        from mlflow.exceptions import MlflowException

        try:
            known = client.get_run(run_id) if run_id is not None else None
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            known = None  # the store was made anew at its old address
        if known is not None and known.info.lifecycle_stage == "deleted":
            raise UserError(f"{run_id}: was deleted in MLflow; restore it there")
        if known is not None:
            return cls(client, known.info.run_id, is_new=False)
        number = experiment_id(client, experiment)
        # created by a request whose answer was lost, perhaps
        found = client.search_runs([number], f"tags.{RUN_KEY} = '{key}'", run_view_type=ViewType.ALL)
        if found and found[0].info.lifecycle_stage == "deleted":
            raise UserError(f"{found[0].info.run_id}: was deleted in MLflow; restore it there")
        if found:
            return cls(client, found[0].info.run_id, is_new=False)
        run = client.create_run(number, start_time=started, tags={**tags, RUN_KEY: key, **_commit_tag()}, run_name=name)
        return cls(client, run.info.run_id, is_new=True)

    def params(self) -> set[str]:
        """Names of the parameters that it has."""
        return set(self._client.get_run(self.run_id).data.params)

    def has_dataset(self) -> bool:
        inputs = self._client.get_run(self.run_id).inputs
        return inputs is not None and bool(inputs.dataset_inputs)

    def steps_of(self, metric: str) -> set[int]:
        """The steps at which it has a value."""
        return {point.step for point in self._client.get_metric_history(self.run_id, metric)}

    def log_params(self, params: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        self._client.log_batch(self.run_id, params=[Param(*pair) for pair in params.items()])

    def log_points(self, points: Sequence[RunPoint]) -> None:
        """Metrics, in as few requests as MLflow takes."""
        from mlflow.entities import Metric

        for batch in batched(points, 1000):
            self._client.log_batch(self.run_id, metrics=[Metric(*point) for point in batch])

    def tag(self, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        self._client.log_batch(self.run_id, tags=[RunTag(*pair) for pair in tags.items()])

    def log_dataset(self, *, name: str, digest: str) -> None:
        """The records that the run trains on, by name and digest (36 characters of it)."""
        from mlflow.entities import Dataset, DatasetInput, InputTag
        from mlflow.exceptions import MlflowException

        made_by = json.dumps({"tags": {"made_by": "behrt prepare"}})
        dataset = Dataset(name, digest[:36], source_type="code", source=made_by)
        inputs = [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])]
        try:
            self._client.log_inputs(self.run_id, inputs)
        except MlflowException as error:
            # MLflow looks whether it knows the records, then adds them: another run has just done so in between.
            if not any(text in str(error) for text in ("UNIQUE constraint", "UniqueViolation")):
                raise
            self._client.log_inputs(self.run_id, inputs)

    def upload(self, file: Path, place: str) -> None:
        """A file as the artifact at `place`, which is replaced."""
        folder, _, name = place.rpartition("/")
        if file.name == name:
            self._client.log_artifact(self.run_id, str(file), folder or None)
            return
        with tempfile.TemporaryDirectory() as here:
            shutil.copyfile(file, Path(here) / name)
            self._client.log_artifact(self.run_id, str(Path(here) / name), folder or None)

    def delete_artifacts(self, place: str) -> None:
        """A folder of artifacts, where there is one."""
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        if place in {found.path for found in self._client.list_artifacts(self.run_id)}:
            uri = self._client.get_run(self.run_id).info.artifact_uri
            repository = get_artifact_repository(uri, tracking_uri=tracking_uri())
            repository.delete_artifacts(place)  # type: ignore[no-untyped-call]

    def set_status(self, status: RunStatus | Literal["RUNNING"], *, ended: int | None) -> None:
        """`ended` in milliseconds since 1970; None while it runs."""
        if status == "RUNNING":
            self._client.update_run(self.run_id, status=status)
        else:
            self._client.set_terminated(self.run_id, status, end_time=ended)


class TrackedTrial(NamedTuple):
    """A trial as the store has it: `status` is MLflow's, `state` the tag `trial_state`."""

    run_id: str
    number: int
    status: str
    state: str | None


@cache
def _commit_tag() -> dict[str, str]:
    """The git commit of the code, where it runs from its own checkout, or from an image that names it."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():  # installed, perhaps inside somebody else's checkout
        revision = os.environ.get("BEHRT_REVISION")
        return {"mlflow.source.git.commit": revision} if revision else {}
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, timeout=5, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"mlflow.source.git.commit": commit}


def batched(items: Sequence[RunPoint], size: int) -> Iterator[Sequence[RunPoint]]:
    """So many at a time."""
    for first in range(0, len(items), size):
        yield items[first : first + size]


def download_checkpoints(run_id: str) -> Path:
    """The checkpoints of a run, from its artifacts, in a folder below `mlruns/downloads`.

    Raises:
        UserError: the store has no such run, or the run has no checkpoints.
    """
    destination = store_folder() / "downloads" / run_id
    with replacing_folder(destination) as beside:
        if not download_artifacts(run_id, "checkpoints", beside):
            raise UserError(f"{run_id}: {shown_uri()} has no such run, or the run has no checkpoints")
    return destination


def download_artifacts(run_id: str, place: str, destination: Path) -> bool:
    """Brings the artifact folder `place` of a run into `destination`; False where there is nothing of it.

    Raises:
        UserError: the store cannot be opened.
    """
    client = connect()
    try:
        client.download_artifacts(run_id, place, str(destination))
    except Exception:  # whatever the store says, there is nothing to load
        return False
    return True


def tags_of(run_id: str) -> Mapping[str, str]:
    """The tags of a run. Raises `UserError` where the store has none of that id."""
    client = connect()
    try:
        return dict(client.get_run(run_id).data.tags)
    except Exception:  # whatever the store says, there is nothing to read
        raise UserError(f"{run_id}: {shown_uri()} has no such run") from None


@dataclass(frozen=True)
class TrackedRecord:
    """What the store holds of a run.

    Attributes:
        status: MLflow's: `RUNNING`, `FINISHED`, `FAILED`, `KILLED` or `SCHEDULED`.
        params, tags: as text.
        metrics: the latest value of each.
        histories: of the metrics that were asked for, (step, value) by step; infinite where the store says 1.8e308.
        texts: of the artifacts that were asked for, those that the run has, by path.
    """

    status: str
    params: Mapping[str, str]
    tags: Mapping[str, str]
    metrics: Mapping[str, float]
    histories: Mapping[str, list[tuple[int, float]]]
    texts: Mapping[str, str]


def read_tracked_run(run_id: str, *, wanted: Callable[[str], bool], texts: Iterable[str] = ()) -> TrackedRecord:
    """A run as the store has it.

    Args:
        wanted: whether the history of the metric of that name is read; each is a request.
        texts: paths of small artifacts.

    Raises:
        UserError: the store has no such run.
    """
    client = connect()
    try:
        run = client.get_run(run_id)
        histories = {
            name: [
                (metric.step, metric.value if abs(metric.value) < sys.float_info.max else math.inf)
                for metric in sorted(
                    client.get_metric_history(run_id, name), key=lambda metric: (metric.step, metric.timestamp)
                )
            ]
            for name in run.data.metrics
            if wanted(name)
        }
    except Exception:  # whatever the store says, there is nothing to read
        raise UserError(f"{run_id}: {shown_uri()} has no such run, and no folder below experiments/ holds it") from None
    found = {path: _artifact_text(client, run_id, path) for path in texts}
    return TrackedRecord(
        status=run.info.status,
        params=run.data.params,
        tags=run.data.tags,
        metrics=run.data.metrics,
        histories=histories,
        texts={path: text for path, text in found.items() if text is not None},
    )


def _artifact_text(client: MlflowClient, run_id: str, path: str) -> str | None:
    """The text of an artifact; None where the run has none of that path, or its artifacts are out of reach."""
    try:
        folder = path.rpartition("/")[0] or None
        if path not in {artifact.path for artifact in client.list_artifacts(run_id, folder)}:
            return None
        with tempfile.TemporaryDirectory() as here:
            return Path(client.download_artifacts(run_id, path, here)).read_text(encoding="utf-8")
    except Exception:  # MLflow's own, the network's, the disk's
        return None


def ui_address(port: int) -> str:
    """The address of the experiment of the latest run, its runs beside a chart of their curves."""
    client = connect()
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    latest = client.search_runs(experiments, max_results=1, order_by=["attributes.start_time DESC"])
    experiment = latest[0].info.experiment_id if latest else "0"
    charts = "compareRunsMode=CHART&workflowType=machine_learning"
    return f"http://127.0.0.1:{port}/#/experiments/{experiment}/runs?{charts}"


def serve_ui(port: int) -> NoReturn:
    """Becomes MLflow's own server over the store, on this machine's loopback address.

    Raises:
        UserError: the store is behind a server already.
    """
    if tracking_uri().startswith("http"):
        raise UserError(f"MLFLOW_TRACKING_URI: {shown_uri()} is a server already; open it in the browser")
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", tracking_uri()]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    os.execve(sys.executable, command, {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"})
