"""Are the lines that a training prints read as they stand, the guide's first of all?"""

import io
import math
import time
from contextlib import suppress
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from behrt.config import UserError, load_experiment
from behrt.console import TerminalListener, result_lines
from behrt.doctor.facts import RunFacts
from behrt.doctor.logs import plain
from behrt.doctor.tables import read_log
from behrt.history import Baselines, EpochRecord
from behrt.model import BEHRTForMaskedLM
from behrt.parameters import count_parameters
from behrt.pretrain import choose_trained
from behrt.run_report import RunStart

# Excerpts of the troubleshooting guide, as they stand.
OBSERVED = """\
Epoch 1/100  | Train Loss: 6.9651 Acc: 0.0010 | Val Loss: 6.9181 Acc: 0.0012 🏆
Epoch 2/100  | Train Loss: 6.9097 Acc: 0.0011 | Val Loss: 6.9157 Acc: 0.0010 🏆
...
Epoch 10/100 | Train Loss: 6.7145 Acc: 0.0058 | Val Loss: 7.0427 Acc: 0.0011
Epoch 20/100 | Train Loss: 6.2970 Acc: 0.0215 | Val Loss: 7.1356 Acc: 0.0010
Epoch 21/100 | Train Loss: 6.2555 Acc: 0.0232 | Val Loss: 7.1442 Acc: 0.0012
"""
TOO_HIGH = """\
📊 Model Parameters:
   Total: 20,366,312
   Trainable: 18,790,376 (92.3%)  ❌ TOO HIGH!
   Frozen: 1,575,936
   LoRA: 98,304 (0.5%)
"""
PROPER = """\
📊 Model Parameters (with proper LoRA):
   Total: 20,366,312
   Trainable: 500,000 (2-5%)  ✅ GOOD
   Frozen: 19,866,312
   LoRA: 98,304 (0.5%)
"""
BARELY_MOVED = """\
Epoch 1  | Train Loss: 7.0 | Val Loss: 6.9
Epoch 10 | Train Loss: 6.8 | Val Loss: 7.0  ❌ Barely moved!
"""
HEALTHY = """\
Epoch 1  | Train: 7.00 | Val: 6.95
Epoch 5  | Train: 6.50 | Val: 6.48
Epoch 10 | Train: 6.20 | Val: 6.22
Epoch 15 | Train: 6.00 | Val: 6.05
"""
OVERFITTING = """\
Epoch 1  | Train: 7.00 | Val: 6.95  ✅
Epoch 5  | Train: 6.50 | Val: 6.48  ✅
Epoch 10 | Train: 6.00 | Val: 6.55  ⚠️ Val increasing!
Epoch 15 | Train: 5.50 | Val: 6.80  ❌ Large gap!
"""
UNDERFITTING = """\
Epoch 1  | Train: 7.00 | Val: 6.95
Epoch 5  | Train: 6.90 | Val: 6.88
Epoch 10 | Train: 6.85 | Val: 6.82
Epoch 15 | Train: 6.80 | Val: 6.78
"""
LORA_NOT_APPLIED = """\
📊 Model Parameters:
   Trainable: 18,790,376 (92.3%)  ❌ Too high!
"""
ADAPTED = """\
LoRA applied to: encoder.layers.0.self_attn.out_proj.lora
LoRA applied to: encoder.layers.1.self_attn.out_proj.lora
...
"""
NOISY = """\
Val Loss: 6.9181 Acc: 0.0012
Val Loss: 6.9157 Acc: 0.0010
Val Loss: 6.9163 Acc: 0.0009  # Noisy, jumping around
"""
BATCHES = """\
🚀 Starting training...
   Train batches: 200  ❌ Too many batches!
"""
EXPLODING = """\
Epoch 1 | Train Loss: 7.00
Epoch 2 | Train Loss: 15.32
Epoch 3 | Train Loss: nan  ❌
"""
TOO_SLOW = """\
Epoch 1  | Train Loss: 7.00
Epoch 10 | Train Loss: 6.98
Epoch 20 | Train Loss: 6.95  ❌ Too slow!
"""


