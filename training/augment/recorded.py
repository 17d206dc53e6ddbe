"""All views of a batch as one CUDA graph: the CPU hands over random numbers and goes on.

Operation by operation a view takes about a hundred kernels, and a CPU longer to start them than a GPU to run
them. Recorded, they start together. A graph has fixed shapes, so every operation is computed for every image
here and kept for those that drew it, where `pipeline.augment` works on lists of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from training.augment.colour import jitter_all, luma, solarize
from training.augment.drawing import COLUMNS, Parameters, shaped
from training.augment.geometry import blur, crop_resize
from training.augment.pipeline import IMAGENET_MEAN, IMAGENET_STD, planes
from training.views import View

__all__ = ["RecordedViews", "augment_all"]

WARM_UPS = 2
"""Runs before the recording, in which libraries allocate what they need."""


class RecordedViews:
    """Makes the views of batches of one size, on one GPU.

    Args:
        views: What to make.
        count: Images of a batch.
        stored_size: Pixels of a side of the stored squares.
        device: The GPU.
        compile: Fuse the operations with torch.compile first: a quarter of a minute for each kind of view.
    """

    def __init__(
        self,
        views: Sequence[View],
        *,
        count: int,
        stored_size: int,
        device: torch.device,
        compile: bool = False,
    ) -> None:
        self._views = tuple(views)
        kinds = {replace(view, of="image"): _maker(view, compile=compile) for view in views}
        self._makers = [kinds[replace(view, of="image")] for view in views]
        self._pixels = {
            of: torch.zeros(count, stored_size, stored_size, 3, dtype=torch.uint8, device=device)
            for of in {view.of for view in views}
        }
        self._drawn = torch.full((len(views), count, COLUMNS + 1), 0.5, device=device)
        self._normal = torch.tensor((IMAGENET_MEAN, IMAGENET_STD), device=device)
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream), torch.no_grad():
            for _ in range(WARM_UPS):
                self._make()
        torch.cuda.current_stream(device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        # Other threads may page-lock memory meanwhile.
        with torch.no_grad(), torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._made = self._make()

    def __call__(self, pixels: dict[str, Tensor], drawn: Tensor) -> list[Tensor]:
        """The views, float32 [count, 3, size, size] each; the next call overwrites them.

        Args:
            pixels: uint8 [count, S, S, 3] of the images and of their partners, on the GPU.
            drawn: float32 [views, count, COLUMNS + 1], page-locked, from `pack`.
        """
        for of, held in self._pixels.items():
            held.copy_(pixels[of])
        self._drawn.copy_(drawn, non_blocking=True)
        self._graph.replay()
        return self._made

    @staticmethod
    def pack(uniform: Sequence[Tensor], aspects: Sequence[Tensor]) -> Tensor:
        """What `__call__` takes: for each view the random values and the aspects of its images."""
        rows = [
            torch.cat((values, aspect[:, None]), 1) for values, aspect in zip(uniform, aspects, strict=True)
        ]
        return torch.stack(rows).pin_memory()

    def _make(self) -> list[Tensor]:
        return [
            make(self._pixels[view.of], drawn, self._normal)
            for view, make, drawn in zip(self._views, self._makers, self._drawn, strict=True)
        ]


def _maker(view: View, *, compile: bool) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def make(pixels: Tensor, drawn: Tensor, normal: Tensor) -> Tensor:
        return augment_all(pixels, view, shaped(view, drawn[:, -1], drawn[:, :-1]), normal)

    return torch.compile(make, dynamic=False) if compile else make


def augment_all(pixels: Tensor, view: View, parameters: Parameters, normal: Tensor) -> Tensor:
    """One view of each image, with the same work for every image.

    Args:
        pixels: uint8 [B, S, S, 3].
        view: Of which the parameters were drawn.
        parameters: B of them, on the device of `pixels`.
        normal: float32 [2, 3], mean and standard deviation of the channels in 0..1, on that device.

    Returns:
        float32 [B, 3, size, size].
    """
    with torch.autocast(pixels.device.type, enabled=False):
        images = crop_resize(planes(pixels), parameters.box, view.size, parameters.flip)
        if view.jitter_probability > 0 and any(view.jitter):
            images = jitter_all(images, parameters)
        if view.grayscale > 0:
            images = torch.where(_per_image(parameters.gray), luma(images), images)
        if view.blur > 0:
            blurred = blur(images, parameters.sigma.clamp(min=1e-3))
            images = torch.where(_per_image(parameters.sigma > 0), blurred, images)
        if view.solarize > 0:
            images = torch.where(_per_image(parameters.solarize), solarize(images), images)
        mean, std = normal[:, :, None, None]
        views: Tensor = (images - mean) / std
        return views


def _per_image(values: Tensor) -> Tensor:
    return values[:, None, None, None]
