"""Does each patient attend to itself alone, as by torch's own attention, one patient at a time?"""

import pytest
import torch
import torch.nn.functional as F

from behrt import attention
from behrt.attention import (
    LONGEST_EXPLICIT,
    SHARED_LANE,
    SHORTEST_OF_GROUP,
    Lanes,
    PatientGroups,
    PatientRuns,
    attend,
)

CPU = torch.device("cpu")
LENGTHS = {
    "uneven": [3, 50, 1, 17, 48, 9, 16, 1, 30],
    "equal": [6, 6, 6],
    "one patient": [5],
    "one token": [1],
}


def one_at_a_time(query, key, value, counts, asking, heads):
    """The context of the tokens that ask, each patient by itself."""
    contexts = []
    start = 0
    for count in counts.tolist():
        own = asking[(asking >= start) & (asking < start + count)]
        q, k, v = (
            x.unflatten(1, (heads, -1)).transpose(0, 1)
            for x in (query[own], key[start : start + count], value[start : start + count])
        )
        if len(own):
            contexts.append(F.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1))
        start += count
    return torch.cat(contexts)


def random_case(lengths: list[int], asking_share: float, heads: int = 2, head_dim: int = 4):
    torch.manual_seed(len(lengths))
    counts = torch.tensor(lengths)
    tokens = int(counts.sum())
    query, key, value = (
        torch.randn(tokens, heads * head_dim, dtype=torch.float64, requires_grad=True) for _ in range(3)
    )
    asking = (torch.rand(tokens) < asking_share).nonzero().squeeze(1)
    return query, key, value, counts, asking


