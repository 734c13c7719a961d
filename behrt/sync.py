"""Which runs lack something in MLflow, and what becomes of them when it is sent?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from behrt.config import UserError
from behrt.feeding import RECORD_FILE, mark_dead, sync_folder
from behrt.files import is_locked
from behrt.runs import find_local_run, is_run_id


def find_runs(targets: Sequence[str]) -> list[Path]:
    """The folders of the named runs; of every run below `experiments/` and `sweeps/` where none is named.

    Raises:
        UserError: a target is no run.
    """
    if not targets:
        places = ("experiments/*", "experiments/*/earlier/*", "sweeps/*/trials/*")
        found = (path.parent.parent for place in places for path in Path().glob(f"{place}/{RECORD_FILE}"))
        return sorted(found)
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
