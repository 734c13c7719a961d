"""Which token has which id?

Special tokens come first, then the codes by falling number of training patients. The vocabulary is fitted on training
patients only; codes of fewer than `min_patients` of them become `[UNK]`, because rare codes identify people and cannot
be learned. (Published tables want more: the usual rule suppresses cells below 11.)
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import polars as pl

from behrt.config import UserError, refuse_what_is_no_file
from behrt.files import write_text

PAD, UNK, CLS, SEP, MASK = range(5)
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
FIRST_CODE = len(SPECIAL_TOKENS)
"""Ids below are special tokens, the others ordinary codes."""


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id.

    Attributes:
        tokens: the special tokens, then the codes.
        patients: training patients of each token; 0 for special ones.
        bin_edges: inner quantiles of the codes whose values became `//Q` suffixes.

    >>> vocabulary = Vocabulary.of_codes(["A", "B"])
    >>> len(vocabulary), vocabulary.id_of("B"), vocabulary.id_of("never seen")
    (7, 6, 1)
    >>> vocabulary.encode(pl.Series(["B", "never seen", "A"])).to_list()
    [6, 1, 5]
    """

    tokens: tuple[str, ...]
    patients: tuple[int, ...]
    bin_edges: Mapping[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.tokens[:FIRST_CODE] == SPECIAL_TOKENS
        assert len(self.patients) == len(self.tokens) == len(set(self.tokens))

    @classmethod
    def of_codes(cls, codes: Sequence[str], patients: Sequence[int] | None = None) -> Self:
        """The vocabulary with these codes in this order, after the special tokens."""
        counts = [0] * len(codes) if patients is None else patients
        return cls(tokens=(*SPECIAL_TOKENS, *codes), patients=(*[0] * FIRST_CODE, *counts))

    @classmethod
    def fit(
        cls, counts: pl.DataFrame, *, min_patients: int, bin_edges: Mapping[str, list[float]] | None = None
    ) -> Self:
        """The vocabulary of all codes that enough training patients have.

        Args:
            counts: `code`, and `patients`, the number of training patients that have it.

        Raises:
            UserError: no code is frequent enough.
        """
        kept = counts.filter((pl.col("patients") >= min_patients) & ~pl.col("code").is_in(SPECIAL_TOKENS)).sort(
            ["patients", "code"], descending=[True, False]
        )
        if kept.is_empty():
            raise UserError(
                f"--min-patients {min_patients}: none of the {counts.height} codes is found in so many training "
                "patients; lower it, or shorten codes with --icd-digits"
            )
        edges = dict(bin_edges or {})
        return cls(
            tokens=(*SPECIAL_TOKENS, *kept["code"].to_list()),
            patients=(*[0] * FIRST_CODE, *kept["patients"].to_list()),
            bin_edges=edges,
        )

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {token: index for index, token in enumerate(self.tokens) if index >= FIRST_CODE}

    def id_of(self, code: str) -> int:
        """The code's id; `UNK` for a code outside the vocabulary."""
        return self._ids.get(code, UNK)

    def encode(self, codes: pl.Series) -> pl.Series:
        """Ids, Int32, of a series of codes; `UNK` for those outside the vocabulary."""
        known = pl.Series(self.tokens[FIRST_CODE:], dtype=pl.String)
        ids = pl.Series(range(FIRST_CODE, len(self)), dtype=pl.Int32)
        return codes.replace_strict(known, ids, default=UNK, return_dtype=pl.Int32)

    def save(self, path: Path) -> None:
        """Writes `path` as JSON, one token a line."""
        tokens = ",\n  ".join(
            json.dumps([token, count], ensure_ascii=False)
            for token, count in zip(self.tokens, self.patients, strict=True)
        )
        edges = json.dumps(dict(self.bin_edges), ensure_ascii=False, allow_nan=False)
        write_text(path, f'{{\n "tokens": [\n  {tokens}\n ],\n "bin_edges": {edges}\n}}\n')

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads what `save` wrote. Raises `UserError` if the file is missing or damaged."""
        refuse_what_is_no_file(path)
        try:
            loaded: Any = json.loads(path.read_text(encoding="utf-8"))
            tokens, patients = zip(*loaded["tokens"], strict=True)
            edges = {str(code): [float(edge) for edge in own] for code, own in loaded["bin_edges"].items()}
            json.dumps([tokens, edges], ensure_ascii=False, allow_nan=False).encode()  # no half characters, no infinity
        except FileNotFoundError:
            raise UserError(f"{path}: no such file; the folder holds no prepared records, or lost a file") from None
        except (OSError, ValueError, OverflowError, RecursionError, TypeError, KeyError, AttributeError):
            raise UserError(f"{path}: damaged, expected a vocabulary; prepare the records again") from None
        whole = all(isinstance(token, str) for token in tokens) and all(type(count) is int for count in patients)
        if not whole or tokens[:FIRST_CODE] != SPECIAL_TOKENS or len(set(tokens)) != len(tokens):
            raise UserError(
                f"{path}: damaged, expected {', '.join(SPECIAL_TOKENS)} and then distinct codes; "
                "prepare the records again"
            )
        if len(tokens) == FIRST_CODE:
            raise UserError(f"{path}: holds no code beside the special tokens; prepare the records again")
        return cls(tokens=tokens, patients=patients, bin_edges=edges)
