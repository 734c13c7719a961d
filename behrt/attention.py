"""How do the tokens of each patient attend to each other, and to no one else's, without paying for padding?

Everything but attention treats a token on its own, and gets the tokens of all patients end to end. For attention alone
they are laid out in lanes, and lanes of similar length are put side by side in groups, each padded to the longest of
its group. A lane holds one patient, or, on the CPU, several short ones that see nothing of each other. On a GPU whose
kernel is told where each patient begins (Dao, 2023, "FlashAttention-2"), they stay as they are.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from behrt.cheap_layers import missing_to_recur
from behrt.devices import first_line, is_out_of_memory, to_device

log = logging.getLogger(__name__)

SHORTEST_OF_GROUP = 0.7
"""How long the shortest patient of a group is at least, as a share of the longest. From 0.6 to 0.8 what is lost to
padding and what is lost to many small groups balance, on SynPUF's lengths on the CPU."""

LONGEST_EXPLICIT = 256
"""Tokens up to which attention on the CPU is plain matrix products that keep their weights for the backward pass: for
short histories four times as fast as the fused kernel, whose memory does not grow with the square of the length."""

SHARED_LANE = 64
"""What the lengths of lanes that patients share are multiples of. So there are few kinds of products, larger ones, and
the same ones at every step: in lower precision oneDNN compiles a kernel for each kind."""

NARROWEST_LOWERED = 32
"""Width of a head from which the products of attention are computed in a lower precision; in narrower ones it saves
nothing."""


class Block(NamedTuple):
    """One group of lanes, each padded to `width` tokens."""

    lanes: int
    heads: int
    width: int

    @property
    def rows(self) -> int:
        return self.lanes * self.heads * self.width


class Lanes(NamedTuple):
    """Which patients lie in which lane.

    Attributes:
        order: int64 [patients], their indices in the order in which the lanes hold them.
        lanes: int64 [patients], the lane of each, in that order.
        bounds: first and last (exclusive) lane of each group.
    """

    order: Tensor
    lanes: Tensor
    bounds: list[tuple[int, int]]

    @classmethod
    def of_one(cls, counts: Tensor) -> Lanes:
        """A lane for each patient, from the longest to the shortest."""
        order = torch.argsort(counts, descending=True, stable=True)
        return cls(order, torch.arange(len(counts)), _similar(counts[order].tolist()))

    @classmethod
    def shared(cls, counts: Tensor) -> Lanes:
        """Each patient in the lane with the least room for it; those that are too long for that have their own."""
        order = torch.argsort(counts, descending=True, stable=True)
        lengths = counts[order].tolist()
        alone = sum(length > LONGEST_EXPLICIT for length in lengths)
        members = [[place] for place in range(alone)]
        sizes: list[int] = []  # of the lanes that are shared; they fall, as lengths do
        with_room: dict[int, list[int]] = {}
        for place, length in enumerate(lengths[alone:], alone):
            room = next((room for room in range(length, LONGEST_EXPLICIT) if with_room.get(room)), 0)
            if room:
                lane = with_room[room].pop()
            else:
                lane, room = len(members), length + -length % SHARED_LANE
                members.append([])
                sizes.append(room)
            members[lane].append(place)
            with_room.setdefault(room - length, []).append(lane)
        starts = [lane for lane in range(len(sizes)) if lane == 0 or sizes[lane] < sizes[lane - 1]]
        bounds = [(alone + first, alone + stop) for first, stop in pairwise([*starts, len(sizes)])]
        lanes = torch.arange(len(members)).repeat_interleave(torch.tensor([len(m) for m in members], dtype=torch.int64))
        places = torch.tensor([place for lane in members for place in lane], dtype=torch.int64)
        return cls(order[places], lanes, _similar(lengths[:alone]) + bounds)


def _similar(lengths: list[int]) -> list[tuple[int, int]]:
    """First and last (exclusive) of groups of similar length, where `lengths` fall."""
    bounds, first = [], 0
    for place, length in enumerate(lengths):
        if length < SHORTEST_OF_GROUP * lengths[first]:
            bounds.append((first, place))
            first = place
    if lengths:
        bounds.append((first, len(lengths)))
    return bounds


