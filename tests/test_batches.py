"""Do packed rows hold exactly the patients' sequences, each once an epoch, in a repeatable order?"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from behrt.batches import (
    IGNORED,
    PADDING_SEGMENT,
    PackedBatch,
    TrainingBatches,
    choose_window,
    cut,
    evaluation_set,
    gather,
    place_in_rows,
)
from behrt.sequences import PreparedSplit, open_prepared
from behrt.vocabulary import CLS

MAX_POSITION = 60


@pytest.fixture(scope="module")
def split(prepared: Path) -> PreparedSplit:
    return open_prepared(prepared).split("train")


@pytest.fixture(scope="module")
def vocab_size(prepared: Path) -> int:
    return len(open_prepared(prepared).vocabulary)


def training(split: PreparedSplit, vocab_size: int, **changes: Any) -> TrainingBatches:
    settings = {"batch_size": 16, "accumulation_steps": 1, "max_position": MAX_POSITION, "row_length": 128, "seed": 0}
    return TrainingBatches(split, np.arange(len(split)), vocab_size=vocab_size, **{**settings, **changes})


def unpack(batch: PackedBatch) -> list[tuple[list[int], list[int], list[int]]]:
    """(original codes, visits, positions) of each patient, read back by segment; [MASK] undone by the labels."""
    original = torch.where(batch.scored, batch.labels, batch.codes)
    patients = []
    for row in range(len(batch.codes)):
        for segment in range(int(batch.segments[row].max()) + 1):
            own = batch.segments[row] == segment
            patients.append(tuple(values[row][own].tolist() for values in (original, batch.visits, batch.positions)))
    return patients


def masks_of_patients(step: list[PackedBatch]) -> dict[tuple[int, ...], tuple[int, ...]]:
    """What is shown of each patient of a step, by the patient's codes; windows of the same patient differ in both."""
    found = {}
    for batch in step:
        original = torch.where(batch.scored, batch.labels, batch.codes)
        for row in range(len(batch.codes)):
            for segment in range(int(batch.segments[row].max()) + 1):
                own = batch.segments[row] == segment
                found[tuple(original[row][own].tolist())] = tuple(batch.codes[row][own].tolist())
    return found


def test_every_patient_comes_once_an_epoch_with_its_own_tokens(split: PreparedSplit, vocab_size: int) -> None:
    found = sorted(
        codes for step in training(split, vocab_size, max_position=512, row_length=512).epoch(1) for micro_batch in step
        for codes, _, _ in unpack(micro_batch)
    )  # fmt: skip
    assert found == sorted(split.sequence(patient)[0].tolist() for patient in range(len(split)))


def test_positions_restart_for_each_patient_and_each_begins_with_cls(split: PreparedSplit, vocab_size: int) -> None:
    for codes, _, positions in unpack(next(training(split, vocab_size).epoch(1))[0]):
        assert codes[0] == CLS
        assert positions == list(range(len(codes)))


def test_padding_is_marked_and_never_scored(split: PreparedSplit, vocab_size: int) -> None:
    batch = next(training(split, vocab_size).epoch(1))[0]
    padding = batch.segments == PADDING_SEGMENT
    assert padding.any()
    assert (batch.labels[padding] == IGNORED).all()
    assert (batch.codes[padding] == 0).all()
    assert batch.num_tokens == int((~padding).sum())


def test_more_is_masked_of_the_same_windows_where_that_is_asked_for(split: PreparedSplit, vocab_size: int) -> None:
    usual, more = (list(training(split, vocab_size, mlm_probability=share).epoch(1)) for share in (0.15, 0.45))
    assert [unpack(step[0]) for step in more] == [unpack(step[0]) for step in usual]
    scored = [sum(step[0].num_scored for step in steps) for steps in (usual, more)]
    assert scored[1] == pytest.approx(3 * scored[0], rel=0.15)


def test_order_and_masks_differ_between_epochs(split: PreparedSplit, vocab_size: int) -> None:
    batches = training(split, vocab_size)
    first, second = (next(batches.epoch(epoch))[0] for epoch in (1, 2))
    assert {tuple(codes) for codes, _, _ in unpack(first)} != {tuple(codes) for codes, _, _ in unpack(second)}
    one_step = training(
        split, vocab_size, batch_size=len(split), max_position=128
    )  # the same patients, so only masks can differ
    masked = [masks_of_patients(next(one_step.epoch(epoch))) for epoch in (1, 2, 1)]
    assert masked[0].keys() == masked[1].keys()
    changed = [masked[0][codes] != masked[1][codes] for codes in masked[0]]
    assert sum(changed) > 0.9 * len(changed)
    assert masked[0] == masked[2]


def test_an_epoch_is_the_same_again_and_can_begin_at_any_step(split: PreparedSplit, vocab_size: int) -> None:
    whole = list(training(split, vocab_size).epoch(3))
    rest = list(training(split, vocab_size).epoch(3, first_step=4))
    assert len(rest) == len(whole) - 4
    for (expected,), (found,) in zip(whole[4:], rest, strict=True):
        assert torch.equal(expected.codes, found.codes)
        assert torch.equal(expected.labels, found.labels)


