"""How does a task read a patient's tokens, and how is a prediction judged against the label?

The encoder's vectors of all tokens that may be seen become one vector of the patient (`pool`); dropout and a linear
layer make scores of it. Losses are those of binary labels, of which some may not be known, and of survival in discrete
time (Gensheimer & Narasimhan, 2019, "A scalable discrete-time survival model for neural networks"): time is cut into
intervals, and the head gives the logit of the hazard in each. Other than Cox's partial likelihood, that likelihood is a
sum over patients: it does not depend on who shares a batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from behrt.config import BEHRTConfig
from behrt.devices import to_device
from behrt.model import BEHRT, TABLE_STD, uniform_

INTERVALS = 10
"""Into which survival is cut, as far as there are different times of events."""
EVENTS_OF_INTERVAL = 11
"""At least so many, where there are: the edges travel with the model, and must not be the days of single patients."""
LEAST_SHARE, MOST_SHARE = 1e-4, 1 - 1e-4
"""Between which the first prediction lies: labels of one kind alone would ask for an infinite logit."""


def pool(hidden: Tensor, owners: Tensor, visits: Tensor, patients: int) -> Tensor:
    """One vector per patient: the mean over all of its tokens beside the mean over those of its latest visit.

    Pre-training never asked anything of `[CLS]`, nor of the last token, so that means over codes say more of a patient
    while the encoder is frozen; and a mean over a whole history hides how it ended (docs/tasks.md has the measurement).

    Args:
        hidden: float [tokens, hidden_dim].
        owners: int64 [tokens], whose token it is, below `patients`; each has one or more.
        visits: int64 [tokens], the visit's number.

    Returns:
        float32 [patients, 2 · hidden_dim].

    >>> hidden = torch.tensor([[1.0], [3.0], [5.0]])
    >>> pool(hidden, torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]), 2).tolist()
    [[2.0, 3.0], [5.0, 5.0]]
    """
    hidden = hidden.float()
    latest = visits.new_zeros(patients).scatter_reduce(0, owners, visits, "amax", include_self=False)
    means = []
    for weight in (hidden.new_ones(len(hidden)), (visits == latest[owners]).to(hidden.dtype)):
        sums = hidden.new_zeros(patients, hidden.shape[1]).index_add(0, owners, hidden * weight[:, None])
        counts = hidden.new_zeros(patients).index_add(0, owners, weight)
        means.append(sums / counts[:, None])
    return torch.cat(means, dim=1)


class TaskHead(nn.Module):
    """Dropout, and a linear layer from a patient's vector to the scores."""

    def __init__(self, config: BEHRTConfig, outputs: int) -> None:
        super().__init__()
        self.dropout = nn.Dropout(config.dropout)
        self.linear = nn.Linear(2 * config.hidden_dim, outputs)

    def forward(self, vectors: Tensor) -> Tensor:
        scores: Tensor = self.linear(self.dropout(vectors))
        return scores


