"""Which records does a run see, and what could be reached on them at best?

Prepared records or a simulated cohort; the training patients; how long a sequence may be; the fixed evaluation sets;
and the lines that losses are read against, on exactly the masks that validation uses.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from behrt.batches import FlatSequences, MaskedSequences, cut, evaluation_set, gather
from behrt.cohort import load_cohort, simulate
from behrt.config import MAX_AUTO_POSITION, DataSettings, ExperimentSettings, UserError
from behrt.cooccurrence import TRAINING_TOKENS, Draw, measure_cooccurrence, random_part
from behrt.files import locked
from behrt.floor import Floor, exact_floor, is_known
from behrt.history import Baselines
from behrt.masking import FIXED_SEED, Stream, stream
from behrt.metrics import chance_loss, copying_loss, unigram_loss_and_accuracy, unigram_of_counts
from behrt.prepare import prepare
from behrt.prepare_options import PrepareOptions
from behrt.sequences import PreparedData, PreparedSplit, open_prepared
from behrt.spill import Progress
from behrt.vocabulary import FIRST_CODE

COUNTED_AT_ONCE = 4_096
"""Patients whose codes are in memory at once while codes are counted."""
SHORTEST_ROW = 128
"""Rows of short sequences are made this long, so that several patients share one."""


def open_records(settings: DataSettings, *, progress: Progress | None = None) -> PreparedData:
    """The prepared records that the settings name, or the simulated cohort, made on first use and kept in `data/`."""
    if settings.data is not None:
        return open_prepared(Path(settings.data))
    name = f"simulated-{settings.structure}-{settings.num_patients}-seed{settings.simulation_seed}"
    folder = Path("data") / name
    with locked(Path("data") / f".{name}.lock"):
        if not (folder / "prepared").exists():
            if progress is not None:
                progress(f"Simulating {settings.num_patients:,} patients", 0, 1)
            simulate(
                folder / "meds",
                patients=settings.num_patients,
                structure=settings.structure,
                seed=settings.simulation_seed,
                overwrite=True,
            )
            prepare(folder / "meds", folder / "prepared", PrepareOptions(), progress=progress)
    return open_prepared(folder / "prepared")


def auto_max_position(lengths: npt.NDArray[np.int32], size_default: int) -> int:
    """Positions for `--max-position auto`: the size's own number, or what 99% of the training sequences need.

    At most 512.

    >>> auto_max_position(np.array([10] * 99 + [80], dtype=np.int32), 50)
    50
    >>> auto_max_position(np.array([10] * 98 + [80] * 2, dtype=np.int32), 50)
    80
    """
    needed = int(np.quantile(lengths, 0.99, method="inverted_cdf"))
    return max(size_default, min(needed, MAX_AUTO_POSITION))


@dataclass(frozen=True)
class Records:
    """The records as this run sees them."""

    data: PreparedData
    training: PreparedSplit
    training_patients: npt.NDArray[np.int64]
    max_position: int
    train_evaluation: MaskedSequences
    validation: MaskedSequences

    @property
    def row_length(self) -> int:
        return max(self.max_position, SHORTEST_ROW)

    @property
    def truncated_share(self) -> float:
        """Share of the training tokens that a sequence of `max_position` cannot hold."""
        lengths = self.training.lengths[self.training_patients].astype(np.int64)
        return float(np.maximum(lengths - self.max_position, 0).sum() / lengths.sum())

    def baselines(self, model_vocab_size: int) -> Baselines:
        """Chance, counting, and (simulated cohorts) floor, on the very masks that validation uses.

        Takes seconds when it is first asked for: what stands together is counted over the training patients of the run.
        """
        return replace(self._baselines, chance_loss=chance_loss(model_vocab_size))

    @cached_property
    def _baselines(self) -> Baselines:
        vocab_size = len(self.data.vocabulary)
        frequencies = unigram_of_counts(self._code_counts())
        labels, shown = self.validation.labels, self.validation.shown[self.validation.scored]
        unigram_loss, unigram_accuracy = unigram_loss_and_accuracy(frequencies, labels)
        lengths = np.minimum(self.training.lengths[self.training_patients], self.max_position).astype(np.int64)
        some = self.training_patients[random_part(lengths, TRAINING_TOKENS, Draw.LOOKED_AT)]
        found = measure_cooccurrence(self._cut(some), self.validation, vocab_size)
        floor = self._floor()
        return Baselines(
            chance_loss=chance_loss(vocab_size),
            unigram_loss=unigram_loss,
            unigram_accuracy=unigram_accuracy,
            floor_loss=floor.loss if floor else None,
            floor_accuracy=floor.accuracy if floor else None,
            floor_masked_loss=floor.masked_loss if floor else None,
            copying_loss=copying_loss(frequencies, labels, shown),
            unigram_masked_loss=found.unigram_masked_loss,
            cooccurrence_masked_loss=found.masked_loss,
            cooccurrence_gain=found.gain,
            cooccurrence_gain_low=found.low,
            cooccurrence_gain_high=found.high,
        )

    def _cut(self, patients: npt.NDArray[np.int64]) -> FlatSequences:
        """The latest visits of training patients."""
        return cut(gather(self.training, patients), self.max_position)[0]

    def _code_counts(self) -> npt.NDArray[np.int64]:
        """How often each token is trained on, int64 [vocab_size]; few patients at a time are in memory."""
        counts = np.zeros(len(self.data.vocabulary), np.int64)
        for first in range(0, len(self.training_patients), COUNTED_AT_ONCE):
            codes = self._cut(self.training_patients[first : first + COUNTED_AT_ONCE]).codes
            counts += np.bincount(codes, minlength=len(counts))
        return counts

    def _floor(self) -> Floor | None:
        """The best possible prediction on the validation masks; None where it is not known."""
        if not is_known(self.data.folder, self.data.info["options"]):
            return None
        return exact_floor(
            load_cohort(self.data.folder),
            self.data.vocabulary.tokens,
            codes=self.validation.sequences.codes,
            shown=self.validation.shown,
            scored=self.validation.scored,
            visits=self.validation.sequences.visits,
            offsets=self.validation.sequences.offsets,
        )


def select_records(data: PreparedData, settings: ExperimentSettings) -> Records:
    """Which patients are trained on, how long a sequence may be, and the fixed evaluation sets.

    Raises:
        UserError: no training or no tuning patients, or none with a token that could be scored.
    """
    training, tuning = data.split("train"), data.split("tuning")
    for name, split in (("train", training), ("tuning", tuning)):
        if not len(split):
            raise UserError(f"{data.folder}: no patients in the {name} split; prepare with another --split")
        split.check(len(data.vocabulary))
    patients = np.arange(len(training))
    limit = settings.data.max_patients
    if limit is not None and limit < len(patients):
        patients = np.sort(stream(FIXED_SEED, Stream.TRAINING_SAMPLE).permutation(patients)[:limit])
    max_position = settings.model.max_position
    if max_position == "auto":
        max_position = auto_max_position(training.lengths[patients], default_max_position(settings))
    sample = patients
    if len(tuning) < len(patients):
        sample = np.sort(stream(FIXED_SEED, Stream.TRAINING_SAMPLE).permutation(patients)[: len(tuning)])
    sets = (
        evaluation_set(
            training,
            sample,
            max_position=max_position,
            vocab_size=len(data.vocabulary),
            generator=stream(FIXED_SEED, Stream.TRAINING_SAMPLE_MASKS),
        ),
        draw_validation(data, max_position),
    )
    if not all(evaluation.scored.any() for evaluation in sets):
        raise UserError(f"{data.folder}: too few tokens to score any; prepare more patients, or raise --max-patients")
    return Records(data, training, patients, max_position, *sets)


def default_max_position(settings: ExperimentSettings) -> int:
    """The positions of the model's size, before the records are looked at."""
    return settings.model.config(vocab_size=FIRST_CODE + 1).max_position


class RecordsCache:
    """The records of several runs of one process; runs that see the same ones share them, and what was counted."""

    def __init__(self) -> None:
        self._selected: dict[tuple[DataSettings, int | str, int], Records] = {}

    def select(self, settings: ExperimentSettings, *, progress: Progress | None = None) -> Records:
        """The records of a run, opened and counted when they are first asked for.

        Raises:
            UserError: see `open_records` and `select_records`.
        """
        key = (settings.data, settings.model.max_position, default_max_position(settings))
        if key not in self._selected:
            self._selected[key] = select_records(open_records(settings.data, progress=progress), settings)
        return self._selected[key]


def draw_validation(data: PreparedData, max_position: int) -> MaskedSequences:
    """All tuning patients under the validation masks: the same whenever, and by whatever run, they are drawn."""
    tuning = data.split("tuning")
    return evaluation_set(
        tuning,
        np.arange(len(tuning)),
        max_position=max_position,
        vocab_size=len(data.vocabulary),
        generator=stream(FIXED_SEED, Stream.VALIDATION_MASKS),
    )
