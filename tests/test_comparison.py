"""Does a comparison say what differs between runs, what came of them, and whether their losses compare at all?"""

import io
import json
import math
import shutil
import subprocess
import sys
from contextlib import chdir
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.image import imread
from rich.console import Console

from behrt.cli import main
from behrt.comparison import ComparedRun, Comparison, compare, compare_targets, judged
from behrt.config import UserError
from behrt.console import comparison_table
from behrt.doctor.curves import Curve
from behrt.doctor.facts import RunFacts
from behrt.plots import draw_comparison

from .conftest import Workspace

NAN = math.nan
KNOWN = {"unigram_loss": 6.1, "val_scored": 1000, "vocab_size": 500, "val_patients": 100}


def curves(**values: list[float]) -> dict[str, Curve]:
    """Curves by name, their epochs numbered from 1."""
    return {name: Curve.of(enumerate(points, 1)) for name, points in values.items()}


def run(name: str, record: dict[str, Any] | None = None, **facts: Any) -> ComparedRun:
    return judged(name, RunFacts(**{**KNOWN, **facts}), record=record)


def answer(capsys: pytest.CaptureFixture, *arguments: str) -> dict[str, Any]:
    """What `behrt compare --json` prints."""
    capsys.readouterr()
    assert main(["compare", *arguments, "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    found = json.loads(captured.out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert isinstance(found, dict)
    return found


def refusal(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    capsys.readouterr()
    assert main(["compare", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return str(line)


def copy_of(folder: Path, to: Path, **changes: Any) -> Path:
    """A run without its checkpoints, some fields of its `run.json` changed."""
    shutil.copytree(folder, to, ignore=shutil.ignore_patterns("checkpoints", ".lock"))
    record = json.loads((to / "run.json").read_text())
    (to / "run.json").write_text(json.dumps({**record, **changes}))
    return to


# --- two real runs ---


def test_results_are_those_that_the_runs_left(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    found = answer(capsys, str(workspace.lora), str(workspace.full), "--out", str(tmp_path / "c.png"))
    assert [one["name"] for one in found["runs"]] == ["lora", "full"]
    for one, folder in zip(found["runs"], (workspace.lora, workspace.full), strict=True):
        record = json.loads((folder / "run.json").read_text())
        history = json.loads((folder / "logs" / "metrics_history.json").read_text())
        tracked = workspace.client().get_run(record["run_id"]).data
        assert one["run_id"] == record["run_id"]
        assert (one["verdict"], one["severity"]) == (tracked.tags["diagnosis"], tracked.tags["severity"])
        assert one["results"] == {
            "best_val_loss": tracked.metrics["best_val_loss"],
            "best_epoch": tracked.metrics["best_epoch"],
            "best_val_accuracy": record["best_val_accuracy"],
            "closed_gap": pytest.approx(record["closed_gap"], rel=1e-12),
            "epochs": 3,
            "trainable_percent": record["parameters"]["trainable_percent"],
            "seconds": pytest.approx(sum(point["value"] for point in history["epoch_seconds"])),
        }


def test_settings_that_differ_are_listed_and_no_others(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    found = answer(capsys, str(workspace.lora), str(workspace.full), "--out", str(tmp_path / "c.png"))
    files = [yaml.safe_load((folder / "logs" / "settings.yaml").read_text())
             for folder in (workspace.lora, workspace.full)]  # fmt: skip
    changed = {
        name
        for section in ("model", "adaptation", "data", "training")
        for name in files[0][section]
        if files[0][section][name] != files[1][section][name]
    }
    assert changed == {"use_lora", "lora_rank"}
    different = found["different"]
    assert different["use_lora"] == [True, False]
    assert different["lora_rank"] == [4, None]  # the other run has no adapters to have a rank
    assert different["lora_parameters"] == [8192, 0]
    of_adapters = {"lora_rank", "lora_dropout", "lora_targets", "freeze_base", "use_lora"}
    counts = {"total_parameters", "trainable_parameters", "lora_parameters"}
    assert set(different) == of_adapters | counts


def test_runs_on_the_same_validation_masks_compare(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    found = answer(capsys, str(workspace.lora), str(workspace.full), "--out", str(tmp_path / "c.png"))
    assert found["comparable"] is True
    assert found["why_not"] is None
    assert found["figure"] == str(tmp_path / "c.png")


def test_a_run_is_the_same_by_folder_by_id_and_from_the_store(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = (workspace.lora, workspace.full)
    ids = [json.loads((folder / "run.json").read_text())["run_id"] for folder in folders]
    by_folder = compare_targets([str(folder) for folder in folders]).as_dict()
    with chdir(workspace.root):
        assert compare_targets(ids).as_dict() == by_folder
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{workspace.root}/mlruns/mlflow.db")
    with chdir(tmp_path):  # no experiments/ here
        assert compare_targets(ids).as_dict() == by_folder


def test_people_read_a_table_on_stderr(workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    capsys.readouterr()
    with chdir(tmp_path):
        assert main(["compare", str(workspace.lora), str(workspace.full)]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    rows = [[cell.strip() for cell in line.strip("│┃").replace("┃", "│").split("│")]
            for line in captured.err.splitlines() if line[:1] in "│┃"]  # fmt: skip
    table = {row[0]: row[1:] for row in rows}
    assert table[""] == ["lora", "full"]
    assert table["use_lora"] == ["yes", "no"]
    assert table["lora_targets"] == ["query, key, value, output", "-"]
    best = [json.loads((folder / "run.json").read_text())["best_val_loss"]
            for folder in (workspace.lora, workspace.full)]  # fmt: skip
    assert table["best val_loss"] == [f"{loss:.4f}" for loss in best]
    assert "lr" not in table
    assert "compare" not in captured.err
    assert [path.name for path in tmp_path.iterdir()] == ["comparison.png"]


def test_a_figure_that_is_there_is_replaced_whole(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "plots" / "mine.PNG"
    out.parent.mkdir()
    out.write_text("older")
    answer(capsys, str(workspace.lora), str(workspace.full), "--out", str(out))
    assert imread(out, format="png").std() > 0.01
    assert [path.name for path in out.parent.iterdir()] == ["mine.PNG"]


# --- names ---


def test_runs_of_one_experiment_are_told_apart_by_their_ids(workspace: Workspace, tmp_path: Path) -> None:
    earlier = copy_of(workspace.full, tmp_path / "earlier", run_id="abcdef01" + "2" * 24)
    run_id = json.loads((workspace.full / "run.json").read_text())["run_id"]
    comparison = compare_targets([str(workspace.full), str(earlier), str(workspace.lora)])
    assert [one.name for one in comparison.runs] == [f"full {run_id[:8]}", "full abcdef01", "lora"]


def test_files_are_named_as_shortly_as_tells_them_apart(tmp_path: Path) -> None:
    text = "epoch,train_loss\n1,6.9\n2,6.5\n"
    files = [tmp_path / name for name in ("a/log.csv", "b/log.csv", "c.csv")]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    assert [one.name for one in compare_targets([str(file) for file in files]).runs] == [
        "a/log.csv",
        "b/log.csv",
        "c.csv",
    ]


def test_the_standard_input_is_a_run_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stdin").write_text("epoch,val_loss\n1,6.9\n2,6.4\n")
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"epoch,val_loss\n1,6.9\n2,6.5\n")))
    names = [one.name for one in compare_targets(["-", str(tmp_path / "stdin")]).runs]
    assert names == ["stdin", f"{tmp_path.name}/stdin"]


# --- what differs ---


def test_the_seed_and_the_schedule_differ_too_though_no_rule_asks_for_them() -> None:
    told = [{"settings": {"training": {"seed": seed, "schedule": schedule, "lr": 1e-3}}}
            for seed, schedule in ((0, "cosine"), (1, "linear"))]  # fmt: skip
    assert compare([run("a", told[0]), run("b", told[1])]).different == {
        "seed": [0, 1],
        "schedule": ["cosine", "linear"],
    }


def test_what_auto_became_is_compared() -> None:
    told = {"settings": {"model": {"max_position": "auto"}, "training": {"device": "auto", "precision": "auto"}}}
    runs = [
        run("a", {**told, "precision": "fp32"}, max_position=50, device="cpu"),
        run("b", {**told, "precision": "bf16"}, max_position=80, device="cuda"),
    ]
    expected = {"max_position": [50, 80], "device": ["cpu", "cuda"], "precision": ["fp32", "bf16"]}
    assert compare(runs).different == expected


def test_what_only_one_run_is_known_to_have_is_no_difference() -> None:
    assert compare([run("a", lr=1e-3), run("b")]).different == {}
    assert compare([run("a", lr=1e-3), run("b"), run("c", lr=3e-3)]).different == {"lr": [1e-3, None, 3e-3]}


def test_what_another_machine_measures_is_no_difference() -> None:
    runs = [run("a", first_loss=6.9, memory_needed=1, finished=True), run("b", first_loss=6.8, memory_needed=2)]
    assert compare(runs).different == {}


def test_settings_without_effect_are_not_compared() -> None:
    full = [run("a", use_lora=False, lora_rank=16), run("b", use_lora=False, lora_rank=8)]
    lora = [run("a", use_lora=True, lora_rank=16), run("b", use_lora=True, lora_rank=8)]
    assert compare(full).different == {}
    assert compare(lora).different == {"lora_rank": [16, 8]}
    prepared = [run("a", data="mine", num_patients=100), run("b", data="mine", num_patients=200)]
    assert compare(prepared).different == {}
    assert compare([replace(one, parameters={"num_patients": n}) for n, one in enumerate(prepared)]).different


# --- whether losses compare ---


@pytest.mark.parametrize(
    ("name", "value"),
    [("unigram_loss", 6.1001), ("val_scored", 1001), ("vocab_size", 501), ("val_patients", 99), ("floor_loss", 3.5)],
)
def test_other_records_or_masks_do_not_compare(name: str, value: float) -> None:
    first, other = run("first", floor_loss=3.4), run("other", **{"floor_loss": 3.4, name: value})
    assert compare([first, run("again", floor_loss=3.4)]).why_not is None
    why_not = compare([first, run("again", floor_loss=3.4), other]).why_not
    assert why_not is not None
    assert why_not.startswith("The losses do not compare")
    assert name in why_not
    assert "first, again; " in why_not
    assert "\n" not in why_not


def test_a_sum_in_another_order_is_still_the_same_loss() -> None:
    assert compare([run("a", unigram_loss=6.1), run("b", unigram_loss=6.1 * (1 + 1e-14))]).why_not is None


def test_fewer_training_patients_leave_the_validation_losses_comparable() -> None:
    def limited(name: str, limit: int | None, **facts: Any) -> ComparedRun:
        return run(name, {"settings": {"data": {"max_patients": limit}}}, **facts)

    some, every = limited("some", 100, unigram_loss=6.2), limited("every", None)
    assert compare([some, every]).why_not is None
    assert compare([limited("some", None, unigram_loss=6.2), every]).why_not is not None
    assert compare([some, limited("every", None, val_scored=999)]).why_not is not None
    assert compare([some, limited("every", None, floor_loss=3.4), limited("b", 50, floor_loss=3.5)]).why_not is not None


def test_a_run_of_which_nothing_is_known_is_not_said_to_compare() -> None:
    why_not = compare([run("a"), judged("log.csv", RunFacts(curves=curves(val_loss=[6.0, 5.0])))]).why_not
    assert why_not == "Whether the losses compare is not known: nothing tells which records log.csv saw."


def test_only_lines_that_all_runs_have_are_shared() -> None:
    runs = [run("a", floor_loss=3.4), run("b", floor_loss=3.4), run("c", floor_loss=3.4)]
    assert compare(runs).shared == {"unigram_loss": 6.1, "floor_loss": 3.4}
    assert compare([*runs, run("d")]).shared == {"unigram_loss": 6.1}
    assert compare([*runs, run("d", floor_loss=3.4, unigram_loss=6.2)]).shared == {"floor_loss": 3.4}


# --- results ---


def test_the_best_epoch_is_the_lowest_finite_validation_loss() -> None:
    found = run(
        "a",
        curves=curves(
            train_loss=[6, 5, 4, 3, 2], val_loss=[6.0, NAN, 5.0, 5.5, NAN], val_accuracy=[0.1, 0.2, 0.3, 0.4, 0.5]
        ),
        floor_loss=4.1,
    ).results
    assert (found["best_epoch"], found["best_val_loss"], found["best_val_accuracy"]) == (3, 5.0, 0.3)
    assert found["closed_gap"] == pytest.approx((6.1 - 5.0) / (6.1 - 4.1))
    assert found["epochs"] == 5


def test_the_epoch_whose_weights_were_kept_is_the_best_one() -> None:
    values = curves(val_loss=[6.0, 5.0, 4.99])  # the last improves by less than the minimum delta
    assert run("a", {"best_epoch": 2}, curves=values).results["best_val_loss"] == 5.0
    for nonsense in (None, 7, "2", [2]):
        assert run("a", {"best_epoch": nonsense}, curves=values).results["best_val_loss"] == 4.99


@pytest.mark.parametrize(
    ("epochs", "expected"), [([1, 2, 3], 3), ([0, 1, 2], 3), ([5, 10, 15], 15), ([0, 5], 6), ([0.5, 1.5], 1.5)]
)
def test_epochs_are_counted_however_a_tool_numbers_them(epochs: list[float], expected: float) -> None:
    curve = Curve.of((epoch, 5.0) for epoch in epochs)
    assert judged("a", RunFacts(curves={"train_loss": curve})).results["epochs"] == expected


def test_a_run_without_an_epoch_has_no_results() -> None:
    found = run("a", {"epochs": 0, "best_epoch": None}).results
    assert found.pop("epochs") == 0  # type: ignore[attr-defined]
    assert set(found.values()) == {None}


def test_a_run_that_was_never_finite_is_strict_json() -> None:
    lost = run("lost", curves=curves(train_loss=[NAN, NAN], val_loss=[NAN, NAN]), floor_loss=6.1)
    fine = run("fine", curves=curves(val_loss=[6.0, 5.5]), floor_loss=6.1)  # no gap: unigram is the floor
    found = json.loads(json.dumps(compare([lost, fine]).as_dict(), allow_nan=False))
    assert found["runs"][0]["results"]["best_val_loss"] is None
    assert found["runs"][1]["results"]["best_val_loss"] == 5.5
    assert found["runs"][1]["results"]["closed_gap"] is None


def test_a_damaged_run_file_leaves_the_curves(workspace: Workspace, tmp_path: Path) -> None:
    damaged = copy_of(workspace.full, tmp_path / "damaged")
    (damaged / "run.json").write_text("{")
    comparison = compare_targets([str(workspace.full), str(damaged)])
    whole, rest = (one.results for one in comparison.runs)
    assert [one.name for one in comparison.runs] == ["full", "damaged"]
    assert rest["best_val_loss"] == whole["best_val_loss"]
    assert rest["closed_gap"] is None


def test_nonsense_in_a_run_file_is_left_out(workspace: Workspace, tmp_path: Path) -> None:
    nonsense = {"experiment": ["a"], "run_id": 7, "settings": {"training": 3}, "epochs": "many", "precision": {}}
    odd = copy_of(workspace.full, tmp_path / "odd", **nonsense)
    comparison = compare_targets([str(odd), str(copy_of(odd, tmp_path / "other", settings=[]))])
    assert [one.name for one in comparison.runs] == ["odd", "other"]
    assert [one.results["epochs"] for one in comparison.runs] == [3, 3]


# --- mistakes ---


def test_fewer_than_two_runs_are_refused(workspace: Workspace, capsys: pytest.CaptureFixture) -> None:
    assert "expected two or more, found 0" in refusal(capsys)
    assert "expected two or more, found 1" in refusal(capsys, str(workspace.full))


def test_the_same_run_twice_is_refused_by_whatever_name(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    full = workspace.full
    run_id = json.loads((full / "run.json").read_text())["run_id"]
    copied = copy_of(full, tmp_path / "copied")
    with chdir(workspace.root):
        for again in (full, Path("experiments/full"), Path("experiments/lora/../full"), full / "run.json", copied):
            assert refusal(capsys, str(full), str(again)).endswith("the same run twice; name each run once")
        assert "the same run twice" in refusal(capsys, str(workspace.lora), run_id, "experiments/full")
    assert "the same run twice" in refusal(capsys, "-", "-")
    assert not list(workspace.root.glob("*.png"))


def test_a_run_that_is_not_there_is_refused(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = ("--out", str(tmp_path / "c.png"))
    with chdir(workspace.root):  # where a store is
        assert "nowhere: no such file or folder" in refusal(capsys, str(workspace.full), "nowhere", *out)
        assert "has no such run" in refusal(capsys, str(workspace.full), "0" * 32, *out)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("out", ["comparison.pdf", "comparison", "folder.png"])
def test_a_figure_is_a_png_file(workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture, out: str) -> None:
    (tmp_path / "folder.png").mkdir()
    with chdir(tmp_path):
        message = refusal(capsys, str(workspace.full), str(workspace.lora), "--out", out)
    assert f"--out: expected a file that ends in .png, found '{out}'" in message
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]


def test_a_wrong_target_is_a_users_mistake_of_the_function_too(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected two or more"):
        compare_targets([str(tmp_path)])


# --- the table ---


def table_text(comparison: Comparison) -> str:
    text = StringIO()
    Console(file=text, width=160).print(comparison_table(comparison))
    return text.getvalue()


def test_values_that_differ_look_different() -> None:
    text = table_text(compare([run("a", unigram_loss=6.10001), run("b", unigram_loss=6.10002)]))
    assert "6.10001" in text
    assert "6.10002" in text


def test_names_and_values_are_no_markup() -> None:
    text = table_text(compare([run("[red]a", data="x"), run("b", data="x/[bold]y")]))
    assert "[red]a" in text
    assert "x/[bold]y" in text


def test_a_long_path_loses_its_beginning() -> None:
    text = table_text(compare([run("a", data="/very/long" * 9 + "/mine"), run("b", data="/very/long" * 9 + "/other")]))
    assert "/mine" in text
    assert "/very/long" * 5 not in text


# --- the figure ---


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved."""
    figures: list[Figure] = []
    save = Figure.savefig

    def keep(self: Figure, *args: Any, **options: Any) -> None:
        save(self, *args, **options)
        figures.append(self)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


RUN = curves(
    train_loss=[6.0, 5.0, 4.0, 3.0, 2.5],
    val_loss=[6.1, 5.5, 5.0, 4.8, 4.9],
    val_accuracy=[0.1, 0.2, 0.3, 0.3, 0.3],
)


def test_a_run_has_one_colour_and_training_is_dashed(tmp_path: Path, drawn: list[Figure]) -> None:
    other = {name: Curve(curve.epochs, curve.values + 0.1) for name, curve in RUN.items()}
    draw_comparison({"a": RUN, "b": other}, {"unigram_loss": 6.1}, tmp_path / "c.png")
    losses, accuracies = drawn[0].axes
    by_values = {tuple(line.get_ydata()): line for line in losses.lines}
    for curves_of_run, colour in ((RUN, to_hex("C0")), (other, None)):
        val, train = (by_values[tuple(curves_of_run[name].values)] for name in ("val_loss", "train_loss"))
        assert to_hex(val.get_color()) == to_hex(train.get_color()) != colour
        assert (val.get_linestyle(), train.get_linestyle()) == ("-", "--")
        assert val.get_xdata().tolist() == [1, 2, 3, 4, 5]
    assert to_hex(by_values[tuple(RUN["val_loss"].values)].get_color()) != to_hex(
        by_values[tuple(other["val_loss"].values)].get_color()
    )
    assert tuple(RUN["val_accuracy"].values) in {tuple(line.get_ydata()) for line in accuracies.lines}
    assert [6.1, 6.1] in [list(line.get_ydata()) for line in losses.lines]
    assert legend(drawn[0]) == ["a", "b", "validation", "training", "unigram 6.100"]


def test_without_accuracies_there_is_one_panel(tmp_path: Path, drawn: list[Figure]) -> None:
    draw_comparison({"a": curves(val_loss=[6, 5]), "b": curves(val_loss=[5, 4])}, {}, tmp_path / "c.png")
    assert len(drawn[0].axes) == 1


def test_the_legend_covers_no_panel(tmp_path: Path, drawn: list[Figure]) -> None:
    runs = {f"a_rather_long_name_of_an_experiment_{n}": RUN for n in range(24)}
    draw_comparison(runs, {"floor_loss": 2.0, "floor_accuracy": 0.4}, tmp_path / "c.png")
    figure = drawn[0]
    box = figure.legends[0].get_window_extent()
    assert all(axes.get_window_extent().x1 < box.x0 for axes in figure.axes)
    assert figure.bbox.contains(box.x0, box.y0)
    assert figure.bbox.contains(box.x1, box.y1)
    assert len({to_hex(handle.get_color()) for handle in figure.legends[0].get_lines()[:24]}) == 24


def test_a_curve_that_stops_being_finite_is_marked_where_it_ends(tmp_path: Path, drawn: list[Figure]) -> None:
    lost = curves(val_loss=[6.0, 5.0, NAN, NAN])
    draw_comparison({"lost": lost, "fine": RUN}, {}, tmp_path / "c.png")
    crosses = [line for line in drawn[0].axes[0].lines if line.get_marker() == "x" and len(line.get_xdata())]
    assert [(line.get_xdata().tolist(), line.get_ydata().tolist()) for line in crosses] == [([2.0], [5.0])]
    assert "not finite afterwards" in legend(drawn[0])
    draw_comparison({"a": RUN, "b": RUN}, {}, tmp_path / "c.png")
    assert "not finite afterwards" not in legend(drawn[1])


def test_a_loss_that_explodes_does_not_press_the_others_flat(tmp_path: Path, drawn: list[Figure]) -> None:
    exploded = curves(val_loss=[6.0, 5.0, 500.0, 1e9])
    draw_comparison({"exploded": exploded, "fine": RUN}, {"floor_loss": 2.0}, tmp_path / "c.png")
    draw_comparison({"a": RUN, "fine": RUN}, {"floor_loss": 2.0}, tmp_path / "c.png")
    bottom, top = drawn[0].axes[0].get_ylim()
    assert bottom < 2.0
    assert 6.1 < top < 12
    assert drawn[1].axes[0].get_ylim()[1] < 7


def test_a_short_run_has_room_beside_a_long_one(tmp_path: Path, drawn: list[Figure]) -> None:
    long = curves(val_loss=list(np.linspace(6, 4, 300)))
    short = curves(val_loss=[6.0, 5.0, 4.0])
    draw_comparison({"long": long, "short": short}, {}, tmp_path / "c.png")
    draw_comparison({"long": long, "as long": long}, {}, tmp_path / "c.png")
    from_zero = {"val_loss": Curve.of(enumerate(np.linspace(6, 4, 300)))}
    draw_comparison({"from zero": from_zero, "short": short}, {}, tmp_path / "c.png")
    assert [figure.axes[0].get_xscale() for figure in drawn] == ["log", "linear", "linear"]


@pytest.mark.parametrize("name", ["_private.csv", r"$\no{$.csv", "100%.csv", "a" * 100])
def test_any_name_stands_in_the_legend(tmp_path: Path, drawn: list[Figure], name: str) -> None:
    draw_comparison({name: RUN, "b": RUN}, {}, tmp_path / "c.png")
    assert legend(drawn[0])[0].replace("\n", "").replace(r"\$", "$") == name


def test_a_single_epoch_is_visible(tmp_path: Path, drawn: list[Figure]) -> None:
    draw_comparison({"one": curves(val_loss=[6.0]), "many": RUN}, {}, tmp_path / "c.png")
    markers = {len(line.get_xdata()): line.get_marker() for line in drawn[0].axes[0].lines if line.get_marker() != "x"}
    assert markers == {1: "o", 5: "None"}


def test_runs_without_a_curve_are_named_as_such(tmp_path: Path, drawn: list[Figure]) -> None:
    draw_comparison({"refused": {}, "lost": curves(val_loss=[NAN])}, {"unigram_loss": 6.1}, tmp_path / "c.png")
    assert legend(drawn[0])[:2] == ["refused (no curve)", "lost (no curve)"]


# --- the command ---


def test_the_command_explains_itself(capsys: pytest.CaptureFixture) -> None:
    capsys.readouterr()
    assert main(["compare", "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("Usage: behrt compare [OPTIONS] RUN RUN ...")
    assert "comparison.png" in text
    assert max(map(len, text.splitlines())) <= 110


def test_files_are_compared_without_torch(tmp_path: Path) -> None:
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_text("epoch,val_loss\n1,6.9\n2,6.5\n")
    code = "import sys; from behrt.cli import main; code = main(['compare', 'a.csv', 'b.csv', '--json']); " \
        "sys.exit(code or 10 * bool({'torch', 'mlflow'} & set(sys.modules)))"  # fmt: skip
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["comparable"] is False
