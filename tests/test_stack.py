"""Do the services of `compose.yaml` come through servers that fail? `make stack-check` in short."""

import logging
from pathlib import Path

import pytest

from behrt.tracking import StoreUnavailable, connect

from .postgres_server import PostgresServer
from .stack import MLFLOW_PASSWORD, Stack, check, compose

SECRETS = {"POSTGRES_PASSWORD": "one", "MLFLOW_PASSWORD": "two", "MLFLOW_FLASK_SERVER_SECRET_KEY": "three"}


def refusal(monkeypatch: pytest.MonkeyPatch, uri: str, **credentials: str) -> str:
    """What a command says of a server that it cannot use, which waiting does not mend."""
    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        for name in ("USERNAME", "PASSWORD"):
            patch.delenv(f"MLFLOW_TRACKING_{name}", raising=False)
            if name in credentials:
                patch.setenv(f"MLFLOW_TRACKING_{name}", credentials[name])
        with pytest.raises(StoreUnavailable) as refused:
            connect()
    assert not refused.value.may_pass
    assert "hunter2" not in str(refused.value)
    return str(refused.value)


def test_a_study_and_a_training_end_whole_though_both_servers_fail_in_between(
    tmp_path: Path, prepared: Path, server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look(stack: Stack) -> None:
        """While its server runs, whom it refuses."""
        for credentials in ({}, {"USERNAME": "behrt", "PASSWORD": "hunter2"}):
            assert "set MLFLOW_TRACKING_USERNAME and" in refusal(monkeypatch, stack.uri, **credentials)
        assert "set MLFLOW_TRACKING_USERNAME and" in refusal(monkeypatch, stack.uri.replace("//", "//behrt:hunter2@"))
        elsewhere = stack.uri.replace("127.0.0.1", "0.0.0.0")  # a name that leads there, and is not allowed
        known = {"USERNAME": "behrt", "PASSWORD": MLFLOW_PASSWORD}
        assert "name it in the server's --allowed-hosts" in refusal(monkeypatch, elsewhere, **known)

    tell = logging.getLogger(__name__).info
    check(tmp_path, server, prepared, prefix="stack", workers=1, trials=2, epochs=5, tell=tell, look=look)


@pytest.mark.parametrize("missing", SECRETS)
def test_no_service_starts_without_its_secrets(missing: str) -> None:
    with pytest.raises(KeyError, match=f"{missing} is missing"):
        compose({name: value for name, value in SECRETS.items() if name != missing})


def test_no_secret_stands_in_the_file_or_on_a_command_line() -> None:
    for name, service in compose(SECRETS)["services"].items():
        for variable, value in service["environment"].items():
            if any(word in variable for word in ("PASSWORD", "SECRET", "KEY")):
                assert value in SECRETS.values(), (name, variable)
        assert not set(SECRETS.values()) & set(str(service.get("command")).split())


def test_a_service_waits_for_those_it_needs_until_they_are_healthy() -> None:
    services = compose(SECRETS)["services"]
    needed = {name: service.get("depends_on", {}) for name, service in services.items()}
    assert {name: set(others) for name, others in needed.items()} == {
        "db": set(), "mlflow": {"db"}, "trainer": {"mlflow"}, "worker": {"db", "mlflow"}
    }  # fmt: skip
    for others in needed.values():
        for other, how in others.items():
            assert how == {"condition": "service_healthy"}
            assert "healthcheck" in services[other]