class Side:
    """Where the tokens of one side of attention, those that ask or those that are asked, stand in the padded groups.

    A row is one head of one token. There are `tokens * heads` of them; padded, they are in the order group, lane,
    head, token.

    Attributes:
        blocks: the groups.
        places: int64 [tokens * heads], the padded row of each row.
        sources: int64 [padded rows], the row that stands there; 0 in padding.
        filled: bool [padded rows], what is no padding; None where nothing is padding.
        biases: for each group float32 [lanes, heads, 1, width], 0 for a token and -inf for padding, or None.
        owners: for each group int64 [lanes, width] on the CPU, the patient of each token, -1 in padding.
    """

    def __init__(self, counts: Tensor, lanes: Lanes, *, heads: int, device: torch.device) -> None:
        """`counts`: int64 [patients], tokens of each patient on this side. The others as in `PatientGroups`."""
        self.heads = heads
        order, lane_of, bounds = lanes
        number = bounds[-1][1] if bounds else 0
        ordered = counts[order]
        lengths = torch.zeros(number, dtype=torch.int64).index_add_(0, lane_of, ordered)  # [lanes]
        self.blocks = []
        for first, stop in bounds:
            width = int(lengths[first:stop].max())
            self.blocks.append(Block(stop - first, heads, width + missing_to_recur(width, 16, device)))
        widths = torch.tensor([block.width for block in self.blocks for _ in range(block.lanes)], dtype=torch.int64)
        before = ordered.cumsum(0) - ordered - (lengths.cumsum(0) - lengths)[lane_of]  # tokens, in the lane
        firsts, widths_of = torch.empty_like(counts), torch.empty_like(counts)  # [patients], first padded row; width
        firsts[order] = heads * (widths.cumsum(0) - widths)[lane_of] + before
        widths_of[order] = widths[lane_of]
        tokens, padded_rows = int(counts.sum()), sum(block.rows for block in self.blocks)
        patients = torch.arange(len(counts)).repeat_interleave(counts)  # [tokens]
        within = torch.arange(tokens) - (counts.cumsum(0) - counts)[patients]
        places = (firsts[patients] + within)[:, None] + widths_of[patients][:, None] * torch.arange(heads)
        self.places = places.flatten()
        self.sources = torch.zeros(padded_rows, dtype=torch.int64)
        self.sources[self.places] = torch.arange(tokens * heads)
        owners = torch.full((padded_rows,), -1)
        owners[self.places] = patients.repeat_interleave(heads)
        self.owners = [part.view(block)[:, 0] for part, block in self._parts(owners)]
        self.filled: Tensor | None = None
        self.biases: list[Tensor | None] = [None] * len(self.blocks)
        if tokens * heads < padded_rows:
            self.filled = (owners >= 0).to(device)
            bias = torch.zeros(padded_rows).masked_fill_(owners < 0, -math.inf).to(device)
            self.biases = [part.view(block.lanes, heads, 1, block.width) for part, block in self._parts(bias)]
        self.places, self.sources = self.places.to(device), self.sources.to(device)

    def _parts(self, padded: Tensor) -> Iterator[tuple[Tensor, Block]]:
        """The padded rows of each group."""
        parts = padded.split([block.rows for block in self.blocks])  # type: ignore[no-untyped-call]
        return zip(parts, self.blocks, strict=True)

    def pad(self, x: Tensor) -> list[Tensor]:
        """`x` [tokens, heads * head_dim] as a tensor [lanes, heads, width, head_dim] for each group.

        What stands in padding is some row: finite, and meaningless. No gradient comes back from it.
        """
        head_dim = x.shape[1] // self.heads
        padded: Tensor = _Pad.apply(x.reshape(-1, head_dim), self)  # type: ignore[no-untyped-call]
        return [part.view(*block, head_dim) for part, block in self._parts(padded)]

    def unpad(self, groups: list[Tensor]) -> Tensor:
        """The inverse of `pad`: [tokens, heads * head_dim]."""
        padded = torch.cat([group.flatten(0, 2) for group in groups])
        rows: Tensor = _Unpad.apply(padded, self)  # type: ignore[no-untyped-call]
        return rows.view(-1, self.heads * rows.shape[1])


