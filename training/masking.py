"""Which patches a masked-image method hides: a few rectangles in each image."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["block_masks"]

LEAST_BLOCK = 4
"""Patches of the smallest rectangle that is aimed at."""
ASPECT = 0.3
"""Height ÷ width of a rectangle lies between this and its inverse."""
ROUNDS = 8
"""Rectangles tried for each image; on 14 × 14 patches they fill 99% of what is wanted."""


def block_masks(
    images: int, height: int, width: int, *, share: tuple[float, float], generator: torch.Generator
) -> Tensor:
    """Draws blockwise masks (Bao et al. 2022, algorithm 1, as in iBOT and DINOv2), for all images at once.

    How many patches of an image are hidden is drawn first, evenly within `share`. Rectangles follow, each of
    an area of up to what is still wanted. Where the paper goes on until a rectangle fits, here each image has
    a fixed number of tries, and the few patches still wanted then are drawn singly: the number is exact.

    Args:
        images: B.
        height: Patches in a column.
        width: Patches in a row.
        share: Least and largest share of an image's patches, within 0..1. At least one patch is hidden.
        generator: On the CPU.

    Returns:
        bool [B, height · width] on the CPU, rows of patches from the top left.
    """

    def uniform(least: float | Tensor, most: float | Tensor) -> Tensor:
        return least + (most - least) * torch.rand(images, generator=generator)

    patches = height * width
    wanted = (uniform(*share) * patches).round().clamp(min=1)
    masks = torch.zeros(images, height, width, dtype=torch.bool)
    rows, columns = torch.arange(height)[None, :, None], torch.arange(width)[None, None, :]
    for _ in range(ROUNDS):
        left = wanted - masks.sum((1, 2))
        area = uniform(left.clamp(max=LEAST_BLOCK), left)
        aspect = uniform(math.log(ASPECT), -math.log(ASPECT)).exp()
        tall = (area * aspect).sqrt().round().clamp(1, height)
        wide = (area / aspect).sqrt().round().clamp(1, width)
        top = uniform(0, height - tall + 1).floor()[:, None, None]
        start = uniform(0, width - wide + 1).floor()[:, None, None]
        inside = (rows >= top) & (rows < top + tall[:, None, None])
        inside = inside & (columns >= start) & (columns < start + wide[:, None, None])
        fits = (inside & ~masks).sum((1, 2)) <= left
        masks |= inside & fits[:, None, None]
    # Hidden patches come first in the order, then the others at random; the first ones are hidden.
    priority = masks.flatten(1) + torch.rand(images, patches, generator=generator)
    return priority.argsort(1, descending=True).argsort(1) < wanted[:, None]
