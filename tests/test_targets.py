"""Is every record of a run read, whoever made it, and is what cannot be read refused in one line?"""

import io
import json
import logging
import math
import random
import sys
import time
from contextlib import chdir
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from mlflow import MlflowClient

from behrt.config import ExperimentSettings, UserError, load_experiment
from behrt.doctor.facts import RunFacts, facts_from_settings
from behrt.doctor.tables import read_text_file
from behrt.doctor.targets import facts_of_params, facts_of_run, read_target
from behrt.history import EPOCH_FIGURES, RunFolder
from behrt.parameters import ParameterCounts
from behrt.tracking import TrackedRun, connect, read_tracked_run

from .conftest import Workspace
from .test_history import record

RUN_ID = "0123456789abcdef" * 2

NAN = math.nan


def read(folder: Path, name: str, text: str, **columns: str) -> RunFacts:
    """What is read of a file of that name and text."""
    (folder / name).write_text(text, encoding="utf-8")
    return read_target(str(folder / name), columns=columns)


def assert_curve(facts: RunFacts, name: str, epochs: list[float], values: list[float]) -> None:
    assert facts.curves[name].epochs.tolist() == epochs
    np.testing.assert_array_equal(facts.curves[name].values, values)


def refusal(*args: Any, **columns: str) -> str:
    """The one line with which a record is refused: a target, or the parts of `read`."""
    with pytest.raises(UserError) as caught:
        read(*args, **columns) if len(args) == 3 else read_target(*args, columns=columns)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1000
    return message


# --- histories and other JSON ---


def test_a_bare_history_in_the_guides_form_is_read(tmp_path: Path) -> None:
    history = {"train_loss": [{"epoch": 1, "value": 6.9}, {"epoch": 2, "value": 6.5}], "other": [{"a": "b"}]}
    facts = read(tmp_path, "metrics_history.json", json.dumps(history))
    assert_curve(facts, "train_loss", [1, 2], [6.9, 6.5])
    assert set(facts.curves) == {"train_loss"}
    assert facts.known() == {"finished": True}


def test_what_was_not_finite_in_a_history_stays_so(tmp_path: Path) -> None:
    values = [6.9, None, NAN, math.inf, "nan", "-Infinity", 10**400]
    history = {"val_loss": [{"epoch": n, "value": value} for n, value in enumerate(values)]}
    facts = read(tmp_path, "metrics_history.json", json.dumps(history))
    assert_curve(facts, "val_loss", [0, 1, 2, 3, 4, 5, 6], [6.9, NAN, NAN, NAN, NAN, NAN, NAN])


def test_epochs_may_be_unsorted_and_told_twice(tmp_path: Path) -> None:
    points = [(3, 6.0), (1, 7.0), (2, 6.5), (2, 6.4), (3, None)]
    history = {"val_loss": [{"epoch": epoch, "value": value} for epoch, value in points]}
    assert_curve(read(tmp_path, "h.json", json.dumps(history)), "val_loss", [1, 2, 3], [7.0, 6.4, NAN])


def test_a_keras_history_is_numbered_from_one(tmp_path: Path) -> None:
    keras = {"loss": [6.9, 6.5], "val_loss": [6.8], "accuracy": [0.1, 0.2], "val_accuracy": [0.3, NAN]}
    facts = read(tmp_path, "history.json", json.dumps(keras))
    assert_curve(facts, "train_loss", [1, 2], [6.9, 6.5])
    assert_curve(facts, "val_loss", [1], [6.8])
    assert_curve(facts, "train_accuracy", [1, 2], [0.1, 0.2])
    assert_curve(facts, "val_accuracy", [1, 2], [0.3, NAN])


def test_columns_as_lists_keep_their_own_epochs(tmp_path: Path) -> None:
    table = pd.DataFrame({"epoch": [0, 5, 10], "val/loss": [7.0, 6.5, 6.0]})
    text = json.dumps(table.to_dict("list"))
    assert_curve(read(tmp_path, "t.json", text), "val_loss", [0, 5, 10], [7.0, 6.5, 6.0])


def test_hugging_faces_state_is_read_without_its_final_summary(tmp_path: Path) -> None:
    state = {
        "epoch": 2.0,
        "log_history": [
            {"epoch": 0.5, "grad_norm": 1.5, "learning_rate": 5e-5, "loss": 7.0, "step": 10},
            {"epoch": 1.0, "grad_norm": 1.25, "learning_rate": 4e-5, "loss": 6.9, "step": 20},
            {"epoch": 1.0, "eval_loss": 6.8, "eval_accuracy": 0.01, "eval_runtime": 3.0, "step": 20},
            {"epoch": 2.0, "loss": 6.7, "step": 40},
            {"epoch": 2.0, "eval_loss": 6.75, "eval_accuracy": 0.02, "step": 40},
            {"epoch": 2.0, "step": 40, "total_flos": 1e15, "train_loss": 6.85, "train_runtime": 100.0},
        ],
    }
    facts = read(tmp_path, "trainer_state.json", json.dumps(state))
    assert_curve(facts, "train_loss", [0.5, 1, 2], [7.0, 6.9, 6.7])
    assert_curve(facts, "val_loss", [1, 2], [6.8, 6.75])
    assert_curve(facts, "val_accuracy", [1, 2], [0.01, 0.02])
    assert_curve(facts, "gradient_norm", [0.5, 1], [1.5, 1.25])
    assert_curve(facts, "learning_rate", [0.5, 1], [5e-5, 4e-5])


