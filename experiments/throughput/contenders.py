"""How long does each contender take for the same training steps?

A contender trains a few steps a turn; the turns of all of them alternate in one process, so that what disturbs the
machine disturbs them alike. `behrt` is timed through its own `Trainer`, step for step what `behrt train` does; the
peers by the loop that their users write. The clock of a turn runs from the call until the last optimizer step is done.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import peers
import torch
from flops import Work, training_flops
from torch import Tensor, nn

from behrt.batches import TrainingBatches
from behrt.config import BEHRTConfig, ExperimentSettings
from behrt.devices import choose_precision
from behrt.model import compile_layers
from behrt.pretrain import build_model, masked_lm_loss
from behrt.records import Records
from behrt.trainer import LossSums, StepSource, Trainer

GRADIENT_CLIP = 1.0
PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Turn:
    """What came of the steps of one turn.

    Attributes:
        seconds: of all of them.
        waiting: seconds of these between the end of a step and the beginning of the next one's forward: the input.
        tokens, scored: what they were about, by the contender's own count.
    """

    seconds: float
    waiting: float
    tokens: int
    scored: int


def synchronised(device: torch.device) -> float:
    """The time when the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class FirstSteps:
    """The first `steps_per_epoch` steps of each epoch of another source; keeps count of what it gave away."""

    def __init__(self, source: StepSource[Any]) -> None:
        self._source = source
        self.steps_per_epoch = 0
        self.given: list[Any] = []

    def epoch(self, epoch: int, first_step: int = 0, *, accumulation_steps: int | None = None) -> Iterator[list[Any]]:
        batches = self._source.epoch(epoch, first_step, accumulation_steps=accumulation_steps)
        try:
            for _ in range(first_step, self.steps_per_epoch):
                micro_batches = next(batches)
                self.given += micro_batches
                yield micro_batches
        finally:  # what it has assembled ahead for free, the next turn must not find
            close = getattr(batches, "close", None)
            if close is not None:
                close()


