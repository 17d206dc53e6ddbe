"""Spread and effective rank of features, against the formulae written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from training.watch import feature_statistics
from training.watch.statistics import MOST_ROWS


def literal_std(features: NDArray[np.float64]) -> float:
    """Chen & He 2021, section 4.1: unit vectors, the deviation of each dimension, their mean, times √dim."""
    rows = [row / math.sqrt(sum(x * x for x in row)) for row in features]
    deviations = []
    for dimension in range(features.shape[1]):
        column = [row[dimension] for row in rows]
        mean = sum(column) / len(column)
        deviations.append(math.sqrt(sum((x - mean) ** 2 for x in column) / len(column)))
    return sum(deviations) / len(deviations) * math.sqrt(features.shape[1])


def literal_rank(features: NDArray[np.float64]) -> float:
    """Garrido et al. 2023, eq. 1 and 2, with their ε of 1e-7."""
    singular = np.linalg.svd(features, compute_uv=False)
    entropy = 0.0
    for value in singular:
        share = value / singular.sum() + 1e-7
        entropy -= share * math.log(share)
    return math.exp(entropy)


@pytest.mark.parametrize("shape", [(200, 12), (12, 40), (7, 7)])
def test_both_are_those_of_the_papers(shape: tuple[int, int]) -> None:
    chance = np.random.default_rng(1)
    features = (chance.standard_normal(shape) * np.geomspace(1, 1e-3, shape[1])).astype(np.float32)
    found = feature_statistics(torch.from_numpy(features))
    assert found["feature_std"] == pytest.approx(literal_std(features.astype(np.float64)), rel=1e-6)
    assert found["feature_rank"] == pytest.approx(literal_rank(features.astype(np.float64)), rel=1e-4)


def test_directions_all_over_the_sphere_spread_one_and_use_every_dimension() -> None:
    found = feature_statistics(torch.randn(4000, 16, generator=torch.Generator().manual_seed(0)))
    assert found["feature_std"] == pytest.approx(1, abs=0.01)
    assert found["feature_rank"] == pytest.approx(16, abs=0.1)


def test_equal_features_spread_nothing_and_use_one_direction() -> None:
    found = feature_statistics(torch.tensor([[3.0, 4.0, 0.0]]).expand(50, 3))
    assert found["feature_std"] == pytest.approx(0, abs=1e-12)
    assert found["feature_rank"] == pytest.approx(1, abs=1e-4)


def test_the_length_of_features_does_not_count_as_spread() -> None:
    lengths = torch.linspace(1, 9, 50)[:, None]
    assert feature_statistics(lengths * torch.ones(50, 4))["feature_std"] == pytest.approx(0, abs=1e-7)


def test_features_on_three_axes_use_three_directions() -> None:
    features = torch.eye(64)[:3].repeat(20, 1)
    assert feature_statistics(features)["feature_rank"] == pytest.approx(3, abs=1e-3)


def test_features_that_are_all_zero_use_no_direction() -> None:
    assert feature_statistics(torch.zeros(9, 4)) == {"feature_std": 0.0, "feature_rank": 0.0}


@pytest.mark.parametrize("features", [torch.zeros(0, 4), torch.tensor([[1.0, math.inf], [0.0, 1.0]])])
def test_what_cannot_be_measured_is_not_a_number(features: torch.Tensor) -> None:
    assert all(math.isnan(value) for value in feature_statistics(features).values())


def test_of_very_many_rows_some_from_everywhere_stand_for_the_rank() -> None:
    features = torch.zeros(3 * MOST_ROWS, 4)
    for part in range(3):
        features[part * MOST_ROWS : (part + 1) * MOST_ROWS, part] = 1
    assert feature_statistics(features)["feature_rank"] == pytest.approx(3, abs=0.01)


def test_half_precision_features_are_measured_in_full() -> None:
    features = torch.randn(300, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert feature_statistics(features) == pytest.approx(feature_statistics(features.double()))
