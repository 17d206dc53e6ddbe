"""Blockwise masks: how much is hidden, in blocks, and drawn anew from a generator alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from training.masking import block_masks


def draw(
    images: int, height: int, width: int, share: tuple[float, float] = (0.1, 0.5), seed: int = 0
) -> Tensor:
    return block_masks(images, height, width, share=share, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("height", "width"), [(14, 14), (8, 8), (4, 6)])
def test_the_hidden_share_of_an_image_is_spread_evenly_between_its_bounds(height: int, width: int) -> None:
    masks = draw(4000, height, width)
    assert masks.shape == (4000, height * width)
    assert masks.dtype == torch.bool
    shares = masks.double().mean(1)
    rounding = 0.5 / (height * width) + 1e-6
    assert shares.min() >= 0.1 - rounding
    assert shares.max() <= 0.5 + rounding
    quarters = torch.quantile(shares, torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    torch.testing.assert_close(quarters, torch.tensor([0.2, 0.3, 0.4]).double(), atol=0.01 + rounding, rtol=0)


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 1.0])
def test_the_number_of_hidden_patches_is_met_exactly(share: float) -> None:
    assert draw(200, 14, 14, (share, share)).sum(1).unique().tolist() == [round(share * 196)]


def test_hidden_patches_lie_in_blocks() -> None:
    masks = draw(500, 14, 14, (0.3, 0.3))
    scattered = torch.stack([row[torch.randperm(196)] for row in masks])

    def edges(masks: Tensor) -> float:
        """Boundaries between hidden and visible patches, per image."""
        grid = masks.view(-1, 14, 14)
        across = (grid[:, 1:] != grid[:, :-1]).sum() + (grid[:, :, 1:] != grid[:, :, :-1]).sum()
        return float(across) / len(masks)

    # 59 patches in one square have about 31 edges, scattered ones about 153.
    assert edges(scattered) > 140
    assert edges(masks) < 48


def test_every_patch_is_hidden_now_and_then_and_no_side_is_preferred() -> None:
    often = draw(4000, 8, 8).double().mean(0).view(8, 8)
    assert often.min() > 0.05  # corners least
    assert often.max() < 0.5
    for turned in (often.flip(0), often.flip(1), often.T):
        torch.testing.assert_close(often, turned, atol=0.05, rtol=0)


def test_the_same_generator_gives_the_same_masks_and_another_gives_others() -> None:
    assert torch.equal(draw(8, 14, 14, seed=3), draw(8, 14, 14, seed=3))
    assert not torch.equal(draw(8, 14, 14, seed=3), draw(8, 14, 14, seed=4))
    first = draw(8, 14, 14)
    assert len({tuple(row.tolist()) for row in first}) == 8


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 5), (2, 2)])
def test_tiny_images_have_at_least_one_hidden_patch(height: int, width: int) -> None:
    hidden = draw(100, height, width).sum(1)
    assert hidden.min() >= 1
    assert hidden.max() <= max(1, -(-height * width // 2))
