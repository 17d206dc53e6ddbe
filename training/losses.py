"""InfoNCE in its three forms: pairs within a batch, queries against keys, queries against a queue.

Every form takes the hard-negative concentration β of Robinson et al. 2021, and ids: rows with one id are of
one image or one group, and are never each other's negatives.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from training.distributed import gather, rank
from training.precision import full_precision
from training.queue import FeatureQueue

__all__ = ["info_nce", "nt_xent", "query_key_loss", "queue_loss", "unit"]

NEVER = -1e4
"""A logit that counts as nothing. Not −inf: where all negatives are excluded its gradient would be NaN."""


unit = full_precision(F.normalize)
"""Rows scaled to length 1, in float32 under autocast as well."""


@full_precision
def info_nce(positive: Tensor, negatives: Tensor, excluded: Tensor, *, beta: float = 0.0) -> Tensor:
    """−log(e^positive / (e^positive + N)), mean over rows, where N is the sum of e^negatives.

    With β > 0 each negative weighs in proportion to e^(β·logit), with mean weight 1 (Robinson et al. 2021,
    eq. 4 with τ⁺ = 0), so that the hardest count most; β = 0 is plain InfoNCE (van den Oord et al. 2018).

    Args:
        positive: float [B], logits of the positives: cosine ÷ temperature.
        negatives: float [B, M], logits of the candidates.
        excluded: bool [B, M], candidates that are no negatives of a row.
        beta: Concentration, ≥ 0.

    Returns:
        float [], in float32 or the float64 of its inputs.
    """
    total = _log_sum(negatives, excluded)
    if beta > 0:
        count = (~excluded).sum(1).clamp(min=1)
        total = (
            _log_sum((1 + beta) * negatives, excluded) - _log_sum(beta * negatives, excluded) + count.log()
        )
        total = total.masked_fill(excluded.all(1), NEVER)
    return (torch.logaddexp(positive, total) - positive).mean()


@full_precision
def nt_xent(first: Tensor, second: Tensor, ids: Tensor, *, temperature: float, beta: float = 0.0) -> Tensor:
    """NT-Xent over the 2N views of all ranks, mean over this rank's (Chen et al. 2020, eq. 1).

    Args:
        first: float [B, dim], projections of each image's first view, of any length.
        second: float [B, dim], those of the second view, in the same order.
        ids: int64 [B], one number for each image or group.
        temperature: τ > 0.
        beta: As in `info_nce`.

    Returns:
        float [], in float32 or the float64 of its inputs.
    """
    first, second = F.normalize(first, dim=1), F.normalize(second, dim=1)
    every = torch.cat([gather(first), gather(second)])
    every_id = gather(ids).repeat(2)
    positive = (first * second).sum(1).repeat(2) / temperature
    candidates = torch.cat([first, second]) @ every.T / temperature
    return info_nce(positive, candidates, ids.repeat(2)[:, None] == every_id[None, :], beta=beta)


@full_precision
def query_key_loss(
    queries: Tensor, keys: Tensor, ids: Tensor, *, temperature: float, beta: float = 0.0
) -> Tensor:
    """Each query against the keys of all ranks, mean over this rank's rows (Chen et al. 2021, algorithm 1).

    Args:
        queries: float [B, dim], of any length.
        keys: float [B, dim]; row i is the positive of query i. Detached keys give no gradient.
        ids, temperature, beta: As in `nt_xent`.

    Returns:
        float [], in float32 or the float64 of its inputs.
    """
    queries, keys = F.normalize(queries, dim=1), F.normalize(keys, dim=1)
    candidates = queries @ gather(keys).T / temperature
    own = rank() * len(queries) + torch.arange(len(queries), device=queries.device)
    positive = candidates.gather(1, own[:, None])[:, 0]
    return info_nce(positive, candidates, ids[:, None] == gather(ids)[None, :], beta=beta)


@full_precision
def queue_loss(
    queries: Tensor, keys: Tensor, ids: Tensor, queue: FeatureQueue, *, temperature: float, beta: float = 0.0
) -> Tensor:
    """Each query against its key and all rows of the queue, mean over rows (He et al. 2020, eq. 1).

    Rows of the query's own image or group do not count. Rows that are still random count, as in the authors'
    code: no cosine to them is large, so they repel little, and from nowhere in particular.

    Args:
        queries: float [B, dim], of any length.
        keys: float [B, dim], of any length; row i is the positive of query i.
        ids: int64 [B], one number for each image or group.
        queue: Rows of earlier steps, with their ids.
        temperature: τ > 0.
        beta: As in `info_nce`.

    Returns:
        float [], in float32 or the float64 of its inputs.
    """
    queries, keys = unit(queries), unit(keys)
    positive = (queries * keys).sum(1) / temperature
    negatives = queries @ queue.rows.T / temperature
    return info_nce(positive, negatives, ids[:, None] == queue.ids[None, :], beta=beta)


def _log_sum(logits: Tensor, excluded: Tensor) -> Tensor:
    return logits.masked_fill(excluded, NEVER).logsumexp(1)
