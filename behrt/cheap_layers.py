"""Which layers compute what torch's own do, with less work?

Measured on the CPU, where an element-wise pass over the activations costs as much as a tenth of a matrix product: what
matters is the number of passes, and that none of them mixes dtypes or makes booleans, which torch does not vectorise.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INTEGER_OF_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""The integers that are as wide as a float of so many bytes."""


def lowered(x: Tensor) -> Tensor:
    """`x` in the dtype of matrix products: under autocast its lower precision, else unchanged.

    For what several layers read: each would cast it anew.
    """
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def missing_to_recur(count: int, multiple: int, device: torch.device) -> int:
    """How many rows to add to `count`, so that the shapes of matrix products recur from step to step.

    In lower precision on the CPU, oneDNN compiles a kernel for every shape that it has not met, which takes as long as
    a small product itself. Elsewhere none.
    """
    return -count % multiple if device.type == "cpu" and torch.is_autocast_enabled("cpu") else 0


class Linear(nn.Linear):
    """A linear layer that under autocast casts a frozen weight once, and not at every call."""

    _cast: tuple[tuple[object, ...], Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        compiled = torch.compiler.is_compiling()  # then the cast is part of what is compiled
        if self.weight.requires_grad or compiled or not torch.is_autocast_enabled(device):
            return F.linear(x, self.weight, self.bias)
        return F.linear(x, self._frozen(torch.get_autocast_dtype(device)), self.bias)

    @property
    def frozen_cast(self) -> Tensor | None:
        """What it keeps of a frozen weight in lower precision, if it was called under autocast."""
        return None if self._cast is None else self._cast[1]

    def _frozen(self, dtype: torch.dtype) -> Tensor:
        """The weight in `dtype`, cast anew only after it was changed or moved."""
        key = (dtype, self.weight.device, self.weight.data_ptr(), self.weight._version)
        if self._cast is None or self._cast[0] != key:
            with torch.inference_mode(False), torch.no_grad():  # an evaluation may come first, and training needs it
                self._cast = key, self.weight.to(dtype)
        return self._cast[1]


class Dropout(nn.Module):
    """Dropout (Srivastava et al., 2014) whose random numbers are cheap on the CPU.

    There torch draws one number per element, one after the other, a sixth of a small model's step. Here every draw of
    64 bits decides for four elements, 15 bits each, and the choice is applied to the bits of the floats. The share that
    is dropped is exact to 1/32,768.
    """

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, hidden: Tensor) -> Tensor:
        return drop(hidden, self.share) if self.training else hidden

    def extra_repr(self) -> str:
        return f"share={self.share}"


def drop(x: Tensor, share: float) -> Tensor:
    """`x` with a random `share` of its elements set to 0 and the rest scaled up, so that its expectation stays."""
    if share == 0:
        return x
    if x.device.type != "cpu":
        return F.dropout(x, share)
    count = x.numel()
    dropped = min(round(share * 32768), 32767)
    draws = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(1 << 63), None).view(torch.int16)[:count]
    # Of 15 random bits the dropped share is subtracted. The sign, spread over all bits, is 0 for what is kept.
    kept = draws.bitwise_and_(0x7FFF).sub_(dropped).bitwise_right_shift_(15).bitwise_not_()
    bits = kept.view(x.shape).to(INTEGER_OF_SIZE[x.element_size()])
    result: Tensor = _Keep.apply(x, bits, 32768 / (32768 - dropped))  # type: ignore[no-untyped-call]
    return result


class _Keep(torch.autograd.Function):
    """Sets to 0 where `bits` are 0, and scales where they are all ones."""

    @staticmethod
    def forward(ctx, x, bits, scale):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(bits)
        ctx.scale = scale
        return (x.view(bits.dtype) & bits).view(x.dtype).mul_(scale)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        (bits,) = ctx.saved_tensors
        return (gradient.view(bits.dtype) & bits).view(gradient.dtype).mul_(ctx.scale), None, None
