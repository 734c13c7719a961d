"""Does a storage open for many processes at once, hold them apart, and say in one line what is wrong with it?"""

import fcntl
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import optuna
import pytest
import sqlalchemy

from behrt.config import UserError
from behrt.sweep.liveness import WorkerToken, is_alive
from behrt.sweep.storage import Storage, StorageLost, default_url, open_storage, shown_url
from tests.postgres_server import PASSWORD, PostgresServer

SECRET = "hunter2"


def refusal(url: str, **options: bool) -> str:
    with pytest.raises(UserError) as refused:
        open_storage(url, **options)
    text = str(refused.value)
    assert "\n" not in text
    assert SECRET not in text
    assert PASSWORD not in text
    return text


def waits_for_the_lock(storage: Storage, seconds: float = 0.3) -> bool:
    """Whether another thread that asks for the lock is still waiting after a while."""
    entered = threading.Event()

    def enter() -> None:
        with storage.locked():
            entered.set()

    thread = threading.Thread(target=enter, daemon=True)
    thread.start()
    return not entered.wait(seconds)


def test_the_default_is_a_file_of_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert default_url() == f"sqlite:///{tmp_path}/sweeps/studies.db"
    open_storage(None)
    assert (tmp_path / "sweeps" / "studies.db").exists()


def test_optuna_itself_opens_the_storage(url: str) -> None:
    storage = open_storage(url)
    optuna.create_study(storage=storage.rdb, study_name="a")
    parsed = sqlalchemy.make_url(url)
    driver = "postgresql+psycopg" if parsed.drivername == "postgresql" else "sqlite"
    plain = parsed.set(drivername=driver).render_as_string(hide_password=False)
    again = optuna.storages.RDBStorage(plain)
    assert optuna.get_all_study_names(again) == ["a"]
    again.engine.dispose()


def test_a_relative_file_stays_the_same_when_the_working_folder_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path)
    storage = open_storage("sqlite:///a.db")
    monkeypatch.chdir(tmp_path / "a")
    optuna.create_study(storage=storage.rdb, study_name="a")
    with storage.locked():
        pass
    assert list((tmp_path / "a").iterdir()) == []


def test_a_path_with_braces_is_that_path(tmp_path: Path) -> None:
    open_storage(f"sqlite:///{tmp_path}/{{a}}.db")
    assert (tmp_path / "{a}.db").exists()


def test_opening_is_silent(tmp_path: Path) -> None:
    code = (
        "import sys, optuna; from behrt.sweep.storage import open_storage; "
        "optuna.create_study(storage=open_storage(sys.argv[1]).rdb)"
    )
    url = f"sqlite:///{tmp_path}/a.db"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code, url], capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""


def test_the_lock_keeps_others_out_until_it_is_released(url: str) -> None:
    storage, other = open_storage(url), open_storage(url)
    with storage.locked():
        assert waits_for_the_lock(other)
    assert not waits_for_the_lock(other, 10)


def test_the_lock_is_released_when_an_error_leaves_it(url: str) -> None:
    storage = open_storage(url)
    with pytest.raises(KeyError), storage.locked():
        raise KeyError
    assert not waits_for_the_lock(storage, 10)


def test_the_lock_is_not_taken_twice_by_one_thread(tmp_path: Path) -> None:
    storage = open_storage(f"sqlite:///{tmp_path}/a.db")
    with storage.locked(), pytest.raises(AssertionError), storage.locked():
        pass


def test_a_program_started_under_the_lock_does_not_hold_it(url: str) -> None:
    storage = open_storage(url)
    with storage.locked():
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, close_fds=False)
    try:
        assert not waits_for_the_lock(storage, 10)
    finally:
        child.communicate()


def test_the_lock_dies_with_its_process(url: str) -> None:
    code = (
        "import sys, time; from behrt.sweep.storage import open_storage\n"
        "with open_storage(sys.argv[1]).locked(): print('held', flush=True); time.sleep(60)"
    )
    storage = open_storage(url)
    child = subprocess.Popen([sys.executable, "-c", code, url], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    assert waits_for_the_lock(storage)
    child.kill()
    child.communicate()
    assert not waits_for_the_lock(storage, 10)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        (f"postgresql://me:{SECRET}@host/a", "postgresql://me:***@host/a"),
        (f"postgresql://host/a?user=me&password={SECRET}", "postgresql://host/a?password=***&user=me"),
        (f"postgresql://me:{SECRET}@host:port/a", "postgresql://***@host:port/a"),
        ("sqlite:////data/a.db", "sqlite:////data/a.db"),
    ],
)
def test_a_url_is_shown_without_its_password(url: str, shown: str) -> None:
    assert shown_url(url) == shown


