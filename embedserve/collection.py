"""One collection: an encoder, a store of vectors and a box of thumbnails under one name.

Its methods are coroutines of one event loop; SQLite and FAISS run in the library's threads. What was begun
in a thread runs to its end even when the request is cancelled, and closing waits for it.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Executor
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from embedserve import query as queries
from embedserve.config import Limits
from embedserve.errors import EmbedServeError, InvalidField, TooLarge
from embedserve.gate import Gate
from embedserve.intake import (
    Draft,
    check_field,
    check_id,
    check_one_of,
    check_range,
    check_weight,
    check_whole,
    drafts,
    is_id,
)
from embedserve.items import (
    DuplicateGroup,
    Duplicates,
    Hit,
    Neighbour,
    NewItem,
    Part,
    Stored,
    StoredItem,
    Thumbnail,
    item_of,
)
from embedserve.query import each_or_all
from embedserve.ranking import Links, field_value, mix
from embedserve.shelf import Shelf, translate, unknown_item
from embedserve.short_towers import Embeds
from indexes.base import StoreError

__all__ = ["Collection"]

S = TypeVar("S")
T = TypeVar("T")
Vector = NDArray[np.float32]
Metadata = Mapping[str, Any]

logger = logging.getLogger(__name__)

MAX_PAGE = 10_000
"""Items of one `scan`."""
FEW_LINKS, LINKS = 7, 64
"""Nearest neighbours that `duplicates` looks at for each item, and for one with more than a few."""
BLOCK = 256
"""Items that `duplicates` compares at once; between blocks it can be cancelled."""
ROUNDING = 5e-4
"""How far below 1 the cosine of a vector with itself may come out after storage as float16."""


class Collection:
    """One open collection; get it from `Library.get` for each request, keep it no longer.

    Every method raises NotFound when the collection has been dropped and NotReady when the server is closing.
    """

    def __init__(
        self,
        name: str,
        *,
        shelf: Shelf,
        towers: Embeds,
        limits: Limits,
        executor: Executor,
    ) -> None:
        self.name = name
        self.dim = shelf.store.dim
        self._shelf = shelf
        self._store = shelf.store
        self._thumbnails = shelf.thumbnails
        self._towers = towers
        self._limits = limits
        self._executor = executor
        self._gate = Gate()
        self._comparing = asyncio.Lock()
        self._collector: asyncio.Task[None] | None = None
        self._collect_again = False
        if shelf.thumbnails.sweep_due:
            self._collect_soon()

    # --- items ------------------------------------------------------------------------------------------

    async def upsert(self, items: Sequence[NewItem]) -> list[Stored | EmbedServeError]:
        """Writes the good items, durably, and says for each what became of it, in order.

        A bad item fails alone: InvalidField (`param` is the field within the item: id, image, text,
        text_weight, vector, metadata), TooLarge, BadRequest, UnsupportedMedia. A known id is replaced; of an
        id given twice the last wins. Raises Busy when a tower's queue is full, and then nothing was written.
        """
        with self._gate.entered():
            self._check_number(items, "items")
            all_drafts = await self._thread(partial(drafts, items, self.dim))
            await self._embed(all_drafts)
            good = [draft for draft in all_drafts if draft.error is None]
            if good:
                await self._thread(partial(self._shelf.write, good))
                self._collect_soon()
            return [draft.error or Stored(draft.id, draft.kind) for draft in all_drafts]

    async def get(self, ids: Sequence[str], *, vectors: bool = False) -> dict[str, StoredItem]:
        """The items that exist, by id."""
        with self._gate.entered():
            self._check_number(ids, "ids")
            found = await self._thread(partial(self._store.get, [name for name in ids if is_id(name)]))
            return {
                name: item_of(name, item.metadata, item.vector if vectors else None)
                for name, item in found.items()
            }

    async def item(self, id: str, *, vectors: bool = False) -> StoredItem:
        """One item. Raises NotFound."""
        found = await self.get([id], vectors=vectors)
        if id not in found:
            raise unknown_item(id)
        return found[id]

    async def delete(self, ids: Sequence[str] | None = None, *, filter: Metadata | None = None) -> int:
        """Deletes by ids or by filter (exactly one of them; `{}` matches all) and returns how many went."""
        with self._gate.entered():
            check_one_of({"ids": ids, "filter": filter}, "A deletion")
            if ids is not None:
                self._check_number(ids, "ids")
            gone = await self._thread(partial(self._shelf.delete, ids, filter))
            self._collect_soon()
            return gone

    async def count(self, filter: Metadata | None = None) -> int:
        """How many items there are, or match."""
        with self._gate.entered():
            return await self._thread(partial(self._store.count, filter))

    async def scan(
        self,
        *,
        after: str | None = None,
        limit: int = 100,
        filter: Metadata | None = None,
        vectors: bool = False,
    ) -> list[StoredItem]:
        """Items in id order (by code point), those behind the id `after`."""
        with self._gate.entered():
            check_whole(limit, "limit", MAX_PAGE)
            if after is not None:
                check_id(after, "after")
            page = await self._thread(partial(self._store.scan, after=after, limit=limit, filter=filter))
            return [item_of(item.id, item.metadata, item.vector if vectors else None) for item in page]

    async def thumbnail(self, id: str) -> Thumbnail:
        """Raises NotFound: no such item, or one that was not made from an image."""
        with self._gate.entered():
            return await self._thread(partial(self._shelf.thumbnail, id))

    async def stats(self) -> dict[str, Any]:
        """The store's statistics and, under `thumbnails`, the number and bytes of those."""
        with self._gate.entered():
            index = await self._thread(self._store.stats)
            return {**index, "thumbnails": await self._thread(self._thumbnails.stats)}

    # --- searching --------------------------------------------------------------------------------------

    async def search(
        self,
        query: Sequence[Part],
        *,
        k: int = 10,
        filter: Metadata | None = None,
        min_score: float | None = None,
        diversity: float = 0.0,
        group_by: str | None = None,
        vectors: bool = False,
    ) -> list[Hit]:
        """The `k` items most like the weighted sum of the query's parts, best first, ties by id.

        Args:
            diversity: 0 ranks by similarity alone, towards 1 hits differ more from one another (MMR); the
                order is then that of selection.
            group_by: A metadata field (dots go into objects): only the best hit of each of its values.
                Items without the field are one group.

        Raises InvalidField (an empty query, parts that cancel out, a bad k, filter, …), NotFound (a part's
        id), Busy, and what decoding an image raises. `param` is the field, such as `query[1].weight` or `k`.
        """
        with self._gate.entered():
            check_whole(k, "k", self._limits.max_k)
            check_range(diversity, "diversity", 0, 1)
            if min_score is not None:
                check_range(min_score, "min_score", -1, 1)
            if group_by is not None:
                check_field(group_by, "group_by")
            vector = await self._mixed(query)
            return await self._thread(
                partial(
                    queries.find,
                    self._store,
                    vector,
                    k,
                    filter=filter,
                    min_score=min_score,
                    diversity=diversity,
                    group_by=group_by,
                    excluded={part.id for part in query if part.id is not None},
                    vectors=vectors,
                )
            )

    async def neighbours(
        self, parts: Sequence[Part], field: str, *, k: int = 10, filter: Metadata | None = None
    ) -> list[list[Neighbour] | EmbedServeError]:
        """For each query on its own, the `k` nearest items that have the metadata `field`, best first.

        For a k-NN vote. A bad query fails alone. A query by id leaves that item out. Raises InvalidField,
        Busy.
        """
        with self._gate.entered():
            self._check_number(parts, "queries")
            check_whole(k, "k", self._limits.max_k)
            check_field(field, "field")
            vectors = await queries.embed(parts, self._towers, self._vectors)
            good = {i: vector for i, vector in enumerate(vectors) if not isinstance(vector, EmbedServeError)}
            labelled: dict[str, Any] = {field: {"$exists": True}}
            both = labelled if filter is None else {"$and": [filter, labelled]}
            answers: list[list[Neighbour] | EmbedServeError] = [
                vector if isinstance(vector, EmbedServeError) else [] for vector in vectors
            ]
            if good:
                stacked = np.stack(list(good.values()))
                found = await self._thread(partial(self._store.search, stacked, k + 1, filter=both))
                for i, hits in zip(good, found, strict=True):
                    rows = queries.ranked(hits, {parts[i].id or ""})[:k]
                    answers[i] = [Neighbour(*row[:2], _labels(field_value(row[2], field))) for row in rows]
            return answers

    async def duplicates(
        self, *, threshold: float = 0.95, limit: int = 100, filter: Metadata | None = None
    ) -> Duplicates:
        """Groups of items whose cosine similarity is at least `threshold`. Cancel the task to stop it.

        Single linkage: a group holds everything that is reachable over pairs within the threshold, so its two
        ends may differ more. Each item is compared with all others through the index, and joined with the
        nearest 64 of them. Memory grows with the number of items that have a duplicate, time with the square
        of all items while the index is exact. One at a time for each collection.
        """
        with self._gate.entered():
            check_range(threshold, "threshold", 0.5, 1)
            check_whole(limit, "limit", self._limits.max_k)
            links, scanned, after = Links(), 0, None
            async with self._comparing:
                while page := await self._thread(
                    partial(self._link, links, after, min(threshold, 1 - ROUNDING), filter)
                ):
                    scanned, after = scanned + len(page), page[-1]
                    self._gate.check()  # closing need not wait for this one
            groups = await self._thread(links.groups)
            return Duplicates(
                groups=tuple(DuplicateGroup(*group) for group in groups[:limit]),
                total_groups=len(groups),
                total_items=sum(len(ids) for ids, _ in groups),
                scanned=scanned,
            )

    async def close(self, why: Callable[[], EmbedServeError]) -> None:
        """Refuses new requests with `why`, waits for those that run, and releases the files."""
        await self._gate.shut(why)
        self._collect_again = False
        if self._collector:
            await self._collector
        await self._gate.empty()  # of what a cancelled request left running
        await asyncio.get_running_loop().run_in_executor(self._executor, self._shelf.close)

    # --- in the event loop ------------------------------------------------------------------------------

    async def _thread(self, work: Callable[[], T]) -> T:
        """`work` in a thread. Until it ends the collection stays open, even when the caller is cancelled."""
        loop = asyncio.get_running_loop()
        self._gate.enter()
        future = self._executor.submit(work)
        future.add_done_callback(lambda _: loop.call_soon_threadsafe(self._gate.leave))
        try:
            return await asyncio.wrap_future(future)
        except (StoreError, OSError, sqlite3.Error) as error:
            raise translate(error, self.name) from error

    async def _embed(self, drafts: Sequence[Draft]) -> None:
        images = [draft for draft in drafts if draft.image is not None]
        texts = [draft for draft in drafts if draft.text is not None]

        async def each(
            tower: Callable[[list[S]], Awaitable[list[T | EmbedServeError]]], given: list[S]
        ) -> list[T | EmbedServeError]:
            return await each_or_all(tower(given), len(given)) if given else []

        try:
            async with asyncio.TaskGroup() as group:  # where one tower's queue is full, the other one stops
                words = group.create_task(each(self._towers.texts, [draft.text or "" for draft in texts]))
                seen = group.create_task(each(self._towers.pictures, [one.image or b"" for one in images]))
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        for draft, picture in zip(images, seen.result(), strict=True):
            if isinstance(picture, EmbedServeError):
                draft.take(picture, "image")
            else:
                draft.take(picture.vector, "image")
                draft.thumbnail = picture.thumbnail
        for draft, vector in zip(texts, words.result(), strict=True):
            draft.take(vector, "text")

    async def _vectors(self, ids: Sequence[str]) -> dict[str, Vector]:
        found = await self._thread(partial(self._store.get, [name for name in ids if is_id(name)]))
        return {name: item.vector for name, item in found.items()}

    async def _mixed(self, parts: Sequence[Part]) -> Vector:
        if not parts:
            raise InvalidField(
                "The query is empty; give an image, a text, an id or a vector, or a list of them.",
                param="query",
            )
        self._check_number(parts, "query")
        several = len(parts) > 1
        weights = [check_weight(part.weight, f"query[{i}].weight") for i, part in enumerate(parts)]
        vectors = await queries.embed(parts, self._towers, self._vectors)
        good: list[Vector] = []
        for i, vector in enumerate(vectors):
            if isinstance(vector, EmbedServeError):
                vector.param = f"query[{i}].{vector.param}" if several and vector.param else vector.param
                raise vector
            good.append(vector)
        return mix(np.stack(good), weights)

    def _check_number(self, values: Sequence[object], param: str) -> None:
        if len(values) > self._limits.max_inputs:
            raise TooLarge(
                f"{len(values):,} {param} in one request; at most {self._limits.max_inputs:,} are allowed. "
                "Send them in several requests.",
                param=param,
            )

    def _collect_soon(self) -> None:
        self._collect_again = True
        if self._collector is None or self._collector.done():
            self._collector = asyncio.create_task(self._collect(), name=f"thumbnails of {self.name}")

    async def _collect(self) -> None:
        thumbnails, shown = self._thumbnails, self._shelf.shown
        try:
            while self._collect_again and self._gate.is_open():
                self._collect_again = False
                if thumbnails.sweep_due:
                    await self._sweep()
                while await self._thread(partial(thumbnails.collect, shown)) and self._gate.is_open():
                    pass
        except Exception:
            # Only space is at stake, and the next start sweeps again.
            self._thumbnails.sweep_due = True
            logger.exception("thumbnails of collection '%s' could not be cleaned up", self.name)

    async def _sweep(self) -> None:
        self._thumbnails.sweep_due = False
        after: str | None = ""
        while after is not None:
            if not self._gate.is_open():
                self._thumbnails.sweep_due = True  # so that closing leaves the file marked for the next start
                return
            after = await self._thread(partial(self._thumbnails.sweep, self._shelf.shown, after))

    # --- in a thread ------------------------------------------------------------------------------------

    def _link(self, links: Links, after: str | None, threshold: float, filter: Metadata | None) -> list[str]:
        """Links one block of items with their neighbours, and returns the block's ids."""
        page = self._store.scan(after=after, limit=BLOCK, filter=filter)
        rest = list(page)
        for k in (FEW_LINKS + 1, LINKS + 1):  # each finds itself as well
            if not rest:
                break
            vectors = np.stack([item.vector for item in rest])
            found = self._store.search(vectors, k, filter=filter, min_score=threshold)
            for item, hits in zip(rest, found, strict=True):
                for name, score in zip(hits.ids, hits.scores, strict=True):
                    if name != item.id:
                        links.add(item.id, name, min(1.0, score))
            # Most items have few or no duplicates, and neighbours cost a look-up each.
            rest = [item for item, hits in zip(rest, found, strict=True) if len(hits) == k]
        return [item.id for item in page]


def _labels(value: object) -> tuple[str | int | float | bool, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(one for one in values if isinstance(one, str | int | float))
