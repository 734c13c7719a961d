"""Does the coordinator tell a study in trouble from one that is unlucky, and whose folder is whose?"""

from pathlib import Path

import pytest

from behrt.config import UserError
from behrt.sweep.coordinator import Crashes, Workers, keep_folder
from behrt.sweep.trials import TrialState, tally

from .test_sweep_trials import record


def test_workers_that_die_all_at_once_are_one_look() -> None:
    crashes = Crashes(limit=3)
    assert [crashes.are_too_many(tally([])) for _ in range(3)] == [False, False, True]


def test_a_study_that_gets_on_between_crashes_goes_on() -> None:
    crashes = Crashes(limit=3)
    for epochs in range(1, 20):
        assert not crashes.are_too_many(tally([record(0, TrialState.RUNNING, epochs=epochs)]))


def test_a_trial_that_is_given_up_is_getting_on() -> None:
    crashes = Crashes(limit=3)
    given_up = [record(number, TrialState.FAILED, ended="error: any") for number in range(20)]
    for count in range(20):
        assert not crashes.are_too_many(tally(given_up[:count]))


def test_a_folder_belongs_to_the_study_that_made_it(tmp_path: Path) -> None:
    keep_folder(tmp_path / "s", "one")
    keep_folder(tmp_path / "s", "one")
    with pytest.raises(UserError, match="belongs to another study of this name"):
        keep_folder(tmp_path / "s", "other")


def test_the_logs_of_workers_are_told_apart_by_their_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The coordinators of several containers have the same process id, and one folder."""
    monkeypatch.setattr(Workers, "start", lambda self, index: None)
    logs = []
    for host in ("one", "two"):
        monkeypatch.setattr("socket.gethostname", lambda host=host: host)
        logs.append(Workers(url="", study="s", count=1, deadline=None).log_file(0))
    assert logs[0] != logs[1]
