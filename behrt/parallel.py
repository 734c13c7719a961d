"""How is work spread over the cores without leaving a trace in the result?

By threads: the work lies in polars and numpy, which let other threads run meanwhile, and a fork of a process in which
polars has threads of its own may hang.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

MOST_WORKERS = 4
"""Each holds a shard in memory; and what a single query can share out, polars spreads over all cores by itself."""


def usable_cores() -> int:
    """Cores that this process may run on, which a container or a scheduler may have narrowed."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def default_workers() -> int:
    """Threads that work on shards at the same time."""
    return min(usable_cores(), MOST_WORKERS)


def in_order(work: Callable[[Item], Result], items: Iterable[Item], *, workers: int) -> Iterator[Result]:
    """The results of `work(item)` in the order of the items, `workers` of them computed at a time.

    No more than `workers + 1` items are begun or done and not yet taken, so that memory stays bounded. The first error,
    in the order of the items, is raised in its place; nothing is begun after it, and what runs is waited for.

    Args:
        workers: 1 works in the calling thread.

    >>> list(in_order(lambda number: number**2, range(5), workers=2))
    [0, 1, 4, 9, 16]
    """
    assert workers >= 1
    if workers == 1:
        yield from map(work, items)
        return
    left = iter(items)
    executor = ThreadPoolExecutor(workers, thread_name_prefix="behrt-shards")
    try:
        begun: deque[Future[Result]] = deque(executor.submit(work, item) for item in islice(left, workers + 1))
        while begun:
            result = begun.popleft().result()
            begun.extend(executor.submit(work, item) for item in islice(left, 1))
            yield result
    finally:
        executor.shutdown(cancel_futures=True)
