"""DINOv2: its three terms against a literal version, what is hidden from whom, and what learns how fast."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from embedserve.errors import InvalidField
from tests.training.agreement import assert_same_gradients, assert_two_ranks_train_as_one, doubled
from tests.training.methods.test_dino import literal_head, softmax
from tests.training.ranks import on_ranks
from tests.training.test_koleo import literal as literal_koleo
from tests.training.tiny import FACTS, TinyConv, batch_for, tiny_method
from training.distributed import rank, world_size
from training.method import Batch, Facts
from training.methods.dinov2 import DINOv2, DINOv2Options
from training.optim import build_optimizer, set_rates
from training.schedules import Now
from training.views import Augmentation

IMAGENET = Facts(
    images=1_281_167, size=224, epochs=100, batch_size=1024, steps_per_epoch=1251, backbone_kind="vit"
)


def dinov2(**options: Any) -> Any:
    """In float64, with a teacher that differs from the student and a mask token that is not zero."""
    method: Any = tiny_method("dinov2", **options)
    torch.manual_seed(1)
    for teacher in (method.teacher, method.teacher_head, method.teacher_patch_head):
        for parameter in teacher.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    method.backbone.mask_token.data.normal_()
    return method.double()


def watch_masks(method: Any, monkeypatch: pytest.MonkeyPatch) -> list[Tensor | None]:
    """Collects what the student's and the teacher's backbones are given to hide."""
    seen: list[Tensor | None] = []
    for backbone in (method.backbone, method.teacher):
        features = backbone.features

        def watched(images: Tensor, masks: Tensor | None = None, features: Any = features) -> Any:
            seen.append(masks)
            return features(images, masks)

        monkeypatch.setattr(backbone, "features", watched)
    return seen


def masks_of(method: Any, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """The student's masks, bool [2, B, patches]."""
    with monkeypatch.context() as context:
        seen = watch_masks(method, context)
        method.loss(batch)
    (masks,) = [one for one in seen if one is not None]
    return masks.view(2, -1, masks.shape[1])


# ------------------------------------------------------------------------------------------------ the loss


def literal_sinkhorn(outputs: Sequence[Tensor], temperature: float, iterations: int) -> list[Tensor]:
    """Caron et al. 2020, appendix A: columns and rows are brought to equal sums in turn."""
    table = torch.stack([(output / temperature).exp() for output in outputs])
    for _ in range(iterations):
        table = table / table.sum(0, keepdim=True) / table.shape[1]
        table = table / table.sum(1, keepdim=True) / table.shape[0]
    return list(table * table.shape[0])


def cross_entropy(target: Tensor, output: Tensor) -> Tensor:
    return -(target * softmax(output / 0.1).log()).sum()


