"""On which device, and in which precision, does a run compute?"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from behrt.config import Device, Precision, UserError

if TYPE_CHECKING:
    import torch


def choose_device(asked: Device) -> torch.device:
    """The device for a setting; `auto` is CUDA, else Apple's MPS, else the CPU.

    Raises:
        UserError: the device asked for is not there.
    """
    import torch

    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if asked == "auto":
        return torch.device(next(name for name, there in present.items() if there))
    if not present[asked]:
        there = ", ".join(name for name, is_there in present.items() if is_there)
        raise UserError(f"--device: {asked} was asked for but is not available here; use one of: {there}, auto")
    return torch.device(asked)


def choose_precision(asked: Precision, device: torch.device) -> torch.dtype:
    """The dtype of matrix products; weights, sums and the optimizer stay in float32 either way.

    `auto` is bf16 where the hardware multiplies it faster than float32: CUDA cards that support it, and CPUs with AMX
    tiles or the bf16 products of AVX-512. Other CPUs emulate bf16 and are slower for it; MPS stays on float32.

    Raises:
        UserError: bf16 was asked for on MPS.
    """
    import torch

    if asked == "fp32":
        return torch.float32
    if asked == "bf16":
        if device.type == "mps":
            raise UserError("--precision: bf16 is not supported on mps; use fp32 or auto")
        return torch.bfloat16
    return torch.bfloat16 if fast_bf16(device) else torch.float32


def fast_bf16(device: torch.device) -> str | None:
    """What multiplies bf16 faster than float32 on the device; None where nothing does, or nobody has tried."""
    import torch

    if device.type == "cuda":
        with torch.cuda.device(device):  # torch answers for the card at hand
            return "tensor cores" if torch.cuda.is_bf16_supported(including_emulation=False) else None
    if device.type == "cpu" and torch.cpu._is_amx_tile_supported():
        return "AMX tiles"
    if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported():
        return "AVX-512 products"
    return None


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`x` on `device`, without waiting for what a GPU is still at."""
    if device.type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch says that a device has no memory left."""
    import torch

    texts = ("out of memory", "can't allocate memory")
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in texts)


def first_line(error: Exception) -> str:
    """What torch says of an error; what follows is where, and advice.

    >>> first_line(RuntimeError("[pair.cc:524] Connection closed by peer\\nand where"))
    '[pair.cc:524] Connection closed by peer'
    """
    return str(error).strip().partition("\n")[0][:200]


def free_cached_memory(device: torch.device) -> None:
    """Gives back what torch holds of the device's memory without using it."""
    import torch

    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def seconds_when_done(device: torch.device) -> float:
    """The time in seconds when the device has done all it was given."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()
