"""Of how many patients does a step compute fastest on this machine, and of how many at most (`--batch-size auto`)?

Steps of 8, 16, 32 … patients are trained for real, by the trainer, on a model that nobody keeps. More are not tried
where memory ends, where more have stopped being faster, and where an epoch would have fewer than 20 steps: the learning
rate of a run is made for a number of updates, and few large ones learn slowly however fast they are computed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from behrt.config import ExperimentSettings, UserError
from behrt.devices import choose_precision, free_cached_memory, is_out_of_memory, seconds_when_done
from behrt.doctor.preflight import probe
from behrt.doctor.setup_symptoms import FULL_MEMORY
from behrt.model import BEHRTForMaskedLM
from behrt.pretrain import EVALUATED_AT_ONCE, build_model, masked_lm_loss, training_batches
from behrt.records import Records, RecordsCache
from behrt.spill import Progress
from behrt.trainer import Position, Trainer

SMALLEST = 8
FEWEST_STEPS = 20
"""In an epoch. The guide's own choice for 5,000 patients and an A40, 128 patients a step (Starting Points), has 28."""
AS_FAST = 0.9
"""Of the fastest: the smallest batch that is so fast is taken, since it has the most updates."""
MOST_STEPS = 16
SECONDS_OF_STEPS = 1.0
"""Steps are trained for so long, or so many of them, and then once more and timed: by then each kernel that they need
is there. In lower precision oneDNN compiles one for each shape, and small batches come in many."""


@dataclass(frozen=True)
class BatchTiming:
    """What became of steps of `patients`.

    Attributes:
        patients_per_second: None where memory ran out, or would have.
        memory_needed: bytes at the peak of such a training, as the pre-flight predicts them; None if not known.
    """

    patients: int
    patients_per_second: float | None
    memory_needed: int | None


@dataclass(frozen=True)
class BatchChoice:
    """
    Attributes:
        batch_size: patients a step, on all ranks together.
        timings: by patients a step on one rank, rising; empty where there is nothing to choose.
        most: patients a step on one rank up to which an epoch has enough steps.
        memory_available: bytes on the device; None where the system does not say.
    """

    batch_size: int
    timings: tuple[BatchTiming, ...]
    most: int
    memory_available: int | None


def choose_batch_size(
    settings: ExperimentSettings,
    records_cache: RecordsCache,
    device: torch.device,
    *,
    ranks: int = 1,
    progress: Progress | None = None,
) -> BatchChoice:
    """Measures with this process alone; several ranks have as many patients each.

    Raises:
        UserError: settings that make no model, or of which not even the smallest step fits.
    """
    precision = choose_precision(settings.training.precision, device)
    records = records_cache.select(settings, progress=progress)
    most = largest_worth_trying(len(records.training_patients), ranks)
    sizes = doubling(most)
    if len(sizes) == 1:
        return BatchChoice(SMALLEST * ranks, (), most, None)
    model, _, _ = build_model(settings, records)
    timings: list[BatchTiming] = []
    available: int | None = None
    for number, patients in enumerate(sizes):
        if progress is not None:
            progress(f"Timing steps of {patients} patients", number, len(sizes))
        timing, available = time_steps(
            model, settings, records, patients, device=device, precision=precision, ranks=ranks
        )
        timings.append(timing)
        if timing.patients_per_second is None or has_peaked(timings):
            break
    if progress is not None:
        progress("Timing steps", 1, 1)
    return BatchChoice(fastest(timings) * ranks, tuple(timings), most, available)


