"""Is the head that fine-tuning begins with the best linear probe of the vectors?"""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from behrt.tasks import probing
from behrt.tasks.examples import Examples
from behrt.tasks.finetuned import TaskDescription
from behrt.tasks.probing import fit_probe

FEATURES = 6
BINARY = TaskDescription(name="some", kind="binary", names=("it",))


def examples(targets: np.ndarray, days: np.ndarray | None = None) -> Examples:
    """Labels alone: a probe reads nothing else of them."""
    found = object.__new__(Examples)
    object.__setattr__(found, "targets", targets.astype(np.float32))
    object.__setattr__(found, "days", None if days is None else days.astype(np.float32))
    return found


def drawn(rows: int, seed: int) -> tuple[torch.Tensor, Examples]:
    """Vectors, and labels that depend on two of their numbers."""
    generator = np.random.default_rng(seed)
    vectors = generator.normal(size=(rows, FEATURES)) * [1, 5, 0.2, 1, 1, 3] + [0, 7, 0, -2, 0, 0]
    chance = 1 / (1 + np.exp(-(1.5 * vectors[:, 0] - 0.3 * (vectors[:, 1] - 7))))
    return torch.from_numpy(vectors).float(), examples(generator.random((rows, 1)) < chance[:, None])


def test_at_a_given_penalty_it_is_ridge_logistic_regression(monkeypatch: pytest.MonkeyPatch) -> None:
    training, tuning, penalty = drawn(400, 0), drawn(100, 1), 0.03
    monkeypatch.setattr(probing, "PENALTIES", (penalty,))
    found = fit_probe(BINARY, training, tuning, [0.0])
    inputs = training[0].double().numpy()
    center, spread = inputs.mean(axis=0), inputs.std(axis=0)
    # scikit-learn: |w|²/2 + C · the sum of the losses
    reference = LogisticRegression(C=1 / (2 * penalty * 400), tol=1e-8, max_iter=1000)
    reference.fit((inputs - center) / spread, training[1].targets[:, 0])
    expected = reference.decision_function((tuning[0].numpy() - center) / spread)
    scores = tuning[0] @ found.weight.T + found.bias
    assert scores[:, 0].numpy() == pytest.approx(expected, abs=2e-3)


def test_the_penalty_is_the_one_that_suits_the_tuning_labels_best(monkeypatch: pytest.MonkeyPatch) -> None:
    training, tuning = drawn(60, 0), drawn(500, 1)
    chosen = fit_probe(BINARY, training, tuning, [0.0])
    losses = {}
    for penalty in probing.PENALTIES:
        with monkeypatch.context() as patch:
            patch.setattr(probing, "PENALTIES", (penalty,))
            losses[penalty] = fit_probe(BINARY, training, tuning, [0.0]).tuning_loss
    best = min(losses, key=lambda penalty: losses[penalty])
    assert probing.PENALTIES[0] > best > probing.PENALTIES[-1]  # else the grid would be too narrow here
    assert chosen.penalty == best
    assert chosen.tuning_loss == pytest.approx(losses[best], abs=1e-4)


def test_a_number_that_is_the_same_for_all_weighs_nothing() -> None:
    training, tuning = drawn(200, 0), drawn(50, 1)
    training[0][:, 2] = 3.0
    found = fit_probe(BINARY, training, tuning, [0.0])
    assert found.weight[0, 2] == 0
    assert found.weight[0, 0] != 0


def test_labels_that_are_not_known_do_not_count() -> None:
    (vectors, labels), tuning = drawn(200, 0), drawn(50, 1)
    known = examples(np.concatenate([labels.targets, np.full((200, 1), np.nan)]))
    expected = fit_probe(BINARY, (vectors, labels), tuning, [0.0])
    found = fit_probe(BINARY, (torch.cat([vectors, vectors]), known), tuning, [0.0])  # the same mean and spread
    torch.testing.assert_close(found.weight, expected.weight, atol=1e-4, rtol=1e-3)
    assert found.tuning_loss == pytest.approx(expected.tuning_loss)


def test_hazards_are_fitted_as_the_loss_of_survival_has_them() -> None:
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(600, FEATURES))
    times = generator.exponential(100 * np.exp(-vectors[:, 0]))
    end = generator.uniform(20, 300, size=600)
    whole = torch.from_numpy(vectors).float()
    task = TaskDescription(name="death", kind="survival", names=("death",), edges=(30.0, 90.0, 300.0))
    parts = [
        (whole[rows], examples((times <= end)[rows, None], np.minimum(times, end)[rows]))
        for rows in (slice(0, 400), slice(400, 600))
    ]
    found = fit_probe(task, parts[0], parts[1], [0.0, 0.0, 0.0])
    assert (found.weight[:, 0] > 0.5).all()
    assert (found.weight[:, 1:].abs().mean(dim=1) < found.weight[:, 0] / 3).all()
    labels = parts[1][1]
    assert labels.days is not None
    same = task.summed_loss(torch.zeros(200, 3), torch.from_numpy(labels.targets), torch.from_numpy(labels.days))
    assert found.tuning_loss < 0.9 * float(same) / 200


def test_vectors_that_say_nothing_leave_the_scores_as_they_were() -> None:
    (vectors, labels), tuning = drawn(40, 0), drawn(2000, 1)
    noise = torch.randn(40, 300, generator=torch.Generator().manual_seed(0))
    others = torch.randn(2000, 300, generator=torch.Generator().manual_seed(1))
    found = fit_probe(BINARY, (noise, labels), (others, tuning[1]), [-0.1])
    assert found.weight.abs().max() == 0
    assert found.bias.tolist() == pytest.approx([-0.1])
    informed = fit_probe(BINARY, (vectors, labels), tuning, [-0.1])
    assert informed.tuning_loss < found.tuning_loss
