"""What happens to vectors and hits around a search: mixing queries, diversity, grouping, linking duplicates.

Pure functions of arrays and values; no store, no encoder, no event loop.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedserve.errors import InvalidField

__all__ = ["Links", "best_per_group", "direction", "field_value", "group_key", "mix", "mmr"]

Vectors = NDArray[np.float32]

_CANCELLED = 1e-4
"""A weighted sum this much shorter than the weights has no direction that float16 vectors could tell."""


def mix(vectors: Vectors, weights: Sequence[float]) -> Vectors:
    """The direction of the weighted sum of unit vectors: Σ wᵢ vᵢ, scaled to unit length.

    Args:
        vectors: float32 (n, dim), unit length.
        weights: n finite numbers, negative ones allowed.

    Returns float32 (dim,). Raises InvalidField when the parts cancel out or all weights are zero.
    """
    scale = max((abs(weight) for weight in weights), default=0.0)
    if scale == 0:
        raise InvalidField("All weights are 0; give at least one part another weight.", param="query")
    mixed = direction(vectors, [weight / scale for weight in weights])  # so that none can overflow
    if mixed is None:
        raise InvalidField(
            "The parts of the query cancel out, which leaves no direction to search in; "
            "change a weight or take a part away.",
            param="query",
        )
    return mixed


def direction(vectors: Vectors, weights: Sequence[float]) -> Vectors | None:
    """Σ wᵢ vᵢ scaled to unit length, float32 (dim,); None where the parts cancel out.

    Args:
        vectors: float32 (n, dim), unit length.
        weights: n numbers, the largest of them not far from 1.
    """
    total = np.asarray(weights, np.float64) @ vectors.astype(np.float64)
    length = float(np.linalg.norm(total))
    return None if length < _CANCELLED else np.asarray(total / length, dtype=np.float32)


def mmr(relevance: Sequence[float], vectors: Vectors, k: int, diversity: float) -> list[int]:
    """Maximal marginal relevance (Carbonell & Goldstein, 1998): relevant, but unlike what was chosen already.

    Chooses greedily the candidate with the highest (1 − d)·relevance − d·max cosine with those chosen.

    Args:
        relevance: n similarities with the query, best first.
        vectors: float32 (n, dim), unit length, in the same order.
        k: How many to choose.
        diversity: d, 0 (the order given) to 1 (only unlike one another; the first is still the best).

    Returns at most k positions in the order chosen. Of equal candidates the earlier wins.
    """
    scores = np.asarray(relevance, dtype=np.float64)
    if not len(scores) or k < 1:
        return []
    chosen = [0]  # nothing is chosen yet, so only relevance counts, and the candidates come best first
    open_ = np.ones(len(scores), dtype=bool)
    open_[0] = False
    alike = np.full(len(scores), -1.0)
    while len(chosen) < min(k, len(scores)):
        alike = np.maximum(alike, vectors @ vectors[chosen[-1]])
        marginal = (1 - diversity) * scores - diversity * alike
        best = int(np.where(open_, marginal, -np.inf).argmax())
        open_[best] = False
        chosen.append(best)
    return chosen


def field_value(metadata: Mapping[str, Any], field: str) -> Any:
    """The value of a field, None when missing. As in filters, a dot goes into objects.

    >>> field_value({"shop": {"city": "Bonn"}}, "shop.city")
    'Bonn'
    """
    if field in metadata:
        return metadata[field]
    value: Any = metadata
    for key in field.split("."):
        if not isinstance(value, Mapping):
            return None
        value = value.get(key)
    return value


def group_key(value: object) -> Hashable:
    """A key that is equal for equal JSON values: 1 equals 1.0, but not true.

    >>> group_key(1) == group_key(1.0), group_key(1) == group_key(True), group_key({"a": 1, "b": 2})
    (True, False, '{"a": 1, "b": 2}')
    """
    if isinstance(value, bool) or value is None:
        return ("constant", value)
    if isinstance(value, str):
        return ("text", value)
    if isinstance(value, int | float):
        return ("number", value)
    return json.dumps(value, sort_keys=True)


def best_per_group(keys: Iterable[Hashable]) -> list[int]:
    """The positions of each key's first appearance: of hits that come best first, the best of each group."""
    first: dict[Hashable, int] = {}
    for position, key in enumerate(keys):
        first.setdefault(key, position)
    return list(first.values())


class Links:
    """Pairs of ids, joined into groups by single linkage (union-find). Memory is that of the linked ids."""

    def __init__(self) -> None:
        self._parent: dict[str, str] = {}
        self._nearest: dict[str, float] = {}

    def add(self, one: str, other: str, similarity: float) -> None:
        """Says that two different ids are alike."""
        for name in (one, other):
            self._parent.setdefault(name, name)
            self._nearest[name] = max(similarity, self._nearest.get(name, -1.0))
        first, second = self._root(one), self._root(other)
        if first != second:
            # Which root wins decides no outcome; the smaller id, so that the tree is the same every time.
            self._parent[max(first, second)] = min(first, second)

    def groups(self) -> list[tuple[tuple[str, ...], float]]:
        """(ids in order, lowest of their nearest-neighbour similarities); largest, then most alike first."""
        members: dict[str, list[str]] = {}
        for name in self._parent:
            members.setdefault(self._root(name), []).append(name)
        found = [(tuple(sorted(ids)), min(self._nearest[name] for name in ids)) for ids in members.values()]
        return sorted(found, key=lambda group: (-len(group[0]), -group[1], group[0]))

    def _root(self, name: str) -> str:
        root = name
        while self._parent[root] != root:
            root = self._parent[root]
        while self._parent[name] != root:  # path compression
            self._parent[name], name = root, self._parent[name]
        return root
