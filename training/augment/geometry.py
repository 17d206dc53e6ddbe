"""Crop, antialiased resize and flip of a batch as two matrix products; blur as two more.

Every image has its own filters, written as dense matrices: out[b] = down[b] · image[b] · across[b]ᵀ. This is
more arithmetic than a loop over images would do, and far fewer kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad, threshold

__all__ = ["blur", "crop_resize"]


def crop_resize(images: Tensor, box: Tensor, size: int, flip: Tensor, *, inside_only: bool = True) -> Tensor:
    """Cuts a box out of each image, resizes it to `size` × `size` and mirrors some.

    Equals a crop followed by a bilinear resize with antialiasing (Pillow; torchvision with antialias=True)
    where a box lies on whole pixels. Elsewhere the pixels on its border count by the share of them inside.

    Args:
        images: float32 [B, 3, S, S].
        box: float32 [B, 4], on the same device: left, top, width, height as shares of S. Not empty.
        size: Pixels of a side of the result.
        flip: bool [B], on the same device.
        inside_only: Whether the filter stops at the border of the box, as where the crop comes first. If not,
            it reads the pixels around it, as where the whole image is resized and then cut.

    Returns:
        float32 [B, 3, size, size].
    """
    count, _, source, _ = images.shape
    left, top, width, height = (box * source).unbind(1)
    ascending = torch.arange(size, device=images.device, dtype=torch.float32)
    columns = torch.where(flip[:, None], ascending.flip(0), ascending)
    down, across = _triangles(
        torch.stack((top, left)),
        torch.stack((height, width)),
        torch.stack((ascending.expand(count, size), columns)),
        source,
        inside_only,
    )
    return _filtered(images, down, across)


def _triangles(start: Tensor, length: Tensor, outputs: Tensor, source: int, inside_only: bool) -> Tensor:
    """[..., size, source]: the weight of each source pixel in each output; rows sum to 1.

    Args:
        start, length: [...] in source pixels.
        outputs: [..., size]: the position 0..size-1 that each row computes.
    """
    step = (length / outputs.shape[-1])[..., None]
    middle = start[..., None] + (outputs + 0.5) * step
    reach = step.clamp(min=1)[..., None]  # wider where it shrinks: that is the antialiasing
    pixel = torch.arange(source, device=outputs.device, dtype=outputs.dtype)
    weights = (pixel + 0.5) - middle[..., None]
    torch.sub(reach, weights.abs_(), out=weights)
    weights.clamp_(min=0)
    if inside_only:
        end = (start + length)[..., None]
        inside = torch.minimum(pixel + 1, end) - torch.maximum(pixel, start[..., None])
        weights.mul_(inside.clamp_(0, 1)[..., None, :])
    return weights.div_(weights.sum(-1, keepdim=True))


def blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur as in SimCLR: the kernel covers a tenth of the side, borders are mirrored.

    Args:
        images: float32 [B, 3, size, size].
        sigma: float32 [B] in pixels, above 0.
    """
    size = images.shape[-1]
    reach = (int(0.1 * size) | 1) // 2
    if reach == 0:
        return images
    matrices = _gaussians(sigma, size, reach)
    return _filtered(images, matrices, matrices)


def _gaussians(sigma: Tensor, size: int, reach: int) -> Tensor:
    """[B, size, size]: row i holds the Gaussian around i; what falls over the border is mirrored into it."""
    distance = torch.arange(-reach, reach + 1, device=sigma.device, dtype=sigma.dtype)
    taps = torch.softmax(-0.5 * (distance / sigma[:, None]) ** 2, dim=1)
    # Taps that vanish in float32 are made 0: arithmetic on subnormal numbers takes a CPU many times as long.
    taps = threshold(taps, 1e-12, 0.0)
    around = size - 1 - reach
    # Row i of the windows starts at i, and that of a filter at size-1-i: hence the flip.
    matrices = pad(taps, (around, around)).unfold(1, size, 1).flip(1)
    # Left of the border, distance d from it shows what is d right of it; the border pixel is there once.
    corner = pad(taps[:, reach + 1 :], (0, reach - 1)).unfold(1, reach, 1)
    matrices[:, :reach, 1 : reach + 1] += corner
    matrices[:, -reach:, -reach - 1 : -1] += corner.flip(1, 2)
    return matrices


def _filtered(images: Tensor, down: Tensor, across: Tensor) -> Tensor:
    """down · image · acrossᵀ of [B, C, H, W], [B, h, H] and [B, w, W]: [B, C, h, w]."""
    count, channels, height, width = images.shape
    rows, columns = down.shape[1], across.shape[1]
    wide = torch.bmm(images.reshape(count, channels * height, width), across.transpose(1, 2))
    # Three copies of the filters, because a broadcast product takes five times as long on the CPU.
    down = down[:, None].expand(-1, channels, -1, -1).reshape(count * channels, rows, height)
    high = torch.bmm(down, wide.view(count * channels, height, columns))
    return high.view(count, channels, rows, columns)
