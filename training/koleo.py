"""KoLeo: features that spread out, because each is pushed away from its nearest neighbour."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from training.distributed import gather
from training.precision import full_precision

__all__ = ["koleo_loss"]

CLOSEST = 1e-6
"""Shorter distances count as this: rows of unit length are no more exact in float32, and equal rows have no
direction in which they could part."""


@full_precision
def koleo_loss(features: Tensor, ids: Tensor) -> Tensor:
    """−log of the distance to the nearest neighbour, mean over this rank's rows (Sablayrolles et al. 2019).

    It is the Kozachenko-Leonenko estimate of the features' entropy but for its sign and constants. Neighbours
    come from the rows of all ranks: DINOv2's code takes those of one rank, and with it a loss that depends on
    how many there are.

    Args:
        features: float [B, dim], of any length; compared at unit length.
        ids: int64 [B]. Rows with one id are of one image or one group, and not each other's neighbours.

    Returns:
        float [], in float32 or the float64 of the features.
    """
    rows = F.normalize(features, dim=1)
    every = gather(rows)
    with torch.no_grad():
        cosines = rows @ every.T
        nearest = cosines.masked_fill(ids[:, None] == gather(ids)[None, :], -2).argmax(1)
    # From the difference: 1 − cosine would lose half of the digits of a small distance.
    squared = (rows - every[nearest]).square().sum(1)
    return -squared.clamp(min=CLOSEST**2).log().mean() / 2
