"""MoCo v1 and v2: the paper's loss, the queue, shuffled batch norm, and one rank against two."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.training.agreement import gradients
from tests.training.ranks import on_ranks
from tests.training.tiny import FACTS, batch_for, tiny_method
from training.batch_norm import synchronize_batch_norms
from training.distributed import all_mean, rank, world_size
from training.losses import queue_loss
from training.method import Batch, Facts
from training.methods.moco import MoCoOptions, MoCoV1, MoCoV2, MoCoV2Options
from training.momentum import suited_momentum
from training.queue import FeatureQueue
from training.views import Augmentation

IMAGENET = Facts(images=1_281_167, size=224, epochs=200, batch_size=256, steps_per_epoch=5004)
CIFAR = Facts(images=50_000, size=32, epochs=200, batch_size=512, steps_per_epoch=97)

BOTH = pytest.mark.parametrize("name", ["moco_v1", "moco_v2"])


def moco(name: str = "moco_v2", **options: Any) -> Any:
    """In float64, with a momentum encoder that differs and a queue half full of ids 2 to 17."""
    method: Any = tiny_method(name, **options).double()
    torch.manual_seed(1)
    for parameter in [*method.momentum_backbone.parameters(), *method.momentum_head.parameters()]:
        parameter.add_(0.1 * torch.randn_like(parameter))
    # Its random rows as they are, said to be of images: alike on every rank.
    method.queue.ids[:16] = torch.arange(2, 18)
    method.queue.filled.fill_(16)
    method.queue.next.fill_(16)
    return method


def batch_of(method: Any, size: int = 8, step: int = 0) -> Batch:
    batch = batch_for(method, size=size, step=step)
    return replace(batch, views=[view.double() for view in batch.views])


# ---------------------------------------------------------------- the loss


def literal_loss(
    queries: Tensor, keys: Tensor, ids: Tensor, queue: FeatureQueue, temperature: float, beta: float
) -> Tensor:
    """He et al. 2020, eq. 1, row by row; hard negatives as in Robinson et al. 2021, eq. 4."""
    total = torch.zeros((), dtype=torch.float64)
    for query, key, own in zip(queries, keys, ids, strict=True):
        query = query / query.square().sum().sqrt()
        positive = (query @ (key / key.square().sum().sqrt()) / temperature).exp()
        negatives = torch.stack(
            [query @ row / temperature for row, id_ in zip(queue.rows, queue.ids, strict=True) if id_ != own]
        )
        weights = (beta * negatives).exp() / (beta * negatives).exp().mean()
        total = total - torch.log(positive / (positive + (weights * negatives.exp()).sum()))
    return total / len(queries)


@BOTH
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_the_loss_and_all_gradients_are_those_of_the_paper(name: str, symmetric: bool, beta: float) -> None:
    method = moco(name, symmetric=symmetric, beta=beta, temperature=0.2)
    batch = batch_of(method, 4)
    literal = torch.zeros((), dtype=torch.float64)
    for query_view, key_view in [(0, 1), (1, 0)][: 1 + symmetric]:
        queries = method.head(method.backbone(batch.views[query_view]))
        with torch.no_grad():
            keys = method.momentum_head(method.momentum_backbone(batch.views[key_view]))
        literal = literal + literal_loss(queries, keys, batch.ids, method.queue, 0.2, beta)
    expected = gradients(method, literal)
    loss = method.loss(batch)["loss"]
    found = gradients(method, loss)
    torch.testing.assert_close(loss, literal)
    assert found.keys() == expected.keys()
    assert {name.split(".")[0] for name in found} == {"backbone", "head"}
    for one, gradient in found.items():
        torch.testing.assert_close(gradient, expected[one], msg=one)


def test_rows_of_the_query_s_own_image_do_not_repel_it() -> None:
    alone = queue_loss(torch.eye(2), torch.eye(2), torch.tensor([7, 7]), _queue([7]), temperature=1.0)
    apart = queue_loss(torch.eye(2), torch.eye(2), torch.tensor([8, 8]), _queue([7]), temperature=1.0)
    assert alone == 0 < apart


def _queue(ids: list[int]) -> FeatureQueue:
    """Rows along the first axis of a plane."""
    queue = FeatureQueue(len(ids), 2)
    queue.stage(torch.tensor([[1.0, 0.0]]).expand(len(ids), 2), torch.tensor(ids))
    queue.flush()
    return queue


def test_rows_that_are_still_random_count_as_negatives() -> None:
    torch.manual_seed(0)
    empty = FeatureQueue(4, 2)
    assert queue_loss(torch.eye(2), torch.eye(2), torch.arange(2), empty, temperature=1.0) > 0


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_key_is_never_its_own_negative(symmetric: bool) -> None:
    """Not even when ids cannot tell: the queue takes no key before all that need it unchanged are scored."""
    method = moco(symmetric=symmetric)
    batch = replace(batch_of(method), ids=torch.full((8,), -5))
    before = {key: value.clone() for key, value in method.queue.state_dict().items()}
    first = method.loss(batch)["loss"]
    second = method.loss(batch)["loss"]  # the next part of an accumulated batch
    assert first == second
    for key, value in method.queue.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_under_autocast_the_loss_is_computed_in_float32() -> None:
    queries, keys = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    queue = FeatureQueue(6, 8)
    plain = queue_loss(queries, keys, torch.arange(4), queue, temperature=0.02)
    with torch.autocast("cpu", torch.bfloat16):
        under = queue_loss(queries, keys, torch.arange(4), queue, temperature=0.02)
    assert under.dtype == torch.float32
    assert under == plain


def test_a_whole_step_runs_under_autocast_and_stores_unit_keys() -> None:
    method: Any = tiny_method("moco_v2")
    batch = batch_for(method)
    with torch.autocast("cpu", torch.bfloat16):
        loss = method.loss(batch)["loss"]
    loss.backward()
    method.after_step(batch.now, batch.values)
    torch.testing.assert_close(method.queue.rows.norm(dim=1), torch.ones(32), rtol=0, atol=1e-6)


# ---------------------------------------------------------------- after the step


@pytest.mark.parametrize("symmetric", [False, True])
def test_after_the_step_the_queue_holds_the_keys_of_all_images(symmetric: bool) -> None:
    method = moco(symmetric=symmetric)
    batch = batch_of(method)
    expected = [
        nn.functional.normalize(method.keys(batch.views[view], 0), dim=1) for view in [1, 0][: 1 + symmetric]
    ]
    method.loss(batch)
    method.after_step(batch.now, batch.values)
    added = slice(16, 16 + 8 * len(expected))
    torch.testing.assert_close(method.queue.rows[added], torch.cat(expected))
    assert method.queue.ids[added].tolist() == batch.ids.tolist() * len(expected)
    assert method.queue.ids[:16].tolist() == list(range(2, 18))


def test_the_momentum_encoder_takes_no_gradient_and_follows_the_step() -> None:
    method = moco()
    batch = batch_of(method)
    gradients(method, method.loss(batch)["loss"])
    before = copy.deepcopy(method)
    method.after_step(batch.now, {"momentum": 0.75})
    for online, momentum in [("backbone", "momentum_backbone"), ("head", "momentum_head")]:
        sources = getattr(before, online).parameters()
        targets = getattr(before, momentum).parameters()
        for found, source, target in zip(
            getattr(method, momentum).parameters(), sources, targets, strict=True
        ):
            assert found.grad is None
            torch.testing.assert_close(found, 0.75 * target + 0.25 * source)


def test_the_momentum_is_constant_unless_its_end_differs() -> None:
    now = [batch_for(tiny_method("moco_v2"), step=step).now for step in (0, 16, 32)]
    schedule = tiny_method("moco_v2", momentum_start=0.9, momentum_end=0.9).schedules()["momentum"]
    assert [schedule(one) for one in now] == [0.9, 0.9, 0.9]
    schedule = tiny_method("moco_v2", momentum_start=0.9, momentum_end=1.0).schedules()["momentum"]
    assert [schedule(one) for one in now] == pytest.approx([0.9, 0.95, 1.0])


def test_the_queue_is_saved_with_the_method() -> None:
    assert {"queue.rows", "queue.ids", "queue.filled", "queue.next"} <= moco().state_dict().keys()


# ---------------------------------------------------------------- two ranks


def step_on_rank(options: dict[str, Any]) -> dict[str, Tensor]:
    """One step on this rank's share of 8 images: loss and gradients as DDP averages them, and the queue."""
    method = moco(**options)
    synchronize_batch_norms(method, torch.device("cpu"))
    joined = batch_of(method)
    count = 8 // world_size()
    own = slice(rank() * count, (rank() + 1) * count)
    batch = replace(joined, views=[view[own] for view in joined.views], ids=joined.ids[own])
    loss = method.loss(batch)["loss"]
    found = {name: all_mean(one) for name, one in gradients(method, loss).items()}
    method.after_step(batch.now, batch.values)
    return found | {"loss": all_mean(loss.detach()), "rows": method.queue.rows, "ids": method.queue.ids}


