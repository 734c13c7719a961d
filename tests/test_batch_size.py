"""Does `--batch-size auto` take a batch that fits, that is fast, and that changes nothing but its number?"""

from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from behrt import batch_size
from behrt.batch_size import BatchTiming, choose_batch_size, fastest, has_peaked
from behrt.batches import PackedBatch
from behrt.cli import main
from behrt.config import ExperimentSettings, UserError, load_experiment
from behrt.doctor.setup_symptoms import FULL_MEMORY
from behrt.history import read_history
from behrt.pretrain import masked_lm_loss
from behrt.records import RecordsCache
from behrt.trainer import LossSums

from .empty_stores import lay_store

CPU = torch.device("cpu")


def timings(*rates: float | None) -> list[BatchTiming]:
    return [BatchTiming(8 << power, rate, None) for power, rate in enumerate(rates)]


def test_the_smallest_batch_that_is_about_as_fast_as_any_is_taken() -> None:
    assert fastest(timings(100, 200, 390, 400, 395)) == 32
    assert fastest(timings(100, 90, 80)) == 8
    assert fastest(timings(100, 300, None)) == 16


def test_larger_steps_are_given_up_where_two_in_a_row_are_slower() -> None:
    assert has_peaked(timings(100, 200, 150, 170))
    assert not has_peaked(timings(100, 200, 150, 210))
    assert not has_peaked(timings(100, 80))


