"""How does a model get from one epoch to the next?

One step function and one loop, for pre-training and fine-tuning alike: what differs between them is the loss that is
passed in. The trainer knows no tracking store and prints nothing; it yields an `EpochRecord` after each epoch.

Losses and accuracies are sums over scored items, divided once by their number. With micro-batches the divisor is the
number of scored items of the whole step, so that accumulation changes memory and nothing else.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Generic, NamedTuple, Protocol, Self, TypeVar

import torch
from torch import nn

from behrt.config import TrainingSettings
from behrt.history import EpochRecord
from behrt.masking import Stream, torch_seed


class Batch(Protocol):
    """What the trainer asks of a batch."""

    @property
    def num_tokens(self) -> int: ...

    @property
    def num_scored(self) -> int: ...

    def to(self, device: torch.device) -> Self: ...


B = TypeVar("B", bound=Batch)


class StepSource(Protocol[B]):
    """Where training steps come from; each is a list of micro-batches."""

    @property
    def steps_per_epoch(self) -> int: ...

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[list[B]]: ...


class LossSums(NamedTuple):
    """What a loss function returns for one micro-batch.

    Attributes:
        loss: float32 scalar, the *sum* of the losses over the scored items; carries the gradient.
        correct: int64 scalar, how many scored items the model's first choice gets right.
    """

    loss: torch.Tensor
    correct: torch.Tensor


class Evaluation(NamedTuple):
    """Mean loss in nats, and accuracy from 0 to 1, over the scored items of a fixed set."""

    loss: float
    accuracy: float


class EarlyStopping:
    """Stops when `val_loss` has not fallen by more than `min_delta` for `patience` epochs (Prechelt, 1998).

    >>> stopping = EarlyStopping(patience=2)
    >>> [(stopping.update(loss), stopping.should_stop) for loss in (3.0, 3.1, 2.9, 2.9, 3.0)]
    [(True, False), (False, False), (True, False), (False, False), (False, True)]
    """

    def __init__(self, patience: int, min_delta: float = 0.0) -> None:
        self.patience = patience
        self.min_delta = min_delta
        self.best = math.inf
        self.epochs_without_improvement = 0

    def update(self, val_loss: float) -> bool:
        """Takes the figure of one epoch; True if it is the best so far. NaN never is."""
        if val_loss < self.best - self.min_delta:
            self.best = val_loss
            self.epochs_without_improvement = 0
            return True
        self.epochs_without_improvement += 1
        return False

    @property
    def should_stop(self) -> bool:
        return self.patience > 0 and self.epochs_without_improvement >= self.patience


def learning_rate_at(step: int, total_steps: int, settings: TrainingSettings) -> float:
    """The learning rate of a step, counted from 0: a linear warm-up to `lr`, then a decay that ends at 0.

    >>> settings = TrainingSettings(lr=1.0, warmup_fraction=0.5, schedule="linear")
    >>> [learning_rate_at(step, 4, settings) for step in range(4)]
    [0.5, 1.0, 1.0, 0.5]
    """
    warmup_steps = int(settings.warmup_fraction * total_steps)
    if step < warmup_steps:
        return settings.lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if settings.schedule == "cosine":
        return settings.lr * 0.5 * (1 + math.cos(math.pi * progress))
    if settings.schedule == "linear":
        return settings.lr * (1 - progress)
    return settings.lr


def make_optimizer(model: nn.Module, settings: TrainingSettings) -> torch.optim.AdamW:
    """AdamW over what is trainable; decoupled weight decay on matrices only (Loshchilov & Hutter, 2019).

    Biases and LayerNorm weights are offsets and scales: pulled to 0 they give a worse model, not a simpler one.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trainable, "nothing is trainable"
    matrices = [parameter for parameter in trainable if parameter.ndim >= 2]
    vectors = [parameter for parameter in trainable if parameter.ndim < 2]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=settings.lr,
        fused=True,
    )


