"""How does what a run keeps on disk reach MLflow, whatever becomes of MLflow meanwhile?

The folder of a run says what the store is to hold of it: `logs/tracking.json` (parameters, tags, status), the history
of its epochs, its files. `feed` compares that with the store and sends what is missing, so that it can be cut off,
repeated, or done days later (`behrt sync`). While a run trains, a thread feeds; the training never waits for it.
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, Self

from behrt.config import UserError
from behrt.files import read_json, sha256_of_file, write_json
from behrt.history import finite, read_history, read_run
from behrt.tracking import (
    MAX_PARAM_LENGTH,
    RunPoint,
    RunStatus,
    StoredRun,
    connect,
    shown_uri,
)

log = logging.getLogger(__name__)

RECORD_FILE = Path("logs", "tracking.json")
FILES_SENT_FILE = Path("logs", "files_sent.json")
MIRROR_FOLDER = Path("checkpoints", ".mirror")
RESUME_ARTIFACTS = "resume"
MIRRORS = ("a", "b")
"""Below `resume/`: written in turn, so that one of them is whole at every moment."""

ABOUT_TRACKING = ("run_id", "tracking_complete", "tracking_uri")

SLOWEST_UPLOAD = 500_000.0
"""Bytes a second; a slower upload counts as silence."""


@dataclass(frozen=True, kw_only=True)
class TrackingRecord:
    """What the store is to hold of a run beside its epochs and its files.

    Attributes:
        key: the run's own id, 32 hexadecimal digits; by it the store is searched.
        run_id: the store's id, once it has given one; `store` is the address of that store, without a password.
        started, ended: milliseconds since 1970.
    """

    key: str
    experiment: str
    params: Mapping[str, str]
    tags: Mapping[str, str] = field(default_factory=dict)
    figures: Mapping[str, float] = field(default_factory=dict)
    dataset: Mapping[str, str] | None = None
    name: str | None = None
    status: RunStatus | Literal["RUNNING"] = "RUNNING"
    started: int
    ended: int | None = None
    run_id: str | None = None
    store: str | None = None

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Raises `UserError` where the folder holds none, or a damaged one."""
        values = read_json(folder / RECORD_FILE, missing=f"{folder} holds no tracked run")
        try:
            return cls(**values)
        except TypeError:
            raise UserError(f"{folder / RECORD_FILE}: is damaged; it has other fields than expected") from None

    def save(self, folder: Path) -> None:
        write_json(folder / RECORD_FILE, finite(asdict(self)))

    @property
    def known_run_id(self) -> str | None:
        """The id in the store of today."""
        return self.run_id if self.store == shown_uri() else None


def new_record(**fields: Any) -> TrackingRecord:
    """The record of a run that begins now; parameters become text."""
    params = {name: str(value)[:MAX_PARAM_LENGTH] for name, value in fields.pop("params").items()}
    return TrackingRecord(**{"key": uuid.uuid4().hex, "started": now(), **fields, "params": params})


def now() -> int:
    """Milliseconds since 1970."""
    return int(time.time() * 1000)


class Fed:
    """What the store is known to hold of one run; asked for where it is not known."""

    def __init__(self, run: StoredRun) -> None:
        self.run = run
        self.tags: dict[str, str] = {}
        self.status: tuple[str, int | None] | None = ("RUNNING", None) if run.is_new else None
        self._params: set[str] | None = set() if run.is_new else None
        self._steps: dict[str, set[int]] = {}
        self._has_dataset: bool | None = False if run.is_new else None

    @property
    def params(self) -> set[str]:
        if self._params is None:
            self._params = self.run.params()
        return self._params

    @property
    def has_dataset(self) -> bool:
        if self._has_dataset is None:
            self._has_dataset = self.run.has_dataset()
        return self._has_dataset

    def dataset_was_sent(self) -> None:
        self._has_dataset = True

    def steps_of(self, metric: str) -> set[int]:
        if metric not in self._steps:
            self._steps[metric] = set() if self.run.is_new else self.run.steps_of(metric)
        return self._steps[metric]


