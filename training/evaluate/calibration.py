"""Whether probabilities can be believed: expected calibration error, and the scale that makes them right.

A probability is activation(scale · cosine + bias), softmax over the labels or a sigmoid for each. Scale and
bias are chosen by least negative log-likelihood, which is temperature scaling (Guo et al. 2017, section 4.2;
scale is 1 / temperature) for a softmax and Platt's scaling (1999) for sigmoids. Both are convex, so Newton's
method finds the one minimum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from embedserve.bundle import Scoring
from embedserve.classify import probabilities
from embedserve.errors import InvalidField

__all__ = [
    "BINS",
    "Bin",
    "confidences",
    "expected_calibration_error",
    "fit_scoring",
    "loss_of",
    "reliability",
]

Floats = NDArray[np.float64]
Labels = NDArray[np.int64]

BINS = 15
STEPS = 200
MOST_SCALE = 1e5
"""A larger scale would tell cosines apart that float32 does not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bin:
    """The images whose confidence lies within one fifteenth of 0..1."""

    images: int
    confidence: float
    """Their mean confidence."""
    accuracy: float
    """Share of them that is named rightly."""


def confidences(chances: Floats, labels: Labels) -> tuple[Floats, NDArray[np.bool_]]:
    """The probability of the label that is named, and whether it is the right one; each [n]."""
    named = chances.argmax(1)
    return chances[np.arange(len(chances)), named], named == labels


def reliability(confidence: Floats, right: NDArray[np.bool_], bins: int = BINS) -> tuple[Bin, ...]:
    """The bins ((m − 1) / M, m / M] that hold any image (Guo et al. 2017, section 2)."""
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    return tuple(
        Bin(
            images=int((place == one).sum()),
            confidence=float(confidence[place == one].mean()),
            accuracy=float(right[place == one].mean()),
        )
        for one in np.unique(place)
    )


def expected_calibration_error(bins: tuple[Bin, ...]) -> float:
    """Σ |accuracy − confidence| of the bins, by their share of images (Guo et al. 2017, eq. 3): 0..1."""
    images = sum(one.images for one in bins)
    return sum(one.images / images * abs(one.accuracy - one.confidence) for one in bins)


def loss_of(cosines: Floats, labels: Labels, scoring: Scoring) -> float:
    """Mean negative log-likelihood of an image: of its label, or of right and wrong for every label."""
    scale, bias = scoring.logit_scale, scoring.logit_bias
    return _objective(scoring)(np.array([scale, bias]), cosines, labels)[0]


def fit_scoring(cosines: Floats, labels: Labels, scoring: Scoring) -> Scoring:
    """The scoring whose probabilities fit best.

    Args:
        cosines: [n, classes].
        labels: int64 [n], 0..classes-1.
        scoring: Its activation stays, and the bias of a softmax, which changes nothing.

    Raises:
        InvalidField: No finite scale above 0 is best: labels are guessed no better than by chance, or all
            without a mistake. Code `no_fit`.
    """
    free = 2 if scoring.activation == "sigmoid" else 1
    if _separable(cosines, labels, each_alone=free == 2):
        raise _no_fit(
            "no image is named wrongly, so a larger scale is always better; use more, or harder ones"
        )
    objective = _objective(scoring)
    # Newton's steps do not depend on units; a spread of 1 keeps the first ones short.
    now = np.array([1 / max(float(cosines.std()), 1e-9), scoring.logit_bias])
    if free == 2:
        now[1] = -now[0] * float(cosines.mean()) - np.log(max(cosines.shape[1] - 1, 1))
    loss, slope, curve = objective(now, cosines, labels)
    for _ in range(STEPS):
        step = np.zeros(2)
        step[:free] = -np.linalg.solve(curve[:free, :free] + 1e-12 * np.eye(free), slope[:free])
        promised = -float(slope @ step)
        if promised < 1e-13 or abs(now[0]) > MOST_SCALE:
            break
        share = 1.0
        while share > 1e-6:
            found = objective(now + share * step, cosines, labels)
            if found[0] <= loss - 1e-4 * share * promised:
                break
            share /= 2
        else:
            break
        now, (loss, slope, curve) = now + share * step, found
    if not 0 < now[0] <= MOST_SCALE:
        raise _no_fit("the encoder names these images no better than chance, so no probability suits it")
    return scoring.model_copy(update={"logit_scale": float(now[0]), "logit_bias": float(now[1])})


def _separable(cosines: Floats, labels: Labels, *, each_alone: bool) -> bool:
    """Whether right labels always come first: in each row, or for sigmoids in all rows together."""
    right = np.arange(cosines.shape[1]) == labels[:, None]
    own, others = np.where(right, cosines, np.inf).min(1), np.where(right, -np.inf, cosines).max(1)
    return bool(own.min() >= others.max() if each_alone else (own >= others).all())


def _no_fit(why: str) -> InvalidField:
    return InvalidField(f"There is no best scale: {why}.", param="data", code="no_fit")


# ------------------------------------------------------------------------------- likelihoods, by activation

Objective = Callable[[Floats, Floats, Labels], tuple[float, Floats, Floats]]
"""(scale, bias), cosines, labels → loss, its gradient [2] and its second derivatives [2, 2]."""


def _objective(scoring: Scoring) -> Objective:
    return _of_sigmoids if scoring.activation == "sigmoid" else _of_softmax


def _of_softmax(parameters: Floats, cosines: Floats, labels: Labels) -> tuple[float, Floats, Floats]:
    scale = float(parameters[0])
    own = cosines[np.arange(len(cosines)), labels]
    logits = scale * (cosines - own[:, None])
    top = logits.max(1, keepdims=True)
    weights = np.exp(logits - top)
    total = weights.sum(1)
    shares = weights / total[:, None]
    mean = (shares * cosines).sum(1)
    variance = (shares * (cosines - mean[:, None]) ** 2).sum(1)
    loss = float((np.log(total) + top[:, 0]).mean())
    return loss, np.array([(mean - own).mean(), 0.0]), np.diag([float(variance.mean()), 1.0])


def _of_sigmoids(parameters: Floats, cosines: Floats, labels: Labels) -> tuple[float, Floats, Floats]:
    right = np.zeros(cosines.shape)
    right[np.arange(len(cosines)), labels] = 1
    logits = parameters[0] * cosines + parameters[1]
    loss = (np.logaddexp(0, logits) - right * logits).sum(1).mean()
    scoring = Scoring(activation="sigmoid", logit_scale=1.0)
    chances = probabilities(logits, scoring)
    wrong, weights, images = chances - right, chances * (1 - chances), len(cosines)
    slope = np.array([(wrong * cosines).sum(), wrong.sum()]) / images
    across = (weights * cosines).sum() / images
    curve = np.array([[(weights * cosines**2).sum() / images, across], [across, weights.sum() / images]])
    return float(loss), slope, curve