def facts_of(text: str) -> RunFacts:
    return read_log(text.encode(), where="train.log", columns={})


def curves_in(text: str) -> dict[str, list[tuple[float, float]]]:
    curves = facts_of(text).curves
    return {
        name: list(zip(curve.epochs.tolist(), curve.values.tolist(), strict=True)) for name, curve in curves.items()
    }


def test_the_guides_overfitting_run_is_read_with_its_gap() -> None:
    assert curves_in(OBSERVED) == {
        "train_loss": [(1, 6.9651), (2, 6.9097), (10, 6.7145), (20, 6.2970), (21, 6.2555)],
        "train_accuracy": [(1, 0.0010), (2, 0.0011), (10, 0.0058), (20, 0.0215), (21, 0.0232)],
        "val_loss": [(1, 6.9181), (2, 6.9157), (10, 7.0427), (20, 7.1356), (21, 7.1442)],
        "val_accuracy": [(1, 0.0012), (2, 0.0010), (10, 0.0011), (20, 0.0010), (21, 0.0012)],
    }
    assert facts_of(OBSERVED).known() == {"epochs": 100}  # it stands at 21: whether it is over is not known


@pytest.mark.parametrize(
    ("excerpt", "epochs", "train", "val"),
    [
        (BARELY_MOVED, [1, 10], [7.0, 6.8], [6.9, 7.0]),
        (HEALTHY, [1, 5, 10, 15], [7.00, 6.50, 6.20, 6.00], [6.95, 6.48, 6.22, 6.05]),
        (OVERFITTING, [1, 5, 10, 15], [7.00, 6.50, 6.00, 5.50], [6.95, 6.48, 6.55, 6.80]),
        (UNDERFITTING, [1, 5, 10, 15], [7.00, 6.90, 6.85, 6.80], [6.95, 6.88, 6.82, 6.78]),
        (TOO_SLOW, [1, 10, 20], [7.00, 6.98, 6.95], None),
    ],
)
def test_the_guides_other_runs_are_read(
    excerpt: str, epochs: list[float], train: list[float], val: list[float] | None
) -> None:
    expected = {"train_loss": list(zip(epochs, train, strict=True))}
    if val is not None:
        expected["val_loss"] = list(zip(epochs, val, strict=True))
    assert curves_in(excerpt) == expected


def test_a_loss_that_became_nan_is_kept_as_not_finite() -> None:
    (curve,) = facts_of(EXPLODING).curves.values()
    assert curve.epochs.tolist() == [1, 2, 3]
    np.testing.assert_array_equal(curve.values, [7.00, 15.32, math.nan])


def test_lines_without_an_epoch_are_numbered_in_their_order() -> None:
    assert curves_in(NOISY) == {
        "val_loss": [(1, 6.9181), (2, 6.9157), (3, 6.9163)],
        "val_accuracy": [(1, 0.0012), (2, 0.0010), (3, 0.0009)],
    }


def test_the_guides_parameter_counts_are_read() -> None:
    facts = facts_of(TOO_HIGH)
    counts = facts.total_parameters, facts.trainable_parameters, facts.lora_parameters
    assert counts == (20_366_312, 18_790_376, 98_304)
    assert facts.trainable_percent == pytest.approx(92.3, abs=0.05)
    assert facts.use_lora is True
    assert facts.curves == {}
    assert facts_of(LORA_NOT_APPLIED).known() == {
        "finished": True,
        "trainable_parameters": 18_790_376,
        "trainable_percent": 92.3,
    }


def test_counts_say_more_than_a_range_of_percents() -> None:
    assert facts_of(PROPER).trainable_percent == pytest.approx(100 * 500_000 / 20_366_312)


