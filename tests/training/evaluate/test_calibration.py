"""Calibration: bins and errors against loops and torchmetrics, and fits against what lies beside them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from embedserve.bundle import Scoring
from embedserve.classify import probabilities
from embedserve.errors import InvalidField
from training import torchvision_ops
from training.evaluate.calibration import (
    confidences,
    expected_calibration_error,
    fit_scoring,
    loss_of,
    reliability,
)

torchvision_ops.register()
from torchmetrics.functional.classification import multiclass_calibration_error  # noqa: E402 -- after that

SOFTMAX = Scoring(logit_scale=100.0)
SIGMOID = Scoring(activation="sigmoid", logit_scale=10.0, logit_bias=-10.0)


def _judged(count: int = 400, classes: int = 6, seed: int = 0, help: float = 0.1):
    """Cosines as an encoder gives them, where the right label's is larger by little."""
    chance = np.random.default_rng(seed)
    labels = chance.integers(0, classes, count)
    cosines = chance.normal(0.2, 0.05, (count, classes))
    cosines[np.arange(count), labels] += help
    return cosines, labels


def _literal_error(confidence, right, bins=15):
    total = 0.0
    for number in range(bins):
        low, high = number / bins, (number + 1) / bins
        inside = [one for one in range(len(right)) if low < confidence[one] <= high]
        if inside:
            accuracy = sum(bool(right[one]) for one in inside) / len(inside)
            trust = sum(float(confidence[one]) for one in inside) / len(inside)
            total += len(inside) / len(right) * abs(accuracy - trust)
    return total


def _literal_loss(cosines, labels, scoring):
    total = 0.0
    for row, label in zip(cosines.tolist(), labels.tolist(), strict=True):
        logits = [scoring.logit_scale * one + scoring.logit_bias for one in row]
        if scoring.activation == "softmax":
            total -= logits[label] - math.log(sum(math.exp(one) for one in logits))
        else:
            chances = [1 / (1 + math.exp(-one)) for one in logits]
            total -= sum(math.log(one if place == label else 1 - one) for place, one in enumerate(chances))
    return total / len(labels)


@pytest.mark.parametrize("scale", [1.0, 20.0, 300.0])
def test_the_calibration_error_is_the_literal_one_and_torchmetrics(scale: float) -> None:
    cosines, labels = _judged()
    chances = probabilities(cosines, Scoring(logit_scale=scale))
    confidence, right = confidences(chances, labels)
    found = expected_calibration_error(reliability(confidence, right))
    assert found == pytest.approx(_literal_error(confidence, right), abs=1e-12)
    theirs = multiclass_calibration_error(
        torch.from_numpy(chances), torch.from_numpy(labels), num_classes=6, n_bins=15, norm="l1"
    )
    assert found == pytest.approx(float(theirs), abs=1e-6)


def test_a_confidence_on_a_border_lies_in_the_bin_below_and_one_and_zero_have_bins() -> None:
    bins = reliability(np.array([0.0, 0.2, 0.21, 1.0]), np.array([True, False, True, True]), bins=5)
    assert [(one.images, one.accuracy) for one in bins] == [(2, 0.5), (1, 1.0), (1, 1.0)]


@pytest.mark.parametrize("before", [SOFTMAX, SIGMOID])
def test_the_loss_is_the_literal_one(before: Scoring) -> None:
    cosines, labels = _judged(50)
    assert loss_of(cosines, labels, before) == pytest.approx(_literal_loss(cosines, labels, before), rel=1e-9)


@pytest.mark.parametrize("before", [SOFTMAX, SIGMOID])
def test_nothing_near_the_fitted_scale_and_bias_fits_better(before: Scoring) -> None:
    cosines, labels = _judged()
    fitted = fit_scoring(cosines, labels, before)
    least = _literal_loss(cosines, labels, fitted)
    assert least < _literal_loss(cosines, labels, before) - 0.01
    biases = (-1e-3, 0, 1e-3) if before.activation == "sigmoid" else (0,)
    for scale in (0.999, 1, 1.001):
        for bias in biases:
            beside = {"logit_scale": fitted.logit_scale * scale, "logit_bias": fitted.logit_bias + bias}
            assert _literal_loss(cosines, labels, fitted.model_copy(update=beside)) >= least - 1e-12
    assert fitted.activation == before.activation


@pytest.mark.parametrize(
    "true", [Scoring(logit_scale=35.0), SIGMOID.model_copy(update={"logit_scale": 30.0})]
)
def test_the_scale_that_labels_were_drawn_with_is_found_again(true: Scoring) -> None:
    chance = np.random.default_rng(1)
    cosines = chance.uniform(0.0, 0.4, (20_000, 4))
    if true.activation == "softmax":
        shares = probabilities(cosines, true)
        labels = (shares.cumsum(1) < chance.random((len(shares), 1))).sum(1)
        fitted = fit_scoring(cosines, labels, SOFTMAX)
        assert fitted.logit_scale == pytest.approx(35, rel=0.03)
        assert fitted.logit_bias == 0
    else:  # one label is right in each row, drawn by the odds that exactly it is
        odds = np.exp(true.logit_scale * cosines + true.logit_bias)
        labels = ((odds / odds.sum(1, keepdims=True)).cumsum(1) < chance.random((len(odds), 1))).sum(1)
        fitted = fit_scoring(cosines, labels, true)
        chances = probabilities(cosines, fitted)
        assert chances.sum() / len(labels) == pytest.approx(1, abs=1e-6)  # as many as are right, with a bias


def test_a_fit_is_the_same_wherever_it_starts() -> None:
    cosines, labels = _judged()
    far = SIGMOID.model_copy(update={"logit_scale": 500.0, "logit_bias": 40.0})
    one, other = fit_scoring(cosines, labels, SIGMOID), fit_scoring(cosines, labels, far)
    assert (one.logit_scale, one.logit_bias) == pytest.approx((other.logit_scale, other.logit_bias), rel=1e-6)


@pytest.mark.parametrize("before", [SOFTMAX, SIGMOID])
@pytest.mark.parametrize(
    ("help", "said"), [(2.0, "no image is named wrongly"), (-0.1, "no better than chance")]
)
def test_where_no_scale_is_best_it_says_why(before: Scoring, help: float, said: str) -> None:
    with pytest.raises(InvalidField, match=said):
        fit_scoring(*_judged(help=help), before)
