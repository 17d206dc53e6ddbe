"""Several ranks are one: gathering, sums and batch norm over real gloo process groups."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor, nn

from embedserve.errors import InvalidField
from tests.training.ranks import on_ranks
from training.batch_norm import SyncBatchNorm, synchronize_batch_norms
from training.distributed import agreed, all_mean, all_sum, any_rank, gather, process_group, rank, world_size

ROWS = torch.arange(12, dtype=torch.float64).view(4, 3).sin()


def _mine(rows: Tensor) -> Tensor:
    return rows.chunk(world_size())[rank()].clone().requires_grad_()


def _loss_over_gathered(mine: Tensor) -> Tensor:
    every = gather(mine)
    return (mine @ every.T).exp().sum(1).log().mean()


def _gathered_gradient() -> tuple[Tensor, Tensor]:
    mine = _mine(ROWS)
    loss = _loss_over_gathered(mine)
    loss.backward()
    assert mine.grad is not None
    return loss.detach(), mine.grad / world_size()  # DDP averages over ranks


def test_a_gathered_loss_averages_to_the_loss_and_gradient_of_the_joined_batch() -> None:
    joined = ROWS.clone().requires_grad_()
    expected = _loss_over_gathered(joined)
    expected.backward()
    results = on_ranks(_gathered_gradient)
    torch.testing.assert_close(torch.stack([loss for loss, _ in results]).mean(), expected.detach())
    torch.testing.assert_close(torch.cat([gradient for _, gradient in results]), joined.grad)


def _summed() -> tuple[Tensor, Tensor, Tensor]:
    mine = _mine(ROWS)
    total = all_sum(mine.sum(0))
    (total * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert mine.grad is not None
    return total.detach(), all_mean(mine.detach().sum()), mine.grad / world_size()


def test_a_sum_over_ranks_sends_every_ranks_gradient_back() -> None:
    for total, mean, gradient in on_ranks(_summed):
        torch.testing.assert_close(total, ROWS.sum(0))
        torch.testing.assert_close(mean, ROWS.sum() / 2)
        torch.testing.assert_close(gradient, torch.tensor([[1.0, 2.0, 3.0]] * 2, dtype=torch.float64))


def _network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)).double()


def _normalised() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    network = _network()
    synchronize_batch_norms(network, torch.device("cpu"))
    assert isinstance(network[1], SyncBatchNorm)
    images = _mine(_images())
    out = network(images)
    (out**3).sum().backward()
    weight = network[0].weight.grad
    running = network[1].running_var
    assert images.grad is not None
    assert isinstance(weight, Tensor)
    assert isinstance(running, Tensor)
    return out.detach(), images.grad, all_sum(weight), running


def _images() -> Tensor:
    return torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_batch_norm_over_two_ranks_is_that_of_the_joined_batch() -> None:
    network, images = _network(), _images().requires_grad_()
    out = network(images)
    (out**3).sum().backward()
    results = on_ranks(_normalised)
    torch.testing.assert_close(torch.cat([one[0] for one in results]), out.detach())
    torch.testing.assert_close(torch.cat([one[1] for one in results]), images.grad)
    torch.testing.assert_close(results[0][2], network[0].weight.grad)
    torch.testing.assert_close(results[1][3], network[1].running_var)


def test_a_synchronised_network_keeps_its_weights_and_their_names() -> None:
    network = _network()
    before = network.state_dict()
    after = synchronize_batch_norms(_network(), torch.device("cpu")).state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def _flags() -> tuple[bool, bool]:
    return any_rank(rank() == 1), any_rank(False)


def test_all_ranks_learn_of_one_ranks_flag() -> None:
    assert on_ranks(_flags) == [(True, False), (True, False)]


def _agreement() -> tuple[bool, bool]:
    return agreed(7), agreed(rank())


def test_ranks_know_whether_they_agree() -> None:
    assert on_ranks(_agreement) == [(True, False), (True, False)]
    assert agreed(3)


def test_alone_everything_is_the_identity() -> None:
    assert gather(ROWS) is ROWS
    assert all_sum(ROWS) is ROWS
    assert (rank(), world_size(), any_rank(True)) == (0, 1, True)


@pytest.mark.parametrize("device", ["gpu", "cuda:99"] if not torch.cuda.is_available() else ["gpu"])
def test_an_unknown_device_is_refused_with_what_is_allowed(device: str) -> None:
    with pytest.raises(InvalidField, match=r"use (auto|device=cpu)"), process_group(device):
        pass


def test_a_process_started_alone_makes_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(os.environ, "RANK", raising=False)
    with process_group("cpu") as device:
        assert device.type == "cpu"
        assert world_size() == 1
