"""RGB image → the exact uint8 tensor that a bundle asks for.

The bundle's `Preprocessing` says what; this says how, pixel for pixel as torchvision does on Pillow images
(`Resize` with antialiasing, then `CenterCrop`) and open_clip's `image_transform` for its three resize modes.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image

from embedserve.bundle import Preprocessing

__all__ = ["Region", "preprocess", "region", "shrink_target", "thumbnail"]

_INTERPOLATION = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}

OVERSAMPLING = 4
"""A JPEG keeps this many times the pixels that the encoder sees; the antialiased resize does the rest.
Its inverse transform at 1/2, 1/4 and 1/8 drops frequencies sharply, which shows in fine lines. Starter
vectors of 90 JPEGs of 0.8 to 15 megapixels (clip art, enlarged photographs with grain), worst and mean cosine
to the unshrunk image: .959 and .991 at 1, .982 and .997 at 2, .9999 and 1.0000 at 4. `python -m
benchmarks.decode --photos FOLDER` gives these and the times."""


def preprocess(image: Image.Image, spec: Preprocessing) -> NDArray[np.uint8]:
    """Resizes and centre-crops `image` (mode RGB) as `spec` says.

    Only the part that survives the crop is computed, so an image of 1 × 30,000 pixels costs no more than
    any other; Pillow's filter still reads the pixels around that part, as it would for the whole.

    Returns:
        uint8 of shape [spec.height, spec.width, 3], values 0..255. Where the resized image is smaller than
        the crop it sits in the middle of `spec.background`.

    Raises:
        ValueError: `image` is not RGB; `embedserve.decode.decode` always gives RGB.
    """
    if image.mode != "RGB":
        raise ValueError(f"preprocess takes an RGB image, not {image.mode}; decode it with embedserve.decode")
    width, height = _resized(image.width, image.height, spec)
    across, down = _crop(width, spec.width, spec), _crop(height, spec.height, spec)
    part = _resampled(image, (width, height), across, down, _INTERPOLATION[spec.interpolation])
    if part.size == (spec.width, spec.height):
        return np.asarray(part)
    pixels = np.empty((spec.height, spec.width, 3), np.uint8)
    pixels[:] = spec.background
    pixels[down.pad : down.pad + down.length, across.pad : across.pad + across.length] = np.asarray(part)
    return pixels


LARGEST_SUPPORT = 3
"""Pixels to each side that Lanczos' filter reads; bicubic 2, bilinear 1."""

ROWS_MAY_BE_FIRST = int(PIL.__version__.partition(".")[0]) >= 13
"""Whether this Pillow makes an image shorter before it makes it narrower where that is cheaper."""


@dataclass(frozen=True, slots=True)
class Region:
    """The part of an image that an encoder sees, in fractions of the image's width and height.

    Beyond 0..1 lies the border that the preprocessing adds.
    """

    left: float
    top: float
    width: float
    height: float


def region(width: int, height: int, spec: Preprocessing) -> Region:
    """Where the pixels that `preprocess` gives for an image of `width` × `height` lie in it."""
    resized = _resized(width, height, spec)
    across, down = _crop(resized[0], spec.width, spec), _crop(resized[1], spec.height, spec)
    return Region(
        (across.start - across.pad) / resized[0],
        (down.start - down.pad) / resized[1],
        spec.width / resized[0],
        spec.height / resized[1],
    )


def shrink_target(spec: Preprocessing) -> int:
    """Pixels of the shortest side that `decode(..., shrink_to=)` has to keep for this encoder.

    A square image bounds every resize mode: under `longest` a longer one ends with a shorter short side.
    """
    return OVERSAMPLING * max(spec.resize_to, _squashed(spec.width, spec), _squashed(spec.height, spec))