def test_a_missing_total_is_the_sum_of_trained_and_frozen() -> None:
    without = "".join(line for line in TOO_HIGH.splitlines(keepends=True) if "Total" not in line)
    assert facts_of(without).total_parameters == 20_366_312


def test_no_adapters_are_no_lora() -> None:
    assert facts_of("Total: 1,000\nTrainable: 1,000 (100.0%)\nLoRA: 0 (0.0%)\n").use_lora is None


def test_adapted_layers_are_named_without_their_adapter() -> None:
    facts = facts_of(ADAPTED)
    assert facts.adapted_layers == ("encoder.layers.0.self_attn.out_proj", "encoder.layers.1.self_attn.out_proj")
    assert facts.use_lora is True


def test_training_batches_are_the_steps_of_an_epoch() -> None:
    assert facts_of(BATCHES).steps_per_epoch == 200


@pytest.mark.parametrize(
    "line",
    [
        "RuntimeError: CUDA out of memory. Tried to allocate 2.00 GiB",
        "torch.OutOfMemoryError: Allocation on device",
        "RuntimeError: MPS backend out of memory (MPS allocated: 18.10 GB)",
    ],
)
def test_an_end_for_want_of_memory_is_seen(line: str) -> None:
    assert facts_of(OBSERVED + line).out_of_memory is True
    assert facts_of(OBSERVED).out_of_memory is None


class Printed:
    """What our console prints of a run of three epochs, and the run itself."""

    def __init__(self) -> None:
        self.settings = load_experiment(
            flags={"use_lora": True, "lora_rank": 4, "epochs": 12, "lr": 3e-4, "early_stopping_patience": 2}
        )
        model = BEHRTForMaskedLM(self.settings.model.config(vocab_size=1234))
        choose_trained(model, self.settings)
        self.counts = count_parameters(model)
        self.start = RunStart(
            experiment="mine", folder=None, key="b" * 32, run_id="a" * 32,
            settings=self.settings, device="cpu", precision="fp32",
            dataset={"name": "cohort", "digest": "0"},
            max_position=77, vocab_size=1234, patients={"train": 4000, "tuning": 1001}, steps_per_epoch=125,
            baselines=Baselines(7.1180, 6.5, 0.04, copying_loss=6.25, floor_loss=5.25, floor_accuracy=0.11),
            counts=self.counts, transplant=None, truncated_share=0.061,
        )  # fmt: skip
        self.records = [
            EpochRecord(
                epoch=epoch, train_loss=7 - epoch / 7, train_accuracy=epoch / 70, val_loss=6.5 + epoch / 13,
                val_accuracy=epoch / 99, train_loss_running=7.0, learning_rate=1e-4, gradient_norm=1.0,
                tokens_per_second=1e4, epoch_seconds=60.0, is_best=epoch == 1, epochs_without_improvement=epoch - 1,
            )
            for epoch in (1, 2, 3)
        ]  # fmt: skip
        result = SimpleNamespace(
            start=self.start, best=self.records[0], last=self.records[2], stopped_early=True, refused=False,
            diagnosis=SimpleNamespace(verdict="overfitting"), closed_gap=0.5, seconds=180.0, tracking_uri="mlruns",
            tracking_complete=True, run_id="a" * 32,
        )  # fmt: skip
        console = Console(file=io.StringIO(), width=160, highlight=False)
        listener = TerminalListener(console)
        listener.started(self.start)
        for record in self.records:
            listener.epoch(record)
        console.print("\n".join(result_lines(result)), markup=False)
        self.text = console.file.getvalue()


