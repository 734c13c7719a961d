"""How do tests get a PostgreSQL server of their own?"""

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PASSWORD = "correct horse @/{}"


def programs_folder() -> Path | None:
    """Where the server's programs are; None where none are installed."""
    found = shutil.which("pg_ctl")
    folders = [Path(found).parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((folder for folder in folders if (folder / "initdb").exists()), None)


def why_not() -> str | None:
    """Why no server can be started here; None if one can."""
    if programs_folder() is None:
        return "no PostgreSQL server is installed"
    if os.geteuid() == 0 and _other_user() is None:
        return "a PostgreSQL server refuses to run as root, and there is no user postgres"
    return None


@dataclass(frozen=True)
class PostgresServer:
    """A running server.

    Attributes:
        port: on 127.0.0.1, of the user and the database `behrt`.
    """

    folder: Path
    port: int

    def url(self, password: str = PASSWORD, database: str = "postgres") -> str:
        quoted = password.replace("@", "%40").replace("/", "%2F").replace(" ", "%20")
        return f"postgresql://behrt:{quoted}@127.0.0.1:{self.port}/{database}"

    def restart(self) -> None:
        self._control("restart", "--mode=immediate")

    def start(self) -> None:
        self._control("start")

    def stop(self) -> None:
        self._control("stop", "--mode=immediate")

    def create_database(self, name: str) -> str:
        """URL of a new, empty database."""
        import psycopg

        with psycopg.connect(self.url(), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}".encode())
        return self.url(database=name)

    def _control(self, *arguments: str) -> None:
        log = self.folder / "log"
        _run("pg_ctl", "--pgdata", str(self.folder / "data"), "--log", str(log), "--wait", "--silent", *arguments)


@contextlib.contextmanager
def postgres_server() -> Iterator[PostgresServer]:
    """Starts a server with an empty data folder and stops it."""
    folder = Path(tempfile.mkdtemp(prefix="behrt-postgres-"))  # a test's own folder is closed to other users
    try:
        if os.geteuid() == 0:
            user = _other_user()
            assert user is not None
            os.chown(folder, user.pw_uid, user.pw_gid)
        password_file = folder / "password"
        password_file.write_text(PASSWORD)
        password_file.chmod(0o644)
        _run(
            "initdb", "--pgdata", str(folder / "data"), "--username=behrt", "--auth=scram-sha-256", "--no-sync",
            f"--pwfile={password_file}", "--encoding=UTF8", "--locale=C",
        )  # fmt: skip
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        with (folder / "data" / "postgresql.conf").open("a") as settings:
            settings.write(
                f"\nport = {port}\nlisten_addresses = '127.0.0.1'\nunix_socket_directories = ''\nfsync = off\n"
                "shared_buffers = 16MB\ntimezone = 'Asia/Tokyo'\n"
            )
        server = PostgresServer(folder, port)
        server.start()
        try:
            yield server
        finally:
            if (folder / "data" / "postmaster.pid").exists():
                server.stop()
    finally:
        shutil.rmtree(folder)


def _other_user() -> pwd.struct_passwd | None:
    try:
        return pwd.getpwnam("postgres")
    except KeyError:
        return None


def _run(program: str, *arguments: str) -> None:
    folder = programs_folder()
    assert folder is not None
    options = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.geteuid() == 0 else {}
    done = subprocess.run(
        [folder / program, *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        cwd="/",
        timeout=60,
        check=False,
        text=True,
        **options,  # type: ignore[call-overload]
    )
    assert done.returncode == 0, done.stderr