def test_rows_of_json_and_lines_of_json_say_the_same(tmp_path: Path) -> None:
    rows = [{"epoch": 1, "train_loss": 7.0, "note": "x"}, {"epoch": 2, "train_loss": None, "val_loss": 6.9}]
    as_list = read(tmp_path, "rows.json", json.dumps(rows))
    as_lines = read(tmp_path, "rows.jsonl", "\n".join(map(json.dumps, rows)))
    for facts in (as_list, as_lines):
        assert_curve(facts, "train_loss", [1, 2], [7.0, NAN])
        assert_curve(facts, "val_loss", [2], [6.9])


def test_a_null_beside_a_number_of_the_same_epoch_is_a_blank_cell(tmp_path: Path) -> None:
    rows = [{"epoch": 1, "train_loss": 7.0, "val_loss": None}, {"epoch": 1, "train_loss": None, "val_loss": 6.9}]
    facts = read(tmp_path, "rows.json", json.dumps(rows))
    assert_curve(facts, "train_loss", [1], [7.0])
    assert_curve(facts, "val_loss", [1], [6.9])


def test_a_last_line_of_json_that_is_cut_off_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    facts = read(tmp_path, "log.jsonl", '{"epoch": 1, "loss": 7.0}\n{"epoch": 2, "loss": 6.9}\n{"epoch": 3, "lo')
    assert_curve(facts, "train_loss", [1, 2], [7.0, 6.9])
    assert "cut off" in caplog.text


def test_rows_without_an_epoch_beside_rows_with_one_are_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"loss": 9.0}, {"epoch": 1, "loss": 7.0}]
    assert_curve(read(tmp_path, "rows.json", json.dumps(rows)), "train_loss", [1], [7.0])
    assert "1 of 2 rows" in caplog.text


# --- tables ---


@pytest.mark.parametrize(("name", "separator"), [("t.csv", ","), ("t.csv", ";"), ("t.tsv", "\t"), ("t.txt", ",")])
def test_a_table_is_read_whatever_separates_its_columns(tmp_path: Path, name: str, separator: str) -> None:
    table = pd.DataFrame(
        {"Epoch": [1, 2], "Train Loss": [7.0, 6.5], "note, or not": ["a", "b"], "valid.acc": [0.1, 0.2]}
    )
    facts = read(tmp_path, name, table.to_csv(index=False, sep=separator))
    assert_curve(facts, "train_loss", [1, 2], [7.0, 6.5])
    assert_curve(facts, "val_accuracy", [1, 2], [0.1, 0.2])


def test_a_comma_is_a_decimal_one_between_semicolons(tmp_path: Path) -> None:
    assert_curve(read(tmp_path, "t.csv", "epoch;loss\n1;7,25\n2;6,5\n"), "train_loss", [1, 2], [7.25, 6.5])


def test_lightnings_rows_with_blanks_are_put_together(tmp_path: Path) -> None:
    text = (
        "epoch,step,train_loss_step,train_loss_epoch,val_loss,lr-AdamW\n"
        "0,49,7.1,,,0.001\n0,99,7.0,,,\n0,99,,,6.9,\n0,99,,7.05,,\n"
        "1,149,6.9,,,\n1,199,,,6.8,\n1,199,,6.85,,\n"
    )
    facts = read(tmp_path, "metrics.csv", text)
    assert_curve(facts, "train_loss", [0, 1], [7.05, 6.85])
    assert_curve(facts, "val_loss", [0, 1], [6.9, 6.8])
    assert set(facts.curves) == {"train_loss", "val_loss"}


def test_a_figure_of_each_epoch_is_preferred_to_one_of_each_step(tmp_path: Path) -> None:
    text = "epoch,loss,train_loss\n1,7.2,\n1,7.1,7.15\n2,6.9,\n2,6.8,6.85\n"
    assert_curve(read(tmp_path, "t.csv", text), "train_loss", [1, 2], [7.15, 6.85])


def test_the_last_value_of_an_epoch_counts(tmp_path: Path) -> None:
    assert_curve(read(tmp_path, "t.csv", "epoch,loss\n1,7.0\n1,6.9\n1,\n2,6.5\n"), "train_loss", [1, 2], [6.9, 6.5])


