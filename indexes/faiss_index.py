"""Exact search over float16 vectors with FAISS, while vectors come and go.

The vectors lie in segments that never change once made, and in a short tail of the newest. A `View` is one
consistent state of them all; a write makes a new View beside the old and swaps it in, so a search works
undisturbed on the View it began with, and nothing is locked.

    segment   up to 32,768 rows in a FAISS scalar quantizer (float16, inner product), ascending n
    tail      up to `tail_rows` rows as float32, scored with NumPy; when full it becomes a segment
    alive     which rows of a segment are not deleted; copied when it changes (32 kB at most)

Segments of like size are merged, and one that is a quarter dead is copied without its dead. So a delete moves
no vectors, and each vector is copied about log₂(32768 / tail_rows) times in all. (The log-structured merge
tree, O'Neil et al. 1996, over FAISS indexes.)
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from indexes.base import Vectors

__all__ = ["Batch", "FlatIndex", "Part", "Segment", "View"]

Numbers = NDArray[np.int64]
Positions = NDArray[np.intp]
Mask = NDArray[np.bool_]
Found = tuple[NDArray[np.float32], Numbers]
"""Scores (q, k) and n's (q, k), unordered; n is -1 where there was nothing more to find."""

SEGMENT_ROWS = 32_768
DEAD_SHARE = 0.25
SELECTIVE_SHARE = 0.1
QUERIES_AT_ONCE = 256
_serials = count()
_faiss: Any = faiss  # its type stubs describe C++, not the Python wrappers around it


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows to add: n ascending (m,), checksums uint32 (m,), vectors float16 (m, dim)."""

    ns: Numbers
    crcs: NDArray[np.uint32]
    vectors: NDArray[np.float16]

    @classmethod
    def joined(cls, batches: Sequence[Batch], dim: int) -> Batch:
        """All in one; of none, an empty one."""
        if len(batches) == 1:
            return batches[0]
        return cls(
            np.concatenate([np.empty(0, np.int64), *(batch.ns for batch in batches)]),
            np.concatenate([np.empty(0, np.uint32), *(batch.crcs for batch in batches)]),
            np.concatenate([np.empty((0, dim), np.float16), *(batch.vectors for batch in batches)]),
        )

    def __len__(self) -> int:
        return len(self.ns)

    def __getitem__(self, rows: slice | Mask) -> Batch:
        return Batch(self.ns[rows], self.crcs[rows], self.vectors[rows])


class Segment:
    """Rows that never change, searched by FAISS."""

    def __init__(self, ns: Numbers, crcs: NDArray[np.uint32], index: faiss.IndexScalarQuantizer) -> None:
        self.ns, self.crcs, self.index, self.dim = ns, crcs, index, int(index.d)

    @classmethod
    def of(cls, batch: Batch) -> Segment:
        return cls(batch.ns.copy(), batch.crcs.copy(), _quantizer(batch.vectors))

    def rows(self, at: Positions, out: NDArray[np.float16]) -> None:
        """Copies the vectors at these positions into `out`, (m, dim)."""
        size = self.index.ntotal * self.index.code_size
        codes = faiss.rev_swig_ptr(self.index.codes.data(), size)  # a view of FAISS's memory
        table = codes.view(np.float16).reshape(self.index.ntotal, self.dim)
        np.take(table, at, axis=0, out=out, mode="clip")  # "clip" spares a buffer; positions are in range

    def search(self, queries: Vectors, k: int, allowed: Mask | None) -> Found:
        parameters = None
        if allowed is not None:
            bits = np.packbits(allowed, bitorder="little")
            parameters = _faiss.SearchParameters(sel=_faiss.IDSelectorBitmap(bits))
        scores, positions = self.index.search(queries, min(k, len(self.ns)), params=parameters)
        return scores, np.where(positions >= 0, self.ns[positions], -1)


class Tail:
    """The newest rows. Rows are only ever appended, behind the end of every View that holds the tail."""

    def __init__(self, rows: int, dim: int) -> None:
        self.ns = np.empty(rows, np.int64)
        self.crcs = np.empty(rows, np.uint32)
        self.vectors = np.empty((rows, dim), np.float32)
        self.halves = np.empty((rows, dim), np.float16)  # the same, as segments want them
        self.used = 0

    def append(self, batch: Batch) -> None:
        rows = slice(self.used, self.used + len(batch))
        self.ns[rows], self.crcs[rows] = batch.ns, batch.crcs
        self.halves[rows] = self.vectors[rows] = batch.vectors
        self.used += len(batch)

    def upto(self, used: int) -> TailRows:
        return TailRows(self.ns[:used], self.crcs[:used], self.vectors[:used], self.halves[:used])


@dataclass(frozen=True, slots=True)
class TailRows:
    """The tail as a View sees it; the same verbs as a Segment."""

    ns: Numbers
    crcs: NDArray[np.uint32]
    vectors: Vectors
    halves: NDArray[np.float16]

    @property
    def dim(self) -> int:
        return int(self.vectors.shape[1])

    def rows(self, at: Positions, out: NDArray[np.float16]) -> None:
        np.take(self.halves, at, axis=0, out=out, mode="clip")

    def search(self, queries: Vectors, k: int, allowed: Mask | None) -> Found:
        scores = queries @ self.vectors.T
        ns = self.ns
        if allowed is not None:
            scores, ns = scores[:, allowed], ns[allowed]
        if scores.shape[1] > k:
            best = np.argpartition(scores, -k, axis=1)[:, -k:]
            top = np.take_along_axis(scores, best, axis=1)
            # Many copies of one vector: take the oldest, not whichever the partition left in reach.
            for row in np.flatnonzero(np.count_nonzero(scores >= top.min(axis=1, keepdims=True), axis=1) > k):
                best[row] = np.argsort(-scores[row], kind="stable")[:k]
                top[row] = scores[row, best[row]]
            return top, ns[best]
        return scores, np.broadcast_to(ns, scores.shape)


@dataclass(frozen=True, slots=True)
class Part:
    """A segment, or the tail, with its deletions. `alive` None means that all rows are."""

    data: Segment | TailRows
    alive: Mask | None
    live: int

    def without(self, removed: Numbers) -> Part:
        """The part less these n's, of which it need not hold any."""
        positions = self.find(removed)
        if not len(positions):
            return self
        alive = np.ones(len(self.data.ns), bool) if self.alive is None else self.alive.copy()
        alive[positions] = False
        return replace(self, alive=alive, live=int(np.count_nonzero(alive)))

    def find(self, ns: Numbers) -> Positions:
        """Where the live ones of the ascending `ns` lie, ascending."""
        own = self.data.ns
        if not len(own) or not len(ns):
            return np.empty(0, np.intp)
        ns = ns[np.searchsorted(ns, own[0]) : np.searchsorted(ns, own[-1], side="right")]
        positions: Positions = np.searchsorted(own, ns)
        positions = positions[own[positions] == ns]
        return positions if self.alive is None else positions[self.alive[positions]]

    def batch(self) -> Batch:
        """A copy of the live rows."""
        at = np.arange(len(self.data.ns)) if self.alive is None else np.flatnonzero(self.alive)
        vectors = np.empty((len(at), self.data.dim), np.float16)
        self.data.rows(at, vectors)
        return Batch(self.data.ns[at], self.data.crcs[at], vectors)


