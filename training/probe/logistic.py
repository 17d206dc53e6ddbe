"""Multinomial logistic regression: the mean cross-entropy plus decay/2 · ‖weights‖², float64, full batch.

The bias is not decayed, so shifting all vectors changes nothing but the bias; they are centred, which lets
L-BFGS (Liu & Nocedal 1989, "On the limited memory BFGS method for large scale optimization") converge in
fewer steps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

__all__ = ["log_softmax", "loss_and_slope", "minimise", "regress"]

Floats = NDArray[np.float64]
Whole = NDArray[np.int64]

PAIRS = 10
"""Steps that L-BFGS remembers."""
SUFFICIENT, SHORTEST = 1e-4, 1e-12
"""What of the slope's promise a step must keep (Armijo), and the step at which rounding is all there is."""


def log_softmax(logits: Floats) -> Floats:
    """Row by row, without overflow."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    logs: Floats = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return logs


def loss_and_slope(
    weights: Floats, bias: Floats, vectors: Floats, labels: Whole, decay: float
) -> tuple[float, Floats, Floats]:
    """The loss and its gradient.

    Args:
        weights: [classes, dim].
        bias: [classes].
        vectors: [n, dim].
        labels: int64 [n], 0..classes-1.
    """
    logs = log_softmax(vectors @ weights.T + bias)
    rows = np.arange(len(labels))
    loss = -float(logs[rows, labels].mean()) + decay / 2 * float((weights**2).sum())
    slope = np.exp(logs)
    slope[rows, labels] -= 1
    slope /= len(labels)
    return loss, slope.T @ vectors + decay * weights, slope.sum(axis=0)


def minimise(
    function: Callable[[Floats], tuple[float, Floats]], start: Floats, *, tolerance: float, steps: int
) -> Floats:
    """L-BFGS with backtracking, for smooth convex functions.

    Args:
        function: Point [k] → value and gradient [k].
        tolerance: Ends where no component of the gradient is larger.
        steps: Ends after so many in any case.
    """
    point, (value, slope) = start, function(start)
    pairs: deque[tuple[Floats, Floats, float]] = deque(maxlen=PAIRS)
    for _ in range(steps):
        if np.abs(slope).max() <= tolerance:
            break
        direction = _two_loops(slope, pairs)
        promise = float(slope @ direction)
        size = 1.0 if pairs else min(1.0, 1 / float(np.linalg.norm(slope)))
        while True:
            moved = point + size * direction
            found, there = function(moved)
            if found <= value + SUFFICIENT * size * promise or size < SHORTEST:
                break
            size /= 2
        if size < SHORTEST:
            break
        step, change = moved - point, there - slope
        curvature = float(step @ change)
        if curvature > 1e-12 * float(change @ change):
            pairs.append((step, change, 1 / curvature))
        point, value, slope = moved, found, there
    return point


def _two_loops(slope: Floats, pairs: deque[tuple[Floats, Floats, float]]) -> Floats:
    """−H · slope with the inverse Hessian H that the remembered steps tell of."""
    rest, parts = -slope, []
    for step, change, inverse in reversed(pairs):
        part = inverse * float(step @ rest)
        parts.append(part)
        rest = rest - part * change
    if pairs:
        _, change, inverse = pairs[-1]
        rest = rest / (inverse * float(change @ change))
    for (step, change, inverse), part in zip(pairs, reversed(parts), strict=True):
        rest = rest + step * (part - inverse * float(change @ rest))
    return rest


def regress(
    vectors: Floats,
    labels: Whole,
    start: tuple[Floats, Floats],
    *,
    decay: float,
    tolerance: float = 1e-6,
    steps: int = 500,
) -> tuple[Floats, Floats]:
    """The weights [classes, dim] and bias [classes] that minimise the loss, from those of `start`.

    The loss is convex: where it starts decides how long it takes, not where it ends.
    """
    shape = start[0].shape
    centre = vectors.mean(axis=0)
    centred = vectors - centre

    def function(point: Floats) -> tuple[float, Floats]:
        weights, bias = point[: -shape[0]].reshape(shape), point[-shape[0] :]
        loss, slope, shift = loss_and_slope(weights, bias, centred, labels, decay)
        return loss, np.concatenate([slope.ravel(), shift])

    first = np.concatenate([start[0].ravel(), start[1] + start[0] @ centre])
    point = minimise(function, first, tolerance=tolerance, steps=steps)
    weights, bias = point[: -shape[0]].reshape(shape), point[-shape[0] :]
    return weights, bias - weights @ centre
