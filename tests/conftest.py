"""Fixtures that several test files share."""

import os
from pathlib import Path

import pytest

from behrt.cli import main


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Folder of real records to test on: `BEHRT_TEST_DATA`, else `../shared/data` beside the repository."""
    named = os.environ.get("BEHRT_TEST_DATA")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no records to test on: BEHRT_TEST_DATA names no folder, and ../shared/data is missing")
    return folder


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared records of 300 simulated patients, made through the command line."""
    folder = tmp_path_factory.mktemp("records")
    assert main(["simulate", "--patients", "300", "--out", str(folder / "meds")]) == 0
    assert main(["prepare", str(folder / "meds"), "--format", "meds", "--out", str(folder / "prepared")]) == 0
    return folder / "prepared"
