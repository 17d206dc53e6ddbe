"""KoLeo: the formula, who counts as a neighbour, and rows that coincide."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.training.ranks import on_ranks
from training.distributed import rank, world_size
from training.koleo import CLOSEST, koleo_loss


def literal(features: Tensor, ids: Tensor) -> Tensor:
    """Sablayrolles et al. 2019: minus the mean logarithm of the least distance, row by row."""
    rows = [row / row.square().sum().sqrt() for row in features]
    total = torch.zeros((), dtype=torch.float64)
    for row, own in zip(rows, ids, strict=True):
        others = [one for one, of in zip(rows, ids, strict=True) if of != own]
        distances = [(row - other).square().sum().sqrt() for other in others]
        total = total - torch.stack(distances).min().log()
    return total / len(rows)


@pytest.mark.parametrize("ids", [[0, 1, 2, 3, 4, 5], [0, 0, 1, 1, 2, 2]])
def test_value_and_gradient_are_those_of_the_paper(ids: list[int]) -> None:
    torch.manual_seed(0)
    features = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    of = torch.tensor(ids)
    loss, expected = koleo_loss(features, of), literal(features, of)
    torch.testing.assert_close(loss, expected)
    (found,), (wanted,) = torch.autograd.grad(loss, features), torch.autograd.grad(expected, features)
    torch.testing.assert_close(found, wanted)


def test_opposite_rows_are_two_apart() -> None:
    rows = torch.tensor([[3.0, 0.0], [-0.5, 0.0]])
    assert koleo_loss(rows, torch.arange(2)).item() == pytest.approx(-math.log(2))


def test_images_of_one_group_do_not_push_each_other_away() -> None:
    rows = torch.tensor([[1.0, 0.0], [1.0, 0.01], [0.0, 1.0], [-1.0, 0.0]])
    apart = koleo_loss(rows, torch.tensor([0, 0, 1, 2]))
    together = koleo_loss(rows, torch.tensor([0, 3, 1, 2]))
    assert apart < 0 < together


def test_short_distances_keep_their_digits_in_float32() -> None:
    rows = torch.tensor([[1.0, 0.0], [1.0, 1e-5]], requires_grad=True)
    loss = koleo_loss(rows, torch.arange(2))
    assert loss.item() == pytest.approx(-math.log(1e-5), rel=1e-5)
    loss.backward()
    assert rows.grad is not None
    # Each row moves its own distance and, as the other's neighbour, the other's.
    assert rows.grad[1, 1].item() == pytest.approx(-1e5, rel=1e-3)


def test_equal_rows_have_a_loss_and_no_gradient() -> None:
    rows = torch.ones(3, 4, requires_grad=True)
    loss = koleo_loss(rows, torch.arange(3))
    loss.backward()
    assert loss.item() == pytest.approx(-math.log(CLOSEST))
    assert rows.grad is not None
    assert torch.equal(rows.grad, torch.zeros(3, 4))


def test_a_batch_of_one_image_changes_nothing() -> None:
    rows = torch.randn(1, 4, requires_grad=True)
    koleo_loss(rows, torch.arange(1)).backward()
    assert rows.grad is not None
    assert torch.equal(rows.grad, torch.zeros(1, 4))


def share(features: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    own = slice(rank() * len(ids) // world_size(), (rank() + 1) * len(ids) // world_size())
    features = features[own].clone().requires_grad_()
    loss = koleo_loss(features, ids[own])
    (gradient,) = torch.autograd.grad(loss, features)
    return loss.detach(), gradient / world_size()  # the mean over ranks that DDP takes


def test_neighbours_are_sought_on_all_ranks() -> None:
    torch.manual_seed(0)
    features, ids = torch.randn(6, 3, dtype=torch.float64), torch.arange(6)
    ranks = on_ranks(share, features, ids)
    loss, gradient = share(features, ids)
    torch.testing.assert_close(sum(one for one, _ in ranks) / 2, loss)
    torch.testing.assert_close(torch.cat([one for _, one in ranks]), gradient)


def test_under_autocast_neighbours_are_told_apart_in_float32() -> None:
    # Cosines of .9992 and .9998 with the first row: both 1 in bfloat16.
    angles = torch.tensor([0.0, 0.04, -0.02])
    rows = torch.stack([angles.cos(), angles.sin()], dim=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = koleo_loss(rows, torch.arange(3))
    chords = [2 * math.sin(angle / 2) for angle in (0.02, 0.04, 0.02)]
    assert loss.item() == pytest.approx(-sum(map(math.log, chords)) / 3, rel=1e-4)
