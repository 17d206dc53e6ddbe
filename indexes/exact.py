"""The slow, literal engine: every item in a dict, every score in float64.

It is the oracle that the other engines are tested against, and `memory:` for tries that nothing should
outlive.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
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
    StoreError,
    Vectors,
    check_ids,
    check_metadata,
    check_query,
    check_vectors,
)
from indexes.filters import parse_filter
from indexes.snapshots import Snapshot, write_snapshot

__all__ = ["ExactStore"]


@dataclass(frozen=True, slots=True)
class _Kept:
    vector: NDArray[np.float16]
    metadata: str  # JSON text, so that no caller can change what is kept


class ExactStore:
    """A VectorStore in memory. Nothing is durable but what `snapshot` writes."""

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self._items: dict[str, _Kept] = {}  # in order of writing
        self._lock = RLock()
        self._closed = False

    def upsert(
        self, ids: Sequence[str], vectors: Vectors, metadata: Sequence[Metadata] | None = None
    ) -> None:
        check_ids(ids)
        texts = check_metadata(metadata, len(ids))
        halves = check_vectors(vectors, self.dim, rows=len(ids)).astype(np.float16)
        with self._open():
            for name, half, text in zip(ids, halves, texts, strict=True):
                self._items.pop(name, None)
                self._items[name] = _Kept(half.copy(), text)

    def get(self, ids: Sequence[str]) -> dict[str, Item]:
        check_ids(ids)
        with self._open():
            return {name: _item(name, self._items[name]) for name in ids if name in self._items}

    def delete(self, ids: Sequence[str] | None = None, *, filter: Filter | None = None) -> int:
        if (ids is None) == (filter is None):
            raise InvalidQuery("delete takes either ids or a filter; give exactly one of them.")
        check_ids(ids or [])
        with self._open():
            gone = self._matching(filter) if ids is None else set(ids) & self._items.keys()
            for name in gone:
                del self._items[name]
            return len(gone)

    def count(self, filter: Filter | None = None) -> int:
        with self._open():
            return len(self._matching(filter))

    def search(
        self, vectors: Vectors, k: int, *, filter: Filter | None = None, min_score: float | None = None
    ) -> list[Hits]:
        check_query(k=k, min_score=min_score)
        queries = check_vectors(vectors, self.dim).astype(np.float64)
        with self._open():
            items = [(name, self._items[name]) for name in self._matching(filter)]
        matrix = np.array([kept.vector for _, kept in items], np.float64).reshape(len(items), self.dim)
        all_scores = np.clip(queries @ matrix.T, -1, 1)
        floor = -np.inf if min_score is None else min_score
        answers = []
        for scores in all_scores:
            best = [at for at in np.argsort(-scores, kind="stable")[:k].tolist() if scores[at] >= floor]
            answers.append(
                Hits(
                    ids=tuple(items[at][0] for at in best),
                    scores=tuple(float(scores[at]) for at in best),
                    metadata=tuple(json.loads(items[at][1].metadata) for at in best),
                )
            )
        return answers

    def scan(
        self, *, after: str | None = None, limit: int = 100, filter: Filter | None = None
    ) -> Sequence[Item]:
        check_query(limit=limit)
        check_ids([after] if after else [])
        with self._open():
            ids = sorted(name for name in self._matching(filter) if name > (after or ""))[:limit]
            return [_item(name, self._items[name]) for name in ids]

    def __iter__(self) -> Iterator[Item]:
        after = None
        while page := self.scan(after=after, limit=1000):
            yield from page
            after = page[-1].id

    def snapshot(self, path: Path) -> None:
        with self._open():
            items = dict(self._items)

        def copy(file: Path) -> None:
            connection = database.connect(file, self.dim)
            vectors = np.array([kept.vector for kept in items.values()], np.float32).reshape(-1, self.dim)
            connection.execute("BEGIN")
            texts = [kept.metadata for kept in items.values()]
            database.insert(connection, database.prepare(list(items), vectors, texts))
            connection.execute("COMMIT")
            connection.close()

        write_snapshot(Path(path), self.dim, copy)

    def restore(self, path: Path) -> None:
        rows = [row for page in Snapshot(Path(path), self.dim).pages() for row in page]
        with self._open():
            self._items = {row.id: _Kept(np.frombuffer(row.vector, np.float16), row.metadata) for row in rows}

    def stats(self) -> dict[str, Any]:
        with self._open():
            size = sum(kept.vector.nbytes + len(kept.metadata) for kept in self._items.values())
            return {
                "engine": "memory",
                "items": len(self._items),
                "damaged": 0,
                "dim": self.dim,
                "bytes": size,
                "index": {"type": "flat, float64 over float16", "recall": 1.0},
            }

    def close(self) -> None:
        self._closed = True

    def _open(self) -> RLock:
        if self._closed:
            raise StoreError("the store is closed; open it again.")
        return self._lock

    def _matching(self, filter: Filter | None) -> list[str]:
        if filter is None:
            return list(self._items)
        condition = parse_filter(filter)
        return [name for name, kept in self._items.items() if condition.matches(json.loads(kept.metadata))]


def _item(id: str, kept: _Kept) -> Item:
    return Item(id, kept.vector.astype(np.float32), json.loads(kept.metadata))
