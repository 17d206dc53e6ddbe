"""Objects cut out by their transparency, and scenes with known masks made of them."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from embedserve.decode import FORMATS
from embedserve.errors import InvalidField
from training.data import Source
from training.data.source import LIMITS

__all__ = ["Cutouts", "Scene", "find_cutouts", "make_scene", "read_cutout"]

LEAST, MOST = 0.02, 0.95
"""Shares of an image that its opaque part may cover to count as an object on a ground."""


@dataclass(frozen=True, slots=True)
class Cutouts:
    """The images of a source that have an object on transparent ground."""

    source: Source
    rows: NDArray[np.int64]
    """[n], in the order in which they were drawn."""


@dataclass(frozen=True, slots=True, eq=False)
class Scene:
    """A square picture with one object, and where that is."""

    pixels: NDArray[np.uint8]
    """[size, size, 3]."""
    mask: NDArray[np.float32]
    """[size, size]: how opaque the object is, 0..1."""


def read_cutout(source: Source, row: int) -> Image.Image | None:
    """An image with its transparency: RGBA and upright. None where it has none, or cannot be read."""
    try:
        data = source.fetch(row)
        if not isinstance(data, bytes):
            return None
        reader = next((reader for matches, reader in FORMATS.values() if matches(data)), None)
        if reader is None:
            return None
        with reader(io.BytesIO(data)) as image:
            if image.width * image.height > LIMITS.max_pixels or not image.has_transparency_data:
                return None
            return ImageOps.exif_transpose(image).convert("RGBA")
    except Exception:  # noqa: BLE001 -- readers raise anything on a damaged file, and one file decides nothing
        return None


def find_cutouts(source: Source, *, most: int, least: int, seed: int, evaluation: str) -> Cutouts:
    """Draws images whose opaque part is an object: between 2% and 95% of the area.

    Args:
        most: Images at most.
        least: Images at least.
        seed: Of the draw.
        evaluation: Its name, for the message.

    Raises:
        InvalidField: There are fewer than `least`.
    """
    found: list[int] = []
    for row in np.random.default_rng(seed).permutation(len(source)).tolist():
        image = read_cutout(source, row)
        if image is not None and LEAST <= _opaque(image) <= MOST:
            found.append(row)
            if len(found) == most:
                break
    if len(found) < least:
        raise InvalidField(
            f"{evaluation} takes its masks from transparency, and {len(found)} of {len(source):,} images of "
            f"'{source.name}' show an object on transparent ground; at least {least} are needed. Give PNG or "
            "WebP files with an alpha channel, such as clip art or cut-out products.",
            param="data",
        )
    return Cutouts(source, np.array(found, np.int64))


def make_scene(cutout: Image.Image, size: int, chance: np.random.Generator) -> Scene:
    """Pastes an object at a random place and size on a ground of random colours.

    On the white that decoding puts under transparency a mask would be the question of what is not white.
    The ground has coarse blotches and more or less fine ones, from smooth to noisy, so that neither its
    colour nor its smoothness gives it away.

    Args:
        cutout: RGBA.
        size: Pixels of a side of the scene.
        chance: Draws ground, size (40% to 80% of the side) and place.
    """
    coarse = _blotches(int(chance.integers(1, 6)), size, chance)
    fine = _blotches(max(6, size // 6), size, chance)
    share = chance.choice([0.0, 0.1, 0.3])
    ground = Image.fromarray(((1 - share) * coarse + share * fine).astype(np.uint8))
    box = cutout.getchannel("A").getbbox()
    found = cutout if box is None else cutout.crop(box)
    scale = size * chance.uniform(0.4, 0.8) / max(found.size)
    wide, high = max(1, round(found.width * scale)), max(1, round(found.height * scale))
    small = found.resize((wide, high), Image.Resampling.BILINEAR)
    place = int(chance.integers(size - wide + 1)), int(chance.integers(size - high + 1))
    ground.paste(small, place, small)
    mask = Image.new("L", (size, size))
    mask.paste(small.getchannel("A"), place)
    return Scene(np.asarray(ground), np.asarray(mask, np.float32) / np.float32(255))


def _blotches(cells: int, size: int, chance: np.random.Generator) -> NDArray[np.float64]:
    noise = Image.fromarray(chance.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
    return np.asarray(noise.resize((size, size), Image.Resampling.BICUBIC), np.float64)


def _opaque(image: Image.Image) -> float:
    """Share of the area, 0..1."""
    return float((np.asarray(image.getchannel("A")) >= 128).mean())
