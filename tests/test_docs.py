"""Is what the documents say still true?"""

import importlib.util
import re
import shlex
import shutil
from contextlib import chdir
from pathlib import Path

import pytest

from behrt.cli import main

from .test_layers import ORDER

ROOT = Path(__file__).resolve().parents[1]

# What makes a command of the README small enough for a test, laid over the command itself.
SMALLER = {
    "train --data data/mine --model-size small": ["--epochs", "1"],
    "train --data data/mine --use-lora": ["--epochs", "1"],
    "train experiments/the_fix": ["--epochs", "1", "--num-patients", "60", "--model-size", "small"],
    "train --preset a40": ["--epochs", "1", "--num-patients", "60", "--model-size", "small"],
}


def readme_blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)


def readme_commands() -> list[list[str]]:
    """Words of each `behrt …` line, comments left out."""
    lines = [line for block in readme_blocks("bash") for line in block.splitlines() if line.startswith("behrt ")]
    return [shlex.split(line, comments=True)[1:] for line in lines]


def test_the_readmes_commands_run_in_their_order(tmp_path: Path, prepared: Path) -> None:
    shutil.copytree(ROOT / "experiments" / "the_fix", tmp_path / "experiments" / "the_fix")
    ran = 0
    with chdir(tmp_path):
        for command in readme_commands():
            if command == ["ui"]:
                continue  # test_browser.py opens it
            words = [str(prepared.parent / "meds") if word == "SOURCE" else word for word in command]
            extra = [flags for start, flags in SMALLER.items() if " ".join(words).startswith(start)]
            assert main([*words, *(extra[0] if extra else [])]) == 0, command
            ran += 1
    assert ran >= 6


def test_the_readmes_python_runs(capsys: pytest.CaptureFixture) -> None:
    for block in readme_blocks("python"):
        exec(compile(block, "README.md", "exec"), {})
    assert "% trainable" in capsys.readouterr().out


def test_the_readme_names_both_make_targets() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", "\n".join(readme_blocks("bash")), flags=re.MULTILINE):
        assert f"\n{target}:" in makefile


@pytest.mark.parametrize("document", ["README.md", "docs/architecture.md", "docs/learning.md"])
def test_links_and_pictures_are_there(document: str) -> None:
    path = ROOT / document
    links = re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8"))
    assert all((path.parent / link).exists() for link in links if "://" not in link)


def test_the_architecture_names_every_module() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = "\n".join(line for line in text.splitlines() if re.match(r"\| \d+ \|", line))
    named = {name.replace("/", ".") for name in re.findall(r"`([\w/]+)`", table)}
    assert named == set(ORDER) - {"__main__"}


def test_the_page_of_measurements_says_what_was_measured() -> None:
    spec = importlib.util.spec_from_file_location("measure", ROOT / "experiments" / "learning" / "measure.py")
    assert spec is not None
    assert spec.loader is not None
    measure = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(measure)
    assert measure.page(measure.load_results()) == (ROOT / "docs" / "learning.md").read_text(encoding="utf-8")
