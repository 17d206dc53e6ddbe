"""BYOL against its paper, literally and slowly."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.training.agreement import assert_same_gradients, doubled
from tests.training.tiny import FACTS, batch_for, tiny_method
from training.method import Facts
from training.methods.byol import BYOL, BYOLOptions, regression_loss
from training.schedules import Now
from training.views import Augmentation

PHOTOGRAPHS = Facts(images=1_281_167, size=224, epochs=300, batch_size=4096, steps_per_epoch=312)


def byol() -> BYOL:
    """In float64, its target elsewhere than its online network."""
    method = tiny_method("byol").double()
    assert isinstance(method, BYOL)
    with torch.no_grad():
        for _, target in method.momentum_pairs():
            for parameter in target.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return method


def squared_distance(predictions: Tensor, targets: Tensor) -> Tensor:
    """Eq. 2: ‖q/‖q‖ − z/‖z‖‖², mean over the batch."""
    total = torch.zeros((), dtype=torch.float64)
    for prediction, target in zip(predictions, targets, strict=True):
        difference = prediction / prediction.square().sum().sqrt() - target / target.square().sum().sqrt()
        for one in difference:
            total = total + one * one
    return total / len(predictions)


def test_the_loss_is_the_distance_of_unit_vectors_in_both_directions() -> None:
    method = byol()
    batch = doubled(batch_for(method))
    first, second = batch.views
    expected = torch.zeros((), dtype=torch.float64)
    for online, other in ((first, second), (second, first)):
        target = method.target_projector(method.target_backbone(other)).detach()
        prediction = method.predictor(method.projector(method.backbone(online)))
        expected = expected + squared_distance(prediction, target)
    assert_same_gradients(method, method(batch)["loss"], expected)


def test_the_loss_ignores_lengths_and_is_nought_to_four() -> None:
    rows = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    assert float(regression_loss(rows, 5 * rows)) == pytest.approx(0, abs=1e-6)
    assert float(regression_loss(rows, -rows)) == pytest.approx(4)


def test_the_target_follows_by_the_momentum_and_takes_no_gradient() -> None:
    method = byol()
    before = [target.detach().clone() for _, one in method.momentum_pairs() for target in one.parameters()]
    method(doubled(batch_for(method)))["loss"].backward()
    method.after_step(Now(0, 32, 8), {"momentum": 0.9})
    online = [one for module, _ in method.momentum_pairs() for one in module.parameters()]
    targets = [one for _, module in method.momentum_pairs() for one in module.parameters()]
    for was, source, target in zip(before, online, targets, strict=True):
        assert target.grad is None
        torch.testing.assert_close(target.data, 0.9 * was + 0.1 * source.data)


def test_the_predictor_has_no_target() -> None:
    method = byol()
    followed = {id(one) for module, _ in method.momentum_pairs() for one in module.parameters()}
    assert not followed & {id(one) for one in method.predictor.parameters()}


def test_the_target_normalises_by_its_own_batch_statistics() -> None:
    method = byol()
    norm = method.target_backbone.network[1]
    before = norm.running_mean.clone()
    method(doubled(batch_for(method)))
    assert not torch.equal(norm.running_mean, before)
    assert not torch.equal(norm.running_mean, method.backbone.network[1].running_mean)


def test_the_momentum_rises_to_one_along_the_papers_cosine() -> None:
    method = tiny_method("byol", momentum_start=0.996)
    momentum = method.schedules()["momentum"]
    for step in (0, 7, 16, 32):
        expected = 1 - (1 - 0.996) * (math.cos(math.pi * step / 32) + 1) / 2
        assert momentum(Now(step, 32, 8)) == pytest.approx(expected)
    assert momentum(Now(32, 32, 8)) == 1


@pytest.mark.parametrize(
    ("epochs", "momentum", "lr"),
    [(40, 0.97, 0.45), (100, 0.99, 0.45), (300, 0.99, 0.3), (1000, 0.996, 0.2)],
)
def test_momentum_and_learning_rate_follow_the_epochs(epochs: int, momentum: float, lr: float) -> None:
    facts = replace(PHOTOGRAPHS, epochs=epochs)
    assert BYOLOptions.suited_to(facts).momentum_start == momentum
    recipe = BYOL.recipe(facts)
    assert (recipe.optimizer, recipe.lr) == ("lars", lr)


def test_a_short_training_has_a_target_that_keeps_up() -> None:
    assert BYOLOptions.suited_to(FACTS).momentum_start < 0.97


def test_photographs_have_the_papers_sizes_and_small_images_smaller_ones() -> None:
    large = BYOLOptions.suited_to(replace(PHOTOGRAPHS, epochs=1000))
    assert large == BYOLOptions()
    assert (large.hidden_dim, large.projection_dim, large.momentum_end) == (4096, 256, 1.0)
    assert BYOLOptions.suited_to(FACTS).hidden_dim == 1024
    assert BYOL.recipe(FACTS).optimizer == "sgd"


def test_the_views_are_blurred_and_solarised_unequally() -> None:
    augmentation = Augmentation.suited_to(224)
    first, second = BYOL.views(augmentation, BYOLOptions(), PHOTOGRAPHS)
    assert [(view.blur, view.solarize) for view in (first, second)] == [(1.0, 0.0), (0.1, 0.2)]
    assert (first.of, second.of) == ("image", "partner")


def test_small_images_are_neither_blurred_nor_solarised() -> None:
    views = BYOL.views(Augmentation.suited_to(FACTS.size), BYOLOptions(), FACTS)
    assert [(view.blur, view.solarize) for view in views] == [(0.0, 0.0)] * 2


def test_the_online_network_is_what_is_evaluated() -> None:
    method = byol()
    assert method.encoder is method.backbone
