"""SwAV against its paper's pseudo-code, literally and slowly."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.training.agreement import assert_same_gradients, assert_two_ranks_train_as_one, doubled
from tests.training.tiny import FACTS, batch_for, tiny_method
from training.method import Facts
from training.methods.swav import SwAV, SwAVOptions, prototype_scores, swapped_prediction_loss
from training.schedules import Now
from training.views import Augmentation

PHOTOGRAPHS = Facts(images=1_281_167, size=224, epochs=400, batch_size=4096, steps_per_epoch=312)

AT_ONCE: dict[str, Any] = {"queue_length": 20, "queue_epochs": 0.0, "freeze_epochs": 0.0}


def swav(**options: Any) -> SwAV:
    method = tiny_method("swav", **options).double()
    assert isinstance(method, SwAV)
    return method


def embeddings(method: SwAV, views: list[Tensor]) -> list[Tensor]:
    """Unit vectors of each view. Two sizes, two passes of the backbone; one of the head."""
    full, local = method.backbone(torch.cat(views[:2])), method.backbone(torch.cat(views[2:]))
    projected = method.head(torch.cat([full, local]))
    return list((projected / projected.square().sum(1, keepdim=True).sqrt()).chunk(len(views)))


def sinkhorn(scores: Tensor) -> Tensor:
    """Appendix A.1: Q [K, B]; three times rows, then columns."""
    q = (scores / 0.05).exp().T
    q = q / q.sum()
    for _ in range(3):
        q = q / q.sum(1, keepdim=True) / q.shape[0]
        q = q / q.sum(0, keepdim=True) / q.shape[1]
    return (q * q.shape[1]).T


def literal(method: SwAV, views: list[Tensor], queues: tuple[Tensor, Tensor] | None) -> Tensor:
    """The training step of appendix A.1, with rows of the queue assigned beside the batch."""
    prototypes = method.prototypes.weight
    z = embeddings(method, views)
    loss = torch.zeros((), dtype=torch.float64)
    for assigned in (0, 1):
        with torch.no_grad():
            rows = z[assigned] if queues is None else torch.cat([queues[assigned], z[assigned]])
            q = sinkhorn(rows @ prototypes.T)[-len(z[assigned]) :]
        for predicting in range(len(views)):
            if predicting == assigned:
                continue
            scores = z[predicting] @ prototypes.T / 0.1
            for b in range(len(scores)):
                p = scores[b].exp() / scores[b].exp().sum()
                loss = loss - (q[b] * p.log()).sum() / len(scores) / (len(views) - 1) / 2
    return loss


def test_the_loss_is_that_of_the_paper() -> None:
    method = swav(queue_length=0)
    batch = doubled(batch_for(method))
    assert len(batch.views) == 6
    assert_same_gradients(method, method(batch)["loss"], literal(method, list(batch.views), None))


def test_rows_of_the_queue_are_assigned_beside_the_batch() -> None:
    method = swav(**AT_ONCE)
    for step in range(4):
        method(doubled(batch_for(method, seed=step, step=step)))
        method.after_step(Now(step, 32, 8), {})
    batch = doubled(batch_for(method, seed=9, step=4))
    queues = method.queue.rows[:, :32].clone(), method.queue.rows[:, 32:].clone()
    found = method(batch)["loss"]
    assert_same_gradients(method, found, literal(method, list(batch.views), queues))
    assert abs(found.item() - literal(method, list(batch.views), None).item()) > 1e-4


def test_the_queue_keeps_each_full_size_view_apart_and_takes_a_batch_after_the_step() -> None:
    method = swav(**AT_ONCE)
    batch = doubled(batch_for(method))
    first, second, *_ = embeddings(method, list(batch.views))
    before = method.queue.rows.clone()
    method(batch)
    torch.testing.assert_close(method.queue.rows, before)
    method.after_step(batch.now, {})
    torch.testing.assert_close(method.queue.rows[:8, :32], first.detach())
    torch.testing.assert_close(method.queue.rows[:8, 32:], second.detach())


@pytest.mark.parametrize(
    ("step", "used"),
    [(0, False), (1, False), (2, True)],  # 8 images a step fill 16 rows in 2 steps
)
def test_the_queue_waits_until_it_is_full(step: int, used: bool) -> None:
    method = swav(**{**AT_ONCE, "queue_length": 16})
    batch = doubled(batch_for(method, step=step))
    without = literal(method, list(batch.views), None)
    assert torch.allclose(method(batch)["loss"], without) is not used


@pytest.mark.parametrize(("step", "used"), [(7, False), (8, True)])
def test_the_queue_waits_for_its_epoch(step: int, used: bool) -> None:
    method = swav(**{**AT_ONCE, "queue_epochs": 1.0})
    batch = doubled(batch_for(method, step=step))
    without = literal(method, list(batch.views), None)
    assert torch.allclose(method(batch)["loss"], without) is not used


def test_two_ranks_train_as_one_with_each_row_of_the_queue_counted_once() -> None:
    assert_two_ranks_train_as_one("swav", 5, **AT_ONCE)


def test_no_view_predicts_its_own_assignment() -> None:
    """Each view likes its own prototype; where each assignment is the other view's, nothing is lost."""
    likes = torch.eye(4)[[0, 1]].expand(3, 2, 4).clone()
    likes[1] = torch.eye(4)[[2, 3]]
    likes[2] = 0
    swapped = swapped_prediction_loss(likes[:2], likes[:2].flip(0), temperature=0.01)
    own = swapped_prediction_loss(likes[:2], likes[:2], temperature=0.01)
    assert float(swapped) == pytest.approx(0, abs=1e-6)
    assert float(own) == pytest.approx(100, rel=1e-3)


