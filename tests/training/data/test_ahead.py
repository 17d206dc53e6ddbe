"""Background threads: order, bounds, errors, and that they end."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from training.data.ahead import in_order


def ours() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("embedserve-data")]


def test_results_come_in_the_order_of_what_was_asked() -> None:
    def slow_first(item: int) -> int:
        time.sleep(0.01 if item % 3 == 0 else 0)
        return item * 10

    assert list(in_order(slow_first, range(12), threads=4, ahead=5)) == [item * 10 for item in range(12)]


def test_no_more_is_asked_for_than_may_be_ahead() -> None:
    asked: list[int] = []

    def items() -> Iterator[int]:
        for item in range(100):
            asked.append(item)
            yield item

    results = in_order(lambda item: item, items(), threads=2, ahead=3)
    for taken in range(1, 10):
        next(results)
        assert len(asked) == taken + 3
    results.close()


def test_an_error_is_raised_at_its_place_and_ends_the_threads() -> None:
    def fails_at_three(item: int) -> int:
        if item == 3:
            raise ValueError("three")
        return item

    results = in_order(fails_at_three, range(10), threads=2, ahead=2)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="three"):
        next(results)
    assert ours() == []


def test_an_error_of_the_items_is_raised_in_the_caller() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise LookupError("no more")

    results = in_order(lambda item: item, items(), threads=1, ahead=0)
    assert next(results) == 1
    with pytest.raises(LookupError, match="no more"):
        next(results)


def test_closing_drops_what_has_not_begun_and_ends_the_threads() -> None:
    begun: list[int] = []

    def slow(item: int) -> int:
        begun.append(item)
        time.sleep(0.02)
        return item

    results = in_order(slow, range(1000), threads=1, ahead=50)
    assert next(results) == 0
    assert ours() != []
    results.close()
    assert ours() == []
    assert len(begun) < 10


def test_dropping_the_iterator_ends_the_threads() -> None:
    results = in_order(lambda item: item, range(1000), threads=2, ahead=4)
    next(results)
    del results
    assert ours() == []


def test_nothing_to_do_is_no_result() -> None:
    assert list(in_order(lambda item: item, [], threads=1, ahead=2)) == []
