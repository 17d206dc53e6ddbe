"""Heat maps: which parts of an image its vector comes from, and which parts are like a text."""

from __future__ import annotations

import io
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from embedserve.bundle import ImageOutputs
from embedserve.errors import InvalidField

__all__ = ["Grid", "attention_grid", "overlay", "require_text_space", "similarity_grid"]

Grid = NDArray[np.float32]
"""One number for each cell: [rows, columns]."""

COLOURS = ((13, 8, 60), (92, 16, 128), (190, 45, 103), (245, 115, 45), (252, 225, 110))
"""From the lowest cell to the highest: ever lighter, so that the order survives printing in grey."""

STRENGTH = 0.65
"""How much of the colour covers the picture, which shows through in grey."""

FLAT = 1e-6
"""Where the cells differ by less than this share of the largest, the map is drawn without contrast."""


def attention_grid(attention: NDArray[np.float32], outputs: ImageOutputs, head: int | None = None) -> Grid:
    """What the embedding takes from each cell: one head's weights, or the mean of all heads.

    Args:
        attention: float32 [heads, cells] of one image.
        head: From 0; None is the mean.

    Raises:
        InvalidField: There is no such head.
    """
    if head is not None and not 0 <= head < len(attention):
        raise InvalidField(
            f"'head' is {head}; this encoder has {len(attention)} heads. Ask for 0 to {len(attention) - 1}, "
            "or leave 'head' out for their mean.",
            param="head",
        )
    weights = attention.mean(axis=0) if head is None else attention[head]
    grid: Grid = weights.reshape(outputs.rows, outputs.columns)
    return grid


def require_text_space(outputs: ImageOutputs) -> None:
    """Raises InvalidField, code `no_such_output`, unless the bundle says that patches are like texts."""
    if not outputs.text_space:
        raise InvalidField(
            "This encoder's patch vectors do not lie in the space of its texts, so they cannot be compared. "
            "Leave 'text' out for the attention, or serve a bundle with `text_space`.",
            param="text",
            code="no_such_output",
        )


def similarity_grid(patches: NDArray[np.float32], outputs: ImageOutputs, vector: NDArray[np.float32]) -> Grid:
    """Cosine of each cell's vector and `vector`, −1..1; 0 for a cell without direction.

    Args:
        patches: float32 [cells, dim] of one image.
        vector: float32 [dim], unit length.
    """
    lengths = np.maximum(np.linalg.norm(patches, axis=1), 1e-6)
    cosines: Grid = (patches @ vector / lengths).astype(np.float32)
    return cosines.reshape(outputs.rows, outputs.columns)


def overlay(pixels: NDArray[np.uint8], grid: Grid) -> bytes:
    """A PNG of `pixels` (uint8 [height, width, 3]) in grey, coloured by the grid.

    The colours go from the grid's lowest cell to its highest and blend between the middles of cells.
    """
    picture = Image.fromarray(pixels)
    low, high = float(grid.min()), float(grid.max())
    spread = high - low
    is_flat = spread <= FLAT * max(abs(low), abs(high))
    level = np.zeros_like(grid) if is_flat else (grid - low) / spread
    smooth = Image.fromarray(level.astype(np.float32), "F").resize(picture.size, Image.Resampling.BILINEAR)
    steps = np.rint(np.asarray(smooth).clip(0, 1) * 255).astype(np.uint8)
    heat = Image.fromarray(_ramp()[steps])
    file = io.BytesIO()
    Image.blend(picture.convert("L").convert("RGB"), heat, STRENGTH).save(file, "PNG")
    return file.getvalue()


@cache
def _ramp() -> NDArray[np.uint8]:
    """256 colours, uint8 [256, 3]."""
    at = np.linspace(0, 255, len(COLOURS))
    steps = np.arange(256)
    channels = [np.interp(steps, at, [colour[channel] for colour in COLOURS]) for channel in range(3)]
    return np.rint(np.stack(channels, axis=1)).astype(np.uint8)
