"""How far features spread: the two figures in which a collapse shows before any accuracy does."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["feature_statistics"]

MOST_ROWS = 4096
"""Rows that the effective rank is computed from. Twice the dim of a ResNet-50, whose rank they could show."""


@torch.no_grad()
def feature_statistics(features: Tensor) -> dict[str, float]:
    """Standard deviation and effective rank of features.

    Args:
        features: float [N, dim], not normalised, on any device. All rows count for the standard deviation,
            and at most 4,096, evenly spaced, for the rank.

    Returns:
        'feature_std': the mean over dimensions of the standard deviation of unit vectors, times √dim (Chen &
        He 2021, section 4.1): 1 for directions uniform on the sphere, 0 where all are the same.
        'feature_rank': RankMe (Garrido et al. 2023, eq. 1), exp of the entropy of the singular values: how
        many directions the features use, from 1 to dim; 0 where all features are 0.
        Both are NaN where a feature is not finite, or there is none.
    """
    if not len(features) or not bool(features.isfinite().all()):
        return {"feature_std": math.nan, "feature_rank": math.nan}
    directions = F.normalize(features.double(), dim=1)
    spread = directions.std(0, correction=0).mean() * math.sqrt(features.shape[1])
    return {"feature_std": float(spread), "feature_rank": _effective_rank(features)}


def _effective_rank(features: Tensor) -> float:
    if len(features) > MOST_ROWS:
        at = torch.linspace(0, len(features) - 1, MOST_ROWS, device=features.device).long()
        features = features[at]
    rows = features.double()
    # Singular values as the roots of the eigenvalues of the smaller Gram matrix, which is many times faster.
    # In float64 that loses only values below 1e-8 of the greatest, less than the paper's ε.
    gram = rows.T @ rows if rows.shape[0] >= rows.shape[1] else rows @ rows.T
    singular = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    total = singular.sum()
    if not bool(total > 0):
        return 0.0
    shares = singular / total + 1e-7
    return float(torch.exp(-(shares * shares.log()).sum()))
