"""From stored pixels to the normalised views that a network takes, and back to pixels for pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from training.augment.colour import JitterPlan, jitter_, luma, plan_jitter, solarize
from training.augment.drawing import Parameters
from training.augment.geometry import blur, crop_resize
from training.views import View

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "Plan", "augment", "centre", "evaluation_share", "plan", "show"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Of red, green and blue in 0..1, over ImageNet's training images."""

CHUNK = 2**18
"""Pixels of a plane that a CPU works on at a time, so that what one operation wrote is still in its cache for
the next. Whole batches of 128 took 1.3 times as long at 64 × 64 (Xeon with 2 MiB of cache for each core)."""


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """All that one view of a batch takes, worked out and packed on the CPU. Make it with `plan`."""

    count: int
    size: int
    device: torch.device
    parts: tuple[_Part, ...]


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    rows: slice
    jitter: JitterPlan
    packed: Tensor
    """uint8, page-locked for a GPU: the tensors of `like`, for one copy."""
    like: tuple[Tensor, ...]


def plan(
    view: View,
    parameters: Parameters,
    *,
    stored_size: int,
    device: torch.device,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Plan:
    """Works out what `augment` is going to do; a background thread can be ahead with it.

    Args:
        view: Of which the parameters were drawn.
        parameters: One for each image of the batch, from `draw`.
        stored_size: Pixels of a side of the stored squares.
        device: Where the pixels are.
        mean, std: Of the three channels in 0..1; the result is (x - mean) / std.
    """
    normal = _normal(mean, std)
    parts = []
    for rows in _chunks(len(parameters), max(view.size, stored_size), device):
        some = parameters.rows(rows)
        jitter = plan_jitter(some)
        gray, blurred, solarized = (
            mask.nonzero()[:, 0] for mask in (some.gray, some.sigma > 0, some.solarize)
        )
        like = (
            some.box,
            some.flip,
            jitter.rows,
            jitter.coefficients,
            jitter.turns,
            gray,
            blurred,
            some.sigma[blurred],
            solarized,
            normal,
        )
        parts.append(_Part(rows, jitter, _packed(like, device), like))
    return Plan(len(parameters), view.size, device, tuple(parts))


@torch.no_grad()
def augment(pixels: Tensor, work: Plan) -> Tensor:
    """Makes one view of each image.

    Nothing here waits for the GPU: which rows an operation touches is known from the plan, and what the GPU
    needs of it travels in one copy.

    Args:
        pixels: uint8 [B, S, S, 3].
        work: From `plan`, for B images on the device of `pixels`.

    Returns:
        float32 [B, 3, size, size] on the device of `pixels`, outside the graph of gradients.

    Raises:
        ValueError: The pixels are no such tensor, or the plan is for another number of images.
    """
    _check(pixels, work.count)
    views = torch.empty(len(pixels), 3, work.size, work.size, device=pixels.device)
    with _full_precision(pixels.device):
        for part in work.parts:
            _augment(pixels[part.rows], work.size, part, views[part.rows])
    return views


def _augment(pixels: Tensor, size: int, part: _Part, out: Tensor) -> None:
    box, flip, rows, coefficients, turns, gray, blurred, sigma, solarized, normal = _unpacked(
        part.packed.to(pixels.device, non_blocking=True), part.like
    )
    jitter = replace(part.jitter, rows=rows, coefficients=coefficients, turns=turns)
    images = crop_resize(planes(pixels), box, size, flip)
    images = _only(images, rows, lambda some: jitter_(some, jitter))
    images = _only(images, gray, lambda some: luma(some).expand_as(some))
    images = _only(images, blurred, lambda some: blur(some, sigma))
    images = _only(images, solarized, solarize)
    _normalize(images, normal, out)


def evaluation_share(size: int, stored_size: int) -> float:
    """The share of an image's shorter side that evaluation and serving see, for `centre`.

    7/8 (resize to 256, cut 224) where images are stored larger than they are seen; all of it where they are
    not, as with small images, whose borders are not to spare.
    """
    return 7 / 8 if stored_size > size else 1.0


@torch.no_grad()
def centre(
    pixels: Tensor,
    aspect: Tensor,
    size: int,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    share: float = 1.0,
) -> Tensor:
    """The evaluation view: the middle square of each original, as serving cuts it.

    Args:
        pixels: uint8 [B, S, S, 3].
        aspect: float32 [B] on the CPU: width ÷ height of the originals.
        size: Pixels of a side of the result.
        mean, std: As in `augment`.
        share: Of the original's shorter side that the square covers: 224/256 where serving resizes to 256
            and cuts 224, 1 where it cuts nothing off that side.

    Returns:
        float32 [B, 3, size, size] on the device of `pixels`.

    Raises:
        ValueError: the pixels are no such tensor, or there are not as many aspects.
    """
    _check(pixels, len(aspect))
    boxes = _central_boxes(aspect.float(), size, round(size / share))
    like = (boxes, torch.zeros(len(aspect), dtype=torch.bool), _normal(mean, std))
    packed = _packed(like, pixels.device)
    box, flip, normal = _unpacked(packed.to(pixels.device, non_blocking=True), like)
    views = torch.empty(len(pixels), 3, size, size, device=pixels.device)
    with _full_precision(pixels.device):
        for rows in _chunks(len(pixels), max(size, pixels.shape[1]), pixels.device):
            images = crop_resize(planes(pixels[rows]), box[rows], size, flip[rows], inside_only=False)
            _normalize(images, normal, views[rows])
    return views


def _central_boxes(aspect: Tensor, size: int, resize_to: int) -> Tensor:
    """[B, 4]: `size` × `size` from the middle of images whose shorter side became `resize_to`, as shares.

    Rounded to whole pixels as `embedserve.preprocess` does, which can move the square by half a pixel.
    """
    shapes = torch.stack((aspect, 1 / aspect), dim=1).clamp(min=1)
    shapes = (resize_to * shapes + 1e-3).floor()  # float32 may fall just short of a whole number of pixels
    starts = ((shapes - size) / 2).round()  # half to even, like Python's
    return torch.cat((starts / shapes, size / shapes), dim=1)


def show(view: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Pixels of views, for pictures: uint8 [B, size, size, 3] of what `augment` or `centre` gave."""
    normal = torch.tensor((tuple(mean), tuple(std)), dtype=torch.float32).to(view.device)
    pixels = view.detach().float().permute(0, 2, 3, 1) * normal[1] + normal[0]
    return (pixels * 255).round_().clamp_(0, 255).to(torch.uint8)


def _full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Autocast would make the filters' products half precision: colours in steps of 1/256 and coarser."""
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else nullcontext()


def _chunks(count: int, side: int, device: torch.device) -> Iterator[slice]:
    step = max(1, CHUNK // side**2) if device.type == "cpu" else max(1, count)
    return (slice(start, start + step) for start in range(0, count, step))


def planes(pixels: Tensor) -> Tensor:
    """uint8 [B, S, S, 3] → float32 [B, 3, S, S] in 0..1."""
    count, height, width, channels = pixels.shape
    planes = torch.empty(count, channels, height, width, device=pixels.device)
    return planes.copy_(pixels.permute(0, 3, 1, 2)).mul_(1 / 255)


def _normal(mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """float32 [2, 3]: what to multiply by, what to add."""
    deviation = torch.tensor(tuple(std), dtype=torch.float32)
    return torch.stack((1 / deviation, -torch.tensor(tuple(mean), dtype=torch.float32) / deviation))


def _normalize(images: Tensor, normal: Tensor, out: Tensor) -> None:
    gain, shift = normal[:, :, None, None]
    torch.addcmul(shift, images, gain, out=out)


def _only(images: Tensor, rows: Tensor, operation: Callable[[Tensor], Tensor]) -> Tensor:
    """Applies an operation to some rows, each named once; it gets a copy and may overwrite it."""
    if not len(rows):
        return images
    return images.index_copy_(0, rows, operation(images.index_select(0, rows)))


def _packed(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """uint8 [bytes]: all of them, each beginning at a multiple of 8 bytes, as int64 has to."""
    parts = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors]
    packed = torch.cat([torch.nn.functional.pad(part, (0, -len(part) % 8)) for part in parts])
    # A copy from memory that is not page-locked would wait for the GPU.
    return packed.pin_memory() if device.type == "cuda" else packed


def _unpacked(packed: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The tensors of `_packed`, of the types and shapes of `like`, on the device of `packed`."""
    tensors, start = [], 0
    for model in like:
        length = model.numel() * model.element_size()
        tensors.append(packed[start : start + length].view(model.dtype).view(model.shape))
        start += length + -length % 8
    return tensors


def _check(pixels: Tensor, count: int) -> None:
    good = pixels.dtype == torch.uint8 and pixels.ndim == 4 and pixels.shape[3] == 3
    if not good or pixels.shape[1] != pixels.shape[2]:
        raise ValueError(f"pixels are uint8 [B, S, S, 3], not {pixels.dtype} {list(pixels.shape)}")
    if len(pixels) != count:
        raise ValueError(f"{len(pixels)} images, but parameters or aspects for {count}")