class Clock:
    """Of one turn after the other."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def begin(self) -> None:
        self._began = self._last = synchronised(self._device)
        self.waiting = 0.0
        self._is_computing = False

    def computing(self) -> None:
        """The forward of a step begins."""
        if not self._is_computing:
            self.waiting += time.perf_counter() - self._last
            self._is_computing = True

    def step_done(self, step: int, steps: int) -> None:
        self._last = synchronised(self._device) if step == steps else time.perf_counter()
        self._is_computing = False

    @property
    def seconds(self) -> float:
        return self._last - self._began


class Contender(Protocol):
    """Trains so many steps when it is its turn; every turn is of another epoch, the same one for all.

    Attributes:
        precision: of its matrix products, `bf16` or `fp32`.
    """

    precision: str

    def turn(self, steps: int) -> Turn: ...

    def flops(self, work: Work) -> int: ...


class Own:
    """`behrt` as `behrt train` trains it.

    Args:
        validation: evaluated after every turn. Where it is given, the training has the schedule and the end of its
            settings; without it, only the clock ends the training, and next to nothing is evaluated.

    Attributes:
        val_loss: of the latest turn.
    """

    def __init__(
        self,
        settings: ExperimentSettings,
        records: Records,
        device: torch.device,
        *,
        validation: Sequence[Any] | None = None,
    ) -> None:
        precision = choose_precision(settings.training.precision, device)
        self.precision = next(name for name, dtype in PRECISIONS.items() if dtype is precision)
        model, _, _ = build_model(settings, records)
        self._config, self._adaptation = model.config, settings.adaptation
        batches = own_batches(settings, records)
        self._steps = FirstSteps(batches)
        self._clock = Clock(device)
        if settings.training.compile:
            compile_layers(model)
        few = next(batches.epoch(0))[:1]
        training = settings.training if validation else settings.training.model_copy(update=ENDLESS)
        self._trainer = Trainer(
            model.to(device),
            self._loss,
            steps=self._steps,
            train_evaluation=few,
            validation=validation or few,
            settings=training,
            device=device,
            precision=precision,
            on_step=self._clock.step_done,
        )
        self._epochs = self._trainer.epochs()

    def _loss(self, model: nn.Module, batch: Any) -> LossSums:
        self._clock.computing()
        return masked_lm_loss(model, batch)

    def turn(self, steps: int) -> Turn:
        self._steps.given.clear()
        self._steps.steps_per_epoch = steps
        self._clock.begin()
        self.val_loss = next(self._epochs).val_loss
        return turn_of(self._clock, self._steps)

    def flops(self, work: Work) -> int:
        rank = self._adaptation.lora_rank if self._adaptation.use_lora else None
        return training_flops(self._config, work, lora_rank=rank, adapted=len(self._adaptation.lora_targets))


ENDLESS = {"epochs": 1_000_000, "early_stopping_patience": 0, "schedule": "constant", "warmup_fraction": 0.0}
"""Of a training that only the clock ends."""


def own_batches(settings: ExperimentSettings, records: Records) -> TrainingBatches:
    """The steps of `behrt train`."""
    return TrainingBatches(
        records.training,
        records.training_patients,
        batch_size=settings.training.batch_size,
        max_position=records.max_position,
        row_length=records.row_length,
        vocab_size=len(records.data.vocabulary),
        mlm_probability=settings.training.mlm_probability,
        seed=settings.training.seed,
    )


def padded_batches(settings: ExperimentSettings, records: Records, *, full_length: bool) -> peers.PaddedBatches:
    """The same steps for a peer."""
    return peers.PaddedBatches(
        records.training,
        records.training_patients,
        batch_size=settings.training.batch_size,
        max_position=records.max_position,
        vocab_size=len(records.data.vocabulary),
        seed=settings.training.seed,
        mlm_probability=settings.training.mlm_probability,
        length=records.max_position if full_length else None,
    )


def turn_of(clock: Clock, steps: FirstSteps) -> Turn:
    return Turn(
        seconds=clock.seconds,
        waiting=clock.waiting,
        tokens=sum(batch.num_tokens for batch in steps.given),
        scored=sum(batch.num_scored for batch in steps.given),
    )


class Peer:
    """A peer, and the loop that its user writes: autocast or not, AdamW as it comes, gradients clipped to 1.

    Args:
        kind: `hf` or `guide`.
        precision: `bf16` is by autocast.
        learning_rate: of a step, counted from 0; None is a constant 1e-4.
    """

    def __init__(
        self,
        kind: str,
        settings: ExperimentSettings,
        records: Records,
        device: torch.device,
        *,
        precision: str,
        learning_rate: Callable[[int], float] | None = None,
    ) -> None:
        self.precision, self._kind, self._device = precision, kind, device
        self._lora = settings.adaptation.use_lora
        self._config = config_of(settings, records)
        with torch.random.fork_rng():
            torch.manual_seed(settings.training.seed)
            make = peers.hugging_face if kind == "hf" else peers.guide
            self.model = make(self._config, lora=self._lora).to(device)
        self._loss = peers.hugging_face_loss if kind == "hf" else peers.guide_loss
        self._sums = peers.hugging_face_sums if kind == "hf" else peers.guide_sums
        self._trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(self._trained, lr=1e-4)
        self._learning_rate = learning_rate or (lambda step: 1e-4)
        self._steps = FirstSteps(padded_batches(settings, records, full_length=kind == "guide"))
        self._clock = Clock(device)
        self._epoch = self._done = 0

    def turn(self, steps: int) -> Turn:
        self._epoch += 1
        self._steps.given.clear()
        self._steps.steps_per_epoch = steps
        self.model.train()
        self._clock.begin()
        for step, (batch,) in enumerate(self._steps.epoch(self._epoch), start=1):
            batch = batch.to(self._device)
            self._clock.computing()
            self._train(batch)
            self._clock.step_done(step, steps)
        return turn_of(self._clock, self._steps)

    def _train(self, batch: peers.PaddedBatch) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = self._learning_rate(self._done)
        self._optimizer.zero_grad()
        with self._autocast():
            loss: Tensor = self._loss(self.model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self._trained, GRADIENT_CLIP)
        self._optimizer.step()
        self._done += 1

    def evaluate(self, batches: list[peers.PaddedBatch]) -> float:
        """Mean loss over the scored tokens of all batches."""
        self.model.eval()
        with torch.inference_mode(), self._autocast():
            loss = sum(float(self._sums(self.model, batch.to(self._device)).loss) for batch in batches)
        return loss / sum(batch.num_scored for batch in batches)

    def flops(self, work: Work) -> int:
        rank = peers.LORA_RANK if self._lora else None
        adapted = 4 if self._kind == "hf" else 0  # the guide's adapters do not act
        return training_flops(self._config, work, lora_rank=rank, adapted=adapted, projected=self._kind == "guide")

    def _autocast(self) -> Any:
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self._device.type, dtype=torch.bfloat16)


def config_of(settings: ExperimentSettings, records: Records) -> BEHRTConfig:
    """The shape that `build_model` gives `behrt`."""
    return settings.model.config(vocab_size=len(records.data.vocabulary), max_position=records.max_position)


NAMES = ("behrt", "hf-bf16", "hf-fp32", "guide")
"""Of the contenders, in the order of their turns."""


def make_contender(name: str, settings: ExperimentSettings, records: Records, device: torch.device) -> Contender:
    if name == "behrt":
        return Own(settings, records, device)
    kind, _, precision = name.partition("-")
    return Peer(kind, settings, records, device, precision=precision or "fp32")


def work_of(settings: ExperimentSettings, records: Records, epoch: int, steps: int) -> Work:
    """What the first steps of an epoch are about, by the arithmetic of the peers."""
    first = FirstSteps(padded_batches(settings, records, full_length=False))
    first.steps_per_epoch = steps
    batches = [batch for (batch,) in first.epoch(epoch)]
    return Work(
        tokens=sum(batch.num_tokens for batch in batches),
        scored=sum(batch.num_scored for batch in batches),
        squared_lengths=sum(batch.squared_lengths for batch in batches),
    )


def matrix_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Operations per second of products of large square matrices: what this machine reaches at best."""
    size, repeats = (8192, 10) if device.type == "cuda" else (2048, 2)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    left @ right
    began = synchronised(device)
    for _ in range(repeats):
        left @ right
    return 2 * size**3 * repeats / (synchronised(device) - began)