def test_a_storage_is_shown_without_its_password() -> None:
    rdb = object()
    storage = Storage(f"postgresql://me:{SECRET}@host/a", rdb, lambda: None)  # type: ignore[arg-type, return-value]
    assert SECRET not in repr(storage)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        (f"mysql://me:{SECRET}@host/a", ("'mysql' is not supported", "***")),
        ("studies.db", ("'studies.db' is no URL", "expected sqlite:///PATH")),
        (f"postgresql://me:{SECRET}@host:port/a", ("is no URL",)),
        ("sqlite://", ("in memory", "expected sqlite:///PATH")),
        ("sqlite:///:memory:", ("in memory",)),
        ("sqlite:///file:a?mode=memory&uri=true", ("in memory",)),
    ],
)
def test_what_is_no_storage_is_refused(url: str, words: tuple[str, ...]) -> None:
    text = refusal(url)
    assert text.startswith("--storage")
    assert all(word in text for word in words)


def test_a_missing_file_is_refused_where_nothing_is_to_be_made(tmp_path: Path) -> None:
    text = refusal(f"sqlite:///{tmp_path}/a.db", create=False)
    assert str(tmp_path / "a.db") in text
    assert list(tmp_path.iterdir()) == []


def test_an_existing_storage_opens_where_nothing_is_to_be_made(url: str) -> None:
    open_storage(url)
    open_storage(url, create=False)


def test_an_empty_database_is_refused_where_nothing_is_to_be_made(server: PostgresServer) -> None:
    url = server.create_database("empty")
    assert "holds no study" in refusal(url, create=False)
    parsed = sqlalchemy.make_url(url).set(drivername="postgresql+psycopg")
    engine = sqlalchemy.create_engine(parsed, poolclass=sqlalchemy.NullPool)
    assert sqlalchemy.inspect(engine).get_table_names() == []


def test_a_file_that_is_no_database_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "a.db").write_text("lr: 0.001\n" * 100)
    assert "not a database" in refusal(f"sqlite:///{tmp_path}/a.db")
    assert (tmp_path / "a.db").read_text() == "lr: 0.001\n" * 100


def test_a_folder_is_refused(tmp_path: Path) -> None:
    assert "is no file, but a folder" in refusal(f"sqlite:///{tmp_path}")


def test_a_place_where_no_folder_can_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    assert "cannot be opened" in refusal(f"sqlite:///{tmp_path}/a/b.db")


def test_another_programs_database_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "mlflow.db") as connection:
        connection.execute("CREATE TABLE alembic_version (version_num TEXT)")
    connection.close()
    assert "another program" in refusal(f"sqlite:///{tmp_path}/mlflow.db")
    with sqlite3.connect(tmp_path / "mlflow.db") as connection:
        assert connection.execute("SELECT name FROM sqlite_master").fetchall() == [("alembic_version",)]
    connection.close()


def test_tables_of_another_version_of_optuna_are_refused(tmp_path: Path) -> None:
    open_storage(f"sqlite:///{tmp_path}/a.db")
    with sqlite3.connect(tmp_path / "a.db") as connection:
        connection.execute("UPDATE alembic_version SET version_num = 'v99'")
    connection.close()
    assert "no longer compatible" in refusal(f"sqlite:///{tmp_path}/a.db")


def test_a_wrong_password_is_refused(server: PostgresServer) -> None:
    text = refusal(server.url(password=SECRET))
    assert "password authentication failed" in text
    assert "correct user or password, in the URL or as PGPASSWORD" in text


