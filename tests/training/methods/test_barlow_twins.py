"""Barlow Twins against its paper, literally and slowly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.training.agreement import assert_same_gradients, doubled
from tests.training.ranks import on_ranks
from tests.training.tiny import FACTS, batch_for, tiny_method
from training.distributed import rank, world_size
from training.method import Facts
from training.methods.barlow_twins import EPSILON, BarlowTwins, BarlowTwinsOptions, barlow_twins_loss
from training.views import Augmentation

PHOTOGRAPHS = Facts(images=1_281_167, size=224, epochs=1000, batch_size=2048, steps_per_epoch=625)

FIRST, SECOND = torch.randn(2, 8, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def literal(first: Tensor, second: Tensor, redundancy: float) -> Tensor:
    """Eq. 1 and 2, with the ε of the batch norm that the authors' code standardises by."""
    count, dim = first.shape
    loss = torch.zeros((), dtype=torch.float64)
    for i in range(dim):
        for j in range(dim):
            one, other = first[:, i] - first[:, i].sum() / count, second[:, j] - second[:, j].sum() / count
            spread = ((one**2).sum() / count + EPSILON).sqrt() * ((other**2).sum() / count + EPSILON).sqrt()
            correlation = sum((one[b] * other[b] for b in range(count)), torch.zeros(())) / count / spread
            loss = loss + ((1 - correlation) ** 2 if i == j else redundancy * correlation**2)
    return loss


def test_the_loss_is_that_of_the_paper() -> None:
    method = tiny_method("barlow_twins", projection_dim=6, loss_scale=1.0).double()
    batch = doubled(batch_for(method))
    first, second = (method.projector(method.backbone(view)) for view in batch.views)
    losses = method(batch)
    assert_same_gradients(method, losses["loss"], literal(first, second, 0.0051))
    torch.testing.assert_close(
        losses["on_diagonal"] + 0.0051 * losses["off_diagonal"], losses["loss"].detach()
    )


def test_the_loss_can_be_scaled() -> None:
    plain, scaled = (tiny_method("barlow_twins", loss_scale=scale) for scale in (1.0, 0.1))
    batch = batch_for(plain)
    torch.testing.assert_close(scaled(batch)["loss"], 0.1 * plain(batch)["loss"])


def test_features_that_agree_and_do_not_correlate_cost_nothing() -> None:
    hadamard = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], dtype=torch.float64)
    on_diagonal, off_diagonal = barlow_twins_loss(100 * hadamard + 7, 3 * hadamard)
    assert float(on_diagonal) == pytest.approx(0, abs=1e-9)
    assert float(off_diagonal) == pytest.approx(0, abs=1e-9)


def test_features_that_all_say_the_same_are_redundant() -> None:
    column = torch.randn(8, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    on_diagonal, off_diagonal = barlow_twins_loss(column.repeat(1, 4), column.repeat(1, 4))
    assert float(on_diagonal) == pytest.approx(0, abs=1e-6)
    assert float(off_diagonal) == pytest.approx(12, rel=1e-3)


def test_a_collapsed_network_has_a_finite_gradient() -> None:
    rows = torch.ones(8, 4, requires_grad=True)
    on_diagonal, off_diagonal = barlow_twins_loss(rows, rows)
    (on_diagonal + off_diagonal).backward()
    assert on_diagonal.item() == 4
    assert rows.grad is not None
    assert torch.isfinite(rows.grad).all()


def _on_a_rank() -> tuple[Tensor, Tensor, Tensor]:
    first, second = (rows.chunk(world_size())[rank()].clone().requires_grad_() for rows in (FIRST, SECOND))
    on_diagonal, off_diagonal = barlow_twins_loss(first, second)
    loss = on_diagonal + 0.0051 * off_diagonal
    loss.backward()
    assert first.grad is not None
    assert second.grad is not None
    # What DDP's mean leaves of a gradient that only this rank's rows have.
    return loss.detach(), first.grad / world_size(), second.grad / world_size()


def test_the_correlation_is_that_of_the_joined_batch_in_value_and_gradient() -> None:
    first, second = FIRST.clone().requires_grad_(), SECOND.clone().requires_grad_()
    expected = literal(first, second, 0.0051)
    expected.backward()
    shares = on_ranks(_on_a_rank)
    for loss, _, _ in shares:
        torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(torch.cat([one for _, one, _ in shares]), first.grad)
    torch.testing.assert_close(torch.cat([other for _, _, other in shares]), second.grad)


def test_autocast_does_not_round_the_correlation() -> None:
    rows = FIRST.float(), SECOND.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = barlow_twins_loss(*rows)
    assert under == barlow_twins_loss(*rows)


def test_weights_and_biases_have_the_papers_learning_rates() -> None:
    recipe = BarlowTwins.recipe(PHOTOGRAPHS)
    assert (recipe.optimizer, recipe.lr, recipe.lr_end) == ("lars", 0.2, 0.001)
    assert recipe.lr * recipe.bias_lr == pytest.approx(0.0048)
    assert BarlowTwins.recipe(FACTS).optimizer == "sgd"


def test_photographs_have_the_papers_sizes_and_small_images_smaller_ones() -> None:
    assert BarlowTwinsOptions.suited_to(PHOTOGRAPHS) == BarlowTwinsOptions()
    small = BarlowTwinsOptions.suited_to(FACTS)
    assert (small.hidden_dim, small.projection_dim) == (2048, 2048)
    assert small.loss_scale * small.projection_dim == 1


def test_the_views_are_byols() -> None:
    views = BarlowTwins.views(Augmentation.suited_to(224), BarlowTwinsOptions(), PHOTOGRAPHS)
    assert [(view.blur, view.solarize) for view in views] == [(1.0, 0.0), (0.1, 0.2)]
    small = BarlowTwins.views(Augmentation.suited_to(32), BarlowTwinsOptions(), FACTS)
    assert [(view.blur, view.solarize) for view in small] == [(0.0, 0.0), (0.0, 0.0)]
