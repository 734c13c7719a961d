"""Which tokens does a model have to guess, and what is it shown in their place?

The corruption of masked-language modelling (Devlin et al., 2019): of the ordinary tokens 15% are selected, each on
its own; a selected token is shown as `[MASK]` (80%), as a random code (10%) or as it is (10%), and is scored.
Special tokens, `[UNK]` among them, are never selected.

Every draw comes from a generator that `stream` derives from the seed and the place of the draw. A run that resumes
at any step therefore draws what the uninterrupted run would have drawn, without a generator state to save.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import numpy.typing as npt

from behrt.config import SELECTED_SHARE, SHOWN_AS_MASK, SHOWN_AS_RANDOM
from behrt.vocabulary import FIRST_CODE, MASK

FIXED_SEED = 0
"""Seed of everything that must be the same in runs of any seed: validation masks, samples of training patients."""


class Stream(IntEnum):
    """What a random stream is for; streams of one seed are independent of each other."""

    ORDER = 1
    WINDOWS = 2
    TRAINING_MASKS = 3
    VALIDATION_MASKS = 4
    TRAINING_SAMPLE = 5
    TRAINING_SAMPLE_MASKS = 6
    ADAPTERS = 7
    DROPOUT = 8
    LABELS = 9
    HEAD = 10


def stream(seed: int, purpose: Stream, *place: int) -> np.random.Generator:
    """The generator for one purpose at one place (epoch, step).

    >>> bool(stream(0, Stream.ORDER, 3).random() == stream(0, Stream.ORDER, 3).random())
    True
    """
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, int(purpose), *place])))


def torch_seed(seed: int, purpose: Stream, *place: int) -> int:
    """The same as a seed for torch's generators."""
    return int(stream(seed, purpose, *place).integers(1 << 63))


def mask_tokens(
    codes: npt.NDArray[np.int32], *, vocab_size: int, generator: np.random.Generator
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
    """Corrupts token ids of any shape.

    Args:
        codes: int32 ids; those below `FIRST_CODE` are special and stay.
        vocab_size: random replacements are drawn uniformly from `FIRST_CODE … vocab_size - 1`.
        generator: consumed; the caller decides whether masks are drawn anew or are the same again.

    Returns:
        `shown`, int32 ids as the model sees them, and `scored`, bool, both of the shape of `codes`.
    """
    scored = (codes >= FIRST_CODE) & (generator.random(codes.shape) < SELECTED_SHARE)
    fate = generator.random(codes.shape)
    replacements = generator.integers(FIRST_CODE, vocab_size, size=codes.shape, dtype=np.int32)
    shown = np.where(scored & (fate < SHOWN_AS_MASK), np.int32(MASK), codes)
    shown = np.where(scored & (fate >= SHOWN_AS_MASK) & (fate < SHOWN_AS_MASK + SHOWN_AS_RANDOM), replacements, shown)
    return shown, scored
