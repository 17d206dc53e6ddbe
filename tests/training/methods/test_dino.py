"""DINO: the paper's loss, the centre, the head and what moves when; and how its settings follow the data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from embedserve.errors import InvalidField
from tests.training.agreement import assert_same_gradients, assert_two_ranks_train_as_one, doubled
from tests.training.tiny import FACTS, TinyConv, batch_for, tiny_method
from training.backbones import build
from training.backbones.building import default_backbone
from training.method import Facts
from training.methods.dino import DINO, Center, DINOOptions
from training.methods.self_distillation import PrototypeHead, distillation_loss
from training.optim import build_optimizer
from training.schedules import Now
from training.views import Augmentation

CONV = Facts(images=1_281_167, size=224, epochs=100, batch_size=1024, steps_per_epoch=1251)
IMAGENET = replace(CONV, backbone_kind="vit")
CIFAR = Facts(images=50_000, size=32, epochs=200, batch_size=512, steps_per_epoch=97, backbone_kind="vit")


def dino(kind: str = "vit", **options: Any) -> Any:
    """In float64, with a teacher that differs from the student and a centre that is not zero."""
    method: Any = tiny_method("dino", **{"head_norm": False, **options})
    if kind == "conv":
        method = DINO(TinyConv(), method.options, FACTS)
    torch.manual_seed(1)
    for parameter in [*method.teacher.parameters(), *method.teacher_head.parameters()]:
        parameter.add_(0.1 * torch.randn_like(parameter))
    method.center.mean.copy_(0.1 * torch.randn_like(method.center.mean))
    return method.double()


# ------------------------------------------------------------------------------------------------ the loss


def softmax(row: Tensor) -> Tensor:
    exponentials = row.exp()
    return exponentials / exponentials.sum()


def literal_head(head: Any, features: Tensor) -> Tensor:
    """Caron et al. 2021, appendix C: GELU, a bottleneck of unit length, weight-normalised rows of gain 1."""
    weights = [layer for layer in head.layers if isinstance(layer, nn.Linear)]
    for layer in weights:
        features = layer.weight @ features + layer.bias
        if layer is not weights[-1]:
            features = features * 0.5 * (1 + torch.erf(features / math.sqrt(2)))
    unit = features / features.square().sum().sqrt()
    return torch.stack([unit @ row / row.square().sum().sqrt() for row in head.prototypes.weight])


def literal_loss(
    method: Any, views: Sequence[Tensor], center: Tensor, student: float, teacher: float
) -> Tensor:
    """Caron et al. 2021, algorithm 1 with multi-crop, image by image and pair by pair."""
    total, pairs = torch.zeros((), dtype=torch.float64), 0
    for image in range(len(views[0])):
        crops = [view[image : image + 1] for view in views]
        predictions = [
            softmax(literal_head(method.head, method.backbone(crop)[0]) / student) for crop in crops
        ]
        with torch.no_grad():
            outputs = [literal_head(method.teacher_head, method.teacher(crop)[0]) for crop in crops[:2]]
            targets = [softmax((output - center) / teacher) for output in outputs]
        for large, target in enumerate(targets):
            for other, prediction in enumerate(predictions):
                if other != large:
                    total = total - (target * prediction.log()).sum()
                    pairs += 1
    return total / pairs


def test_the_loss_and_all_gradients_are_those_of_the_paper() -> None:
    method = dino(local_crops=3, teacher_temperature=0.06, teacher_temperature_epochs=0.0)
    batch = doubled(batch_for(method, size=3))
    assert [view.shape[-1] for view in batch.views] == [16, 16, 8, 8, 8]
    expected = literal_loss(method, batch.views, method.center.mean.clone(), 0.1, 0.06)
    assert_same_gradients(method, method.loss(batch)["loss"], expected)


@pytest.mark.parametrize("local_crops", [0, 2])
def test_crops_of_one_size_share_a_batch_norm_in_a_conv_net(local_crops: int) -> None:
    method = dino("conv", local_crops=local_crops)
    batch = doubled(batch_for(method, size=3))
    temperature = batch.values["teacher_temperature"]
    full, local = torch.cat(list(batch.views[:2])), batch.views[2:]
    features = method.backbone(full)
    if local:
        features = torch.cat([features, method.backbone(torch.cat(list(local)))])
    outputs = method.head(features).view(2 + local_crops, 3, -1)
    with torch.no_grad():
        whole = method.teacher_head(method.teacher(full))
        targets = ((whole - method.center.mean) / temperature).softmax(1).view(2, 3, -1)
    expected = distillation_loss(outputs, targets, temperature=0.1)
    assert_same_gradients(method, method.loss(batch)["loss"], expected)


def test_a_student_without_a_preference_is_at_ln_k() -> None:
    targets = torch.randn(2, 4, 50).softmax(2)
    loss = distillation_loss(torch.ones(5, 4, 50), targets, temperature=0.1)
    assert loss.item() == pytest.approx(math.log(50), rel=1e-5)
    assert dino().logit_count() == 32


def test_the_student_never_predicts_a_crop_from_itself() -> None:
    first, second = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    crossed = distillation_loss(torch.stack([second, first]), torch.stack([first, second]), temperature=0.05)
    straight = distillation_loss(torch.stack([first, second]), torch.stack([first, second]), temperature=0.05)
    assert crossed.item() == pytest.approx(0, abs=1e-6)
    assert straight.item() == pytest.approx(20, abs=1e-3)


def test_two_ranks_train_as_one_with_the_joined_batch() -> None:
    assert_two_ranks_train_as_one("dino", head_norm=True, local_crops=2, freeze_epochs=0.125)


# ------------------------------------------------------------------------------------------------ the head


def test_the_head_is_a_weight_normalised_one_with_gains_of_1() -> None:
    torch.manual_seed(0)
    head = PrototypeHead(6, DINOOptions(hidden_dim=5, bottleneck_dim=4, output_dim=7)).double()
    last = nn.utils.parametrizations.weight_norm(nn.Linear(4, 7, bias=False).double())
    last.parametrizations.weight.original0.data.fill_(1)
    last.parametrizations.weight.original1.data.copy_(head.prototypes.weight)
    features = torch.randn(3, 6, dtype=torch.float64)
    bottleneck = head.layers(features)
    expected = last(bottleneck / bottleneck.norm(dim=1, keepdim=True))
    torch.testing.assert_close(head(features), expected)
    weight = torch.randn(3, 7, dtype=torch.float64)
    (head(features) * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(head.prototypes.weight.grad, last.parametrizations.weight.original1.grad)
    torch.testing.assert_close(head(features)[0], literal_head(head, features[0]))


def test_prototypes_of_another_length_give_the_same_cosines() -> None:
    head = PrototypeHead(6, DINOOptions(hidden_dim=5, bottleneck_dim=4, output_dim=7))
    features = torch.randn(3, 6)
    before = head(features)
    with torch.no_grad():
        head.prototypes.weight.mul_(torch.rand(7, 1) + 0.5)
    torch.testing.assert_close(head(features), before)
    assert before.abs().max() <= 1 + 1e-6


def test_cosines_are_float32_under_autocast() -> None:
    head = PrototypeHead(6, DINOOptions(hidden_dim=5, bottleneck_dim=4, output_dim=7))
    features = torch.randn(64, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        bottleneck = head.layers(features)
        cosines = head(features)
    assert bottleneck.dtype == torch.bfloat16
    exact = (
        nn.functional.normalize(bottleneck.double())
        @ nn.functional.normalize(head.prototypes.weight.double()).T
    )
    torch.testing.assert_close(cosines.double(), exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm", [False, True])
def test_batch_norm_in_the_head_is_an_option(norm: bool) -> None:
    method = dino(head_norm=norm)
    norms = [one for one in method.head.modules() if isinstance(one, nn.BatchNorm1d)]
    assert len(norms) == (2 if norm else 0)
    assert all(
        (layer.bias is None) == norm for layer in method.head.layers[:-1] if isinstance(layer, nn.Linear)
    )


# ---------------------------------------------------------------------------------------------- the centre


def test_the_loss_is_centred_by_the_steps_before() -> None:
    method = dino()
    batch = doubled(batch_for(method))
    before = method.center.mean.clone()
    first = method.loss(batch)["loss"]
    assert torch.equal(method.center.mean, before)
    method.center.mean.add_(torch.randn_like(before))
    assert method.loss(batch)["loss"] != first


def test_the_centre_follows_the_mean_output_of_both_large_crops_of_all_parts_of_a_step() -> None:
    method = dino(center_momentum=0.8)
    batches = [doubled(batch_for(method, size=4, seed=seed)) for seed in (0, 1)]
    with torch.no_grad():
        outputs = [method.teacher_head(method.teacher(view)) for batch in batches for view in batch.views[:2]]
    expected = 0.8 * method.center.mean + 0.2 * torch.cat(outputs).mean(0)
    for batch in batches:
        method.loss(batch)
    method.after_step(batches[0].now, batches[0].values)
    torch.testing.assert_close(method.center.mean, expected)
    method.after_step(batches[0].now, batches[0].values)  # nothing was seen in between
    torch.testing.assert_close(method.center.mean, expected)


def test_a_prototype_that_every_image_prefers_loses_its_lead() -> None:
    center = Center(4, 0.9)
    outputs = torch.tensor([[0.9, 0.1, 0.0, -0.2]]).repeat(5, 1)
    assert center.targets(outputs, 0.04)[0, 0] > 0.99
    for _ in range(100):
        center.stage(outputs)
        center.update()
    torch.testing.assert_close(center.targets(outputs, 0.04), torch.full((5, 4), 0.25), atol=1e-3, rtol=0)


def test_the_centre_is_in_the_checkpoint() -> None:
    assert "center.mean" in dino().state_dict()


# ------------------------------------------------------------------------------------------ what moves when


def test_the_prototypes_rest_for_the_first_epoch_and_all_else_learns() -> None:
    method = dino(freeze_epochs=1.0)
    recipe = DINO.recipe(FACTS)
    optimizer = build_optimizer(method, recipe)
    for step, rests in ((0, True), (7, True), (8, False)):  # 8 steps an epoch
        batch = doubled(batch_for(method, step=step))
        method.loss(batch)["loss"].backward()
        before = method.head.prototypes.weight.clone(), method.head.layers[0].weight.clone()
        method.before_step(batch.now)
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(method.head.prototypes.weight, before[0]) == rests
        assert not torch.equal(method.head.layers[0].weight, before[1])


def test_the_teacher_follows_backbone_and_head_and_is_what_is_exported() -> None:
    method = dino(momentum_start=0.9)
    batch = doubled(batch_for(method))
    pairs = [(method.backbone, method.teacher), (method.head, method.teacher_head)]
    expected = [
        0.9 * old + 0.1 * new
        for student, teacher in pairs
        for new, old in zip(student.parameters(), teacher.parameters(), strict=True)
    ]
    method.loss(batch)["loss"].backward()
    assert all(one.grad is None for _, teacher in pairs for one in teacher.parameters())
    method.after_step(batch.now, batch.values)
    found = [one for _, teacher in pairs for one in teacher.parameters()]
    assert all(torch.allclose(one, other) for one, other in zip(found, expected, strict=True))
    assert method.encoder is method.teacher


def test_the_teacher_s_temperature_warms_up_and_its_momentum_rises_to_1() -> None:
    schedules = dino(
        teacher_temperature_start=0.04,
        teacher_temperature=0.07,
        teacher_temperature_epochs=30.0,
        momentum_start=0.996,
    ).schedules()

    def at(name: str, epoch: float) -> float:
        return schedules[name](Now(round(10 * epoch), 1000, 10))

    assert at("teacher_temperature", 0) == pytest.approx(0.0401)
    assert at("teacher_temperature", 14.9) == pytest.approx(0.055)
    assert at("teacher_temperature", 30) == at("teacher_temperature", 99) == 0.07
    assert at("momentum", 0) == pytest.approx(0.996)
    assert at("momentum", 50) == pytest.approx(0.998)
    assert at("momentum", 100) == pytest.approx(1.0)


# ---------------------------------------------------------------------------------------------- the settings


def test_settings_for_imagenet_are_the_paper_s() -> None:
    options = DINOOptions.suited_to(IMAGENET)
    assert options == DINOOptions()
    assert (options.output_dim, options.hidden_dim, options.bottleneck_dim) == (65_536, 2048, 256)
    assert (options.local_crops, options.local_size, options.local_min, options.crop_split) == (
        8,
        96,
        0.05,
        0.4,
    )
    recipe = DINO.recipe(IMAGENET)
    assert (recipe.optimizer, recipe.weight_decay, recipe.weight_decay_end, recipe.clip) == (
        "adamw",
        0.04,
        0.4,
        3.0,
    )


def test_few_images_get_few_prototypes_and_few_steps_a_quick_teacher() -> None:
    small = DINOOptions.suited_to(CIFAR)
    assert small.output_dim == 2048
    assert small.local_crops == 4
    assert small.momentum_start == pytest.approx(0.998)
    assert small.teacher_temperature == 0.04  # 19,400 steps: with .07 the loss stays at ln K
    tiny = DINOOptions.suited_to(Facts(images=640, size=64, epochs=5, batch_size=64, steps_per_epoch=10))
    assert tiny.output_dim == 1024
    assert tiny.momentum_start == 0.9
    assert tiny.teacher_temperature_epochs == pytest.approx(1.5)
    assert tiny.freeze_epochs == pytest.approx(0.5)


def test_a_conv_net_is_trained_as_the_authors_train_resnets() -> None:
    options, recipe = DINOOptions.suited_to(CONV), DINO.recipe(CONV)
    assert options == replace(DINOOptions(), head_norm=True, crop_split=0.14)
    assert (recipe.optimizer, recipe.lr, recipe.weight_decay) == ("sgd", 0.03, 1e-4)
    small = replace(CIFAR, backbone_kind="conv")
    assert DINOOptions.suited_to(small) == replace(DINOOptions.suited_to(CIFAR), head_norm=True)
    assert DINO.recipe(small).lr == 0.12


@pytest.mark.parametrize("size", [8, 16, 28, 32, 40, 48, 64, 96, 112, 128, 160, 224, 256])
def test_small_crops_fit_the_default_transformer_of_any_size(size: int) -> None:
    options = DINOOptions.suited_to(replace(CIFAR, size=size))
    patch = int(default_backbone(size, "vit").partition("/")[2])
    assert options.local_size % patch == 0
    assert 0.4 * size <= options.local_size <= 0.7 * size


def test_small_crops_that_patches_do_not_tile_are_refused_at_the_start() -> None:
    with pytest.raises(InvalidField, match=r"local_size=10 .* patches of 4 pixels .* use 8 or 12"):
        dino(local_size=10)
    DINO(build("test_vit/4", 16), replace(dino().options, local_size=10, local_crops=0), FACTS)
    DINO(TinyConv(), replace(dino().options, local_size=10), FACTS)


def test_small_crops_that_are_larger_than_large_ones_are_refused() -> None:
    with pytest.raises(InvalidField, match=r"local_min=0\.5 is more than crop_split=0\.4"):
        dino(local_min=0.5)
    dino(local_min=0.5, local_crops=0)


def test_views_are_two_large_crops_and_small_ones_blurred_and_solarised_unequally() -> None:
    first, second, *local = DINO.views(Augmentation(), DINOOptions(), IMAGENET)
    assert (first.size, first.scale, first.blur, first.solarize, first.of) == (
        224,
        (0.4, 1.0),
        1.0,
        0.0,
        "image",
    )
    assert (second.size, second.scale, second.blur, second.solarize) == (224, (0.4, 1.0), 0.1, 0.2)
    assert (first.of, second.of) == ("image", "partner")
    assert len(local) == 8
    assert {(one.size, one.scale, one.blur, one.solarize) for one in local} == {(96, (0.05, 0.4), 0.5, 0.0)}
    assert all(view.blur == 0 for view in DINO.views(Augmentation(blur=0), DINOOptions(), CIFAR))
