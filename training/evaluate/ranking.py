"""Whether the right answers come first when one kind of vectors is looked for with another."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from training.precision import full_precision

__all__ = ["ahead", "recall", "same"]

CHUNK = 2**23
"""Similarities looked at at once."""


@full_precision
@torch.no_grad()
def recall(
    queries: Tensor, gallery: Tensor, right: tuple[Tensor, Tensor], most: Sequence[int]
) -> list[float]:
    """The share of queries with a right answer among their k nearest, for each k of `most`.

    An answer counts with how many wrong ones are as near or nearer, so that vectors that are all the same do
    not find anything.

    Args:
        queries: [m, dim]; gallery: [n, dim], of any length.
        right: ids of the queries, int64 [m], and of the gallery, [n]: equal ones belong together. A query
            without a right answer finds nothing.
        most: Values of k, from 1.
    """
    wanted, given = right
    before = ahead(queries, gallery, lambda start, end: wanted[start:end, None] == given)
    return [float((before < k).double().mean()) if len(before) else float("nan") for k in most]


@full_precision
@torch.no_grad()
def ahead(queries: Tensor, gallery: Tensor, belongs: Callable[[int, int], Tensor]) -> Tensor:
    """How many wrong answers are as near as the nearest right one, or nearer: int64 [m].

    Args:
        queries: [m, dim]; gallery: [n, dim], of any length.
        belongs: Called with start and end of some queries: bool [end - start, n], the right answers. Where
            there is none, all n count as ahead.
    """
    queries, gallery = F.normalize(queries, dim=1), F.normalize(gallery, dim=1)
    step = max(1, CHUNK // max(len(gallery), 1))
    before = []
    for start in range(0, len(queries), step):
        cosines = queries[start : start + step] @ gallery.T
        right = belongs(start, start + len(cosines))
        best = cosines.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
        before.append(((cosines >= best) & ~right).sum(1).masked_fill(~right.any(1), len(gallery)))
    return torch.cat(before) if before else torch.zeros(0, dtype=torch.int64)


def same(ids: Tensor) -> tuple[Tensor, Tensor]:
    """`right` of `recall` where queries and gallery have the same ids."""
    return ids, ids