class _Pad(torch.autograd.Function):
    """Each row has one place, so that the way back is a selection too, and needs no sums."""

    @staticmethod
    def forward(ctx, rows, side):  # type: ignore[no-untyped-def]
        ctx.side = side
        return rows.index_select(0, side.sources)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        return gradient.index_select(0, ctx.side.places), None


class _Unpad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, padded, side):  # type: ignore[no-untyped-def]
        ctx.side = side
        return padded.index_select(0, side.places)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        padded = gradient.index_select(0, ctx.side.sources)
        return (padded if ctx.side.filled is None else padded.mul_(ctx.side.filled[:, None])), None


@dataclass(frozen=True)
class PatientGroups:
    """Patients in lanes of similar length, so that attention wastes little on padding.

    Attributes:
        counts: int64 [patients] on the CPU, tokens of each patient, in the order in which they stand end to end.
        lanes: where they lie.
        keys: all tokens.
        queries: those that ask; all tokens, as a rule.
        biases: for each group float32 that broadcasts to [lanes, heads, asking, width], -inf for what is padding or
            another patient's, else 0; None where there is neither.
    """

    counts: Tensor
    lanes: Lanes
    keys: Side
    queries: Side
    biases: list[Tensor | None]

    @classmethod
    def of(cls, counts: Tensor, *, heads: int, device: torch.device) -> PatientGroups:
        """Groups of patients that have `counts` tokens (int64 [patients] on the CPU, at least 1 each)."""
        lanes = Lanes.shared(counts) if device.type == "cpu" else Lanes.of_one(counts)
        keys = Side(counts, lanes, heads=heads, device=device)
        return cls(counts, lanes, keys, keys, _biases(lanes, keys, keys))

    def asking(self, wanted: Tensor) -> PatientGroups:
        """The same groups where only the tokens `wanted` ask (int64 indices, rising); all are asked."""
        patients = torch.bucketize(wanted.cpu(), self.counts.cumsum(0), right=True)
        counts = torch.bincount(patients, minlength=len(self.counts))
        queries = Side(counts, self.lanes, heads=self.keys.heads, device=self.keys.places.device)
        return replace(self, queries=queries, biases=_biases(self.lanes, queries, self.keys))


def _biases(lanes: Lanes, queries: Side, keys: Side) -> list[Tensor | None]:
    patients = torch.bincount(lanes.lanes).tolist()  # of each lane
    biases = list(keys.biases)
    for group, (first, stop) in enumerate(lanes.bounds):
        if max(patients[first:stop]) > 1:
            asking, asked = queries.owners[group][:, :, None], keys.owners[group][:, None, :]
            apart = (asking != asked) & (asking >= 0)  # what is padding may see anything, else it would be no number
            biases[group] = torch.zeros(apart.shape).masked_fill_(apart, -math.inf)[:, None]
    return biases


@dataclass(frozen=True)
class PatientRuns:
    """Patients end to end, for a kernel that is told where each begins.

    Attributes:
        keys: int32 [patients + 1] on the device, where the tokens of each patient begin; the last is their number.
        queries: likewise of the tokens that ask.
        heads: of attention.
        longest: no patient has more tokens.
    """

    keys: Tensor
    queries: Tensor
    heads: int
    longest: int

    @classmethod
    def of(cls, counts: Tensor, *, heads: int, longest: int, device: torch.device) -> PatientRuns:
        """Patients that have `counts` tokens (int64 [patients] on the CPU).

        Args:
            longest: how many tokens they may have; the same at every step, for it becomes part of what is compiled.
        """
        bounds = to_device(F.pad(counts.cumsum(0), (1, 0)).to(torch.int32), device)
        return cls(bounds, bounds, heads, max(longest, *counts.tolist()))

    def asking(self, wanted: Tensor) -> PatientRuns:
        """The same patients where only the tokens `wanted` ask (int64 indices, rising); all are asked."""
        wanted = to_device(wanted, self.keys.device).to(self.keys.dtype)
        before = torch.searchsorted(wanted, self.keys, out_int32=True)
        return replace(self, queries=before)


