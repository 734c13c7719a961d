"""Codes: ICD categories and quantile bins."""

import numpy as np
import polars as pl
import pytest

from behrt import coding
from behrt.coding import ValueSample, append_bins, shorten_icd

from .small_records import day, events


@pytest.mark.parametrize(
    ("code", "short"),
    [
        ("ICD10CM//E119", "ICD10CM//E11"),
        ("ICD10CM//E11.9", "ICD10CM//E11"),
        ("DX//ICD9CM//4280", "DX//ICD9CM//428"),
        ("DIAGNOSIS//ICD//9//4019", "DIAGNOSIS//ICD//9//401"),
        ("DIAGNOSIS//ICD//10//I10", "DIAGNOSIS//ICD//10//I10"),
        ("ICD9CM//E8490", "ICD9CM//E849"),
        ("DIAGNOSIS//ICD//10//E8490", "DIAGNOSIS//ICD//10//E84"),
        ("ICD9CM//V5866", "ICD9CM//V58"),
        ("ICD10PCS//0DJ08ZZ", "ICD10PCS//0DJ"),
        ("LAB//50912", "LAB//50912"),
        ("MEDICATION//ACID//50.12", "MEDICATION//ACID//50.12"),
        ("ICD10CM", "ICD10CM"),
    ],
)
def test_only_icd_codes_are_shortened_to_their_category(code, short):
    assert pl.DataFrame({"code": [code]}).select(shorten_icd(3)).item() == short


def values(code: str, numbers, subject: int = 1, patients: int = 10) -> pl.DataFrame:
    return events(*((subject + n % patients, day(n), code, float(value)) for n, value in enumerate(numbers)))


def test_bins_hold_equal_shares_of_the_values_they_were_fitted_on():
    sample = ValueSample()
    frame = values("L", np.random.default_rng(0).normal(size=1000).astype(np.float32))
    sample.add(frame)
    binned = append_bins(frame, sample.bin_edges(10, min_patients=5))
    counts = binned["code"].value_counts()
    assert sorted(counts["code"]) == sorted(f"L//Q{number}" for number in range(1, 11))
    assert counts["count"].min() >= 99
    assert counts["count"].max() <= 101


def test_bins_equal_numpys_quantiles_and_search():
    numbers = np.random.default_rng(1).integers(0, 12, 500).astype(np.float32)  # many ties
    sample = ValueSample()
    sample.add(values("L", numbers))
    edges = sample.bin_edges(7, min_patients=1)["L"]
    assert edges == np.quantile(numbers, np.arange(1, 7) / 7, method="lower").tolist()
    probe = np.arange(-1, 14, 0.5)
    expected = [f"L//Q{1 + np.searchsorted(edges, value, side='left')}" for value in probe]
    assert append_bins(values("L", probe), {"L": edges})["code"].to_list() == expected


def test_a_sample_does_not_depend_on_the_shards(monkeypatch):
    monkeypatch.setattr(coding, "MAX_SAMPLE", 50)
    frame = values("L", np.random.default_rng(2).normal(size=400))
    whole, parts = ValueSample(), ValueSample()
    whole.add(frame)
    for start in (300, 0, 100, 200):
        parts.add(frame[start : start + 100])
    edges = whole.bin_edges(5, min_patients=1)
    assert parts.bin_edges(5, min_patients=1) == edges
    monkeypatch.setattr(coding, "MAX_SAMPLE", 400)
    exact = ValueSample()
    exact.add(frame)
    assert exact.bin_edges(5, min_patients=1) != edges  # the bound was in force
    assert np.allclose(exact.bin_edges(5, min_patients=1)["L"], edges["L"], atol=0.8)


def test_a_sample_that_is_settled_again_and_again_holds_the_smallest_hashes(monkeypatch):
    monkeypatch.setattr(coding, "MAX_SAMPLE", 7)
    monkeypatch.setattr(coding, "MAX_NEW", 10)
    generator = np.random.default_rng(4)
    shards = [
        pl.concat(
            [values(code, generator.normal(size=9), subject=10 * n) for code in generator.permutation(list("LMN"))]
        )
        for n in range(12)
    ]
    sample, other = ValueSample(), ValueSample()
    for shard in shards:
        sample.add(shard)
    every = coding.hashed_values(pl.concat(shards))
    expected = every.sort("code", "hash").group_by("code", maintain_order=True).head(7)
    assert sample.table().equals(expected.select(every.columns).sort(every.columns))
    other.add_hashed(sample.table())  # as a part brings it
    assert other.table().equals(sample.table())


def test_values_of_few_patients_give_no_edges():
    sample = ValueSample()
    sample.add(pl.concat([values("RARE", range(50), patients=4), values("COMMON", range(50), patients=5)]))
    assert list(sample.bin_edges(4, min_patients=5)) == ["COMMON"]


def test_events_without_a_finite_value_keep_their_code():
    frame = events(
        (1, day(0), "L"), (1, day(1), "L", float("nan")), (1, day(2), "L", float("inf")), (1, day(3), "L", 1)
    )
    assert append_bins(frame, {"L": [1.0]})["code"].to_list() == ["L", "L", "L", "L//Q1"]
