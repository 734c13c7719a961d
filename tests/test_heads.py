"""Are a patient's vector, and the losses of tasks, what their definitions say?"""

import math

import numpy as np
import pytest
import torch
from scipy.special import expit

from behrt.concordance import harrell_c
from behrt.config import BEHRTConfig
from behrt.model import BEHRT
from behrt.tasks.finetuned import TaskDescription
from behrt.tasks.heads import (
    BEHRTForTask,
    balanced_weights,
    binary_loss,
    hazard_log_odds,
    interval_edges,
    pool,
    risk,
    survival_curve,
    survival_hits,
    survival_loss,
)


def test_the_vector_is_the_mean_of_all_tokens_beside_that_of_the_latest_visit() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, 4, generator=generator)
    owners, visits = torch.tensor([1, 1, 0, 0, 0, 2, 1, 1, 2]), torch.tensor([0, 1, 0, 1, 3, 2, 1, 2, 2])
    found = pool(hidden, owners, visits, 3)
    for patient in range(3):
        tokens = [token for token in range(9) if owners[token] == patient]
        latest = max(int(visits[token]) for token in tokens)
        recent = [token for token in tokens if visits[token] == latest]
        expected = torch.cat([hidden[tokens].mean(dim=0), hidden[recent].mean(dim=0)])
        torch.testing.assert_close(found[patient], expected)


def test_labels_that_are_not_known_have_no_part_in_loss_and_gradient() -> None:
    logits = torch.tensor([[0.3, -1.0], [2.0, 0.5]], requires_grad=True)
    targets = torch.tensor([[1.0, math.nan], [0.0, 1.0]])
    loss = binary_loss(logits, targets)
    probabilities = expit(np.array([0.3, 2.0, 0.5]))
    expected = -math.log(probabilities[0]) - math.log(1 - probabilities[1]) - math.log(probabilities[2])
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    loss.backward()
    assert logits.grad is not None
    assert logits.grad[0, 1] == 0
    assert torch.isfinite(logits.grad).all()


def test_balanced_weights_give_true_and_false_labels_the_same_part() -> None:
    targets = np.array([[1, 0], [0, 0], [0, np.nan], [0, 0], [0, 0]], np.float32)
    weights = balanced_weights(targets)
    true, false = (targets == 1).sum(axis=0), (targets == 0).sum(axis=0)
    assert weights[1, 0] * true[0] == pytest.approx(weights[0, 0] * false[0])
    assert weights[1, 0] * true[0] + weights[0, 0] * false[0] == pytest.approx(5)
    assert weights[:, 1].tolist() == [1, 1]  # labels of one kind only


