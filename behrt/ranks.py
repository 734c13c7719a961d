"""Which of several processes that train one model together is this one, and how do they agree?

`torchrun --nproc-per-node N -m behrt train …` starts N ranks. Each computes its share of every step; gradients, losses
and counts are summed, and whatever has to be decided is decided by the first rank, which alone writes, tracks and
prints. What is agreed on travels between CPUs (gloo), so that no agreement makes a GPU wait; tensors on a GPU are
summed by NCCL. A process by itself is the first of one rank, and everything here then does nothing.
"""

from __future__ import annotations

import hashlib
import os
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

from behrt.config import UserError
from behrt.devices import first_line, free_cached_memory, is_out_of_memory

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

LONGEST_WAIT = timedelta(hours=2)
"""For another rank: the first one may be simulating a cohort, or drawing curves. One that dies is noticed at once."""


class RankLost(Exception):
    """Another rank has ended, so that this one cannot go on."""


class RanksDiffer(Exception):
    """The ranks of a run no longer hold the same weights."""


class EndedElsewhere(Exception):
    """Another rank has said why the command ends; this one ends with the same code, and says nothing."""

    def __init__(self, code: int) -> None:
        super().__init__(f"another rank ends with {code}")
        self.code = code


class RankError(UserError):
    """What went wrong on another rank than the first."""


