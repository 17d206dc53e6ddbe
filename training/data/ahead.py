"""Results of background threads, in the order of what was asked."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

__all__ = ["in_order"]

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(
    function: Callable[[Item], Result], items: Iterable[Item], *, threads: int, ahead: int
) -> Generator[Result, None, None]:
    """`map(function, items)`, computed by `threads` threads up to `ahead` results before they are asked for.

    `items` is only ever advanced by the caller's thread. What `function` or `items` raises, the caller meets
    at that result's place. Closing the iterator (or dropping it, or an error) drops what has not begun, waits
    for what has, and leaves no thread behind.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="embedserve-data")
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
