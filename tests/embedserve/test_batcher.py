"""One queue, few runs: batches gather meanwhile, and nothing is lost, mixed up or stuck."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from embedserve.batcher import Batcher
from embedserve.errors import BadRequest, Busy, EmbedServeError, NotReady, TooLarge

pytestmark = pytest.mark.anyio


class Doubler:
    """Doubles numbers, in runs that wait for `gate`. A number in `faults` fails its whole batch."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.started = threading.Semaphore(0)
        self.gate = threading.Event()
        self.gate.set()
        self.faults: dict[int, BaseException] = {}

    def __call__(self, items: list[int]) -> list[int]:
        self.batches.append(items)
        self.started.release()
        assert self.gate.wait(10)
        for item in items:
            if item in self.faults:
                raise self.faults[item]
        return [2 * item for item in items]

    async def running(self) -> None:
        """Returns when the next run has begun."""
        assert await asyncio.to_thread(self.started.acquire, timeout=10)


@pytest.fixture
def doubler() -> Iterator[Doubler]:
    doubler = Doubler()
    yield doubler
    doubler.gate.set()


async def turns(count: int = 3) -> None:
    """Lets everything else that is ready run."""
    for _ in range(count):
        await asyncio.sleep(0)


def batcher_of(doubler: Doubler, *, max_batch: int = 4, max_queue: int = 100) -> Batcher[int, int]:
    return Batcher(doubler, max_batch=max_batch, max_queue=max_queue)


async def test_an_item_gets_its_result(doubler: Doubler) -> None:
    assert await batcher_of(doubler).submit(21) == 42


async def test_a_batch_gathers_while_the_last_one_runs(doubler: Doubler) -> None:
    batcher = batcher_of(doubler)
    doubler.gate.clear()
    first = asyncio.create_task(batcher.submit(0))
    await doubler.running()
    others = [asyncio.create_task(batcher.submit(n)) for n in range(1, 7)]
    await turns()
    assert batcher.waiting == 6
    doubler.gate.set()
    assert await asyncio.gather(first, *others) == [0, 2, 4, 6, 8, 10, 12]
    assert doubler.batches == [[0], [1, 2, 3, 4], [5, 6]]
    assert (batcher.batches, batcher.items, batcher.waiting) == (3, 7, 0)
    assert batcher.batch_sizes == {1: 1, 4: 1, 2: 1}


async def test_items_of_one_moment_run_together(doubler: Doubler) -> None:
    batcher = batcher_of(doubler)
    assert await asyncio.gather(batcher.submit(1), batcher.submit(2)) == [2, 4]
    assert doubler.batches == [[1, 2]]


async def test_many_keep_their_order(doubler: Doubler) -> None:
    assert await batcher_of(doubler).submit_many(range(10)) == list(range(0, 20, 2))
    assert doubler.batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


async def test_no_items_are_no_work(doubler: Doubler) -> None:
    batcher = batcher_of(doubler)
    assert await batcher.submit_many([]) == []
    await batcher.close()
    assert doubler.batches == []


async def test_runs_are_told_to_the_metrics(doubler: Doubler) -> None:
    batcher, seen = batcher_of(doubler), []
    batcher.on_batch = lambda items, seconds: seen.append((items, seconds >= 0))
    await batcher.submit_many(range(6))
    assert seen == [(4, True), (2, True)]


class RustPanic(BaseException):
    """What pyo3 raises when native code panics is no Exception."""


