"""Does every file import only from the layers above its own?"""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "behrt"

# One row a layer, from the data to the command line; inside a row a file may import from those to its left.
LAYERS = (
    ("config", "files", "imports", "devices", "ranks", "prepare_options", "events", "fingerprint", "parallel"),
    (
        "coding", "visits", "cleaning", "sources.tables", "sources.placement", "sources.meds", "sources.mimic",
        "sources.omop", "sources.synthea", "vocabulary", "labels", "concordance", "population", "outcomes", "cohort",
        "floor", "metrics",
    ),
    ("sequences", "spill", "parts", "prepare", "masking", "batches", "ceiling"),
    ("cheap_layers", "attention", "model", "lora", "adapter_files", "parameters"),
    ("checkpoints", "history", "tracking", "feeding", "feeder", "runs", "sync"),
    ("optimizer", "trainer", "cooccurrence", "records"),
    (
        "doctor.curves", "doctor.facts", "doctor.remedies", "doctor.rule", "doctor.readings", "doctor.curve_symptoms",
        "doctor.setup_symptoms", "doctor.curve_rules", "doctor.setup_rules", "doctor.rules", "doctor.explain",
        "doctor.diagnosis", "doctor.masks", "doctor.memory", "doctor.preflight", "doctor.logs", "doctor.tables",
        "doctor.targets", "doctor.checkup", "hardware", "comparison", "plots",
    ),
    (
        "tasks.task_options", "tasks.codesets", "tasks.timelines", "tasks.moments", "tasks.windows",
        "tasks.readmission", "tasks.disease", "tasks.survival", "tasks.phenotyping", "tasks.building",
        "tasks.features", "tasks.intervals", "tasks.metrics", "tasks.examples",
        "tasks.heads", "tasks.example_batches", "tasks.finetuned", "tasks.probing", "tasks.weighted", "tasks.histories",
        "tasks.baselines", "tasks.assessment", "tasks.training_labels", "tasks.predictions", "tasks.task_plots",
    ),
    (
        "stopper", "run_report", "resume", "changes", "keeping", "lifecycle", "pretrain", "batch_size",
        "finetune_settings", "finetune", "embed", "evaluation_report", "evaluate",
    ),
    (
        "sweep.space", "sweep.settings", "sweep.samplers", "sweep.trials", "sweep.storage", "sweep.liveness",
        "sweep.definitions", "sweep.study", "sweep.summary", "sweep.figures", "sweep.tracked", "sweep.trial",
        "sweep.worker", "sweep.coordinator",
    ),
    (
        "exits", "options", "terminal", "console", "sweep_console", "sweep_commands", "train_command", "labels_command",
        "finetune_command", "evaluate_command", "cli", "__main__",
    ),
)  # fmt: skip
ORDER = [module for layer in LAYERS for module in layer]
WITHOUT_LAYER = {"__init__", "sources.__init__", "doctor.__init__", "sweep.__init__", "tasks.__init__"}


def modules() -> dict[str, Path]:
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
        for path in sorted(PACKAGE.rglob("*.py"))
    }  # fmt: skip


def imported_modules(source: str) -> set[str]:
    """Modules of the package that a source text imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "behrt":
            name = node.module.removeprefix("behrt").lstrip(".")
            inside = {f"{name}.{alias.name}".lstrip(".") for alias in node.names}
            found |= {name} if name in ORDER else inside & set(ORDER)
            assert node.level == 0
        elif isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("behrt.") for alias in node.names if alias.name.startswith("behrt.")}
    return found


def imports_from_below(module: str, source: str) -> set[str]:
    return {name for name in imported_modules(source) if ORDER.index(name) >= ORDER.index(module)}


def test_every_module_has_a_place_in_the_layers() -> None:
    assert set(modules()) - WITHOUT_LAYER == set(ORDER)


@pytest.mark.parametrize("module", ORDER)
def test_a_module_imports_only_from_above(module: str) -> None:
    assert imports_from_below(module, modules()[module].read_text()) == set()


def test_an_import_from_below_is_found_even_inside_a_function() -> None:
    assert imports_from_below("model", "def f():\n    from behrt.trainer import Trainer\n") == {"trainer"}
    assert imports_from_below("model", "import behrt.cli\n") == {"cli"}
    assert imports_from_below("trainer", "from behrt.model import BEHRT\n") == set()


@pytest.mark.parametrize("module", ORDER)
def test_only_tracking_imports_mlflow_and_nobody_the_peers(module: str) -> None:
    names = {
        name
        for node in ast.walk(ast.parse(modules()[module].read_text()))
        for name in (
            [node.module or ""] if isinstance(node, ast.ImportFrom) else
            [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        )
    }  # fmt: skip
    forbidden = {"transformers", "peft"} | ({"mlflow"} if module != "tracking" else set())
    assert not {name.split(".")[0] for name in names} & forbidden


@pytest.mark.parametrize("module", ORDER)
def test_a_module_opens_with_the_question_that_it_answers(module: str) -> None:
    docstring = ast.get_docstring(ast.parse(modules()[module].read_text()))
    assert docstring is not None
    assert "?" in docstring.split("\n\n")[0]
