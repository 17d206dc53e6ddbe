"""A gate: who is inside may finish, nobody new comes in."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from embedserve.errors import EmbedServeError

__all__ = ["Gate"]


class Gate:
    """Counts who is inside, lets nobody in once shut, and waits until all have left. Event loop only."""

    def __init__(self) -> None:
        self._inside = 0
        self._left = asyncio.Event()
        self._closed: Callable[[], EmbedServeError] | None = None

    def is_open(self) -> bool:
        return self._closed is None

    def enter(self) -> None:
        """Goes in whatever the sign says, for work that belongs to somebody inside."""
        self._inside += 1

    def leave(self) -> None:
        self._inside -= 1
        if not self._inside:
            self._left.set()

    def check(self) -> None:
        """Raises what `shut` was given."""
        if self._closed:
            raise self._closed()

    @contextmanager
    def entered(self) -> Iterator[None]:
        self.check()
        self.enter()
        try:
            yield
        finally:
            self.leave()

    async def shut(self, why: Callable[[], EmbedServeError]) -> None:
        self._closed = why
        await self.empty()

    async def empty(self) -> None:
        while self._inside:
            self._left.clear()
            await self._left.wait()
