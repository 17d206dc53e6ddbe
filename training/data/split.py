"""Which images a run trains on, and which it keeps aside to be judged by."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from embedserve.errors import InvalidField
from training.data.source import Source

__all__ = ["MOST_HELD_OUT", "split"]

MOST_HELD_OUT = 10_000
"""Images that are drawn to be held out at most; a k-NN score over as many is known to half a percent."""

_TAG = 3
"""Keeps these draws apart from those of training/data/order.py under the same seed."""

Rows = NDArray[np.int64]


def split(source: Source, *, holdout: float, seed: int) -> tuple[Rows, Rows]:
    """Rows to train on and rows held out: two int64 arrays, each ascending, together every row once.

    Images that the data set itself keeps for testing are the held-out ones, whatever `holdout` says. (Where
    it keeps all of them, as a folder of nothing but `t10k` files does, it is taken as having no tests.)
    Otherwise a share of the images is drawn with `seed`:

    - by class: each class gives its share, and one of two or more images stays on either side;
    - by group: images of one group stay together, as long as that leaves every class something to draw from
      and no group has images of two classes;
    - at most `MOST_HELD_OUT` in all, or one of each class where there are more classes than that.

    Raises InvalidField when `holdout` is not within 0 (nothing is held out) to less than 1.
    """
    if not 0 <= holdout < 1:
        raise InvalidField(
            f"holdout={holdout} is not a share; give 0 (none) or more, and less than 1.", param="holdout"
        )
    everything = np.arange(len(source), dtype=np.int64)
    if source.test.any() and not source.test.all():
        return everything[~source.test], everything[source.test]
    if holdout == 0:
        return everything, everything[:0]
    held = _drawn(source.labels, _units(source), holdout, seed)
    return everything[~held], everything[held]


def _units(source: Source) -> Rows:
    """What is held out as a whole: [N], equal numbers for images that must not be torn apart."""
    if source.groups is None:
        return np.arange(len(source))
    group = np.unique(source.groups, return_inverse=True)[1].reshape(-1)
    classes = int(source.labels.max()) + 2  # and those without a label
    pairs, images = np.unique(group * classes + source.labels + 1, return_counts=True)
    one_label_each = len(pairs) == group.max() + 1
    _, first, groups_of_class = np.unique(pairs % classes, return_index=True, return_counts=True)
    enough_groups = np.all((groups_of_class >= 2) | (images[first] == 1))
    return group.astype(np.int64) if one_label_each and enough_groups else np.arange(len(source))


def _drawn(labels: Rows, unit_of: Rows, holdout: float, seed: int) -> NDArray[np.bool_]:
    _, first, unit_of, size = np.unique(unit_of, return_index=True, return_inverse=True, return_counts=True)
    label_of_unit = np.unique(labels[first], return_inverse=True)[1].reshape(-1)
    images = np.bincount(label_of_unit, weights=size).astype(np.int64)
    quota = _quotas(images, min(round(holdout * len(labels)), MOST_HELD_OUT))

    words = np.random.Philox(np.random.SeedSequence((_TAG, seed))).random_raw(len(size))
    held = np.zeros(len(size), bool)
    order = np.lexsort((words, label_of_unit))
    ends = np.cumsum(np.bincount(label_of_unit))
    for number, end in enumerate(ends):
        units = order[ends[number - 1] if number else 0 : end]
        if len(units) < 2:
            continue
        chosen = units[np.cumsum(size[units]) <= quota[number]][: len(units) - 1]
        if not len(chosen):
            chosen = units[[np.argmin(size[units])]]
        held[chosen] = True
    of_images: NDArray[np.bool_] = held[unit_of.reshape(-1)]
    return of_images


def _quotas(images: Rows, total: int) -> Rows:
    """`total` shared out over classes in proportion to their images, by largest remainder: [classes]."""
    exact = images * (total / images.sum())
    quota: Rows = np.floor(exact).astype(np.int64)
    rest = total - int(quota.sum())
    quota[np.argsort(quota - exact, kind="stable")[:rest]] += 1
    return quota
