"""VICReg against its paper and the authors' two departures from it, literally and slowly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.training.agreement import assert_same_gradients, doubled
from tests.training.ranks import on_ranks
from tests.training.tiny import FACTS, batch_for, tiny_method
from training.distributed import rank, world_size
from training.method import Facts
from training.methods.vicreg import VICReg, VICRegOptions, vicreg_terms
from training.views import Augmentation

PHOTOGRAPHS = Facts(images=1_281_167, size=224, epochs=1000, batch_size=2048, steps_per_epoch=625)

FIRST, SECOND = 0.7 * torch.randn(2, 8, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def literal(first: Tensor, second: Tensor) -> Tensor:
    """25·s + 25·v + c: eq. 1 to 6, with s divided by the features and v halved as in the authors' code."""
    count, dim = first.shape
    zero = torch.zeros((), dtype=torch.float64)
    distance, variance, covariance = zero, zero, zero
    for b in range(count):
        distance = distance + ((first[b] - second[b]) ** 2).sum() / count
    for rows in (first, second):
        mean = sum(rows.unbind(), torch.zeros(dim)) / count
        matrix = sum(
            (torch.outer(row - mean, row - mean) for row in rows.unbind()), torch.zeros(dim, dim)
        ) / (count - 1)
        for i in range(dim):
            deviation = (matrix[i, i] + 1e-4) ** 0.5
            variance = variance + torch.clamp(1 - deviation, min=0) / dim
            for j in range(dim):
                covariance = covariance + (matrix[i, j] ** 2 / dim if i != j else zero)
    return 25 * distance / dim + 25 * variance / 2 + covariance


def test_the_loss_is_that_of_the_paper() -> None:
    method = tiny_method("vicreg", projection_dim=6).double()
    batch = doubled(batch_for(method))
    first, second = (method.expander(method.backbone(view)) for view in batch.views)
    assert_same_gradients(method, method(batch)["loss"], literal(first, second))


def test_each_term_is_logged_unweighted() -> None:
    method = tiny_method("vicreg", invariance=2.0, variance=3.0, covariance=5.0)
    losses = method(batch_for(method))
    expected = 2 * losses["invariance"] + 3 * losses["variance"] + 5 * losses["covariance"]
    torch.testing.assert_close(losses["loss"].detach(), expected)


def test_features_that_vary_enough_cost_nothing() -> None:
    hadamard = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], dtype=torch.float64)
    terms = vicreg_terms(2 * hadamard, 2 * hadamard)
    assert {name: float(term) for name, term in terms.items()} == pytest.approx(
        {"invariance": 0, "variance": 0, "covariance": 0}, abs=1e-12
    )


def test_a_collapsed_network_pays_for_its_variance_and_has_a_finite_gradient() -> None:
    rows = torch.ones(8, 4, requires_grad=True)
    terms = vicreg_terms(rows, rows)
    assert terms["variance"].item() == pytest.approx(1 - 1e-4**0.5)
    sum(terms.values(), torch.zeros(())).backward()
    assert rows.grad is not None
    assert torch.isfinite(rows.grad).all()


def _on_a_rank() -> tuple[Tensor, Tensor, Tensor]:
    first, second = (rows.chunk(world_size())[rank()].clone().requires_grad_() for rows in (FIRST, SECOND))
    terms = vicreg_terms(first, second)
    loss = 25 * terms["invariance"] + 25 * terms["variance"] + terms["covariance"]
    loss.backward()
    assert first.grad is not None
    assert second.grad is not None
    # What DDP's mean leaves of a gradient that only this rank's rows have.
    return loss.detach(), first.grad / world_size(), second.grad / world_size()


def test_variance_and_covariance_are_those_of_the_joined_batch_in_value_and_gradient() -> None:
    first, second = FIRST.clone().requires_grad_(), SECOND.clone().requires_grad_()
    expected = literal(first, second)
    expected.backward()
    shares = on_ranks(_on_a_rank)
    torch.testing.assert_close(torch.stack([loss for loss, _, _ in shares]).mean(), expected.detach())
    torch.testing.assert_close(torch.cat([one for _, one, _ in shares]), first.grad)
    torch.testing.assert_close(torch.cat([other for _, _, other in shares]), second.grad)


def test_autocast_does_not_round_the_covariance() -> None:
    rows = FIRST.float(), SECOND.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = vicreg_terms(*rows)
    assert under == vicreg_terms(*rows)


def test_photographs_have_the_papers_weights_sizes_and_rates() -> None:
    options = VICRegOptions.suited_to(PHOTOGRAPHS)
    assert options == VICRegOptions()
    assert (options.invariance, options.variance, options.covariance) == (25, 25, 1)
    assert (options.hidden_dim, options.projection_dim) == (8192, 8192)
    recipe = VICReg.recipe(PHOTOGRAPHS)
    assert (recipe.optimizer, recipe.lr, recipe.weight_decay) == ("lars", 0.2, 1e-6)


def test_small_images_have_a_shorter_expander_and_a_rate_that_suits_large_gradients() -> None:
    assert VICRegOptions.suited_to(FACTS).projection_dim == 2048
    recipe = VICReg.recipe(FACTS)
    assert (recipe.optimizer, recipe.lr) == ("sgd", 0.012)


def test_both_views_are_drawn_alike() -> None:
    views = VICReg.views(Augmentation.suited_to(224), VICRegOptions(), PHOTOGRAPHS)
    assert [(view.blur, view.solarize) for view in views] == [(0.5, 0.1), (0.5, 0.1)]
