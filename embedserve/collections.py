"""All collections of a server.

    data/collections/<name>/
      collection.json     `embedserve.record`: which encoder made the vectors, when, and what they are for
      store/              the vectors, ids and metadata (`indexes`)
      thumbnails.sqlite   small pictures (`embedserve.thumbnails`)

The store's metadata carries two keys of ours beside the user's: `_kind` (image, text or vector) and, for
an image, `_image` (the sha256 of its bytes, under which its thumbnail lies). Filters and `group_by` may use
them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from embedserve import record as records
from embedserve.collection import Collection
from embedserve.config import Limits
from embedserve.errors import Conflict, EmbedServeError, NotFound, NotReady, closest
from embedserve.intake import check_metadata
from embedserve.items import (
    CollectionInfo,
    DuplicateGroup,
    Duplicates,
    Hit,
    Kind,
    Neighbour,
    NewItem,
    Part,
    Stored,
    StoredItem,
    Thumbnail,
)
from embedserve.prefix import check_dimensions
from embedserve.record import Record
from embedserve.shelf import STORE, Shelf, translate
from embedserve.short_towers import ShortTowers
from embedserve.towers import Towers
from indexes import open_store
from indexes.base import StoreError, StoreLocked

__all__ = [
    "Collection",
    "CollectionInfo",
    "DuplicateGroup",
    "Duplicates",
    "Hit",
    "Kind",
    "Library",
    "Neighbour",
    "NewItem",
    "Part",
    "Stored",
    "StoredItem",
    "Thumbnail",
]

T = TypeVar("T")

THREADS = 16
"""Threads for SQLite and FAISS. Writers mostly wait for the disk, and those that wait share a commit."""


class Library:
    """The collections below one folder. One per app; all calls come from its event loop."""

    def __init__(self, folder: Path, towers: Towers, limits: Limits | None = None) -> None:
        """Opens nothing: a collection opens when it is first used, so that starting takes no time.

        Args:
            folder: data/collections; made when missing.
            towers: The encoder that makes vectors of images and texts; not closed by `close`.
            limits: `max_inputs` and `max_k` matter here; None: the defaults.
        """
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        records.sweep(self.folder)
        self._towers = towers
        self._limits = limits or Limits()
        self._executor = ThreadPoolExecutor(THREADS, thread_name_prefix="collections")
        self._opened: dict[str, Collection] = {}
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closing = False

    def names(self) -> list[str]:
        """The names of all collections, usable or not, sorted."""
        return sorted(
            path.name for path in self.folder.iterdir() if records.is_name(path.name) and path.is_dir()
        )

    async def create(
        self,
        name: str,
        *,
        description: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        dimensions: int | None = None,
    ) -> tuple[CollectionInfo, bool]:
        """Makes the collection, or updates the description and metadata that are given (not None) of one that
        is there. True: it was made now (201), False: it was there (200).

        Args:
            dimensions: It keeps so many leading numbers of each vector, at unit length again; None: all.

        Raises InvalidField (name, metadata, dimensions), Conflict (it is there, made with another encoder or
        with other dimensions, or damaged).
        """
        records.check_name(name)
        own = None if metadata is None else check_metadata(metadata)
        if dimensions is not None:
            check_dimensions(self._towers.encoder.bundle.description, dimensions)
        create = partial(self._create, name, description, own, dimensions)
        made = await self._alone(name, partial(self._thread, create))
        return await self.describe(name), made

    async def get(self, name: str) -> Collection:
        """The collection, opened at its first use.

        Raises NotFound (with the closest name), Conflict (made with another encoder, or open in another
        process), EmbedServeError with code "collection_damaged".
        """
        self._check_open()
        opened = self._opened.get(name)
        if opened is not None:
            return opened
        self._existing(name)
        return await self._alone(name, partial(self._open, name))

    async def drop(self, name: str) -> None:
        """Deletes the collection. Running requests finish first; new ones get NotFound.

        Works for damaged collections and those of other encoders too. Raises NotFound, Conflict (open in
        another process).
        """
        self._existing(name)
        await self._alone(name, partial(self._drop, name))

    async def describe(self, name: str) -> CollectionInfo:
        """Raises NotFound; all other trouble is told in `problem`."""
        folder = self._existing(name)
        known: dict[str, Any] = {}
        try:
            record = await self._thread(partial(records.read, folder))
            known = record.model_dump(exclude={"format"})
            collection = await self.get(name)
            known["index"] = await collection.stats()
            known["items"] = await collection.count()
        except (NotFound, NotReady):
            raise
        except EmbedServeError as error:
            self._existing(name)  # it may just have been dropped
            known["problem"] = str(error)
        return CollectionInfo(name=name, bytes=await self._thread(partial(_bytes, folder)), **known)

    async def list(self) -> list[CollectionInfo]:
        """`describe` of all collections, by name."""
        answers = await asyncio.gather(*map(self.describe, self.names()), return_exceptions=True)
        infos = []
        for answer in answers:
            if isinstance(answer, CollectionInfo):
                infos.append(answer)
            elif not isinstance(answer, NotFound):  # which was dropped meanwhile
                raise answer
        return infos

    async def close(self) -> None:
        """Waits for running requests, then closes all stores; new ones get NotReady. Twice is harmless."""
        self._closing = True
        while self._tasks:
            await asyncio.wait(self._tasks)
        opened, self._opened = self._opened, {}
        closes = (one.close(_closing) for one in opened.values())
        results = await asyncio.gather(*closes, return_exceptions=True)
        self._executor.shutdown(wait=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result

    # --- one at a time for each name --------------------------------------------------------------------

    async def _alone(self, name: str, action: Callable[[], Awaitable[T]]) -> T:
        """`action` while no other one runs for this name.

        It goes on to its end if the caller is cancelled, so that nothing stays half open or half dropped.
        """
        self._check_open()

        async def locked() -> T:
            async with self._locks.setdefault(name, asyncio.Lock()):
                return await action()

        task = asyncio.create_task(locked(), name=f"collection {name}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(task)

    async def _open(self, name: str) -> Collection:
        if name not in self._opened:
            folder = self._existing(name)
            shelf = await self._thread(partial(self._open_shelf, folder))
            short = shelf.store.dim < self._towers.dim
            self._opened[name] = Collection(
                name,
                shelf=shelf,
                towers=ShortTowers(self._towers, shelf.store.dim) if short else self._towers,
                limits=self._limits,
                executor=self._executor,
            )
        return self._opened[name]

    async def _drop(self, name: str) -> None:
        folder = self._existing(name)
        opened = self._opened.pop(name, None)
        if opened is not None:
            await opened.close(partial(_deleted, name))
        await self._thread(partial(_remove, folder, opened is None))

    # --- in a thread ------------------------------------------------------------------------------------

    async def _thread(self, work: Callable[[], T]) -> T:
        try:
            future = self._executor.submit(work)
        except RuntimeError:  # shut down, as `close` is through
            raise _closing() from None
        return await asyncio.wrap_future(future)

    def _create(
        self,
        name: str,
        description: str | None,
        metadata: Mapping[str, Any] | None,
        dimensions: int | None,
    ) -> bool:
        folder, bundle = self.folder / name, self._towers.encoder.bundle
        if folder.exists():
            try:
                record = records.read(folder)
            except EmbedServeError as error:
                raise Conflict(str(error), code=error.code) from None
            self._check_encoder(name, record)
            if dimensions not in (None, record.dim):
                raise Conflict(
                    f"Collection '{name}' keeps {record.dim} numbers of each vector, not {dimensions}, and "
                    "that cannot change. Index the images into a new collection.",
                    code="other_dimensions",
                )
            given = {"description": description, "metadata": metadata}
            given = {key: value for key, value in given.items() if value is not None}
            changed = record.model_copy(update=given)
            if changed != record:
                records.write(folder, changed)
            return False
        record = Record(
            description=description or "",
            metadata=metadata or {},
            dim=dimensions or bundle.dim,
            encoder=bundle.name,
            fingerprint=bundle.fingerprint,
            created=datetime.now(UTC),
        )
        records.make(folder, record)
        return True

    def _open_shelf(self, folder: Path) -> Shelf:
        record = records.read(folder)
        self._check_encoder(folder.name, record)
        return Shelf(folder, record.dim)

    # --- checks -----------------------------------------------------------------------------------------

    def _existing(self, name: str) -> Path:
        if not records.is_name(name) or not (self.folder / name).is_dir():
            raise NotFound(
                f"Collection '{name[:80]}' does not exist; {closest(name, self.names())} "
                "Make it with PUT /v1/collections/{name}.",
                code="collection_not_found",
            )
        return self.folder / name

    def _check_encoder(self, name: str, record: Record) -> None:
        bundle = self._towers.encoder.bundle
        if record.fingerprint == bundle.fingerprint and record.dim <= bundle.dim:
            return
        theirs = f"'{record.encoder}' ({record.fingerprint[:8]}, {record.dim} numbers)"
        ours = f"'{bundle.name}' ({bundle.fingerprint[:8]}, {bundle.dim} numbers)"
        raise Conflict(
            f"Collection '{name}' was made with the encoder {theirs}, this server runs {ours}, and their "
            f"vectors cannot be compared. Serve it with --encoder {record.encoder}, or index its images into "
            "a new collection.",
            code="encoder_mismatch",
        )

    def _check_open(self) -> None:
        if self._closing:
            raise _closing()


def _deleted(name: str) -> NotFound:
    return NotFound(f"Collection '{name}' has been deleted.", code="collection_not_found")


def _closing() -> NotReady:
    return NotReady("The server is shutting down; try again in a moment.")


def _remove(folder: Path, check_lock: bool) -> None:
    """Deletes a collection that is not open here, unless it is open elsewhere."""
    if check_lock and (folder / STORE).exists():
        try:
            open_store(str(folder / STORE), records.read(folder).dim).close()
        except StoreLocked as error:
            raise translate(error, folder.name) from error
        except (StoreError, EmbedServeError):
            pass  # damaged: all the more reason to delete it
    records.remove(folder)


def _bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:  # a journal or snapshot that went meanwhile
            continue
    return total
