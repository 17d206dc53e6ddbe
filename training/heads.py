"""Projection and prediction heads."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import nn

__all__ = ["mlp"]


def mlp(
    sizes: Sequence[int],
    *,
    hidden_norm: bool = True,
    output_norm: bool = False,
    output_affine: bool = True,
    output_bias: bool | None = None,
) -> nn.Sequential:
    """Linear layers with batch norm and ReLU between them: `mlp([512, 2048, 128])` has one hidden layer.

    Args:
        sizes: Lengths of input, hidden layers and output.
        hidden_norm: Batch norm before each ReLU. A linear layer before a batch norm has no bias.
        output_norm: Batch norm on the output (SimCLR, SimSiam, MoCo v3).
        output_affine: Whether the output's batch norm learns a scale and shift.
        output_bias: A bias in the last layer; by default where no batch norm follows.

    Returns:
        float [B, sizes[0]] → [B, sizes[-1]].
    """
    layers: list[nn.Module] = []
    last = len(sizes) - 2
    for index, (before, after) in enumerate(itertools.pairwise(sizes)):
        if index < last:
            layers.append(nn.Linear(before, after, bias=not hidden_norm))
            if hidden_norm:
                layers.append(nn.BatchNorm1d(after))
            layers.append(nn.ReLU(inplace=True))
        else:
            layers.append(
                nn.Linear(before, after, bias=not output_norm if output_bias is None else output_bias)
            )
            if output_norm:
                layers.append(nn.BatchNorm1d(after, affine=output_affine))
    return nn.Sequential(*layers)
