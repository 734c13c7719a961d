"""Which choices turn a source of records into prepared sequences?

One field per flag of `behrt prepare`; `column` and the code patterns may be given several times on the command line.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from behrt.config import MAX_SEED, Settings

MOST = 2**31 - 1
"""Of whatever is counted per patient or code."""

RecordFormat = Literal["meds", "mimic4", "omop", "synthea"]


class PrepareOptions(Settings):
    """Settings of one preparation.

    >>> PrepareOptions(column=["value=numeric_value"]).column
    {'value': 'numeric_value'}
    >>> PrepareOptions(split="70/20/20")
    Traceback (most recent call last):
    ...
    behrt.config.UserError: prepare: split: --split: the parts sum to 110, expected 100 (found '70/20/20')
    """

    where: ClassVar[str] = "prepare"

    format: RecordFormat = "meds"
    min_patients: int = Field(default=5, ge=1, le=MOST, description="codes of fewer training patients become [UNK]")
    min_tokens: int = Field(default=2, ge=1, le=MOST, description="patients with fewer codes are left out")
    split: str = Field(default="80/10/10", description="train/tuning/held_out in percent, where the source has none")
    split_seed: int = Field(default=0, ge=0, le=MAX_SEED)
    birth_code: str = Field(default="MEDS_BIRTH", min_length=1)
    death_code: str = Field(default="MEDS_DEATH", min_length=1)
    admission_code: str | None = Field(default=None, min_length=1)
    discharge_code: str | None = Field(default=None, min_length=1)
    visit_gap_hours: float = Field(default=24.0, gt=0, le=1_000_000, description="a longer pause begins a new visit")
    column: dict[str, str] = Field(default_factory=dict, description="name in the source to name of the MEDS column")
    include: tuple[str, ...] = Field(default=(), description="regular expressions; a code must match one of them")
    exclude: tuple[str, ...] = Field(default=(), description="regular expressions; a code must match none of them")
    icd_digits: int | None = Field(default=None, ge=1, le=7)
    numeric_bins: int | None = Field(default=None, ge=2, le=100)
    labs: bool = Field(default=False, description="mimic4: read labevents too")
    measurements: bool = Field(default=False, description="omop: read measurement too")
    observations: bool = Field(default=False, description="omop: read observation too")
    missing_birth: Literal["refuse", "drop", "keep"] = "refuse"
    static_codes: Literal["drop", "keep"] = "drop"

    @field_validator("split")
    @classmethod
    def _three_parts_that_sum_to_100(cls, value: str) -> str:
        try:
            parts = [float(part) for part in value.split("/")]
        except ValueError:
            parts = []
        if len(parts) != 3 or not all(0 <= part <= 100 for part in parts):
            raise ValueError("--split: expected three percentages like 80/10/10")
        if abs(sum(parts) - 100) > 1e-9:
            raise ValueError(f"--split: the parts sum to {sum(parts):g}, expected 100")
        if parts[0] == 0:
            raise ValueError("--split: the training part must be above 0")
        return value

    @field_validator("column", mode="before")
    @classmethod
    def _pairs_from_flags(cls, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            pairs = [str(item).split("=") for item in value]
            if any(len(pair) != 2 or not all(pair) for pair in pairs):
                raise ValueError("--column: expected SOURCE=MEDS, as in value=numeric_value")
            value = dict(pairs)
            if len(value) != len(pairs):
                raise ValueError("--column: the same source column is renamed twice")
        if isinstance(value, dict) and len(set(value.values())) != len(value):
            raise ValueError("--column: two source columns are renamed to the same name")
        return value

    @field_validator("include", "exclude")
    @classmethod
    def _valid_patterns(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        import polars as pl  # here, because this file is imported to print the help

        probe = pl.Series([""])
        for pattern in value:
            try:  # with the engine that will run it: Rust's regular expressions differ from Python's
                probe.str.contains(pattern)
            except pl.exceptions.PolarsError:
                raise ValueError(
                    f"{pattern[:60]!r} is not a valid regular expression "
                    "(Rust syntax: no look-around, no back-references)"
                ) from None
        return value

    @model_validator(mode="after")
    def _fitting_together(self) -> Self:
        if (self.admission_code is None) != (self.discharge_code is None):
            raise ValueError("--admission-code and --discharge-code only work together: give both or neither")
        if self.birth_code == self.death_code:
            raise ValueError("--birth-code and --death-code are the same code")
        if self.format != "mimic4" and self.labs:
            raise ValueError("--labs is for --format mimic4; other sources bring all their events")
        if self.format != "omop" and (self.measurements or self.observations):
            flag = "measurements" if self.measurements else "observations"
            raise ValueError(f"--{flag} is for --format omop; other sources bring all their events")
        if self.format != "meds" and self.column:
            raise ValueError(f"--column is for --format meds; the columns of {self.format} are fixed")
        return self

    def recorded(self) -> dict[str, Any]:
        """As JSON, for `dataset.json`; without the options of another format, so that a new one changes no digest."""
        others = set() if self.format == "omop" else {"measurements", "observations"}
        return self.model_dump(mode="json", exclude=others)

    @property
    def shares(self) -> tuple[float, float, float]:
        """Shares of train, tuning and held_out, summing to 1."""
        train, tuning, held_out = (float(part) / 100 for part in self.split.split("/"))
        return train, tuning, held_out
