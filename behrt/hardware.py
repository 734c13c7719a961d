"""What is there on this machine to compute with, and which of it would a run use, in which way (`behrt devices`)?"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from behrt.attention import runs_can_stay
from behrt.config import SIZES
from behrt.devices import choose_device, choose_precision, fast_bf16, first_line
from behrt.doctor.memory import control_group_room, free_memory

BY_PATIENT = "patients end to end"
BY_GROUP = "patients padded to groups"
BY_LANE = "short patients share lanes"
"""How attention lays patients out (`attention.py`)."""


@dataclass(frozen=True)
class DeviceReport:
    """One device, as a run would use it.

    Attributes:
        device: as torch names it; `--device` takes what stands before the colon.
        memory_total, memory_free: bytes; None where the system does not say.
        precision: what `--precision auto` comes to, `bf16` or `fp32`.
        reason: for that.
        attention: how patients are laid out for it.
        compiles: whether `--compile` goes with it.
        is_chosen: whether `--device auto` takes it.
    """

    device: str
    name: str
    memory_total: int | None
    memory_free: int | None
    precision: str
    reason: str
    attention: str
    compiles: bool
    is_chosen: bool

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def devices_here() -> list[DeviceReport]:
    """All devices of this machine, what `--device auto` takes first."""
    return sorted(map(report, present_devices()), key=lambda found: not found.is_chosen)


def present_devices() -> Iterator[torch.device]:
    if torch.cuda.is_available():
        yield from (torch.device("cuda", number) for number in range(torch.cuda.device_count()))
    if torch.backends.mps.is_available():
        yield torch.device("mps")
    yield torch.device("cpu")


def report(device: torch.device) -> DeviceReport:
    precision = choose_precision("auto", device)
    hardware = fast_bf16(device)
    total, free = memory_of(device)
    chosen = choose_device("auto")
    return DeviceReport(
        device=str(device),
        name=name_of(device),
        memory_total=total,
        memory_free=free,
        precision="bf16" if precision is torch.bfloat16 else "fp32",
        reason=hardware or ("bf16 is not tried there" if device.type == "mps" else "bf16 would be emulated"),
        attention=attention_of(device, precision),
        compiles=device.type == "cuda",
        # of several cards a process by itself takes the first
        is_chosen=device.type == chosen.type and not device.index,
    )


def name_of(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return f"Apple GPU ({platform.machine()})"
    threads = torch.get_num_threads()
    return f"{cpu_model()}, {threads} thread{'s' if threads > 1 else ''}"


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """As the kernel names it; the kind of machine where it does not."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    found = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return found[0] if found and found[0] else platform.machine()


def memory_of(device: torch.device) -> tuple[int | None, int | None]:
    """Bytes in all, and bytes that are free for a run."""
    if device.type == "cuda":
        try:
            free, total = torch.cuda.mem_get_info(device)
        except RuntimeError:  # it is full, or another process has it for itself
            return None, None
        return total, free
    if device.type == "mps":
        most = torch.mps.recommended_max_memory()
        return most, most - torch.mps.current_allocated_memory()
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    rooms = [room for room in (free_memory(), control_group_room()) if room is not None]
    return total, min(rooms, default=None)


def attention_of(device: torch.device, precision: torch.dtype) -> str:
    """How attention lays patients out, for the models of every size."""
    if device.type == "cpu":
        return BY_LANE
    if precision is torch.float32:
        return BY_GROUP
    heads = {shape["hidden_dim"] // shape["num_heads"] for shape in SIZES.values()}
    try:
        with torch.autocast(device.type, dtype=precision):
            return BY_PATIENT if all(runs_can_stay(device, head) for head in heads) else BY_GROUP
    except RuntimeError as error:
        return f"not to be tried now: {first_line(error)}"


def absent() -> dict[str, str]:
    """Devices that `--device` knows and that are not here, and why."""
    found = {}
    if not torch.cuda.is_available():
        is_built = torch.version.cuda is not None
        found["cuda"] = "no card, or no driver, is seen" if is_built else f"torch {torch.__version__} has no CUDA in it"
    if not torch.backends.mps.is_available():
        found["mps"] = (
            "is for Macs with Apple silicon"
            if not torch.backends.mps.is_built()
            else "this Mac, or its macOS, has none"
        )
    return found
