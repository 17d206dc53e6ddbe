"""Open Clip Art as measuring and fitting material: about 5,400 drawings in the public domain.

Debian's package `openclipart-png` puts them in `DEFAULT_FOLDER`. The library has many doubles and near
doubles; each picture counts once. Its 1,378 stars, which differ by a point or two of up to a hundred, are
left out: no one could tell which of them a cropped and turned one was. 600 pictures, drawn with a fixed
seed, are kept for the benchmark `find the original`, and nothing is fitted on those.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from embedserve.bundle import Preprocessing
from embedserve.config import Limits
from embedserve.decode import decode
from embedserve.errors import EmbedServeError
from embedserve.preprocess import preprocess

__all__ = ["DEFAULT_FOLDER", "QUERIES", "held_out", "pictures"]

DEFAULT_FOLDER = Path("/usr/share/openclipart/png")
QUERIES = 600
LEFT_OUT = "shapes/stars/"
LIMITS = Limits(max_pixels=30_000_000)


def pictures(folder: Path, spec: Preprocessing) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """Each different picture below `folder`: its path from there, and its pixels as `spec` asks for them.

    Two pictures are the same when their pixels agree after shrinking to a quarter, in steps of 4 of 256.
    A few that no limit would admit (600 megapixels) are left out.

    Raises:
        FileNotFoundError: `folder` has no pictures.
    """
    seen: set[bytes] = set()
    for path in sorted(folder.rglob("*.png")):
        name = path.relative_to(folder).as_posix()
        if name.startswith(LEFT_OUT):
            continue
        try:
            pixels = preprocess(decode(path.read_bytes(), LIMITS), spec)
        except EmbedServeError:
            continue
        small = Image.fromarray(pixels).resize((spec.width // 4, spec.height // 4), Image.Resampling.BILINEAR)
        key = hashlib.sha256((np.asarray(small) // 4).tobytes()).digest()
        if key not in seen:
            seen.add(key)
            yield name, pixels
    if not seen:
        raise FileNotFoundError(
            f"'{folder}' has no PNG pictures; install Debian's openclipart-png, or name the folder with them."
        )


def held_out(names: list[str]) -> list[str]:
    """The 600 pictures kept for measuring, out of all of `pictures`; the same ones every time."""
    return random.Random(0).sample(names, min(QUERIES, len(names)))  # noqa: S311 -- a fixed draw is the point