def test_rows_without_any_epoch_are_numbered_from_one(tmp_path: Path) -> None:
    assert_curve(read(tmp_path, "t.csv", "loss,other\n7.0,1\n6.9,1\n"), "train_loss", [1, 2], [7.0, 6.9])
    assert_curve(read(tmp_path, "one.csv", "loss\n7.0\n6.9\n"), "train_loss", [1, 2], [7.0, 6.9])


def test_steps_stand_for_epochs_only_where_there_are_none(tmp_path: Path) -> None:
    assert_curve(read(tmp_path, "t.csv", "step,loss\n200,6.9\n100,7.0\n"), "train_loss", [1, 2], [7.0, 6.9])
    assert_curve(read(tmp_path, "t.csv", "step,epoch,loss\n100,1,7.0\n200,2,6.9\n"), "train_loss", [1, 2], [7.0, 6.9])


def test_blank_cells_are_absent_and_words_for_nan_are_not(tmp_path: Path) -> None:
    cells = ["7.0", "", " ", "NA", "nan", "NaN", "inf", "-inf", "null", "None"]
    text = "epoch,val_loss,x\n" + "".join(f"{n},{cell},0\n" for n, cell in enumerate(cells))
    assert_curve(read(tmp_path, "t.csv", text), "val_loss", [0, 4, 5, 6, 7, 8, 9], [7.0, *[NAN] * 6])


@pytest.mark.parametrize(
    ("figure", "names"),
    [
        ("train_loss", ["train_loss", "Training Loss", "loss", "train/loss", "train_loss_epoch"]),
        ("val_loss", ["val_loss", "valid_loss", "validation-loss", "eval/loss", "dev loss"]),
        ("train_accuracy", ["train_accuracy", "train_acc", "ACCURACY", "acc", "train_accuracy_epoch"]),
        ("val_accuracy", ["val.accuracy", "val_acc", "valid_acc", "Validation Accuracy", "eval_accuracy"]),
        ("learning_rate", ["learning_rate", "LR"]),
        ("gradient_norm", ["gradient norm", "grad_norm"]),
        ("epoch_seconds", ["epoch_seconds", "epoch_time", "Time per epoch"]),
        ("tokens_per_second", ["tokens_per_second"]),
    ],
)
def test_a_figure_is_found_under_its_usual_names(tmp_path: Path, figure: str, names: list[str]) -> None:
    for name in names:
        facts = read(tmp_path, "t.csv", f"epoch,{name}\n1,0.5\n")
        assert {name: curve.values.tolist() for name, curve in facts.curves.items()} == {figure: [0.5]}


def test_a_test_loss_is_no_validation_loss(tmp_path: Path) -> None:
    assert set(read(tmp_path, "t.csv", "epoch,loss,test_loss\n1,7,8\n").curves) == {"train_loss"}


def test_accuracies_in_percent_are_divided_together(tmp_path: Path) -> None:
    facts = read(tmp_path, "t.csv", "epoch,train_acc,val_acc,loss\n1,0.5,0.25,45\n2,50,1,45\n")
    assert_curve(facts, "train_accuracy", [1, 2], [0.005, 0.5])
    assert_curve(facts, "val_accuracy", [1, 2], [0.0025, 0.01])
    assert_curve(facts, "train_loss", [1, 2], [45, 45])
    shares = read(tmp_path, "t.csv", "epoch,train_acc,val_acc\n1,0.5,0.25\n2,1,nan\n")
    assert_curve(shares, "train_accuracy", [1, 2], [0.5, 1])


def test_columns_can_be_mapped(tmp_path: Path) -> None:
    text = "ep,ce,val_loss,metrics.ce\n10,7.0,1.0,6.9\n20,6.8,1.0,6.7\n"
    facts = read(tmp_path, "t.csv", text, epoch="ep", train_loss="ce", val_loss="metrics.ce")
    assert_curve(facts, "train_loss", [10, 20], [7.0, 6.8])
    assert_curve(facts, "val_loss", [10, 20], [6.9, 6.7])
    history = json.dumps({"ce": [{"epoch": 1, "value": 6.9}]})
    assert_curve(read(tmp_path, "h.json", history, val_loss="ce"), "val_loss", [1], [6.9])


def test_a_wrong_mapping_is_refused_with_the_nearest(tmp_path: Path) -> None:
    text = "epoch,loss,eval/ce\n1,7,8\n"
    message = refusal(tmp_path, "t.csv", text, val_loss="eval/cee")
    assert message.endswith("it has 'epoch', 'loss', 'eval/ce'; did you mean 'eval/ce'?")
    assert "--map val_los=eval/ce" in (message := refusal(tmp_path, "t.csv", text, val_los="eval/ce"))
    assert "did you mean 'val_loss'" in message
    assert "it has 'epoch', 'loss'" in refusal(tmp_path, "t.csv", text, val_loss="zzzzz")
    assert "no column 'e'" in refusal(tmp_path, "t.csv", text, epoch="e")


