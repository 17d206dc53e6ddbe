"""Logistic regression against a literal version, finite differences and scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from training.probe.logistic import loss_and_slope, minimise, regress


def samples(labels: int, each: int, dim: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors around one direction for each label, and the labels."""
    generator = np.random.default_rng(seed)
    rows = np.repeat(np.arange(labels), each)
    vectors = generator.normal(size=(labels, dim))[rows] + 1.5 * generator.normal(size=(len(rows), dim))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True), rows


def test_the_loss_and_its_slope_are_those_of_the_formula() -> None:
    vectors, rows = samples(3, 4, 5)
    generator = np.random.default_rng(1)
    weights, bias, decay = generator.normal(size=(3, 5)) * 4, generator.normal(size=3), 0.01

    def literal(weights: np.ndarray, bias: np.ndarray) -> float:
        total = 0.0
        for vector, label in zip(vectors, rows, strict=True):
            scores = [sum(w * v for w, v in zip(row, vector, strict=True)) for row in weights]
            powers = [math.exp(score + shift) for score, shift in zip(scores, bias, strict=True)]
            total -= math.log(powers[label] / sum(powers))
        return total / len(rows) + decay / 2 * sum(float(w) ** 2 for row in weights for w in row)

    loss, slope, shift = loss_and_slope(weights, bias, vectors, rows, decay)
    assert loss == pytest.approx(literal(weights, bias), rel=1e-12)
    small = 1e-6
    for label in range(3):
        nudge = np.zeros(3)
        nudge[label] = small
        found = (literal(weights, bias + nudge) - literal(weights, bias - nudge)) / (2 * small)
        assert shift[label] == pytest.approx(found, abs=1e-8)
        for place in range(5):
            turn = np.zeros((3, 5))
            turn[label, place] = small
            found = (literal(weights + turn, bias) - literal(weights - turn, bias)) / (2 * small)
            assert slope[label, place] == pytest.approx(found, abs=1e-8)


@pytest.mark.parametrize("decay", [1e-1, 1e-3, 1e-5])
@pytest.mark.parametrize(("labels", "each", "dim"), [(3, 10, 4), (5, 8, 64)])
def test_probabilities_are_those_of_scikit_learn(decay: float, labels: int, each: int, dim: int) -> None:
    vectors, rows = samples(labels, each, dim)
    start = np.zeros((labels, dim)), np.zeros(labels)
    weights, bias = regress(vectors, rows, start, decay=decay, tolerance=1e-9, steps=5000)
    theirs = LogisticRegression(C=1 / (decay * len(rows)), tol=1e-10, max_iter=20_000).fit(vectors, rows)
    logits = vectors @ weights.T + bias
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(shares, theirs.predict_proba(vectors), atol=2e-5)


def test_where_it_starts_does_not_matter() -> None:
    vectors, rows = samples(3, 6, 8)
    far = np.random.default_rng(5).normal(size=(3, 8)) * 20, np.array([3.0, -5.0, 1.0])
    near = np.zeros((3, 8)), np.zeros(3)
    found = [regress(vectors, rows, start, decay=1e-2, tolerance=1e-10) for start in (far, near)]
    np.testing.assert_allclose(found[0][0], found[1][0], atol=1e-6)


def test_a_narrow_valley_is_followed_to_its_end() -> None:
    scales = np.logspace(0, 4, 12)
    goal = np.arange(12.0)

    def valley(point: np.ndarray) -> tuple[float, np.ndarray]:
        return float((scales * (point - goal) ** 2).sum()) / 2, scales * (point - goal)

    found = minimise(valley, np.zeros(12), tolerance=1e-8, steps=500)
    np.testing.assert_allclose(found, goal, atol=1e-7)
