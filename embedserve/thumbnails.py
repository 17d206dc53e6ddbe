"""A collection's thumbnails: small pictures in one SQLite file, kept once for each source image.

    pictures(sha256, webp)     content-addressed: the key is the source image's sha256
    uses(id, sha256)           which items may show which picture

`uses` is written before the item is, in one durable transaction with the picture, so it always holds at
least what the store refers to: an acknowledged item never lacks its thumbnail, and what is superfluous is
only space. The collector takes that away: for the ids it is told of it asks the store which picture they show
now, deletes their other uses, and then the pictures without any. Ids that are being written
(`Thumbnails.writing`) are left for later; that, and one lock for both, makes it safe while upserts run.

`synchronous=FULL`: an item is acknowledged as durable, and its thumbnail cannot be made again from a vector,
so NORMAL (which may lose the last transactions when the power fails) would not do. Writers that arrive while
one commits share the next commit, so the price is one fsync for many requests.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

__all__ = ["Thumbnails", "ThumbnailsDamaged"]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS pictures(sha256 BLOB NOT NULL UNIQUE, webp BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS uses(id TEXT, sha256 BLOB, PRIMARY KEY(id, sha256)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS uses_by_picture ON uses(sha256);
"""
_CLEAN, _DIRTY = 0, 1  # PRAGMA user_version: dirty from the first change until a close that left no doubt
_PAGE = 256  # ids that the collector looks at while it holds the lock

Shown = Callable[[Sequence[str]], Mapping[str, str]]
"""ids → the sha256 (hex) of the picture that each shows now; ids that show none are left out."""


class ThumbnailsDamaged(Exception):
    """The file is not a SQLite database, or a damaged one."""


@dataclass(slots=True)
class _Write:
    pictures: Mapping[str, bytes]
    uses: Sequence[tuple[str, str]]
    done: bool = False
    error: Exception | None = None


