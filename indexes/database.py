"""The SQLite file that is the truth of an embedded store.

    items    n, id, metadata, crc      `n` is also the item's number in the search index
    vectors  n, vector                 float16; a table of its own, so that filters read no vectors
    about    dim, commits

A row never changes: replacing an item deletes its row and adds one with a new `n`, and no `n` is ever used
twice. Whatever is known about an `n` (its vector, whether a filter matches) may therefore be kept.
"""

from __future__ import annotations

import json
import sqlite3
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Condition
from typing import Any

import numpy as np
from numpy.typing import NDArray

from indexes.base import Item, Metadata, StoreCorrupt, StoreError, Vectors
from indexes.conditions import Condition as FilterCondition
from indexes.conditions import Sql

__all__ = [
    "Float16",
    "Readers",
    "Row",
    "Stored",
    "checksums",
    "commits",
    "connect",
    "delete_ids",
    "delete_where",
    "insert",
    "items_after",
    "items_by_id",
    "last_number",
    "numbers_where",
    "prepare",
    "rows_after",
    "rows_by_number",
    "translated",
]

Float16 = NDArray[np.float16]
SCHEMA = 1
APPLICATION = 0x454D4253  # "EMBS": tells a store from any other SQLite file
TABLES = """
    CREATE TABLE items (n INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE,
                        metadata TEXT NOT NULL, crc INTEGER NOT NULL) STRICT;
    CREATE TABLE vectors (n INTEGER PRIMARY KEY, vector BLOB NOT NULL) STRICT;
    CREATE TABLE about (key TEXT PRIMARY KEY, value INTEGER NOT NULL) STRICT, WITHOUT ROWID;
"""
# Text is read as bytes, since damaged text may be no UTF-8 and must not fail the rows around it.
COLUMNS = "items.n, CAST(items.id AS BLOB), vectors.vector, CAST(items.metadata AS BLOB), items.crc"
JOINED = f"SELECT {COLUMNS} FROM items LEFT JOIN vectors ON vectors.n = items.n"


@dataclass(frozen=True, slots=True)
class Row:
    """An item ready to be written: float16 bytes, JSON text, and the checksum over everything."""

    id: str
    vector: bytes
    metadata: str
    crc: int


@dataclass(frozen=True, slots=True)
class Stored:
    """A row as it was read. Nothing of it is to be trusted unless `sound`."""

    n: int
    raw_id: bytes
    vector: bytes | None
    raw_metadata: bytes
    crc: int

    @property
    def sound(self) -> bool:
        """Whether the checksum fits, which means that id, vector and metadata belong together."""
        return self.vector is not None and _crc(self.raw_id, self.vector, self.raw_metadata) == self.crc

    @property
    def id(self) -> str:
        return self.raw_id.decode(errors="replace")

    @property
    def metadata(self) -> Metadata:
        parsed: dict[str, Any] = json.loads(self.raw_metadata)
        return parsed

    def item(self) -> Item:
        vector = np.frombuffer(self.vector or b"", np.float16).astype(np.float32)
        return Item(self.id, vector, self.metadata)


def _crc(id: bytes, vector: bytes, metadata: bytes) -> int:
    return zlib.crc32(metadata, zlib.crc32(vector, zlib.crc32(id + b"\0")))


def prepare(ids: Sequence[str], vectors: Vectors, metadata: Sequence[str]) -> list[Row]:
    """The rows of checked input: one for each id, the last where an id is given twice."""
    halves = np.ascontiguousarray(vectors.astype(np.float16))
    last = {name: position for position, name in enumerate(ids)}
    rows = []
    for name, position in last.items():
        vector, text = halves[position].tobytes(), metadata[position]
        rows.append(Row(name, vector, text, _crc(name.encode(), vector, text.encode())))
    return rows


# --------------------------------------------------------------------------------------- connecting


