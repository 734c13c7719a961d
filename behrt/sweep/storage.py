"""Where are the trials of a study kept, and how does one process at a time change them?

The storage is plain Optuna (`optuna.storages.RDBStorage`), so `optuna` and `optuna-dashboard` open it: an SQLite file
or a PostgreSQL server. Whatever has to be counted before it is changed is done under a lock that holds for all
processes on the storage, and that dies with the process that holds it.
"""

from __future__ import annotations

import logging
import re
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import optuna
import sqlalchemy
from sqlalchemy.engine import URL
from sqlalchemy.pool import NullPool

from behrt.config import UserError, refuse_what_is_no_file
from behrt.files import locked

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 10
"""Between two signs of life of a trial."""
GRACE_SECONDS = 60
"""Without a sign of life, after which a trial's worker counts as dead."""
PATIENCE_SECONDS = 60
"""Without an answer of the storage, after which it is given up."""
SECONDS_TO_CONNECT = 5
"""Without an answer of a server, after which a connection is not to be had."""

SQLITE = b"SQLite format 3\0"
"""How every SQLite database begins that is not empty."""

# Any number, the same for all who share a database: the name of the lock among the advisory locks of other programs.
_POSTGRESQL_LOCK = 0x6265_6872_7400_0001

REMEDIES = {
    "no password supplied": "; write it into the URL, or set PGPASSWORD",
    "password authentication failed": "; correct user or password, in the URL or as PGPASSWORD",
    "failed to resolve host": "; correct the host's name",
    "Connection refused": " Start it, or correct the address",
    "timeout expired": "; correct the address, or let this machine through to it",
}
"""What helps, by what PostgreSQL and its client say."""

T = TypeVar("T")


class StorageLost(UserError):
    """The storage does not answer, or only with errors. Nobody's trial is to blame."""


@dataclass
class Storage:
    """An open storage.

    Attributes:
        url: with the password, if it has one; `shown_url` is for people.
    """

    url: str = field(repr=False)
    rdb: optuna.storages.RDBStorage
    _lock: Callable[[], AbstractContextManager[None]] = field(repr=False)
    _holder: threading.local = field(default_factory=threading.local, repr=False)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the storage against all other processes and threads that ask for this lock, too.

        Not to be held twice by one thread, which would wait for itself.
        """
        assert not getattr(self._holder, "is_held", False), "the storage is locked by this very thread"
        with ExitStack() as stack:
            self.patiently(lambda: stack.enter_context(self._lock()))
            self._holder.is_held = True
            try:
                yield
            finally:
                self._holder.is_held = False

    def patiently(self, call: Callable[[], T]) -> T:
        """What `call` returns, called again while the storage is away, as a server is that restarts.

        Args:
            call: may be called again from its beginning, wherever it was broken off.

        Raises:
            StorageLost: it stayed away, or fails in a way that waiting does not mend.
        """
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                return call()
            except (
                optuna.exceptions.StorageInternalError,
                sqlalchemy.exc.DBAPIError,
                sqlalchemy.exc.PendingRollbackError,
            ) as error:
                if isinstance(error, sqlalchemy.exc.PendingRollbackError):
                    self.rdb.remove_session()  # Optuna tried again within the transaction that the server had ended
                if not _may_pass(error):
                    raise StorageLost(f"{shown_url(self.url)}: {_reason(error, self.url)}") from error
                if time.monotonic() > deadline:
                    raise StorageLost(
                        f"{shown_url(self.url)}: no answer for {PATIENCE_SECONDS} s: {_reason(error, self.url)}; "
                        "run the same command again once it is back"
                    ) from None
                log.warning("%s: no answer, asking again: %s", shown_url(self.url), _reason(error, self.url))
                time.sleep(1)


def default_url() -> str:
    """`sweeps/studies.db` in the working folder."""
    return f"sqlite:///{Path.cwd() / 'sweeps' / 'studies.db'}"


def shown_url(url: str) -> str:
    """The URL as people may see it: without the password."""
    try:
        parsed = sqlalchemy.make_url(url)
    except (sqlalchemy.exc.ArgumentError, ValueError):
        return re.sub(r"(?<=://)[^/]*@", "***@", url)
    if "@" in (parsed.host or ""):  # of a password that was not written as a URL wants it
        return re.sub(r"(?<=://)[^/]*@", "***@", url)
    query = {key: "***" if "password" in key.lower() else value for key, value in parsed.query.items()}
    return parsed.set(query=query).render_as_string(hide_password=True).replace("%2A%2A%2A", "***")


def open_storage(
    url: str | None,
    *,
    create: bool = True,
    heartbeat_seconds: int = HEARTBEAT_SECONDS,
    grace_seconds: int = GRACE_SECONDS,
) -> Storage:
    """Opens a storage; its tables are made where there are none.

    Args:
        url: `sqlite:///PATH` or `postgresql://USER:PASSWORD@HOST/DATABASE`; None for `default_url`.
        create: whether a storage that does not exist is made.

    Raises:
        UserError: it is no such URL, does not exist (without `create`), cannot be reached, or holds something else.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        parsed = sqlalchemy.make_url(default_url() if url is None else url)
    except (sqlalchemy.exc.ArgumentError, ValueError):
        raise UserError(
            f"--storage: {shown_url(url or '')!r} is no URL; expected sqlite:///PATH or postgresql://USER@HOST/DATABASE"
        ) from None
    if "@" in (parsed.host or ""):
        raise UserError(f"--storage: {shown_url(str(url))}: write @ in a password as %40, / as %2F, : as %3A")
    backend = parsed.get_backend_name()
    if backend == "sqlite":
        return _open_sqlite(parsed, create, heartbeat_seconds, grace_seconds)
    if backend in ("postgresql", "postgres"):
        return _open_postgresql(parsed, create, heartbeat_seconds, grace_seconds)
    raise UserError(
        f"--storage: {shown_url(str(url))}: {backend!r} is not supported; "
        "expected sqlite:///PATH or postgresql://USER@HOST/DATABASE"
    )


