"""Which linear classifier suits the labelled vectors, and how far it can be trusted.

Prototypes: each label's weights are the mean direction of its vectors (Snell et al. 2017, "Prototypical
networks for few-shot learning", with cosines), times a scale; no bias. Regression: `training.probe.logistic`.
Scale and decay are those with the lowest cross-entropy on items that were held out, each once, in five folds;
the figures are of the same items, so they flatter by what choosing one number of a few can flatter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from training.probe.logistic import log_softmax, regress

__all__ = ["DECAYS", "Fit", "Wanted", "calibration_error", "deal_folds", "fit", "prototypes"]

Floats = NDArray[np.float64]
Whole = NDArray[np.int64]
Wanted = Literal["auto", "linear", "prototypes"]
Found = tuple[Floats, Floats, float]
"""Weights, bias, and the setting."""

FOLDS = 5
DECAYS = (1e-1, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5, 1e-6)
"""Tried from the strongest to the weakest, each from the weights of the one before."""
USUAL_DECAY, USUAL_SCALE = 1e-3, 1 / 0.07
"""Where no label has two items to choose by; the scale is that of the k-NN vote."""
SCALES = (1.0, 1000.0)
BINS = 15


@dataclass(frozen=True, slots=True, eq=False)
class Fit:
    """One linear classifier: softmax(weights · vector + bias). Figures are of the items held out."""

    kind: Literal["linear", "prototypes"]
    weights: Floats
    """[labels, dim]."""
    bias: Floats
    """[labels]."""
    setting: float
    """The decay of the regression, or the scale of the prototypes."""
    judged: int
    accuracy: float | None
    """None, as the others, where nothing could be held out."""
    cross_entropy: float | None
    ece: float | None


def fit(vectors: Floats, rows: Whole, kind: Wanted = "auto", *, seed: int = 0) -> tuple[Fit, list[Fit]]:
    """The classifier to take, and all that were tried.

    auto takes the more accurate on held-out items, of equals the one with the lower cross-entropy; prototypes
    where nothing can be held out.

    Args:
        vectors: float64 [n, dim], unit length.
        rows: int64 [n]: labels 0..labels-1, each there at least once.
        seed: Of who is held out when.
    """
    folds = deal_folds(rows, seed)
    tried = []
    if kind in ("auto", "prototypes"):
        tried.append(_fit_prototypes(vectors, rows, folds))
    if kind in ("auto", "linear"):
        tried.append(_fit_regression(vectors, rows, folds))
    best = max(tried, key=lambda one: (one.accuracy or 0.0, -(one.cross_entropy or 0.0)))
    return best, tried


def deal_folds(rows: Whole, seed: int) -> Whole:
    """Deals the items of each label out over the folds: int64 [n], 0..4; −1 for a label's only item.

    Such an item is always learned from. A label of fewer items than folds fills as many as it has items.
    """
    generator = np.random.default_rng(seed)
    folds = np.empty_like(rows)
    for label in range(int(rows.max()) + 1):
        places = generator.permutation(np.flatnonzero(rows == label))
        first = int(generator.integers(FOLDS))
        folds[places] = (first + np.arange(len(places))) % FOLDS if len(places) > 1 else -1
    return folds


def prototypes(vectors: Floats, rows: Whole) -> Floats:
    """The mean direction of each label's vectors, [labels, dim]."""
    sums = np.zeros((int(rows.max()) + 1, vectors.shape[1]))
    np.add.at(sums, rows, vectors)
    unit: Floats = sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)
    return unit


def calibration_error(shares: Floats, rows: Whole) -> float:
    """Expected calibration error in 15 bins of the largest share (Guo et al. 2017), 0..1."""
    sure, right = shares.max(axis=1), shares.argmax(axis=1) == rows
    bins = np.minimum((sure * BINS).astype(int), BINS - 1)
    gaps = np.bincount(bins, weights=right.astype(float) - sure, minlength=BINS)
    return float(np.abs(gaps).sum() / len(rows))


def _fit_prototypes(vectors: Floats, rows: Whole, folds: Whole) -> Fit:
    held, cosines = folds >= 0, np.zeros((len(rows), int(rows.max()) + 1))
    for part, train in _splits(folds):
        cosines[part] = vectors[part] @ prototypes(vectors[train], rows[train]).T
    scale = _best_scale(cosines[held], rows[held]) if held.any() else USUAL_SCALE
    unit = prototypes(vectors, rows)
    found = scale * unit, np.zeros(len(unit)), scale
    return _judged("prototypes", found, log_softmax(scale * cosines[held]), rows[held])


def _fit_regression(vectors: Floats, rows: Whole, folds: Whole) -> Fit:
    # Decay pulls weights into the span of the vectors, which fewer numbers can describe.
    basis = np.linalg.qr(vectors.T)[0] if len(vectors) < vectors.shape[1] else np.eye(vectors.shape[1])
    within, held = vectors @ basis, folds >= 0
    labels = int(rows.max()) + 1
    logs = np.zeros((len(DECAYS), len(rows), labels))
    for part, train in _splits(folds):
        weights, bias = USUAL_SCALE * prototypes(within[train], rows[train]), np.zeros(labels)
        for place, decay in enumerate(DECAYS):
            weights, bias = regress(
                within[train], rows[train], (weights, bias), decay=decay, tolerance=1e-5, steps=200
            )
            logs[place, part] = log_softmax(within[part] @ weights.T + bias)
    place = DECAYS.index(USUAL_DECAY)
    if held.any():
        place = int(np.argmin([_cross_entropy(one[held], rows[held]) for one in logs]))
    start = USUAL_SCALE * prototypes(within, rows), np.zeros(labels)
    weights, bias = regress(within, rows, start, decay=DECAYS[place])
    return _judged("linear", (weights @ basis.T, bias, DECAYS[place]), logs[place, held], rows[held])


def _splits(folds: Whole) -> Iterator[tuple[NDArray[np.bool_], NDArray[np.bool_]]]:
    """(held out, learned from) of each fold that holds anything out."""
    for fold in range(FOLDS):
        if (folds == fold).any():
            yield folds == fold, folds != fold


def _best_scale(cosines: Floats, rows: Whole) -> float:
    """The scale with the lowest cross-entropy, which is convex in it: a golden-section search on its log."""
    low, high = np.log(SCALES)
    ratio = (np.sqrt(5) - 1) / 2
    for _ in range(40):
        one, other = high - ratio * (high - low), low + ratio * (high - low)
        if _cross_entropy(log_softmax(np.exp(one) * cosines), rows) < _cross_entropy(
            log_softmax(np.exp(other) * cosines), rows
        ):
            high = other
        else:
            low = one
    return float(np.exp((low + high) / 2))


def _cross_entropy(logs: Floats, rows: Whole) -> float:
    return -float(logs[np.arange(len(rows)), rows].mean())


def _judged(kind: Literal["linear", "prototypes"], found: Found, logs: Floats, rows: Whole) -> Fit:
    if not len(rows):
        return Fit(kind, *found, 0, None, None, None)
    right = float((logs.argmax(axis=1) == rows).mean())
    error = calibration_error(np.exp(logs), rows)
    return Fit(kind, *found, len(rows), right, _cross_entropy(logs, rows), error)
