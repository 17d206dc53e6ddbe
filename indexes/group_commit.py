"""One writer thread, many callers, one commit for all who wait.

A commit costs an fsync. While one runs, callers gather; the next commit takes all of them. Each is
acknowledged after the commit that holds its work.
"""

from __future__ import annotations

import logging
import sqlite3
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from threading import Condition, Lock, Thread
from typing import Generic, Protocol, TypeVar

from indexes.base import StoreError
from indexes.database import translated

__all__ = ["GroupCommit", "Work"]

R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)

MAX_GROUP_ROWS = 65_536  # bounds how long the first caller of a group waits for the last

log = logging.getLogger(__name__)


class Work(Protocol[R_co]):
    """What a caller wants done inside the transaction. It may run again in a transaction of its own."""

    def __call__(self, connection: sqlite3.Connection, /) -> R_co: ...


@dataclass(slots=True)
class _Job(Generic[R]):
    work: Work[R]
    rows: int
    done: Future[R] = field(default_factory=Future)


class GroupCommit(Generic[R]):
    """Runs callers' work on one connection, in the order in which it came.

    Args:
        connection: Used by the writer thread alone.
        publish: Called after a commit and before its callers are answered, with the commit's number and each
            work's result. It must not raise.
        rest: Called after the callers were answered, for upkeep of the connection.
    """

    def __init__(
        self,
        connection: sqlite3.Connection,
        publish: Callable[[int, Sequence[R]], None],
        rest: Callable[[], None],
    ) -> None:
        self._connection = connection
        self._publish, self._rest = publish, rest
        self._queue: deque[_Job[R]] = deque()
        self._wake = Condition()
        self._closing = False
        self.publishing = Lock()
        """Held from before a commit until `publish` has returned: who holds it sees both or neither."""
        self.commits = 0
        self.requests = 0
        self._thread = Thread(target=self._run, name="store-writer", daemon=True)
        self._thread.start()

    def submit(self, work: Work[R], *, rows: int = 1) -> R:
        """Waits until `work` is committed and returns its result, or raises what it raised."""
        job = _Job(work, rows)
        with self._wake:
            if self._closing:
                raise StoreError("the store is closed; open it again.")
            self._queue.append(job)
            self._wake.notify()
        return job.done.result()

    def close(self) -> None:
        """Finishes what was submitted, then ends the thread."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        while group := self._next_group():
            self._serve(group)
            try:
                self._rest()
            except sqlite3.Error as error:
                log.warning("upkeep of the store's database failed: %s", error)

    def _next_group(self) -> list[_Job[R]]:
        with self._wake:
            self._wake.wait_for(lambda: self._queue or self._closing)
            group: list[_Job[R]] = []
            rows = 0
            while self._queue and (not group or rows + self._queue[0].rows <= MAX_GROUP_ROWS):
                rows += self._queue[0].rows
                group.append(self._queue.popleft())
            return group

    def _serve(self, group: list[_Job[R]]) -> None:
        try:
            with translated():
                results = self._commit(group)
        except Exception as error:  # noqa: BLE001 - a dead writer would leave every caller waiting for ever
            if len(group) == 1:
                group[0].done.set_exception(error)
                return
            # One job, or their sum, was too much. Each on its own: a bad one fails alone.
            for job in group:
                self._serve([job])
            return
        self.requests += len(group)
        for job, result in zip(group, results, strict=True):
            job.done.set_result(result)

    def _commit(self, group: list[_Job[R]]) -> list[R]:
        connection = self._connection
        try:
            connection.execute("BEGIN IMMEDIATE")
            results = [job.work(connection) for job in group]
            ((number,),) = connection.execute(
                "UPDATE about SET value = value + 1 WHERE key = 'commits' RETURNING value"
            ).fetchall()
            with self.publishing:
                connection.execute("COMMIT")
                self.commits += 1
                self._publish(number, results)
        except BaseException:
            if connection.in_transaction:
                connection.rollback()
            raise
        return results
