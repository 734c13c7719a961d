"""The vocabulary: order, rare codes, file."""

import polars as pl
import pytest

from behrt.config import UserError
from behrt.vocabulary import FIRST_CODE, SPECIAL_TOKENS, UNK, Vocabulary

COUNTS = pl.DataFrame({"code": ["B", "RARE", "A", "C", "[MASK]"], "patients": [5, 4, 5, 9, 50]})


def test_codes_come_after_the_special_tokens_by_falling_patients_then_name():
    vocabulary = Vocabulary.fit(COUNTS, min_patients=5)
    assert vocabulary.tokens == (*SPECIAL_TOKENS, "C", "A", "B")
    assert vocabulary.patients == (0, 0, 0, 0, 0, 9, 5, 5)


def test_rare_and_unseen_codes_and_names_of_special_tokens_become_unknown():
    vocabulary = Vocabulary.fit(COUNTS, min_patients=5)
    codes = ["A", "RARE", "never", "[MASK]", "[PAD]", "C"]
    expected = [FIRST_CODE + 1, UNK, UNK, UNK, UNK, FIRST_CODE]
    assert vocabulary.encode(pl.Series(codes)).to_list() == expected
    assert [vocabulary.id_of(code) for code in codes] == expected


def test_a_saved_vocabulary_loads_unchanged(tmp_path):
    vocabulary = Vocabulary.fit(COUNTS, min_patients=5, bin_edges={"L": [0.1, 2.5]})
    vocabulary.save(tmp_path / "vocabulary.json")
    assert Vocabulary.load(tmp_path / "vocabulary.json") == vocabulary


def test_only_rare_codes_are_refused():
    with pytest.raises(UserError, match=r"--min-patients 60: none of the 5 codes"):
        Vocabulary.fit(COUNTS, min_patients=60)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"tokens": [], "bin_edges": {}}',
        '{"tokens": [["A", 1]], "bin_edges": {}}',
        '{"tokens": 5}',
        "\xff",
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path, text):
    path = tmp_path / "vocabulary.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"vocabulary\.json: damaged"):
        Vocabulary.load(path)


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=r"vocabulary\.json: no such file"):
        Vocabulary.load(tmp_path / "vocabulary.json")