def test_our_own_console_is_read_back() -> None:
    printed = Printed()
    facts = facts_of(printed.text)
    for name in ("train_loss", "train_accuracy", "val_loss", "val_accuracy"):
        assert facts.curves[name].epochs.tolist() == [1, 2, 3]
        expected = [getattr(record, name) for record in printed.records]
        np.testing.assert_allclose(facts.curves[name].values, expected, atol=6e-5)
    assert set(facts.curves) == {"train_loss", "train_accuracy", "val_loss", "val_accuracy"}
    known = facts.known()
    assert known.pop("trainable_percent") == pytest.approx(printed.counts["trainable_percent"])
    assert known == {
        "finished": True,
        "stopped_early": True,
        "use_lora": True,
        "model_size": "small",
        "lr": 3e-4,
        "epochs": 12,
        "early_stopping_patience": 2,
        "max_position": 77,
        "total_parameters": printed.counts["total"],
        "trainable_parameters": printed.counts["trainable"],
        "lora_parameters": printed.counts["lora"],
        "vocab_size": 1234,
        "train_patients": 4000,
        "val_patients": 1001,
        "chance_loss": 7.1180,
        "unigram_loss": 6.5,
        "copying_loss": 6.25,
        "floor_loss": 5.25,
        "floor_accuracy": 0.11,
        "truncated_share": 0.061,
        "device": "cpu",
        "steps_per_epoch": 125,
    }


def test_the_best_epoch_of_a_summary_is_no_epoch_of_its_own() -> None:
    text = "Epoch 1 | Val Loss: 7.0\nEpoch 2 | Val Loss: 6.5\n"
    for summary in ("Best Val Loss: 6.1", "Best epoch 1: val loss: 6.1", "Final loss: 6.1", "Test Loss: 6.1 Acc: 0.5"):
        assert curves_in(text + summary) == {"val_loss": [(1, 7.0), (2, 6.5)]}


def test_a_figure_told_again_below_the_epochs_is_none_of_theirs() -> None:
    text = "Epoch 1 | Val Loss: 7.0\nEpoch 2 | Val Loss: 6.5\n"
    for again in ("Val Loss: 6.1", "Best epoch 1\nVal Loss: 6.1"):
        assert curves_in(text + again) == {"val_loss": [(1, 7.0), (2, 6.5)]}
    keras = "Epoch 1/2\nval_loss: 7.0\nEpoch 2/2\nval_loss: 6.5\n"
    assert curves_in(keras + "Best model: Val Loss: 6.1\n") == {"val_loss": [(1, 7.0), (2, 6.5)]}


def test_figures_below_a_line_with_an_epoch_belong_to_it() -> None:
    keras = "Epoch 1/2\n 5/10 - loss: 9.0\r10/10 - loss: 6.9 - accuracy: 0.01 - val_loss: 6.8 - val_accuracy: 0.02\n"
    assert curves_in(keras + "Epoch 2/2\n10/10 - loss: 6.7 - val_loss: 6.6\n") == {
        "train_loss": [(1, 6.9), (2, 6.7)],
        "train_accuracy": [(1, 0.01)],
        "val_loss": [(1, 6.8), (2, 6.6)],
        "val_accuracy": [(1, 0.02)],
    }
    assert curves_in("Epoch 3 | Train Loss: 7.0\n   Val Loss: 6.9\n") == {
        "train_loss": [(3, 7.0)],
        "val_loss": [(3, 6.9)],
    }


def test_dictionaries_that_hugging_face_prints_are_read() -> None:
    text = "{'loss': 6.9, 'grad_norm': 1.5, 'learning_rate': 5e-05, 'epoch': 1.0}\n{'eval_loss': 6.8, 'epoch': 1.0}\n"
    assert curves_in(text) == {
        "train_loss": [(1, 6.9)],
        "val_loss": [(1, 6.8)],
        "gradient_norm": [(1, 1.5)],
        "learning_rate": [(1, 5e-05)],
    }


def test_settings_and_counts_of_patients_are_no_losses() -> None:
    text = "Train: 4000 | Val: 1000\nlr: 1e-4\nEpochs: 100\nTrain Loss: 7.0\nTrain Loss: 6.9\n"
    assert curves_in(text) == {"train_loss": [(1, 7.0), (2, 6.9)]}


