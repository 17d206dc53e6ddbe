"""Which patches a student has to fill in: those of a few rectangles in one crop of each image."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from training.distributed import rank, world_size
from training.seeding import generator as seeded

__all__ = ["Hidden", "block_masks", "hide"]

LEAST_BLOCK = 4
"""Patches of the smallest rectangle that is aimed at."""
ASPECT = 0.3
"""Height ÷ width of a rectangle lies between this and its inverse."""
ROUNDS = 8
"""Rectangles tried for each image; on 14 × 14 patches they fill 99% of what is wanted."""

MASKS, CROPS = 3, 4
"""Set the random numbers of masks, and of the crop that is masked, apart from others of the same step."""


@dataclass(frozen=True, slots=True)
class Hidden:
    """What is hidden of the two full-size crops of B images, those of the first crop first.

    It is made on the CPU: how many patches are hidden is known without asking the GPU.
    """

    masks: Tensor
    """bool [2 · B, patches]; of the two crops of an image one has hidden patches."""
    at: Tensor
    """int64 [M], where masks.flatten() is True."""
    weights: Tensor
    """float64 [M]: for a mean over the hidden patches of a crop, then over all 2 · B crops."""

    def to(self, device: torch.device) -> Hidden:
        """A copy on the device, without waiting for it."""
        parts = (self.masks, self.at, self.weights)
        pinned = [one.pin_memory() for one in parts] if device.type == "cuda" else parts
        return Hidden(*(one.to(device, non_blocking=True) for one in pinned))


def hide(images: int, height: int, width: int, *, share: tuple[float, float], step: int) -> Hidden:
    """What this rank hides at a step: its share of the joined batch, the same however many ranks there are.

    iBOT and DINOv2 mask half of all crops, drawn freely. Here it is one of the two of each image: a crop is
    masked as often, and all ranks have the same number of masked crops.

    Args:
        images: B, of this rank.
        height, width, share: As in `block_masks`.
        step: Steps that are done.
    """
    everyone = images * world_size()
    mine = slice(rank() * images, (rank() + 1) * images)
    blocks = block_masks(everyone, height, width, share=share, generator=seeded(MASKS, step))[mine]
    second = (torch.rand(everyone, 1, generator=seeded(CROPS, step)) < 0.5)[mine]
    masks = torch.cat([blocks & ~second, blocks & second])
    counts = masks.sum(1)
    # The weight of a crop without hidden patches is infinite, and repeated no times.
    weights = (1 / (counts.double() * len(masks))).repeat_interleave(counts)
    return Hidden(masks, masks.flatten().nonzero()[:, 0], weights)


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
