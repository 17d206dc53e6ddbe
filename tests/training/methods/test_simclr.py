"""SimCLR against algorithm 1 of its paper, literally and slowly."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tests.training.agreement import assert_same_gradients, doubled
from tests.training.tiny import FACTS, batch_for, tiny_method
from training.method import Facts
from training.methods.simclr import SimCLR, SimCLROptions
from training.views import Augmentation

PHOTOGRAPHS = Facts(images=1_281_167, size=224, epochs=100, batch_size=4096, steps_per_epoch=312)


def simclr(**options: float) -> SimCLR:
    method = tiny_method("simclr", **options).double()
    assert isinstance(method, SimCLR)
    return method


def literal(first: Tensor, second: Tensor, temperature: float, group: list[int]) -> Tensor:
    """Algorithm 1: views 2k and 2k+1 are of image k; the mean of ℓ over 2N views, 2N − 1 in a denominator.

    Views of another image of the same group are in no denominator.
    """
    views = [row for pair in zip(first, second, strict=True) for row in pair]
    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(views)):
        partner = i + 1 if i % 2 == 0 else i - 1
        denominator = torch.zeros((), dtype=torch.float64)
        for k in range(len(views)):
            similarity = views[i] @ views[k] / (views[i].norm() * views[k].norm())
            if k == partner:
                positive = (similarity / temperature).exp()
            if k == partner or (k != i and group[k // 2] != group[i // 2]):
                denominator = denominator + (similarity / temperature).exp()
        total = total - (positive / denominator).log()
    return total / len(views)


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_the_loss_is_that_of_the_paper(temperature: float) -> None:
    method = simclr(temperature=temperature)
    batch = doubled(batch_for(method))
    first, second = (method.head(method.backbone(view)) for view in batch.views)
    assert_same_gradients(method, method(batch)["loss"], literal(first, second, temperature, list(range(8))))


def test_images_of_one_group_do_not_repel() -> None:
    method = simclr()
    group = [0, 0, 1, 2, 2, 2, 3, 4]
    batch = replace(doubled(batch_for(method)), ids=torch.tensor(group))
    first, second = (method.head(method.backbone(view)) for view in batch.views)
    assert_same_gradients(method, method(batch)["loss"], literal(first, second, 0.5, group))


def test_hard_negatives_make_the_loss_harder() -> None:
    batch = batch_for(simclr())
    plain, hard = (tiny_method("simclr", beta=beta)(batch)["loss"].item() for beta in (0.0, 1.0))
    assert hard > plain


def test_batch_norm_never_sees_both_views_at_once() -> None:
    method = simclr()
    batches = []
    method.backbone.register_forward_hook(lambda _, inputs, __: batches.append(len(inputs[0])))
    method(doubled(batch_for(method)))
    assert batches == [8, 8]


def test_the_head_has_one_hidden_layer_and_a_norm_on_its_output() -> None:
    head = simclr().head
    assert isinstance(head, nn.Sequential)
    assert [type(layer).__name__ for layer in head] == [
        "Linear",
        "BatchNorm1d",
        "ReLU",
        "Linear",
        "BatchNorm1d",
    ]


def test_features_are_the_backbones_not_the_heads() -> None:
    method = simclr().eval()
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(method.embed(images), method.backbone(images))


def test_photographs_have_the_papers_settings_and_small_images_their_own() -> None:
    assert SimCLROptions.suited_to(PHOTOGRAPHS) == SimCLROptions()
    assert SimCLROptions().temperature == 0.1
    assert SimCLROptions.suited_to(FACTS).temperature == 0.5
    large, small = SimCLR.recipe(PHOTOGRAPHS), SimCLR.recipe(FACTS)
    assert (large.optimizer, large.lr, large.weight_decay) == ("lars", 0.3, 1e-6)
    assert (small.optimizer, small.lr, small.weight_decay) == ("sgd", 0.12, 5e-4)


def test_the_second_view_is_of_another_image_of_the_group() -> None:
    views = SimCLR.views(Augmentation(), SimCLROptions(), PHOTOGRAPHS)
    assert [(view.of, view.size) for view in views] == [("image", 224), ("partner", 224)]
