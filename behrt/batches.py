"""How do patients' sequences become the tensors of a training step?

Sequences are short and uneven, so whole ones are laid end to end in rows of fixed length (`PackedBatch`); `segments`
says which patient a token belongs to, and attention never crosses it. Training windows, order and masks are functions
of (seed, epoch, step), so that a run can go on from any step. Evaluation sets are drawn once and stay the same over
epochs, runs and trials; baselines and floors are computed on the very same arrays.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Self, overload

import numpy as np
import numpy.typing as npt

from behrt.config import SELECTED_SHARE
from behrt.masking import Stream, mask_tokens, stream
from behrt.sequences import PreparedSplit
from behrt.vocabulary import PAD

if TYPE_CHECKING:
    import torch

IGNORED = -100
"""Label of a token that is not scored."""
PADDING_SEGMENT = -1


@dataclass(frozen=True)
class PackedBatch:
    """Rows of whole sequences, each tensor `[rows, row_length]`.

    Attributes:
        codes: int64 ids as the model sees them, after the corruption.
        ages: float32 years; NaN where unknown.
        visits: int64 visit numbers, 0 for `[CLS]`.
        positions: int64, counted from 0 for each patient.
        segments: int64 number of the patient inside the row, -1 on padding.
        labels: int64 original ids where scored, -100 elsewhere.
    """

    codes: torch.Tensor
    ages: torch.Tensor
    visits: torch.Tensor
    positions: torch.Tensor
    segments: torch.Tensor
    labels: torch.Tensor

    @property
    def scored(self) -> torch.Tensor:
        """Bool `[rows, row_length]`: where a label stands."""
        return self.labels != IGNORED

    @property
    def num_tokens(self) -> int:
        """Real tokens, padding not counted."""
        return int((self.segments != PADDING_SEGMENT).sum())

    @property
    def num_scored(self) -> int:
        return int(self.scored.sum())

    def to(self, device: torch.device) -> Self:
        """What the model computes with moves; `segments` and `labels`, which only say where, stay on the CPU."""
        from behrt.devices import to_device

        moved = {name: to_device(getattr(self, name), device) for name in ("codes", "ages", "visits", "positions")}
        return replace(self, **moved)

    def halves(self) -> tuple[Self, Self] | None:
        """The first and the second half of the rows; None of a single row."""
        middle = len(self.codes) // 2
        if not middle:
            return None
        first, second = (
            {field.name: getattr(self, field.name)[rows] for field in fields(self)}
            for rows in (slice(middle), slice(middle, None))
        )
        return type(self)(**first), type(self)(**second)


@dataclass(frozen=True)
class FlatSequences:
    """Sequences of several patients end to end; patient `p` has the tokens `offsets[p]:offsets[p + 1]`.

    Attributes:
        codes: int32 original ids `[tokens]`.
        ages: float32 years `[tokens]`.
        visits: int32 `[tokens]`.
        offsets: int64 `[patients + 1]`.
    """

    codes: npt.NDArray[np.int32]
    ages: npt.NDArray[np.float32]
    visits: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets) - 1


def choose_window(
    visits: npt.NDArray[np.int32], max_position: int, generator: np.random.Generator | None
) -> tuple[int, int]:
    """Which stretch `start:stop` of a too long sequence follows its `[CLS]`?

    Whole visits, at most `max_position - 1` tokens. With a generator the first visit is random (training); without, the
    stretch holds the latest visits (evaluation).
    Only a visit that alone is too long is cut: anywhere in training, to its last tokens in evaluation.

    >>> visits = np.array([0, 1, 1, 1, 2, 2, 3, 3, 3], dtype=np.int32)  # [CLS] and three visits
    >>> choose_window(visits, 6, None)
    (4, 9)
    >>> choose_window(visits, 3, None)
    (7, 9)
    """
    room, length = max_position - 1, len(visits)
    starts = 1 + np.flatnonzero(np.diff(visits))
    stops = np.append(starts[1:], length)
    fitting = np.flatnonzero(length - starts <= room)
    last_start = int(fitting[0]) if len(fitting) else len(starts) - 1
    first = last_start if generator is None else int(generator.integers(last_start + 1))
    start = int(starts[first])
    within = stops[stops - start <= room]
    if len(within) and within[-1] > start:
        return start, int(within[-1])
    stop = int(stops[first])  # one visit longer than the room
    if generator is None:
        return stop - room, stop
    start += int(generator.integers(stop - start - room + 1))
    return start, start + room


def gather(split: PreparedSplit, patients: npt.NDArray[np.int64]) -> FlatSequences:
    """The whole sequences of the named patients."""
    parts = [split.sequence(patient) for patient in patients.tolist()]
    offsets = np.zeros(len(parts) + 1, dtype=np.int64)
    np.cumsum([len(codes) for codes, _, _ in parts], out=offsets[1:])
    codes, ages, visits = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return FlatSequences(codes=codes, ages=ages, visits=visits, offsets=offsets)


def cut(
    sequences: FlatSequences, max_position: int, generator: np.random.Generator | None = None
) -> tuple[FlatSequences, npt.NDArray[np.int64]]:
    """Sequences of at most `max_position` tokens: `[CLS]` and a window of whole visits; see `choose_window`.

    Returns:
        The sequences, and which of the given tokens they kept, int64 `[kept tokens]`.
    """
    kept = np.ones(len(sequences.codes), np.bool_)
    for patient in np.flatnonzero(np.diff(sequences.offsets) > max_position).tolist():
        start, stop = sequences.offsets[patient : patient + 2].tolist()
        first, last = choose_window(sequences.visits[start:stop], max_position, generator)
        kept[start + 1 : start + first] = kept[start + last : stop] = False
    index = np.flatnonzero(kept)
    offsets = np.concatenate([[0], np.cumsum(kept)])[sequences.offsets]
    ages = sequences.ages[index]
    ages[offsets[:-1]] = ages[offsets[:-1] + 1]  # [CLS] has the age of what follows it
    return FlatSequences(sequences.codes[index], ages, sequences.visits[index], offsets), index


def place_in_rows(lengths: npt.NDArray[np.int64], row_length: int) -> tuple[npt.NDArray[np.int64], ...]:
    """Which row, start and number inside the row does each sequence get? First fit, the longest first.

    Returns:
        `rows, starts, numbers`, int64 `[sequences]`.

    >>> place_in_rows(np.array([3, 5, 4]), 8)
    (array([0, 0, 1]), array([5, 0, 0]), array([1, 0, 0]))
    """
    assert lengths.max(initial=0) <= row_length
    rows, starts, numbers = (np.zeros(len(lengths), dtype=np.int64) for _ in range(3))
    filled: list[int] = []
    count: list[int] = []
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[index])
        row = next((row for row, used in enumerate(filled) if used + length <= row_length), len(filled))
        if row == len(filled):
            filled.append(0)
            count.append(0)
        rows[index], starts[index], numbers[index] = row, filled[row], count[row]
        filled[row] += length
        count[row] += 1
    return rows, starts, numbers


@dataclass(frozen=True)
class MaskedSequences:
    """Sequences, what a model is shown of them, and where it is scored.

    Attributes:
        sequences: the original tokens.
        shown: int32 `[tokens]`, after the corruption.
        scored: bool `[tokens]`.
    """

    sequences: FlatSequences
    shown: npt.NDArray[np.int32]
    scored: npt.NDArray[np.bool_]

    @property
    def labels(self) -> npt.NDArray[np.int32]:
        """Original ids of the scored tokens, int32 `[scored]`."""
        return self.sequences.codes[self.scored]

    def equals(self, other: MaskedSequences) -> bool:
        """Whether the same tokens are shown, and scored, of the same sequences."""
        pairs = ((self.sequences.codes, other.sequences.codes), (self.shown, other.shown), (self.scored, other.scored))
        return all(np.array_equal(mine, theirs) for mine, theirs in pairs)

    def batch(self, first: int, stop: int, *, row_length: int) -> PackedBatch:
        """The patients `first:stop` in packed rows."""
        offsets = self.sequences.offsets[first : stop + 1]
        tokens = slice(int(offsets[0]), int(offsets[-1]))
        return pack(
            FlatSequences(
                codes=self.sequences.codes[tokens],
                ages=self.sequences.ages[tokens],
                visits=self.sequences.visits[tokens],
                offsets=offsets - offsets[0],
            ),
            self.shown[tokens],
            self.scored[tokens],
            row_length=row_length,
        )

    def packed(self, patients_per_batch: int, row_length: int) -> Sequence[PackedBatch]:
        """All patients, so many a batch."""
        return PackedSet(self, patients_per_batch, row_length)


@dataclass(frozen=True)
class PackedSet(Sequence[PackedBatch]):
    """Batches that are laid out when they are asked for: rows take three times the memory of flat sequences."""

    masked: MaskedSequences
    patients_per_batch: int
    row_length: int

    def __len__(self) -> int:
        return -(-len(self.masked.sequences) // self.patients_per_batch)

    @overload
    def __getitem__(self, index: int) -> PackedBatch: ...

    @overload
    def __getitem__(self, index: slice) -> list[PackedBatch]: ...

    def __getitem__(self, index: int | slice) -> PackedBatch | list[PackedBatch]:
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        first = range(len(self))[index] * self.patients_per_batch
        stop = min(first + self.patients_per_batch, len(self.masked.sequences))
        return self.masked.batch(first, stop, row_length=self.row_length)


def evaluation_set(
    split: PreparedSplit,
    patients: npt.NDArray[np.int64],
    *,
    max_position: int,
    vocab_size: int,
    generator: np.random.Generator,
) -> MaskedSequences:
    """The latest visits of each patient under masks that never change.

    Whole histories are masked before they are cut, so that the same token is masked whatever `max_position` is.
    """
    whole = gather(split, patients)
    shown, scored = mask_tokens(whole.codes, vocab_size=vocab_size, generator=generator)
    sequences, kept = cut(whole, max_position)
    return MaskedSequences(sequences, shown[kept], scored[kept])


def pack(
    sequences: FlatSequences,
    shown: npt.NDArray[np.int32],
    scored: npt.NDArray[np.bool_],
    *,
    row_length: int,
) -> PackedBatch:
    """Lays sequences into rows; `shown` and `scored` (`[tokens]`) come from `mask_tokens`."""
    import torch

    lengths = np.diff(sequences.offsets)
    rows, starts, numbers = place_in_rows(lengths, row_length)
    positions = np.arange(len(sequences.codes)) - np.repeat(sequences.offsets[:-1], lengths)
    target = np.repeat(rows * row_length + starts, lengths) + positions  # place of each token in the flattened rows
    shape = (int(rows.max()) + 1, row_length)

    def lay(values: npt.NDArray[np.generic], padding: float, dtype: type[np.generic]) -> torch.Tensor:
        flat = np.full(shape[0] * shape[1], padding, dtype=dtype)
        flat[target] = values
        return torch.from_numpy(flat.reshape(shape))

    return PackedBatch(
        codes=lay(shown, PAD, np.int64),
        ages=lay(sequences.ages, np.nan, np.float32),
        visits=lay(sequences.visits, 0, np.int64),
        positions=lay(positions, 0, np.int64),
        segments=lay(np.repeat(numbers, lengths), PADDING_SEGMENT, np.int64),
        labels=lay(np.where(scored, sequences.codes, IGNORED), IGNORED, np.int64),
    )


class TrainingBatches:
    """The steps of any epoch: shuffled patients, random windows, masks drawn anew.

    Args:
        split: the training patients.
        patients: int64 indices of those that are used.
        batch_size: patients per optimizer step; the last step of an epoch may have fewer.
        accumulation_steps: micro-batches that a step is divided into on each rank.
        rank, ranks: which of so many processes computes them; each gets every so manieth, and together they get all.
        max_position: longest sequence; `row_length` (at least as long) is the width of the rows.
        mlm_probability: share of the ordinary tokens that are selected.
    """

    def __init__(
        self,
        split: PreparedSplit,
        patients: npt.NDArray[np.int64],
        *,
        batch_size: int,
        accumulation_steps: int = 1,
        max_position: int,
        row_length: int,
        vocab_size: int,
        seed: int,
        mlm_probability: float = SELECTED_SHARE,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        assert row_length >= max_position
        self._split = split
        self._patients = patients
        self._batch_size = batch_size
        self._accumulation_steps = accumulation_steps
        self._max_position = max_position
        self._row_length = row_length
        self._vocab_size = vocab_size
        self._seed = seed
        self._mlm_probability = mlm_probability
        self._rank = rank
        self._ranks = ranks

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self._patients) // self._batch_size)

    def epoch(
        self, epoch: int, first_step: int = 0, *, accumulation_steps: int | None = None
    ) -> Iterator[list[PackedBatch]]:
        """This rank's micro-batches of each step of an epoch, from `first_step` on; in how many, changes no draw.

        A step of fewer patients than micro-batches leaves some ranks without any.
        """
        accumulation_steps = accumulation_steps or self._accumulation_steps
        order = stream(self._seed, Stream.ORDER, epoch).permutation(self._patients)
        for step in range(first_step, self.steps_per_epoch):
            patients = order[step * self._batch_size : (step + 1) * self._batch_size]
            windows = stream(self._seed, Stream.WINDOWS, epoch, step)
            masks = stream(self._seed, Stream.TRAINING_MASKS, epoch, step)
            sequences, _ = cut(gather(self._split, patients), self._max_position, windows)
            masked = MaskedSequences(
                sequences,
                *mask_tokens(
                    sequences.codes,
                    vocab_size=self._vocab_size,
                    generator=masks,
                    selected_share=self._mlm_probability,
                ),
            )
            parts = min(accumulation_steps * self._ranks, len(patients))
            bounds = itertools.pairwise(np.linspace(0, len(patients), parts + 1).round().astype(int).tolist())
            own = itertools.islice(bounds, self._rank, None, self._ranks)
            yield [masked.batch(first, stop, row_length=self._row_length) for first, stop in own]