def test_the_loss_of_a_network_that_says_nothing_is_the_logarithm_of_its_logit_count() -> None:
    method = swav(prototypes=16)
    scores = torch.zeros(6, 8, 16)
    assignments = F.one_hot(torch.arange(8), 16).float().expand(2, 8, 16)
    loss = swapped_prediction_loss(scores, assignments, temperature=0.1)
    assert method.logit_count() == 16
    assert float(loss) == pytest.approx(math.log(method.logit_count()))


def test_prototypes_have_no_bias_and_are_unit_vectors_after_every_step() -> None:
    method = swav(freeze_epochs=0.0)
    assert method.prototypes.bias is None
    ones = torch.ones(16, dtype=torch.float64)
    torch.testing.assert_close(method.prototypes.weight.norm(dim=1).detach(), ones, atol=1e-6, rtol=0)
    batch = doubled(batch_for(method))
    method(batch)["loss"].backward()
    method.before_step(batch.now)
    with torch.no_grad():
        method.prototypes.weight -= method.prototypes.weight.grad
    assert (method.prototypes.weight.norm(dim=1) - 1).abs().max() > 1e-3
    method.after_step(batch.now, {})
    torch.testing.assert_close(method.prototypes.weight.norm(dim=1).detach(), ones)


@pytest.mark.parametrize(("step", "frozen"), [(0, True), (7, True), (8, False)])
def test_prototypes_are_frozen_at_first(step: int, frozen: bool) -> None:
    method = swav(freeze_epochs=1.0)
    batch = doubled(batch_for(method, step=step))
    method(batch)["loss"].backward()
    method.before_step(batch.now)
    assert (method.prototypes.weight.grad is None) is frozen
    assert all(one.grad is not None for one in method.head.parameters())


def test_views_of_one_size_share_a_pass_and_with_it_their_batch_statistics() -> None:
    method = swav()
    passes = []
    method.backbone.register_forward_hook(lambda _, inputs, __: passes.append(tuple(inputs[0].shape)))
    method(doubled(batch_for(method)))
    assert passes == [(16, 3, 16, 16), (32, 3, 8, 8)]


def test_autocast_rounds_no_score() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, prototypes = torch.randn(8, 4, generator=generator), torch.randn(5, 4, generator=generator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = prototype_scores(rows, prototypes)
    torch.testing.assert_close(under, rows @ prototypes.T)


def test_photographs_have_the_papers_crops_and_prototypes() -> None:
    options = SwAVOptions.suited_to(PHOTOGRAPHS)
    assert options == replace(SwAVOptions(), queue_length=0)
    views = SwAV.views(Augmentation.suited_to(224), options, PHOTOGRAPHS)
    assert [view.size for view in views] == [224] * 2 + [96] * 6
    assert {view.scale for view in views[2:]} == {(0.05, 0.14)}


def test_a_small_batch_has_the_papers_queue() -> None:
    options = SwAVOptions.suited_to(replace(PHOTOGRAPHS, batch_size=256))
    assert (options.queue_length, options.queue_epochs) == (3840, 15)


def test_a_short_training_uses_its_queue_and_moves_its_prototypes_sooner() -> None:
    options = SwAVOptions.suited_to(replace(PHOTOGRAPHS, batch_size=256, epochs=10))
    assert options.queue_epochs == pytest.approx(0.75)
    assert options.freeze_epochs == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("images", "size", "prototypes", "local_size"),
    [(50_000, 32, 500, 16), (8_000, 64, 80, 24), (100, 28, 16, 16)],
)
def test_prototypes_follow_the_number_of_images_and_crops_their_size(
    images: int, size: int, prototypes: int, local_size: int
) -> None:
    options = SwAVOptions.suited_to(replace(FACTS, images=images, size=size))
    assert (options.prototypes, options.local_size) == (prototypes, local_size)
    assert options.queue_length == round(1.28 * prototypes)
    assert options.local_crops == 4


def test_of_a_group_half_of_the_crops_are_the_partners() -> None:
    views = SwAV.views(Augmentation(), SwAVOptions(), PHOTOGRAPHS)
    assert [view.of for view in views] == ["image", "partner"] * 4
