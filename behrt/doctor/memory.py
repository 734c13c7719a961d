"""How much memory does a training need, and how much is there?

What a step needs is measured, not tabulated: the tensors that a real forward pass keeps for its backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from behrt.cheap_layers import Dropout, Linear
from behrt.lora import Adapter

TEMPORARIES = 2
"""Tensors as large as the largest kept one that backward needs at once: the gradients of a layer's output and input."""
EVALUATION_TENSORS = 4
"""Tensors as large as the largest kept one that are alive at once in a forward pass without gradients."""
DROPPED_BYTES = 5
"""What dropout keeps for backward, per element: a float and a flag."""
CPU_HEAP_SHARE = 1.25
CPU_HEAP_BYTES = 150_000_000
"""What the C library's heap takes on the CPU: a share beyond the tensors that live in it, where freed and kept ones
alternate, and what grows over an epoch of uneven steps. Measured on Linux, where the prediction with both was within a
factor of 1.5 of the growth in resident memory, small to large."""


@dataclass(frozen=True)
class Kept:
    """What a micro-batch keeps for its backward pass.

    Attributes:
        size: tokens of the micro-batch, padding included.
        bytes: each storage once, parameters not counted; with what dropout would keep in training.
        largest: bytes of the largest storage.
    """

    size: int
    bytes: int
    largest: int


class Keeping:
    """Counts what the forward passes inside `watch` keep for backward."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self._storages: dict[int, int] = {}  # bytes by address; all are alive until backward
        self._dropped = 0

    def kept(self, size: int) -> Kept:
        """The count, for a micro-batch of `size` tokens."""
        casts = {cast.untyped_storage().data_ptr() for cast in _casts(self._model)}  # they stay, whatever the batch
        storages = [held for address, held in self._storages.items() if address not in casts]
        return Kept(size, sum(storages) + self._dropped, max(storages, default=0))

    @contextmanager
    def watch(self) -> Iterator[None]:
        hooks = [
            module.register_forward_pre_hook(self._drop)
            for module in self._model.modules()
            if (isinstance(module, Dropout) and module.share) or (isinstance(module, Adapter) and module.dropout)
        ]
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._parameters:
            self._storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    def _drop(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._dropped += DROPPED_BYTES * inputs[0].numel()


def memory_needed(
    model: nn.Module, kept: Kept, *, largest_size: int, largest_evaluated: int, device: torch.device, ranks: int = 1
) -> int:
    """Bytes on the device at the peak of training: weights, gradients, AdamW's two moments, and one micro-batch.

    On the CPU also the copy of the best weights, and what the heap takes. The records and the libraries do not count.

    Args:
        kept: by a micro-batch of any size; scaled to the largest, of `largest_size` tokens.
        largest_evaluated: tokens of the largest batch of an evaluation.
        ranks: processes that train together; several lay their gradients end to end, to sum them.
    """
    trained = sum(_bytes(parameter) for parameter in model.parameters() if parameter.requires_grad)
    training = (kept.bytes + TEMPORARIES * kept.largest) * largest_size // kept.size
    evaluating = EVALUATION_TENSORS * kept.largest * largest_evaluated // kept.size
    batch = max(training, evaluating) + (trained if ranks > 1 else 0)
    if device.type == "cpu":
        return _held_bytes(model) + 4 * trained + int(CPU_HEAP_SHARE * batch) + CPU_HEAP_BYTES
    return _held_bytes(model) + 3 * trained + batch


def memory_available(model: nn.Module, device: torch.device) -> int | None:
    """Bytes on the device that are free or hold the model already; None where the system does not say."""
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + reserved + _held_bytes(model)
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory() + _held_bytes(model)
    rooms = [room for room in (free_memory(), control_group_room()) if room is not None]
    return min(rooms) + _held_bytes(model) if rooms else None


def free_memory(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """Bytes of the machine's memory that programs may still take; None on a system without `/proc` (macOS)."""
    try:
        lines = meminfo.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return 1024 * int(found[0]) if found else None


def control_group_room(
    membership: Path = Path("/proc/self/cgroup"), mounted: Path = Path("/sys/fs/cgroup")
) -> int | None:
    """Bytes that the control groups (versions 1 and 2) of this process still allow it; None without a limit.

    File pages that the kernel would give back first count as free.
    """
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    rooms = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            top = mounted / controllers
            group = top / path.lstrip("/")
            for folder in (group, *group.parents):
                if folder.is_relative_to(top) and (room := _room_of(folder)) is not None:
                    rooms.append(room)
    return min(rooms, default=None)


def _room_of(group: Path) -> int | None:
    """Bytes that one control group still allows; None where it sets no limit."""
    for limit, usage, reclaimable in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            allowed = int((group / limit).read_text(encoding="ascii"))
            used = int((group / usage).read_text(encoding="ascii"))
            counted = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
        except (OSError, ValueError):  # no such file, or "max"
            continue
        return max(0, allowed - used + int(counted.get(reclaimable, 0)))
    return None


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _held_bytes(model: nn.Module) -> int:
    return sum(_bytes(tensor) for tensor in (*model.parameters(), *model.buffers(), *_casts(model)))


def _casts(model: nn.Module) -> list[Tensor]:
    """The frozen weights that layers keep in lower precision."""
    return [
        module.frozen_cast
        for module in model.modules()
        if isinstance(module, Linear) and module.frozen_cast is not None
    ]
