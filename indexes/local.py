"""The embedded store: SQLite is the truth, FAISS is a cache of it.

    items.sqlite   every item (`indexes/database.py`), one writer with group commit
    index/         the search index's segments (`indexes/index_cache.py`); may be deleted while closed
    lock           held by the process that has the store open

A write is committed to SQLite, then shown in the index, then acknowledged. A search pins one state of SQLite
and the View of the index of that same commit, so ids, metadata and vectors always belong together.
"""

from __future__ import annotations

import json
import logging
import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from indexes import database
from indexes.base import (
    Filter,
    Hits,
    InvalidQuery,
    Item,
    Metadata,
    StoreCorrupt,
    StoreError,
    Vectors,
    check_ids,
    check_metadata,
    check_query,
    check_vectors,
)
from indexes.durable import FolderLock, fsync_folder
from indexes.faiss_index import Batch, FlatIndex, Numbers, Part, View
from indexes.filters import parse_filter
from indexes.group_commit import GroupCommit
from indexes.index_cache import IndexCache, Loaded
from indexes.selections import Selections
from indexes.snapshots import Snapshot, write_snapshot

__all__ = ["LocalStore"]

PAGE = 1000
LOG_BYTES = 128 * 1024 * 1024
NONE = np.empty(0, np.int64)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Change:
    """What a write means for the index. `reload` for a change of everything."""

    added: Batch | None = None
    removed: Numbers = field(default_factory=lambda: NONE)
    reload: bool = False