def test_probabilities_are_those_of_the_labels_whatever_the_weights() -> None:
    """The best constant under weights is not the share; the probability that is told is."""
    targets = torch.tensor([[1.0]] * 2 + [[0.0]] * 14)
    weights = balanced_weights(targets.numpy())
    score = torch.zeros(1, 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([score], line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = binary_loss(score.expand(16, 1), targets, torch.tensor(weights, dtype=torch.float32))
        loss.backward()
        return loss

    optimizer.step(closure)
    rows = tuple(map(tuple, weights.tolist()))
    task = TaskDescription(name="t", kind="binary", names=("outcome",), weights=rows)
    assert torch.sigmoid(score).item() == pytest.approx(0.5, abs=1e-3)
    assert task.probabilities(score.detach()).item() == pytest.approx(2 / 16, abs=1e-3)


EDGES = [10.0, 20.0, 50.0]


@pytest.mark.parametrize(
    ("day", "event", "survived", "died"),
    [
        (5, True, [], 0), (10, True, [], 0), (10.5, True, [0], 1), (50, True, [0, 1], 2), (60, True, [0, 1, 2], None),
        (4, False, [], None), (5, False, [0], None), (14, False, [0], None), (15, False, [0, 1], None),
        (34, False, [0, 1], None), (99, False, [0, 1, 2], None), (0, True, [], 0), (0, False, [], None),
    ],
)  # fmt: skip
def test_the_likelihood_is_the_product_over_the_intervals(
    day: float, event: bool, survived: list[int], died: int | None
) -> None:
    logits = [-1.0, 0.5, 2.0]
    likelihood = 1.0
    for interval in survived:
        likelihood *= 1 - expit(logits[interval])
    if died is not None:
        likelihood *= expit(logits[died])
    found = survival_loss(
        torch.tensor([logits]), torch.tensor([float(day)]), torch.tensor([event]), torch.tensor(EDGES)
    )
    assert found.item() == pytest.approx(-math.log(likelihood), rel=1e-5, abs=1e-7)


def test_a_survival_curve_is_the_product_of_what_is_survived() -> None:
    curve = survival_curve(torch.tensor([[-1.0, 0.5]])).tolist()[0]
    assert curve == pytest.approx([1 - expit(-1.0), (1 - expit(-1.0)) * (1 - expit(0.5))])


def test_the_risk_orders_patients_as_their_hazards_do() -> None:
    generator = np.random.default_rng(0)
    hazards = generator.uniform(0.02, 0.6, size=400)
    days = np.ceil(generator.exponential(10 / hazards))
    logits = torch.logit(torch.tensor(hazards))[:, None].expand(-1, 3)
    events = np.ones(400, np.bool_)
    assert harrell_c(events, days, risk(logits).numpy()) == pytest.approx(harrell_c(events, days, hazards))


def test_intervals_hold_about_as_many_events_each() -> None:
    generator = np.random.default_rng(0)
    days = generator.exponential(100, size=1000).astype(np.float32)
    events = generator.random(1000) < 0.3
    edges = interval_edges(days, events)
    counts, _ = np.histogram(days[events], [0.0, *(edge + 1e-3 for edge in edges)])
    assert len(edges) == 10
    assert np.abs(counts - events.sum() / 10).max() <= 3  # days are whole ones
    assert all(edge == int(edge) for edge in edges)
    assert interval_edges(np.repeat([3, 3, 7], 20).astype(np.float32), np.ones(60, np.bool_)) == [3.0, 7.0]


def test_no_interval_is_that_of_a_few_patients() -> None:
    days = np.arange(1, 33, dtype=np.float32)
    assert interval_edges(days, np.ones(32, np.bool_)) == [16.0, 32.0]
    assert interval_edges(days[:3], np.ones(3, np.bool_)) == [3.0]


def test_the_first_hazards_are_the_best_that_are_the_same_for_everybody() -> None:
    generator = np.random.default_rng(1)
    days = generator.exponential(100, size=500).astype(np.float32)
    events = generator.random(500) < 0.4
    edges = interval_edges(days, events)
    asked = torch.from_numpy(days), torch.from_numpy(events), torch.tensor(edges)
    best = torch.tensor(hazard_log_odds(days, events, edges))
    at_best = survival_loss(best.expand(500, -1), *asked).item()
    for interval in range(len(edges)):
        for step in (-0.1, 0.1):
            other = best.clone()
            other[interval] += step
            assert survival_loss(other.expand(500, -1), *asked).item() > at_best


def test_a_hit_is_the_fate_that_was_held_likelier() -> None:
    sure_to_die, sure_to_live = torch.full((1, 3), 5.0), torch.full((1, 3), -5.0)
    asked = torch.tensor([15.0]), torch.tensor(EDGES)
    for event, logits, hits in ((True, sure_to_die, 1), (True, sure_to_live, 0), (False, sure_to_live, 1)):
        assert survival_hits(logits, asked[0], torch.tensor([event]), asked[1]).item() == hits


def test_a_head_begins_near_the_scores_that_it_is_given() -> None:
    model = BEHRTForTask(BEHRT(BEHRTConfig.small(vocab_size=50)), 2, bias=[-2.0, 1.0]).eval()
    codes = torch.randint(5, 50, (6, 7))
    ages, visits = torch.full((6, 7), 50.0), torch.arange(7).expand(6, -1)
    scores = model(codes, ages, visits)
    assert (scores - torch.tensor([-2.0, 1.0])).abs().max() < 1.5
    assert not torch.equal(scores[0], scores[1])