def test_two_ranks_take_the_step_of_one_with_the_joined_batch() -> None:
    options = {"symmetric": True, "beta": 0.5}
    expected = step_on_rank(options)
    for found in on_ranks(step_on_rank, options):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, msg=name)


# ---------------------------------------------------------------- shuffled batch norm


def keys_on_rank(step: int, size: int) -> dict[str, Tensor]:
    method = moco(shuffle_bn=True)
    batch = batch_of(method, size)
    own = slice(rank() * size // world_size(), (rank() + 1) * size // world_size())
    images = batch.views[1][own]
    with torch.no_grad():
        return {
            "keys": method.keys(images, step),
            "again": method.keys(images, step),
            "next": method.keys(images, step + 1),
            "queries": method.queries(batch.views[0][own]),
        }


def test_with_shuffled_batch_norm_a_key_is_normalised_among_images_of_all_ranks() -> None:
    first, second = on_ranks(keys_on_rank, 3, 8)
    method = moco()
    batch = batch_of(method)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(3)).tolist()
    expected = torch.empty(8, 32, dtype=torch.float64)
    with torch.no_grad():
        for here in (order[:4], order[4:]):
            expected[here] = method.momentum_head(method.momentum_backbone(batch.views[1][here]))
        queries = [method.head(method.backbone(batch.views[0][own])) for own in (slice(4), slice(4, 8))]
    torch.testing.assert_close(torch.cat([first["keys"], second["keys"]]), expected)
    # Queries stay where they are, each rank with statistics of its own.
    torch.testing.assert_close(torch.cat([first["queries"], second["queries"]]), torch.cat(queries))
    torch.testing.assert_close(first["again"], first["keys"])
    assert not torch.allclose(first["next"], first["keys"])