@dataclass
class Sent:
    """Counts what one feeding has sent."""

    epochs: int = 0
    files: int = 0
    others: int = 0

    @property
    def anything(self) -> bool:
        return bool(self.epochs or self.files or self.others)


Progress = Callable[[float], None]
"""Called before each request, with the seconds that it may take at most."""


class FolderFeed:
    """Feeds the run of one folder; what it has sent it need not ask for again.

    Args:
        folder: of the run.
        progress: told before each request.
    """

    def __init__(self, folder: Path, *, progress: Progress = lambda seconds: None) -> None:
        self._folder = folder
        self._progress = progress
        self._fed: Fed | None = None
        self._lock = threading.Lock()

    @property
    def run_id(self) -> str | None:
        """The store's id of the run, once it is known."""
        return None if self._fed is None else self._fed.run.run_id

    def update(self, change: Callable[[TrackingRecord], TrackingRecord]) -> None:
        """Rewrites the record; the thread that feeds writes the run's id into it."""
        with self._lock:
            change(TrackingRecord.load(self._folder)).save(self._folder)

    def feed(self) -> Sent:
        """Sends what the store lacks.

        Raises:
            Exception: whatever the store raises; what was sent stays sent, and the next feeding asks the store for it.
        """
        try:
            return self._feed()
        except BaseException:
            self._fed = None  # a request may have arrived although it failed
            raise

    def _feed(self) -> Sent:
        record = TrackingRecord.load(self._folder)
        sent = Sent()
        fed = self._fed if self._fed is not None else self._open(record)
        if missing := {name: value for name, value in record.params.items() if name not in fed.params}:
            self._before()
            fed.run.log_params(missing)
            fed.params.update(missing)
            sent.others += len(missing)
        if record.dataset is not None and not fed.has_dataset:
            self._before()
            fed.run.log_dataset(**record.dataset)
            fed.dataset_was_sent()
            sent.others += 1
        if changed := {name: value for name, value in record.tags.items() if fed.tags.get(name) != value}:
            self._before()
            fed.run.tag(changed)
            fed.tags.update(changed)
        self._send_points(fed, record, sent)
        if record.status == "RUNNING" and fed.status != (record.status, None):
            self._set_status(fed, record)
        if record.status in ("KILLED", "FAILED") and fed.status != (record.status, record.ended):
            self._set_status(fed, record)  # before its files: who asked it to end may not wait for them
        self._send_mirror(fed, record, sent)
        if record.status != "RUNNING":
            self._send_files(fed, record, sent)
            if fed.status != (record.status, record.ended):  # last: then nothing of the run is missing
                self._set_status(fed, record)
        return sent

    def _before(self, seconds: float = 0.0) -> None:
        self._progress(seconds)

    def _open(self, record: TrackingRecord) -> Fed:
        self._before()
        client = connect()
        self._before()
        fed = Fed(
            StoredRun.of(
                client,
                experiment=record.experiment,
                key=record.key,
                run_id=record.known_run_id,
                name=record.name,
                started=record.started,
                tags=record.tags,
            )
        )
        if fed.run.run_id != record.known_run_id:
            self.update(lambda latest: replace(latest, run_id=fed.run.run_id, store=shown_uri()))
        self._fed = fed
        return fed

    def _set_status(self, fed: Fed, record: TrackingRecord) -> None:
        self._before()
        fed.run.set_status(record.status, ended=record.ended)
        fed.status = (record.status, record.ended)

    def _send_points(self, fed: Fed, record: TrackingRecord, sent: Sent) -> None:
        """Once-per-run figures, and the epochs of the history; a value that is not finite has no place in MLflow."""
        points = [
            RunPoint(name, value, record.started, step_of_figure(name, record.figures))
            for name, value in record.figures.items()
        ]
        points += epoch_points(self._folder, started=record.started)
        missing = [point for point in points if point.step not in fed.steps_of(point.name)]
        if not missing:
            return
        self._before()
        fed.run.log_points(missing)
        for point in missing:
            fed.steps_of(point.name).add(point.step)
        sent.epochs += len({point.step for point in missing if point.name == "val_loss"})
        sent.others += sum(point.name in record.figures for point in missing)

    def _send_mirror(self, fed: Fed, record: TrackingRecord, sent: Sent) -> None:
        """The checkpoint that waits to be mirrored, to that of the two places that does not hold the latest one."""
        book = FilesSent.load(self._folder, fed.run.run_id)
        mirror = self._folder / MIRROR_FOLDER
        last = self._folder / "checkpoints" / "last"
        goes_on = record.status in ("KILLED", "FAILED") and "trial_state" not in record.tags
        if goes_on and _stamp_of_training(last) not in (None, book.mirrored):
            mirror_checkpoint(last, self._folder)
        if record.status == "FINISHED" or not mirror.is_dir():
            shutil.rmtree(mirror, ignore_errors=True)
            return
        place = MIRRORS[(MIRRORS.index(book.mirror) + 1) % 2 if book.mirror in MIRRORS else 0]
        for file in sorted(path for path in mirror.rglob("*") if path.is_file() and not path.is_symlink()):
            self._before(file.stat().st_size / SLOWEST_UPLOAD)
            fed.run.upload(file, f"{RESUME_ARTIFACTS}/{place}/{file.relative_to(mirror).as_posix()}")
        book.mirror, book.mirrored = place, _stamp_of_training(mirror)
        book.save(self._folder)
        shutil.rmtree(mirror, ignore_errors=True)
        sent.files += 1

    def _send_files(self, fed: Fed, record: TrackingRecord, sent: Sent) -> None:
        """The files of a run that has ended, as far as they have changed since they were sent."""
        book = FilesSent.load(self._folder, fed.run.run_id)
        for place, file in files_of(self._folder).items():
            stamp = stamp_of(file)
            if book.files.get(place) != stamp:
                self._before(file.stat().st_size / SLOWEST_UPLOAD)
                fed.run.upload(file, place)
                book.files[place] = stamp
                sent.files += 1
        if record.status == "FINISHED" and book.mirror is not None:
            self._before()
            fed.run.delete_artifacts(RESUME_ARTIFACTS)  # nothing has to go on from there any more
            book.mirror = book.mirrored = None
        book.save(self._folder)


