"""Barlow Twins: the features of two views correlate with themselves, and with no other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from torch import Tensor, nn

from training.backbones import Backbone
from training.distributed import gather
from training.heads import mlp
from training.method import Batch, Facts, Losses, Method, MethodOptions, Recipe
from training.precision import full_precision
from training.views import Augmentation, View

__all__ = ["BarlowTwins", "BarlowTwinsOptions", "barlow_twins_loss"]

EPSILON = 1e-5
"""Added to the variance, as a batch norm does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BarlowTwinsOptions(MethodOptions):
    """Settings of Barlow Twins."""

    redundancy: float = 0.0051
    """λ, the weight of the correlations between different features."""
    hidden_dim: int = 8192
    """Length of the projector's two hidden layers."""
    projection_dim: int = 8192
    """Number of features that are correlated; the paper gains up to 16,384."""
    loss_scale: float = 1.0
    """Factor on the loss: 1 for LARS, which minds no large gradients; 1/2048 for small images and SGD."""

    @classmethod
    def suited_to(cls, facts: Facts) -> Self:
        if not facts.small:
            return cls()
        # The loss is a sum over features. SGD at the common rate needs their mean: with the sum, the first
        # steps are so long that the features get worse than those of random weights.
        return cls(hidden_dim=2048, projection_dim=2048, loss_scale=1 / 2048)


class BarlowTwins(Method[BarlowTwinsOptions]):
    paper = "Zbontar et al. 2021, arXiv:2103.03230"
    summary = "two views' features correlate with themselves alone; no negatives, no momentum encoder"
    Options = BarlowTwinsOptions

    def __init__(self, backbone: Backbone, options: BarlowTwinsOptions, facts: Facts) -> None:
        super().__init__(backbone, options, facts)
        hidden = options.hidden_dim
        self.projector = mlp([backbone.dim, hidden, hidden, options.projection_dim], output_bias=False)

    @classmethod
    def recipe(cls, facts: Facts) -> Recipe:
        if facts.small:
            return Recipe(optimizer="sgd", lr=0.12, weight_decay=5e-4)
        # 0.2 for weights and 0.0048 for biases and norms.
        return Recipe(optimizer="lars", lr=0.2, bias_lr=0.0048 / 0.2, lr_end=0.001, weight_decay=1.5e-6)

    @classmethod
    def views(cls, augmentation: Augmentation, options: BarlowTwinsOptions, facts: Facts) -> tuple[View, ...]:
        # BYOL's views, and as there without inverted colours where images are small.
        solarize = 0.0 if facts.small else 0.2
        return (
            augmentation.view(facts.size, blur=1.0),
            augmentation.view(facts.size, blur=0.1, solarize=solarize, of="partner"),
        )

    @property
    def projection(self) -> nn.Module:
        return self.projector

    def loss(self, batch: Batch) -> Losses:
        first, second = (self.projector(self.backbone(view)) for view in batch.views)
        on_diagonal, off_diagonal = barlow_twins_loss(first, second)
        loss = self.options.loss_scale * (on_diagonal + self.options.redundancy * off_diagonal)
        return {"loss": loss, "on_diagonal": on_diagonal.detach(), "off_diagonal": off_diagonal.detach()}


@full_precision
def barlow_twins_loss(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """The two terms of the loss over the joined batch of all ranks (Zbontar et al. 2021, eq. 1 and 2).

    Every rank gets the same value; with the gradient of `gather` that is the joined batch's gradient.

    Args:
        first: float [B, dim], the first view of each image.
        second: float [B, dim], the second, in the same order.

    Returns:
        Σᵢ (1 − cᵢᵢ)² and Σᵢ Σⱼ≠ᵢ cᵢⱼ², where c [dim, dim] correlates the features of one view with those
        of the other; float [] each, in float32 or the float64 of the inputs.
    """
    first, second = _standardize(gather(first)), _standardize(gather(second))
    correlation = first.T @ second / len(first)
    own = correlation.diagonal()
    return (1 - own).square().sum(), correlation.square().sum() - own.square().sum()


def _standardize(rows: Tensor) -> Tensor:
    """Mean 0 and variance 1 for every feature: a batch norm without scale and shift."""
    centred = rows - rows.mean(0)
    return centred * (centred.square().mean(0) + EPSILON).rsqrt()
