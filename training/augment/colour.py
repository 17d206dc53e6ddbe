"""The colour operations of a batch, each image with its own strength and order. Values are 0..1, in place."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from training.augment.drawing import CONTRAST, HUE, SATURATION, Parameters

__all__ = ["JitterPlan", "jitter_", "jitter_all", "luma", "plan_jitter", "rotate_hue_", "solarize"]

LUMA = (0.2989, 0.587, 0.114)
"""ITU-R BT.601 as torchvision rounds it; Pillow's differs by .0001."""

ROUNDS = 4


@dataclass(frozen=True, slots=True)
class JitterPlan:
    """Who gets what in which round, worked out on the CPU.

    Brightness, contrast and saturation are one formula, x' = clamp(f·x + (1-f)·m, 0, 1), where m is 0, the
    image's mean luma or the pixel's luma. So in one round every image can have another of the three. And
    images need not keep step: what an image has before its hue rotation is done in rounds 0, 1, 2, then all
    hues are rotated at once, then comes what is left. Sorted by the round of the hue, the images that take
    part in a round stand side by side.
    """

    rows: Tensor
    """int64 [J]: the images that are jittered, in the order of the other fields."""
    before: tuple[slice, ...]
    """For each round: which of `rows` have this round before their hue."""
    after: tuple[slice, ...]
    """For each round: which of `rows` have this round after their hue."""
    coefficients: Tensor
    """float32 [rounds, 3, J]: f; 1-f where m is the mean luma, else 0; 1-f where m is the luma, else 0."""
    rotates: bool
    """Whether any hue is rotated."""
    turns: Tensor
    """float32 [J]: hue, in turns."""


def plan_jitter(parameters: Parameters) -> JitterPlan:
    """The plan for a batch, on the CPU. It leaves out images that jitter would not change."""
    changes = (parameters.factors != 1).any(1) | (parameters.hue != 0)
    rows = (parameters.jitter & changes).nonzero()[:, 0]
    hue_round, by_round = (parameters.order[rows] == HUE).int().argmax(1).sort(stable=True)
    rows = rows[by_round]
    order = parameters.order[rows].T
    ends = torch.bincount(hue_round, minlength=ROUNDS).cumsum(0).tolist()
    factors = torch.cat((parameters.factors, torch.ones(len(parameters), 1)), 1)[rows].T  # hue's stands idle
    factor = factors.gather(0, order)
    rest = 1 - factor
    turns = parameters.hue[rows]
    return JitterPlan(
        rows=rows,
        before=tuple(slice(end, len(rows)) for end in ends),
        after=tuple(slice(0, start) for start in (0, *ends[:-1])),
        coefficients=torch.stack((factor, rest * (order == CONTRAST), rest * (order == SATURATION)), dim=1),
        rotates=bool(turns.any()),
        turns=turns,
    )


def jitter_(images: Tensor, plan: JitterPlan) -> Tensor:
    """Jitters images [J, 3, H, W] (those of `plan.rows`), with the plan's tensors on the same device."""
    _blend_rounds_(images, plan.before, plan.coefficients)
    if plan.rotates:
        rotate_hue_(images, plan.turns)
    _blend_rounds_(images, plan.after, plan.coefficients)
    return images


def jitter_all(images: Tensor, parameters: Parameters) -> Tensor:
    """As `jitter_` with the plan of `parameters`, with the same work for every image: a GPU can record it.

    Args:
        images: [B, 3, H, W]. They are overwritten.
        parameters: B of them, on the device of `images`.
    """
    changes = parameters.jitter & ((parameters.factors != 1).any(1) | (parameters.hue != 0))
    hue_round = (parameters.order == HUE).int().argmax(1)
    ones = torch.ones_like(parameters.factors[:, :1])
    factors = torch.cat((parameters.factors, ones), 1).gather(1, parameters.order)
    rest = 1 - factors
    of_mean, of_luma = rest * (parameters.order == CONTRAST), rest * (parameters.order == SATURATION)

    def blend_round_(at: int, takes_part: Tensor) -> None:
        _blend_(
            images,
            torch.where(takes_part, factors[:, at], 1.0),
            torch.where(takes_part, of_mean[:, at], 0.0),
            torch.where(takes_part, of_luma[:, at], 0.0),
        )

    for at in range(ROUNDS - 1):
        blend_round_(at, changes & (hue_round > at))
    turned = rotate_hue_(images.clone(), parameters.hue)
    images = torch.where(_per_image(changes & (parameters.hue != 0)), turned, images)
    for at in range(1, ROUNDS):
        blend_round_(at, changes & (hue_round < at))
    return images


def _blend_rounds_(images: Tensor, rounds: tuple[slice, ...], coefficients: Tensor) -> None:
    for rows, of_round in zip(rounds, coefficients, strict=True):
        if rows.start < rows.stop:
            _blend_(images[rows], *of_round[:, rows].unbind())


def _blend_(images: Tensor, factor: Tensor, of_mean: Tensor, of_luma: Tensor) -> None:
    other = luma(images)
    mean = other.mean((2, 3), keepdim=True)
    other = torch.addcmul(mean * _per_image(of_mean), other, _per_image(of_luma), out=other)
    torch.addcmul(other, images, _per_image(factor), out=images).clamp_(0, 1)


def luma(images: Tensor) -> Tensor:
    """float32 [B, 1, H, W] of [B, 3, H, W]."""
    red, green, blue = images.tensor_split(3, dim=1)
    return (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def rotate_hue_(images: Tensor, turns: Tensor) -> Tensor:
    """Rotates the hue of HSV images [B, 3, H, W] by `turns` [B] (-1..1) and keeps saturation and value.

    Smith's hexcone (1978) written without cases. With the channels stretched to r, g, b of least 0 and
    greatest 1, the hue in sixths of a turn is ±(1 + g + b - r), negative where b > g. Back: red is
    clamp(|h - 3| - 1), green clamp(2 - |h - 2|) and blue clamp(2 - |h - 4|) for h of 0..6.
    """
    red, green, blue = images.unbind(1)
    low = torch.minimum(red, green)
    torch.minimum(low, blue, out=low)
    chroma = torch.maximum(red, green)
    torch.maximum(chroma, blue, out=chroma)
    chroma.sub_(low)
    hue = (green + blue).sub_(red).sub_(low)
    ramp = chroma.clamp(min=1e-12)  # gray has no hue: anything finite will do
    hue.div_(ramp).add_(1)
    torch.copysign(hue, torch.sub(green, blue, out=ramp), out=hue)
    hue.mul_(1 / 6).add_((turns + 2)[:, None, None]).frac_().mul_(6)  # frac() wants what is above 0
    torch.sub(hue, 3, out=ramp).abs_().sub_(1).clamp_(0, 1)
    red.copy_(torch.addcmul(low, ramp, chroma))
    for channel, middle in ((green, 2), (blue, 4)):
        torch.sub(hue, middle, out=ramp).abs_().neg_().add_(2).clamp_(0, 1)
        channel.copy_(torch.addcmul(low, ramp, chroma))
    return images


def solarize(images: Tensor) -> Tensor:
    """Inverts the values of 0.5 and more."""
    return torch.where(images >= 0.5, 1 - images, images)


def _per_image(values: Tensor) -> Tensor:
    return values[:, None, None, None]