class LocalStore:
    """A VectorStore in a folder, for one process and any number of threads.

    Raises StoreLocked if another process has it open, StoreError for another dimension or schema, and
    StoreCorrupt if the database is damaged. A damaged, stale or missing index is rebuilt.

    Args:
        folder: Made when missing.
        dim: Numbers in a vector.
        tail_rows: Newest rows that are kept outside of FAISS, and read anew on opening.
        save_rows: Rows that may gather before the index is saved while the store is open.
    """

    def __init__(
        self, folder: Path | str, dim: int, *, tail_rows: int = 4096, save_rows: int = 50_000
    ) -> None:
        self.folder, self.dim = Path(folder), dim
        self._tail_rows, self._save_rows = tail_rows, save_rows
        try:
            (self.folder / "index").mkdir(parents=True, exist_ok=True)
            self._lock = FolderLock(self.folder)
        except OSError as error:
            raise StoreError(
                f"the folder '{self.folder}' cannot hold a store: {error.strerror}. "
                "Name one that may be written."
            ) from error
        self._threads = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="store-search")
        self._saver = ThreadPoolExecutor(1, thread_name_prefix="store-saver")
        self._path = self.folder / "items.sqlite"
        self._damaged: set[int] = set()
        self._selections = Selections()
        self._closing = Lock()
        self._closed = self._saving = False
        self._cache_state = "none"
        self._log_limit = LOG_BYTES
        try:
            self._connection = database.connect(self._path, dim, wal=True)
        except BaseException:
            self._release()
            raise
        try:
            self._cache = IndexCache(self.folder / "index", dim)
            fsync_folder(self.folder)
            with database.translated():
                self._index = self._open_index()
            self._readers = database.Readers(self._path)
            self._writer = GroupCommit(self._connection, self._publish, self._bound_log)
        except BaseException:
            self._connection.close()
            self._release()
            raise

    def __enter__(self) -> LocalStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ----------------------------------------------------------------------------------- writing

    def upsert(
        self, ids: Sequence[str], vectors: Vectors, metadata: Sequence[Metadata] | None = None
    ) -> None:
        check_ids(ids)
        texts = check_metadata(metadata, len(ids))
        rows = database.prepare(ids, check_vectors(vectors, self.dim, rows=len(ids)), texts)
        if not rows:
            return
        crcs = np.array([row.crc for row in rows], np.uint32)
        halves = np.frombuffer(b"".join(row.vector for row in rows), np.float16).reshape(-1, self.dim)

        def work(connection: sqlite3.Connection) -> _Change:
            ns, gone = database.insert(connection, rows)
            return _Change(Batch(ns, crcs, halves), gone)

        self._writer.submit(work, rows=len(rows))

    def delete(self, ids: Sequence[str] | None = None, *, filter: Filter | None = None) -> int:
        if ids is not None and filter is None:
            check_ids(ids)
            names = json.dumps(list(ids), ensure_ascii=False)

            def by_id(connection: sqlite3.Connection) -> _Change:
                return _Change(removed=database.delete_ids(connection, names))

            return len(self._writer.submit(by_id, rows=len(ids)).removed)
        if filter is not None and ids is None:
            condition = parse_filter(filter)

            def by_filter(connection: sqlite3.Connection) -> _Change:
                return _Change(removed=database.delete_where(connection, condition))

            return len(self._writer.submit(by_filter).removed)
        raise InvalidQuery("delete takes either ids or a filter; give exactly one of them.")

    def restore(self, path: Path) -> None:
        snapshot = Snapshot(Path(path), self.dim)

        def work(connection: sqlite3.Connection) -> _Change:
            connection.execute("DELETE FROM items")
            connection.execute("DELETE FROM vectors")
            for page in snapshot.pages():
                database.insert(connection, page)
            return _Change(reload=True)

        self._writer.submit(work)

    def _publish(self, number: int, changes: Sequence[_Change]) -> None:
        """Brings the index up to a commit, on the writer's thread. It never fails: an index that stays
        behind its database is rebuilt by the next reader (`_pinned`)."""
        try:
            if any(change.reload for change in changes) or self._index.view.number != number - 1:
                self._index = self._rebuilt(self._connection, number)
            else:
                batches = [change.added for change in changes if change.added is not None]
                removed = np.concatenate([NONE, *(change.removed for change in changes)])
                self._damaged.difference_update(removed.tolist())
                self._index.apply(number, Batch.joined(batches, self.dim), removed)
            if not self._saving and self._cache.unsaved(self._index.view) >= self._save_rows:
                self._saving = True
                self._saver.submit(self._save)
        except Exception:
            log.exception("the search index could not follow a commit; the next search rebuilds it")

    def _bound_log(self) -> None:
        """Folds the write-ahead log into the database where readers who overlap all the time keep SQLite from
        doing so by itself. On the writer's thread, after its callers were answered."""
        size = self._log_bytes()
        if size > self._log_limit:
            self._connection.execute("PRAGMA busy_timeout=250")
            ((busy, _, _),) = self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            self._log_limit = size + LOG_BYTES if busy else LOG_BYTES
            self._connection.execute("PRAGMA busy_timeout=5000")

    def _log_bytes(self) -> int:
        with suppress(FileNotFoundError):
            return Path(f"{self._path}-wal").stat().st_size
        return 0

    # ----------------------------------------------------------------------------------- reading

    def get(self, ids: Sequence[str]) -> dict[str, Item]:
        check_ids(ids)
        with self._readers.borrow() as connection:
            found = {row.id: row for row in database.items_by_id(connection, ids)}
        for row in found.values():
            if not row.sound:
                self._set_aside([row.n])
                raise StoreCorrupt(
                    f"item '{row.id}' is damaged on disk (its checksum does not match). Store it again, "
                    "delete it, or restore a snapshot."
                )
        return {name: found[name].item() for name in ids if name in found}

    def count(self, filter: Filter | None = None) -> int:
        condition = None if filter is None else parse_filter(filter)
        with self._pinned() as (connection, view):
            if condition is None:
                return view.live
            return sum(map(len, self._selections.locate(connection, view, condition)))

    def search(
        self, vectors: Vectors, k: int, *, filter: Filter | None = None, min_score: float | None = None
    ) -> list[Hits]:
        check_query(k=k, min_score=min_score)
        queries = check_vectors(vectors, self.dim)
        if not len(queries):
            return []
        condition = None if filter is None else parse_filter(filter)
        while True:
            with self._pinned() as (connection, view):
                located = None
                if condition is not None:
                    located = self._selections.locate(connection, view, condition)
                scores, ns = view.search(queries, min(k, max(view.live, 1)), located)
                wanted = np.unique(ns[ns >= 0]).tolist()
                rows = {row.n: row for row in database.rows_by_number(connection, wanted)}
            damaged = [n for n in wanted if n not in rows or not rows[n].sound]
            if not damaged:
                floor = -np.inf if min_score is None else min_score
                return [_hits(*each, rows, floor) for each in zip(scores, ns, strict=True)]
            self._set_aside(damaged)

    def scan(
        self, *, after: str | None = None, limit: int = 100, filter: Filter | None = None
    ) -> Sequence[Item]:
        check_query(limit=limit)
        check_ids([after] if after else [])
        condition = None if filter is None else parse_filter(filter)
        items: list[Item] = []
        position, more = after or "", True
        with self._readers.borrow() as connection:
            while more and len(items) < limit:
                page = database.items_after(connection, position, condition, limit - len(items))
                more = len(page) == limit - len(items)
                sound = [row for row in page if row.sound]
                self._set_aside([row.n for row in page if not row.sound])
                items += [row.item() for row in sound]
                position = page[-1].id if page else position
        return items

    def __iter__(self) -> Iterator[Item]:
        after = None
        while page := self.scan(after=after, limit=PAGE):
            yield from page
            after = page[-1].id

    def snapshot(self, path: Path) -> None:
        def copy(database: Path) -> None:
            connection = sqlite3.connect(self._path, isolation_level=None)
            try:
                connection.execute("VACUUM INTO ?", (str(database),))
            finally:
                connection.close()

        with self._readers.borrow():  # keeps the store from closing meanwhile
            write_snapshot(Path(path), self.dim, copy)

    def stats(self) -> dict[str, Any]:
        with self._pinned() as (_, view):
            segments = view.parts[:-1]
            return {
                "engine": "local",
                "items": view.live,
                "damaged": len(self._damaged),
                "dim": self.dim,
                "bytes": self._path.stat().st_size + self._log_bytes() + self._cache.bytes(),
                "index": {
                    "type": "flat, float16, inner product",
                    "recall": 1.0,
                    "segments": len(segments),
                    "tail": view.parts[-1].live,
                    "deleted": sum(len(part.data.ns) - part.live for part in view.parts),
                    "cache": self._cache_state,
                },
                "commits": self._writer.commits,
                "writes": self._writer.requests,
            }

    def close(self) -> None:
        with self._closing:
            if self._closed:
                return
            self._closed = True
            self._writer.close()
            self._saver.shutdown()
            self._readers.close()
            if self._index.view.parts[-1].live >= self._tail_rows // 4:
                self._index.seal()
            self._save()
            self._connection.close()
            self._release()

    # --------------------------------------------------------------------------------- the index

    @contextmanager
    def _pinned(self) -> Iterator[tuple[sqlite3.Connection, View]]:
        """A reader and the View of the very commit that it sees."""
        with self._readers.borrow() as connection:
            view = self._index.view
            if database.commits(connection) != view.number:
                connection.rollback()
                with self._writer.publishing:  # no commit now
                    connection.execute("BEGIN")
                    number = database.commits(connection)
                    if self._index.view.number != number:
                        self._index = self._rebuilt(connection, number)
                    view = self._index.view
            yield connection, view

    def _set_aside(self, damaged: Sequence[int]) -> None:
        """Takes damaged rows out of the index. They stay in the database, for `get` to name them."""
        if not set(damaged) - self._damaged:
            return
        with self._writer.publishing:
            view, suspects = self._index.view, np.array(sorted(damaged), np.int64)
            located = zip(view.parts, view.locate(suspects), strict=True)
            new = np.concatenate([part.data.ns[at] for part, at in located])  # less those deleted meanwhile
            self._damaged.update(new.tolist())
            self._index.apply(view.number, Batch.joined([], self.dim), new)
        log.error("%d stored items are damaged (numbers %s …)", len(new), new[:10].tolist())

    def _rebuilt(self, connection: sqlite3.Connection, number: int) -> FlatIndex:
        index = FlatIndex(self.dim, self._threads, tail_rows=self._tail_rows)
        self._damaged.clear()
        self._replay(index, connection, 0, number)
        return index

    def _replay(self, index: FlatIndex, connection: sqlite3.Connection, after: int, number: int) -> None:
        index.apply(number, Batch.joined([], self.dim), NONE)
        rows = database.rows_after(connection, after)
        while page := list(islice(rows, 4096)):
            sound = [row for row in page if row.sound]
            self._damaged.update(row.n for row in page if not row.sound)
            index.apply(number, _batch(sound, self.dim), NONE)

    def _open_index(self) -> FlatIndex:
        """From the cache where it agrees with the database in every row, else from the database alone."""
        connection = self._connection
        number = database.commits(connection)
        loaded = self._cache.load()
        parts = None if loaded is None else self._agreeing(connection, loaded)
        if loaded is None or parts is None:
            self._cache_state = "none" if not self._cache.exists() else "rebuilt"
            return self._rebuilt(connection, number)
        self._cache_state = "loaded"
        index = FlatIndex(self.dim, self._threads, tail_rows=self._tail_rows, parts=parts)
        self._replay(index, connection, loaded.covered, number)
        return index

    def _agreeing(self, connection: sqlite3.Connection, loaded: Loaded) -> list[Part] | None:
        """The cached segments with what was deleted since, or None if they lack or contradict a row."""
        if loaded.covered > database.last_number(connection):
            return None  # the database is older than the cache
        ns, crcs = database.checksums(connection, loaded.covered)
        seen = np.zeros(len(ns), bool)
        parts = []
        for segment in loaded.segments:
            at = np.searchsorted(ns, segment.ns)
            alive = at < len(ns)
            alive[alive] = (ns[at[alive]] == segment.ns[alive]) & (crcs[at[alive]] == segment.crcs[alive])
            seen[at[alive]] = True
            live = int(np.count_nonzero(alive))
            parts.append(Part(segment, None if live == len(alive) else alive, live))
        missing = ns[~seen].tolist()
        for start in range(0, len(missing), PAGE):
            for row in database.rows_by_number(connection, missing[start : start + PAGE]):
                if row.sound:
                    self._damaged.clear()
                    return None
                self._damaged.add(row.n)
        return parts

    def _save(self) -> None:
        """Writes the cache. A failure costs time on the next opening, and nothing else."""
        try:
            self._cache.save(self._index.view)
            self._cache_state = "saved"
        except OSError as error:
            log.warning("the search index could not be saved (%s); the next opening rebuilds it", error)
            self._cache_state = f"not saved: {error.strerror}"
        finally:
            self._saving = False

    def _release(self) -> None:
        self._threads.shutdown()
        self._saver.shutdown()
        self._lock.release()


def _batch(rows: Iterable[database.Stored], dim: int) -> Batch:
    kept = list(rows)
    return Batch(
        np.array([row.n for row in kept], np.int64),
        np.array([row.crc for row in kept], np.uint32),
        np.frombuffer(b"".join(row.vector or b"" for row in kept), np.float16).reshape(-1, dim),
    )


def _hits(scores: NDArray[np.float32], ns: Numbers, rows: dict[int, database.Stored], floor: float) -> Hits:
    kept = [
        (float(score), rows[n])
        for score, n in zip(scores.tolist(), ns.tolist(), strict=True)
        if n >= 0 and score >= floor
    ]
    return Hits(
        ids=tuple(row.id for _, row in kept),
        scores=tuple(score for score, _ in kept),
        metadata=tuple(row.metadata for _, row in kept),
    )