@pytest.mark.parametrize("longest_explicit", [256, 0], ids=["plain products", "torch's kernel"])
@pytest.mark.parametrize("asking_share", [1.0, 0.2, 0.0], ids=["all ask", "some ask", "nobody asks"])
@pytest.mark.parametrize("name", LENGTHS)
def test_context_and_gradients_are_those_of_one_patient_at_a_time(
    name: str, asking_share: float, longest_explicit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "LONGEST_EXPLICIT", longest_explicit)
    query, key, value, counts, asking = random_case(LENGTHS[name], asking_share)
    groups = PatientGroups.of(counts, heads=2, device=CPU)
    if asking_share < 1:
        groups = groups.asking(asking)
    found = attend(query[asking], key, value, groups)
    assert found.shape == (len(asking), 8)
    if not len(asking):
        found.sum().backward()
        return
    expected = one_at_a_time(query, key, value, counts, asking, heads=2)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    direction = torch.randn(found.shape, dtype=torch.float64)
    gradients = [torch.autograd.grad((context * direction).sum(), (query, key, value)) for context in (found, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def told_where_each_begins(query, key, value, query_bounds, key_bounds, longest):
    """What `varlen_attn` is documented to compute, one patient at a time; it itself runs on CUDA alone."""
    assert query_bounds.dtype == key_bounds.dtype == torch.int32
    assert longest >= query_bounds.diff().max()
    assert longest >= key_bounds.diff().max()
    contexts = []
    for patient in range(len(key_bounds) - 1):
        (first, stop), (start, end) = query_bounds[patient : patient + 2], key_bounds[patient : patient + 2]
        q, k, v = (x.transpose(0, 1) for x in (query[first:stop], key[start:end], value[start:end]))
        contexts.append(F.scaled_dot_product_attention(q, k, v).transpose(0, 1))
    return torch.cat(contexts)


@pytest.mark.parametrize("asking_share", [1.0, 0.2, 0.0], ids=["all ask", "some ask", "nobody asks"])
@pytest.mark.parametrize("name", LENGTHS)
def test_a_kernel_for_patients_end_to_end_is_told_where_each_begins(
    name: str, asking_share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_end_to_end", told_where_each_begins)
    query, key, value, counts, asking = random_case(LENGTHS[name], asking_share)
    runs = PatientRuns.of(counts, heads=2, longest=7, device=CPU)
    if asking_share < 1:
        runs = runs.asking(asking)
    found = attend(query[asking], key, value, runs)
    assert found.shape == (len(asking), 8)
    if len(asking):
        expected = one_at_a_time(query, key, value, counts, asking, heads=2)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_first_and_last_tokens_ask_their_own_patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_end_to_end", told_where_each_begins)
    query, key, value, counts, _ = random_case(LENGTHS["uneven"], 1.0)
    ends = counts.cumsum(0)
    asking = torch.cat([ends - counts, ends - 1]).unique()
    expected = one_at_a_time(query, key, value, counts, asking, heads=2)
    for patients in (
        PatientRuns.of(counts, heads=2, longest=50, device=CPU),
        PatientGroups.of(counts, heads=2, device=CPU),
    ):
        found = attend(query[asking], key, value, patients.asking(asking))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def across_patients(query, key, value, *bounds_and_longest):
    q, k, v = (x.transpose(0, 1) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v).transpose(0, 1)


def refusing(*arguments):
    raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.")


@pytest.mark.parametrize(
    ("kernel", "agrees"), [(told_where_each_begins, True), (across_patients, False), (refusing, False)]
)
def test_a_kernel_is_used_only_where_it_computes_what_padded_groups_do(
    kernel, agrees: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_end_to_end", kernel)
    assert attention._kernel_agrees.__wrapped__(CPU, torch.float32, 8) is agrees


def test_a_token_that_is_no_number_reaches_no_patient_of_another_lane() -> None:
    query, key, value, counts, _ = random_case([40, 30], 1.0)
    with torch.no_grad():
        key[41] = torch.nan
    context = attend(query, key, value, PatientGroups.of(counts, heads=2, device=CPU))
    assert context[:40].isfinite().all()
    assert context[40:].isnan().any()


def uneven_counts() -> torch.Tensor:
    return torch.randint(1, 400, (300,), generator=torch.Generator().manual_seed(0))


def test_a_group_of_lanes_of_one_patient_holds_patients_of_similar_length_and_every_patient_once() -> None:
    counts = uneven_counts()
    order, lanes, bounds = Lanes.of_one(counts)
    assert sorted(order.tolist()) == lanes.tolist() == list(range(300))
    assert [first for first, _ in bounds] == [0, *(stop for _, stop in bounds[:-1])]
    for first, stop in bounds:
        lengths = counts[order[first:stop]]
        assert lengths.min() >= SHORTEST_OF_GROUP * lengths.max()


def test_shared_lanes_hold_every_patient_once_and_no_more_than_fits() -> None:
    counts = uneven_counts()
    order, lanes, bounds = Lanes.shared(counts)
    assert sorted(order.tolist()) == list(range(300))
    lengths = torch.zeros(bounds[-1][1], dtype=torch.int64).index_add_(0, lanes, counts[order])
    for first, stop in bounds:
        longest = int(counts[order[(lanes >= first) & (lanes < stop)]].max())
        if longest > LONGEST_EXPLICIT:  # alone
            assert torch.bincount(lanes)[first:stop].tolist() == [1] * (stop - first)
        else:
            assert lengths[first:stop].max() <= longest + -longest % SHARED_LANE


def test_in_lower_precision_on_the_cpu_the_shapes_of_attention_are_few() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = set()
    for _ in range(50):
        counts = torch.randint(5, 60, (32,), generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            shapes.update(PatientGroups.of(counts, heads=1, device=CPU).keys.blocks)
    assert len(shapes) < 15


def test_padding_is_a_small_share_where_lengths_are_uneven() -> None:
    counts = torch.randint(5, 200, (64,), generator=torch.Generator().manual_seed(0))
    groups = PatientGroups.of(counts, heads=1, device=CPU)
    assert sum(block.rows for block in groups.keys.blocks) < 1.25 * counts.sum()
    assert 64 * counts.max() > 1.8 * counts.sum()  # negative control: one group of all


@pytest.mark.parametrize("head_dim", [16, 32, 64])
def test_in_bf16_the_context_stays_close_to_float32(head_dim: int) -> None:
    query, key, value, counts, _ = random_case(LENGTHS["uneven"], 1.0, head_dim=head_dim)
    groups = PatientGroups.of(counts, heads=2, device=CPU)
    exact = attend(query, key, value, groups)
    with torch.autocast("cpu", torch.bfloat16):
        found = attend(query.bfloat16(), key.bfloat16(), value.bfloat16(), groups)
    assert found.dtype is torch.bfloat16
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=0.05)