def test_ten_thousand_epochs_take_a_moment(tmp_path: Path) -> None:
    epochs = range(1, 10_001)
    history = {name: [{"epoch": n, "value": 0.5} for n in epochs] for name in EPOCH_FIGURES}
    table = pd.DataFrame({"epoch": epochs, **{name: [0.5] * 10_000 for name in EPOCH_FIGURES}})
    began = time.perf_counter()
    for facts in (
        read(tmp_path, "h.json", json.dumps(history)),
        read(tmp_path, "t.csv", table.to_csv(index=False)),
        read(tmp_path, "t.json", table.to_json(orient="records")),
    ):
        assert {name: len(curve) for name, curve in facts.curves.items()} == dict.fromkeys(EPOCH_FIGURES, 10_000)
    assert time.perf_counter() - began < 10


# --- what cannot be read ---


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("t.csv", "epoch,val_loss\n1,7.0\n2,high\n", r"t.csv: row 2, 'val_loss': expected a number, found 'high'"),
        ("t.csv", "epoch,val_loss\n1,True\n", r"row 1, 'val_loss': expected a number, found 'True'"),
        ("t.csv", "epoch,val_loss\nfirst,7.0\n", r"row 1, the epoch of 'val_loss': expected a number, found 'first'"),
        ("t.csv", "epoch,val_loss\nnan,7.0\n", r"row 1, the epoch of 'val_loss': expected a number"),
        ("t.csv", "epoch,val_loss\n1,7.0,8.0\n", r"is no table: .*line 2"),
        ("t.csv", 'epoch,"val_loss\n1,7.0\n', r"is no table"),
        ("t.csv", "epoch,val_loss\n", r"has a header and no rows"),
        ("t.csv", "epoch,val_loss,val_loss\n1,2,3\n", r"two columns 'val_loss'"),
        ("t.csv", "a,b\n1,2\n", r"found 'a', 'b'; recognised are train_loss.*--map NAME=COLUMN"),
        (
            "h.json",
            '{"val_loss": [{"epoch": 1, "value": true}]}',
            r"row 1, 'val_loss': expected a number, found 'True'",
        ),
        (
            "h.json",
            '{"val_loss": [{"epoch": 1, "value": "6.9"}]}',
            r"expected a number, found text that is no plain word",
        ),
        ("h.json", '{"val_loss": [{"epoch": 1}]}', r"row 1, 'val_loss': expected a number, found 'no value'"),
        ("h.json", '{"val_loss": [{"value": 1}]}', r"the epoch of 'val_loss': expected a number, found 'no epoch'"),
        ("h.json", '{"val_loss": [{"epoch": true, "value": 1}]}', r"the epoch of 'val_loss': expected a number"),
        ("h.json", '{"val_loss": [{"epoch": [1], "value": 1}]}', r"the epoch of 'val_loss': expected a number"),
        ("h.json", '{"loss": []}', r"holds no figure of a training; found 'loss'"),
        ("h.json", '{"a": 1, "b": {"c": 2}}', r"found 'a', 'b'; recognised are"),
        ("h.json", "[1, 2, 3]", r"found a list of other things"),
        ("h.json", "[]", r"holds no figure"),
        ("h.json", "{}", r"holds no figure"),
        ("h.json", '{"train_loss": [{"epoch": 1, "va', r"h.json: is damaged; expected JSON"),
        ("h.json", "epoch,loss\n1,2\n", r"h.json: is damaged; expected JSON"),
        ("h.json", "[" * 100_000, r"h.json: is damaged"),
        ("h.json", "", r"h.json: is empty"),
        ("t.csv", " \n\n", r"t.csv: is empty"),
    ],
)
def test_what_cannot_be_read_is_refused_by_its_place(tmp_path: Path, name: str, text: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected) as caught:
        read(tmp_path, name, text)
    assert "\n" not in str(caught.value)


def test_a_binary_file_is_refused_without_reading_it_whole(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(range(256)) * 1000)
    assert "is no text" in refusal(str(tmp_path / "model.safetensors"))
    with (tmp_path / "huge.bin").open("wb") as file:
        file.truncate(10**8)
    assert len(read_text_file(tmp_path / "huge.bin")) < 10**5


def test_text_of_powershell_is_text(tmp_path: Path) -> None:
    (tmp_path / "train.log").write_bytes("Epoch 1 | Train Loss: 7.0 🏆\r\n".encode("utf-16"))
    assert_curve(read_target(str(tmp_path / "train.log")), "train_loss", [1], [7.0])
    (tmp_path / "t.csv").write_bytes(b"\xef\xbb\xbf" + b"epoch,loss\r\n1,7.0\r\n")
    assert_curve(read_target(str(tmp_path / "t.csv")), "train_loss", [1], [7.0])