def literal_loss(
    method: Any, views: Sequence[Tensor], ids: Tensor, masks: Tensor, temperature: float
) -> Tensor:
    """Oquab et al. 2023, section 4, crop by crop and patch by patch; the terms weigh as in their code."""
    images = len(ids)
    crops = [(view, image) for view in range(2) for image in range(images)]

    def patches(backbone: Any, view: int, image: int, mask: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        token, grid = backbone.features(views[view][image : image + 1], None if mask is None else mask[None])
        return token[0], list(grid[0].flatten(1).T)

    with torch.no_grad():
        seen = {crop: patches(method.teacher, *crop, None) for crop in crops}
        whole = [literal_head(method.teacher_head, seen[crop][0]) for crop in crops]
        hidden = [(crop, at) for crop in crops for at in range(masks.shape[2]) if masks[crop][at]]
        parts = [literal_head(method.teacher_patch_head, seen[crop][1][at]) for crop, at in hidden]
        targets = dict(zip(crops, literal_sinkhorn(whole, temperature, 3), strict=True))
        patch_targets = literal_sinkhorn(parts, temperature, 3)

    student = {crop: patches(method.backbone, *crop, masks[crop]) for crop in crops}
    outputs = {crop: literal_head(method.head, token) for crop, (token, _) in student.items()}
    for view in range(2, len(views)):
        for image in range(images):
            token = method.backbone(views[view][image : image + 1])[0]
            outputs[view, image] = literal_head(method.head, token)

    pairs = [(a, b) for a in range(2) for b in range(len(views)) if a != b]
    dino = sum(
        cross_entropy(targets[a, image], outputs[b, image]) for a, b in pairs for image in range(images)
    )
    ibot = sum(
        cross_entropy(target, literal_head(method.patch_head, student[crop][1][at])) / masks[crop].sum()
        for (crop, at), target in zip(hidden, patch_targets, strict=True)
    )
    tokens = [torch.stack([student[view, image][0] for image in range(images)]) for view in range(2)]
    koleo = literal_koleo(tokens[0], ids) + literal_koleo(tokens[1], ids)
    result: Tensor = dino / (len(pairs) * images) + ibot / (2 * images) + 0.1 * koleo
    return result


@pytest.mark.parametrize("local_crops", [0, 2])
def test_the_loss_and_all_gradients_are_those_of_the_paper(
    local_crops: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = dinov2(local_crops=local_crops, teacher_temperature=0.06, teacher_temperature_epochs=0.0)
    batch = doubled(batch_for(method, size=3))
    masks = masks_of(method, batch, monkeypatch)
    expected = literal_loss(method, batch.views, batch.ids, masks, 0.06)
    assert_same_gradients(method, method.loss(batch)["loss"], expected)


def test_the_terms_are_logged_apart() -> None:
    method = dinov2(koleo=0.5)
    losses = method.loss(doubled(batch_for(method)))
    total = losses["dino"] + losses["ibot"] + 2 * 0.5 * losses["koleo"]
    torch.testing.assert_close(losses["loss"], total)


def test_the_alarm_for_a_loss_that_stays_at_ln_k_knows_k() -> None:
    assert dinov2(output_dim=24).logit_count() == 24


def test_two_ranks_train_as_one_with_the_joined_batch() -> None:
    assert_two_ranks_train_as_one("dinov2", local_crops=2, freeze_epochs=0.125)


# ------------------------------------------------------------------------------------------- what is hidden


def test_the_student_sees_one_crop_of_each_image_masked_and_the_teacher_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    method = dinov2()
    with monkeypatch.context() as context:
        seen = watch_masks(method, context)
        method.loss(doubled(batch_for(method, size=8)))
    assert [one is None for one in seen].count(False) == 1
    masks = masks_of(method, doubled(batch_for(method, size=8)), monkeypatch)
    hidden = masks.sum(2)
    assert torch.equal((hidden > 0).sum(0), torch.ones(8, dtype=torch.int64))
    assert 0 < (hidden[0] > 0).sum() < 8  # now the first crop, now the second
    assert set(hidden[hidden > 0].tolist()) <= set(range(2, 9))  # .1 to .5 of 16 patches


def test_masks_change_from_step_to_step_and_are_the_same_again_when_a_step_is_repeated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    method = dinov2()
    first, second, again = (
        masks_of(method, doubled(batch_for(method, step=step)), monkeypatch) for step in (0, 1, 0)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first.any(0), second.any(0))  # other patches, not just of the other crop
    assert not torch.equal(first.any(2), second.any(2))  # and other crops


def masks_on_ranks(images: int) -> Tensor:
    method = dinov2()
    batch = doubled(batch_for(method, size=images // world_size(), step=5))
    with pytest.MonkeyPatch.context() as context:
        return masks_of(method, batch, context)


def test_each_rank_takes_its_share_of_the_masks_of_the_joined_batch() -> None:
    torch.testing.assert_close(torch.cat(on_ranks(masks_on_ranks, 8), dim=1), masks_on_ranks(8))
    assert rank() == 0


# ------------------------------------------------------------------------------------------ what moves when


def test_all_prototypes_rest_for_the_first_epoch() -> None:
    method = dinov2(freeze_epochs=1.0)
    batch = doubled(batch_for(method))
    for step, rests in ((7, True), (8, False)):
        method.loss(batch)["loss"].backward()
        method.before_step(Now(step, 32, 8))
        for head in (method.head, method.patch_head):
            assert (head.prototypes.weight.grad is None) == rests
            assert head.layers[0].weight.grad is not None


def test_the_teacher_follows_backbone_and_both_heads_and_is_what_is_exported() -> None:
    method = dinov2(momentum_start=0.9)
    batch = doubled(batch_for(method))
    followed = [(student, teacher) for student, teacher in method.momentum_pairs()]
    assert {id(student) for student, _ in followed} == {
        id(one) for one in (method.backbone, method.head, method.patch_head)
    }
    before = [one.clone() for _, teacher in followed for one in teacher.parameters()]
    method.loss(batch)["loss"].backward()
    assert all(one.grad is None for _, teacher in followed for one in teacher.parameters())
    method.after_step(batch.now, batch.values)
    pairs = [pair for one in followed for pair in zip(one[0].parameters(), one[1].parameters(), strict=True)]
    for (student, teacher), old in zip(pairs, before, strict=True):
        torch.testing.assert_close(teacher, 0.9 * old + 0.1 * student)
    assert method.encoder is method.teacher


def test_early_layers_learn_more_slowly() -> None:
    method = dinov2(layer_decay=0.5)
    recipe = DINOv2.recipe(FACTS)
    optimizer = build_optimizer(method, recipe)
    peak = set_rates(optimizer, recipe, Now(4, 40, 8), batch_size=FACTS.batch_size)["lr"]
    rates = {id(one): group["lr"] / peak for group in optimizer.param_groups for one in group["params"]}
    network = method.backbone.network
    assert len(network.blocks) == 2
    expected = [
        (method.head.layers[0].weight, 1),
        (network.norm.weight, 1),
        (network.blocks[1].attn.qkv.weight, 1 / 2),
        (network.blocks[0].mlp.fc1.bias, 1 / 4),
        (network.cls_token, 1 / 8),
        (network.pos_embed, 1 / 8),
        (method.backbone.mask_token, 1 / 8),
        (network.patch_embed.proj.weight, 0.2 / 8),
    ]
    for parameter, factor in expected:
        assert rates[id(parameter)] == pytest.approx(factor)


# ---------------------------------------------------------------------------------------------- the settings


def test_settings_for_imagenet_are_the_paper_s() -> None:
    options = DINOv2Options.suited_to(IMAGENET)
    assert options == DINOv2Options()
    assert (options.momentum_start, options.teacher_temperature, options.crop_split) == (0.992, 0.07, 0.32)
    assert (options.koleo, options.mask_least, options.mask_most) == (0.1, 0.1, 0.5)
    first, _, local, *_ = DINOv2.views(Augmentation(), options, IMAGENET)
    assert (first.scale, local.scale) == ((0.32, 1.0), (0.05, 0.32))


@pytest.mark.parametrize("batch_size", [64, 256, 1024, 4096])
def test_the_learning_rate_grows_with_the_root_of_the_batch(batch_size: int) -> None:
    facts = Facts(images=100_000, size=224, epochs=100, batch_size=batch_size, steps_per_epoch=24)
    recipe = DINOv2.recipe(facts)
    peak = recipe.lr * batch_size / 256  # as the loop scales it
    assert peak == pytest.approx(0.004 * math.sqrt(batch_size / 1024))


def test_a_conv_net_has_no_patches_to_hide() -> None:
    with pytest.raises(InvalidField, match="'tiny' has none; set backbone to a vision transformer such as"):
        DINOv2(TinyConv(), DINOv2Options(output_dim=8, hidden_dim=8), FACTS)
