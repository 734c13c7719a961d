"""How does a model get from one epoch to the next?

One step function and one loop, for pre-training and fine-tuning alike: what differs between them is the loss that is
passed in. The trainer knows no tracking store and prints nothing; it yields an `EpochRecord` after each epoch.

Losses and accuracies are sums over scored items, divided once by their number. With micro-batches the divisor is the
number of scored items of the whole step, so that accumulation changes memory and nothing else. Several ranks
(`ranks.py`) share the micro-batches of a step, and sum the gradients of what is trained: the step is that of one
process.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Generic, NamedTuple, Protocol, Self, TypeVar

import torch
from torch import nn

from behrt.config import TrainingSettings
from behrt.devices import free_cached_memory, is_out_of_memory
from behrt.history import EpochRecord
from behrt.masking import Stream, torch_seed
from behrt.optimizer import AdamW
from behrt.parameters import inner_matrices
from behrt.ranks import ALONE, Ranks, RanksDiffer


class Batch(Protocol):
    """What the trainer asks of a batch."""

    @property
    def num_tokens(self) -> int: ...

    @property
    def num_scored(self) -> int: ...

    def to(self, device: torch.device) -> Self: ...

    def halves(self) -> tuple[Self, Self] | None: ...


B = TypeVar("B", bound=Batch)


class StepSource(Protocol[B]):
    """Where training steps come from; each is a list of micro-batches."""

    @property
    def steps_per_epoch(self) -> int: ...

    def epoch(self, epoch: int, first_step: int = 0, *, accumulation_steps: int | None = None) -> Iterator[list[B]]: ...


class LossSums(NamedTuple):
    """What a loss function returns for one micro-batch.

    Attributes:
        loss: float32 scalar, the *sum* of the losses over the scored items; carries the gradient.
        correct: int64 scalar, how many scored items the model's first choice gets right; None in training, where
            nobody asks, and finding out would take a tenth of a small model's step.
    """

    loss: torch.Tensor
    correct: torch.Tensor | None


class Evaluation(NamedTuple):
    """Mean loss in nats, and accuracy from 0 to 1, over the scored items of a fixed set."""

    loss: float
    accuracy: float


@dataclass(frozen=True, kw_only=True)
class Position:
    """How far a training is: inside an epoch, and what that epoch has summed up so far.

    Attributes:
        epoch: the one that is being trained, from 1.
        step: optimizer steps of it that are done.
        loss, gradient_norm: float32 sums over these steps; their exact values, so that a sum goes on to the last bit.
        tokens, scored: counts over these steps.
        training_seconds: that they took.
    """

    epoch: int = 1
    step: int = 0
    loss: float = 0.0
    gradient_norm: float = 0.0
    tokens: int = 0
    scored: int = 0
    training_seconds: float = 0.0

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.gradient_norm)


class AllOutOfMemory(Exception):
    """Memory ran out on a rank, and all of them know: they end together."""


@dataclass
class MemoryOutcome:
    """What came of something that may take more memory than there is; `error` where it did."""

    error: Exception | None = None


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


def make_optimizer(model: nn.Module, settings: TrainingSettings) -> AdamW:
    """AdamW over what is trainable; decoupled weight decay on matrices only (Loshchilov & Hutter, 2019).

    Biases and LayerNorm weights are offsets and scales: pulled to 0 they give a worse model, not a simpler one. The
    `rate` of a group is what its learning rate is multiplied by: 1 for matrices inside the network, else `table_rate`.
    AdamW's decay is multiplied with it.
    """
    inside = {id(matrix) for matrix in inner_matrices(model)}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            decay = settings.weight_decay if parameter.ndim >= 2 else 0.0
            rate = 1.0 if id(parameter) in inside else settings.table_rate
            groups.setdefault((decay, rate), []).append(parameter)
    assert groups, "nothing is trainable"
    return AdamW(
        [{"params": params, "weight_decay": decay, "rate": rate} for (decay, rate), params in groups.items()],
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
        pause: called wherever weights, optimizer and `position()` belong together: between micro-batches and between
            the batches of an evaluation. The caller may save them there, or raise to end the training.
        on_memory: called with the new number of accumulation steps where the device ran out of memory.
        ranks: the processes that train together. `steps` gives each its own micro-batches, number `rank`, `rank + size`
            and so on of a step; the evaluation sets are whole. All call `pause` at the same places: between steps
            and between rounds of an evaluation, after they have told each other their notices.

    Attributes:
        accumulation_steps: micro-batches that a step is computed in, on each rank; doubled where memory runs out.
        rate_factor: by which every learning rate of the schedule is multiplied.
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
        pause: Callable[[], None] = lambda: None,
        on_memory: Callable[[int], None] = lambda accumulation_steps: None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.model = model
        self.ranks = ranks
        self.optimizer = make_optimizer(model, settings)
        self.accumulation_steps = settings.accumulation_steps
        self.rate_factor = 1.0
        self._loss = loss
        self._steps = steps
        self._train_evaluation = train_evaluation
        self._validation = validation
        self._settings = settings
        self._device = device
        self._precision = precision
        self._on_step = on_step
        self._pause = pause
        self._on_memory = on_memory
        self._best: dict[str, torch.Tensor] = {}
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._gradients: torch.Tensor | None = None  # of `_trained`, end to end, and the loss; where ranks sum them
        self.go_on((), Position())

    def go_on(self, epochs: Sequence[EpochRecord], position: Position) -> None:
        """Counts `epochs` as trained: `epochs()` goes on at `position`, with the patience that they left.

        Model, optimizer and best weights are the caller's to put back. Everything else that a step depends on is a
        function of epoch and step.
        """
        assert position.epoch == len(epochs) + 1
        self.stopping = EarlyStopping(self._settings.early_stopping_patience, self._settings.early_stopping_min_delta)
        for record in epochs:
            self.stopping.update(record.val_loss)
        self._begin(position)

    def stand_as_first(self, epochs: Sequence[EpochRecord]) -> list[EpochRecord]:
        """Every rank stands where the first one does: weights, optimizer, schedule, position; the epochs done there."""
        if self.ranks.is_alone:
            return list(epochs)
        held = [sorted(self.optimizer.state.get(parameter, ())) for parameter in self._trained]
        own = (list(epochs), self.position(), self.accumulation_steps, self.rate_factor, held)
        done, position, self.accumulation_steps, self.rate_factor, held = self.ranks.broadcast(own)
        if not self.ranks.is_first:
            self.go_on(done, position)
            self.optimizer.state.clear()
            for parameter, names in zip(self._trained, held, strict=True):
                shapes = {name: () if name == "step" else parameter.shape for name in names}
                self.optimizer.state[parameter] = {
                    name: torch.zeros(shape, device=parameter.device) for name, shape in shapes.items()
                }
        moments = [
            self.optimizer.state[parameter][name]
            for parameter, names in zip(self._trained, held, strict=True)
            for name in names
        ]
        self.ranks.broadcast_tensors([*self.model.parameters(), *self.model.buffers(), *moments])
        return done

    def _begin(self, position: Position) -> None:
        """Stands at `position` from now on."""
        self._done = position
        # Summed on the device and read where they are needed: reading at every step would make a GPU wait for the CPU.
        self._loss_sum, self._norm_sum = (
            torch.tensor(value, dtype=torch.float32, device=self._device)
            for value in (position.loss, position.gradient_norm)
        )

    def position(self) -> Position:
        """Where the training is; the weights are those after the last step that it counts."""
        return replace(self._done, loss=self._loss_sum.item(), gradient_norm=self._norm_sum.item())

    @property
    def best_weights(self) -> dict[str, torch.Tensor]:
        """What is trained, by name, as it was after the best epoch; empty before there is one."""
        return self._best

    @best_weights.setter
    def best_weights(self, weights: dict[str, torch.Tensor]) -> None:
        self._best = weights

    def keep_as_best(self) -> None:
        """Remembers the weights as they are now: those that `restore_best` puts back."""
        self._best = {
            name: parameter.detach().to("cpu", copy=True)
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
        }

    @property
    def is_over(self) -> bool:
        """Whether the last epoch is trained, or patience is spent."""
        return self._done.epoch > self._settings.epochs or self.stopping.should_stop

    def epochs(self) -> Iterator[EpochRecord]:
        """Trains epoch by epoch until the last, until patience is spent, or until a figure is no longer finite.

        When an epoch is yielded, the position is the beginning of the next one.
        """
        while not self.is_over:
            record = self._train_epoch()
            if record.is_best and self.ranks.is_first:
                self.keep_as_best()
            self._begin(Position(epoch=record.epoch + 1))
            yield record
            if not record.is_finite:
                return

    def restore_best(self) -> None:
        """Puts the weights of the best epoch back; without a best epoch (all losses NaN) the weights stay."""
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if name in self._best:
                    parameter.copy_(self._best[name])

    def evaluate(self, batches: Sequence[B]) -> Evaluation:
        """Loss and accuracy in evaluation mode; the model is left in the mode it was in. Ranks share the batches."""
        was_training = self.model.training
        self.model.eval()
        mine, outcome = (0.0, 0.0, 0.0), MemoryOutcome()
        try:
            for first in range(0, len(batches), self.ranks.size):
                self.ranks.sums()
                self._pause()
                number = first + self.ranks.rank
                if number < len(batches) and outcome.error is None:
                    batch = batches[number]
                    with self._memory_guarded(outcome):
                        loss, correct = self._evaluate_batch(batch)
                        mine = (mine[0] + loss.item(), mine[1] + correct, mine[2] + batch.num_scored)
        finally:
            self.model.train(was_training)
        short, loss_sum, hits, scored = self.ranks.sums(outcome.error is not None, *mine)
        if short:
            raise self._no_memory(outcome)
        assert scored, "an evaluation set scores nothing"
        return Evaluation(loss=loss_sum / scored, accuracy=hits / scored)

    def _evaluate_batch(self, batch: B) -> tuple[torch.Tensor, int]:
        """Summed loss (on the CPU) and hits of one batch; in halves where it is too much for the device."""
        outcome, whole = MemoryOutcome(), []
        with self._memory_guarded(outcome), torch.inference_mode(), self._autocast():
            whole.append(self._loss(self.model, batch.to(self._device)))
        if outcome.error is None:
            loss, correct = whole[0]
            assert correct is not None, "a loss function counts hits in evaluation"
            return loss.cpu(), int(correct)
        halves = batch.halves()
        if halves is None:
            raise outcome.error
        (first_loss, first_correct), (second_loss, second_correct) = map(self._evaluate_batch, halves)
        return first_loss + second_loss, first_correct + second_correct

    def _train_epoch(self) -> EpochRecord:
        epoch, started = self._done.epoch, time.perf_counter()
        seconds_before = self._done.training_seconds
        self.model.train()
        steps = self._micro_batches()
        while self._done.step < self._steps.steps_per_epoch:
            if not self._train_step(next(steps)):
                steps = self._micro_batches()  # the same step again, in smaller parts
                continue
            self._done = replace(self._done, training_seconds=seconds_before + time.perf_counter() - started)
            self._on_step(self._done.step, self._steps.steps_per_epoch)
        done = self.position()
        if not self.ranks.is_alone and not self.ranks.same(self._fingerprint()):
            raise RanksDiffer(f"epoch {epoch}: the ranks no longer hold the same weights")
        train = self.evaluate(self._train_evaluation)
        val = self.evaluate(self._validation)
        return EpochRecord(
            epoch=epoch,
            train_loss=train.loss,
            train_accuracy=train.accuracy,
            val_loss=val.loss,
            val_accuracy=val.accuracy,
            train_loss_running=done.loss / max(1, done.scored),
            learning_rate=self._learning_rate(done.step - 1),
            gradient_norm=done.gradient_norm / self._steps.steps_per_epoch,
            tokens_per_second=done.tokens / done.training_seconds,
            epoch_seconds=seconds_before + time.perf_counter() - started,
            is_best=self.stopping.update(val.loss),
            epochs_without_improvement=self.stopping.epochs_without_improvement,
        )

    def _micro_batches(self) -> Iterator[list[B]]:
        """Those of each step that is left of the epoch."""
        return self._steps.epoch(self._done.epoch, self._done.step, accumulation_steps=self.accumulation_steps)

    def _learning_rate(self, step: int) -> float:
        """Of a step of the epoch that is being trained."""
        per_epoch = self._steps.steps_per_epoch
        number = (self._done.epoch - 1) * per_epoch + step
        return self.rate_factor * learning_rate_at(number, self._settings.epochs * per_epoch, self._settings)

    def _train_step(self, micro_batches: list[B]) -> bool:
        """One optimizer step; False where memory ran out, and the step has to be taken in more micro-batches.

        Raises:
            Exception: memory ran out, and a micro-batch is a single item already.
        """
        ranks = self.ranks
        tokens: float = sum(batch.num_tokens for batch in micro_batches)
        scored: float = sum(batch.num_scored for batch in micro_batches)
        divisor = max(1, scored) if ranks.is_alone else 1  # what other ranks score is known when all have computed
        step_loss = torch.zeros((), device=self._device)
        outcome = MemoryOutcome()
        self._pause()
        with self._memory_guarded(outcome):
            if self._gradients is None and not ranks.is_alone:
                self._gradients = torch.zeros(1 + sum(map(torch.Tensor.numel, self._trained)), device=self._device)
            for number, batch in enumerate(micro_batches):
                if number and ranks.is_alone:
                    self._pause()
                self._seed_dropout(ranks.rank + number * ranks.size)
                with self._autocast():
                    sums = self._loss(self.model, batch.to(self._device))
                (sums.loss / divisor).backward()  # type: ignore[no-untyped-call]
                step_loss += sums.loss.detach()
        reached = () if ranks.is_alone else tuple(parameter.grad is not None for parameter in self._trained)
        short, parts, tokens, scored, *reached_anywhere = ranks.sums(
            outcome.error is not None, len(micro_batches), tokens, scored, *reached
        )
        if short:
            self.optimizer.zero_grad(set_to_none=True)
            whole, patients = ranks.size * self.accumulation_steps, self._settings.batch_size
            if parts < whole or whole >= patients:
                raise self._no_memory(outcome)
            self.accumulation_steps = min(2 * self.accumulation_steps, -(-patients // ranks.size))
            self._on_memory(self.accumulation_steps)
            return False
        if not ranks.is_alone:
            step_loss = self._sum_gradients(step_loss, scored=max(1, scored), reached=reached_anywhere)
        norm = nn.utils.clip_grad_norm_(
            (parameter for parameter in self.model.parameters() if parameter.requires_grad),
            self._settings.gradient_clip,
        )
        learning_rate = self._learning_rate(self._done.step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["rate"] * learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._loss_sum += step_loss
        self._norm_sum += norm.detach()
        self._done = replace(
            self._done,
            step=self._done.step + 1,
            tokens=self._done.tokens + int(tokens),
            scored=self._done.scored + int(scored),
        )
        return True

    def _seed_dropout(self, part: int) -> None:
        """For one micro-batch of the step: whoever computes it draws the same.

        Dropout draws from torch's own generator, the only one that cannot be passed in.
        """
        place = (self._done.epoch, self._done.step, *([part] if part else []))
        torch.manual_seed(torch_seed(self._settings.seed, Stream.DROPOUT, *place))

    def _sum_gradients(self, step_loss: torch.Tensor, *, scored: float, reached: Sequence[float]) -> torch.Tensor:
        """Makes every gradient that of the whole step, over all ranks, divided by what it scores; its summed loss.

        What is trained travels end to end in one tensor. A rank without a share of the step adds zeros; a parameter
        that no rank has reached stays without a gradient.
        """
        assert self._gradients is not None
        *parts, loss = torch.split(self._gradients, [*(parameter.numel() for parameter in self._trained), 1])
        loss.copy_(step_loss)
        for parameter, part in zip(self._trained, parts, strict=True):
            if parameter.grad is None:
                part.zero_()
            else:
                part.copy_(parameter.grad.flatten())
        self.ranks.all_sum(self._gradients)
        self._gradients[:-1].div_(scored)
        for parameter, part, is_reached in zip(self._trained, parts, reached, strict=True):
            parameter.grad = part.view_as(parameter) if is_reached else None
        return loss[0]

    def _fingerprint(self) -> list[int]:
        """A number for each parameter that is trained, of all its bits; others rarely have the same by chance."""
        bits = [parameter.detach().flatten().view(torch.int32) for parameter in self._trained]
        return torch.stack([part.sum(dtype=torch.int64) for part in bits]).tolist()

    def _no_memory(self, outcome: MemoryOutcome) -> Exception:
        """What to raise where memory ran out on some rank: all of them end."""
        if self.ranks.is_alone:
            assert outcome.error is not None
            return outcome.error
        return AllOutOfMemory("memory ran out on this rank or another")

    @contextmanager
    def _memory_guarded(self, outcome: MemoryOutcome) -> Iterator[None]:
        """Notes that the device ran out of memory, and frees what the attempt had taken; passes on all else."""
        try:
            yield
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            outcome.error = error.with_traceback(None)  # its frames hold the tensors that filled the memory
            free_cached_memory(self._device)

    def _autocast(self) -> AbstractContextManager[object]:
        if self._precision is torch.float32:
            return nullcontext()
        return torch.autocast(self._device.type, dtype=self._precision)
