"""How is a file or a folder written so that nobody ever sees half of it?

Everything is written beside its place, flushed to the disk, and renamed.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from behrt.config import UserError, refuse_what_is_no_file


@contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """Yields a path beside `path` to write to; on success it takes the place of `path`, on failure it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield beside
        _flush(beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: Path, *, mode: int = 0o777) -> Iterator[Path]:
    """Yields an empty folder beside `path`; on success it takes the place of `path`, on failure it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    try:
        yield beside
        umask = os.umask(0)
        os.umask(umask)
        beside.chmod(mode & ~umask)
        for file in beside.rglob("*"):
            if file.is_file():
                _flush(file)
        if path.exists():
            former = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".former", dir=path.parent))
            try:
                path.replace(former / path.name)
                beside.replace(path)
            except BaseException:
                if not path.exists():  # interrupted between the two: the former folder comes back
                    (former / path.name).replace(path)
                raise
            finally:
                shutil.rmtree(former, ignore_errors=True)
        else:
            beside.replace(path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _flush(file: Path) -> None:
    with file.open("rb") as handle:
        os.fsync(handle.fileno())


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock on the file `path`, which is created empty; it dies with its process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


class FolderLock:
    """Keeps a folder for one process: a lock on its file `.lock`, which dies with the process."""

    def __init__(self, folder: Path) -> None:
        """Raises `UserError` if another process holds it."""
        folder.mkdir(parents=True, exist_ok=True)
        self._handle = (folder / ".lock").open("a")
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._handle.close()
            raise UserError(f"{folder}: another run is writing there; choose another --experiment or --out") from None

    def release(self) -> None:
        self._handle.close()


def write_text(path: Path, text: str) -> None:
    """UTF-8 text, whole or not at all."""
    with replacing_file(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Strict JSON (no NaN), whole or not at all."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path, *, missing: str) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        missing: what it means if the file is not there.

    Raises:
        UserError: the file is missing, unreadable, or holds something else.
    """
    refuse_what_is_no_file(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {missing}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):  # the latter where it is nested thousands of levels deep
        raise UserError(f"{path}: is damaged; expected JSON") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: is damaged; expected a JSON object, found {type(value).__name__}")
    return value