def largest_worth_trying(patients: int, ranks: int) -> int:
    """
    >>> largest_worth_trying(3_500, 1), largest_worth_trying(3_500, 8), largest_worth_trying(40, 1)
    (175, 21, 8)
    """
    return max(SMALLEST, patients // (FEWEST_STEPS * ranks))


def doubling(most: int) -> list[int]:
    """
    >>> doubling(175)
    [8, 16, 32, 64, 128]
    """
    return [SMALLEST << power for power in range((most // SMALLEST).bit_length())]


def has_peaked(timings: Sequence[BatchTiming]) -> bool:
    """Whether the last two are slower than one before them: larger steps outgrow the caches, and do not come back."""
    rates = [timing.patients_per_second or 0.0 for timing in timings]
    return len(rates) > 2 and max(rates[-2:]) < AS_FAST * max(rates[:-2])


def fastest(timings: Sequence[BatchTiming]) -> int:
    """The smallest number of patients that is about as fast as any.

    Raises:
        UserError: none fits.
    """
    rates = {
        timing.patients: timing.patients_per_second for timing in timings if timing.patients_per_second is not None
    }
    if not rates:
        raise UserError(
            f"--batch-size: a step of {SMALLEST} patients does not fit in memory; try --max-position 128, or a smaller "
            "--model-size"
        )
    return min(patients for patients, rate in rates.items() if rate >= AS_FAST * max(rates.values()))


class _Enough(Exception):
    """Steps enough have been timed."""


class _Clock:
    """Ends a training after some steps, and knows how long they took."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._most = MOST_STEPS
        self._limit = SECONDS_OF_STEPS
        self._began = 0.0
        self.steps = 0
        self.seconds = 0.0

    def start(self) -> None:
        """Begins to count; the second time, for as many steps as the first time."""
        if self.steps:
            self._most, self._limit = self.steps, math.inf
        self._began = seconds_when_done(self._device)

    def step(self, step: int, steps: int) -> None:
        seconds = seconds_when_done(self._device) - self._began
        if step >= self._most or seconds > self._limit or step == steps:
            self.steps, self.seconds = step, seconds
            raise _Enough

    def no_room(self, accumulation_steps: int) -> None:
        raise torch.OutOfMemoryError("out of memory")


def time_steps(
    model: BEHRTForMaskedLM,
    settings: ExperimentSettings,
    records: Records,
    patients: int,
    *,
    device: torch.device,
    precision: torch.dtype,
    ranks: int,
) -> tuple[BatchTiming, int | None]:
    """Trains `model` for some steps of so many patients; what came of it, and the bytes that are there for it.

    On the CPU a step that is predicted to need nearly all memory is not tried: there the system ends the process.
    """
    training = settings.training.model_copy(update={"batch_size": patients, "accumulation_steps": 1})
    steps = training_batches(records, training)
    facts: dict[str, Any] = {}
    rate: float | None = None
    clock = _Clock(device)
    try:
        model.to(device)
        facts = probe(
            model,
            masked_lm_loss,
            steps=steps,
            train_evaluation=(),
            validation=records.validation.packed(EVALUATED_AT_ONCE, records.row_length),
            adaptation=settings.adaptation,
            device=device,
            precision=precision,
            ranks=ranks,
        )
        if fits(facts, device):
            trainer = Trainer(
                model,
                masked_lm_loss,
                steps=steps,
                train_evaluation=(),
                validation=(),
                device=device,
                precision=precision,
                settings=training,
                on_step=clock.step,
                on_memory=clock.no_room,
            )
            for _ in ("to compile", "to time"):
                trainer.go_on((), Position())
                clock.start()
                with suppress(_Enough):
                    next(trainer.epochs())
            rate = patients * clock.steps / clock.seconds
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    finally:
        free_cached_memory(device)
    return BatchTiming(patients, rate, facts.get("memory_needed")), facts.get("memory_available")


def fits(facts: dict[str, Any], device: torch.device) -> bool:
    """Whether a step is to be tried, by what the pre-flight says of it."""
    needed, available = facts.get("memory_needed"), facts["memory_available"]
    is_known = device.type != "cuda" and needed is not None and available is not None
    return not facts.get("out_of_memory") and not (is_known and needed > FULL_MEMORY * available)
