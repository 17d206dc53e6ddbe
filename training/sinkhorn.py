"""Sinkhorn-Knopp: soft assignments that use all prototypes equally (Cuturi 2013; Caron et al. 2020)."""

from __future__ import annotations

import torch
from torch import Tensor

from training.distributed import gather
from training.precision import full_precision

__all__ = ["sinkhorn"]


@torch.no_grad()
@full_precision
def sinkhorn(scores: Tensor, *, epsilon: float, iterations: int) -> Tensor:
    """Assigns the rows of all ranks to K prototypes, so that each prototype gets an equal share of them.

    Each iteration scales the columns of exp(scores ÷ ε) to one common sum over all ranks, then every row to
    the sum 1 (Caron et al. 2020, equations 3 to 5). It runs on logarithms, because e⁸⁹ is no float32 any
    more: a score of 4.5 at ε = .05. Ranks may hold different numbers of rows, and one may hold none.

    Args:
        scores: float [B, K], this rank's rows: their similarity to each prototype. K is that of all ranks.
        epsilon: ε > 0; the smaller, the nearer to one prototype for each row.
        iterations: At least 1; 3 in SwAV and DINOv2.

    Returns:
        [B, K] without gradient, in float32 (float64 where the scores are). Each row sums to 1.
    """
    logs = scores / epsilon
    for _ in range(iterations):
        # K numbers of each rank instead of all its rows: their log-sum-exp is that of the joined batch.
        shares = gather(logs.logsumexp(0, keepdim=True)).logsumexp(0)
        logs = (logs - shares).log_softmax(1)
    return logs.exp()
