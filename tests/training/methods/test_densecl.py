"""DenseCL: the paper's two losses, its correspondences and queues, and one rank against two."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.training.agreement import doubled, gradients
from tests.training.ranks import on_ranks
from tests.training.tiny import FACTS, batch_for, tiny_method
from training.batch_norm import synchronize_batch_norms
from training.distributed import all_mean, rank, world_size
from training.method import Batch, Facts
from training.methods.densecl import DenseCL, DenseCLOptions, corresponding
from training.methods.moco import MoCoV2
from training.queue import FeatureQueue

IMAGENET = Facts(images=1_281_167, size=224, epochs=200, batch_size=256, steps_per_epoch=5004)


def densecl(**options: Any) -> Any:
    """In float64, with a momentum encoder that differs, and rows of images 2 to 9 in both queues."""
    method: Any = tiny_method("densecl", **options).double()
    torch.manual_seed(1)
    for _, target in method.momentum_pairs():
        for parameter in target.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    for queue in (method.queue, method.dense_queue):
        queue.ids[:8] = torch.arange(2, 10)
        queue.filled.fill_(8)
        queue.next.fill_(8)
    return method


def batch_of(method: Any, size: int = 8) -> Batch:
    return doubled(batch_for(method, size=size))


# ---------------------------------------------------------------- the loss


def literal_term(
    query: Tensor, key: Tensor, id_: Tensor, queue: FeatureQueue, temperature: float, beta: float
) -> Tensor:
    """InfoNCE of one query (Wang et al. 2021, eq. 1); hard negatives as in Robinson et al. 2021, eq. 4."""
    query = query / query.norm()
    positive = (query @ key / key.norm() / temperature).exp()
    rows = [row for row, other in zip(queue.rows, queue.ids, strict=True) if other != id_]
    negatives = torch.stack([query @ row / temperature for row in rows])
    weights = (beta * negatives).exp() / (beta * negatives).exp().mean()
    return -torch.log(positive / (positive + (weights * negatives.exp()).sum()))


def literal_losses(method: Any, batch: Batch, temperature: float, beta: float) -> tuple[Tensor, Tensor]:
    """Eq. 1 over images and eq. 2 over all their places, each matched by backbone features (eq. 3)."""
    first, second = batch.views
    maps = method.backbone.network(first)
    with torch.no_grad():
        key_maps = method.momentum_backbone.network(second)
        key_places = method.momentum_dense_head(key_maps)
    places = method.dense_head(maps)
    whole, dense = [], []
    height, width = maps.shape[2:]
    for image in range(len(first)):
        id_ = batch.ids[image]
        query = method.head(maps[image].mean((1, 2))[None])[0]
        with torch.no_grad():
            key = method.momentum_head(key_maps[image].mean((1, 2))[None])[0]
        whole.append(literal_term(query, key, id_, method.queue, temperature, beta))
        for y in range(height):
            for x in range(width):
                feature = maps[image, :, y, x].detach()
                similarity = {
                    (v, u): float(feature @ key_maps[image, :, v, u] / key_maps[image, :, v, u].norm())
                    for v in range(height)
                    for u in range(width)
                }
                v, u = max(similarity, key=lambda at: similarity[at])
                dense.append(
                    literal_term(
                        places[image, :, y, x],
                        key_places[image, :, v, u],
                        id_,
                        method.dense_queue,
                        temperature,
                        beta,
                    )
                )
    return torch.stack(whole).mean(), torch.stack(dense).mean()


@pytest.mark.parametrize(("dense_weight", "beta"), [(0.5, 0.0), (0.3, 0.5)])
def test_the_losses_and_all_gradients_are_those_of_the_paper(dense_weight: float, beta: float) -> None:
    method = densecl(dense_weight=dense_weight, beta=beta, temperature=0.3, queue_length=12)
    batch = batch_of(method, 4)
    whole, dense = literal_losses(method, batch, 0.3, beta)
    literal = (1 - dense_weight) * whole + dense_weight * dense
    expected = gradients(method, literal)
    losses = method.loss(batch)
    found = gradients(method, losses["loss"])
    torch.testing.assert_close(losses, {"loss": literal, "whole": whole, "dense": dense})
    assert found.keys() == expected.keys()
    assert {name.split(".")[0] for name in found} == {"backbone", "head", "dense_head"}
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


def step_on_rank() -> dict[str, Tensor]:
    """One step on this rank's share of 8 images: loss and gradients as DDP averages them, and the queues."""
    method = densecl(beta=0.5)
    synchronize_batch_norms(method, torch.device("cpu"))
    joined = batch_of(method)
    count = 8 // world_size()
    own = slice(rank() * count, (rank() + 1) * count)
    batch = replace(joined, views=[view[own] for view in joined.views], ids=joined.ids[own])
    loss = method.loss(batch)["loss"]
    found = {name: all_mean(one) for name, one in gradients(method, loss).items()}
    method.after_step(batch.now, batch.values)
    queues = {name: value for name, value in method.state_dict().items() if "queue" in name}
    return found | queues | {"loss": all_mean(loss.detach())}


