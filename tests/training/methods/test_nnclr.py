"""NNCLR: the paper's loss, whose neighbours come from where, and one rank against two."""

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
from training.losses import query_key_loss
from training.method import Batch, Facts
from training.methods.nnclr import NNCLR, NNCLROptions, nearest
from training.queue import FeatureQueue
from training.views import Augmentation

IMAGENET = Facts(images=1_281_167, size=224, epochs=1000, batch_size=4096, steps_per_epoch=312)


def nnclr(**options: Any) -> Any:
    """In float64, with half its queue filled: what it holds differs from every other row."""
    method: Any = tiny_method("nnclr", **options).double()
    torch.manual_seed(1)
    method.queue.ids[:16] = torch.arange(16)
    method.queue.filled.fill_(16)
    method.queue.next.fill_(16)
    return method


def batch_of(method: Any, size: int = 6) -> Batch:
    return doubled(batch_for(method, size=size))


# ---------------------------------------------------------------- the loss


def literal_nearest(embedding: Tensor, rows: list[Tensor]) -> Tensor:
    """Dwibedi et al. 2021, eq. 2: of unit vectors, the one at the least distance."""
    unit = embedding.detach() / embedding.detach().norm()
    return min(rows, key=lambda row: float((unit - row).square().sum()))


def literal_loss(
    embeddings: Tensor, predictions: Tensor, ids: Tensor, rows: list[Tensor], temperature: float, beta: float
) -> Tensor:
    """Eq. 3 with predictions: neighbour i against all predictions; hard negatives of Robinson et al. 2021."""
    total = torch.zeros((), dtype=torch.float64)
    for i, embedding in enumerate(embeddings):
        neighbour = literal_nearest(embedding, rows)
        logits = [neighbour @ one / one.norm() / temperature for one in predictions]
        negatives = torch.stack([one for one, id_ in zip(logits, ids, strict=True) if id_ != ids[i]])
        weights = (beta * negatives).exp() / (beta * negatives).exp().mean()
        positive = logits[i].exp()
        total = total - torch.log(positive / (positive + (weights * negatives.exp()).sum()))
    return total / len(embeddings)


@pytest.mark.parametrize("beta", [0.0, 0.5])
@pytest.mark.parametrize("ids", [(0, 1, 2, 3, 4, 5), (0, 1, 2, 0, 4, 1)], ids=["images", "groups"])
def test_the_loss_and_all_gradients_are_those_of_the_paper(beta: float, ids: tuple[int, ...]) -> None:
    method = nnclr(temperature=0.3, beta=beta)
    batch = replace(batch_of(method), ids=torch.tensor(ids))
    rows = list(method.queue.rows[:16])
    first, second = (method.projector(method.backbone(view)) for view in batch.views)
    literal = (
        literal_loss(first, method.predictor(second), batch.ids, rows, 0.3, beta)
        + literal_loss(second, method.predictor(first), batch.ids, rows, 0.3, beta)
    ) / 2
    expected = gradients(method, literal)
    loss = method.loss(batch)["loss"]
    found = gradients(method, loss)
    torch.testing.assert_close(loss, literal)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


def step_on_rank() -> dict[str, Tensor]:
    """One step on this rank's share of 6 images: loss and gradients as DDP averages them, and the queue."""
    method = nnclr(beta=0.5)
    synchronize_batch_norms(method, torch.device("cpu"))
    joined = replace(batch_of(method), ids=torch.tensor([0, 1, 2, 0, 4, 1]))
    count = 6 // world_size()
    own = slice(rank() * count, (rank() + 1) * count)
    batch = replace(joined, views=[view[own] for view in joined.views], ids=joined.ids[own])
    loss = method.loss(batch)["loss"]
    found = {name: all_mean(one) for name, one in gradients(method, loss).items()}
    method.after_step(batch.now, batch.values)
    return found | {"loss": all_mean(loss.detach()), "rows": method.queue.rows, "ids": method.queue.ids}


def test_two_ranks_take_the_step_of_one_with_the_joined_batch() -> None:
    expected = step_on_rank()
    for found in on_ranks(step_on_rank):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, msg=name)


# ---------------------------------------------------------------- neighbours


def compass(*ids: int) -> FeatureQueue:
    """The four directions of a plane, clockwise from north."""
    queue = FeatureQueue(4, 2)
    queue.rows.copy_(torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, -1.0], [-1.0, 0.0]]))
    queue.ids.copy_(torch.tensor(ids))
    queue.filled.fill_(sum(one >= 0 for one in ids))
    return queue


