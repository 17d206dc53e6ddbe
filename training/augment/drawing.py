"""Draws the parameters of a view for every image of a batch, on the CPU.

On the CPU, because then a seed gives the same views on every device, and because the rows that a rare
operation touches are known without asking the GPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from training.views import View

__all__ = [
    "BRIGHTNESS",
    "COLUMNS",
    "CONTRAST",
    "HUE",
    "SATURATION",
    "Parameters",
    "draw",
    "shaped",
    "uniforms",
]

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
"""The numbers of the four parts of the colour jitter in `Parameters.order`."""

TRIES = 10
"""Crops tried before the central fallback (Szegedy et al. 2015's crop as torchvision makes it)."""

COLUMNS = 2 * TRIES + 16
"""Random values for one view of one image."""

PUBLISHED_SIZE = 224
"""The size of view in which the papers state the blur."""


@dataclass(frozen=True, slots=True, eq=False)
class Parameters:
    """What was drawn for one view of B images. `draw` makes them on the CPU."""

    box: Tensor
    """float32 [B, 4]: left, top, width and height of the crop as shares 0..1 of the stored square."""
    flip: Tensor
    """bool [B]: mirrored left to right."""
    factors: Tensor
    """float32 [B, 3]: factors of brightness, contrast and saturation; 1 changes nothing."""
    hue: Tensor
    """float32 [B]: turns of the colour circle, -0.5..0.5."""
    order: Tensor
    """int64 [B, 4]: which part of the jitter comes first, second … (`BRIGHTNESS`, …, `HUE`)."""
    jitter: Tensor
    """bool [B]: whether the colour jitter is applied at all."""
    gray: Tensor
    """bool [B]: whether all colour is lost."""
    sigma: Tensor
    """float32 [B]: standard deviation of the blur in pixels of this view; 0 is no blur."""
    solarize: Tensor
    """bool [B]: whether values of 0.5 and more are inverted."""

    def __len__(self) -> int:
        return len(self.box)

    def rows(self, rows: slice) -> Parameters:
        """Those of some images: what one process takes of a batch that all processes drew alike."""
        return Parameters(*(getattr(self, field.name)[rows] for field in fields(self)))


def draw(view: View, aspect: Tensor, generator: torch.Generator) -> Parameters:
    """Draws every image its own parameters.

    The same number of random values is used whatever the view's probabilities are, so switching one
    operation off leaves the others as they were.

    Args:
        view: What to draw.
        aspect: float32 [B] on the CPU: width ÷ height of the originals.
        generator: A generator of the CPU.
    """
    return shaped(view, aspect, uniforms(len(aspect), generator))


def uniforms(count: int, generator: torch.Generator) -> Tensor:
    """All that is random about a view of `count` images: float32 [count, COLUMNS], uniform in 0..1."""
    return torch.rand(count, COLUMNS, generator=generator)


def shaped(view: View, aspect: Tensor, uniform: Tensor) -> Parameters:
    """The parameters that random values stand for, on their device. No value of a GPU is waited for.

    Args:
        view: What is drawn.
        aspect: float32 [B], on the same device.
        uniform: float32 [B, COLUMNS], from `uniforms`.
    """
    # A row belongs to one image; its columns are dealt out from left to right.
    area, ratio, place, factors, order, single = uniform.split_with_sizes([TRIES, TRIES, 2, 3, 4, 7], dim=1)
    flip, hue, jitter, gray, blur, sigma, solarize = single.unbind(1)
    *strengths, turn = view.jitter
    least, most = view.blur_sigma
    deviation = (least + (most - least) * sigma) * view.size / PUBLISHED_SIZE
    return Parameters(
        box=_boxes(view, aspect.float(), area, ratio, place),
        flip=flip < view.flip,
        factors=torch.stack(
            [
                _between(max(1 - strength, 0.0), 1 + strength, factor)
                for strength, factor in zip(strengths, factors.unbind(1), strict=True)
            ],
            dim=1,
        ),
        hue=(2 * hue - 1) * turn,
        order=order.argsort(dim=1, stable=True),
        jitter=jitter < view.jitter_probability,
        gray=gray < view.grayscale,
        sigma=torch.where(blur < view.blur, deviation, 0.0),
        solarize=solarize < view.solarize,
    )


def _between(low: float, high: float, share: Tensor) -> Tensor:
    return low + (high - low) * share


def _boxes(view: View, aspect: Tensor, area: Tensor, ratio: Tensor, place: Tensor) -> Tensor:
    """[B, 4] of shares: torchvision's RandomResizedCrop, for the whole batch and without rounding to pixels.

    The original is `aspect` wide and 1 high. Of ten crops the first that fits is taken, else the largest
    central one whose ratio is allowed.
    """
    narrowest, widest = view.ratio
    least, most = view.scale
    areas = aspect[:, None] * (least + (most - least) * area)
    ratios = (math.log(narrowest) + (math.log(widest) - math.log(narrowest)) * ratio).exp()
    widths, heights = (areas * ratios).sqrt(), (areas / ratios).sqrt()
    fits = (widths <= aspect[:, None]) & (heights <= 1)
    first = fits.int().argmax(dim=1, keepdim=True)  # argmax gives the first of equals
    central = ~fits.any(dim=1)
    width = torch.where(central, aspect.clamp(max=widest), widths.gather(1, first)[:, 0])
    height = torch.where(central, (aspect / narrowest).clamp(max=1), heights.gather(1, first)[:, 0])
    across, down = torch.where(central[:, None], 0.5, place).unbind(1)
    width = width / aspect
    return torch.stack(((1 - width) * across, (1 - height) * down, width, height), dim=1).clamp_(0, 1)