class BEHRTForTask(nn.Module):
    """An encoder with the head of a task.

    Args:
        behrt: the encoder; it is not copied.
        outputs: scores per patient.
        bias: the first scores, [outputs]; weights are so small that these hardly depend on the patient.
        generator: for the weights of the head.

    >>> model = BEHRTForTask(BEHRT(BEHRTConfig.small(vocab_size=100)), outputs=1).eval()
    >>> model(torch.tensor([[2, 17, 3]]), torch.tensor([[61.2, 61.2, 61.2]]), torch.tensor([[0, 1, 1]])).shape
    torch.Size([1, 1])
    """

    def __init__(
        self,
        behrt: BEHRT,
        outputs: int,
        *,
        bias: Sequence[float] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.config = behrt.config
        self.behrt = behrt
        with torch.random.fork_rng(devices=[]):
            self.head = TaskHead(behrt.config, outputs)
        uniform_(self.head.linear.weight, TABLE_STD * math.sqrt(3), generator)
        with torch.no_grad():
            self.head.linear.bias.copy_(torch.zeros(outputs) if bias is None else torch.tensor(bias))

    def forward(
        self,
        codes: Tensor,
        ages: Tensor,
        visits: Tensor,
        segments: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        owners: Tensor | None = None,
    ) -> Tensor:
        """Scores (logits), float32 [patients, outputs].

        Args:
            owners: int64 [rows, length], which patient of the batch a token belongs to, negative on padding; it may
                stay on the CPU. Without it each row is one patient without padding.

        The other arguments are those of `BEHRT.forward`.
        """
        read = patient_vectors(self.behrt, codes, ages, visits, segments, positions=positions, owners=owners)
        scores: Tensor = self.head(read)
        return scores.float()


def patient_vectors(
    behrt: BEHRT,
    codes: Tensor,
    ages: Tensor,
    visits: Tensor,
    segments: Tensor | None = None,
    *,
    positions: Tensor | None = None,
    owners: Tensor | None = None,
) -> Tensor:
    """One vector per patient (`pool`), float32 [patients, 2 · hidden_dim]; arguments as of `BEHRTForTask.forward`."""
    if owners is None:
        owners = torch.arange(len(codes))[:, None].expand(codes.shape)
    is_token = owners >= 0
    hidden = behrt(codes, ages, visits, segments=segments, positions=positions, scored=is_token)
    of_tokens, patients = to_device(owners[is_token], hidden.device), int(owners.max()) + 1
    return pool(hidden, of_tokens, visits[to_device(is_token, visits.device)], patients)


# Binary labels, one or several a patient


def known_labels(targets: Tensor) -> Tensor:
    """Which labels are known, bool [patients, names]."""
    return ~torch.isnan(targets)


def binary_loss(logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Summed binary cross-entropy over the labels that are known.

    Args:
        logits: float [patients, names].
        targets: float [patients, names], 1, 0, or NaN where a label is not known.
        weights: float [2, names], of false labels and of true ones.

    >>> binary_loss(torch.zeros(1, 2), torch.tensor([[1.0, math.nan]])).item() == math.log(2)
    False
    >>> round(binary_loss(torch.zeros(1, 2), torch.tensor([[1.0, math.nan]])).item(), 6)
    0.693147
    """
    known = known_labels(targets)
    told = torch.nan_to_num(targets)
    losses = F.binary_cross_entropy_with_logits(logits, told, reduction="none")
    if weights is not None:
        losses = losses * torch.where(told > 0, weights[1], weights[0])
    return (losses * known).sum()


def label_shares(targets: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Share of true labels among the known ones of each name, float64 [names]; a half where none is known."""
    known = ~np.isnan(targets)
    true = np.nansum(targets, axis=0, dtype=np.float64)
    return np.where(known.any(axis=0), true / np.maximum(1, known.sum(axis=0)), 0.5)


def balanced_weights(targets: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Weights of false and of true labels, float64 [2, names], with which both have the same part in the loss.

    Their mean over the labels is 1. Of a name that has labels of one kind only, all weigh 1.

    >>> balanced_weights(np.array([[1], [0], [0], [0]], np.float32)).round(3).tolist()
    [[0.667], [2.0]]
    """
    shares = label_shares(targets)
    one_kind = (shares == 0) | (shares == 1)
    shares = np.where(one_kind, 0.5, shares)
    return np.stack([0.5 / (1 - shares), 0.5 / shares])


def log_odds(shares: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The logits of probabilities, which are kept away from 0 and 1."""
    shares = np.clip(shares, LEAST_SHARE, MOST_SHARE)
    odds: npt.NDArray[np.float64] = np.log(shares / (1 - shares))
    return odds


# Survival in discrete time


def interval_edges(
    days: npt.NDArray[np.float32], events: npt.NDArray[np.bool_], intervals: int = INTERVALS
) -> list[float]:
    """Upper edges of the intervals, rising: quantiles of the times of the events, so that each holds about as many.

    In whole days, rounded up: they travel with the model, and the exact ones are those of patients. The first interval
    begins at 0, and no event is after the last edge. Whoever lives on has survived all of them.

    >>> interval_edges(np.arange(1, 81, dtype=np.float32), np.ones(80, bool), intervals=4)
    [20.0, 40.0, 60.0, 80.0]
    """
    assert events.any()
    intervals = max(1, min(intervals, int(events.sum()) // EVENTS_OF_INTERVAL))
    quantiles = np.quantile(days[events], np.linspace(0, 1, intervals + 1)[1:], method="inverted_cdf")
    return [float(edge) for edge in np.unique(np.maximum(1, np.ceil(quantiles)))]


def survived_and_died(days: Tensor, events: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
    """Which intervals each patient has survived, and in which the event was seen: two bool [patients, intervals].

    An event at an edge is of the interval that ends there. Who is censored inside an interval has survived it if that
    is in its second half, as with Gensheimer & Narasimhan.
    """
    lower = torch.cat([edges.new_zeros(1), edges[:-1]])
    at = days[:, None]
    holds = (at > lower) & (at <= edges)
    holds[:, 0] |= days <= 0
    died = holds & events[:, None]
    end_of_risk = torch.where(events[:, None], edges, (lower + edges) / 2)
    return (at >= end_of_risk) & ~died, died


def survival_loss(logits: Tensor, days: Tensor, events: Tensor, edges: Tensor) -> Tensor:
    """Summed negative log-likelihood.

    Args:
        logits: float [patients, intervals], of the hazard in each interval, given that the patient reaches it.
        days: float [patients], to the event or to the end of observation.
        events: bool [patients], whether it is the event.
        edges: float [intervals], of `interval_edges`.
    """
    survived, died = survived_and_died(days, events, edges)
    return (F.softplus(logits) * survived).sum() + (F.softplus(-logits) * died).sum()


def survival_curve(logits: Tensor) -> Tensor:
    """Probability to live on beyond each edge, float [patients, intervals]."""
    return torch.exp(-F.softplus(logits).cumsum(dim=1))


def risk(logits: Tensor) -> Tensor:
    """A score, from 0 to 1, that is higher where the event comes sooner: the probability that it has come by an edge,
    on average over the edges."""
    return 1 - survival_curve(logits).mean(dim=1)


def survival_hits(logits: Tensor, days: Tensor, events: Tensor, edges: Tensor) -> Tensor:
    """How many patients had that fate by the end of their observation which the model held likelier; int64 scalar."""
    survived, died = survived_and_died(days, events, edges)
    reached = (survived | died).sum(dim=1)  # intervals until then
    curve = torch.cat([logits.new_ones(len(logits), 1), survival_curve(logits)], dim=1)
    lives = curve.gather(1, reached[:, None]).squeeze(1) > 0.5
    return (lives != events).sum()


def hazard_log_odds(
    days: npt.NDArray[np.float32], events: npt.NDArray[np.bool_], edges: Sequence[float]
) -> list[float]:
    """The logits of the hazards that all patients share, [intervals]: where the head begins, and the baseline."""
    tensors = torch.from_numpy(days), torch.from_numpy(events), torch.tensor(edges)
    survived, died = (flags.sum(dim=0).double().numpy() for flags in survived_and_died(*tensors))
    odds = log_odds(died / np.maximum(1, survived + died))
    return [float(value) for value in odds]