def test_the_neighbour_is_the_row_with_the_greatest_cosine() -> None:
    found = nearest(torch.tensor([[0.1, 5.0], [-2.0, 0.3]]), compass(10, 11, 12, 13))
    assert torch.equal(found, torch.tensor([[0.0, 1.0], [-1.0, 0.0]]))


def test_random_rows_are_no_neighbours() -> None:
    found = nearest(torch.tensor([[-3.0, 1.0]]), compass(10, 11, 12, -1))
    assert torch.equal(found, torch.tensor([[0.0, 1.0]]))


def test_while_the_queue_is_empty_an_embedding_is_its_own_neighbour() -> None:
    found = nearest(torch.tensor([[3.0, 4.0]]), compass(-1, -1, -1, -1))
    torch.testing.assert_close(found, torch.tensor([[0.6, 0.8]]))
    method: Any = tiny_method("nnclr").double()
    batch = batch_of(method)
    first, second = (method.projector(method.backbone(view)) for view in batch.views)
    simclr = [
        query_key_loss(one.detach(), method.predictor(other), batch.ids, temperature=0.2)
        for one, other in [(first, second), (second, first)]
    ]
    torch.testing.assert_close(method.loss(batch)["loss"], (simclr[0] + simclr[1]) / 2)


def test_a_neighbour_of_the_same_image_one_epoch_ago_is_taken() -> None:
    method = nnclr()
    batch = batch_of(method)
    method.queue.rows[3] = nn.functional.normalize(method.projector(method.backbone(batch.views[0])))[3]
    neighbours = nearest(method.projector(method.backbone(batch.views[0])), method.queue)
    assert torch.equal(neighbours[3], method.queue.rows[3])
    assert method.queue.ids[3] == batch.ids[3]


def test_neighbours_carry_no_gradient() -> None:
    embeddings = torch.randn(3, 2, requires_grad=True)
    assert not nearest(embeddings, compass(1, 2, 3, 4)).requires_grad


def test_no_image_is_its_own_neighbour_in_the_step_that_adds_it() -> None:
    method = nnclr()
    batch = batch_of(method)
    before = {name: value.clone() for name, value in method.queue.state_dict().items()}
    assert method.loss(batch)["loss"] == method.loss(batch)["loss"]
    for name, value in method.queue.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_after_the_step_the_queue_holds_the_first_view_of_each_image() -> None:
    method = nnclr()
    batch = batch_of(method)
    first = nn.functional.normalize(method.projector(method.backbone(batch.views[0])), dim=1)
    method.loss(batch)
    method.after_step(batch.now, batch.values)
    torch.testing.assert_close(method.queue.rows[16:22], first.detach())
    assert method.queue.ids[16:22].tolist() == batch.ids.tolist()
    assert method.queue.next == 22


def test_a_whole_step_runs_under_autocast_and_stores_unit_rows() -> None:
    method: Any = tiny_method("nnclr")
    for step in range(2):
        batch = batch_for(method, step=step)
        with torch.autocast("cpu", torch.bfloat16):
            loss = method.loss(batch)["loss"]
        assert loss.dtype == torch.float32
        loss.backward()
        method.after_step(batch.now, batch.values)
    torch.testing.assert_close(method.queue.rows.norm(dim=1), torch.ones(32), rtol=0, atol=1e-6)


# ---------------------------------------------------------------- settings


def test_the_projector_ends_in_a_batch_norm_and_the_predictor_does_not() -> None:
    method = nnclr()
    hidden = ["Linear", "BatchNorm1d", "ReLU"]
    assert [type(one).__name__ for one in method.projector] == [*hidden, *hidden, "Linear", "BatchNorm1d"]
    assert [type(one).__name__ for one in method.predictor] == [*hidden, "Linear"]


def test_on_imagenet_the_settings_are_the_papers() -> None:
    options = NNCLROptions.suited_to(IMAGENET)
    assert options == NNCLROptions()
    assert (options.temperature, options.queue_length, options.predictor_dim) == (0.1, 98_304, 4096)
    recipe = NNCLR.recipe(IMAGENET)
    assert (recipe.optimizer, recipe.lr, recipe.weight_decay) == ("lars", 0.3, 1e-6)


def test_the_queue_holds_at_most_half_of_few_images() -> None:
    assert NNCLROptions.suited_to(FACTS).queue_length == 32
    cifar = replace(FACTS, images=50_000, batch_size=256)
    assert NNCLROptions.suited_to(cifar).queue_length == 97 * 256


def test_there_are_two_views_of_one_kind() -> None:
    first, second = NNCLR.views(Augmentation(), NNCLROptions(), IMAGENET)
    assert replace(second, of="image") == first
    assert second.of == "partner"