@pytest.mark.parametrize("fault", [ValueError("odd"), MemoryError(), RustPanic("panicked")])
async def test_a_bad_item_fails_alone_whatever_is_raised(
    doubler: Doubler, fault: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    batcher = batcher_of(doubler)
    doubler.faults[2] = fault
    with caplog.at_level(logging.ERROR):
        results = await batcher.submit_many([0, 1, 2, 3])
    error = results.pop(2)
    assert results == [0, 2, 6]
    assert isinstance(error, EmbedServeError)
    assert error.code == "encoder_failed"
    assert type(fault).__name__ in str(error)
    assert "an input failed in the encoder" in caplog.text  # with its traceback
    assert await batcher.submit(5) == 10  # the worker lives


async def test_an_error_for_users_reaches_them(doubler: Doubler) -> None:
    batcher = batcher_of(doubler)
    doubler.faults[7] = BadRequest("seven")
    with pytest.raises(BadRequest, match="seven"):
        await batcher.submit(7)
    assert await batcher.submit(8) == 16


async def test_every_item_may_be_bad(doubler: Doubler) -> None:
    doubler.faults = {n: BadRequest(str(n)) for n in range(6)}
    results = await batcher_of(doubler).submit_many(range(6))
    assert [str(result) for result in results] == ["0", "1", "2", "3", "4", "5"]


async def test_too_few_results_are_an_error_and_no_mix_up() -> None:
    batcher: Batcher[int, int] = Batcher(lambda items: items[:1], max_batch=4, max_queue=9)
    assert await batcher.submit_many([1, 2]) == [1, 2]  # one by one, after the batch failed
    broken: Batcher[int, int] = Batcher(lambda items: [], max_batch=4, max_queue=9)
    with pytest.raises(EmbedServeError, match="RuntimeError"):
        await broken.submit(1)


async def test_the_cancelled_never_run(doubler: Doubler) -> None:
    batcher = batcher_of(doubler)
    doubler.gate.clear()
    first = asyncio.create_task(batcher.submit(0))
    await doubler.running()
    single = asyncio.create_task(batcher.submit(1))
    many = asyncio.create_task(batcher.submit_many([2, 3]))
    last = asyncio.create_task(batcher.submit(4))
    await turns()
    single.cancel()
    many.cancel()
    await turns()
    assert batcher.waiting == 1  # their places are free at once
    doubler.gate.set()
    assert await asyncio.gather(first, last) == [0, 8]
    assert single.cancelled()
    assert many.cancelled()
    assert doubler.batches == [[0], [4]]


async def test_cancelling_a_running_item_leaves_the_others(doubler: Doubler) -> None:
    batcher = batcher_of(doubler)
    doubler.gate.clear()
    gone, stays = asyncio.create_task(batcher.submit(1)), asyncio.create_task(batcher.submit(2))
    await doubler.running()
    gone.cancel()
    await turns()
    doubler.gate.set()
    assert await stays == 4
    assert doubler.batches == [[1, 2]]


async def test_the_cancelled_are_not_retried(doubler: Doubler) -> None:
    batcher = batcher_of(doubler)
    doubler.faults[1] = ValueError()
    doubler.gate.clear()
    bad, gone, good = [asyncio.create_task(batcher.submit(n)) for n in (1, 2, 3)]
    await doubler.running()
    gone.cancel()
    await turns()
    doubler.gate.set()
    assert await good == 6
    with pytest.raises(EmbedServeError):
        await bad
    assert doubler.batches == [[1, 2, 3], [1], [3]]


async def test_over_the_bound_one_and_many_are_busy_alike(doubler: Doubler) -> None:
    batcher = batcher_of(doubler, max_queue=3)
    doubler.gate.clear()
    running = asyncio.create_task(batcher.submit(0))
    await doubler.running()
    waiting = asyncio.create_task(batcher.submit(1))
    await turns()
    with pytest.raises(Busy, match="2 more inputs do not fit: 2 of 3 places"):
        await batcher.submit_many([2, 3])
    fits = asyncio.create_task(batcher.submit(2))  # nothing of the refused request was kept
    await turns()
    with pytest.raises(Busy, match="1 more input does not fit: 3 of 3 places") as raised:
        await batcher.submit(3)
    assert raised.value.retry_after == 1
    doubler.gate.set()
    assert await asyncio.gather(running, waiting, fits) == [0, 2, 4]
    assert await batcher.submit_many([4, 5, 6]) == [8, 10, 12]


async def test_retry_after_follows_the_measured_pace(doubler: Doubler) -> None:
    batcher = batcher_of(doubler, max_queue=100)
    await batcher.submit(0)
    batcher.busy_seconds, batcher.items = 20.0, 100  # 0.2 s for each
    with batcher.places(100), pytest.raises(Busy, match=r"about 20 s") as raised:
        await batcher.submit(1)
    assert raised.value.retry_after == 20


async def test_more_than_the_queue_can_ever_hold_is_too_large(doubler: Doubler) -> None:
    with pytest.raises(TooLarge, match=r"4 inputs at once .* holds \(3\)"):
        await batcher_of(doubler, max_queue=3).submit_many(range(4))


async def test_held_places_count_to_the_bound(doubler: Doubler) -> None:
    batcher = batcher_of(doubler, max_queue=2)
    with batcher.places(2), pytest.raises(Busy):
        await batcher.submit(1)
    assert await batcher.submit(1) == 2


async def test_closing_finishes_what_was_accepted_and_refuses_the_rest(doubler: Doubler) -> None:
    batcher = batcher_of(doubler, max_batch=1)
    doubler.gate.clear()
    accepted = [asyncio.create_task(batcher.submit(n)) for n in range(3)]
    await doubler.running()
    closing = asyncio.create_task(batcher.close())
    await turns()
    assert not closing.done()
    with pytest.raises(NotReady, match="shutting down"):
        await batcher.submit(4)
    doubler.gate.set()
    await closing
    assert await asyncio.gather(*accepted) == [0, 2, 4]


async def test_closing_waits_for_places_that_are_still_held(doubler: Doubler) -> None:
    batcher = batcher_of(doubler)
    with batcher.places(1):
        closing = asyncio.create_task(batcher.close())
        await turns()
        assert not closing.done()
        assert await batcher.enqueue(3) == 6
    await closing


async def test_nobody_hangs_when_the_task_is_cancelled(doubler: Doubler) -> None:
    batcher = batcher_of(doubler, max_batch=1)
    doubler.gate.clear()
    waiting = [asyncio.create_task(batcher.submit(n)) for n in range(2)]
    await doubler.running()
    for task in batcher._tasks:
        task.cancel()
    for outcome in await asyncio.gather(*waiting, return_exceptions=True):
        assert isinstance(outcome, NotReady)
    doubler.gate.set()
    assert await batcher.submit(3) == 6


async def test_items_of_like_length_go_together_oldest_first(doubler: Doubler) -> None:
    batcher: Batcher[int, int] = Batcher(doubler, max_batch=3, max_queue=99, length=lambda item: item)
    doubler.gate.clear()
    tasks = [asyncio.create_task(batcher.submit(100))]
    await doubler.running()
    tasks += [asyncio.create_task(batcher.submit(n)) for n in (30, 200, 33, 10, 31, 190, 32, 9)]
    await turns()
    doubler.gate.set()
    await asyncio.gather(*tasks)
    assert [sorted(batch) for batch in doubler.batches] == [[100], [30, 31, 32], [190, 200], [33], [9, 10]]


async def test_a_lone_length_is_not_starved_by_a_stream_of_others(doubler: Doubler) -> None:
    batcher: Batcher[int, int] = Batcher(doubler, max_batch=2, max_queue=99, length=lambda item: item)
    doubler.gate.clear()
    tasks = [asyncio.create_task(batcher.submit(20)) for _ in range(2)]
    await doubler.running()
    tasks += [asyncio.create_task(batcher.submit(20)) for _ in range(2)]
    await turns()
    lone = asyncio.create_task(batcher.submit(500))
    await turns()
    tasks += [asyncio.create_task(batcher.submit(20)) for _ in range(20)]
    await turns()
    doubler.gate.set()
    await asyncio.gather(lone, *tasks)
    assert doubler.batches.index([500]) == 2  # after what was there before it, before all that came later


async def test_short_texts_are_all_alike(doubler: Doubler) -> None:
    batcher: Batcher[int, int] = Batcher(doubler, max_batch=9, max_queue=99, length=lambda item: item)
    await batcher.submit_many([1, 8, 3, 7])
    assert [sorted(batch) for batch in doubler.batches] == [[1, 3, 7, 8]]


async def test_idle_workers_share_what_waits(doubler: Doubler) -> None:
    batcher: Batcher[int, int] = Batcher(doubler, max_batch=9, max_queue=99, workers=3)
    doubler.gate.clear()
    many = asyncio.create_task(batcher.submit_many([1, 2, 3, 4, 5, 6, 7]))
    for _ in range(3):
        await doubler.running()
    assert sorted(doubler.batches) == [[1, 2, 3], [4, 5], [6, 7]]
    later = asyncio.create_task(batcher.submit_many([8, 9]))
    await turns()
    assert batcher.waiting == 2  # a fourth run would have no worker
    doubler.gate.set()
    assert await many == [2, 4, 6, 8, 10, 12, 14]
    assert await later == [16, 18]


async def test_a_worker_that_is_cancelled_leaves_the_queue_to_the_others(doubler: Doubler) -> None:
    batcher: Batcher[int, int] = Batcher(doubler, max_batch=1, max_queue=99, workers=2)
    doubler.gate.clear()
    tasks = [asyncio.create_task(batcher.submit(n)) for n in range(3)]
    for _ in range(2):
        await doubler.running()
    next(iter(batcher._tasks)).cancel()
    await turns()
    doubler.gate.set()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert sum(isinstance(outcome, NotReady) for outcome in outcomes) == 1
    assert outcomes[2] == 4


async def test_the_runs_of_one_worker_never_overlap() -> None:
    lock = threading.Lock()

    def run(items: list[int]) -> list[int]:
        assert lock.acquire(blocking=False)
        try:
            return [sum([item] * 500) // 500 for item in items]  # long enough to be caught
        finally:
            lock.release()

    with ThreadPoolExecutor(4) as pool:
        batcher: Batcher[int, int] = Batcher(run, max_batch=3, max_queue=1000, executor=pool)
        many = [batcher.submit_many(range(n, n + 7)) for n in range(100)]
        assert await asyncio.gather(*many) == [list(range(n, n + 7)) for n in range(100)]


def test_a_queue_without_places_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="max_queue 0"):
        Batcher(lambda items: items, max_batch=1, max_queue=0)
