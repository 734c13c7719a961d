"""How is a file or a folder written so that nobody ever sees half of it?

Everything is written beside its place, flushed to the disk, and renamed.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from behrt.config import UserError, refuse_what_is_no_file


@contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """Yields a path beside `path` to write to; on success it takes the place of `path`, on failure it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # drawn, for containers that share a disk have the same process ids
    beside = path.with_name(f".{path.name}.{secrets.token_hex(6)}.partial")
    try:
        yield beside
        _flush(beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: Path, *, mode: int = 0o777, former_to: Path | None = None) -> Iterator[Path]:
    """Yields an empty folder beside `path`; on success it takes the place of `path`, on failure it is removed.

    Args:
        former_to: beside `path`; what was at `path` goes there, and what was there before is removed first, so that at
            every moment one of the two is whole.
        mode: of the folder, less the umask; the files in it get what it leaves them, so that a copy of a private folder
            is private, too. While it is written, nobody but its owner can look into it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    try:
        yield beside
        umask = os.umask(0)
        os.umask(umask)
        beside.chmod(mode & ~umask)
        for file in beside.rglob("*"):
            if file.is_file() and not file.is_symlink():
                file.chmod(mode & 0o666 & ~umask)
                _flush(file)
        if path.exists() and former_to is not None:
            shutil.rmtree(former_to, ignore_errors=True)
            path.replace(former_to)
            beside.replace(path)
        elif path.exists():
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
        _flush(path.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def remains_beside(path: Path, ending: str) -> list[Path]:
    """What processes have put beside `path` as `.NAME.….ending`; what is beside `path` with a suffix is not of them."""
    dots = path.name.count(".") + 3
    return [left for left in path.parent.glob(f".{glob.escape(path.name)}.*.{ending}") if left.name.count(".") == dots]


def finish_after_a_kill(path: Path) -> None:
    """Undoes what a process left that was killed in `replacing_folder(path)`; no other may be in it.

    Killed between the two renames, it left nothing at `path`: the former folder comes back.
    """
    for former in remains_beside(path, "former"):
        if (former / path.name).exists() and not path.exists():
            (former / path.name).replace(path)
        shutil.rmtree(former, ignore_errors=True)
    for partial in remains_beside(path, "partial"):
        shutil.rmtree(partial, ignore_errors=True)


def remove_half_written(folder: Path) -> None:
    """Removes what a killed process has left half-written in `folder`; the caller holds the folder's lock."""
    for pattern in (".*.partial", ".*.former"):
        for left in folder.glob(pattern):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Brings a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._handle = (folder / ".lock").open("a")
        except OSError as error:
            raise UserError(f"{folder}: cannot be written to: {error.strerror}") from None
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._handle.close()
            raise UserError(f"{folder}: another run is writing there; choose another --experiment or --out") from None

    def release(self) -> None:
        self._handle.close()


def is_locked(folder: Path) -> bool:
    """Whether a process that is alive holds the `FolderLock` of `folder`."""
    try:
        with (folder / ".lock").open("rb") as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # there is none, or it is not ours to read: nothing says that somebody works here
        return False
    return False


def write_checksums(folder: Path, name: str, files: Iterable[Path]) -> None:
    """Writes the file `name` in the form of `sha256sum`, which can check it."""
    lines = [f"{sha256_of_file(file)}  {file.relative_to(folder).as_posix()}\n" for file in sorted(files)]
    write_text(folder / name, "".join(lines))


def verify_checksums(folder: Path, name: str, *, remedy: str = "choose another checkpoint") -> None:
    """Raises `UserError`, which ends in `remedy`, unless every file that `folder / name` lists is as it was then."""
    try:
        lines = (folder / name).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        raise UserError(f"{folder / name}: is missing or damaged; {remedy}") from None
    for line in lines:
        digest, _, file = line.partition("  ")
        if not file or Path(file).is_absolute() or ".." in Path(file).parts:
            raise UserError(f"{folder / name}: is damaged; {remedy}")
        try:
            found = sha256_of_file(folder / file)
        except OSError:
            raise UserError(f"{folder / file}: is missing; {remedy}") from None
        if found != digest:
            raise UserError(f"{folder / file}: was changed since it was written, or is damaged; {remedy}")


def sha256_of_file(path: Path) -> str:
    """Of the contents. Raises `UserError` for what is no file, and might never end."""
    refuse_what_is_no_file(path)
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


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


def clear_spills(out: Path, command: str, place: str) -> None:
    """Removes the folders of `spill_beside` that processes which were killed have left.

    Args:
        command: that may be at work there.
        place: what `out` is, a file or a folder.

    Raises:
        UserError: a process that is alive writes to `out`.
    """
    for left in remains_beside(out, "spill"):
        if is_locked(left):
            raise UserError(f"--out {out}: another {command} is writing there; wait for it, or name another {place}")
        shutil.rmtree(left, ignore_errors=True)


@contextmanager
def spill_beside(out: Path) -> Iterator[Path]:
    """A folder beside `out` for what is not kept: private, locked, and removed at the end.

    Raises:
        UserError: there is no writing there.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        spill = tempfile.TemporaryDirectory(prefix=f".{out.name}.", suffix=".spill", dir=out.parent)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written beside: {error.strerror}") from None
    with spill as folder, ExitStack() as stack:
        stack.callback(FolderLock(Path(folder)).release)  # as long as it is held, this process is alive
        yield Path(folder)