class Ranks:
    """The processes of one training, seen from one of them.

    Args:
        rank: this one's number, from 0.
        size: how many there are.
        local_rank: its number on this machine, and that of its GPU.
        restarts: how often torchrun has started all of them again because one had ended.
        launch: names the torchrun that started them; empty without one.

    Attributes:
        notice: what this rank wants all to know, as a number; it is asked for at each `sums`.
        noticed: the largest notice of any rank at the latest `sums`: the same number on all of them.
        bytes_summed: of the tensors that `all_sum` was given so far.
    """

    def __init__(
        self, rank: int = 0, size: int = 1, *, local_rank: int = 0, restarts: int = 0, launch: str = ""
    ) -> None:
        assert 0 <= rank < size
        self.rank = rank
        self.size = size
        self.local_rank = local_rank
        self.restarts = restarts
        self.launch = launch
        self.notice: Callable[[], int] = lambda: 0
        self.noticed = 0
        self.bytes_summed = 0
        self._nccl: Any = None

    @classmethod
    def of_environment(cls, environment: Mapping[str, str] = os.environ) -> Self:
        """As torchrun says; alone where it did not start this process.

        >>> started = {"TORCHELASTIC_RUN_ID": "none", "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
        >>> [Ranks.of_environment(found).size for found in (started, {"RANK": "1", "WORLD_SIZE": "2"})]
        [2, 1]
        """
        if "TORCHELASTIC_RUN_ID" not in environment:
            return cls()
        return cls(
            int(environment.get("RANK", 0)),
            int(environment.get("WORLD_SIZE", 1)),
            local_rank=int(environment.get("LOCAL_RANK", 0)),
            restarts=int(environment.get("TORCHELASTIC_RESTART_COUNT", 0)),
            launch=_launch(environment["TORCHELASTIC_RUN_ID"]),
        )

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_alone(self) -> bool:
        return self.size == 1

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Inside, the ranks hear each other. At the end each waits for the others, unless it ends with an error."""
        if self.is_alone:
            yield
            return
        import torch.distributed as dist
        from torch.distributed.rendezvous import rendezvous

        if os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE"):
            # by default gloo listens wherever the host's name leads, if it leads anywhere
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
        with self._guarded():
            store, _, _ = next(rendezvous("env://", self.rank, self.size, timeout=LONGEST_WAIT))
            # torchrun may keep what the processes told each other before it started them again: dead addresses
            store = dist.PrefixStore(f"start {self.restarts}", store)  # type: ignore[attr-defined]
            dist.init_process_group("gloo", store=store, rank=self.rank, world_size=self.size, timeout=LONGEST_WAIT)
        try:
            yield
        except Exception as error:
            if is_out_of_memory(error):
                raise RankError(f"rank {self.rank}: the device has no memory left; lower --batch-size") from error
            if isinstance(error, UserError) and not (self.is_first or isinstance(error, RankError)):
                raise RankError(f"rank {self.rank}: {error}") from error
            raise
        self.same(None)
        dist.destroy_process_group()

    def take_device(self, device: torch.device) -> torch.device:
        """This rank's own of the machine's devices.

        Raises:
            UserError: there are fewer GPUs than ranks.
        """
        if self.is_alone or device.type == "cpu":
            return device
        import torch

        count = torch.cuda.device_count() if device.type == "cuda" else 1
        if self.local_rank >= count or device.type != "cuda":
            raise UserError(
                f"torchrun --nproc-per-node: every process needs a GPU of its own, and there "
                f"{'is' if count == 1 else 'are'} {count} ({device.type}); start {count}, or say --device cpu"
            )
        torch.cuda.set_device(self.local_rank)
        return torch.device("cuda", self.local_rank)

    def connect(self, device: torch.device) -> None:
        """Makes ready for tensors on `device`; all ranks call this. What is wrong with NCCL itself, torch says."""
        if not self.is_alone and device.type == "cuda":
            import torch.distributed as dist

            free_cached_memory(device)  # of which NCCL takes its own
            self._nccl = dist.new_group(backend="nccl")

    # What all ranks do together: each call waits for the same call of every other rank

    def all_sum(self, tensor: torch.Tensor) -> None:
        """Puts the sum over all ranks into `tensor`."""
        if self.is_alone:
            return
        import torch.distributed as dist

        self.bytes_summed += tensor.nbytes
        with self._guarded():
            dist.all_reduce(tensor, group=self._group(tensor))

    def sums(self, *values: float) -> tuple[float, ...]:
        """Each value, summed over all ranks in their order: the same to the last bit on every rank."""
        if self.is_alone:
            return values
        notices, *found = zip(*self._gather_numbers((self.notice(), *values)), strict=True)
        self.noticed = int(max(notices))
        return tuple(map(sum, found))

    def broadcast(self, value: T) -> T:
        """The value that the first rank has."""
        if self.is_alone:
            return value
        import torch.distributed as dist

        held = [value if self.is_first else None]
        with self._guarded():
            dist.broadcast_object_list(held)
        return held[0]  # type: ignore[return-value]

    def broadcast_tensors(self, tensors: Sequence[torch.Tensor]) -> None:
        """Every tensor becomes what it is on the first rank."""
        if self.is_alone:
            return
        import torch.distributed as dist

        with self._guarded():
            for tensor in tensors:
                dist.broadcast(tensor.detach(), 0, group=self._group(tensor))

    def same(self, value: object) -> bool:
        """Whether all ranks have the same value."""
        return all(other == value for other in self._gather(value))

    @contextmanager
    def together(self) -> Iterator[None]:
        """What fails inside on one rank ends all of them: the first that failed says it. Nothing inside may wait for
        another rank."""
        if self.is_alone:
            yield
            return
        mine: Exception | None = None
        try:
            yield
        except (RankLost, EndedElsewhere):
            raise
        except Exception as error:
            mine = error
        usual = 2 if isinstance(mine, (UserError, OSError)) else 1
        codes = self._gather(None if mine is None else getattr(mine, "exit_code", usual))
        failed = [rank for rank, code in enumerate(codes) if code is not None]
        if not failed:
            return
        if failed[0] == self.rank and mine is not None:
            raise mine
        raise EndedElsewhere(codes[failed[0]])

    def by_first(self, function: Callable[[], T]) -> T:
        """What `function` gives on the first rank, which alone calls it."""
        if self.is_alone:
            return function()
        value: Any = None
        with self.together():
            if self.is_first:
                value = function()
        return self.broadcast(value)  # type: ignore[no-any-return]

    def _gather(self, value: object) -> list[Any]:
        """The value of each rank, in their order."""
        if self.is_alone:
            return [value]
        import torch.distributed as dist

        found: list[Any] = [None] * self.size
        with self._guarded():
            dist.all_gather_object(found, value)
        return found

    def _gather_numbers(self, values: Sequence[float]) -> list[list[float]]:
        """The same of numbers, of which each rank has as many, in a tenth of the time."""
        import torch
        import torch.distributed as dist

        mine = torch.tensor(values, dtype=torch.float64)
        found = [torch.empty_like(mine) for _ in range(self.size)]
        with self._guarded():
            dist.all_gather(found, mine)
        return [of_rank.tolist() for of_rank in found]

    def _group(self, tensor: torch.Tensor) -> Any:
        return self._nccl if tensor.device.type == "cuda" else None

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """torch says that another rank is gone by a `RuntimeError` whose text is about sockets."""
        try:
            yield
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise RankLost(f"another process of the run has ended ({first_line(error)})") from error


ALONE = Ranks()


def _launch(run_id: str) -> str:
    """A name of the torchrun that is this process's parent: the same for every attempt that it starts, no other's."""
    parent = os.getppid()
    try:
        since = Path(f"/proc/{parent}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        since = ""
    return hashlib.sha256(f"{run_id} {socket.gethostname()} {parent} {since}".encode()).hexdigest()[:16]
