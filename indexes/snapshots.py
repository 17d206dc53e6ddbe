"""A copy of a whole store in a folder, of one form for every engine.

snapshot.json   format, dim, number of items, SHA-256 of the other file
items.sqlite    the tables of `indexes/database.py`, without a write-ahead log
"""

from __future__ import annotations

import json
import logging
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

from indexes.base import StoreCorrupt, StoreError
from indexes.database import Row, connect, rows_after, translated
from indexes.durable import fsync_file, fsync_folder, sha256_of, write_durably

__all__ = ["Snapshot", "write_snapshot"]

FORMAT = 1
PAGE = 4096

log = logging.getLogger(__name__)


def write_snapshot(path: Path, dim: int, copy: Callable[[Path], None]) -> None:
    """Makes the folder `path`; `copy` writes the database to the file it is given.

    The folder appears whole, by a rename. Raises StoreError if there is one, or if the disk is full.
    """
    if path.exists():
        raise StoreError(f"there is something at '{path}' already; name a new folder for the snapshot.")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid4().hex}.partial")
    partial.mkdir()
    try:
        database = partial / "items.sqlite"
        with translated():
            copy(database)
            connection = sqlite3.connect(database)
            (items,) = connection.execute("SELECT count(*) FROM items").fetchone()
            connection.close()
        fsync_file(database)
        about = {"format": FORMAT, "dim": dim, "items": items, "sha256": sha256_of(database)}
        write_durably(partial / "snapshot.json", [json.dumps(about, indent=1).encode()])
        partial.rename(path)
        fsync_folder(path.parent)
    except OSError as error:
        raise StoreError(f"the snapshot could not be written to '{path}': {error}.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class Snapshot:
    """A snapshot that was checked: raises StoreError if `path` is none or of another dimension, StoreCorrupt
    if its hash does not fit."""

    def __init__(self, path: Path, dim: int) -> None:
        self._database, self._dim = path / "items.sqlite", dim
        try:
            about = json.loads((path / "snapshot.json").read_bytes())
            kind, stored, sha256 = about["format"], about["dim"], about["sha256"]
            actual = sha256_of(self._database)
        except OSError as error:
            raise StoreError(
                f"'{path}' is no snapshot ({error.strerror}); name the folder of one."
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise StoreCorrupt(
                f"the snapshot in '{path}' is damaged: snapshot.json is unreadable."
            ) from error
        if kind != FORMAT:
            raise StoreError(f"the snapshot in '{path}' has format {kind}; this version reads {FORMAT}.")
        if stored != dim:
            raise StoreError(
                f"the snapshot in '{path}' holds vectors of {stored} numbers; this store holds {dim}. "
                "Restore it into a store of its own dimension."
            )
        if actual != sha256:
            raise StoreCorrupt(
                f"the snapshot in '{path}' is damaged: its hash does not fit. Use another one."
            )

    def pages(self) -> Iterator[list[Row]]:
        """The rows, some thousand at a time. A row that was damaged before is left out, with a warning."""
        connection = connect(self._database, self._dim, read_only=True)
        try:
            page: list[Row] = []
            for stored in rows_after(connection, 0):
                if stored.vector is None or not stored.sound:
                    log.warning("item '%s' is damaged in the snapshot and was left out", stored.id)
                    continue
                page.append(Row(stored.id, stored.vector, stored.raw_metadata.decode(), stored.crc))
                if len(page) == PAGE:
                    yield page
                    page = []
            if page:
                yield page
        finally:
            connection.close()