def test_names_that_lead_nowhere_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "holds no run" in refusal(str(tmp_path / "empty"))
    for target in (str(tmp_path / "missing"), "a\0b", "0123"):
        assert "no such file or folder" in refusal(target)
    assert "cannot be read: File name too long" in refusal("x" * 5000)


def test_standard_input_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("Epoch 1 | Val Loss: 7.0\n", '{"val_loss": [7.0]}', "epoch,val_loss\n1,7.0\n"):
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(text.encode())))
        assert_curve(read_target("-"), "val_loss", [1], [7.0])


def nested(rng: random.Random, depth: int = 0) -> Any:
    """Random JSON that often has the right names in the wrong places."""
    names = [
        "train_loss",
        "val_loss",
        "epoch",
        "value",
        "log_history",
        "settings",
        "parameters",
        "facts",
        "status",
        "x",
    ]
    names += ["model", "training", "lr", "use_lora", "adapted_layers", "patients", "train", "baselines"]
    leaves = [None, True, -1, 2.5, NAN, 10**400, "nan", "6.9", "", "None", [], {}]
    kind = rng.random()
    if depth > 4 or kind < 0.3:
        return rng.choice(leaves)
    if kind < 0.6:
        return [nested(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {rng.choice(names): nested(rng, depth + 1) for _ in range(rng.randrange(5))}


VALID = (
    json.dumps({name: [{"epoch": n, "value": 0.5} for n in range(3)] for name in EPOCH_FIGURES}, indent=1),
    json.dumps({"log_history": [{"epoch": n, "loss": 7.0, "eval_loss": None} for n in range(4)]}),
    "\n".join(json.dumps({"epoch": n, "loss": 7.0}) for n in range(4)),
    "epoch,step,train_loss,val_loss\n" + "".join(f"{n},{n}0,7.0,\n{n},{n}0,,nan\n" for n in range(4)),
    "epoch;loss\n1;7,0\n2;6,9\n",
    "".join(f"Epoch {n}/9 | Train Loss: 7.0 Acc: 0.1 | Val Loss: nan\n" for n in range(4)),
    "Total: 20,366,312\nTrainable: 500,000 (2-5%)\nFrozen: 19,866,312\nLoRA: 98,304 (0.5%)\nVal Loss: 6.9\n",
)


def damaged(rng: random.Random, data: bytes) -> bytes:
    """A few bytes cut out, replaced or repeated."""
    for _ in range(rng.randrange(4)):
        start = rng.randrange(len(data) + 1)
        stop = min(start + rng.randrange(4), len(data))
        inserted = rng.choice(
            [b"", rng.randbytes(2), b"9" * 400, b"\n", b'"', b"e9", b",", b"]", data[stop : stop + 20]]
        )
        data = data[:start] + inserted + data[stop:]
    return data


def test_garbage_gives_facts_or_one_line_and_never_a_traceback(tmp_path: Path) -> None:
    rng = random.Random(0)
    outcomes = {"read": 0, "refused": 0}
    for number in range(900):
        valid = rng.choice(VALID).encode()
        data = [
            rng.randbytes(rng.randrange(1, 300)),
            valid[: rng.randrange(len(valid))],
            json.dumps(nested(rng)).encode(),
            damaged(rng, valid),
            damaged(rng, valid),
        ][number % 5]
        file = tmp_path / f"record{rng.choice(['.json', '.csv', '.tsv', '.log', '.jsonl', '', '', ''])}"
        file.write_bytes(data)
        message, facts = None, None
        try:
            facts = read_target(str(file))
        except UserError as error:
            message = str(error)
        if facts is None:
            assert message is not None
            assert len(message.splitlines()) == 1, data
            outcomes["refused"] += 1
        else:
            assert facts.curves or len(facts.known()) > 1, data
            outcomes["read"] += 1
    assert min(outcomes.values()) > 100


# --- experiment folders ---

SETTINGS = load_experiment(
    flags={"model_size": "large", "use_lora": True, "lora_rank": 8, "max_position": 60, "dropout": 0.3, "lr": 2e-4,
           "init_from": "experiments/base", "max_patients": 50, "weight_decay": 0.0, "device": "cpu"}
)  # fmt: skip


def known_settings(settings: ExperimentSettings) -> dict[str, Any]:
    """The facts of settings as `RunFacts.known` gives them."""
    return RunFacts(**facts_from_settings(settings)).known()


def run_json(**changes: Any) -> dict[str, Any]:
    """A `run.json` as a finished run leaves it."""
    counts = dict.fromkeys(ParameterCounts.__annotations__, 0)
    counts |= {"total": 100, "trainable": 7, "trainable_percent": 7.0, "lora": 5, "lora_percent": 5.0}
    counts |= {"embeddings_trainable": 1, "encoder_trainable": 2, "head_trainable": 4}
    return {
        "run_id": RUN_ID,
        "status": "FINISHED",
        "stopped_early": True,
        "baselines": {"chance_loss": 6.9, "unigram_loss": 6.1, "unigram_accuracy": 0.04, "floor_loss": None},
        "parameters": counts,
        "device": "cuda",
        "max_position": 61,
        "vocab_size": 992,
        "patients": {"train": 4000, "tuning": 500},
        "transplant": {"shared_codes": 900, "new_codes": 87, "new_positions": 0},
        "settings": SETTINGS.model_dump(mode="json", exclude={"note"}),
        **changes,
    }


def run_folder(path: Path, run: dict[str, Any] | None, *, epochs: int = 2) -> str:
    """An experiment folder with that `run.json` and a history of as many epochs."""
    folder = RunFolder(path)
    for epoch in range(1, epochs + 1):
        folder.add_epoch(record(epoch, val_loss=7.0 - epoch))
    if run is not None:
        folder.write_run(**run)
    return str(path)


def test_an_experiment_folder_gives_everything_that_its_record_holds(tmp_path: Path) -> None:
    facts = read_target(run_folder(tmp_path, run_json()))
    assert set(facts.curves) == set(EPOCH_FIGURES)
    assert_curve(facts, "val_loss", [1, 2], [6.0, 5.0])
    assert facts.known() == known_settings(SETTINGS) | {
        "finished": True,
        "stopped_early": True,
        "pretrained": True,
        "shared_codes": 900,
        "new_codes": 87,
        "total_parameters": 100,
        "trainable_parameters": 7,
        "trainable_percent": 7.0,
        "lora_parameters": 5,
        "embeddings_trainable": 1,
        "encoder_trainable": 2,
        "head_trainable": 4,
        "vocab_size": 992,
        "max_position": 61,
        "train_patients": 4000,
        "val_patients": 500,
        "chance_loss": 6.9,
        "unigram_loss": 6.1,
        "unigram_accuracy": 0.04,
        "device": "cuda",
    }


def test_settings_on_disk_give_the_facts_of_the_settings_themselves() -> None:
    for settings in (SETTINGS, load_experiment(), load_experiment(preset="a40")):
        on_disk = json.loads(json.dumps({"settings": settings.model_dump(mode="json")}))
        assert facts_of_run(on_disk) == facts_from_settings(settings)


def test_the_facts_that_a_run_has_kept_win_and_come_back_as_they_were(tmp_path: Path) -> None:
    kept = RunFacts(
        silent_adapters=("encoder.layers.0.attention.query",), dropout=0.25, val_patients=499, missing_adapters=1,
        without_gradient=(), training_masks_change=True, memory_needed=2**31, floor_loss=5.5,
    )  # fmt: skip
    run = run_json(facts=kept.known() | {"of_a_newer_version": 3, "lora_rank": "many"})
    facts = read_target(run_folder(tmp_path, run))
    for name, value in kept.known().items():
        assert getattr(facts, name) == (tuple(value) if isinstance(value, list) else value)
    assert facts.lora_rank == 8
    assert facts.lr == 2e-4


@pytest.mark.parametrize(
    ("status", "finished"), [("RUNNING", False), ("FINISHED", True), ("FAILED", True), ("KILLED", True)]
)
def test_only_a_run_that_is_running_is_not_finished(tmp_path: Path, status: str, finished: bool) -> None:
    run = run_json(status=status, facts={"finished": not finished})
    assert read_target(run_folder(tmp_path, run)).finished is finished


def test_a_run_that_lost_its_first_epoch_has_facts_and_no_curves(tmp_path: Path) -> None:
    facts = read_target(run_folder(tmp_path, run_json(status="FAILED"), epochs=0))
    assert facts.curves == {}
    assert facts.use_lora is True


def test_a_damaged_run_file_leaves_the_history(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    target = run_folder(tmp_path, None)
    for text in ('{"status": "FINI', "[]", "[" * 100_000):
        (tmp_path / "run.json").write_text(text)
        with caplog.at_level(logging.WARNING):
            facts = read_target(target)
        assert_curve(facts, "val_loss", [1, 2], [6.0, 5.0])
        assert facts.known() == {"finished": True}
        assert "run.json: is damaged" in caplog.text
        caplog.clear()


def test_two_damaged_files_are_refused(tmp_path: Path) -> None:
    target = run_folder(tmp_path, run_json())
    (tmp_path / "logs" / "metrics_history.json").write_text('{"val_loss"')
    assert "metrics_history.json: is damaged" in refusal(target)
    (tmp_path / "logs" / "metrics_history.json").unlink()
    (tmp_path / "run.json").write_text("{")
    assert "run.json: is damaged" in refusal(target)


@pytest.mark.parametrize("name", ["metrics_history.json", "logs/metrics_history.json"])
def test_a_folder_with_a_history_alone_is_a_bare_history(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text('{"val_loss": [{"epoch": 1, "value": 7.0}]}')
    facts = read_target(str(tmp_path))
    assert_curve(facts, "val_loss", [1], [7.0])
    assert facts.known() == {"finished": True}


def test_a_run_file_stands_for_its_folder(tmp_path: Path) -> None:
    target = run_folder(tmp_path, run_json())
    assert read_target(f"{target}/run.json").known() == read_target(target).known()


def test_nonsense_inside_a_run_file_is_not_known(tmp_path: Path) -> None:
    rng = random.Random(0)
    target = run_folder(tmp_path, run_json())
    for _ in range(200):
        run = {name: value if rng.random() < 0.7 else nested(rng) for name, value in run_json().items()}
        (tmp_path / "run.json").write_text(json.dumps(run))
        facts = read_target(target)
        assert_curve(facts, "val_loss", [1, 2], [6.0, 5.0])
        assert isinstance(facts.lr, float | None)
        assert isinstance(facts.vocab_size, int | None)
    run = run_json(vocab_size="many", device=5, baselines=[1], parameters={"total": "a"}, settings={"training": 3})
    (tmp_path / "run.json").write_text(json.dumps(run))
    assert set(read_target(target).known()) == {
        "finished", "stopped_early", "shared_codes", "new_codes", "max_position", "train_patients", "val_patients",
    }  # fmt: skip


# --- MLflow ---


def test_parameters_that_mlflow_keeps_as_text_come_back_in_their_types() -> None:
    for settings in (SETTINGS, load_experiment(), load_experiment(preset="m1")):
        params = {name: str(value) for name, value in settings.flat().items()}
        assert facts_of_params(params) == facts_from_settings(settings)


def test_what_was_resolved_wins_over_what_was_asked_for() -> None:
    params = {"model.max_position": "auto", "resolved.max_position": "77", "resolved.vocab_size": "1234"}
    assert facts_of_params(params) == {"max_position": 77, "vocab_size": 1234}


def test_parameters_of_other_tools_are_recognised() -> None:
    params = {"learning_rate": "1e-4", "per_device_train_batch_size": "8", "num_train_epochs": "3.0", "Dropout": "0.2"}
    known = {"lr": 1e-4, "batch_size": 8, "epochs": 3, "dropout": 0.2}
    assert facts_of_params({**params, "weight_decay": "__import__('os')", "other": "1", "device": "x"}) == known


def test_settings_elsewhere_and_numbers_that_are_none_are_not_known() -> None:
    assert (
        facts_of_params({"training.lr": "nan", "model.weight_decay": "1", "x.unigram_loss": "3", "x.vocab_size": "9"})
        == {}
    )


def test_a_tracked_run_of_ours_is_found_in_its_folder_first(tmp_path: Path) -> None:
    run_folder(tmp_path / "experiments" / "mine", run_json())
    with chdir(tmp_path):
        assert_curve(read_target(RUN_ID), "val_loss", [1, 2], [6.0, 5.0])
    assert not (tmp_path / "mlruns").exists()


def test_a_tracked_run_without_its_folder_is_read_from_the_store(store: Path) -> None:
    with chdir(store):
        run = TrackedRun(experiment="mine", params=SETTINGS.flat(), tags={"device": "cuda"})
        run.log_params({"resolved.max_position": 61, "resolved.vocab_size": 992})
        run.log_figures({"total_parameters": 100, "trainable_percent": 7.0, "chance_loss": 6.9, "best_val_loss": 5.0})
        for epoch in (1, 2):
            run.log_figures({"val_loss": 7.0 - epoch, "train_loss": 6.5}, step=epoch)
        running = read_target(run.run_id)
        run.finish("FINISHED")
        facts = read_target(run.run_id)
    assert (running.finished, facts.finished) == (False, True)
    assert_curve(facts, "val_loss", [1, 2], [6.0, 5.0])
    assert set(facts.curves) == {"train_loss", "val_loss"}
    assert facts.known() == known_settings(SETTINGS) | {
        "finished": True,
        "device": "cuda",
        "max_position": 61,
        "vocab_size": 992,
        "total_parameters": 100,
        "trainable_percent": 7.0,
        "chance_loss": 6.9,
    }


def test_artifacts_of_a_tracked_run_say_more_than_the_store(store: Path) -> None:
    with chdir(store):
        run = TrackedRun(experiment="mine", params={"training.lr": 0.5}, tags={})
        run.log_figures({"val_loss": 7.0}, step=1)
        about = json.dumps(run_json(status="RUNNING", facts={"silent_adapters": ["a"]}))
        connect().log_text(run.run_id, about, "run.json")
        (store / "metrics_history.json").write_text(
            '{"val_loss": [{"epoch": 1, "value": 7}, {"epoch": 2, "value": null}]}'
        )
        run.log_artifacts(store / "metrics_history.json", under="logs")
        run.finish("FAILED")
        facts = read_target(run.run_id)
    assert_curve(facts, "val_loss", [1, 2], [7.0, NAN])
    assert (facts.lr, facts.silent_adapters, facts.val_patients, facts.finished) == (2e-4, ("a",), 500, True)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with an MLflow store, which takes seconds to make."""
    folder = tmp_path_factory.mktemp("store")
    with chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        connect()
    return folder


def foreign_run(client: MlflowClient, points: dict[str, list[tuple[int, float]]], **params: str) -> str:
    """A run that another tool tracked."""
    run_id = client.create_run("0").info.run_id
    for name, value in params.items():
        client.log_param(run_id, name, value)
    for name, values in points.items():
        for step, value in values:
            client.log_metric(run_id, name, value, step=step)
    client.set_terminated(run_id)
    return str(run_id)


def test_runs_of_other_tools_are_read_from_the_store(store: Path) -> None:
    steps = {
        "epoch": [(50, 1), (100, 2)],
        "loss": [(50, 7.0), (100, NAN)],
        "eval/loss": [(100, math.inf)],
        "auc": [(0, 1)],
    }
    unnumbered = {"accuracy": [(0, 10.0), (0, 20.0), (0, 30.0)]}
    with chdir(store):
        client = connect()
        facts = read_target(foreign_run(client, steps, lr="0.001", batch_size="64"))
        mapped = read_target(foreign_run(client, {"ce": [(0, 7.0), (1, 6.5)]}), columns={"val_loss": "ce"})
        numbered = read_target(foreign_run(client, unnumbered))
        assert "found 'auc'" in refusal(foreign_run(client, {"auc": [(0, 1.0)]}))
        assert "has no such run" in refusal(RUN_ID)
    assert_curve(facts, "train_loss", [1, 2], [7.0, NAN])
    assert_curve(facts, "val_loss", [2], [NAN])
    assert facts.known() == {"finished": True, "lr": 0.001, "batch_size": 64}
    assert_curve(mapped, "val_loss", [0, 1], [7.0, 6.5])
    assert_curve(numbered, "train_accuracy", [1, 2, 3], [0.1, 0.2, 0.3])


def test_only_the_histories_that_are_wanted_are_read_and_infinity_is_infinite_again(store: Path) -> None:
    points = {"loss": [(2, -math.inf), (1, 7.0)], "layer_1_norm": [(1, 1.0)]}
    with chdir(store):
        tracked = read_tracked_run(
            foreign_run(connect(), points), wanted=lambda name: name == "loss", texts=["run.json"]
        )
    assert tracked.histories == {"loss": [(1, 7.0), (2, math.inf)]}
    assert set(tracked.metrics) == {"loss", "layer_1_norm"}
    assert tracked.texts == {}


# --- a run through the real command line ---


def test_a_real_run_is_read_by_its_folder_and_by_its_id_alike(workspace: Workspace) -> None:
    by_folder = read_target(str(workspace.lora))
    run = json.loads((workspace.lora / "run.json").read_text())
    with chdir(workspace.root):
        by_id = read_target(run["run_id"])
    assert by_folder.known() == by_id.known()
    assert len(by_folder.curves["val_loss"]) == 3
    known = {"use_lora", "lora_rank", "total_parameters", "chance_loss", "val_patients", "device", "finished"}
    assert known <= set(by_folder.known())


def test_a_real_run_in_the_store_alone_gives_the_same_curves(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{workspace.root}/mlruns/mlflow.db")
    run = json.loads((workspace.lora / "run.json").read_text())
    by_folder = read_target(str(workspace.lora))
    with chdir(tmp_path):
        by_store = read_target(run["run_id"])
    assert set(by_store.curves) == set(by_folder.curves)
    for name, curve in by_folder.curves.items():
        np.testing.assert_array_equal(by_store.curves[name].values, curve.values)
    for name in ("lr", "use_lora", "vocab_size", "max_position", "total_parameters", "chance_loss", "device"):
        assert by_store.get(name) == by_folder.get(name)
        assert by_store.get(name) is not None


def test_the_history_of_a_run_of_ours_is_read_with_the_run_beside_it(workspace: Workspace) -> None:
    by_history = read_target(str(workspace.full / "logs" / "metrics_history.json"))
    assert by_history.known() == read_target(str(workspace.full)).known()
    assert by_history.floor_loss is not None
