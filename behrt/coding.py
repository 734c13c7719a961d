"""How does a code become coarser (ICD categories), or finer by the value it carries (quantile bins)?"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import polars as pl

from behrt.events import mix64

MAX_SAMPLE = 10_000
"""Training values kept per code to fit its bins: a quantile from so many is off by about half a percentage point."""

MAX_NEW = 1_000_000
"""Values that wait before the smallest hashes are looked for again; more where more are held."""

SAMPLE_SCHEMA = {"code": pl.String(), "numeric_value": pl.Float32(), "subject_id": pl.Int64(), "hash": pl.UInt64()}
"""Columns of the values that bins are fitted on."""

_ICD = r"^(?i:.*//)?(?i:ICD)[^/]*//(?:(?:9|10)[^/]*//)?[^/]+$"
_ICD_STEM = r"^((?i:.*//)?(?i:ICD)[^/]*//(?:(?:9|10)[^/]*//)?)"
_ICD9_EXTERNAL = r"^(?i:.*//)?(?i:ICD)(?:9[^/]*|[^/]*//9[^/]*)//E[^/]+$"


def shorten_icd(digits: int) -> pl.Expr:
    """The column `code` with ICD codes cut to `digits` characters, dots not counted; others are left alone.

    External-cause codes of ICD-9 keep one more, because their categories are E800 to E999.

    >>> codes = ["ICD10CM//E11.65", "DX//ICD9CM//4280", "DIAGNOSIS//ICD//9//E8490", "LAB//50912"]
    >>> pl.DataFrame({"code": codes}).select(shorten_icd(3))["code"].to_list()
    ['ICD10CM//E11', 'DX//ICD9CM//428', 'DIAGNOSIS//ICD//9//E849', 'LAB//50912']
    """
    code = pl.col("code")
    bare = code.str.replace_all(".", "", literal=True)

    def cut(length: int) -> pl.Expr:
        return bare.str.replace(_ICD_STEM + f"([^/]{{1,{length}}})[^/]*$", "${1}${2}")

    external = code.str.contains(_ICD9_EXTERNAL)
    return pl.when(~code.str.contains(_ICD)).then(code).when(external).then(cut(digits + 1)).otherwise(cut(digits))


def hashed_values(events: pl.DataFrame) -> pl.DataFrame:
    """The finite values of `events` (columns subject_id, time, code, numeric_value): `SAMPLE_SCHEMA`."""
    values = events.filter(pl.col("numeric_value").is_finite())
    hashes = mix64(values["subject_id"].to_numpy().view(np.uint64))
    hashes = mix64(hashes ^ values["time"].to_physical().to_numpy().view(np.uint64))
    hashes = mix64(hashes ^ values["numeric_value"].to_numpy().view(np.uint32).astype(np.uint64))
    return values.select("code", "numeric_value", "subject_id", pl.Series("hash", hashes, dtype=pl.UInt64))


class ValueSample:
    """A bounded sample of the numeric values of each code, the same however the events are sharded.

    Each value gets a hash of its subject, time and bits; the values with the smallest hashes stay. That is a uniform
    sample without replacement, and all values where a code has at most `MAX_SAMPLE`.
    """

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}  # a number for each code: a column of strings would keep those of each shard
        self._limits = np.zeros(0, np.uint64)  # by number, the largest hash that can still be among the smallest
        self._held = pl.DataFrame(schema={**SAMPLE_SCHEMA, "code": pl.UInt32()})
        self._new: list[pl.DataFrame] = []

    def add(self, events: pl.DataFrame) -> None:
        """Adds the finite values of `events` (columns subject_id, time, code, numeric_value)."""
        self.add_hashed(hashed_values(events))

    def add_hashed(self, values: pl.DataFrame) -> None:
        """Adds values that have their hashes, as of `hashed_values` or of another sample's `table`."""
        if values.is_empty():
            return
        codes = values["code"].unique()
        numbers = [self._numbers.setdefault(code, len(self._numbers)) for code in codes.to_list()]
        missing = len(self._numbers) - len(self._limits)
        self._limits = np.append(self._limits, np.full(missing, np.iinfo(np.uint64).max, np.uint64))
        number = pl.col("code").replace_strict(codes, pl.Series(numbers, dtype=pl.UInt32), return_dtype=pl.UInt32)
        values = values.with_columns(number)
        values = values.filter(values["hash"] <= pl.Series(self._limits[values["code"].to_numpy()], dtype=pl.UInt64))
        self._new.append(values)
        if sum(map(len, self._new)) > max(len(self._held), MAX_NEW):
            self._settle()

    def _settle(self) -> None:
        """Keeps the smallest hashes of each code."""
        self._held = (
            pl.concat([self._held, *self._new])
            .sort("code", "hash", "numeric_value", "subject_id")
            .group_by("code", maintain_order=True)
            .head(MAX_SAMPLE)
            .select(list(SAMPLE_SCHEMA))
        )
        self._new = []
        full = self._held.group_by("code").agg(pl.len(), pl.col("hash").max()).filter(pl.col("len") == MAX_SAMPLE)
        self._limits[full["code"].to_numpy()] = full["hash"].to_numpy()

    def table(self) -> pl.DataFrame:
        """What the sample holds, in an order of its own: `SAMPLE_SCHEMA`."""
        self._settle()
        names = pl.Series(list(self._numbers), dtype=pl.String)
        return self._held.with_columns(names.gather(self._held["code"]).alias("code")).sort(list(SAMPLE_SCHEMA))

    def bin_edges(self, bins: int, min_patients: int) -> dict[str, list[float]]:
        """The inner quantiles of each code, `bins - 1` numbers; codes of too few patients or values get none.

        An edge is itself a value of somebody's, therefore the same minimum of patients as for codes.
        """
        quantiles = [
            pl.col("numeric_value").quantile(number / bins, "lower").cast(pl.Float64).alias(str(number))
            for number in range(1, bins)
        ]
        fitted = (
            self.table()
            .group_by("code")
            .agg(*quantiles, pl.col("subject_id").n_unique().alias("patients"), pl.len().alias("values"))
            .filter((pl.col("patients") >= min_patients) & (pl.col("values") >= bins))
            .sort("code")
        )
        edges = fitted.select(pl.concat_list([str(number) for number in range(1, bins)]).alias("edges"))["edges"]
        return dict(zip(fitted["code"].to_list(), edges.to_list(), strict=True))


