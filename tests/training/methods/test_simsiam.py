"""SimSiam against its paper, literally and slowly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.training.agreement import assert_same_gradients, doubled
from tests.training.tiny import FACTS, batch_for, tiny_method
from training.method import Facts
from training.methods.simsiam import SimSiam, SimSiamOptions, negative_cosine
from training.optim import build_optimizer, set_rates
from training.schedules import Now

PHOTOGRAPHS = Facts(images=1_281_167, size=224, epochs=100, batch_size=512, steps_per_epoch=2502)


def simsiam() -> SimSiam:
    method = tiny_method("simsiam").double()
    assert isinstance(method, SimSiam)
    return method


def distance(predictions: Tensor, targets: list[list[float]]) -> Tensor:
    """Eq. 1 with numbers for targets: nothing can flow back into them."""
    total = torch.zeros((), dtype=torch.float64)
    for prediction, target in zip(predictions, targets, strict=True):
        length = sum(one * one for one in target) ** 0.5
        for mine, theirs in zip(prediction, target, strict=True):
            total = total - mine / prediction.square().sum().sqrt() * theirs / length
    return total / len(predictions)


def test_the_loss_is_half_of_both_directions_with_the_gradient_stopped_at_the_targets() -> None:
    method = simsiam()
    batch = doubled(batch_for(method))
    first, second = (method.projector(method.backbone(view)) for view in batch.views)
    expected = (
        distance(method.predictor(first), second.tolist()) / 2
        + distance(method.predictor(second), first.tolist()) / 2
    )
    assert_same_gradients(method, method(batch)["loss"], expected)


def test_the_loss_ignores_lengths_and_is_minus_one_where_all_agree() -> None:
    rows = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    assert float(negative_cosine(rows, 5 * rows)) == pytest.approx(-1)
    assert float(negative_cosine(rows, -rows)) == pytest.approx(1)


def test_no_gradient_reaches_the_targets() -> None:
    predictions, targets = torch.randn(2, 4, 3).requires_grad_().unbind()
    targets.retain_grad()
    negative_cosine(predictions, targets).backward()
    assert targets.grad is None


def test_the_predictors_learning_rate_stays_while_the_others_fall() -> None:
    method = simsiam()
    recipe = SimSiam.recipe(FACTS)
    optimizer = build_optimizer(method, recipe)
    rates: dict[str, list[float]] = {"predictor": [], "backbone": []}
    names = {id(one): name for name, one in method.named_parameters()}
    for step in (0, 16, 31):
        set_rates(optimizer, recipe, Now(step, 32, 8), batch_size=256)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                module = names[id(parameter)].split(".")[0]
                if module in rates and parameter.ndim > 1:
                    rates[module].append(group["lr"])
    assert set(rates["predictor"]) == {recipe.lr}
    assert max(rates["backbone"][-2:]) < recipe.lr / 50


def test_the_projector_ends_in_a_batch_norm_without_scale_and_shift() -> None:
    norm = simsiam().projector[-1]
    assert isinstance(norm, nn.BatchNorm1d)
    assert not norm.affine


def test_the_predictor_is_a_bottleneck_without_a_norm_on_its_output() -> None:
    layers = list(tiny_method("simsiam", prediction_dim=8).predictor)
    assert [(one.in_features, one.out_features) for one in layers if isinstance(one, nn.Linear)] == [
        (32, 8),
        (8, 32),
    ]
    assert isinstance(layers[-1], nn.Linear)
    assert layers[-1].bias is not None


@pytest.mark.parametrize(("facts", "layers"), [(FACTS, 2), (PHOTOGRAPHS, 3)])
def test_small_images_have_one_layer_less(facts: Facts, layers: int) -> None:
    options = SimSiamOptions.suited_to(facts)
    assert (options.projection_dim, options.prediction_dim) == (2048, 512)
    projector = tiny_method("simsiam", facts=facts).projector
    assert sum(isinstance(one, nn.Linear) for one in projector) == options.projection_layers == layers


def test_photographs_are_trained_by_the_papers_rates() -> None:
    recipe = SimSiam.recipe(PHOTOGRAPHS)
    assert (recipe.optimizer, recipe.lr, recipe.weight_decay, recipe.warmup_epochs) == ("sgd", 0.05, 1e-4, 0)
    assert SimSiam.recipe(FACTS).lr == 0.03
