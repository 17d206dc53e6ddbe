"""What another precision does: to vectors, against float32 on the calibration set, and to speed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from embedserve.graph import session_options

__all__ = ["Inputs", "Judged", "Vectors", "embed", "further", "judge", "speeds"]

Vectors = NDArray[np.float32]
Batch = NDArray[np.generic]

TOGETHER = 17
"""Inputs of the batches in which vectors are compared; one alone is compared as well."""
TIMED = 8
ROUNDS = 3
NEIGHBOURS = 10


@dataclass(frozen=True, slots=True)
class Inputs:
    """The calibration set as a tower takes it.

    Attributes:
        rows: One input each: uint8 [height, width, 3], or token ids int64 [length].
        stack: Some of them → one batch, padded where lengths differ.
    """

    rows: Sequence[Batch]
    stack: Callable[[Sequence[Batch]], Batch]

    def batches(self, size: int) -> list[Batch]:
        """All rows in order, `size` at a time."""
        starts = range(0, len(self.rows), size)
        return [self.stack(self.rows[start : start + size]) for start in starts]


@dataclass(frozen=True, slots=True)
class Judged:
    """A graph in another precision against the float32 one."""

    min_cosine: float
    """Of an input's vector to its float32 one, alone and in a batch, the least of all."""
    top10_overlap: float
    """Mean share of the ten nearest neighbours among the inputs that are the same ones."""
    batch_cosine: float
    """Of an input's vector alone to the one in a batch, the least of all."""

    def figures(self) -> dict[str, float]:
        return {name: round(value, 5) for name, value in asdict(self).items()}


def embed(path: Path, batches: Sequence[Batch]) -> Vectors:
    """Unit vectors, float32 [n, dim], of the first output."""
    run = _runner(path)
    return np.concatenate([run(batch) for batch in batches])


def further(path: Path, other: Path, inputs: Inputs) -> dict[str, dict[str, float]]:
    """How the outputs beside the vector, such as patches, agree with those of the float32 graph `other`.

    Returns:
        For each, the least and the mean cosine of its vectors: those of patches, or attention over them.
    """
    names = [one.name for one in _session(path).get_outputs()][1:]
    if not names:
        return {}
    cosines: dict[str, list[Vectors]] = {name: [] for name in names}
    found, expected = _session(path), _session(other)
    for batch in inputs.batches(TIMED):
        feed = {found.get_inputs()[0].name: batch}
        both = zip(names, found.run(names, feed), expected.run(names, feed), strict=True)
        for name, ours, theirs in both:
            lengths = np.linalg.norm(ours, axis=-1) * np.linalg.norm(theirs, axis=-1)
            cosines[name].append(((ours * theirs).sum(axis=-1) / np.maximum(lengths, 1e-12)).ravel())
    every = {name: np.concatenate(some) for name, some in cosines.items()}
    return {
        name: {"min_cosine": round(float(one.min()), 5), "mean_cosine": round(float(one.mean()), 5)}
        for name, one in every.items()
    }


def judge(path: Path, inputs: Inputs, expected: Vectors) -> Judged:
    """Compares a graph with what float32 gave.

    Args:
        expected: float32 [n, dim], unit vectors of the float32 graph.
    """
    run = _runner(path)
    alone = np.concatenate([run(batch) for batch in inputs.batches(1)])
    together = np.concatenate([run(batch) for batch in inputs.batches(TOGETHER)])
    return Judged(
        min_cosine=min(_least_cosine(alone, expected), _least_cosine(together, expected)),
        top10_overlap=_overlap(together, expected),
        batch_cosine=_least_cosine(alone, together),
    )


def speeds(paths: Sequence[Path], inputs: Inputs) -> list[float]:
    """Inputs/s of each graph in batches of `TIMED`: the median of rounds in which all take turns."""
    batches = inputs.batches(TIMED)[:4]
    count = sum(len(batch) for batch in batches)
    runners = [_runner(path) for path in paths]
    seconds: list[list[float]] = [[] for _ in runners]
    for _ in range(ROUNDS + 1):  # the first is a warm-up
        for run, taken in zip(runners, seconds, strict=True):
            started = time.perf_counter()
            for batch in batches:
                run(batch)
            taken.append(time.perf_counter() - started)
    return [count / statistics.median(taken[1:]) for taken in seconds]


def _runner(path: Path) -> Callable[[Batch], Vectors]:
    session = _session(path)
    name, output = session.get_inputs()[0].name, session.get_outputs()[0].name

    def run(batch: Batch) -> Vectors:
        vectors: Vectors = session.run([output], {name: batch})[0]
        return vectors

    return run


def _session(path: Path) -> Any:
    # As a server runs them: one thread for each run, which other runs stand beside.
    return ort.InferenceSession(str(path), session_options(1), providers=["CPUExecutionProvider"])


def _least_cosine(found: Vectors, expected: Vectors) -> float:
    lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    cosines = (found * expected).sum(axis=1) / np.maximum(lengths, 1e-12)
    least = float(np.where(np.isnan(cosines), -1.0, cosines).min())
    return min(least, 1.0)


def _overlap(found: Vectors, expected: Vectors) -> float:
    count = min(NEIGHBOURS, len(found) - 1)
    if count < 1:
        return 1.0
    both = zip(_nearest(found, count), _nearest(expected, count), strict=True)
    return float(np.mean([len(set(one) & set(other)) / count for one, other in both]))


def _nearest(vectors: Vectors, count: int) -> list[list[int]]:
    scores = vectors @ vectors.T
    np.fill_diagonal(scores, -np.inf)
    nearest: list[list[int]] = np.argsort(-scores, axis=1, kind="stable")[:, :count].tolist()
    return nearest