def append_bins(events: pl.DataFrame, edges: Mapping[str, list[float]]) -> pl.DataFrame:
    """The events with `//Q1` to `//Qn` after the code where it has edges and a finite value: 1 + edges below the value.

    >>> events = pl.DataFrame({"code": ["L", "L", "L", "M"], "numeric_value": [1.0, 2.0, 2.5, 9.0]})
    >>> append_bins(events, {"L": [1.0, 2.0]})["code"].to_list()
    ['L//Q1', 'L//Q2', 'L//Q3', 'M']
    """
    if not edges:
        return events
    known = pl.Series(range(len(edges)), dtype=pl.UInt32)
    number = pl.col("code").replace_strict(list(edges), known, default=None, return_dtype=pl.UInt32)
    value = pl.col("numeric_value").cast(pl.Float64)
    binned = events.select(number.alias("number"), value.alias("value")).with_row_index("place")
    binned = binned.filter(pl.col("number").is_not_null() & pl.col("value").is_finite())
    table = np.full((len(edges), max(map(len, edges.values()))), np.inf)  # [codes, edges]
    for row, own in zip(table, edges.values(), strict=True):
        row[: len(own)] = own
    bins = 1 + edges_below(binned["value"].to_numpy(), table, binned["number"].to_numpy())
    bin_of_event = np.zeros(len(events), np.int64)
    bin_of_event[binned["place"].to_numpy()] = bins
    suffixed = pl.concat_str("code", pl.lit("//Q"), pl.col("bin").cast(pl.String))
    return (
        events.with_columns(pl.Series("bin", bin_of_event))
        .with_columns(pl.when(pl.col("bin") > 0).then(suffixed).otherwise("code").alias("code"))
        .select(events.columns)
    )


def edges_below(
    values: npt.NDArray[np.float64], table: npt.NDArray[np.float64], rows: npt.NDArray[np.uint32]
) -> npt.NDArray[np.int64]:
    """How many of the edges in its row of the table lie below each value: a bisection of all values at once.

    Args:
        values: float64 [values].
        table: float64 [rows, edges], each row in rising order.
        rows: of each value, its row in the table.

    >>> edges_below(np.array([1.0, 2.5]), np.array([[1.0, 2.0], [2.0, 3.0]]), np.array([0, 1], np.uint32)).tolist()
    [0, 1]
    """
    flat, first = table.reshape(-1), rows.astype(np.int64) * table.shape[1]
    low, high = np.zeros(len(values), np.int64), np.full(len(values), table.shape[1])
    while (open_ := low < high).any():
        middle = (low + high) // 2
        below = open_ & (flat[np.minimum(first + middle, flat.size - 1)] < values)
        low, high = np.where(below, middle + 1, low), np.where(open_ & ~below, middle, high)
    return low
