"""Can two runs be compared in MLflow's own pages, as a person would do it in a browser?"""

import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from mlflow.entities import Run
from selenium import webdriver
from selenium.webdriver.support.ui import WebDriverWait

from behrt.history import read_run

from .conftest import Workspace
from .small_sweeps import behrt, runs_of, write_sweep

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        not (shutil.which("chromium") and shutil.which("chromedriver")),
        reason="chromium and chromedriver are not installed",
    ),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # selenium leaves its sockets to the garbage collector
]


@contextmanager
def served(root: Path) -> Iterator[str]:
    """The server that `behrt ui` starts over the store in `root`; what it prints is `ui.log` there."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = root / "ui.log"
    with log.open("w") as output:
        server = subprocess.Popen(
            [sys.executable, "-m", "behrt", "ui", "--port", str(port)],
            cwd=root,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            url = f"http://127.0.0.1:{port}"
            for _ in range(240):
                try:
                    if urlopen(f"{url}/health", timeout=5).status == 200:
                        break
                except (URLError, OSError):
                    assert server.poll() is None, log.read_text()
                    time.sleep(0.5)
            else:
                pytest.fail(f"the server did not come up:\n{log.read_text()}")
            yield url
        finally:
            server.terminate()
            server.wait(timeout=30)


@pytest.fixture(scope="module")
def address(workspace: Workspace) -> Iterator[str]:
    """Where the store of the two runs is served."""
    with served(workspace.root) as url:
        yield url


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    profile = tmp_path_factory.mktemp("profile")
    for argument in (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1500,2600",
        f"--user-data-dir={profile}",
    ):  # fmt: skip
        options.add_argument(argument)
    service = webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
    driver = webdriver.Chrome(options=options, service=service)
    try:
        yield driver
    finally:
        driver.quit()


def visible_text(browser: webdriver.Chrome) -> str:
    return str(browser.execute_script("return document.body.innerText"))


def compare(browser: webdriver.Chrome, address: str, runs: list[Run]) -> str:
    """What the page shows on which runs are compared."""
    ids = ",".join(f'"{run.info.run_id}"' for run in runs)
    experiments = ",".join(f'"{run.info.experiment_id}"' for run in runs)
    browser.get(f"{address}/#/compare-runs?runs=[{ids}]&experiments=[{experiments}]&workflowType=machine_learning")
    WebDriverWait(browser, 90).until(lambda driver: "val_loss" in visible_text(driver))
    return visible_text(browser)


def test_the_compare_page_shows_the_val_loss_of_both_runs(
    workspace: Workspace, address: str, browser: webdriver.Chrome
) -> None:
    client = workspace.client()
    runs = [client.get_run(read_run(folder)["run_id"]) for folder in (workspace.lora, workspace.full)]
    text = compare(browser, address, runs)
    for run in runs:
        assert run.info.run_name in text
        assert f"{run.data.metrics['val_loss']:.3f}"[:-1] in text
    assert "adaptation.use_lora" in text


def test_the_address_that_behrt_ui_prints_lists_the_latest_runs(
    workspace: Workspace, address: str, browser: webdriver.Chrome
) -> None:
    printed = re.search(rf"Open ({re.escape(address)}/#/\S+)", (workspace.root / "ui.log").read_text())
    assert printed is not None
    run = workspace.client().get_run(read_run(workspace.full)["run_id"])  # the later of the two
    browser.get(printed.group(1))
    WebDriverWait(browser, 90).until(lambda driver: run.info.run_name in visible_text(driver))


def test_the_trials_of_a_study_are_compared_by_their_four_parameters_and_val_loss(
    tmp_path: Path, prepared: Path, browser: webdriver.Chrome
) -> None:
    write_sweep(tmp_path / "s.yaml", prepared, settings={"epochs": 1}, budget={"trials": 2})
    behrt(tmp_path, "sweep", "run", "s.yaml")
    parent, trials = runs_of(tmp_path, "s")
    with served(tmp_path) as url:
        text = compare(browser, url, list(trials.values()))
        for name in ("model.dropout", "training.weight_decay", "adaptation.lora_rank", "training.lr"):
            assert name in text
            assert all(run.data.params[name] in text for run in trials.values())
        for run in trials.values():
            assert run.info.run_name in text
            assert f"{run.data.metrics['best_val_loss']:.3f}"[:-1] in text
        browser.get(f"{url}/#/experiments/{parent.info.experiment_id}/runs?workflowType=machine_learning")
        WebDriverWait(browser, 90).until(lambda driver: "study s" in visible_text(driver))
