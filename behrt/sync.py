"""Which runs lack something in MLflow, or died without a word, and what becomes of them?

Nothing here needs torch: any command may ask.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from behrt.config import UserError
from behrt.feeding import RECORD_FILE, FolderFeed, Sent, TrackingRecord, now
from behrt.files import FolderLock, is_locked, write_json
from behrt.history import read_run
from behrt.tracking import RunStatus, reason_of, shown_uri

log = logging.getLogger(__name__)


def mark_dead(folder: Path) -> bool:
    """Says of a run that died without a word that it did; whether it was one.

    A trial's death is FAILED, as its study calls it; any other run was KILLED.
    """
    try:
        if TrackingRecord.load(folder).status != "RUNNING" or is_locked(folder):
            return False
        lock = FolderLock(folder)
    except UserError:  # no run, a damaged one, or one that somebody has taken up in between
        return False
    try:
        record = TrackingRecord.load(folder)
        if record.status != "RUNNING":
            return False
        is_trial = "trial_state" in record.tags
        status: RunStatus = "FAILED" if is_trial else "KILLED"
        tags = {**record.tags, "ended": "died"} | ({"trial_state": "FAILED"} if is_trial else {})
        replace(record, status=status, tags=tags, ended=_last_sign_of_life(folder)).save(folder)
        try:
            run = read_run(folder)
        except UserError:  # it died before it could write one
            return True
        write_json(folder / "run.json", {**run, "status": status, "died": True})
        return True
    except OSError as error:  # somebody else's folder, which we may read
        log.warning("%s: the run died, and cannot be marked so: %s", folder, error.strerror)
        return False
    finally:
        lock.release()


def _last_sign_of_life(folder: Path) -> int:
    """When the run wrote last, in milliseconds since 1970."""
    signs = [folder / "logs" / "metrics_history.json", folder / "run.json", folder / "checkpoints" / "last"]
    return max((int(1000 * sign.stat().st_mtime) for sign in signs if sign.exists()), default=now())


def sync_folder(folder: Path) -> Sent:
    """Sends what MLflow lacks of the run in `folder`, which no process runs any more.

    Raises:
        UserError: the folder holds no run, or is somebody's at the moment; the store does not take it.
    """
    mark_dead(folder)
    lock = FolderLock(folder)
    try:
        feed = FolderFeed(folder)
        try:
            sent = feed.feed()
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{folder}: MLflow at {shown_uri()} failed: {reason_of(error)}") from None
        _note_in_run_file(folder, feed.run_id)
        return sent
    finally:
        lock.release()


def _note_in_run_file(folder: Path, run_id: str | None) -> None:
    """Lets `run.json` name the run by the id that the store gave it."""
    try:
        run = read_run(folder)
    except UserError:
        return
    if run.get("run_id") != run_id or not run.get("tracking_complete"):
        write_json(folder / "run.json", {**run, "run_id": run_id, "tracking_complete": True})


def settle_dead(folder: Path) -> bool:
    """Marks a run that died without a word, on disk and, if it answers, in MLflow; whether it was one."""
    if not mark_dead(folder):
        return False
    with suppress(UserError):  # `behrt sync` can tell MLflow later
        sync_folder(folder)
    return True


def find_runs(targets: Sequence[str]) -> list[Path]:
    """The folders of the named runs; of every run below `experiments/` and `sweeps/` where none is named.

    Raises:
        UserError: a target is no run.
    """
    if not targets:
        places = ("experiments/*", "experiments/*/earlier/*", "sweeps/*/trials/*")
        found = (path.parent.parent for place in places for path in Path().glob(f"{place}/{RECORD_FILE}"))
        return sorted(found)
    from behrt.runs import find_local_run, is_run_id

    folders = []
    for target in targets:
        folder = Path(target) if Path(target).is_dir() else find_local_run(target) if is_run_id(target) else None
        if folder is None:
            raise UserError(f"{target}: no such folder, and no run of that id is here")
        if not (folder / RECORD_FILE).is_file():
            raise UserError(f"{folder}: holds no run that was tracked; expected {folder / RECORD_FILE}")
        folders.append(folder)
    return folders


def sync_runs(folders: Sequence[Path], *, tell: Callable[[str], None]) -> dict[Path, str]:
    """Sends what MLflow lacks of each run.

    Returns:
        By folder: `complete` (nothing was missing), `sent`, `running` (it sends itself) or `failed`.
    """
    outcomes = {}
    for folder in folders:
        if is_locked(folder):
            outcomes[folder] = "running"
            tell(f"{folder}: is running, and sends what it has itself")
            continue
        died = mark_dead(folder)
        note = " (it had died without a word, and is marked so)" if died else ""
        try:
            sent = sync_folder(folder)
        except UserError as error:
            outcomes[folder] = "failed"
            tell(f"{folder}: {error}{note}")
            continue
        outcomes[folder] = "sent" if sent.anything else "complete"
        tell(f"{folder}: {f'sent {sent.epochs} epochs, {sent.files} files' if sent.anything else 'complete'}{note}")
    if not folders:
        tell("No run here was tracked.")
    return outcomes
