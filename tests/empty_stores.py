"""An empty MLflow store, made once and copied: making its tables takes a second, and few tests are about that."""

import shutil
import sqlite3
from contextlib import closing
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from behrt import tracking

make_store = tracking._create_store


@cache
def empty_store() -> bytes:
    with TemporaryDirectory() as folder:
        make_store(Path(folder) / "mlflow.db")
        return (Path(folder) / "mlflow.db").read_bytes()


def copy_store(database: Path) -> None:
    """In the place of `make_store`."""
    database.write_bytes(empty_store())


def lay_store(root: Path) -> Path:
    """The store of processes that are to start in `root`."""
    (root / "mlruns").mkdir(parents=True)
    copy_store(root / "mlruns" / "mlflow.db")
    return root


def copy_workspace(former: Path, root: Path) -> None:
    """A working folder with its runs and its store once more; what they say of where they are is true of the copy."""
    shutil.copytree(former, root, dirs_exist_ok=True)
    for file in root.rglob("logs/tracking.json"):
        file.write_text(file.read_text().replace(str(former), str(root)))
    with closing(sqlite3.connect(root / "mlruns" / "mlflow.db")) as database, database:
        for table, column in (("experiments", "artifact_location"), ("runs", "artifact_uri")):
            database.execute(f"UPDATE {table} SET {column} = replace({column}, ?, ?)", (str(former), str(root)))