def _open_sqlite(url: URL, create: bool, heartbeat_seconds: int, grace_seconds: int) -> Storage:
    if url.database in (None, "", ":memory:") or url.database.startswith("file:"):
        raise UserError("--storage: a study in memory ends with its process; expected sqlite:///PATH of a file")
    path = Path(url.database).absolute()
    url = url.set(drivername="sqlite", database=str(path))
    if not create and not path.exists():
        raise UserError(f"{path}: no such storage; give --storage, or start the study with `behrt sweep run`")
    if not path.parent.exists() and path != Path(sqlalchemy.make_url(default_url()).database or ""):
        raise UserError(f"--storage: {path.parent}: no such folder; make it, or correct the path")
    _refuse_other_file(path)
    # the default of 5 s is short where many processes write
    engine_options: dict[str, object] = {"connect_args": {"timeout": PATIENCE_SECONDS}}

    def lock() -> AbstractContextManager[None]:
        return locked(path.with_name(f".{path.name}.lock"))

    return _open(url, engine_options, lock, create, heartbeat_seconds, grace_seconds)


def _refuse_other_file(path: Path) -> None:
    """Of what is no database, before a lock file is laid beside it."""
    refuse_what_is_no_file(path)
    try:
        with path.open("rb") as file:
            start = file.read(len(SQLITE))
    except OSError:  # not there yet, or for SQLite to say
        return
    if start and start != SQLITE:
        raise UserError(f"{path}: cannot be opened: file is not a database; choose another for --storage")