class Thumbnails:
    """The pictures of one collection. All methods block and may be called from any thread."""

    def __init__(self, path: Path) -> None:
        """Opens or makes the file. Raises ThumbnailsDamaged."""
        self.path = Path(path)
        self._lock = threading.Lock()  # guards the writing connection and the four fields below
        self._writing: Counter[str] = Counter()
        self._doubtful: set[str] = set()
        self._dirty = False
        self._closed = False
        self._read_lock = threading.Lock()  # guards the reading connection
        self._queue_lock = threading.Lock()  # guards the queue
        self._queue: list[_Write] = []
        try:
            self._writer = _connect(self.path)
            self._writer.executescript(_SCHEMA)
            self._reader = _connect(self.path)
            self._dirty = self._writer.execute("PRAGMA user_version").fetchone()[0] == _DIRTY
        except sqlite3.DatabaseError as error:
            raise ThumbnailsDamaged(
                f"'{self.path}' cannot be read as thumbnails ({error}). Move the file away: "
                "the items stay and lose only their thumbnails."
            ) from error
        self.sweep_due = self._dirty
        """Whether `sweep` should run: the last process was killed, or items were deleted by a filter."""

    # --- writing ----------------------------------------------------------------------------------------

    @contextmanager
    def writing(self, shows: Mapping[str, str | None]) -> Iterator[None]:
        """Around a write to the store, or a deletion: id → sha256 (hex), None without a picture.

        Until it ends the collector leaves these ids alone; then it looks at those that showed another.
        """
        with self._lock:
            self._mark_dirty()
            self._writing.update(shows.keys())
        succeeded = False
        try:
            yield
            succeeded = True
        finally:
            with self._lock:
                self._writing.subtract(shows.keys())
                self._writing = +self._writing  # drops the zeros
                self._doubtful.update(
                    name for name, sha256 in self._uses(shows) if not succeeded or sha256.hex() != shows[name]
                )

    def put(self, pictures: Mapping[str, bytes], uses: Sequence[tuple[str, str]]) -> None:
        """Keeps pictures (sha256 hex → WebP) and the (id, sha256) pairs that will show them, durably."""
        write = _Write(pictures, uses)
        with self._queue_lock:
            self._queue.append(write)
        with self._lock:
            if not write.done:  # else the one before took it along
                with self._queue_lock:
                    batch, self._queue = self._queue, []
                self._commit(batch)
        if write.error:
            raise write.error

    def _commit(self, batch: Sequence[_Write]) -> None:
        error: Exception | None = None
        try:
            with self._transaction():
                for write in batch:
                    self._writer.executemany(
                        "INSERT OR IGNORE INTO pictures VALUES (?, ?)",
                        [(bytes.fromhex(sha256), webp) for sha256, webp in write.pictures.items()],
                    )
                    self._writer.executemany(
                        "INSERT OR IGNORE INTO uses VALUES (?, ?)",
                        [(name, bytes.fromhex(sha256)) for name, sha256 in write.uses],
                    )
        except sqlite3.Error as failed:
            error = failed
        for write in batch:
            write.done, write.error = True, error

    def sweep_soon(self) -> None:
        """Before a deletion whose ids are not known: the collector will have to look at all of them."""
        with self._lock:
            self._mark_dirty()
            self.sweep_due = True

    # --- reading ----------------------------------------------------------------------------------------

    def get(self, sha256: str) -> bytes | None:
        """The WebP bytes of a source image's thumbnail."""
        with self._read_lock:
            row = self._reader.execute(
                "SELECT webp FROM pictures WHERE sha256 = ?", (bytes.fromhex(sha256),)
            ).fetchone()
        return bytes(row[0]) if row else None

    def stats(self) -> dict[str, int]:
        """`count`: the pictures; `bytes`: the size of the file."""
        with self._read_lock:
            (count,) = self._reader.execute("SELECT count(*) FROM pictures").fetchone()
        return {"count": count, "bytes": self.path.stat().st_size}

    # --- the collector ----------------------------------------------------------------------------------

    def collect(self, shown: Shown) -> bool:
        """One round over the doubtful ids. True when there is more to do."""
        with self._lock:
            ready = list(islice((name for name in self._doubtful if name not in self._writing), _PAGE))
            self._release(ready, shown)
            self._doubtful.difference_update(ready)
        return len(ready) == _PAGE

    def sweep(self, shown: Shown, after: str = "") -> str | None:
        """One round over all ids, in order. Returns where to go on, None when it is done."""
        with self._lock:
            page = [
                row[0]
                for row in self._writer.execute(
                    "SELECT DISTINCT id FROM uses WHERE id > ? ORDER BY id LIMIT ?", (after, _PAGE)
                )
            ]
            self._release([name for name in page if name not in self._writing], shown)
            self._doubtful.update(name for name in page if name in self._writing)
        return page[-1] if len(page) == _PAGE else None

    def _release(self, ids: Sequence[str], shown: Shown) -> None:
        """Deletes the uses that are no longer, and then the pictures that nobody uses."""
        uses = self._uses(ids)
        if not uses:
            return
        now = shown(sorted({name for name, _ in uses}))
        gone = [(name, sha256) for name, sha256 in uses if now.get(name) != sha256.hex()]
        if not gone:
            return
        with self._transaction():
            self._writer.executemany("DELETE FROM uses WHERE id = ? AND sha256 = ?", gone)
            self._writer.executemany(
                "DELETE FROM pictures WHERE sha256 = ?1 "
                "AND NOT EXISTS (SELECT 1 FROM uses WHERE sha256 = ?1)",
                {(sha256,) for _, sha256 in gone},
            )

    def close(self) -> None:
        """Closing twice is harmless."""
        with self._lock, self._read_lock:
            if self._closed:
                return
            self._closed = True
            if self._dirty and not self._doubtful and not self.sweep_due:
                self._writer.execute(f"PRAGMA user_version={_CLEAN}")
            self._reader.close()
            self._writer.close()

    # --- under the lock ---------------------------------------------------------------------------------

    def _uses(self, ids: Iterable[str]) -> list[tuple[str, bytes]]:
        return self._writer.execute(
            "SELECT id, sha256 FROM uses WHERE id IN (SELECT value FROM json_each(?))",
            (json.dumps(list(ids), ensure_ascii=False),),
        ).fetchall()

    def _mark_dirty(self) -> None:
        if not self._dirty:
            self._writer.execute(f"PRAGMA user_version={_DIRTY}")
            self._dirty = True

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._writer.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._writer.execute("COMMIT")
        except BaseException:
            if self._writer.in_transaction:
                self._writer.execute("ROLLBACK")
            raise


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=30)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    return connection
