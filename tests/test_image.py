"""Is the image pinned, small, private and not root's? What it does when it is built, `make image-check` tries."""

import configparser
import json
import re
import shutil
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "Dockerfile").read_text()
INSTRUCTIONS = [
    (word, rest)
    for word, rest in (
        line.split(maxsplit=1) for line in re.sub(r"\\\n\s*", "", re.sub(r"(?m)^#.*\n", "", TEXT)).splitlines() if line
    )
]
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines())


def last(word: str) -> str:
    return [rest for found, rest in INSTRUCTIONS if found == word][-1]


def is_in_context(path: str) -> bool:
    """By `.dockerignore`: of the patterns that match the path or a folder above it, the last one counts."""
    parts = path.split("/")
    above = [parts[:count] for count in range(1, len(parts) + 1)]
    is_in = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = line.removeprefix("!").split("/")
        anywhere = pattern[0] == "**"
        pattern = pattern[1:] if anywhere else pattern
        for found in above:
            tail = found[-len(pattern) :] if anywhere else found
            if len(tail) == len(pattern) and all(map(fnmatchcase, tail, pattern)):
                is_in = line.startswith("!")
    return is_in


def context() -> list[Path]:
    files = [file for name in ROOT.iterdir() if name.name not in (".git", ".venv") for file in [name, *name.rglob("*")]]
    return [file for file in files if file.is_file() and is_in_context(file.relative_to(ROOT).as_posix())]


def test_what_is_sent_to_the_build_is_small() -> None:
    assert 100_000 < sum(file.stat().st_size for file in context()) < 3_000_000


@pytest.mark.parametrize(
    "path",
    [
        ".env", "data/mine/train.arrow", "mlruns/mlflow.db", "sweeps/studies.db", "sweeps/quick/trials/0000/run.json",
        "sweeps/quick/trials/0000/logs/settings.yaml", "experiments/mine/checkpoints/last/model.safetensors",
        "experiments/mine/logs/settings.yaml", "behrt/__pycache__/cli.cpython-311.pyc", ".git/config", "pip.conf",
    ],
)  # fmt: skip
def test_records_runs_and_secrets_are_not_sent(path: str) -> None:
    assert not is_in_context(path)


def test_all_that_is_copied_is_there_and_sent() -> None:
    for word, rest in INSTRUCTIONS:
        if word != "COPY" or rest.startswith("--from"):
            continue
        *sources, _ = rest.split()
        for source in sources:
            path = ROOT / source
            files = [path] if path.is_file() else [file for file in path.rglob("*") if file.suffix in (".py", ".yaml")]
            sent = [file for file in files if is_in_context(file.relative_to(ROOT).as_posix())]
            assert sent, source
    for sweep in (ROOT / "sweeps").glob("*.yaml"):
        assert is_in_context(sweep.relative_to(ROOT).as_posix())


def test_everything_that_is_installed_is_pinned() -> None:
    names = [word for word, _ in INSTRUCTIONS]
    installs = [index for index, (_, rest) in enumerate(INSTRUCTIONS) if "-m pip --python" in rest]
    assert len(installs) == 2
    assert "PIP_CONSTRAINT=/build/constraints.txt" in INSTRUCTIONS[names.index("ENV")][1]
    assert names.index("ENV") < min(installs)
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    wanted = setup["options"]["install_requires"] + setup["options.extras_require"]["server"]
    pinned = {name.lower() for name in PINS}
    assert {re.split(r"[\[>]", line)[0].lower() for line in wanted.split()} <= pinned
    assert {"flask-wtf", "setuptools"} <= pinned  # of mlflow[auth]; what builds the package


def test_the_base_has_the_torch_that_is_pinned() -> None:
    (base,) = [rest for word, rest in INSTRUCTIONS if word == "ARG" and rest.startswith("BASE_IMAGE=")]
    assert base.startswith(f"BASE_IMAGE=pytorch/pytorch:{PINS['torch']}-cuda")
    assert base.endswith("-runtime")


def test_it_does_not_run_as_root_and_kubernetes_can_tell() -> None:
    assert last("USER") == "${USER_ID}:${USER_ID}"
    (default,) = [rest for word, rest in INSTRUCTIONS if word == "ARG" and rest.startswith("USER_ID=")]
    assert int(default.partition("=")[2]) > 0


def test_its_first_process_is_behrt_itself_so_that_signals_reach_it() -> None:
    assert json.loads(last("ENTRYPOINT")) == ["behrt"]


def test_no_secret_is_built_in() -> None:
    for word, rest in INSTRUCTIONS:
        if word in ("ARG", "ENV", "LABEL"):
            assert not re.search(r"(PASSWORD|TOKEN|SECRET|KEY|PROXY|CERT)\w*=", rest, re.IGNORECASE), rest


def test_a_linter_finds_nothing() -> None:
    linter = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if linter is None:
        pytest.skip("hadolint is not installed")
    found = subprocess.run([linter, ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert found.stdout + found.stderr == ""