def test_colours_and_prefixes_do_not_hide_a_line() -> None:
    text = "2026-01-02 12:00:01 INFO \x1b[32mEpoch 1/5\x1b[0m | Train Loss: \x1b[1m7.0\x1b[0m | Val Loss: 6.9\n"
    assert curves_in(text) == {"train_loss": [(1, 7.0)], "val_loss": [(1, 6.9)]}


def test_accuracies_in_percent_become_shares() -> None:
    assert curves_in("Epoch 1 | Train Acc: 45.2 | Val Acc: 0.9")["val_accuracy"] == [(1, pytest.approx(0.009))]
    assert curves_in("Epoch 1 | Train Acc: 45.2% | Val Acc: 0.9%")["train_accuracy"] == [(1, pytest.approx(0.452))]
    assert curves_in("Epoch 1 | Val Acc: 0.9%")["val_accuracy"] == [(1, pytest.approx(0.009))]
    assert curves_in("Epoch 1 | Train Acc: 0.452 | Val Acc: 0.9")["val_accuracy"] == [(1, 0.9)]


def test_text_without_a_figure_is_refused_with_what_would_be_recognised() -> None:
    with pytest.raises(UserError, match=r"train\.log: holds no figure of a training.*val_loss.*--map") as caught:
        facts_of("Hello, world.\nThe learning rate was too high, said the guide.\n")
    assert "\n" not in str(caught.value)


def test_ten_thousand_lines_take_a_moment() -> None:
    text = "".join(
        f"Epoch {n}/10000 | Train Loss: 6.9 Acc: 0.1 | Val Loss: 7.0 Acc: 0.1 🏆\n" for n in range(1, 10_001)
    )
    began = time.perf_counter()
    assert len(facts_of(text).curves["val_loss"]) == 10_000
    assert time.perf_counter() - began < 5


@pytest.mark.parametrize("filler", [" ", "epoch ", "Total: ", "1", "1,", "loss: ", "[", "epoch: [ "])
def test_no_line_takes_more_than_linear_time(filler: str) -> None:
    began = time.perf_counter()
    for text in ("epoch" + filler * 20_000 + "x", "Val Loss: 6.9 | Total:" + filler * 20_000 + "x"):
        with suppress(UserError):
            facts_of(text)
    assert time.perf_counter() - began < 5


def test_names_are_compared_without_their_punctuation() -> None:
    assert {plain(name) for name in ("val_loss", "Val/Loss", "VAL-LOSS", " val.loss ", "val loss")} == {"val_loss"}


def test_of_two_runs_in_one_log_the_last_counts(caplog: pytest.LogCaptureFixture) -> None:
    first = [f"Epoch {epoch} | Train Loss: {7 - epoch / 10} | Val Loss: 7" for epoch in range(1, 9)]
    second = [f"Epoch {epoch} | Train Loss: 6.9 | Val Loss: 6.8" for epoch in range(1, 4)]
    assert curves_in("\n".join(first + second))["train_loss"] == [(1, 6.9), (2, 6.9), (3, 6.9)]
    assert "begin anew" in caplog.text


def test_names_and_values_that_may_be_a_patients_are_not_shown() -> None:
    with pytest.raises(UserError) as refused:
        read_log(b"10023771,2019-04-02 10:00:00,ICD10CM//F20.0\n1,2,3\n", where="t.csv", columns={})
    for private in ("10023771", "2019", "F20"):
        assert private not in str(refused.value)
    with pytest.raises(UserError) as refused:
        read_log(b"epoch,val_loss\n1,F20.0\n", where="t.csv", columns={})
    assert "F20" not in str(refused.value)


def test_hugging_faces_printed_summary_is_no_epoch() -> None:
    text = "{'loss': 7.0, 'epoch': 1.0}\n{'loss': 6.5, 'epoch': 2.0}\n"
    summary = "{'train_runtime': 100.0, 'train_loss': 6.75, 'epoch': 2.0}\n"
    assert curves_in(text + summary) == curves_in(text) == {"train_loss": [(1, 7.0), (2, 6.5)]}