@dataclass(frozen=True, slots=True)
class View:
    """One state of the index: what commit `number` left behind. Parts hold ascending ranges of n; the last
    one is the tail."""

    number: int
    parts: tuple[Part, ...]
    threads: ThreadPoolExecutor
    serial: int = field(default_factory=_serials.__next__)
    """Tells Views apart, in all indexes of the process."""

    @property
    def live(self) -> int:
        return sum(part.live for part in self.parts)

    @property
    def last(self) -> int:
        """The greatest n of all rows, 0 if there is none."""
        return max((int(part.data.ns[-1]) for part in self.parts if len(part.data.ns)), default=0)

    def locate(self, ns: Numbers) -> list[Positions]:
        """For each part where the live ones of the ascending `ns` lie."""
        return [part.find(ns) for part in self.parts]

    def search(self, queries: Vectors, k: int, located: Sequence[Positions] | None = None) -> Found:
        """The k best of the located rows, or of all, for each query: best first, then older first. Which of
        equals at the k-th place are left out is not defined.

        `queries` is float32 (q, dim) of unit length. Scores are clipped to -1..1: float16 rows are of unit
        length only within .001.
        """
        if located is None:
            work: list[tuple[Segment | TailRows, Mask | None]] = [
                (part.data, part.alive) for part in self.parts if part.live
            ]
        elif sum(map(len, located)) <= SELECTIVE_SHARE * self.live:
            # Few rows pass: gather them, and search nothing else.
            work = [(_gathered(self.parts, located), None)] if any(map(len, located)) else []
        else:
            work = []
            for part, at in zip(self.parts, located, strict=True):
                allowed = np.zeros(len(part.data.ns), bool)
                allowed[at] = True
                if len(at):
                    work.append((part.data, allowed))
        found = [
            self._search(queries[start : start + QUERIES_AT_ONCE], k, work)
            for start in range(0, len(queries), QUERIES_AT_ONCE)
        ]
        scores, ns_found = (np.concatenate(each) for each in zip(*found, strict=True))
        return np.clip(scores, -1, 1), ns_found

    def _search(
        self, queries: Vectors, k: int, work: Sequence[tuple[Segment | TailRows, Mask | None]]
    ) -> Found:
        def one(each: tuple[Segment | TailRows, Mask | None]) -> Found:
            return each[0].search(queries, k, each[1])

        # FAISS spreads many queries over the cores by itself, but not one query: for that, part by part.
        alone = len(queries) > 1 or len(work) < 2
        found = [one(each) for each in work] if alone else list(self.threads.map(one, work))
        scores = np.concatenate(
            [np.empty((len(queries), 0), np.float32), *(each[0] for each in found)], axis=1
        )
        ns = np.concatenate([np.empty((len(queries), 0), np.int64), *(each[1] for each in found)], axis=1)
        scores = np.where(ns < 0, -np.inf, scores)
        order = np.lexsort((ns, -scores), axis=1)[:, :k]
        return np.take_along_axis(scores, order, axis=1), np.take_along_axis(ns, order, axis=1)