@dataclass
class FilesSent:
    """Which files a store has of a run.

    Attributes:
        files: size and time of change by artifact path, as they were when they were sent.
        mirror: the place that holds the latest mirrored checkpoint; `mirrored`, its checksums.
    """

    run_id: str
    files: dict[str, str] = field(default_factory=dict)
    mirror: str | None = None
    mirrored: str | None = None

    @classmethod
    def load(cls, folder: Path, run_id: str) -> Self:
        """That of this run; an empty one where there is none, or one of another store's run."""
        try:
            found = cls(**read_json(folder / FILES_SENT_FILE, missing="nothing was sent"))
        except (UserError, TypeError):
            return cls(run_id)
        return found if found.run_id == run_id else cls(run_id)

    def save(self, folder: Path) -> None:
        if asdict(self) != asdict(type(self).load(folder, self.run_id)):
            write_json(folder / FILES_SENT_FILE, asdict(self))


def stamp_of(file: Path) -> str:
    """What changes when the file does; of `run.json`, when it says anything else than how far MLflow has heard."""
    if file.name != "run.json":
        return f"{file.stat().st_size} {file.stat().st_mtime_ns}"
    told = {name: value for name, value in read_run(file.parent).items() if name not in ABOUT_TRACKING}
    return sha256(json.dumps(told).encode()).hexdigest()


