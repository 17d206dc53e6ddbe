"""A search: `embed` makes vectors of what was asked, `find` ranks what the store has."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Container, Mapping, Sequence, Set
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from embedserve.errors import EmbedServeError, InvalidField
from embedserve.intake import check_one_of, check_vector
from embedserve.items import Hit, Part, hit_of
from embedserve.ranking import best_per_group, field_value, group_key, mmr
from embedserve.shelf import unknown_item
from embedserve.short_towers import Embeds
from indexes.base import Hits, VectorStore

__all__ = ["each_or_all", "embed", "find", "ranked"]

T = TypeVar("T")
Vector = NDArray[np.float32]
Lookup = Callable[[Sequence[str]], Awaitable[Mapping[str, Vector]]]
"""ids → the vectors of those that exist."""

MIN_POOL = 50
"""Candidates that diversity and grouping choose from, at least; else five for each hit."""
GROWTH = 4
"""How many times more candidates are looked at when those so far held too few groups."""


async def embed(parts: Sequence[Part], towers: Embeds, lookup: Lookup) -> list[Vector | EmbedServeError]:
    """The unit vector of each part, float32 (dim,), or what is wrong with it; `param` is its field.

    Raises Busy when a tower's queue is full.
    """
    answers: list[Vector | EmbedServeError | None] = [None] * len(parts)
    where: dict[str, list[int]] = {"image": [], "text": [], "id": []}
    for position, part in enumerate(parts):
        try:
            given = {"image": part.image, "text": part.text, "id": part.id, "vector": part.vector}
            kind = check_one_of(given, "This part of the query" if len(parts) > 1 else "The query")
            if kind == "text" and not (part.text or "").strip():
                raise InvalidField("The text is empty; give at least one word.", param="text")
            if kind == "vector":
                answers[position] = check_vector(part.vector, towers.dim)
            else:
                where[kind].append(position)
        except InvalidField as error:
            answers[position] = error

    def fill(kind: str, results: Sequence[Vector | EmbedServeError]) -> None:
        for position, result in zip(where[kind], results, strict=True):
            answers[position] = result.at(kind) if isinstance(result, EmbedServeError) else result

    async def images() -> None:
        encoded = [parts[i].image or b"" for i in where["image"]]
        fill("image", await each_or_all(towers.images(encoded), len(encoded)))

    async def texts() -> None:
        words = [parts[i].text or "" for i in where["text"]]
        fill("text", await each_or_all(towers.texts(words), len(words)))

    async def ids() -> None:
        known = await lookup([parts[i].id or "" for i in where["id"]])
        fill("id", [known.get(parts[i].id or "", unknown_item(parts[i].id or "")) for i in where["id"]])

    steps = {"image": images, "text": texts, "id": ids}
    await asyncio.gather(*(steps[kind]() for kind, positions in where.items() if positions))
    return [answer for answer in answers if answer is not None]


async def each_or_all(
    results: Awaitable[list[T | EmbedServeError]], number: int
) -> list[T | EmbedServeError]:
    """The tower's results; where the encoder lacks the tower, that is the error of each input."""
    try:
        return await results
    except InvalidField as error:
        return [error] * number


def ranked(hits: Hits, excluded: Container[str] = ()) -> list[tuple[str, float, Mapping[str, Any]]]:
    """(id, score, metadata), best first; scores equal to six digits come in id order, whatever the engine."""
    rows = [
        (name, min(1.0, max(-1.0, score)), metadata)
        for name, score, metadata in zip(hits.ids, hits.scores, hits.metadata, strict=True)
        if name not in excluded
    ]
    return sorted(rows, key=lambda row: (-round(row[1], 6), row[0]))


def find(
    store: VectorStore,
    vector: Vector,
    k: int,
    *,
    filter: Mapping[str, Any] | None,
    min_score: float | None,
    diversity: float,
    group_by: str | None,
    excluded: Set[str],
    vectors: bool,
) -> list[Hit]:
    """One query against the store; blocks. The arguments are those of `Collection.search`, checked."""
    choose = diversity > 0 or group_by is not None
    pool = (max(5 * k, MIN_POOL) if choose else k) + len(excluded)
    while True:
        (hits,) = store.search(vector[None], pool, filter=filter, min_score=min_score)
        rows = ranked(hits, excluded)
        if group_by is not None:
            keys = (group_key(field_value(metadata, group_by)) for _, _, metadata in rows)
            rows = [rows[position] for position in best_per_group(keys)]
        if len(rows) >= k or len(hits) < pool:
            break
        pool *= GROWTH
    known: dict[str, Vector] = {}
    if diversity > 0:
        rows = rows[: max(5 * k, MIN_POOL)]
        known = {name: item.vector for name, item in store.get([row[0] for row in rows]).items()}
        rows = [row for row in rows if row[0] in known]  # one may have been deleted since the search
        stacked = (
            np.stack([known[row[0]] for row in rows]) if rows else np.empty((0, len(vector)), np.float32)
        )
        rows = [rows[i] for i in mmr([row[1] for row in rows], stacked, k, diversity)]
    rows = rows[:k]
    if vectors and not known:
        known = {name: item.vector for name, item in store.get([row[0] for row in rows]).items()}
    return [hit_of(*row, known.get(row[0]) if vectors else None) for row in rows]
