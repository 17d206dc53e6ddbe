"""The labelled items of a collection, as arrays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedserve.errors import InvalidField, closest
from embedserve.ranking import field_value

__all__ = ["Labelled", "label_of", "labelled"]


@dataclass(frozen=True, slots=True, eq=False)
class Labelled:
    """Items with exactly one label each."""

    vectors: NDArray[np.float64]
    """[n, dim], of unit length."""
    rows: NDArray[np.int64]
    """[n]: which of `labels`."""
    labels: tuple[str, ...]
    """In alphabetical order."""
    without: int
    """Items passed over because the field is missing, empty, or holds no label."""
    several: int
    """Items passed over because the field holds several labels."""

    @property
    def counts(self) -> dict[str, int]:
        """Label → items."""
        return dict(zip(self.labels, np.bincount(self.rows).tolist(), strict=True))

    @property
    def single(self) -> tuple[str, ...]:
        """Labels with one item, which nothing can be judged by."""
        return tuple(label for label, count in self.counts.items() if count == 1)


def label_of(value: object) -> str | None:
    """The label that a metadata value is; None where it is none. A list of one counts as that one."""
    if isinstance(value, list) and len(value) == 1:
        (value,) = value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return f"{value:g}" if isinstance(value, float) else str(value)
    return value.strip() or None if isinstance(value, str) else None


def labelled(items: Sequence[tuple[Mapping[str, Any], Sequence[float]]], field: str, name: str) -> Labelled:
    """The items (metadata and vector) that have one label in the metadata `field`; dots go into objects.

    Raises InvalidField: no items, none has the field (with the closest that there is), fewer than two labels.
    """
    if not items:
        raise InvalidField(
            f"Collection '{name}' is empty; put labelled images into it, as in `embedserve index photos/ "
            f"--collection {name} --metadata labels.csv`.",
            param="collection",
        )
    found: list[tuple[str, Sequence[float]]] = []
    several = 0
    for metadata, vector in items:
        value = field_value(metadata, field)
        label = label_of(value)
        if label is not None:
            found.append((label, vector))
        elif isinstance(value, list) and len(value) > 1:
            several += 1
    if not found and not several:
        fields = Counter(key for metadata, _ in items for key in metadata)
        raise InvalidField(
            f"No item of '{name}' has a label in the metadata field '{field}'; {closest(field, fields)}",
            param="label",
        )
    labels = sorted({label for label, _ in found})
    if len(labels) < 2:
        only = f"the one label '{labels[0]}'" if labels else f"several labels for each of {several} items"
        raise InvalidField(
            f"The field '{field}' of '{name}' holds {only}; a classifier needs two labels or more, one for "
            "each item.",
            param="label",
        )
    vectors = np.array([vector for _, vector in found], dtype=np.float64)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    rows = np.array([labels.index(label) for label, _ in found], dtype=np.int64)
    return Labelled(vectors, rows, tuple(labels), len(items) - len(found) - several, several)