def thumbnail(image: Image.Image, size: int = 256, *, quality: int = 75) -> bytes:
    """WebP bytes of `image` (mode RGB) within `size` × `size` pixels: aspect kept, never enlarged."""
    scale = min(size / image.width, size / image.height, 1.0)
    small = image
    if scale < 1:
        shape = max(1, round(image.width * scale)), max(1, round(image.height * scale))
        small = image.resize(shape, Image.Resampling.BICUBIC, reducing_gap=2.0)
    out = io.BytesIO()
    small.save(out, "WEBP", quality=quality, method=2)
    return out.getvalue()


def _resized(width: int, height: int, spec: Preprocessing) -> tuple[int, int]:
    target = spec.resize_to
    if spec.resize == "squash":
        return _squashed(spec.width, spec), _squashed(spec.height, spec)
    if spec.resize == "longest":  # open_clip's ResizeKeepRatio rounds to the nearest, ties to even
        ratio = max(width, height) / target
        return max(1, round(width / ratio)), max(1, round(height / ratio))
    # torchvision's Resize rounds down
    if width <= height:
        return target, int(target * height / width)
    return int(target * width / height), target


def _resampled(
    image: Image.Image, size: tuple[int, int], across: _Axis, down: _Axis, filter_: Image.Resampling
) -> Image.Image:
    """The part of `image` resized to `size` that the crop keeps.

    Pillow resizes one axis after the other and rounds to 8 bits between them, so which comes first shows: by
    up to 47 levels in noise. It chooses by the sizes, and for a part that may be another order than for the
    whole: there the axes are done one by one, in the order of the whole.
    """
    part = across.length, down.length
    x_scale, y_scale = image.width / size[0], image.height / size[1]
    left, right = across.start * x_scale, min((across.start + across.length) * x_scale, image.width)
    top, bottom = down.start * y_scale, min((down.start + down.length) * y_scale, image.height)
    if _rows_first(image.size, size) == _rows_first(image.size, part):
        return image.resize(part, filter_, box=(left, top, right, bottom))
    if _rows_first(image.size, size):
        first, last = _read(left, right, x_scale, image.width)
        columns = image.crop((first, 0, last, image.height))
        shorter = columns.resize((columns.width, down.length), filter_, box=(0, top, columns.width, bottom))
        return shorter.resize(part, filter_, box=(left - first, 0, right - first, down.length))
    first, last = _read(top, bottom, y_scale, image.height)
    rows = image.crop((0, first, image.width, last))
    narrower = rows.resize((across.length, rows.height), filter_, box=(left, 0, right, rows.height))
    return narrower.resize(part, filter_, box=(0, top - first, across.length, bottom - first))


def _rows_first(size: tuple[int, int], target: tuple[int, int]) -> bool:
    """Whether Pillow resizes an image of `size` along its height first; as of Pillow 13.0."""
    fewer_columns, fewer_rows = size[0] - target[0], size[1] - target[1]
    return ROWS_MAY_BE_FIRST and fewer_rows > 0 and fewer_rows > 2 * fewer_columns


def _read(start: float, end: float, scale: float, length: int) -> tuple[int, int]:
    """The pixels of an axis that a filter reads for the part from `start` to `end`."""
    reach = math.ceil(LARGEST_SUPPORT * max(scale, 1)) + 1
    return max(0, math.floor(start) - reach), min(length, math.ceil(end) + reach)


def _squashed(side: int, spec: Preprocessing) -> int:
    """`resize_to` is for the shorter side of the crop; the other keeps the crop's aspect."""
    return round(side * spec.resize_to / min(spec.width, spec.height))


@dataclass(frozen=True, slots=True)
class _Axis:
    """Along one axis: which part of the resized image is kept, and where it lands in the crop."""

    start: int
    length: int
    pad: int


def _crop(resized: int, crop: int, spec: Preprocessing) -> _Axis:
    # torchvision's CenterCrop: the odd pixel of padding goes after, the crop's half pixel to the even side
    if resized <= crop:
        return _Axis(0, resized, (crop - resized) // 2)
    spare = resized - crop
    return _Axis(spare // 2 if spec.odd_crop == "down" else round(spare / 2), crop, 0)
