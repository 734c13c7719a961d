"""Do the masks change where they should, and stay where they must?

Training masks have to be drawn anew every epoch, or a model learns the answers by heart; validation masks have to be
the same every time, or losses do not compare.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from behrt.batches import IGNORED, PADDING_SEGMENT, PackedBatch
from behrt.vocabulary import FIRST_CODE

TOKENS_TO_COMPARE = 60
"""Tokens of the same patients, selected in either of two epochs, that the comparison needs.

Where masks are drawn anew, a token selected in either is selected in both with a probability of s²/(1 - (1 - s)²), 8%
where the share s that is selected is 15%; where masks do not change all are, save those of different patients who look
alike.
"""
MORE_THAN_CHANCE = 0.3
"""How much more often than that is more than chance: of 60 tokens, half of them selected, in 1 of a million runs."""
MOST_PATIENTS = 4096
"""Patients of an epoch after which the search ends; with 500,000 training patients, 30 of these are met twice."""


def masks_change(first: Iterable[Sequence[PackedBatch]], second: Iterable[Sequence[PackedBatch]]) -> bool | None:
    """Whether two epochs select other tokens of the same patients; None where too few patients are met in both.

    Patients are recognised by their tokens as they were before the corruption, whatever the order. Steps are drawn from
    both epochs in turn, no more of them than it takes.
    """
    met: tuple[dict[bytes, Selected], dict[bytes, Selected]] = ({}, {})
    either = both = tokens = 0
    for steps in zip(first, second, strict=False):
        for step, patients, others in zip(steps, met, reversed(met), strict=True):
            for batch in step:
                for patient, selected in selected_tokens(batch).items():
                    patients[patient] = selected
                    if patient in others:
                        either += int((selected | others[patient]).sum())
                        both += int((selected & others[patient]).sum())
                        tokens += len(selected)
        if either >= TOKENS_TO_COMPARE:
            share = (either + both) / (2 * tokens)  # selected in one of the epochs
            return both / either < share / (2 - share) + MORE_THAN_CHANCE
        if len(met[0]) >= MOST_PATIENTS:
            return None
    return None


Selected = npt.NDArray[np.bool_]
"""Which of a patient's codes are to be guessed, bool [codes]; of special tokens none ever is."""


def selected_tokens(batch: PackedBatch) -> dict[bytes, Selected]:
    """What is selected of each patient, by the patient's codes, ages and visits before the corruption."""
    real = (batch.segments != PADDING_SEGMENT).numpy()
    shown, labels, ages, visits, positions = (
        getattr(batch, name).numpy()[real] for name in ("codes", "labels", "ages", "visits", "positions")
    )
    selected = labels != IGNORED
    codes = np.where(selected, labels, shown)
    content = np.stack([codes, ages.view(np.int32), visits])  # [3, tokens]
    starts = np.flatnonzero(positions == 0).tolist()
    return {
        content[:, start:stop].tobytes(): selected[start:stop][codes[start:stop] >= FIRST_CODE]
        for start, stop in itertools.pairwise([*starts, len(positions)])
    }