def test_on_one_rank_shuffled_batch_norm_sees_32_images_at_a_time() -> None:
    found = keys_on_rank(3, 64)
    method = moco()
    batch = batch_of(method, 64)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(3)).tolist()
    expected = torch.empty(64, 32, dtype=torch.float64)
    with torch.no_grad():
        for here in (order[:32], order[32:]):
            expected[here] = method.momentum_head(method.momentum_backbone(batch.views[1][here]))
        queries = [method.head(method.backbone(batch.views[0][own])) for own in (slice(32), slice(32, 64))]
    torch.testing.assert_close(found["keys"], expected)
    torch.testing.assert_close(found["queries"], torch.cat(queries))


def test_a_small_batch_is_not_cut_for_shuffled_batch_norm() -> None:
    found = keys_on_rank(3, 40)
    method = moco()
    with torch.no_grad():
        torch.testing.assert_close(found["keys"], method.keys(batch_of(method, 40).views[1], 0))


def test_only_shuffled_batch_norm_forbids_joining_batch_norms() -> None:
    assert moco(shuffle_bn=True).local_batch_norm
    assert not moco().local_batch_norm


# ---------------------------------------------------------------- settings


def test_version_1_has_a_linear_head_and_version_2_a_hidden_layer_without_batch_norm() -> None:
    assert [type(one) for one in moco("moco_v1").head] == [nn.Linear]
    assert [type(one) for one in moco("moco_v2").head] == [nn.Linear, nn.ReLU, nn.Linear]
    assert moco("moco_v2").head[0].out_features == 16


def test_on_imagenet_the_settings_are_the_papers() -> None:
    first, second = MoCoOptions.suited_to(IMAGENET), MoCoV2Options.suited_to(IMAGENET)
    assert first == MoCoOptions()
    assert second == MoCoV2Options()
    assert (first.temperature, second.temperature) == (0.07, 0.2)
    assert (first.queue_length, first.momentum_start, first.momentum_end) == (65_536, 0.999, 0.999)
    recipe = MoCoV2.recipe(IMAGENET)
    assert (recipe.optimizer, recipe.lr, recipe.weight_decay, recipe.warmup_epochs) == ("sgd", 0.03, 1e-4, 0)


def test_on_small_images_the_settings_are_those_of_the_authors_demo() -> None:
    options = MoCoV2Options.suited_to(CIFAR)
    assert (options.temperature, options.queue_length, options.momentum_start) == (0.1, 4096, 0.99)


@pytest.mark.parametrize(
    ("images", "size", "batch_size", "length"),
    [
        (1_281_167, 224, 256, 65_536),
        (1_281_167, 224, 384, 65_280),
        (50_000, 32, 256, 4096),
        (8_100, 224, 256, 3840),
        (8_100, 64, 64, 4032),
        (100, 32, 64, 64),
        (4, 32, 2, 2),
    ],
)
def test_the_queue_holds_whole_batches_of_at_most_half_the_images(
    images: int, size: int, batch_size: int, length: int
) -> None:
    facts = replace(FACTS, images=images, size=size, batch_size=batch_size)
    assert MoCoV2Options.suited_to(facts).queue_length == length


@pytest.mark.parametrize(("steps", "momentum"), [(1_000_000, 0.999), (2000, 0.99), (400, 0.95), (10, 0.9)])
def test_a_short_training_has_a_quicker_momentum_encoder(steps: int, momentum: float) -> None:
    facts = replace(FACTS, epochs=1, steps_per_epoch=steps)
    assert suited_momentum(0.999, facts) == pytest.approx(momentum)


def test_version_2_blurs_and_version_1_does_not() -> None:
    augmentation = Augmentation()
    first = MoCoV1.views(augmentation, MoCoOptions(), IMAGENET)
    second = MoCoV2.views(augmentation, MoCoV2Options(), IMAGENET)
    assert [view.blur for view in first] == [0, 0]
    assert [view.blur for view in second] == [0.5, 0.5]
    assert [view.of for view in first] == [view.of for view in second] == ["image", "partner"]