def test_a_password_may_come_from_the_environment(server: PostgresServer, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"postgresql://behrt@127.0.0.1:{server.port}/postgres"
    assert "set PGPASSWORD" in refusal(url, create=False)
    monkeypatch.setenv("PGPASSWORD", PASSWORD)
    assert "holds no study" in refusal(url, create=False)


def test_a_database_that_does_not_exist_is_refused(server: PostgresServer) -> None:
    assert 'database "nowhere" does not exist' in refusal(server.url(database="nowhere"))


def test_a_server_that_is_not_there_is_refused() -> None:
    text = refusal(f"postgresql://me:{SECRET}@127.0.0.1:1/a")
    assert "postgresql+psycopg://me:***@127.0.0.1:1/a: cannot be opened" in text
    assert "Start it, or correct the address" in text


def test_a_host_that_is_not_known_is_refused() -> None:
    assert "correct the host's name" in refusal(f"postgresql://me:{SECRET}@nowhere.invalid/a")


def test_a_server_that_never_answers_is_left_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("behrt.sweep.storage.SECONDS_TO_CONNECT", 2)  # the client waits no shorter
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        text = refusal(f"postgresql://me:{SECRET}@127.0.0.1:{silent.getsockname()[1]}/a")
    assert time.monotonic() - began < 5
    assert "let this machine through to it" in text


def test_a_server_that_restarts_takes_the_lock_away_and_gives_it_again(server: PostgresServer) -> None:
    storage = open_storage(server.create_database("restarted"))
    with storage.locked():
        server.restart()
    assert not waits_for_the_lock(storage, 10)


def test_a_call_is_made_again_while_the_server_is_away(server: PostgresServer) -> None:
    storage = open_storage(server.create_database("away"))
    server.stop()
    threading.Timer(1.0, server.start).start()
    assert storage.patiently(lambda: optuna.get_all_study_names(storage.rdb)) == []


def test_a_server_that_stays_away_is_given_up_in_one_line(
    server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("behrt.sweep.storage.PATIENCE_SECONDS", 1)
    storage = open_storage(server.create_database("gone"))
    server.stop()
    try:
        with pytest.raises(StorageLost) as lost:
            storage.patiently(lambda: optuna.get_all_study_names(storage.rdb))
        with pytest.raises(StorageLost), storage.locked():
            pass
    finally:
        server.start()
    assert "\n" not in str(lost.value)
    assert "no answer for 1 s" in str(lost.value)
    assert PASSWORD not in str(lost.value)


def test_an_error_that_waiting_does_not_mend_is_raised_at_once(tmp_path: Path) -> None:
    storage = open_storage(f"sqlite:///{tmp_path}/a.db")
    calls = []

    def call() -> None:
        calls.append(1)
        with storage.rdb.engine.connect() as connection:
            connection.exec_driver_sql("SELECT * FROM nothing")

    with pytest.raises(StorageLost, match="syntax error") as lost:
        storage.patiently(call)
    assert len(calls) == 1
    assert "\n" not in str(lost.value)


def test_a_password_with_an_at_sign_is_refused_and_not_shown() -> None:
    text = refusal(f"postgresql://me:{SECRET[:3]}@{SECRET[3:]}@host/a")
    assert "write @ in a password as %40" in text
    assert SECRET[3:] not in text


def test_a_folder_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    assert "no such folder" in refusal(f"sqlite:///{tmp_path}/mistyped/a.db")
    assert not (tmp_path / "mistyped").exists()


def test_a_file_that_another_program_writes_to_is_waited_for(tmp_path: Path) -> None:
    storage = open_storage(f"sqlite:///{tmp_path}/a.db")
    calls = []

    def call() -> int:
        calls.append(1)
        if len(calls) == 1:
            raise sqlalchemy.exc.OperationalError("", {}, sqlite3.OperationalError("database is locked"))
        return len(calls)

    assert storage.patiently(call) == 2


def test_a_worker_lives_until_it_releases_its_token(tmp_path: Path) -> None:
    token = WorkerToken(tmp_path)
    assert is_alive(token.worker) is True
    token.release()
    assert is_alive(token.worker) is False
    assert list((tmp_path / "workers").iterdir()) == []


def test_a_worker_that_is_killed_is_dead(tmp_path: Path) -> None:
    code = (
        "import json, sys, time; from pathlib import Path; from behrt.sweep.liveness import WorkerToken\n"
        "token = WorkerToken(Path(sys.argv[1])); print(json.dumps(token.worker), flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    worker = json.loads(child.stdout.readline())
    assert is_alive(worker) is True
    child.kill()
    child.communicate()
    assert is_alive(worker) is False
    assert len(list((tmp_path / "workers").iterdir())) == 1


def test_a_forked_child_does_not_keep_a_dead_worker_alive(tmp_path: Path) -> None:
    code = (
        "import json, os, sys, time; from pathlib import Path; from behrt.sweep.liveness import WorkerToken\n"
        "token = WorkerToken(Path(sys.argv[1]))\n"
        "child = os.fork()\n"
        "if child: time.sleep(60)\n"
        "print(json.dumps([token.worker, os.getpid()]), flush=True); time.sleep(60); os._exit(0)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    worker, child = json.loads(parent.stdout.readline())
    try:
        assert is_alive(worker) is True
        parent.kill()
        parent.wait()
        assert is_alive(worker) is False
    finally:
        os.kill(child, signal.SIGKILL)
        parent.stdout.close()


def test_two_who_ask_at_once_do_not_take_each_other_for_the_worker(tmp_path: Path) -> None:
    worker = WorkerToken(tmp_path).worker
    path = tmp_path / "workers" / "dead.lock"
    path.touch()
    with path.open() as handle:
        fcntl.flock(handle, fcntl.LOCK_SH)
        assert is_alive({**worker, "lock": str(path)}) is False


def test_nothing_is_known_of_a_worker_elsewhere(tmp_path: Path) -> None:
    with WorkerToken(tmp_path / "here") as token:
        assert is_alive({**token.worker, "host": "another"}) is None
        assert is_alive({**token.worker, "machine": "of the same name"}) is None
        assert is_alive({**token.worker, "lock": str(tmp_path / "not here" / "a.lock")}) is None


def test_a_worker_is_seen_from_another_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with WorkerToken(Path("sweeps/a")) as token:
        (tmp_path / "elsewhere" / "sweeps" / "a" / "workers").mkdir(parents=True)
        monkeypatch.chdir(tmp_path / "elsewhere")
        assert is_alive(token.worker) is True