def runs_can_stay(device: torch.device, head_dim: int) -> bool:
    """Whether attention on `device`, in the precision that now holds, takes patients end to end.

    That is so on CUDA in half precision, where torch has a kernel for the card and for heads of this width, and where
    that kernel computes what plain attention does.
    """
    if device.type != "cuda" or not torch.is_autocast_enabled("cuda"):
        return False
    return _kernel_agrees(device, torch.get_autocast_dtype("cuda"), head_dim)


@cache
def _kernel_agrees(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether context and gradients of two short patients are the same from torch's kernel as from padded groups.

    Its requirements differ from card to card and between versions of torch; it says so by raising.
    """
    counts = torch.tensor([3, 5])
    with torch.inference_mode(False), torch.enable_grad():
        inputs = [torch.randn(8, 2 * head_dim, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
        query, key, value = inputs = [x.to(device, dtype).requires_grad_() for x in inputs]
        found = []
        for patients in (
            PatientRuns.of(counts, heads=2, longest=5, device=device),
            PatientGroups.of(counts, heads=2, device=device),
        ):
            try:
                context = attend(query, key, value, patients)
                found.append([context, *torch.autograd.grad(context.float().square().sum(), inputs)])
            except (ImportError, RuntimeError) as error:  # torch had none before 2.10
                if is_out_of_memory(error):
                    raise
                log.warning("attention on %s pads patients to groups: %s", device, first_line(error))
                return False
    return all(torch.allclose(ours, theirs, rtol=0.05, atol=0.05) for ours, theirs in zip(*found, strict=True))


Patients = PatientGroups | PatientRuns


def attend(query: Tensor, key: Tensor, value: Tensor, groups: Patients) -> Tensor:
    """Scaled dot-product attention (Vaswani et al., 2017) of each patient's tokens over all tokens of that patient.

    Args:
        query: float [tokens that ask, heads * head_dim].
        key, value: float [tokens, heads * head_dim].
        groups: whose tokens they are.

    Returns:
        The context of each token that asks, [tokens that ask, heads * head_dim].
    """
    if not len(query):  # nobody asks
        return query
    if isinstance(groups, PatientRuns):
        q, k, v = (x.view(len(x), groups.heads, -1) for x in (query, key, value))
        return _end_to_end(q, k, v, groups.queries, groups.keys, groups.longest).flatten(1)
    queries, keys = groups.queries, groups.keys
    parts = zip(queries.pad(query), keys.pad(key), keys.pad(value), groups.biases, strict=True)
    return queries.unpad([_attend_in_group(*part) for part in parts])


def _end_to_end(query: Tensor, key: Tensor, value: Tensor, queries: Tensor, keys: Tensor, longest: int) -> Tensor:
    """Attention over tensors [tokens, heads, head_dim] of patients who begin at `queries` and `keys`."""
    from torch.nn.attention.varlen import varlen_attn  # imports the compiler, which only this needs

    context = varlen_attn(query, key, value, queries, keys, longest, longest)
    assert isinstance(context, Tensor)
    return context


def _attend_in_group(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    """Attention over tensors [lanes, heads, width, head_dim]; `bias` as in `PatientGroups`."""
    if not query.shape[2]:  # nobody in this group asks
        return query
    if query.device.type != "cpu" or key.shape[2] > LONGEST_EXPLICIT:
        # a copy, because kernels want a mask that begins at an aligned address
        mask = None if bias is None else bias.to(query.dtype, copy=True)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    with torch.autocast("cpu", enabled=False):  # what is computed in which precision is decided here
        return _attend_explicitly(query, key, value, bias)


def _attend_explicitly(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    dtype = query.dtype
    if dtype.itemsize < 4 and query.shape[-1] < NARROWEST_LOWERED:
        query, key, value = query.float(), key.float(), value.float()
    scale = 1 / math.sqrt(query.shape[-1])
    scores = query @ key.transpose(-1, -2)  # [lanes, heads, asking, width]
    # in one dtype: torch adds the like much faster than the unlike, and inside of the softmax all is float32
    scores = scores * scale if bias is None else torch.add(bias.to(scores.dtype), scores, alpha=scale)
    # No dropout on the weights: the residual branch has its own.
    return (scores.softmax(-1) @ value).to(dtype)