class Trainer(Generic[B]):
    """Trains `model` in place; iterate over `epochs()`.

    Args:
        model: on `device` already, its trainability set.
        loss: the sums of one micro-batch; called under autocast where `precision` is bf16.
        steps: the training steps.
        train_evaluation, validation: what both are evaluated on, the same at every epoch.
        precision: dtype of the matrix products (`devices.choose_precision`).
        on_step: called with (step, steps_per_epoch) after each optimizer step.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[nn.Module, B], LossSums],
        *,
        steps: StepSource[B],
        train_evaluation: Sequence[B],
        validation: Sequence[B],
        settings: TrainingSettings,
        device: torch.device,
        precision: torch.dtype = torch.float32,
        on_step: Callable[[int, int], None] = lambda step, steps: None,
    ) -> None:
        self.model = model
        self.stopping = EarlyStopping(settings.early_stopping_patience, settings.early_stopping_min_delta)
        self.optimizer = make_optimizer(model, settings)
        self._loss = loss
        self._steps = steps
        self._train_evaluation = train_evaluation
        self._validation = validation
        self._settings = settings
        self._device = device
        self._precision = precision
        self._on_step = on_step
        self._best: dict[str, torch.Tensor] = {}
        self._epochs_done = 0

    def keep_as_best(self) -> None:
        """Remembers the weights as they are now: those that `restore_best` puts back."""
        self._best = {
            name: parameter.detach().to("cpu", copy=True)
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
        }

    def go_on_after(self, epochs: Sequence[EpochRecord]) -> None:
        """Counts `epochs` as trained: `epochs()` goes on behind them, with the patience that they left.

        Model, optimizer and best weights (`keep_as_best`) are the caller's to put back. Everything else that an epoch
        depends on is a function of its number.
        """
        self._epochs_done = len(epochs)
        for record in epochs:
            self.stopping.update(record.val_loss)

    @property
    def is_over(self) -> bool:
        """Whether the last epoch is trained, or patience is spent."""
        return self._epochs_done >= self._settings.epochs or self.stopping.should_stop

    def epochs(self) -> Iterator[EpochRecord]:
        """Trains epoch by epoch until the last, until patience is spent, or until a figure is no longer finite."""
        while not self.is_over:
            record = self._train_epoch(self._epochs_done + 1)
            if record.is_best:
                self.keep_as_best()
            self._epochs_done += 1
            yield record
            if not record.is_finite:
                return

    def restore_best(self) -> None:
        """Puts the weights of the best epoch back; without a best epoch (all losses NaN) the weights stay."""
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if name in self._best:
                    parameter.copy_(self._best[name])

    def evaluate(self, batches: Iterable[B]) -> Evaluation:
        """Loss and accuracy in evaluation mode; the model is left in the mode it was in."""
        was_training = self.model.training
        self.model.eval()
        loss, correct = (torch.zeros((), dtype=torch.float64) for _ in range(2))
        scored = 0
        with torch.inference_mode(), self._autocast():
            for batch in batches:
                sums = self._loss(self.model, batch.to(self._device))
                loss += sums.loss.cpu()
                correct += sums.correct.cpu()
                scored += batch.num_scored
        self.model.train(was_training)
        assert scored, "an evaluation set scores nothing"
        return Evaluation(loss=loss.item() / scored, accuracy=correct.item() / scored)

    def _train_epoch(self, epoch: int) -> EpochRecord:
        started = time.perf_counter()
        total_steps = self._settings.epochs * self._steps.steps_per_epoch
        learning_rate = 0.0
        # Summed on the device and read once an epoch: reading at every step would make a GPU wait for the CPU.
        loss, norms = (torch.zeros((), device=self._device) for _ in range(2))
        tokens = scored = 0
        self.model.train()
        for step, micro_batches in enumerate(self._steps.epoch(epoch)):
            # dropout draws from torch's own generator, the only one that cannot be passed in
            torch.manual_seed(torch_seed(self._settings.seed, Stream.DROPOUT, epoch, step))
            learning_rate = learning_rate_at(
                (epoch - 1) * self._steps.steps_per_epoch + step, total_steps, self._settings
            )
            step_loss, norm = self._train_step(micro_batches, learning_rate)
            loss += step_loss
            norms += norm
            tokens += sum(batch.num_tokens for batch in micro_batches)
            scored += sum(batch.num_scored for batch in micro_batches)
            self._on_step(step + 1, self._steps.steps_per_epoch)
        running = loss.item() / max(1, scored)
        training_seconds = time.perf_counter() - started
        train = self.evaluate(self._train_evaluation)
        val = self.evaluate(self._validation)
        return EpochRecord(
            epoch=epoch,
            train_loss=train.loss,
            train_accuracy=train.accuracy,
            val_loss=val.loss,
            val_accuracy=val.accuracy,
            train_loss_running=running,
            learning_rate=learning_rate,
            gradient_norm=norms.item() / self._steps.steps_per_epoch,
            tokens_per_second=tokens / training_seconds,
            epoch_seconds=time.perf_counter() - started,
            is_best=self.stopping.update(val.loss),
            epochs_without_improvement=self.stopping.epochs_without_improvement,
        )

    def _train_step(self, micro_batches: list[B], learning_rate: float) -> tuple[torch.Tensor, torch.Tensor]:
        """One optimizer step; the summed loss and the gradient's norm before clipping, both still on the device."""
        scored = max(1, sum(batch.num_scored for batch in micro_batches))
        step_loss = torch.zeros((), device=self._device)
        for batch in micro_batches:
            with self._autocast():
                sums = self._loss(self.model, batch.to(self._device))
            (sums.loss / scored).backward()  # type: ignore[no-untyped-call]
            step_loss += sums.loss.detach()
        norm = nn.utils.clip_grad_norm_(
            (parameter for parameter in self.model.parameters() if parameter.requires_grad),
            self._settings.gradient_clip,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return step_loss, norm.detach()

    def _autocast(self) -> AbstractContextManager[object]:
        if self._precision is torch.float32:
            return nullcontext()
        return torch.autocast(self._device.type, dtype=self._precision)
