"""The colour operations: against torchvision one image and one operation at a time, and against colorsys."""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from itertools import permutations

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (extra 'train')")

from torch import Tensor  # noqa: E402

from training import torchvision_ops  # noqa: E402
from training.augment import Parameters  # noqa: E402
from training.augment.colour import jitter_, luma, plan_jitter, rotate_hue_, solarize  # noqa: E402
from training.augment.drawing import BRIGHTNESS, CONTRAST, HUE, SATURATION  # noqa: E402

torchvision_ops.register()
import torchvision.transforms.v2.functional as F  # noqa: E402

ADJUST: dict[int, Callable[[Tensor, float], Tensor]] = {
    BRIGHTNESS: F.adjust_brightness,
    CONTRAST: F.adjust_contrast,
    SATURATION: F.adjust_saturation,
    HUE: F.adjust_hue,
}


def images(count: int, side: int = 9) -> Tensor:
    """Random colours, and in each image some pixels that are black, white, gray or of pure colour."""
    pictures = torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(5))
    special = torch.tensor(
        [[0, 0, 0], [1, 1, 1], [0.5, 0.5, 0.5], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]]
    )
    pictures[:, :, 0, : len(special)] = special.T
    return pictures


def jitters(factors: Tensor, hue: Tensor, order: Tensor, jitter: Tensor | None = None) -> Parameters:
    count = len(factors)
    off = torch.zeros(count, dtype=torch.bool)
    return Parameters(
        box=torch.tensor([0.0, 0, 1, 1]).expand(count, 4),
        flip=off,
        factors=factors,
        hue=hue,
        order=order,
        jitter=~off if jitter is None else jitter,
        gray=off,
        sigma=torch.zeros(count),
        solarize=off,
    )


def jittered(pictures: Tensor, parameters: Parameters) -> Tensor:
    plan = plan_jitter(parameters)
    return pictures.index_copy(0, plan.rows, jitter_(pictures[plan.rows], plan))


@pytest.mark.parametrize("operation", [BRIGHTNESS, CONTRAST, SATURATION])
@pytest.mark.parametrize("factor", [0.0, 0.6, 1.0, 1.7])
def test_one_part_of_the_jitter_equals_torchvisions(operation: int, factor: float) -> None:
    pictures = images(2)
    factors = torch.ones(2, 3)
    factors[:, operation] = factor
    ours = jittered(pictures, jitters(factors, torch.zeros(2), torch.arange(4).expand(2, 4)))
    torch.testing.assert_close(ours, ADJUST[operation](pictures, factor), rtol=0, atol=2e-6)


@pytest.mark.parametrize("turns", [-0.5, -0.37, -0.1, 0.0, 1e-4, 0.25, 0.5])
def test_rotating_the_hue_equals_torchvisions(turns: float) -> None:
    pictures = images(3)
    ours = rotate_hue_(pictures.clone(), torch.full((3,), turns))
    torch.testing.assert_close(ours, F.adjust_hue(pictures, turns), rtol=0, atol=5e-6)


def test_rotating_the_hue_equals_the_standard_librarys_hsv() -> None:
    pictures = images(1)
    ours = rotate_hue_(pictures.clone(), torch.tensor([0.31]))
    for pixel, got in zip(pictures.flatten(2)[0].T.tolist(), ours.flatten(2)[0].T.tolist(), strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
        assert got == pytest.approx(colorsys.hsv_to_rgb((hue + 0.31) % 1, saturation, value), abs=5e-6)


def test_gray_has_no_hue_to_rotate() -> None:
    gray = torch.linspace(0, 1, 64).reshape(1, 1, 8, 8).expand(1, 3, 8, 8)
    ours = rotate_hue_(gray.clone(), torch.tensor([0.4]))
    assert torch.equal(ours, gray)


def test_turning_the_hue_back_gives_the_image_back() -> None:
    pictures = images(4)
    turns = torch.tensor([0.5, -0.2, 0.07, 0.33])
    back = rotate_hue_(rotate_hue_(pictures.clone(), turns), -turns)
    torch.testing.assert_close(back, pictures, rtol=0, atol=1e-5)


def test_every_order_of_the_jitter_equals_torchvisions_operations_one_after_the_other() -> None:
    order = torch.tensor(list(permutations(range(4))))
    count = len(order)
    generator = torch.Generator().manual_seed(2)
    factors = 0.3 + 1.4 * torch.rand(count, 3, generator=generator)
    hue = torch.rand(count, generator=generator) - 0.5
    pictures = images(count)
    ours = jittered(pictures, jitters(factors, hue, order))
    for picture, got, one, turn, steps in zip(
        pictures, ours, factors.tolist(), hue.tolist(), order.tolist(), strict=True
    ):
        expected = picture
        for step in steps:
            expected = ADJUST[step](expected, [*one, turn][step])
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_orders_differ_in_what_they_give() -> None:
    order = torch.tensor(list(permutations(range(4))))
    pictures = images(1).expand(24, 3, 9, 9).contiguous()
    factors = torch.tensor([1.4, 0.6, 1.4]).expand(24, 3)
    ours = jittered(pictures, jitters(factors, torch.full((24,), 0.1), order))
    assert len(ours.mul(1e3).round().unique(dim=0)) > 12


def test_an_image_that_is_not_jittered_keeps_every_bit() -> None:
    pictures = images(6)
    chosen = torch.tensor([True, False, True, True, False, False])
    order = torch.stack([torch.randperm(4, generator=torch.Generator().manual_seed(i)) for i in range(6)])
    ours = jittered(pictures, jitters(torch.full((6, 3), 0.7), torch.full((6,), 0.2), order, chosen))
    changed = (ours != pictures).flatten(1).any(1)
    assert torch.equal(changed, chosen)


def test_a_jitter_of_no_strength_costs_nothing() -> None:
    plan = plan_jitter(jitters(torch.ones(3, 3), torch.zeros(3), torch.arange(4).expand(3, 4)))
    assert len(plan.rows) == 0
    assert not plan.rotates


def test_the_luma_equals_torchvisions_grayscale() -> None:
    pictures = images(3)
    torch.testing.assert_close(luma(pictures), F.rgb_to_grayscale(pictures), rtol=0, atol=1e-6)


def test_solarising_equals_torchvisions_from_one_half_on() -> None:
    pictures = images(2)
    assert (pictures == 0.5).any()
    assert torch.equal(solarize(pictures), F.solarize(pictures, 0.5))
