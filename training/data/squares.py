"""One image → one stored square, and how wide it was."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from embedserve.errors import EmbedServeError
from embedserve.preprocess import OVERSAMPLING
from training.data.source import Source, to_image, upright_size

__all__ = ["Decoded", "Failure", "decode_rows", "read_square", "squash"]


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an image could not be decoded. `unread`: its bytes could not be had, which may pass."""

    row: int
    reason: str
    unread: bool


@dataclass(frozen=True, slots=True)
class Decoded:
    """Some rows of a source, without those that failed."""

    pixels: NDArray[np.uint8]
    """[M, S, S, 3]; S = 0 where only the shapes were asked for."""
    aspect: NDArray[np.float32]
    """[M]"""
    failures: list[Failure]


def read_square(source: Source, row: int, size: int) -> NDArray[np.uint8]:
    """uint8 [size, size, 3]. Raises as `Source.read`."""
    return squash(source.read(row, shrink_to=OVERSAMPLING * size), size)


def decode_rows(source: Source, rows: range, size: int) -> Decoded:
    """Decodes images to squares of `size` pixels; a bad image is one of the failures.

    Size 0 only finds out their shapes and whether they decode.
    """
    pixels = np.empty((len(rows), size, size, 3), np.uint8)
    aspect = np.empty(len(rows), np.float32)
    failures: list[Failure] = []
    done = 0
    for row in rows:
        try:
            data = source.fetch(row)
            # A JPEG's smallest scale still reads the whole file, so it finds the same damage.
            image = to_image(data, shrink_to=OVERSAMPLING * size or 1)
            width, height = upright_size(data) if _may_shrink(data) else image.size
        except EmbedServeError as error:
            failures.append(Failure(row, str(error), unread=False))
            continue
        except OSError as error:
            reason = f"cannot be read: {error.strerror or error}"
            failures.append(Failure(row, reason, unread=True))
            continue
        if size:
            pixels[done] = squash(image, size)
        aspect[done] = width / height
        done += 1
    return Decoded(pixels[:done], aspect[:done], failures)


def squash(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """To a square, whatever the shape: the crop that is drawn later undoes it.

    Bilinear with Pillow's support that grows with the scale, which is the triangle filter of torchvision's
    crops and ours: it never rings. Bicubic would, its overshoots would be clipped to 0..255 here, and the
    crop, which filters once more, could not take that back.
    """
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image)


def _may_shrink(data: bytes | NDArray[np.uint8]) -> bool:
    return isinstance(data, bytes) and data.startswith(b"\xff\xd8")