def connect(path: Path, dim: int, *, wal: bool = False, read_only: bool = False) -> sqlite3.Connection:
    """A connection, with the tables made or checked. Any thread may use it, one at a time.

    `wal` for a store's own database: the write-ahead log belongs to the place, a snapshot has none. Raises
    StoreError for another dimension or schema, StoreCorrupt for a file that is no database.
    """
    if sqlite3.sqlite_version_info < (3, 37):
        raise StoreError(f"SQLite {sqlite3.sqlite_version} is too old; the store needs 3.37 or newer.")
    name = f"{path.absolute().as_uri()}?mode={'ro' if read_only else 'rwc'}"
    connection = sqlite3.connect(name, uri=True, isolation_level=None, check_same_thread=False)
    try:
        with translated():
            connection.execute("PRAGMA page_size=8192")
            connection.execute("PRAGMA cache_size=-32768")
            if wal:
                connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=FULL")
            connection.execute("PRAGMA fullfsync=ON")  # macOS: fsync alone does not reach the disk there
            connection.execute("PRAGMA journal_size_limit=67108864")
            _check_schema(connection, path, dim)
    except BaseException:
        connection.close()
        raise
    return connection


def _check_schema(connection: sqlite3.Connection, path: Path, dim: int) -> None:
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (schema,) = connection.execute("PRAGMA user_version").fetchone()
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if not tables:
        connection.executescript(
            f"BEGIN IMMEDIATE; {TABLES} INSERT INTO about VALUES ('dim', {int(dim)}), ('commits', 0);"
            f"PRAGMA application_id={APPLICATION}; PRAGMA user_version={SCHEMA}; COMMIT;"
        )
        return
    if application != APPLICATION:
        raise StoreError(f"'{path}' is an SQLite file of another program; name another folder for the store.")
    if schema != SCHEMA:
        raise StoreError(
            f"the store in '{path.parent}' has schema {schema}, and this version reads schema {SCHEMA}. "
            "Use the version of the program that wrote it, or build the store anew."
        )
    (stored,) = connection.execute("SELECT value FROM about WHERE key = 'dim'").fetchone()
    if stored != dim:
        raise StoreError(
            f"the store in '{path.parent}' holds vectors of {stored} numbers, and {dim} were asked for. "
            f"Open it with dim={stored}, or name another folder."
        )


@contextmanager
def translated() -> Iterator[None]:
    """Turns SQLite's errors into the store's."""
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code == sqlite3.SQLITE_FULL:
            raise StoreError(
                "the disk is full, so nothing of this request was stored. Free space and send it again."
            ) from error
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            raise StoreCorrupt(
                f"the store's database is damaged ({error}). Restore a snapshot, or build the store anew."
            ) from error
        raise StoreError(
            f"the store's database failed ({error}), so nothing of this request was done. Check the disk and "
            "the folder's permissions, then send it again."
        ) from error


class Readers:
    """Connections for reading, handed out one to a caller, so that reads go on during writes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._idle: list[sqlite3.Connection] = []
        self._lent = 0
        self._closed = False
        self._change = Condition()

    @contextmanager
    def borrow(self) -> Iterator[sqlite3.Connection]:
        """A connection with an open read transaction. Raises StoreError when closed."""
        with self._change:
            if self._closed:
                raise StoreError("the store is closed; open it again.")
            self._lent += 1
            connection = self._idle.pop() if self._idle else None
        try:
            with translated():
                if connection is None:
                    connection = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False)
                    connection.execute("PRAGMA query_only=ON")
                    connection.execute("PRAGMA cache_size=-4096")
                connection.execute("BEGIN")
                yield connection
        finally:
            if connection is not None and connection.in_transaction:
                connection.rollback()
            with self._change:
                self._lent -= 1
                if connection is not None:
                    self._idle.append(connection)
                self._change.notify_all()

    def close(self) -> None:
        """Refuses new readers, waits for those at work, and closes their connections."""
        with self._change:
            self._closed = True
            self._change.wait_for(lambda: not self._lent)
            while self._idle:
                self._idle.pop().close()


# ------------------------------------------------------------------------------------------ writing


def insert(
    connection: sqlite3.Connection, rows: Sequence[Row]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Writes rows, replacing known ids. Returns the new n's in order, and the n's that are gone."""
    ids = json.dumps([row.id for row in rows], ensure_ascii=False)
    gone = delete_ids(connection, ids)
    first = last_number(connection) + 1
    connection.executemany(
        "INSERT INTO items (n, id, metadata, crc) VALUES (?, ?, ?, ?)",
        ((n, row.id, row.metadata, row.crc) for n, row in enumerate(rows, first)),
    )
    connection.executemany(
        "INSERT INTO vectors (n, vector) VALUES (?, ?)",
        ((n, row.vector) for n, row in enumerate(rows, first)),
    )
    return np.arange(first, first + len(rows), dtype=np.int64), gone


