"""How well does counting predict, on the same labels and the same tokens?

Predictors that anybody would try first, fitted on the training rows of a task: prevalence, a regression, boosted trees.
What they see of a row is in `histories.py`. What they leave to choose is chosen on tuning, by the loss that they are
fitted with, as the best epoch of BEHRT is.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from behrt.tasks.examples import Examples
from behrt.tasks.histories import Dense, History, Matrix, Scaled

if TYPE_CHECKING:
    pass

MOST_ROWS = 100_000
"""Training rows, evenly drawn where there are more: trees take a minute there on two cores, for each label."""
MOST_COX_ROWS = 20_000
"""Training rows of the Cox regression: each step of it goes over all of them for each column."""

PENALTIES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
"""C of the logistic regression, the inverse of its penalty."""
LEAVES = (4, 16)
TREES_AT_ONCE = 50
"""Trees are added by so many, until tuning says that it was for nothing."""
MOST_TREES = 400
TREE_RATE = 0.1
COX_STEPS = 30
COX_L1_SHARE = 0.1
FEW_ROWS = 20_000
"""Training rows below which one thread is faster."""
SHORTEST_DAYS = 0.5
"""Of an observation, where its length is divided by."""

Progress = Callable[[str, int, int], None]


@contextmanager
def threads_for(rows: int) -> Iterator[None]:
    """One thread where there are few rows, for fitting and predicting.

    OpenMP's threads wait for each other without sleeping. On a machine that has other work, too, the small steps of a
    small fit then take a hundred times as long as alone.
    """
    from threadpoolctl import threadpool_limits  # which scikit-learn requires

    with threadpool_limits(1 if rows < FEW_ROWS else None):
        yield


@dataclass(frozen=True)
class Baseline:
    """A fitted predictor.

    Attributes:
        name: `prevalence`, `logistic_regression`, `cox_regression` or `boosted_trees`.
        about: what was chosen on tuning, and what was left out.
        predict: float64 [rows, names] probabilities; of survival [rows] risks, whose order alone counts.
    """

    name: str
    about: str
    predict: Callable[[History], Matrix]


def fit_baselines(
    train: Examples,
    tuning: Examples,
    histories: Mapping[str, History],
    *,
    progress: Progress = lambda stage, done, total: None,
) -> list[Baseline]:
    """The baselines of a task.

    Args:
        train, tuning: their rows.
        histories: of the same rows, by `train` and `tuning`.
    """
    kept = _evenly(len(train), MOST_ROWS)
    train, history = train.take(kept), histories["train"].take(kept)
    note = f"; {len(kept):,} training rows" if len(kept) < len(histories["train"]) else ""
    if train.kind == "survival":
        return [
            Baseline("prevalence", "the same risk for everyone", lambda rows: np.zeros(len(rows))),
            _cox(train, history, tuning, histories["tuning"], progress),
            _rate_trees(train, history, tuning, histories["tuning"], note, progress),
        ]
    shares = [_share(train.targets[:, number]) for number in range(len(train.names))]
    fits: dict[str, Callable[..., tuple[Callable[[History], Matrix], str]]] = {
        "logistic_regression": _logistic,
        "boosted_trees": _trees,
    }
    found = [Baseline("prevalence", "the share of the training rows", lambda rows: np.tile(shares, (len(rows), 1)))]
    for place, (name, fit) in enumerate(fits.items()):
        columns = []
        for number in range(len(train.names)):
            progress(name.replace("_", " "), place * len(train.names) + number, len(fits) * len(train.names))
            columns.append(
                _column(
                    fit,
                    train.targets[:, number],
                    history,
                    tuning.targets[:, number],
                    histories["tuning"],
                    shares[number],
                )
            )
        found.append(Baseline(name, _told([about for _, about in columns]) + note, _side_by_side(columns)))
    return found


def _column(
    fit: Callable[..., tuple[Callable[[History], Matrix], str]],
    targets: Matrix,
    history: History,
    tuning_targets: Matrix,
    tuning: History,
    share: float,
) -> tuple[Callable[[History], Matrix], str]:
    """A predictor of one label, fitted where it is known; its share, where it is always the same."""
    known, tuning_known = ~np.isnan(targets), ~np.isnan(tuning_targets)
    labels = targets[known] > 0
    if not labels.any() or labels.all():
        return (lambda rows: np.full(len(rows), share)), "the share, for all training labels are the same"
    return fit(history.take(known), labels, tuning.take(tuning_known), tuning_targets[tuning_known] > 0)


def _side_by_side(columns: list[tuple[Callable[[History], Matrix], str]]) -> Callable[[History], Matrix]:
    return lambda rows: np.stack([predict(rows) for predict, _ in columns], axis=1)


def _told(abouts: list[str]) -> str:
    """What was chosen, for each label; once where it is the same."""
    distinct = list(dict.fromkeys(abouts))
    return distinct[0] if len(distinct) == 1 else "; ".join(f"{about} ({abouts.count(about)}x)" for about in distinct)


def _share(targets: Matrix) -> float:
    known = targets[~np.isnan(targets)]
    return float(known.mean()) if len(known) else 0.5


def _evenly(rows: int, most: int) -> NDArray[np.int64]:
    """Places of at most so many rows, evenly spaced: rows are sorted by patient, so that as many patients as may be."""
    return np.unique(np.linspace(0, rows - 1, min(rows, most)).astype(np.int64)) if rows else np.zeros(0, np.int64)


# --- a regression


def _logistic(
    history: History, labels: NDArray[np.bool_], tuning: History, tuning_labels: NDArray[np.bool_]
) -> tuple[Callable[[History], Matrix], str]:
    from scipy.sparse import csr_array, hstack
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    scaled = Scaled(history)

    def table(rows: History) -> Any:
        return hstack([csr_array(scaled(rows)), rows.counts.log1p()], format="csr")

    seen, tuning_seen = table(history), table(tuning)
    model = LogisticRegression(max_iter=500, warm_start=True)
    best = (np.inf, PENALTIES[0], np.zeros((1, seen.shape[1])), np.zeros(1))
    for penalty in PENALTIES:  # each begins where the one before ended
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # one that has not converged is judged like the others
            model.set_params(C=penalty).fit(seen, labels)
        loss = _log_loss(tuning_labels, model.predict_proba(tuning_seen)[:, 1] if len(tuning) else np.zeros(0))
        if loss < best[0] or not len(tuning):
            best = (loss, penalty, model.coef_.copy(), model.intercept_.copy())
        if not len(tuning) and penalty >= 0.1:
            break
    _, penalty, coefficients, intercept = best

    def predict(rows: History) -> Matrix:
        logits = table(rows) @ coefficients[0] + intercept[0]
        return np.asarray(1 / (1 + np.exp(-logits)))

    return predict, f"C {penalty:g}"


def _log_loss(labels: NDArray[np.bool_], probabilities: Matrix) -> float:
    own = np.clip(np.where(labels, probabilities, 1 - probabilities), 1e-12, 1)
    return float(-np.log(own).mean()) if len(own) else np.inf


# --- trees


def _trees(
    history: History, labels: NDArray[np.bool_], tuning: History, tuning_labels: NDArray[np.bool_]
) -> tuple[Callable[[History], Matrix], str]:
    from sklearn.ensemble import HistGradientBoostingClassifier

    table = Dense(history)
    seen, tuning_seen = table(history), table(tuning)
    model, trees, about = _boosted(
        lambda leaves: HistGradientBoostingClassifier(
            learning_rate=TREE_RATE, max_leaf_nodes=leaves, early_stopping=False, random_state=0, warm_start=True
        ),
        lambda model: model.fit(seen, labels),
        lambda model: _log_loss(tuning_labels, model.predict_proba(tuning_seen)[:, 1]),
        can_tune=len(tuning) > 0,
    )

    def predict(rows: History) -> Matrix:
        if not len(rows):
            return np.zeros(0)
        return np.asarray(_stage(model.staged_predict_proba(table(rows)), trees)[:, 1])

    return predict, about


def _boosted(
    begun: Callable[[int], Any], fit: Callable[[Any], Any], loss: Callable[[Any], float], *, can_tune: bool
) -> tuple[Any, int, str]:
    """The model and the number of its trees of lowest loss on tuning, over sizes of trees.

    Args:
        begun: a model of trees with so many leaves, which goes on from the trees that it has.
    """
    best: tuple[float, Any, int, int] = (np.inf, None, 0, 0)
    for leaves in LEAVES:
        model, lowest, at = begun(leaves), np.inf, 0
        for trees in range(TREES_AT_ONCE, MOST_TREES + 1, TREES_AT_ONCE):
            fit(model.set_params(max_iter=trees))
            found = loss(model) if can_tune else -float(trees)
            if found < lowest:
                lowest, at = found, trees
            elif can_tune:
                break
            if not can_tune and trees >= 2 * TREES_AT_ONCE:
                break
        if best[1] is None or lowest < best[0]:
            best = (lowest, model, at, leaves)
    _, model, trees, leaves = best
    return model, trees, f"{trees} trees of {leaves} leaves"


def _stage(stages: Iterator[Any], trees: int) -> Any:
    """What so many trees predict."""
    return next(islice(stages, trees - 1, None))


# --- survival


def _rate_trees(
    train: Examples, history: History, tuning: Examples, tuning_history: History, note: str, progress: Progress
) -> Baseline:
    """Boosted trees of the rate of events: Poisson, each row weighing as long as it is observed."""
    from sklearn.ensemble import HistGradientBoostingRegressor
    from sklearn.metrics import mean_poisson_deviance

    progress("boosted trees", 1, 2)
    events, days = train.seen_events, _days(train)
    if not events.any():
        return Baseline("boosted_trees", "no event in training", lambda rows: np.zeros(len(rows)))
    table = Dense(history)
    seen, tuning_seen = table(history), table(tuning_history)
    scale = days.sum() / events.sum()  # rates around 1

    own = _days(tuning)

    def loss(model: Any) -> float:
        rates = np.maximum(model.predict(tuning_seen), 1e-9)
        return float(mean_poisson_deviance(scale * tuning.seen_events / own, rates, sample_weight=own / own.mean()))

    model, trees, about = _boosted(
        lambda leaves: HistGradientBoostingRegressor(
            loss="poisson", learning_rate=TREE_RATE, max_leaf_nodes=leaves, early_stopping=False, random_state=0,
            warm_start=True,
        ),
        lambda model: model.fit(seen, scale * events / days, sample_weight=days / days.mean()),
        loss,
        can_tune=len(tuning) > 0,
    )  # fmt: skip

    def predict(rows: History) -> Matrix:
        if not len(rows):
            return np.zeros(0)
        return np.asarray(np.log(np.maximum(_stage(model.staged_predict(table(rows)), trees), 1e-12)))

    return Baseline("boosted_trees", f"{about}, of the rate of events{note}", predict)


def _cox(train: Examples, history: History, tuning: Examples, tuning_history: History, progress: Progress) -> Baseline:
    """Cox regression with an elastic net; the strength of its penalty is that of highest C on tuning."""
    from sksurv.linear_model import CoxnetSurvivalAnalysis

    from behrt.concordance import harrell_c

    progress("Cox regression", 0, 2)
    kept = _evenly(len(train), MOST_COX_ROWS)
    train, history = train.take(kept), history.take(kept)
    if not train.seen_events.any():
        return Baseline("cox_regression", "no event in training", lambda rows: np.zeros(len(rows)))
    scaled, table = Scaled(history), Dense(history)

    def seen(rows: History) -> Matrix:
        return np.concatenate([scaled(rows), np.log1p(table.counts(rows))], axis=1)

    columns = seen(history)
    varying = columns.std(axis=0) > 0
    outcomes = np.empty(len(train), dtype=[("event", bool), ("days", np.float64)])
    outcomes["event"], outcomes["days"] = train.seen_events, _days(train)
    model = CoxnetSurvivalAnalysis(n_alphas=COX_STEPS, alpha_min_ratio=0.01, l1_ratio=COX_L1_SHARE, max_iter=10_000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a path that ends early is shorter
        model.fit(columns[:, varying].astype(np.float64), outcomes)
    paths = np.asarray(model.coef_)  # [columns, strengths]
    risks = seen(tuning_history)[:, varying] @ paths
    reached = [harrell_c(tuning.seen_events, _days(tuning), risk) for risk in risks.T] if len(tuning) else [np.nan]
    best = int(np.nanargmax(reached)) if not np.isnan(reached).all() else paths.shape[1] // 2
    weights = paths[:, best]
    note = f"; {len(kept):,} training rows" if len(kept) == MOST_COX_ROWS else ""
    about = f"elastic net, {np.count_nonzero(weights)} of {len(weights)} columns{note}"
    return Baseline("cox_regression", about, lambda rows: np.asarray(seen(rows)[:, varying] @ weights))


def _days(examples: Examples) -> NDArray[np.float64]:
    assert examples.days is not None
    return np.maximum(examples.days.astype(np.float64), SHORTEST_DAYS)
