"""How does a code become coarser (ICD categories), or finer by the value it carries (quantile bins)?"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import polars as pl

from behrt.events import mix64

MAX_SAMPLE = 10_000
"""Training values kept per code to fit its bins: a quantile from so many is off by about half a percentage point."""

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


class ValueSample:
    """A bounded sample of the numeric values of each code, the same however the events are sharded.

    Each value gets a hash of its subject, time and bits; the values with the smallest hashes stay. That is a uniform
    sample without replacement, and all values where a code has at most `MAX_SAMPLE`.
    """

    def __init__(self) -> None:
        self._held = pl.DataFrame(
            schema={"code": pl.String, "numeric_value": pl.Float32, "subject_id": pl.Int64, "hash": pl.UInt64}
        )

    def add(self, events: pl.DataFrame) -> None:
        """Adds the finite values of `events` (columns subject_id, time, code, numeric_value)."""
        values = events.filter(pl.col("numeric_value").is_finite())
        hashes = mix64(values["subject_id"].to_numpy().view(np.uint64))
        hashes = mix64(hashes ^ values["time"].to_physical().to_numpy().view(np.uint64))
        hashes = mix64(hashes ^ values["numeric_value"].to_numpy().view(np.uint32).astype(np.uint64))
        new = values.select("code", "numeric_value", "subject_id").with_columns(pl.Series("hash", hashes))
        self._held = (
            pl.concat([self._held, new])
            .sort("code", "hash", "numeric_value", "subject_id")
            .group_by("code", maintain_order=True)
            .head(MAX_SAMPLE)
            .select("code", "numeric_value", "subject_id", "hash")
        )

    def bin_edges(self, bins: int, min_patients: int) -> dict[str, list[float]]:
        """The inner quantiles of each code, `bins - 1` numbers; codes of too few patients or values get none.

        An edge is itself a value of somebody's, therefore the same minimum of patients as for codes.
        """
        quantiles = [
            pl.col("numeric_value").quantile(number / bins, "lower").cast(pl.Float64).alias(str(number))
            for number in range(1, bins)
        ]
        fitted = (
            self._held.group_by("code")
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
    table = (
        pl.DataFrame(
            [(code, edge, number) for code, own in edges.items() for number, edge in enumerate(own, 2)],
            schema={"code": pl.String, "edge": pl.Float64, "bin": pl.Int32},
            orient="row",
        )
        .unique(["code", "edge"], keep="last", maintain_order=True)  # equal quantiles leave the bins between them empty
        .sort("edge")
    )
    value = pl.col("numeric_value").cast(pl.Float64)
    binned = (
        events.with_row_index("place")
        .with_columns(pl.when(value.is_finite()).then(value).alias("value"))
        .sort("value", nulls_last=True)
        .join_asof(
            table, left_on="value", right_on="edge", by="code", strategy="backward", allow_exact_matches=False,
            check_sortedness=False,
        )
        .sort("place")
    )  # fmt: skip
    has_bin = pl.col("value").is_not_null() & pl.col("code").is_in(list(edges))
    suffixed = pl.concat_str("code", pl.lit("//Q"), pl.col("bin").fill_null(1).cast(pl.String))
    return binned.with_columns(pl.when(has_bin).then(suffixed).otherwise("code").alias("code")).select(events.columns)
