"""Shorter vectors: the first numbers of a vector, at unit length again (Matryoshka)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from embedserve.bundle import Description
from embedserve.errors import InvalidField

__all__ = ["check_dimensions", "shorten"]


def check_dimensions(described: Description, dimensions: int | None) -> int:
    """How many numbers to keep; None keeps all.

    Raises InvalidField beyond the encoder's, or for a length that the bundle, where it lists any, does not.
    """
    if dimensions is None:
        return described.dim
    if not 1 <= dimensions <= described.dim:
        raise InvalidField(
            f"'dimensions' is {dimensions}; this encoder has {described.dim}. Ask for 1 to {described.dim}.",
            param="dimensions",
        )
    if described.dims and dimensions not in {*described.dims, described.dim}:
        allowed = ", ".join(map(str, sorted({*described.dims, described.dim})))
        raise InvalidField(
            f"'dimensions' is {dimensions}; this encoder was trained for prefixes of {allowed}.",
            param="dimensions",
        )
    return dimensions


def shorten(vector: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    """The first `size` numbers at unit length again. Raises InvalidField where they are all zero."""
    if size == len(vector):
        return vector
    prefix = vector[:size].astype(np.float64)
    norm = float(np.linalg.norm(prefix))
    if norm < 1e-6:
        raise InvalidField(
            f"The first {size} numbers of this input's vector are all zero, so they have no direction. Use "
            "more 'dimensions'.",
            code="no_direction",
        )
    return (prefix / norm).astype(np.float32)
