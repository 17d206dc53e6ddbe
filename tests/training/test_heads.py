"""What `mlp` builds."""

from __future__ import annotations

import torch
from torch import nn

from training.heads import mlp


def kinds(head: nn.Sequential) -> list[str]:
    return [type(layer).__name__ for layer in head]


def linears(head: nn.Sequential) -> list[nn.Linear]:
    return [layer for layer in head if isinstance(layer, nn.Linear)]


def test_two_sizes_are_one_linear_layer() -> None:
    head = mlp([4, 3])
    assert kinds(head) == ["Linear"]
    assert linears(head)[0].bias is not None


def test_between_linear_layers_lie_batch_norm_and_relu() -> None:
    head = mlp([4, 6, 5, 3])
    assert kinds(head) == ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear"]
    assert [(one.in_features, one.out_features) for one in linears(head)] == [(4, 6), (6, 5), (5, 3)]


def test_a_linear_layer_before_a_batch_norm_has_no_bias() -> None:
    assert [one.bias is not None for one in linears(mlp([4, 6, 5, 3]))] == [False, False, True]
    assert [one.bias is not None for one in linears(mlp([4, 6, 3], output_norm=True))] == [False, False]
    assert [one.bias is not None for one in linears(mlp([4, 6, 3], hidden_norm=False))] == [True, True]


def test_the_last_bias_can_be_chosen() -> None:
    assert linears(mlp([4, 6, 3], output_bias=False))[-1].bias is None
    assert linears(mlp([4, 6, 3], output_norm=True, output_bias=True))[-1].bias is not None


def test_without_hidden_norm_only_relu_lies_between() -> None:
    assert kinds(mlp([4, 6, 3], hidden_norm=False)) == ["Linear", "ReLU", "Linear"]


def test_an_output_norm_learns_scale_and_shift_unless_told_otherwise() -> None:
    assert len(list(mlp([4, 3], output_norm=True)[-1].parameters())) == 2
    assert len(list(mlp([4, 3], output_norm=True, output_affine=False)[-1].parameters())) == 0


def test_a_normed_output_has_mean_zero_and_variance_one_over_the_batch() -> None:
    torch.manual_seed(0)
    projected = mlp([4, 8, 3], output_norm=True).double()(torch.randn(32, 4, dtype=torch.float64))
    assert projected.shape == (32, 3)
    torch.testing.assert_close(projected.mean(0), torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(
        projected.var(0, correction=0), torch.ones(3, dtype=torch.float64), atol=1e-3, rtol=0
    )
