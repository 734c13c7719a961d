"""Is the corruption the one that BERT's paper describes, and are draws a function of seed and place?"""

import numpy as np
import pytest

from behrt.masking import Stream, mask_tokens, stream
from behrt.vocabulary import CLS, FIRST_CODE, MASK, PAD, SEP, UNK

VOCAB_SIZE = 200
TOKENS = 100_000


@pytest.fixture(scope="module")
def codes() -> np.ndarray:
    return np.random.default_rng(0).integers(FIRST_CODE, VOCAB_SIZE, TOKENS, dtype=np.int32)


@pytest.fixture(scope="module")
def masked(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return mask_tokens(codes, vocab_size=VOCAB_SIZE, generator=np.random.default_rng(1))


def within(share: float, expected: float, trials: int) -> bool:
    """Within five standard deviations of a binomial share."""
    return abs(share - expected) < 5 * (expected * (1 - expected) / trials) ** 0.5


def test_fifteen_percent_are_selected(masked: tuple[np.ndarray, np.ndarray]) -> None:
    assert within(masked[1].mean(), 0.15, TOKENS)


def test_training_may_select_another_share(codes: np.ndarray) -> None:
    draws = np.random.default_rng(1)
    _, scored = mask_tokens(codes, vocab_size=VOCAB_SIZE, generator=draws, selected_share=0.4)
    assert within(scored.mean(), 0.4, TOKENS)


def test_selected_tokens_are_shown_as_mask_random_and_themselves_in_80_10_10(
    codes: np.ndarray, masked: tuple[np.ndarray, np.ndarray]
) -> None:
    shown, scored = masked
    count = int(scored.sum())
    as_mask = (shown[scored] == MASK).mean()
    as_itself = (shown[scored] == codes[scored]).mean()
    coincidence = 0.1 / (VOCAB_SIZE - FIRST_CODE)  # a random code may be the true one
    assert within(as_mask, 0.8, count)
    assert within(as_itself, 0.1 + coincidence, count)
    assert within(1 - as_mask - as_itself, 0.1 - coincidence, count)


def test_random_replacements_are_uniform_over_the_ordinary_codes(
    codes: np.ndarray, masked: tuple[np.ndarray, np.ndarray]
) -> None:
    shown, scored = masked
    replaced = shown[scored & (shown != MASK) & (shown != codes)]
    counts = np.bincount(replaced, minlength=VOCAB_SIZE)
    assert counts[:FIRST_CODE].sum() == 0
    ordinary = VOCAB_SIZE - FIRST_CODE
    expected = len(replaced) / ordinary
    chi_square = ((counts[FIRST_CODE:] - expected) ** 2 / expected).sum()
    assert abs(chi_square - (ordinary - 1)) < 5 * (2 * (ordinary - 1)) ** 0.5


def test_what_is_not_selected_is_shown_as_it_is(codes: np.ndarray, masked: tuple[np.ndarray, np.ndarray]) -> None:
    shown, scored = masked
    assert (shown[~scored] == codes[~scored]).all()


def test_special_tokens_are_never_selected() -> None:
    special = np.tile(np.array([PAD, UNK, CLS, SEP, MASK], dtype=np.int32), 2000)
    shown, scored = mask_tokens(special, vocab_size=VOCAB_SIZE, generator=np.random.default_rng(0))
    assert not scored.any()
    assert (shown == special).all()


def test_a_stream_repeats_itself_and_differs_by_seed_purpose_and_place() -> None:
    draws = {
        key: tuple(stream(*key).random(4))
        for key in (
            (0, Stream.ORDER, 1),
            (1, Stream.ORDER, 1),
            (0, Stream.WINDOWS, 1),
            (0, Stream.ORDER, 2),
            (0, Stream.ORDER, 1, 1),
        )
    }
    assert len(set(draws.values())) == len(draws)
    assert tuple(stream(0, Stream.ORDER, 1).random(4)) == draws[(0, Stream.ORDER, 1)]