def _open_postgresql(url: URL, create: bool, heartbeat_seconds: int, grace_seconds: int) -> Storage:
    url = url.set(drivername="postgresql+psycopg")
    engine_options = {
        "pool_pre_ping": True,  # the server may have been restarted since the last epoch
        "connect_args": {
            "connect_timeout": SECONDS_TO_CONNECT,
            # heartbeats are stored without a time zone: all clients have to mean the same one
            "options": f"{url.query.get('options', '')} -c timezone=UTC".strip(),
        },
    }
    lock_engine = sqlalchemy.create_engine(
        url, poolclass=NullPool, isolation_level="AUTOCOMMIT", connect_args=engine_options["connect_args"]
    )

    @contextmanager
    def lock() -> Iterator[None]:
        # The server releases the lock when this connection ends, that of a killed process at once. Of a machine that
        # has gone it learns by these settings (all of them seconds, but for the count).
        connection = lock_engine.connect()
        try:
            connection.exec_driver_sql("SET tcp_keepalives_idle = 30; SET tcp_keepalives_interval = 10")
            connection.exec_driver_sql("SET tcp_keepalives_count = 3")
            connection.exec_driver_sql(f"SELECT pg_advisory_lock({_POSTGRESQL_LOCK})")
            yield
        finally:
            with suppress(sqlalchemy.exc.DBAPIError):  # a server that has gone holds no lock
                connection.close()

    return _open(url, engine_options, lock, create, heartbeat_seconds, grace_seconds)


def _open(
    url: URL,
    engine_options: dict[str, object],
    lock: Callable[[], AbstractContextManager[None]],
    create: bool,
    heartbeat_seconds: int,
    grace_seconds: int,
) -> Storage:
    full = url.render_as_string(hide_password=False)
    shown = shown_url(full)
    try:
        with lock():
            _check_content(url, engine_options, create)
            with warnings.catch_warnings():  # under the lock: the filters are the whole process's
                warnings.filterwarnings(
                    "ignore", "Argument ``heartbeat_interval``", optuna.exceptions.ExperimentalWarning
                )
                rdb = optuna.storages.RDBStorage(
                    full.replace("{", "{{").replace("}", "}}"),  # Optuna takes braces for a place to fill in
                    engine_kwargs=engine_options,
                    heartbeat_interval=heartbeat_seconds,
                    grace_period=grace_seconds,
                )
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.OptunaError) as error:
        raise UserError(f"{shown}: cannot be opened: {_reason(error, full)}") from None
    except RuntimeError as error:  # tables of another version of Optuna
        raise UserError(f"{shown}: {_reason(error, full)}") from None
    except OSError as error:
        raise UserError(f"{shown}: cannot be opened: {error.strerror}") from None
    storage = Storage(full, rdb, lock)
    weakref.finalize(storage, rdb.engine.dispose)  # which closes its connections
    return storage


def _check_content(url: URL, engine_options: dict[str, object], create: bool) -> None:
    """Refuses another program's database, before Optuna lays tables into it, and an empty one without `create`."""
    engine = sqlalchemy.create_engine(url, **{**engine_options, "poolclass": NullPool, "pool_pre_ping": False})
    tables = set(sqlalchemy.inspect(engine).get_table_names())
    engine.dispose()
    if "studies" in tables:
        return
    if "alembic_version" in tables:  # which Optuna would take for its own
        raise UserError(f"{shown_url(str(url))}: holds another program's tables; choose another database for --storage")
    if not create:
        raise UserError(f"{shown_url(str(url))}: holds no study; start one with `behrt sweep run`")


def _may_pass(error: Exception) -> bool:
    """Whether an error is one of the connection, or of too many writers, and not of what was asked."""
    cause = error if isinstance(error, sqlalchemy.exc.SQLAlchemyError) else error.__cause__
    if isinstance(cause, sqlalchemy.exc.DBAPIError) and type(cause.orig).__module__ == "sqlite3":
        return "locked" in str(cause.orig)
    passing = (sqlalchemy.exc.OperationalError, sqlalchemy.exc.InterfaceError, sqlalchemy.exc.PendingRollbackError)
    return isinstance(cause, passing)


def _reason(error: BaseException, url: str) -> str:
    """An error in one line and without the password."""
    cause = error.__cause__ if isinstance(error, optuna.exceptions.StorageInternalError) else error
    origin = cause.orig if isinstance(cause, sqlalchemy.exc.DBAPIError) else cause
    text = " ".join(str(origin or error).split())
    password = sqlalchemy.make_url(url).password
    remedy = next((remedy for words, remedy in REMEDIES.items() if words in text), "")
    return (text.replace(str(password), "***") if password else text) + remedy
