"""The momentum encoder: a copy that follows by an exponential moving average (EMA)."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn

if TYPE_CHECKING:
    from training.method import Facts

__all__ = ["momentum_copy", "suited_momentum", "update_momentum"]

M = TypeVar("M", bound=nn.Module)


def momentum_copy(module: M) -> M:
    """A copy of `module` that takes no gradient. Its batch norms keep their own running statistics."""
    return copy.deepcopy(module).requires_grad_(False)


@torch.no_grad()
def update_momentum(online: nn.Module, target: nn.Module, momentum: float) -> None:
    """target ← momentum · target + (1 − momentum) · online, for every parameter (He et al. 2020, eq. 2).

    Buffers are left alone: the target's batch norms gather statistics in its own forward passes.

    Args:
        momentum: 0..1; 1 leaves the target as it is.
    """
    pairs = list(zip(target.parameters(), online.parameters(), strict=True))
    # One fused kernel for all parameters instead of one for each.
    torch._foreach_lerp_([one for one, _ in pairs], [other for _, other in pairs], 1 - momentum)


def suited_momentum(most: float, facts: Facts) -> float:
    """The momentum of an encoder that looks back over a twentieth of the training at most: `most` or less.

    With .999 the momentum encoder is the mean of about 1,000 steps, which may be all there are.
    """
    return min(most, max(1 - 20 / (facts.epochs * facts.steps_per_epoch), 0.9))
