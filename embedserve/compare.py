"""`embedserve compare`: where two encoders differ, measured by the neighbours that they give.

Vectors of two encoders cannot be compared, and may have different lengths; what each finds alike can.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from embedserve.config import Limits
from embedserve.encoder import Encoder
from embedserve.errors import BadRequest, EmbedServeError
from embedserve.folder import FileFound, Problem, walk

__all__ = ["Comparison", "Neighbour", "Query", "Side", "compare", "rank_correlation"]

Vectors = NDArray[np.float32]

LEAST = 3
"""Images that a comparison needs at least: one, and two to tell apart."""

READ_AT_ONCE = 64
"""Images that are decoded before they are embedded."""

ROWS_AT_ONCE = 256
"""Queries whose similarities to all images are in memory at the same time."""


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two encoders."""

    name: str
    folder: str
    dim: int
    precision: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Neighbour:
    image: str
    """The file's path below the folder."""
    score: float
    shared: bool
    """Whether the other encoder has it among its neighbours, too."""


@dataclass(frozen=True, slots=True)
class Query:
    """One image and what each encoder finds most like it, best first."""

    image: str
    overlap: float
    """Share of the neighbours that both have."""
    rank_correlation: float
    a: tuple[Neighbour, ...]
    b: tuple[Neighbour, ...]


@dataclass(frozen=True, slots=True)
class Comparison:
    """What `compare` found. Overlaps and correlations are means over all images as queries."""

    a: Side
    b: Side
    images: int
    k: int
    overlap: float
    """Share of the k nearest neighbours that both encoders give, 0..1."""
    first: float
    """How often both have the same nearest neighbour, 0..1."""
    rank_correlation: float
    """Spearman's, −1..1, of the similarities of a query to all other images; NaN when an encoder finds all of
    them equally alike."""
    mean_cosine: float | None
    """Of an image's two vectors; it says something about two versions of one encoder (fp32 and int8). None
    for different dimensions."""
    min_cosine: float | None
    queries: tuple[Query, ...]
    """Those that differ most, most different first."""
    problems: tuple[Problem, ...]
    """Files that could not be read."""