def delete_ids(connection: sqlite3.Connection, ids: str) -> NDArray[np.int64]:
    """Deletes the items named in the JSON list `ids`; the n's that are gone."""
    query = "DELETE FROM items WHERE id IN (SELECT value FROM json_each(?)) RETURNING n"
    return _delete_vectors(connection, connection.execute(query, (ids,)))


def delete_where(connection: sqlite3.Connection, condition: FilterCondition) -> NDArray[np.int64]:
    """Deletes the items that match; the n's that are gone."""
    where, parameters = _where(condition)
    query = f"DELETE FROM items WHERE {where} RETURNING n"
    return _delete_vectors(connection, connection.execute(query, parameters))


def _delete_vectors(connection: sqlite3.Connection, deleted: Iterable[tuple[int]]) -> NDArray[np.int64]:
    gone = list(deleted)
    connection.executemany("DELETE FROM vectors WHERE n = ?", gone)
    return np.array(gone, dtype=np.int64).reshape(-1)


# ------------------------------------------------------------------------------------------ reading


def _where(condition: FilterCondition | None) -> tuple[str, dict[str, object]]:
    if condition is None:
        return "1", {}
    sql = Sql()
    # A damaged row may hold text that is no JSON, on which the JSON functions fail the whole query.
    return f"CASE WHEN json_valid(metadata) THEN {condition.sql(sql, 'metadata')} ELSE 0 END", sql.parameters


def numbers_where(
    connection: sqlite3.Connection, condition: FilterCondition, *, after: int
) -> NDArray[np.int64]:
    """The n's above `after` whose items match, ascending."""
    where, parameters = _where(condition)
    query = f"SELECT n FROM items WHERE n > :after AND {where} ORDER BY n"
    found = connection.execute(query, parameters | {"after": after}).fetchall()
    return np.array(found, dtype=np.int64).reshape(-1)


def rows_by_number(connection: sqlite3.Connection, numbers: Sequence[int]) -> Iterator[Stored]:
    """The rows with these n's, in no order."""
    query = f"{JOINED} WHERE items.n IN (SELECT value FROM json_each(?))"
    return (Stored(*row) for row in connection.execute(query, (json.dumps(numbers),)))


def rows_after(connection: sqlite3.Connection, n: int) -> Iterator[Stored]:
    """The rows above `n`, ascending."""
    return (Stored(*row) for row in connection.execute(f"{JOINED} WHERE items.n > ? ORDER BY items.n", (n,)))


def items_by_id(connection: sqlite3.Connection, ids: Sequence[str]) -> Iterator[Stored]:
    """The rows with these ids, in no order."""
    query = f"{JOINED} WHERE items.id IN (SELECT value FROM json_each(?))"
    return (Stored(*row) for row in connection.execute(query, (json.dumps(ids, ensure_ascii=False),)))


def items_after(
    connection: sqlite3.Connection, id: str, condition: FilterCondition | None, limit: int
) -> list[Stored]:
    """The first rows with an id greater than `id`, in order of id, which is the order of code points."""
    where, parameters = _where(condition)
    query = f"{JOINED} WHERE items.id > :after AND {where} ORDER BY items.id LIMIT :limit"
    found = connection.execute(query, parameters | {"after": id, "limit": limit})
    return [Stored(*row) for row in found]


def checksums(connection: sqlite3.Connection, upto: int) -> tuple[NDArray[np.int64], NDArray[np.uint32]]:
    """The n's up to `upto`, ascending, and their checksums."""
    query = "SELECT n, crc FROM items WHERE n <= ? ORDER BY n"
    found = np.array(connection.execute(query, (upto,)).fetchall(), np.int64).reshape(-1, 2)
    return found[:, 0].copy(), found[:, 1].astype(np.uint32)


def commits(connection: sqlite3.Connection) -> int:
    """The number of the commit that the connection sees."""
    return int(connection.execute("SELECT value FROM about WHERE key = 'commits'").fetchone()[0])


def last_number(connection: sqlite3.Connection) -> int:
    """The greatest n ever given to a row, 0 if none was."""
    (last,) = connection.execute("SELECT max(seq) FROM sqlite_sequence WHERE name = 'items'").fetchone()
    return int(last or 0)
