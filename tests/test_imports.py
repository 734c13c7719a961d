"""Is nothing heavy imported before it is needed, and what is needed without a search for garbage?"""

import gc
import subprocess
import sys

import pytest

from behrt.imports import first_import

HEAVY = {"torch", "mlflow", "polars", "pyarrow", "pandas", "numpy", "scipy", "sklearn", "optuna", "rich", "matplotlib"}
"""What a command may need, and its help does not."""


def imported_by(code: str) -> set[str]:
    """The modules of a fresh process that has run some code, whose own output does not count."""
    code += "\nimport sys; print('\\n' + ' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "arguments",
    [
        "--help",
        "train --help",
        "prepare --help",
        "labels --help",
        "sweep run --help",
        "doctor --help",
        "--version",
        "train --droput 1",
    ],
)
def test_help_and_mistakes_import_nothing_heavy(arguments: str) -> None:
    assert not imported_by(f"from behrt.cli import main; main({arguments.split()!r})") & HEAVY


def test_settings_import_nothing_heavy() -> None:
    code = "from behrt.config import load_experiment; load_experiment(flags={'epochs': 1})"
    assert not imported_by(code) & {*HEAVY, "click"}


def test_a_training_imports_neither_the_compiler_nor_what_draws_or_tracks() -> None:
    found = imported_by("import behrt.console, behrt.pretrain, behrt.sweep.trial")
    assert "torch" in found
    assert not found & {"torch._dynamo", "sympy", "mlflow", "matplotlib", "seaborn", "sklearn", "pandas"}


def test_a_library_is_imported_without_a_search_for_garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gc, "freeze", lambda: None)  # of this process, whose objects are none of the test's business
    for library, searches in (("no_library", False), ("sys", True)):
        with first_import(library):
            assert gc.isenabled() == searches
        assert gc.isenabled()


def test_the_search_goes_on_where_an_import_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gc, "freeze", lambda: None)
    with pytest.raises(ImportError), first_import("no_library"):
        import no_library  # noqa: F401
    assert gc.isenabled()
