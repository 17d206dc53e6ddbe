"""The momentum encoder: a copy that follows, and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from training.momentum import momentum_copy, update_momentum


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def change(module: nn.Module) -> None:
    """Another value for every parameter."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter))


def test_a_copy_starts_equal_takes_no_gradient_and_is_independent() -> None:
    online = network()
    target = momentum_copy(online)
    before = [one.clone() for one in online.parameters()]
    assert all(torch.equal(one, other) for one, other in zip(target.parameters(), before, strict=True))
    assert not any(one.requires_grad for one in target.parameters())
    assert all(one.requires_grad for one in online.parameters())
    change(online)
    assert all(torch.equal(one, other) for one, other in zip(target.parameters(), before, strict=True))


def test_a_target_keeps_the_share_of_itself_that_the_momentum_says() -> None:
    online = network().double()
    target = momentum_copy(online)
    change(online)
    expected = [
        0.9 * one + 0.1 * other for one, other in zip(target.parameters(), online.parameters(), strict=True)
    ]
    sources = [one.clone() for one in online.parameters()]
    update_momentum(online, target, 0.9)
    for found, wanted in zip(target.parameters(), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-15)
    assert all(torch.equal(one, other) for one, other in zip(online.parameters(), sources, strict=True))


def test_momentum_1_leaves_a_target_as_it_is_and_0_makes_it_equal() -> None:
    online = network()
    target = momentum_copy(online)
    change(online)
    before = [one.clone() for one in target.parameters()]
    update_momentum(online, target, 1.0)
    assert all(torch.equal(one, other) for one, other in zip(target.parameters(), before, strict=True))
    update_momentum(online, target, 0.0)
    for one, other in zip(target.parameters(), online.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_the_batch_norms_of_a_target_keep_their_own_statistics() -> None:
    online = network()
    target = momentum_copy(online)
    online(torch.randn(8, 3) + 5)
    update_momentum(online, target, 0.0)
    assert torch.equal(target[1].running_mean, torch.zeros(4))
    assert target[1].num_batches_tracked == 0
    target(torch.randn(8, 3))
    assert target[1].num_batches_tracked == 1
    assert online[1].num_batches_tracked == 1


def test_a_target_follows_frozen_parameters_too() -> None:
    online = network()
    online[0].requires_grad_(False)
    target = momentum_copy(online)
    change(online)
    update_momentum(online, target, 0.5)
    assert not torch.equal(target[0].weight, online[0].weight)


def test_an_update_leaves_no_graph() -> None:
    online = network()
    target = momentum_copy(online)
    update_momentum(online, target, 0.5)
    assert all(one.grad_fn is None for one in target.parameters())


def test_modules_of_another_form_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        update_momentum(network(), momentum_copy(network()[:2]), 0.5)
