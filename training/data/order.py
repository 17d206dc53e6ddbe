"""Which images a step sees, computed from (seed, step) alone: a resumed run has no position to restore.

Both classes draw raw 64-bit words of Philox (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2,
3") keyed through NumPy's SeedSequence. NumPy promises that these two never change; it does not promise so
for `Generator.permutation`, and a run may be resumed under another version.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from embedserve.errors import InvalidField

__all__ = ["EpochOrder", "Partners"]

_ORDER, _PARTNERS = 1, 2
"""Keep the two streams of one seed apart."""


class EpochOrder:
    """A permutation of the images for every epoch, and the batches it is cut into.

    Args:
        images: How many there are.
        batch: Images of one step over all ranks.
        seed: Of the run; zero or more.

    Raises InvalidField for a batch that the images cannot fill, and for numbers below their least value.
    """

    def __init__(self, images: int, batch: int, seed: int) -> None:
        if batch < 1:
            raise InvalidField(f"batch={batch} is not allowed; give 1 or more.", param="batch")
        if batch > images:
            raise InvalidField(
                f"batch={batch} is more than the {images:,} images there are to train on; give at most "
                f"{images}, or add images.",
                param="batch",
            )
        self.images, self.batch, self.seed = images, batch, _checked(seed)
        self.steps_per_epoch = images // batch
        """An incomplete last batch is dropped; the images that miss out differ from epoch to epoch."""
        self._recent: dict[int, NDArray[np.int64]] = {}

    def rows(self, step: int) -> NDArray[np.int64]:
        """The images of a step that is counted from the start of the run, 0 first: int64 [batch]."""
        epoch, place = divmod(step, self.steps_per_epoch)
        return self.permutation(epoch)[place * self.batch : (place + 1) * self.batch].copy()

    def permutation(self, epoch: int) -> NDArray[np.int64]:
        """All images in the order of an epoch: int64 [images]. Not to be written to."""
        order = self._recent.get(epoch)
        if order is None:
            words = _words(self.images, _ORDER, self.seed, epoch)
            order = np.argsort(words, kind="stable").astype(np.int64, copy=False)
            # Two are kept: batches that are made ahead are in the next epoch while this one still goes on.
            self._recent = {one: self._recent[one] for one in list(self._recent)[-1:]} | {epoch: order}
        return order


class Partners:
    """For each image another one of its group, drawn uniformly among the others.

    Args:
        groups: int64 [N], equal numbers for images that belong together. None: each is its own partner. Leave
            held-out images out of it, or they are trained on as partners.
        seed: Of the run; zero or more.
    """

    def __init__(self, groups: NDArray[np.int64] | None, seed: int) -> None:
        self.seed = _checked(seed)
        self._grouped = groups is not None
        if groups is None:
            return
        _, inverse, self._count = np.unique(groups, return_inverse=True, return_counts=True)
        self._group = inverse.reshape(-1)
        self._members = np.argsort(self._group, kind="stable")
        """Images, group after group."""
        self._start = np.cumsum(self._count) - self._count
        """Where a group begins in `_members`."""
        self._place = np.empty(len(groups), np.int64)
        self._place[self._members] = np.arange(len(groups)) - self._start[self._group[self._members]]
        """Where an image stands in its group."""

    def rows(self, rows: NDArray[np.int64], step: int) -> NDArray[np.int64]:
        """A partner for each of `rows` (int64 [B]) at a step: int64 [B]; an image alone gets itself."""
        if not self._grouped:
            return rows.copy()
        group, place = self._group[rows], self._place[rows]
        others = self._count[group] - 1
        words = _words(len(rows), _PARTNERS, self.seed, step)
        # The remainder favours small numbers by less than others / 2^64.
        drawn = (words % np.maximum(others, 1).astype(np.uint64)).astype(np.int64)
        drawn += (drawn >= place) & (others > 0)  # skips the image itself
        partners: NDArray[np.int64] = self._members[self._start[group] + np.where(others > 0, drawn, place)]
        return partners


def _checked(seed: int) -> int:
    if seed < 0:
        raise InvalidField(f"seed={seed} is not allowed; give 0 or more.", param="seed")
    return seed


def _words(count: int, *key: int) -> NDArray[np.uint64]:
    """`count` uniform 64-bit words that depend on `key` alone."""
    words: NDArray[np.uint64] = np.random.Philox(np.random.SeedSequence(key)).random_raw(count)
    return words