def test_another_seed_gives_another_order(split: PreparedSplit, vocab_size: int) -> None:
    first, second = (next(training(split, vocab_size, seed=seed).epoch(1))[0] for seed in (0, 1))
    assert first.codes.shape != second.codes.shape or not torch.equal(first.codes, second.codes)


def test_micro_batches_divide_the_patients_of_a_step(split: PreparedSplit, vocab_size: int) -> None:
    whole = next(training(split, vocab_size).epoch(1))
    parts = next(training(split, vocab_size, accumulation_steps=4).epoch(1))
    assert len(parts) == 4
    assert masks_of_patients(whole) == masks_of_patients(parts)


def random_visits(generator: np.random.Generator) -> np.ndarray:
    sizes = generator.integers(1, 12, size=generator.integers(2, 20))
    return np.concatenate([[0], np.repeat(np.arange(1, len(sizes) + 1), sizes)]).astype(np.int32)


@pytest.mark.parametrize("training_mode", [False, True])
def test_a_window_holds_whole_visits_and_fits(training_mode: bool) -> None:
    generator = np.random.default_rng(0)
    for _ in range(500):
        visits = random_visits(generator)
        room = 14
        if len(visits) <= room + 1:
            continue
        start, stop = choose_window(visits, room + 1, generator if training_mode else None)
        assert 0 < stop - start <= room
        assert visits[start - 1] != visits[start]
        assert stop == len(visits) or visits[stop] != visits[stop - 1]
        if not training_mode:  # the latest visits, and one more would not fit
            assert stop == len(visits)
            before = np.flatnonzero(visits == visits[start] - 1)
            assert stop - before[0] > room


def test_training_windows_reach_every_visit() -> None:
    visits = np.concatenate([[0], np.repeat(np.arange(1, 9), 5)]).astype(np.int32)
    generator = np.random.default_rng(0)
    seen = {
        int(visit)
        for _ in range(200)
        for visit in np.unique(visits[slice(*choose_window(visits, 16, generator))])
    }  # fmt: skip
    assert seen == set(range(1, 9))


def test_a_visit_longer_than_the_room_is_cut_to_the_room() -> None:
    visits = np.concatenate([[0], np.ones(50), np.full(50, 2)]).astype(np.int32)
    assert choose_window(visits, 21, None) == (81, 101)
    generator = np.random.default_rng(0)
    windows = {choose_window(visits, 21, generator) for _ in range(300)}
    assert {stop - start for start, stop in windows} == {20}
    assert len(windows) > 30  # anywhere in either visit
    assert all(visits[start] == visits[stop - 1] for start, stop in windows)


def test_cut_sequences_keep_cls_with_the_age_of_what_follows(split: PreparedSplit) -> None:
    patients = np.flatnonzero(split.lengths > 30)
    sequences, kept = cut(gather(split, patients), 30)
    assert len(kept) == len(sequences.codes)
    for number, patient in enumerate(patients):
        tokens = slice(*sequences.offsets[number : number + 2])
        codes, _, visits = split.sequence(patient)
        assert sequences.codes[tokens][0] == CLS
        assert sequences.ages[tokens][0] == sequences.ages[tokens][1]
        length = tokens.stop - tokens.start - 1
        assert (sequences.codes[tokens][1:] == codes[-length:]).all()
        assert (sequences.visits[tokens][1:] == visits[-length:]).all()


def test_placing_in_rows_overlaps_nothing_and_wastes_little() -> None:
    lengths = np.random.default_rng(0).integers(3, 90, size=300)
    rows, starts, numbers = place_in_rows(lengths, 128)
    used = np.zeros((rows.max() + 1, 128), dtype=int)
    for row, start, length in zip(rows, starts, lengths, strict=True):
        used[row, start : start + length] += 1
    assert used.max() == 1
    assert used.mean() > 0.95
    for row in range(rows.max() + 1):
        assert sorted(numbers[rows == row]) == list(range((rows == row).sum()))


def test_evaluation_sets_are_equal_however_they_are_batched(split: PreparedSplit, vocab_size: int) -> None:
    sets = [
        evaluation_set(
            split, np.arange(40), max_position=MAX_POSITION, vocab_size=vocab_size, generator=np.random.default_rng(5)
        )
        for _ in range(2)
    ]
    assert (sets[0].shown == sets[1].shown).all()
    by_size = [
        sorted((codes, visits) for batch in sets[0].packed(size, 96) for codes, visits, _ in unpack(batch))
        for size in (1, 7, 100)
    ]
    assert by_size[0] == by_size[1] == by_size[2]
    labels = torch.cat([batch.labels[batch.scored] for batch in sets[0].packed(7, 96)])
    assert sorted(labels.tolist()) == sorted(sets[0].labels.tolist())
