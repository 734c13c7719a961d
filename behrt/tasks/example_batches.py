"""How do the examples of a task become the tensors of a training step?

Each example is its latest visits that the model has positions for, as in any evaluation: what came last tells most.
Several share a packed row, and attention never crosses from one to the next.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Self, overload

import numpy as np
import numpy.typing as npt
import torch

from behrt.batches import FlatSequences, PackedBatch, cut, pack
from behrt.devices import to_device
from behrt.masking import Stream, stream
from behrt.records import SHORTEST_ROW
from behrt.tasks.examples import Examples
from behrt.vocabulary import UNK, Vocabulary

EVALUATED_AT_ONCE = 128
"""Examples per batch where nothing is trained."""


def ids_of_model(data: Vocabulary, model: Vocabulary) -> npt.NDArray[np.int32] | None:
    """The model's id of each token of the records, `[UNK]` where it has none; None where both are the same."""
    if data.tokens == model.tokens:
        return None
    ids = {token: number for number, token in enumerate(model.tokens)}
    return np.array([ids.get(token, UNK) for token in data.tokens], np.int32)


@dataclass(frozen=True, kw_only=True)
class ExampleBatch:
    """Some examples, and what is to be predicted of each.

    Attributes:
        sequences: what is seen of them.
        packed: the same in rows; `labels` are the number of the example in this batch, for every token.
        targets: float32 [examples, names].
        days: float32 [examples], of survival; else empty.
    """

    sequences: FlatSequences
    packed: PackedBatch
    targets: torch.Tensor
    days: torch.Tensor
    row_length: int

    @classmethod
    def of(cls, sequences: FlatSequences, targets: torch.Tensor, days: torch.Tensor, row_length: int) -> Self:
        lengths = np.diff(sequences.offsets)
        numbers = np.repeat(np.arange(len(sequences), dtype=np.int32), lengths)
        packed = pack(
            replace(sequences, codes=numbers), sequences.codes, np.ones(len(numbers), np.bool_), row_length=row_length
        )
        return cls(sequences=sequences, packed=packed, targets=targets, days=days, row_length=row_length)

    @property
    def num_tokens(self) -> int:
        return self.packed.num_tokens

    @property
    def num_scored(self) -> int:
        """Labels that are known; of survival, patients."""
        return int((~torch.isnan(self.targets)).sum())

    def to(self, device: torch.device) -> Self:
        return replace(
            self,
            packed=self.packed.to(device),
            targets=to_device(self.targets, device),
            days=to_device(self.days, device),
        )

    def halves(self) -> tuple[Self, Self] | None:
        """The first and the second half of the examples; None of a single one."""
        middle = len(self.targets) // 2
        if not middle:
            return None
        first, second = (
            self.of(_part(self.sequences, start, stop), self.targets[start:stop], days, self.row_length)
            for start, stop, days in (
                (0, middle, self.days[:middle]),
                (middle, len(self.targets), self.days[middle:]),
            )
        )
        return first, second


def _part(sequences: FlatSequences, first: int, stop: int) -> FlatSequences:
    offsets = sequences.offsets[first : stop + 1]
    tokens = slice(int(offsets[0]), int(offsets[-1]))
    return FlatSequences(
        sequences.codes[tokens], sequences.ages[tokens], sequences.visits[tokens], offsets - offsets[0]
    )


@dataclass(frozen=True)
class ExampleLayout:
    """How a model wants its examples.

    Attributes:
        max_position: longest sequence.
        ids: the model's id of each token of the records; None where they are its own.
    """

    max_position: int
    ids: npt.NDArray[np.int32] | None = None

    @property
    def row_length(self) -> int:
        return max(self.max_position, SHORTEST_ROW)

    def batch(self, examples: Examples, rows: Sequence[int] | npt.NDArray[np.int64]) -> ExampleBatch:
        """These rows."""
        sequences, _ = cut(examples.sequences(rows), self.max_position)
        if self.ids is not None:
            sequences = replace(sequences, codes=self.ids[sequences.codes])
        days = np.zeros(0, np.float32) if examples.days is None else examples.days[rows]
        return ExampleBatch.of(
            sequences, torch.from_numpy(examples.targets[rows]), torch.from_numpy(days), self.row_length
        )


@dataclass(frozen=True)
class ExampleSet(Sequence[ExampleBatch]):
    """All rows, in their order, so many a batch, laid out when they are asked for."""

    examples: Examples
    layout: ExampleLayout
    per_batch: int = EVALUATED_AT_ONCE

    def __len__(self) -> int:
        return -(-len(self.examples) // self.per_batch)

    @overload
    def __getitem__(self, index: int) -> ExampleBatch: ...

    @overload
    def __getitem__(self, index: slice) -> list[ExampleBatch]: ...

    def __getitem__(self, index: int | slice) -> ExampleBatch | list[ExampleBatch]:
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        first = range(len(self))[index] * self.per_batch
        return self.layout.batch(self.examples, np.arange(first, min(first + self.per_batch, len(self.examples))))


class ExampleSteps:
    """The steps of any epoch: rows in an order drawn anew, a function of (seed, epoch)."""

    def __init__(
        self, examples: Examples, layout: ExampleLayout, *, batch_size: int, accumulation_steps: int = 1, seed: int
    ) -> None:
        self._examples = examples
        self._layout = layout
        self._batch_size = batch_size
        self._accumulation_steps = accumulation_steps
        self._seed = seed

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self._examples) // self._batch_size)

    def epoch(
        self, epoch: int, first_step: int = 0, *, accumulation_steps: int | None = None
    ) -> Iterator[list[ExampleBatch]]:
        """The micro-batches of each step of an epoch, from `first_step` on; in how many, changes no draw."""
        order = stream(self._seed, Stream.ORDER, epoch).permutation(len(self._examples))
        for step in range(first_step, self.steps_per_epoch):
            rows = order[step * self._batch_size : (step + 1) * self._batch_size]
            parts = min(accumulation_steps or self._accumulation_steps, len(rows))
            bounds = np.linspace(0, len(rows), parts + 1).round().astype(int).tolist()
            yield [self._layout.batch(self._examples, rows[first:stop]) for first, stop in itertools.pairwise(bounds)]
