"""What every evaluation takes: images in, feature vectors out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from embedserve.bundle import Scoring
from embedserve.errors import BadRequest, InvalidField
from training.data import Skipped, Source
from training.evaluate.report import Progress, silent

__all__ = ["READERS", "Embedded", "EvaluationEncoder", "Reader", "Reading", "finite", "without_failed"]

READERS = 4
"""Threads that decode images which are not cached."""


@dataclass(frozen=True, slots=True, eq=False)
class Embedded:
    """The images of a source that could be read, and their features."""

    vectors: Tensor
    """float32 [n, dim] on the encoder's device, as they come: of any length."""
    source: Source
    """Row for row."""
    skipped: tuple[Skipped, ...]
    """Images that are not among the n, and why."""


class EvaluationEncoder(Protocol):
    """An encoder as evaluations see it."""

    name: str
    dim: int
    device: torch.device
    holdout: float | None
    """Share of the images that its training kept out of a data set without a test part; None for an encoder
    that was not trained here and has seen none of them."""
    seed: int
    """With which that share was drawn."""

    def embed(self, source: Source, *, progress: Progress = silent, cached: bool = True) -> Embedded:
        """The features of all images that can be read.

        Args:
            source: N images.
            progress: Called with (images done, N).
            cached: Whether decoded images may be kept on disk for the next time. Not for pictures that are
                made up on the way.

        Raises BadRequest when no image can be read.
        """


class Reader(Protocol):
    """The text side of an encoder."""

    scoring: Scoring
    """How cosines of images and texts become probabilities."""

    def embed(self, texts: Sequence[str], *, progress: Progress = silent) -> Tensor:
        """Unit vectors of n ≥ 1 texts, in the space of the images: float32 [n, dim] on the encoder's device.

        Raises InvalidField for a text that has no vector.
        """


@runtime_checkable
class Reading(Protocol):
    """What an `EvaluationEncoder` has beside that when it may know texts."""

    reader: Reader | None
    """None: it knows images alone."""


def without_failed(source: Source, vectors: Sequence[Tensor], failed: Mapping[int, str]) -> Embedded:
    """What an encoder returns for `source` when it could not read some rows (row → why).

    Raises BadRequest when there are no vectors.
    """
    if not vectors:
        first = next(iter(failed.items()), None)
        why = f"'{source.keys[first[0]]}': {first[1]}" if first else "it has no image."
        raise BadRequest(f"No image of '{source.name}' can be read; the first problem is {why}")
    joined = finite(torch.cat(list(vectors)), source)
    skipped = tuple(Skipped(source.keys[row], reason) for row, reason in failed.items())
    if failed:
        source = source.select(np.delete(np.arange(len(source)), list(failed)))
    return Embedded(joined, source, (*source.skipped, *skipped))


def finite(vectors: Tensor, source: Source) -> Tensor:
    """The vectors. Raises InvalidField where one is NaN or infinite: no comparison with it means anything."""
    bad = int((~vectors.isfinite().all(1)).sum())
    if bad:
        raise InvalidField(
            f"The encoder gives NaN or infinite features for {bad:,} of {len(vectors):,} images of "
            f"'{source.name}'. Its training diverged: evaluate an earlier checkpoint, or train with less lr.",
            param="path",
        )
    return vectors