@pytest.fixture
def settings(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> ExperimentSettings:
    """Of 240 training patients, of whom up to 120 may be in a step."""
    monkeypatch.setattr(batch_size, "FEWEST_STEPS", 2)
    monkeypatch.setattr(batch_size, "MOST_STEPS", 2)
    return load_experiment(flags={"data": str(prepared), "precision": "fp32", "device": "cpu"})


def with_loss(monkeypatch: pytest.MonkeyPatch, look: Callable[[nn.Module, PackedBatch], None]) -> None:
    """The trainings that are timed compute the real loss, after `look`."""

    def loss(model: nn.Module, batch: PackedBatch) -> LossSums:
        look(model, batch)
        return masked_lm_loss(model, batch)

    monkeypatch.setattr(batch_size, "masked_lm_loss", loss)


def patients_of(batch: PackedBatch) -> int:
    return int((batch.segments.max(dim=1).values + 1).sum())


def test_real_steps_of_every_size_up_to_the_largest_worth_trying_are_timed(settings: ExperimentSettings) -> None:
    choice = choose_batch_size(settings, RecordsCache(), CPU)
    assert [timing.patients for timing in choice.timings] == [8, 16, 32, 64]
    assert all(timing.patients_per_second for timing in choice.timings)
    assert choice.batch_size in (8, 16, 32, 64)
    needed = [timing.memory_needed for timing in choice.timings]
    assert None not in needed
    assert needed == sorted(needed, key=lambda bytes: bytes or 0)
    assert choice.memory_available is not None


def test_what_is_timed_are_the_very_steps_that_were_compiled(
    settings: ExperimentSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each shape the first step costs more than all that follow: a new shape among the timed ones would count."""
    seen: list[tuple[int, bytes]] = []

    def look(model: nn.Module, batch: PackedBatch) -> None:
        if model.training:  # else it is the pre-flight
            seen.append((patients_of(batch), batch.codes.numpy().tobytes()))

    with_loss(monkeypatch, look)
    choose_batch_size(settings, RecordsCache(), CPU)
    for patients in (8, 16, 32, 64):
        steps = [codes for number, codes in seen if number == patients]
        assert len(steps) >= 2
        assert steps[: len(steps) // 2] == steps[len(steps) // 2 :]


def test_where_memory_runs_out_no_more_is_tried_and_what_fits_is_taken(
    settings: ExperimentSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look(model: nn.Module, batch: PackedBatch) -> None:
        if model.training and patients_of(batch) > 20:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with_loss(monkeypatch, look)
    choice = choose_batch_size(settings, RecordsCache(), CPU)
    assert [timing.patients_per_second is None for timing in choice.timings] == [False, False, True]
    assert choice.batch_size <= 16


def test_on_a_cpu_a_step_that_would_need_nearly_all_memory_is_not_tried(
    settings: ExperimentSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = choose_batch_size(settings, RecordsCache(), CPU)
    _, smaller, larger, _ = (timing.memory_needed or 0 for timing in whole.timings)
    between = int((smaller + larger) / 2 / FULL_MEMORY)
    monkeypatch.setattr("behrt.doctor.preflight.memory_available", lambda model, device: between)
    tried: list[int] = []
    with_loss(monkeypatch, lambda model, batch: tried.append(patients_of(batch)) if model.training else None)
    choice = choose_batch_size(settings, RecordsCache(), CPU)
    assert [timing.patients_per_second is None for timing in choice.timings] == [False, False, True]
    assert max(tried) <= 16


def test_where_not_even_the_smallest_step_fits_the_user_is_told(
    settings: ExperimentSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("behrt.doctor.preflight.memory_available", lambda model, device: 1)
    with pytest.raises(UserError, match=r"--batch-size: a step of 8 patients does not fit in memory; try --max-pos"):
        choose_batch_size(settings, RecordsCache(), CPU)


def test_ranks_on_a_cpu_share_its_memory(settings: ExperimentSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("behrt.doctor.preflight.memory_available", lambda model, device: 4 * 10**9)
    found = [choose_batch_size(settings, RecordsCache(), CPU, ranks=ranks) for ranks in (1, 4)]
    assert [choice.memory_available for choice in found] == [4 * 10**9, 10**9]
    alone, shared = (choice.timings[0].memory_needed or 0 for choice in found)
    assert shared > alone + 10**6  # the gradients end to end


def test_a_device_that_is_full_before_the_first_step_is_no_room(
    settings: ExperimentSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any, **named: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    freed: list[torch.device] = []
    monkeypatch.setattr(batch_size, "probe", full)
    monkeypatch.setattr(batch_size, "free_cached_memory", freed.append)
    with pytest.raises(UserError, match="--batch-size: a step of 8 patients does not fit"):
        choose_batch_size(settings, RecordsCache(), CPU)
    assert freed == [CPU]


def test_few_patients_are_not_timed(settings: ExperimentSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    choice = choose_batch_size(settings, RecordsCache(), CPU)
    assert (choice.batch_size, choice.timings) == (8, ())


def test_several_ranks_share_the_step(settings: ExperimentSettings) -> None:
    """Each has as many patients as one would have by itself, and an epoch has as many steps."""
    choice = choose_batch_size(settings, RecordsCache(), CPU, ranks=4)
    assert [timing.patients for timing in choice.timings] == [8, 16]
    assert choice.batch_size == 4 * fastest(choice.timings)


def test_a_run_with_auto_is_the_run_with_the_number_that_was_found(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lay_store(tmp_path)
    monkeypatch.setattr(batch_size, "FEWEST_STEPS", 6)
    monkeypatch.setattr(batch_size, "MOST_STEPS", 1)
    flags = ["train", "--data", str(prepared), "--epochs", "1", "--force"]
    with chdir(tmp_path):
        assert main([*flags, "--batch-size", "auto", "--out", "found"]) == 0
        said = capsys.readouterr().err
        found = load_experiment(Path("found/experiment.yaml")).training.batch_size
        assert f"Batch size {found}, the smallest that is about as fast as any here" in said
        assert main([*flags, "--batch-size", str(found), "--out", "given"]) == 0
    histories: list[Any] = [read_history(tmp_path / name) for name in ("found", "given")]
    assert histories[0]["val_loss"] == histories[1]["val_loss"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("train --batch-size auto --accumulation-steps 2", "--accumulation-steps: --batch-size auto finds what fits"),
        ("train --batch-size auto --compile", "--compile: --batch-size auto times layers as they are"),
        ("train --batch-size auto --resume run", "--batch-size: a run that goes on keeps its own"),
        ("train --batch-size many", "--batch-size: expected a number or auto, found 'many'"),
    ],
)
def test_auto_is_refused_where_it_means_nothing(
    words: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with chdir(tmp_path):
        assert main(words.split()) == 2
    assert expected in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_file_holds_a_number(tmp_path: Path) -> None:
    """So that the run of an `experiment.yaml` is the same one everywhere."""
    (tmp_path / "e.yaml").write_text("training: {batch_size: auto}\n")
    with pytest.raises(UserError, match=r"e\.yaml: training\.batch_size: auto is for behrt train"):
        load_experiment(tmp_path / "e.yaml")
    with pytest.raises(UserError, match="--batch-size: auto is for behrt train"):  # as with finetune and doctor
        load_experiment(flags={"batch_size": "auto"})