class FlatIndex:
    """The index. One thread writes at a time; any number search through `view`."""

    def __init__(
        self, dim: int, threads: ThreadPoolExecutor, *, tail_rows: int, parts: Sequence[Part] = ()
    ) -> None:
        """Starts empty, or with `parts` of segments in ascending order of n. `tail_rows` is a small number
        of rows such as 4096. `threads` are the threads that one query may spread over."""
        self.dim, self.tail_rows, self._threads = dim, tail_rows, threads
        self._tail = Tail(tail_rows, dim)
        self.view = View(0, (*(part for part in parts if part.live), self._tail_part(None)), threads)

    def apply(self, number: int, batch: Batch, removed: Numbers) -> None:
        """Adds the batch (n's above all there were), then removes n's, and shows both as one View."""
        parts, alive = list(self.view.parts[:-1]), self.view.parts[-1].alive
        while len(batch):
            if not self._tail.used and len(batch) >= self.tail_rows:
                segment, batch = batch[:SEGMENT_ROWS], batch[SEGMENT_ROWS:]
                parts.append(Part(Segment.of(segment), None, len(segment)))
                self._merge(parts)
                continue
            piece = batch[: self.tail_rows - self._tail.used]
            batch = batch[len(piece) :]
            self._tail.append(piece)
            if alive is not None:
                alive = np.concatenate([alive, np.ones(len(piece), bool)])
            if self._tail.used == self.tail_rows:
                self._seal(parts, alive)
                alive = None
        parts.append(self._tail_part(alive))
        if len(removed):
            removed = np.sort(removed)
            parts = [part.without(removed) for part in parts]
            parts = [*self._compacted(parts[:-1]), parts[-1]]
        self.view = View(number, tuple(parts), self._threads)

    def seal(self) -> None:
        """Makes a segment of the tail, so that it can be kept in a file."""
        parts = list(self.view.parts[:-1])
        self._seal(parts, self.view.parts[-1].alive)
        self.view = View(self.view.number, (*parts, self._tail_part(None)), self._threads)

    def _tail_part(self, alive: Mask | None) -> Part:
        live = self._tail.used if alive is None else int(np.count_nonzero(alive))
        return Part(self._tail.upto(self._tail.used), alive, live)

    def _seal(self, parts: list[Part], alive: Mask | None) -> None:
        batch = self._tail_part(alive).batch()
        self._tail = Tail(self.tail_rows, self.dim)
        if len(batch):
            parts.append(Part(Segment.of(batch), None, len(batch)))
            self._merge(parts)

    def _merge(self, parts: list[Part]) -> None:
        """Joins the last two while the last is no smaller, as a binary counter carries."""
        while (
            len(parts) > 1
            and parts[-2].live <= parts[-1].live
            and parts[-2].live + parts[-1].live <= SEGMENT_ROWS
        ):
            last, before = parts.pop(), parts.pop()
            parts.append(_joined(before, last))

    def _compacted(self, parts: Sequence[Part]) -> list[Part]:
        """Copies parts with many dead rows without them, and joins neighbours that have become small."""
        kept: list[Part] = []
        for part in parts:
            if not part.live:
                continue
            dead = len(part.data.ns) - part.live
            if dead <= DEAD_SHARE * len(part.data.ns):
                kept.append(part)
            elif kept and kept[-1].live + part.live <= SEGMENT_ROWS // 2:
                kept.append(_joined(kept.pop(), part))
            else:
                kept.append(Part(Segment.of(part.batch()), None, part.live))
        return kept


def _joined(first: Part, second: Part) -> Part:
    batch = Batch.joined([first.batch(), second.batch()], first.data.dim)
    return Part(Segment.of(batch), None, len(batch))


def _gathered(parts: Sequence[Part], located: Sequence[Positions]) -> Segment:
    ns = np.concatenate([part.data.ns[at] for part, at in zip(parts, located, strict=True)])
    vectors = np.empty((len(ns), parts[0].data.dim), np.float16)
    start = 0
    for part, at in zip(parts, located, strict=True):
        part.data.rows(at, vectors[start : start + len(at)])
        start += len(at)
    return Segment(ns, np.empty(0, np.uint32), _quantizer(vectors))


def _quantizer(vectors: NDArray[np.float16]) -> faiss.IndexScalarQuantizer:
    """FAISS's exact index over float16: half the memory of float32 and, measured, half the time."""
    quantizer = faiss.IndexScalarQuantizer(
        vectors.shape[1], faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
    )
    quantizer.add_sa_codes(np.ascontiguousarray(vectors).view(np.uint8))  # float16 bytes are its codes
    return quantizer