def files_of(folder: Path) -> dict[str, Path]:
    """The artifacts of a run that has ended, by their place; a state to go on from is mirrored, and not among them."""
    from behrt.checkpoints import TRAINING_FILES

    named = {
        "experiment.yaml": folder / "logs" / "settings.yaml",
        "logs/metrics_history.json": folder / "logs" / "metrics_history.json",
        **{name: folder / name for name in ("run.json", "diagnosis.json", "diagnosis.md")},
    }
    kept = [folder / "plots", folder / "checkpoints" / "best", folder / "checkpoints" / "last"]
    found = {
        file.relative_to(folder).as_posix(): file
        for path in kept
        for file in sorted(path.rglob("*"))
        if file.name not in TRAINING_FILES and not file.is_symlink()
    }
    for file in sorted((folder / "evaluation").glob("*/*")):  # not their `predictions/`, which name patients
        if file.suffix in (".json", ".md", ".png") and not file.is_symlink():
            found[file.relative_to(folder).as_posix()] = file
    return {place: file for place, file in (named | found).items() if file.is_file()}


def step_of_figure(name: str, figures: Mapping[str, float]) -> int:
    """By which MLflow knows the latest of several values: of bests the epoch, of evaluations their count.

    >>> step_of_figure("best_val_loss", {"best_epoch": 7.0}), step_of_figure("floor_loss", {"best_epoch": 7.0})
    (7, 0)
    >>> step_of_figure("held_out/auroc", {"held_out/evaluation": 2.0})
    2
    """
    if name.startswith("best_"):
        return int(figures.get("best_epoch", 0))
    group, _, rest = name.partition("/")
    return int(figures.get(f"{group}/evaluation", 0)) if rest else 0


def epoch_points(folder: Path, *, started: int) -> list[RunPoint]:
    """Every figure of the epochs that were not lost, at the time at which its epoch ended if no other was spent."""
    try:
        history = read_history(folder)
    except UserError:  # no epoch yet
        return []
    seconds = {point["epoch"]: point["value"] or 0.0 for point in history.get("epoch_seconds", [])}
    lost = {point["epoch"] for points in history.values() for point in points if point["value"] is None}
    times: dict[int, int] = {}
    elapsed = 0.0
    for epoch in sorted(seconds):
        elapsed += seconds[epoch]
        times[epoch] = started + int(1000 * elapsed)
    return [
        RunPoint(name, point["value"], times.get(point["epoch"], started), point["epoch"])
        for name, points in history.items()
        for point in points
        if point["epoch"] not in lost  # a run that goes on trains it again
    ]


def _stamp_of_training(checkpoint: Path) -> str | None:
    """What tells one state of a training from another; None where a checkpoint holds none."""
    from behrt.checkpoints import TRAINING_CHECKSUMS_FILE  # not above: to say that a run died takes no torch

    try:
        return sha256_of_file(checkpoint / TRAINING_CHECKSUMS_FILE)
    except OSError:
        return None


def mirror_checkpoint(checkpoint: Path, folder: Path) -> None:
    """Lays a copy of the checkpoint aside for the next feeding; links where the file system has them."""
    mirror = folder / MIRROR_FOLDER
    shutil.rmtree(mirror, ignore_errors=True)
    beside = mirror.with_name(".mirror.partial")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        shutil.copytree(checkpoint, beside, copy_function=_link)
        beside.replace(mirror)
    except OSError as error:  # no room for a copy; the checkpoint itself is whole
        shutil.rmtree(beside, ignore_errors=True)
        log.warning("the checkpoint is not mirrored: %s", error.strerror)


def waiting_mirror(folder: Path) -> bool:
    """Whether a copy lies aside that MLflow does not have yet."""
    return (folder / MIRROR_FOLDER).exists()


def _link(source: str, destination: str) -> None:
    try:
        Path(destination).hardlink_to(source)
    except OSError:
        shutil.copy2(source, destination)
