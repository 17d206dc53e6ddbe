"""Prototypes or regression: what is chosen, and that figures are of items held out."""

from __future__ import annotations

import numpy as np
import pytest

from tests.training.probe.test_logistic import samples
from training.probe.fitting import (
    FOLDS,
    USUAL_SCALE,
    calibration_error,
    deal_folds,
    fit,
    prototypes,
)


def test_prototypes_are_the_mean_directions() -> None:
    vectors, rows = samples(3, 5, 6)
    for label, found in enumerate(prototypes(vectors, rows)):
        mean = sum(vectors[i] for i in range(len(rows)) if rows[i] == label)
        np.testing.assert_allclose(found, mean / np.linalg.norm(mean))


def test_folds_share_out_each_label_and_keep_lone_items_to_learn_from() -> None:
    rows = np.array([0] * 11 + [1] * 3 + [2])
    folds = deal_folds(rows, seed=0)
    assert sorted(np.bincount(folds[:11], minlength=FOLDS)) == [2, 2, 2, 2, 3]
    assert len(set(folds[11:14].tolist())) == 3
    assert folds[14] == -1
    np.testing.assert_array_equal(folds, deal_folds(rows, seed=0))
    assert (folds != deal_folds(rows, seed=1)).any()


def test_labels_drawn_by_lot_are_not_learned() -> None:
    vectors = samples(1, 200, 400)[0]
    rows = np.random.default_rng(2).integers(2, size=200)
    for one in fit(vectors, rows)[1]:
        assert one.accuracy == pytest.approx(0.5, abs=0.12)  # though each classifier fits its own items
        assert one.cross_entropy == pytest.approx(np.log(2), abs=0.1)


def test_auto_takes_what_is_right_more_often() -> None:
    vectors, rows = samples(6, 20, 32)
    best, tried = fit(vectors, rows)
    assert [one.kind for one in tried] == ["prototypes", "linear"]
    assert best.accuracy == max(one.accuracy or 0 for one in tried)
    assert best.accuracy > 0.6
    assert best.judged == 120
    for kind in ("prototypes", "linear"):
        assert fit(vectors, rows, kind)[0].kind == kind


def test_a_corner_that_means_cannot_tell_is_left_to_regression() -> None:
    generator = np.random.default_rng(0)
    places = generator.normal(size=(300, 3)) * [1, 0.1, 0.1] + [0, 0, 1]
    vectors = places / np.linalg.norm(places, axis=1, keepdims=True)
    rows = (vectors[:, 1] > 0.02).astype(np.int64)
    best, (by_means, by_regression) = fit(vectors, rows)
    assert best.kind == "linear"
    assert by_regression.accuracy > by_means.accuracy + 0.01


def test_one_item_for_each_label_gives_prototypes_that_are_not_judged() -> None:
    vectors, rows = samples(4, 1, 16)
    best, tried = fit(vectors, rows)
    assert best.kind == "prototypes"
    assert all((one.judged, one.accuracy, one.ece) == (0, None, None) for one in tried)
    np.testing.assert_allclose(best.weights, USUAL_SCALE * vectors)
    assert (vectors @ tried[1].weights.T + tried[1].bias).argmax(axis=1).tolist() == [0, 1, 2, 3]


def test_the_calibration_error_is_the_gap_between_trust_and_truth() -> None:
    shares = np.array([[0.9, 0.1], [0.9, 0.1], [0.2, 0.8], [0.45, 0.55]])
    rows = np.array([0, 1, 1, 0])
    # by bin of the largest share: 0.9 twice, one right; 0.8, right; 0.55, wrong
    expected = (abs(1 - 1.8) + abs(1 - 0.8) + abs(0 - 0.55)) / 4
    assert calibration_error(shares, rows) == pytest.approx(expected)
