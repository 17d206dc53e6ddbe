"""Crop, resize, flip and blur: against torchvision, and against the definition written out in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

torch = pytest.importorskip("torch", reason="torch is not installed (extra 'train')")

from torch import Tensor  # noqa: E402

from training import torchvision_ops  # noqa: E402
from training.augment import crop_resize  # noqa: E402
from training.augment.geometry import _gaussians, blur  # noqa: E402

torchvision_ops.register()
import torchvision.transforms.v2.functional as F  # noqa: E402

Matrix = NDArray[np.float64]


def images(count: int, side: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def no_flip(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.bool)


def triangle_filter(start: float, length: float, size: int, source: int, inside_only: bool) -> Matrix:
    """[size, source], one weight at a time: the antialiased bilinear filter over a box of pixels."""
    weights = np.zeros((size, source))
    step = length / size
    for output in range(size):
        middle = start + (output + 0.5) * step
        for pixel in range(source):
            distance = abs(pixel + 0.5 - middle) / max(step, 1)
            covered = min(pixel + 1, start + length) - max(pixel, start) if inside_only else 1
            weights[output, pixel] = max(1 - distance, 0) * min(max(covered, 0), 1)
    return weights / weights.sum(1, keepdims=True)


BOXES = [(0, 0, 28, 28), (3, 5, 7, 11), (10, 2, 18, 4), (27, 27, 1, 1), (0, 4, 28, 3), (5, 5, 16, 20)]
"""Left, top, width, height in pixels of a square of 28."""


@pytest.mark.parametrize("size", [1, 8, 14, 28, 50])
def test_a_box_of_whole_pixels_equals_torchvisions_crop_and_antialiased_resize(size: int) -> None:
    pictures = images(len(BOXES), 28)
    flip = torch.arange(len(BOXES)) % 2 == 1
    ours = crop_resize(pictures, torch.tensor(BOXES) / 28, size, flip)
    for picture, (left, top, width, height), mirrored, got in zip(pictures, BOXES, flip, ours, strict=True):
        expected = F.resized_crop(picture, top, left, height, width, [size, size], antialias=True)
        expected = F.horizontal_flip(expected) if mirrored else expected
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("inside_only", [True, False])
@pytest.mark.parametrize("size", [5, 24])
def test_any_box_equals_the_filter_written_out(size: int, inside_only: bool) -> None:
    side, count = 16, 12
    generator = torch.Generator().manual_seed(1)
    start, extent = torch.rand(2, count, 2, generator=generator)
    extent = 0.02 + 0.98 * extent
    box = torch.cat((start * (1 - extent), extent), 1)
    pictures = images(count, side)
    ours = crop_resize(pictures, box, size, no_flip(count), inside_only=inside_only)
    for picture, got, (left, top, width, height) in zip(pictures, ours, (box * side).tolist(), strict=True):
        across = triangle_filter(left, width, size, side, inside_only)
        down = triangle_filter(top, height, size, side, inside_only)
        expected = down @ picture.double().numpy() @ across.T
        np.testing.assert_allclose(got.numpy(), expected, atol=2e-5)


def test_reading_beyond_the_box_equals_resizing_the_whole_and_then_cutting() -> None:
    picture = images(1, 40)
    whole = F.resize(picture, [20, 20], antialias=True)
    box = torch.tensor([[0.2, 0.3, 0.5, 0.5]])
    ours = crop_resize(picture, box, 10, no_flip(1), inside_only=False)
    torch.testing.assert_close(ours, whole[:, :, 6:16, 4:14], rtol=0, atol=1e-5)
    cut_first = crop_resize(picture, box, 10, no_flip(1))
    torch.testing.assert_close(cut_first[:, :, 1:-1, 1:-1], ours[:, :, 1:-1, 1:-1], rtol=0, atol=1e-5)
    assert (cut_first - ours).abs().max() > 0.01  # at the border


def test_the_whole_square_in_its_own_size_is_the_image_itself() -> None:
    pictures = images(3, 17)
    box = torch.tensor([0.0, 0, 1, 1]).expand(3, 4)
    torch.testing.assert_close(crop_resize(pictures, box, 17, no_flip(3)), pictures, rtol=0, atol=1e-5)


def test_a_flip_mirrors_left_and_right_of_that_image_alone() -> None:
    pictures = images(1, 12).expand(2, 3, 12, 12)
    box = torch.tensor([0.1, 0.2, 0.7, 0.5]).expand(2, 4)
    plain, mirrored = crop_resize(pictures, box, 9, torch.tensor([False, True]))
    torch.testing.assert_close(mirrored, plain.flip(-1), rtol=0, atol=1e-6)
    assert not torch.allclose(mirrored, plain, atol=1e-2)


def test_a_plain_image_stays_plain_however_small_the_box() -> None:
    generator = torch.Generator().manual_seed(0)
    extent = 10 ** (-5 * torch.rand(500, 2, generator=generator))
    box = torch.cat((torch.rand(500, 2, generator=generator) * (1 - extent), extent), 1)
    box[0] = torch.tensor([1 - 1e-5, 0, 1e-5, 1e-5])  # a sliver at the border
    ours = crop_resize(torch.full((500, 3, 32, 32), 0.7), box, 8, no_flip(500))
    torch.testing.assert_close(ours, torch.full_like(ours, 0.7), rtol=0, atol=1e-5)


def test_boxes_do_not_mix_images() -> None:
    pictures = torch.stack([torch.full((3, 8, 8), float(value)) for value in range(5)])
    box = torch.tensor([0.25, 0.25, 0.5, 0.5]).expand(5, 4)
    ours = crop_resize(pictures, box, 4, no_flip(5))
    assert torch.equal(ours.mean((1, 2, 3)).round(), torch.arange(5.0))


@pytest.mark.parametrize(("size", "kernel"), [(32, 3), (64, 7), (96, 9), (224, 23)])
def test_the_blur_equals_torchvisions(size: int, kernel: int) -> None:
    pictures = images(3, size)
    sigma = torch.tensor([0.1, 0.7, 2.0]) * size / 224
    for got, picture, deviation in zip(blur(pictures, sigma), pictures, sigma.tolist(), strict=True):
        expected = F.gaussian_blur(picture, [kernel, kernel], [deviation, deviation])
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-6)


def test_the_blur_equals_its_definition_with_mirrored_borders() -> None:
    size, reach, sigma = 30, 1, 0.8
    picture = images(1, size)
    padded = np.pad(picture[0].double().numpy(), ((0, 0), (reach, reach), (reach, reach)), mode="reflect")
    taps = np.array([math.exp(-(d**2) / (2 * sigma**2)) for d in range(-reach, reach + 1)])
    taps /= taps.sum()
    expected = np.zeros((3, size, size))
    for y in range(size):
        for x in range(size):
            window = padded[:, y : y + 2 * reach + 1, x : x + 2 * reach + 1]
            expected[:, y, x] = (window * np.outer(taps, taps)).sum((1, 2))
    np.testing.assert_allclose(blur(picture, torch.tensor([sigma]))[0].numpy(), expected, atol=1e-6)


def test_a_view_too_small_for_a_kernel_is_not_blurred() -> None:
    pictures = images(2, 8)
    assert torch.equal(blur(pictures, torch.tensor([1.0, 2.0])), pictures)


def test_the_blurs_filters_hold_no_subnormal_numbers_which_make_a_cpu_crawl() -> None:
    matrices = _gaussians(torch.linspace(0.1, 2, 40), 224, 11)
    positive = matrices[matrices > 0]
    assert positive.min() > 1e-12
    torch.testing.assert_close(matrices.sum(-1), torch.ones(40, 224))