def compare(
    first: Encoder,
    second: Encoder,
    folder: Path,
    *,
    k: int = 10,
    most: int = 1000,
    show: int = 8,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Comparison:
    """Compares two encoders on the images below `folder`.

    Args:
        k: Neighbours of each image; fewer where there are fewer images.
        most: From more images, so many are drawn at random (with `seed`): time grows with their square.
        show: How many of the queries that differ most are kept.

    Raises:
        InvalidField: An encoder without image tower.
        BadRequest, NotFound: A folder that cannot be listed or holds fewer than three images.
    """
    for encoder in (first, second):
        encoder.require_images()
    found = walk(folder)
    chosen = _drawn(found.files, most, seed)
    names, vectors_a, vectors_b, problems = _embed(first, second, chosen, progress)
    if len(names) < LEAST:
        raise BadRequest(
            f"'{folder}' holds {len(names)} images that can be read; a comparison needs at least {LEAST}.",
            code="too_few_images",
        )
    k = min(k, len(names) - 1)
    near_a, near_b, correlations = _neighbours(vectors_a, vectors_b, k)
    shared = [np.isin(one, other) for one, other in zip(near_a, near_b, strict=True)]
    overlaps = np.array([row.mean() for row in shared])
    # The worst by overlap; among those alike by correlation, and then in id order.
    worst = np.lexsort((np.nan_to_num(correlations, nan=1.0), overlaps))[:show]

    def listed(
        vectors: Vectors, row: int, near: NDArray[np.intp], others: NDArray[np.intp]
    ) -> tuple[Neighbour, ...]:
        scores = vectors[near] @ vectors[row]
        return tuple(
            Neighbour(names[index], round(float(score), 6), bool(index in others))
            for index, score in zip(near, scores, strict=True)
        )

    cosines = (vectors_a * vectors_b).sum(axis=1) if first.dim == second.dim else None
    return Comparison(
        a=_side(first),
        b=_side(second),
        images=len(names),
        k=k,
        overlap=float(overlaps.mean()),
        first=float((near_a[:, 0] == near_b[:, 0]).mean()),
        rank_correlation=float(correlations.mean()),
        mean_cosine=None if cosines is None else float(cosines.mean()),
        min_cosine=None if cosines is None else float(cosines.min()),
        queries=tuple(
            Query(
                names[row],
                float(overlaps[row]),
                float(correlations[row]),
                listed(vectors_a, row, near_a[row], near_b[row]),
                listed(vectors_b, row, near_b[row], near_a[row]),
            )
            for row in worst
        ),
        problems=tuple(sorted([*found.problems, *problems], key=lambda problem: problem.path)),
    )


def rank_correlation(first: NDArray[np.floating], second: NDArray[np.floating]) -> float:
    """Spearman's rank correlation of two rows of numbers; equal numbers share their mean rank. NaN where all
    numbers of a row are equal."""
    ranks = [_ranks(np.round(row, 6)) for row in (first, second)]
    centred = [rank - rank.mean() for rank in ranks]
    scale = float(np.sqrt((centred[0] ** 2).sum() * (centred[1] ** 2).sum()))
    return float(centred[0] @ centred[1]) / scale if scale else float("nan")


def _ranks(row: NDArray[np.floating]) -> NDArray[np.float64]:
    _, group, counts = np.unique(row, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks: NDArray[np.float64] = (ends - (counts - 1) / 2)[group]
    return ranks


def _drawn(files: Sequence[FileFound], most: int, seed: int) -> list[FileFound]:
    if len(files) <= most:
        return list(files)
    rows = np.random.default_rng(seed).choice(len(files), most, replace=False)
    return [files[row] for row in sorted(rows)]


def _embed(
    first: Encoder,
    second: Encoder,
    files: Sequence[FileFound],
    progress: Callable[[int, int], None],
) -> tuple[list[str], Vectors, Vectors, list[Problem]]:
    """Names and both encoders' vectors of the files that can be read, and what is wrong with the others."""
    names: list[str] = []
    rows: tuple[list[Vectors], list[Vectors]] = ([], [])
    problems: list[Problem] = []
    with ThreadPoolExecutor(first.threads) as pool:
        for start in range(0, len(files), READ_AT_ONCE):
            some = files[start : start + READ_AT_ONCE]
            read = list(pool.map(lambda file: _read(first, second, file), some))
            good = [one for one in read if not isinstance(one, Problem)]
            problems += [one for one in read if isinstance(one, Problem)]
            names += [name for name, _, _ in good]
            rows[0].append(first.embed_images([pixels for _, pixels, _ in good]))
            rows[1].append(second.embed_images([pixels for _, _, pixels in good]))
            progress(min(start + READ_AT_ONCE, len(files)), len(files))
    empty = [np.zeros((0, encoder.dim), np.float32) for encoder in (first, second)]
    return names, np.concatenate([empty[0], *rows[0]]), np.concatenate([empty[1], *rows[1]]), problems


def _read(
    first: Encoder, second: Encoder, file: FileFound
) -> tuple[str, NDArray[np.uint8], NDArray[np.uint8]] | Problem:
    try:
        data = file.path.read_bytes()
        limits = Limits()
        return file.id, first.read_image(data, limits), second.read_image(data, limits)
    except OSError as error:
        return Problem(file.id, f"cannot be read: {error.strerror}")
    except EmbedServeError as error:
        return Problem(file.id, str(error))


def _neighbours(
    first: Vectors, second: Vectors, k: int
) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float64]]:
    """The k nearest of each row among the others, [n, k], by each encoder; the orders' correlation [n]."""
    count = len(first)
    near: tuple[list[NDArray[np.intp]], list[NDArray[np.intp]]] = ([], [])
    correlations = np.empty(count)
    for start in range(0, count, ROWS_AT_ONCE):
        rows = range(start, min(start + ROWS_AT_ONCE, count))
        blocks = [vectors[rows.start : rows.stop] @ vectors.T for vectors in (first, second)]
        for row in rows:
            others = np.delete(np.arange(count), row)
            similar = [block[row - start][others] for block in blocks]
            for found, one in zip(near, similar, strict=True):
                # Scores equal to six digits come in file order, as in a search.
                found.append(others[np.argsort(-np.round(one, 6), kind="stable")[:k]])
            correlations[row] = rank_correlation(*similar)
    return np.stack(near[0]), np.stack(near[1]), correlations


def _side(encoder: Encoder) -> Side:
    bundle = encoder.bundle
    return Side(
        encoder.name, str(bundle.folder), encoder.dim, bundle.description.precision, bundle.fingerprint
    )


def lines(found: Comparison) -> Iterable[str]:
    """The comparison as a table for a terminal."""
    for letter, side in (("A", found.a), ("B", found.b)):
        yield f"{letter}  {side.name}: {side.dim} numbers, {side.precision}, from '{side.folder}'"
    yield f"{found.images} images"
    yield f"  overlap of the {found.k} nearest      {found.overlap:7.1%}"
    yield f"  same nearest                 {found.first:7.1%}"
    yield f"  rank correlation             {found.rank_correlation:7.3f}"
    if found.mean_cosine is not None:
        yield f"  cosine of the two vectors    {found.mean_cosine:7.4f} (least {found.min_cosine:.4f})"
    different = [query for query in found.queries if query.overlap < 1]
    if different:
        yield "most different"
    for query in different:
        yield f"  {query.overlap:4.0%}  {query.rank_correlation:6.3f}  {query.image}"
        for letter, near in (("A", query.a), ("B", query.b)):
            own = [f"{one.image} ({one.score:.3f})" for one in near if not one.shared][:3]
            yield f"       only {letter}: {', '.join(own) or '-'}"