def test_two_ranks_take_the_step_of_one_with_the_joined_batch() -> None:
    expected = step_on_rank()
    for found in on_ranks(step_on_rank):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, msg=name)


# ---------------------------------------------------------------- correspondences


def test_a_place_finds_where_its_feature_went() -> None:
    """A key view whose places are shifted and scaled is matched back, place by place."""
    patches = torch.eye(4).reshape(1, 4, 2, 2)
    moved = patches.flatten(2)[:, :, [2, 0, 3, 1]].reshape(1, 4, 2, 2)
    dense_keys = torch.arange(4.0).reshape(1, 1, 2, 2)
    lengths = torch.tensor([9.0, 0.1, 5.0, 1.0]).reshape(1, 1, 2, 2)
    found = corresponding(patches, moved * lengths, dense_keys)
    assert found.shape == (1, 4, 1)
    assert found.flatten().tolist() == [1, 3, 0, 2]


def test_maps_of_unequal_size_correspond() -> None:
    found = corresponding(torch.randn(2, 3, 2, 2), torch.randn(2, 3, 4, 5), torch.randn(2, 7, 4, 5))
    assert found.shape == (2, 4, 7)


# ---------------------------------------------------------------- after the step


def test_after_the_step_either_queue_holds_one_key_of_each_image() -> None:
    method = densecl()
    batch = batch_of(method)
    with torch.no_grad():
        pooled, maps = method.momentum_backbone.features(batch.views[1])
        whole = nn.functional.normalize(method.momentum_head(pooled), dim=1)
        dense = nn.functional.normalize(method.momentum_dense_head(maps).mean((2, 3)), dim=1)
    before = method.dense_queue.rows.clone()
    method.loss(batch)
    assert torch.equal(method.dense_queue.rows, before)
    method.after_step(batch.now, batch.values)
    torch.testing.assert_close(method.queue.rows[8:16], whole)
    torch.testing.assert_close(method.dense_queue.rows[8:16], dense)
    for queue in (method.queue, method.dense_queue):
        assert queue.ids[8:16].tolist() == batch.ids.tolist()
        assert queue.next == 16


def test_the_momentum_networks_take_no_gradient_and_follow_the_step() -> None:
    method = densecl()
    batch = batch_of(method)
    gradients(method, method.loss(batch)["loss"])
    before = {name: one.clone() for name, one in method.state_dict().items()}
    method.after_step(batch.now, {"momentum": 0.75})
    for name in ("backbone", "head", "dense_head"):
        for key, found in getattr(method, f"momentum_{name}").named_parameters():
            assert found.grad is None
            expected = 0.75 * before[f"momentum_{name}.{key}"] + 0.25 * before[f"{name}.{key}"]
            torch.testing.assert_close(found, expected)


def test_a_whole_step_runs_under_autocast_and_stores_unit_keys() -> None:
    method: Any = tiny_method("densecl")
    batch = batch_for(method)
    with torch.autocast("cpu", torch.bfloat16):
        losses = method.loss(batch)
    assert {one.dtype for one in losses.values()} == {torch.float32}
    losses["loss"].backward()
    method.after_step(batch.now, batch.values)
    for queue in (method.queue, method.dense_queue):
        torch.testing.assert_close(queue.rows.norm(dim=1), torch.ones(32), rtol=0, atol=1e-6)


# ---------------------------------------------------------------- settings


def test_on_imagenet_the_settings_are_the_papers() -> None:
    options = DenseCLOptions.suited_to(IMAGENET)
    assert options == DenseCLOptions()
    assert (options.dense_weight, options.temperature, options.queue_length) == (0.5, 0.2, 65_536)
    assert DenseCL.recipe(IMAGENET) == MoCoV2.recipe(IMAGENET)


def test_small_images_have_moco_v2s_settings_and_a_smaller_head() -> None:
    options = DenseCLOptions.suited_to(FACTS)
    assert (options.temperature, options.queue_length, options.hidden_dim) == (0.1, 32, 512)


def test_the_dense_head_is_two_convolutions_of_one_pixel() -> None:
    head = densecl().dense_head
    assert [type(one) for one in head] == [nn.Conv2d, nn.ReLU, nn.Conv2d]
    assert {one.kernel_size for one in head if isinstance(one, nn.Conv2d)} == {(1, 1)}
