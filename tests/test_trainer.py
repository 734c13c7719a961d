"""Does the loop train what it should, count what it says, keep the best, and stop when it must?"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Self

import pytest
import torch
from torch import nn

from behrt.config import BEHRTConfig, TrainingSettings
from behrt.history import EpochRecord
from behrt.model import BEHRTForMaskedLM
from behrt.parameters import apply_lora_to_behrt
from behrt.trainer import EarlyStopping, LossSums, Trainer, learning_rate_at, make_optimizer


@dataclass
class Points:
    """Regression items as a batch: `[items, 3]` inputs, `[items]` targets, the first `num_scored` of them scored."""

    inputs: torch.Tensor
    targets: torch.Tensor
    num_tokens: int = 10
    num_scored: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_scored = len(self.targets)

    def to(self, device: torch.device) -> Self:
        return self

    def halves(self) -> None:
        return None


class Steps:
    def __init__(self, steps: list[list[Points]]) -> None:
        self.steps = steps
        self.steps_per_epoch = len(steps)

    def epoch(
        self, epoch: int, first_step: int = 0, *, accumulation_steps: int | None = None
    ) -> Iterator[list[Points]]:
        yield from self.steps[first_step:]


def squared_error(model: nn.Module, batch: Points) -> LossSums:
    error = model(batch.inputs).squeeze(1) - batch.targets
    return LossSums(loss=(error**2).sum(), correct=(error.abs() < 0.5).sum())


def points(count: int, seed: int) -> Points:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 3, generator=generator)
    return Points(inputs, inputs @ torch.tensor([1.0, -2.0, 0.5]) + 1)


def regression(seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(3, 1)


def trainer(
    model: nn.Module, steps: list[list[Points]], validation: Points | None = None, **settings
) -> Trainer[Points]:
    return Trainer(
        model,
        squared_error,
        steps=Steps(steps),
        train_evaluation=[points(5, 1)],
        validation=[validation or points(7, 2)],
        settings=TrainingSettings(**{"epochs": 3, "lr": 0.01, "weight_decay": 0.0, "warmup_fraction": 0, **settings}),
        device=torch.device("cpu"),
    )


def test_micro_batches_of_uneven_size_give_the_step_of_one_batch() -> None:
    whole = points(20, 0)
    cut = [Points(whole.inputs[part], whole.targets[part]) for part in (slice(0, 3), slice(3, 4), slice(4, 20))]
    models = []
    for step in ([whole], cut):
        model = regression()
        list(trainer(model, [step], gradient_clip=1e9).epochs())
        models.append(model)
    torch.testing.assert_close(models[0].weight, models[1].weight, rtol=1e-5, atol=1e-6)


def test_the_step_is_that_of_adamw_on_the_mean_loss_with_clipping() -> None:
    batch, reference = points(20, 0), regression()
    optimizer = torch.optim.AdamW(reference.parameters(), lr=0.01, weight_decay=0.0)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.mse_loss(reference(batch.inputs).squeeze(1), batch.targets).backward()
        nn.utils.clip_grad_norm_(reference.parameters(), 0.1)
        optimizer.step()
    model = regression()
    list(trainer(model, [[batch]], schedule="constant", gradient_clip=0.1).epochs())
    torch.testing.assert_close(model.weight, reference.weight)


def test_the_reported_losses_are_sums_divided_once() -> None:
    model, uneven = regression(), [points(1, 3), points(30, 4)]
    evaluation = trainer(model, [[points(4, 0)]]).evaluate(uneven)
    errors = torch.cat([model(batch.inputs).squeeze(1) - batch.targets for batch in uneven])
    assert evaluation.loss == pytest.approx((errors**2).mean().item(), rel=1e-6)
    assert evaluation.accuracy == pytest.approx((errors.abs() < 0.5).float().mean().item())
    mean_of_means = sum(squared_error(model, batch).loss.item() / batch.num_scored for batch in uneven) / 2
    assert evaluation.loss != pytest.approx(mean_of_means, rel=1e-3)  # the mistake would show


def test_evaluation_happens_without_dropout_and_leaves_the_mode() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 50), nn.Dropout(0.5), nn.Linear(50, 1)).train()
    loop = trainer(model, [[points(4, 0)]])
    assert loop.evaluate([points(50, 1)]) == loop.evaluate([points(50, 1)])
    assert model.training


def test_dropout_is_the_same_at_the_same_step_whatever_was_drawn_before() -> None:
    losses = []
    for draws_before in (0, 5):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 50), nn.Dropout(0.5), nn.Linear(50, 1))
        torch.rand(draws_before)
        losses.append([record.train_loss for record in trainer(model, [[points(8, 0)]] * 2).epochs()])
    assert losses[0] == losses[1]


def test_every_micro_batch_of_a_step_draws_its_own_dropout() -> None:
    model = nn.Sequential(nn.Linear(3, 50), nn.Dropout(0.5), nn.Linear(50, 1))
    drawn: list[torch.Tensor] = []
    model[1].register_forward_hook(lambda module, inputs, output: drawn.append(output != 0) if model.training else None)
    same = points(8, 0)
    list(trainer(model, [[same, same], [same]], epochs=1).epochs())
    assert len(drawn) == 3
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert not torch.equal(drawn[first], drawn[second])


def test_only_what_is_trainable_changes() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    model[0].requires_grad_(False)
    before = [parameter.clone() for parameter in model.parameters()]
    list(trainer(model, [[points(8, 0)]]).epochs())
    changed = [not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True)]
    assert changed == [False, False, True, True]


def test_decay_falls_on_matrices_only() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    decay_of = {
        id(parameter): group["weight_decay"]
        for group in make_optimizer(model, TrainingSettings(weight_decay=0.3)).param_groups
        for parameter in group["params"]
    }
    assert {name: decay_of[id(parameter)] for name, parameter in model.named_parameters()} == {
        "0.weight": 0.3,
        "0.bias": 0.0,
        "1.weight": 0.0,
        "1.bias": 0.0,
    }


@pytest.mark.parametrize("use_lora", [False, True])
def test_tables_decoder_and_vectors_learn_at_a_multiple_of_the_rate_of_matrices_inside(use_lora: bool) -> None:
    model = BEHRTForMaskedLM(BEHRTConfig.small(vocab_size=40))
    if use_lora:
        apply_lora_to_behrt(model, rank=4)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {
        names[id(parameter)]: group["rate"]
        for group in make_optimizer(model, TrainingSettings(table_rate=10.0)).param_groups
        for parameter in group["params"]
    }
    assert set(rates) == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert rates["behrt.embeddings.codes.weight"] == rates["head.decoder.weight"] == rates["head.dense.bias"] == 10
    assert rates["behrt.embeddings.projection.weight"] == rates["head.dense.weight"] == 1
    inside = "behrt.encoder.layers.0.attention.query." + ("lora.A" if use_lora else "weight")
    assert rates[inside] == 1


def test_a_step_moves_what_is_no_inner_matrix_as_much_further_as_its_rate_is_higher() -> None:
    moved = {}
    for rate in (1.0, 10.0):
        model = regression()
        before = model.bias.item(), model.weight.detach().clone()
        settings = {"epochs": 1, "lr": 1e-3, "schedule": "constant", "warmup_fraction": 0.0, "weight_decay": 0.0}
        list(trainer(model, [[points(8, 0)]], table_rate=rate, **settings).epochs())
        moved[rate] = abs(model.bias.item() - before[0]), (model.weight - before[1]).abs().max().item()
    assert moved[10.0][0] == pytest.approx(10 * moved[1.0][0], rel=1e-3)
    assert moved[10.0][1] == pytest.approx(moved[1.0][1], rel=1e-3)


def test_the_best_weights_come_back_and_are_not_those_of_a_later_epoch() -> None:
    # a learning rate that overshoots: validation loss falls at first, then rises
    model, snapshots, records = regression(), [], []
    loop = trainer(
        model, [[points(8, 0)]], epochs=12, lr=0.6, schedule="constant", early_stopping_patience=0, gradient_clip=1e9
    )
    for record in loop.epochs():
        records.append(record)
        snapshots.append(model.weight.detach().clone())
    best = min(records, key=lambda record: record.val_loss)
    assert best is not records[-1], "the example no longer overshoots"
    assert not torch.equal(model.weight, snapshots[best.epoch - 1])
    loop.restore_best()
    assert torch.equal(model.weight, snapshots[best.epoch - 1])
    assert [record.epoch for record in records if record.is_best][-1] == best.epoch


def test_training_stops_when_patience_is_spent() -> None:
    records = list(
        trainer(
            regression(), [[points(8, 0)]], epochs=50, early_stopping_patience=3, early_stopping_min_delta=1e6
        ).epochs()
    )
    assert [record.epochs_without_improvement for record in records] == [0, 1, 2, 3]


def test_a_smaller_gain_than_the_minimum_delta_is_no_gain() -> None:
    stopping = EarlyStopping(patience=2, min_delta=0.1)
    assert [stopping.update(loss) for loss in (1.0, 0.95, 0.85)] == [True, False, True]
    assert not EarlyStopping(patience=0).should_stop


def test_a_loss_that_is_not_finite_ends_training_and_keeps_the_best() -> None:
    class FailingSteps(Steps):
        def epoch(
            self, epoch: int, first_step: int = 0, *, accumulation_steps: int | None = None
        ) -> Iterator[list[Points]]:
            yield [points(8, 0)] if epoch < 3 else [Points(torch.full((2, 3), math.nan), torch.zeros(2))]

    model = regression()
    loop = trainer(model, [[points(8, 0)]], epochs=10)
    loop._steps = FailingSteps([[points(8, 0)]])
    records: list[EpochRecord] = list(loop.epochs())
    assert [record.is_finite for record in records] == [True, True, False]
    loop.restore_best()
    assert model.weight.isfinite().all()


def test_the_learning_rate_warms_up_to_its_peak_and_falls_towards_zero() -> None:
    settings = TrainingSettings(lr=2.0, warmup_fraction=0.1)
    rates = [learning_rate_at(step, 100, settings) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert rates[10] == 2.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[-1] < 0.01
    constant = TrainingSettings(lr=2.0, warmup_fraction=0, schedule="constant")
    assert {learning_rate_at(step, 100, constant) for step in range(100)} == {2.0}


def test_the_record_speaks_of_the_epoch() -> None:
    model = regression()
    (record,) = trainer(model, [[points(8, 0)], [points(8, 5)]], epochs=1, schedule="linear").epochs()
    assert record.epoch == 1
    assert record.learning_rate == pytest.approx(0.005)  # the second of two steps
    assert record.gradient_norm > 0
    assert record.tokens_per_second > 0
    assert record.epoch_seconds > 0
