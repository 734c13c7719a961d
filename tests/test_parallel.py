"""Work on several threads: order, bounds, errors."""

import threading
import time

import pytest

from behrt.parallel import in_order


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_results_keep_the_order_of_the_items_whichever_is_done_first(workers):
    def slowest_first(number: int) -> int:
        time.sleep(0.02 * (number % 4 == 0))
        return number

    assert list(in_order(slowest_first, range(20), workers=workers)) == list(range(20))


def test_no_more_items_are_begun_than_the_caller_takes():
    begun = []
    results = in_order(lambda number: begun.append(number), iter(range(100)), workers=3)
    for _ in range(5):
        next(results)
    time.sleep(0.05)
    assert len(begun) <= 5 + 3 + 1
    results.close()


def test_as_many_work_at_a_time_as_there_are_workers():
    together = threading.Barrier(3, timeout=10)
    assert list(in_order(lambda _: together.wait() >= 0, range(6), workers=3)) == [True] * 6


def test_the_first_error_in_the_order_of_the_items_is_raised_and_the_rest_is_left():
    begun = []

    def work(number: int) -> int:
        begun.append(number)
        if number == 3:
            time.sleep(0.05)  # the later one fails earlier
            raise ValueError("third")
        if number == 4:
            raise ValueError("fourth")
        return number

    results = in_order(work, range(50), workers=2)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="third"):
        next(results)
    assert max(begun) <= 3 + 2 + 1
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("behrt-shards")]
