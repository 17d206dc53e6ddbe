"""Two views of each image, made in batches and one image at a time: `python -m benchmarks.augment`.

The views are SimCLR's, of uint8 images that are in memory already: crop, resize, flip, jitter, grayscale,
blur (from 65 pixels on), normalise. "ours" is `training.augment` on whole batches, drawing included;
"torchvision" is torchvision's v2 transforms on one image after the other, as in the worker of a data loader.
By turns, so that what else the machine does hits both alike. A CUDA device is measured where there is one.
Needs the extra 'train'.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version

import torch
from torch import Tensor

from benchmarks.machine import machine
from training import torchvision_ops
from training.augment import IMAGENET_MEAN, IMAGENET_STD, augment, draw, plan
from training.views import Augmentation, View

torchvision_ops.register()
from torchvision.transforms import v2  # noqa: E402 - torchvision may need the operators above


@dataclass(frozen=True)
class Case:
    size: int
    batch: int
    """Images of a batch on the CPU; a CUDA device gets eight times as many."""
    singles: int
    """Images that torchvision makes views of, in one round."""


CASES = (Case(32, 128, 128), Case(64, 128, 128), Case(224, 32, 16))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch on the CPU, for both")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{machine()}, torch {version('torch')}, torchvision {version('torchvision')}")
    print(f"{options.threads} thread(s) of PyTorch on the CPU; medians of {options.rounds} rounds")
    if torch.cuda.is_available():
        print(torch.cuda.get_device_name())
    print("\n| size | where | batch | ours, images/s | torchvision on the CPU, images/s | ratio |")
    print("|---|---|---|---|---|---|")
    for case in CASES:
        ours, theirs = on_cpu(case, options.rounds)
        report(case.size, "CPU", case.batch, ours, theirs)
        if torch.cuda.is_available():
            report(case.size, "CUDA", 8 * case.batch, on_cuda(case, options.rounds), theirs)


def report(size: int, where: str, batch: int, ours: float, theirs: float) -> None:
    print(f"| {size} | {where} | {batch} | {ours:,.0f} | {theirs:,.0f} | {ours / theirs:.1f} |", flush=True)


def on_cpu(case: Case, rounds: int) -> tuple[float, float]:
    """Images a second that get two views: ours and torchvision's, the medians."""
    view, stored = Augmentation.suited_to(case.size).view(case.size), pixels(case.batch, case.size)
    singles = list(pixels(case.singles, case.size).permute(0, 3, 1, 2).contiguous())
    transform = torchvisions(view)

    def one_by_one() -> None:
        for image in singles:
            transform(image), transform(image)

    ours, theirs = [], []
    batched = two_views(view, stored)
    batched()
    one_by_one()
    for _ in range(rounds):
        ours.append(len(stored) / seconds(batched))
        theirs.append(len(singles) / seconds(one_by_one))
    return statistics.median(ours), statistics.median(theirs)


def on_cuda(case: Case, rounds: int) -> float:
    view = Augmentation.suited_to(case.size).view(case.size)
    stored = pixels(8 * case.batch, case.size).cuda()
    batched = two_views(view, stored)

    def finished() -> None:
        for _ in range(10):
            batched()
        torch.cuda.synchronize()

    finished()
    return 10 * len(stored) / statistics.median(seconds(finished) for _ in range(rounds))


def two_views(view: View, stored: Tensor) -> Callable[[], None]:
    generator = torch.Generator().manual_seed(0)
    aspect = torch.ones(len(stored))

    def make() -> None:
        for _ in range(2):
            drawn = draw(view, aspect, generator)
            augment(stored, plan(view, drawn, stored_size=stored.shape[1], device=stored.device))

    return make


def torchvisions(view: View) -> Callable[[Tensor], Tensor]:
    brightness, contrast, saturation, hue = view.jitter
    steps: list[Callable[[Tensor], Tensor]] = [
        v2.RandomResizedCrop(view.size, scale=view.scale, ratio=view.ratio, antialias=True),
        v2.RandomHorizontalFlip(view.flip),
        v2.RandomApply([v2.ColorJitter(brightness, contrast, saturation, hue)], view.jitter_probability),
        v2.RandomGrayscale(view.grayscale),
    ]
    if view.blur:
        steps.append(v2.RandomApply([v2.GaussianBlur(int(0.1 * view.size) | 1, view.blur_sigma)], view.blur))
    steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(IMAGENET_MEAN), list(IMAGENET_STD))]
    return v2.Compose(steps)  # type: ignore[no-any-return]


def pixels(count: int, side: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8, generator=generator)


def seconds(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
