"""Which source was prepared? Its files, told by name, size and content.

A file's digest is its own, so that each of several machines can read its share of the files, and the fingerprint of the
whole source be put together from what they found.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event

from behrt.config import refuse_what_is_no_file

BLOCK = 1 << 20
"""Bytes read at a time."""


@dataclass(frozen=True, order=True)
class SourceFile:
    """One file of a source.

    Attributes:
        name: relative to the source, with `/`.
        size: in bytes.
        sha256: of its content, hexadecimal; None where another machine reads it.
    """

    name: str
    size: int
    sha256: str | None


def name_in_source(file: Path, root: Path) -> str:
    """The name of a file relative to its source.

    >>> name_in_source(Path("set/data/0.parquet"), Path("set"))
    'data/0.parquet'
    """
    return file.relative_to(root).as_posix() if file.is_relative_to(root) else file.name


def fingerprint(files: Iterable[SourceFile]) -> str:
    """SHA-256 over names, sizes and digests of all files of a source, in the order of their names."""
    digest = hashlib.sha256()
    for file in sorted(files):
        assert file.sha256 is not None
        digest.update(f"{file.name}\0{file.size}\0{file.sha256}\n".encode())
    return digest.hexdigest()


@contextmanager
def reading(files: Sequence[Path], read: Iterable[Path], root: Path) -> Iterator[Future[list[SourceFile]]]:
    """The files of a source, in their order; those in `read` are digested in a thread, beside what else is done."""
    stop, chosen = Event(), set(read)

    def describe() -> list[SourceFile]:
        return [
            SourceFile(name_in_source(file, root), file.stat().st_size, _sha256(file, stop) if file in chosen else None)
            for file in files
        ]

    with ThreadPoolExecutor(1, thread_name_prefix="behrt-fingerprint") as executor:
        try:
            yield executor.submit(describe)
        finally:
            stop.set()


def _sha256(file: Path, stop: Event) -> str:
    refuse_what_is_no_file(file)
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while not stop.is_set() and (block := stream.read(BLOCK)):
            digest.update(block)
    return digest.hexdigest()
