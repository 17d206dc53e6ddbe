"""What a vector store is: vectors, ids and metadata, searched by inner product.

A store knows no image, no model and no HTTP. Vectors are unit length, so the inner product is the cosine
similarity and higher is always better. Every engine passes the same conformance suite
(`tests/indexes/conformance.py`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Filter",
    "Hits",
    "InvalidFilter",
    "InvalidId",
    "InvalidMetadata",
    "InvalidQuery",
    "InvalidVector",
    "Item",
    "Metadata",
    "StoreCorrupt",
    "StoreError",
    "StoreLocked",
    "VectorStore",
    "Vectors",
    "check_ids",
    "check_metadata",
    "check_query",
    "check_vectors",
]

Vectors = NDArray[np.float32]
"""float32, shape (n, dim), rows of unit length."""

Metadata = Mapping[str, Any]
"""A JSON object: strings, numbers, booleans, null, and lists or objects of them."""

Filter = Mapping[str, Any]
"""A filter as JSON; the language is in `indexes/filters.py`."""

MAX_ID_BYTES = 1024
MAX_METADATA_BYTES = 1024 * 1024
MAX_METADATA_DEPTH = 32


class StoreError(Exception):
    """Base of the store's errors.

    StoreError
    ├── InvalidId        empty, too long, or holding a NUL or a lone surrogate
    ├── InvalidVector    wrong dimension, NaN, infinite, all zeros
    ├── InvalidMetadata  not a JSON object, or one that is too large
    ├── InvalidFilter    not the filter language
    ├── InvalidQuery     k, limit or min_score out of range, or arguments that exclude each other
    ├── StoreLocked      another process has it open
    └── StoreCorrupt     the truth itself is damaged (a damaged cache is rebuilt silently)
    """


class InvalidId(StoreError): ...


class InvalidVector(StoreError): ...


class InvalidMetadata(StoreError): ...


class InvalidFilter(StoreError): ...


class InvalidQuery(StoreError): ...


class StoreLocked(StoreError): ...


class StoreCorrupt(StoreError): ...


@dataclass(frozen=True, slots=True)
class Hits:
    """The answer to one query, best first. `scores[i]` is the cosine similarity of `ids[i]`."""

    ids: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    metadata: tuple[Metadata, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class Item:
    """One stored item. `vector` is float32, shape (dim,)."""

    id: str
    vector: NDArray[np.float32] = field(repr=False)
    metadata: Metadata


class VectorStore(Protocol):
    """The few verbs of a store. Engines may be called from several threads at once.

    Every call that writes returns only after the write is durable: a crash right after loses nothing.
    A search that begins after a write returned sees it. After `close` every verb raises StoreError.

    A damaged item (its checksum does not match) is never returned: `search`, `scan`, `count` and iteration
    leave it out, `get` raises StoreCorrupt and names it, `stats` counts it under `damaged`.
    """

    dim: int

    def upsert(
        self, ids: Sequence[str], vectors: Vectors, metadata: Sequence[Metadata] | None = None
    ) -> None:
        """Writes all items or none. A known id is replaced; of an id given twice the last wins.

        Vectors are stored as float16 and compared as such. Raises InvalidId, InvalidVector, InvalidMetadata.
        """
        ...

    def get(self, ids: Sequence[str]) -> dict[str, Item]:
        """The items that exist, by id; unknown ids are left out. Raises InvalidId, StoreCorrupt."""
        ...

    def delete(self, ids: Sequence[str] | None = None, *, filter: Filter | None = None) -> int:
        """Deletes by ids or by filter (exactly one of them) and returns how many items went.

        Unknown ids are no error. Raises InvalidId, InvalidFilter, InvalidQuery.
        """
        ...

    def count(self, filter: Filter | None = None) -> int:
        """How many items there are, or how many match."""
        ...

    def search(
        self, vectors: Vectors, k: int, *, filter: Filter | None = None, min_score: float | None = None
    ) -> list[Hits]:
        """The `k` most similar items for each row of `vectors`; fewer only when fewer match.

        `vectors` is (q, dim) of any length but zero, scaled to unit length here. Scores lie in -1..1; hits
        below `min_score` are left out. Raises InvalidVector, InvalidFilter, InvalidQuery.
        """
        ...

    def scan(
        self, *, after: str | None = None, limit: int = 100, filter: Filter | None = None
    ) -> Sequence[Item]:
        """Items in id order (by Unicode code point), those with an id greater than `after`."""
        ...

    def __iter__(self) -> Iterator[Item]:
        """All items, in id order, read in pages; items written meanwhile may or may not appear."""
        ...

    def snapshot(self, path: Path) -> None:
        """A consistent copy into the new folder `path`, while reads and writes go on.

        The format is the same for every engine (`indexes/snapshots.py`). Raises StoreError if `path` exists.
        """
        ...

    def restore(self, path: Path) -> None:
        """Replaces everything by what any engine's `snapshot` wrote to `path`, in one step or not at all.

        Raises StoreError for another dimension or format, StoreCorrupt for a damaged snapshot.
        """
        ...

    def stats(self) -> dict[str, Any]:
        """Counts, bytes, index type and its measured recall, for people and for /metrics."""
        ...

    def close(self) -> None:
        """Finishes writes and releases files. Closing twice is harmless."""
        ...


def check_ids(ids: Sequence[str]) -> None:
    """Raises InvalidId for an id that no engine could keep. Slashes, spaces and any script are fine."""
    if isinstance(ids, str):
        raise InvalidId(f"ids are one string, {ids[:40]!r}; give a list of ids.")
    for position, name in enumerate(ids):
        if not isinstance(name, str) or not name:
            raise InvalidId(f"id {position} is {name!r}; an id is a string of 1 to {MAX_ID_BYTES} bytes.")
        if "\x00" in name:
            raise InvalidId(f"id {name[:40]!r} holds a NUL character; remove it.")
        try:
            size = len(name.encode())
        except UnicodeEncodeError:
            raise InvalidId(
                f"id {name[:40]!r} is not valid Unicode (a lone surrogate); fix its encoding."
            ) from None
        if size > MAX_ID_BYTES:
            raise InvalidId(
                f"id '{name[:40]}…' is {size} bytes; allowed are {MAX_ID_BYTES}. Use a shorter id."
            )


def check_vectors(vectors: object, dim: int, *, rows: int | None = None) -> Vectors:
    """`vectors` as float32 (n, dim) with rows scaled to unit length, or InvalidVector."""
    try:
        with np.errstate(over="ignore"):  # what overflows float32 becomes infinite and is refused below
            array = np.asarray(vectors, dtype=np.float32)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidVector(f"vectors are not numbers of equal length: {error}.") from None
    if not array.size and array.ndim < 3 and not rows:
        return np.empty((0, dim), np.float32)
    if array.ndim != 2 or array.shape[1] != dim:
        raise InvalidVector(f"vectors have shape {array.shape}; this store holds rows of {dim} numbers.")
    if rows is not None and len(array) != rows:
        raise InvalidVector(f"{len(array)} vectors for {rows} ids; give one vector for each id.")
    bad = ~np.isfinite(array).all(axis=1)
    if bad.any():
        raise InvalidVector(
            f"vector {int(bad.argmax())} holds NaN or an infinity; every number must be finite."
        )
    norms = np.linalg.norm(array.astype(np.float64), axis=1, keepdims=True)
    if (norms < 1e-12).any():
        raise InvalidVector(
            f"vector {int((norms < 1e-12).argmax())} is all zeros or nearly; it has no direction to compare."
        )
    return np.asarray(array / norms, dtype=np.float32)


def check_metadata(metadata: Sequence[Metadata] | None, rows: int) -> list[str]:
    """Each item's metadata as JSON text, or InvalidMetadata. None stands for an empty object each.

    Strings hold no NUL and no lone surrogate and integers fit into 64 bits, so that every engine can keep
    and compare them.
    """
    if metadata is None:
        return ["{}"] * rows
    if len(metadata) != rows:
        raise InvalidMetadata(f"{len(metadata)} metadata objects for {rows} ids; give one for each id.")
    texts = []
    for position, each in enumerate(metadata):
        if not isinstance(each, Mapping):
            raise InvalidMetadata(
                f"metadata {position} is {type(each).__name__}; it must be a JSON object (a mapping)."
            )
        text = _to_json(_plain(each, (position,)))
        try:
            size = len(text.encode())
        except UnicodeEncodeError:
            raise InvalidMetadata(
                f"metadata {position} holds invalid Unicode (a lone surrogate); fix its encoding."
            ) from None
        if size > MAX_METADATA_BYTES:
            raise InvalidMetadata(
                f"metadata {position} is {size} bytes of JSON; allowed are {MAX_METADATA_BYTES}. Shorten it."
            )
        texts.append(text)
    return texts


_to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def _plain(value: Any, path: tuple[object, ...]) -> Any:
    """`value` with only JSON's own types, or InvalidMetadata that names the place."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        if "\x00" in value:
            raise InvalidMetadata(f"{_place(path)} holds a NUL character; remove it.")
        return value
    if isinstance(value, int):
        if not -(2**63) <= value < 2**63:
            raise InvalidMetadata(
                f"{_place(path)} is {value}; integers must fit into 64 bits. Send it as a string."
            )
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise InvalidMetadata(
                f"{_place(path)} is {value}; JSON knows no NaN or infinity. Use null or leave it out."
            )
        return float(value)
    if len(path) > MAX_METADATA_DEPTH:
        raise InvalidMetadata(
            f"metadata {path[0]} is nested deeper than {MAX_METADATA_DEPTH} levels; flatten it."
        )
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str) or "\x00" in key:
                raise InvalidMetadata(f"{_place(path)} has the key {key!r}; keys are strings without NUL.")
        return {key: _plain(each, (*path, key)) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each, (*path, at)) for at, each in enumerate(value)]
    raise InvalidMetadata(
        f"{_place(path)} is a {type(value).__name__}; use strings, numbers, booleans, null, lists or objects."
    )


def _place(path: tuple[object, ...]) -> str:
    field = ".".join(map(str, path[1:]))
    return f"metadata {path[0]}" + (f", field '{field}'" if field else "")


def check_query(*, k: object = 1, limit: object = 1, min_score: object = None) -> None:
    """Raises InvalidQuery for numbers that no search or scan can use."""
    for name, value in (("k", k), ("limit", limit)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
            raise InvalidQuery(f"{name} is {value!r}; it must be a whole number of at least 1.")
    if min_score is not None and (
        isinstance(min_score, bool)
        or not isinstance(min_score, int | float | np.floating)
        or math.isnan(min_score)
    ):
        raise InvalidQuery(f"min_score is {min_score!r}; it must be a number, usually in -1..1, or null.")
