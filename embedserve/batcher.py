"""Many awaiting callers, few runs: the queue before a tower.

There is no fixed delay. While batches run in their threads, the event loop gathers what comes next; an idle
tower takes a single item at once, a busy one takes full batches. (After Ray Serve's batch queue and
text-embeddings-inference's queue.)
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import math
import time
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from itertools import islice
from typing import Generic, TypeVar

from embedserve.errors import Busy, EmbedServeError, NotReady, TooLarge

__all__ = ["Batcher", "for_the_user", "settle"]

T = TypeVar("T")
R = TypeVar("R")

logger = logging.getLogger(__name__)

SHORT = 8
"""Lengths up to this count as alike: so short a text costs the same whatever its length."""

LOOK_AHEAD = 32
"""Batches' worth of the oldest items, among which those of like length are looked for."""

LONGEST_WAIT = 60
"""Seconds; the most that `Busy.retry_after` says."""


class Batcher(Generic[T, R]):
    """One queue and, for each worker, a task that empties it batch by batch.

    An item holds a place from its admission until it is answered. Over the bound callers get Busy, for one
    item as for many. An item whose caller is gone leaves the queue. If `run` fails for a batch, its items
    are run one by one, so that only the bad one fails.

    Args:
        run: Items → as many results, in order; an item's result may be its own error. Called in `executor`.
        max_batch: Most items given to `run`.
        max_queue: Most places.
        workers: Most runs at the same time. What waits is shared among the idle ones.
        length: The cost of an item, where a batch costs as much as its longest item times their number.
            Batches then hold items of like length. None: all items cost the same.
        executor: Where `run` runs; None is the event loop's own.

    Attributes:
        batches: Number of runs so far, retries one by one included.
        items: Number of items run so far.
        batch_sizes: How many runs had 1, 2, 3, … items.
        busy_seconds: Time spent in runs.
        on_batch: Called after each run with the number of its items and its seconds; for metrics.
    """

    def __init__(
        self,
        run: Callable[[list[T]], Sequence[R | EmbedServeError]],
        *,
        max_batch: int,
        max_queue: int,
        workers: int = 1,
        length: Callable[[T], int] | None = None,
        executor: Executor | None = None,
    ) -> None:
        if min(max_batch, max_queue, workers) < 1:
            raise ValueError(
                f"max_batch {max_batch}, max_queue {max_queue} and workers {workers} must be at least 1"
            )
        self._run = run
        self._max_batch = max_batch
        self._max_queue = max_queue
        self._workers = workers
        self._length = length
        self._executor = executor
        self._queue: OrderedDict[asyncio.Future[R], T] = OrderedDict()  # oldest first
        self._tasks: set[asyncio.Task[None]] = set()
        self._runs = 0
        self._places = 0
        self._running = 0
        self._closing = False
        self._empty = asyncio.Event()
        self._empty.set()
        self.batches = 0
        self.items = 0
        self.batch_sizes: Counter[int] = Counter()
        self.busy_seconds = 0.0
        self.on_batch: Callable[[int, float], None] = lambda items, seconds: None

    @property
    def waiting(self) -> int:
        """Items that hold a place and are not running."""
        return self._places - self._running

    async def submit(self, item: T) -> R:
        """The result for `item`.

        Raises:
            Busy: The queue is full.
            NotReady: The batcher is closed.
            EmbedServeError: The item failed.
        """
        with self.places(1):
            return await self.enqueue(item)

    async def submit_many(self, items: Sequence[T]) -> list[R | EmbedServeError]:
        """The result or the error of each item, in order. All are admitted, or none.

        Raises: Busy and NotReady as `submit`; TooLarge if there are more items than places.
        """
        with self.places(len(items)):
            return await settle([self.enqueue(item) for item in items])

    @contextmanager
    def places(self, count: int) -> Iterator[None]:
        """Holds `count` places, for items that are yet to be made (decoded) and then given to `enqueue`.

        Raises: Busy, NotReady and TooLarge as `submit_many`.
        """
        self._admit(count)
        try:
            yield
        finally:
            self._places -= count
            if not self._places:
                self._empty.set()

    def enqueue(self, item: T) -> asyncio.Future[R]:
        """Queues an item for which the caller holds a place. Cancelling the future takes it back."""
        future: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self._queue[future] = item
        future.add_done_callback(self._forget)
        if len(self._tasks) < min(self._workers, self._runs + len(self._queue)):
            self._tasks.add(asyncio.create_task(self._work()))
        return future

    async def close(self) -> None:
        """Refuses new items and returns once every admitted one is answered."""
        self._closing = True
        await self._empty.wait()
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _admit(self, count: int) -> None:
        if self._closing:
            raise NotReady("The server is shutting down; send the request to another, or try again later.")
        if count > self._max_queue:
            raise TooLarge(
                f"{count} inputs at once are more than the queue holds ({self._max_queue}). "
                "Send them in several requests, or raise queue_size."
            )
        if self._places + count > self._max_queue:
            pace = self.busy_seconds / self.items if self.items else 0.0
            seconds = min(max(math.ceil(self._places * pace / self._workers), 1), LONGEST_WAIT)
            raise Busy(
                f"{count} more {'input does' if count == 1 else 'inputs do'} not fit: {self._places} of "
                f"{self._max_queue} places in the queue are taken. Try again in about {seconds} s.",
                retry_after=seconds,
            )
        self._places += count
        if count:
            self._empty.clear()

    def _forget(self, future: asyncio.Future[R]) -> None:
        self._queue.pop(future, None)

    async def _work(self) -> None:
        # A task lives while there is something to do; `enqueue` starts the next one.
        this = asyncio.current_task()
        batch: dict[asyncio.Future[R], T] = {}
        try:
            while self._queue:
                batch = self._take()
                self._runs += 1
                try:
                    await self._answer(batch)
                finally:
                    self._runs -= 1
        finally:
            self._tasks = {task for task in self._tasks if task is not this}
            # Should this task have been cancelled, nobody is left waiting.
            for future in (*batch, *(() if self._tasks else self._queue)):
                if not future.done():
                    future.set_exception(NotReady("The server stopped before this input was run."))

    def _take(self) -> dict[asyncio.Future[R], T]:
        """The oldest item and those that go with it, out of the queue: a fair share of what waits."""
        share = min(self._max_batch, math.ceil(len(self._queue) / (self._workers - self._runs)))
        if self._length is None:
            chosen = list(islice(self._queue, share))
        else:
            near = islice(self._queue.items(), LOOK_AHEAD * self._max_batch)
            lengths = {future: max(self._length(item), SHORT) for future, item in near}
            oldest = lengths[next(iter(lengths))]
            # Beyond twice the length a batch mostly computes padding, and its own turn comes soon enough.
            alike = [one for one, size in lengths.items() if max(size, oldest) <= 2 * min(size, oldest)]
            chosen = heapq.nsmallest(share, alike, key=lambda one: abs(lengths[one] - oldest))
        return {future: self._queue.pop(future) for future in chosen}

    async def _answer(self, batch: dict[asyncio.Future[R], T]) -> None:
        live = {future: item for future, item in batch.items() if not future.done()}
        if not live:
            return
        try:
            results = await self._call(list(live.values()))
        except (asyncio.CancelledError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # noqa: BLE001 -- whatever a run raises fails its item, never this task
            if len(live) > 1:
                logger.warning("a batch of %d failed (%r); running its items one by one", len(live), error)
                for future, item in live.items():
                    await self._answer({future: item})
                return
            future = next(iter(live))
            if not future.done():
                future.set_exception(for_the_user(error))
            return
        for future, result in zip(live, results, strict=True):
            if future.done():
                continue
            if isinstance(result, EmbedServeError):
                future.set_exception(result)
            else:
                future.set_result(result)

    async def _call(self, items: list[T]) -> Sequence[R | EmbedServeError]:
        started = time.perf_counter()
        self._running += len(items)
        try:
            results = await asyncio.get_running_loop().run_in_executor(self._executor, self._run, items)
        finally:
            seconds = time.perf_counter() - started
            self._running -= len(items)
            self.batches += 1
            self.items += len(items)
            self.batch_sizes[len(items)] += 1
            self.busy_seconds += seconds
            self.on_batch(len(items), seconds)
        if len(results) != len(items):
            raise RuntimeError(f"{len(results)} results for {len(items)} inputs")
        return results


async def settle(futures: Iterable[Awaitable[R]]) -> list[R | EmbedServeError]:
    """Waits for all; each one's result, or its error in its place. Cancelled, it cancels them all.

    Raises: whatever is not an EmbedServeError, the first of them, once all are done.
    """
    outcomes: list[R | EmbedServeError] = []
    for outcome in await asyncio.gather(*futures, return_exceptions=True):
        if isinstance(outcome, BaseException) and not isinstance(outcome, EmbedServeError):
            raise outcome
        outcomes.append(outcome)
    return outcomes


def for_the_user(error: BaseException) -> EmbedServeError:
    """The error itself if it was meant for users, else one that hides it and tells the log."""
    if isinstance(error, EmbedServeError):
        return error
    logger.error("an input failed in the encoder", exc_info=error)
    return EmbedServeError(
        f"The encoder failed on this input ({type(error).__name__}); the server's log says why. "
        "Other inputs are not affected.",
        code="encoder_failed",
    )
